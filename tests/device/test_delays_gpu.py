"""The kernels for Hopper whichever of their warps comes late, and in a thread without a context."""

import subprocess
import sys

import pytest
import torch

from moe_kernels.tools.check.verification import variants
from support import environment

pytestmark = [pytest.mark.gpu, pytest.mark.plain_memory]
if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9:
    pytest.skip("the Gluon kernels are for Hopper", allow_module_level=True)


def finished(*arguments):
    """What a process of its own printed: what is done to kernels and threads there stays there."""
    ran = subprocess.run(
        [sys.executable, *arguments], env=environment(), capture_output=True, text=True, timeout=1200, check=False
    )
    said = [line for line in (ran.stdout + ran.stderr).splitlines() if line.strip()]
    # The reason first: a kernel that did not end, an exception, or what was printed last.
    reason = next((line for line in said if line.startswith("Timeout")), said[-1] if said else "")
    assert ran.returncode == 0, "\n".join([reason, *said])
    return ran.stdout


def test_delays_change_nothing():
    from support.delays import CASES  # imports the kernels

    runs = finished("-m", "support.delays", "--seconds", "16").splitlines()
    assert all(line.endswith("runs, 0 that differ") for line in runs), "\n".join(runs)
    assert len(runs) == len(CASES) * len(variants("gluon"))


FIRST_CALL = """
import torch
from moe_kernels import fused_experts

x = torch.randn(64, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
ids = torch.arange(128, device="cuda").view(64, 2) % 4
weights = torch.rand(64, 2, device="cuda")
gate_up, down = (torch.randn(4, *s, device="cuda", dtype=torch.bfloat16) for s in ((256, 128), (128, 128)))
gradient = torch.randn(64, 128, device="cuda", dtype=torch.bfloat16)
fused_experts(x, ids, weights, gate_up, down, backend="gluon").backward(gradient)
assert x.grad.isfinite().all()
"""


def test_the_first_backward_pass_of_a_process():
    """Its first kernel takes tensor maps, and autograd's thread has called CUDA for nothing else yet."""
    finished("-c", FIRST_CALL)
