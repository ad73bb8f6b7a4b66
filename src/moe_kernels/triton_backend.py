"""The Triton backend: the steps as kernels for sm_80 and later.

Hopper and data-centre Blackwell load weights and sorted rows by TMA. Other GPUs, and tensors whose rows are not
multiples of 16 elements, use pointer loads. The math is the same.
"""

from __future__ import annotations

import torch

from moe_kernels.activation import Gate
from moe_kernels.backends import Problem
from moe_kernels.kernels.device import driver_fault, interpreting
from moe_kernels.kernels.triton.combine import combine, combine_grad, gather
from moe_kernels.kernels.triton.dact import dact, down_grad
from moe_kernels.kernels.triton.expert_sum import expert_sum
from moe_kernels.kernels.triton.grouped_gemm import dgrad, down
from moe_kernels.kernels.triton.plan import make_plan
from moe_kernels.kernels.triton.up import up, up_low
from moe_kernels.kernels.triton.wgrad import wgrad
from moe_kernels.routing import RoutingPlan

NAME = "triton"
COMPILES = True  # before its first launch: its kernels are compiled side by side ahead of that
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
__all__ = [
    "COMPILES",
    "NAME",
    "combine",
    "combine_grad",
    "dact",
    "dgrad",
    "dout_rows",
    "down",
    "down_grad",
    "expert_sum",
    "gather",
    "make_plan",
    "up",
    "up_low",
    "wgrad",
    "why_not",
]


def dout_rows(dout: torch.Tensor, weight: torch.Tensor, plan: RoutingPlan, gate: Gate, plain: bool) -> torch.Tensor:
    """dO (T, H) in expert order (R, H), for ``down_grad`` and the gradient of W2."""
    return gather(dout, plan)


def why_not(problem: Problem) -> str | None:
    """None if these kernels run ``problem``, else the reason and the cure."""
    if problem.device_type != "cuda" and not interpreting():
        return f"tensors are on {problem.device_type}: move the model to an NVIDIA GPU, or use backend='torch'."
    if problem.capability is not None and problem.capability < (8, 0):
        return f"compute capability {problem.capability} is below (8, 0): use an A100 or newer."
    if problem.dtype not in DTYPES:
        return f"dtype {problem.dtype} is not bfloat16, float16 or float32: cast the model to bfloat16."
    fault = driver_fault() if problem.device_type == "cuda" else None
    if fault is not None:
        return f"{fault}: install a C compiler and Python's headers, or triton anew, in one place."
    return None
