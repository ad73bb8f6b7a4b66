"""The memory of a Hopper kernel's barriers belongs to them until it ends.

The compiler gives the memory of what is not used any more to something else, and counts a barrier that is initialised
and then never waited on among it. PTX forbids that (``mbarrier.inval`` would have to come before). The GPU does not
mind, but compute-sanitizer, which follows barriers, did: such kernels hung or read wrong addresses under racecheck.
"""

import os
import re
import subprocess
import sys

import pytest

from support import aot, environment

pytestmark = pytest.mark.skipif(
    os.environ.get("MOE_KERNELS_AOT") != "1", reason="needs the compiler: make test-compiled"
)
NAMES = ("up", "down", "dgrad", "wgrad-dW1", "wgrad-dW1-gather", "wgrad-dW2-gather", "down_grad", "down_grad-gather")
KERNELS = [f"hopper-{name}-silu-bf16" for name in NAMES] + ["hopper-down-silu-bf16-ping-pong-large-weights"]
BYTES = 8  # of a barrier


def ptx_of(case):
    return aot.compiled(case, 90).asm["ptx"]


def barriers(ptx):
    """Offsets in shared memory at which barriers are initialised."""
    registers = re.findall(r"mbarrier\.init\S*\s+\[(%r\d+)\]", ptx)
    return {int(re.search(rf"add\.s32\s+{register}, %r\d+, (\d+);", ptx)[1]) for register in registers}


def handed_over(ptx):
    """Offsets of the words through which warp_specialize hands the partitions their arguments."""
    return {int(offset) for offset in re.findall(r"st\.shared\S*\s+\[global_smem\+(\d+)\]", ptx)}


@pytest.mark.parametrize("name", KERNELS)
def test_memory_of_barriers_is_not_used_again(name):
    from support import hopper_catalog as catalog

    ptx = ptx_of(next(case for case in catalog.compile_cases() if case.name == name))
    found, words = barriers(ptx), handed_over(ptx)
    assert len(found) == ptx.count("mbarrier.init") >= 8
    assert words
    assert not [word for word in words if any(barrier <= word < barrier + BYTES for barrier in found)]


DELAYED = """
import sys
sys.path.insert(0, sys.argv[1])
from test_barriers import KERNELS, ptx_of
from support import delays
delays.install()
from support import hopper_catalog as catalog
for case in catalog.compile_cases():
    if case.name in KERNELS:
        print(ptx_of(case).count("nanosleep"))
"""


def test_each_kernel_compiles_with_delays():
    """What tests/device/test_delays_gpu.py runs. In a process of its own: kernels there stay so."""
    here = os.path.dirname(__file__)
    ran = subprocess.run(
        [sys.executable, "-c", DELAYED, here],
        env=environment(), capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    counts = [int(count) for count in ran.stdout.split()]
    assert len(counts) == len(KERNELS)
    assert min(counts) >= 12
