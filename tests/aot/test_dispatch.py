"""The words of shared memory through which warp_specialize starts its groups of warps lie between barriers.

racecheck of compute-sanitizer 2025.3 reports them as races; benchmarks/sanitize.py sets such reports aside.
So the order is read from the PTX: after a write comes the barrier that all threads of a program pass
(``barrier.sync 1``); a group reads its number right after that barrier, and passes it again after it has read what it
was handed.
"""

import inspect
import os
import re

import pytest
import triton
from triton.backends.compiler import GPUTarget

from moe_kernels.testing import aot

pytestmark = pytest.mark.skipif(
    os.environ.get("MOE_KERNELS_AOT") != "1", reason="needs the compiler: make test-compiled"
)
BARRIER = "barrier.sync 1"
NAMES = ("up", "down", "wgrad-dW1", "wgrad-dW2-gather", "down_grad", "down_grad-gather")
KERNELS = [f"hopper-{name}-silu-bf16" for name in NAMES]


def dispatch(ptx, lines):
    """Each access to shared memory, barrier, branch and label, in order, with whether it is the dispatch's."""
    mine = False
    for text in ptx.splitlines():
        text = " ".join(text.split("//")[0].split()).rstrip(";")
        text = re.sub(r"^@!?%p\d+ ", "", text)
        if text.startswith(".loc"):
            line = int(text.split()[2])
            mine = line in lines if line else mine  # 0 is no line: still the one before
        elif re.match(r"(st|ld)\.shared|bar(rier)?\.sync|bra|brx|ret|\$L__BB.*:$", text):
            yield mine, text


def problems(ptx, lines):
    found = []
    steps = list(dispatch(ptx, lines))
    for at, (mine, text) in enumerate(steps):
        if not mine or ".shared" not in text:
            continue
        after = next(t for _, t in steps[at + 1 :] if not t.startswith(text.split(".")[0] + ".shared"))
        before = steps[at - 1][1]
        if text.startswith("st.shared") and after != BARRIER:
            found.append(f"{text} is followed by {after}")
        if text.startswith("ld.shared.b8") and before != BARRIER:  # the number of the group
            found.append(f"{before} comes before {text}")
        if text.startswith("ld.shared") and not text.startswith("ld.shared.b8") and after != BARRIER:
            found.append(f"{text} is followed by {after}")
    return found, [text for mine, text in steps if mine and ".shared" in text]


@pytest.mark.parametrize("name", KERNELS)
def test_shared_words_of_the_dispatch_lie_between_barriers(name):
    from moe_kernels.kernels.hopper import catalog

    case = next(case for case in catalog.compile_cases() if case.name == name)
    source, first = inspect.getsourcelines(case.fn.fn)
    marks = ("def ", "gl.warp_specialize(")
    lines = {first + at for at, line in enumerate(source) if line.strip().startswith(marks)}
    signature = {name: case.types.get(name, "constexpr") for name in inspect.signature(case.fn.fn).parameters}
    program = aot.GluonASTSource(case.fn, signature, case.constants, aot._attributes(case))
    ptx = triton.compile(program, target=GPUTarget("cuda", 90, 32), options=dict(case.options)).asm["ptx"]
    found, words = problems(ptx, lines)
    assert found == []
    assert sum(text.startswith("st.shared") for text in words) >= 2  # the start and the end
    assert any(text.startswith("ld.shared.b8") for text in words)
    broken, _ = problems(ptx.replace("barrier.sync", "nop"), lines)
    assert broken
