"""The Triton backend: the steps as kernels for sm_80 and later.

Hopper and data-centre Blackwell load weights and sorted rows by TMA. Other GPUs, and tensors whose rows are not
multiples of 16 elements, use pointer loads. The math is the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_kernels.activation import Gate
from moe_kernels.backends.protocol import Backend, in_expert_order
from moe_kernels.kernels.device import driver_fault, interpreting
from moe_kernels.kernels.triton.combine import combine, combine_grad, gather
from moe_kernels.kernels.triton.dact import dact
from moe_kernels.kernels.triton.expert_sum import expert_sum
from moe_kernels.kernels.triton.grouped_gemm import dgrad, down
from moe_kernels.kernels.triton.plan import make_plan
from moe_kernels.kernels.triton.up import up, up_low
from moe_kernels.kernels.triton.wgrad import wgrad
from moe_kernels.layer import Rows, Weight
from moe_kernels.problem import Problem
from moe_kernels.routing import RoutingPlan

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class TritonBackend(Backend):
    """Steps as Triton kernels."""

    name = "triton"

    def why_not(self, problem: Problem) -> str | None:
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

    make_plan = staticmethod(make_plan)
    up = staticmethod(up)
    up_low = staticmethod(up_low)
    down = staticmethod(down)
    combine = staticmethod(combine)
    gather = staticmethod(gather)
    dgrad = staticmethod(dgrad)
    dact = staticmethod(dact)
    combine_grad = staticmethod(combine_grad)
    expert_sum = staticmethod(expert_sum)

    def down_grad(
        self,
        dout_rows: Rows,
        weight: Weight,
        z: Tensor,
        topk_weights: Tensor,
        plan: RoutingPlan,
        gate: Gate,
        overwrite_z: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = in_expert_order(dout_rows, plan, self)
        da = dgrad(rows, weight._replace(bias=None), plan)
        return dact(da, z, topk_weights, plan, gate, overwrite_z, rows, weight.bias)

    def wgrad(self, left: Rows, right: Tensor, plan: RoutingPlan) -> Tensor:
        return wgrad(in_expert_order(left, plan, self), right, plan)
