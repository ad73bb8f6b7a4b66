"""The Triton backend: the steps as kernels for sm_80 and later.

Hopper and data-centre Blackwell load weights and sorted rows by TMA. Other GPUs, and tensors whose rows are not
multiples of 16 elements, use pointer loads. The math is the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_kernels.activation import Gate
from moe_kernels.backends.protocol import Backend
from moe_kernels.fp8 import Fp8Rows, Fp8Weight
from moe_kernels.kernels.device import driver_fault, interpreting, passes_by_the_gpu
from moe_kernels.kernels.triton import fp8, grouped_gemm
from moe_kernels.kernels.triton import up as up_projection
from moe_kernels.kernels.triton.combine import combine, combine_grad, gather
from moe_kernels.kernels.triton.dact import dact
from moe_kernels.kernels.triton.factors import experts_last, pack_factors
from moe_kernels.kernels.triton.plan import make_plan
from moe_kernels.kernels.triton.row_pass import added_grads, lora_a_grad
from moe_kernels.kernels.triton.wgrad import wgrad
from moe_kernels.layer import DownGrads, GemmRows, Matrix, Rows, Weight, in_expert_order
from moe_kernels.problem import Problem
from moe_kernels.routing import RoutingPlan, TokenRows

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class TritonBackend(Backend):
    """Steps as Triton kernels."""

    name = "triton"

    def why_not(self, problem: Problem) -> str | None:
        if problem.device_type != "cuda" and not interpreting():
            return f"tensors are on {problem.device_type}: move the model to an NVIDIA GPU, or use backend='torch'."
        if problem.device_type == "cuda" and passes_by_the_gpu():
            return "TRITON_INTERPRET=1 runs kernels on the CPU, and in bfloat16 wrongly: unset it and start again."
        if problem.capability is not None and problem.capability < (8, 0):
            return f"compute capability {problem.capability} is below (8, 0): use an A100 or newer."
        if problem.dtype not in DTYPES:
            return f"dtype {problem.dtype} is not bfloat16, float16 or float32: cast the model to bfloat16."
        fault = driver_fault() if problem.device_type == "cuda" else None
        if fault is not None:
            return f"{fault}: install a C compiler and Python's headers, or triton anew, in one place."
        return None

    make_plan = staticmethod(make_plan)
    combine = staticmethod(combine)
    gather = staticmethod(gather)
    dact = staticmethod(dact)
    combine_grad = staticmethod(combine_grad)
    added_grads = staticmethod(added_grads)
    lora_a_grad = staticmethod(lora_a_grad)
    pack_factors = staticmethod(pack_factors)
    experts_last = staticmethod(experts_last)

    def low(self, rows: Rows, lora_a: Tensor, plan: RoutingPlan) -> Tensor:
        if isinstance(rows, Tensor):
            return grouped_gemm.down(rows, Weight(lora_a), plan)
        return up_projection.gathered_low(rows, lora_a, plan)

    def up(self, x: Tensor, weight: Weight, plan: RoutingPlan, gate: Gate, save_z: bool) -> tuple[Tensor, Tensor]:
        if isinstance(weight.matrix, Fp8Weight):
            return fp8.up(self.fp8_gemm(weight), x, weight, plan, gate, save_z)
        return up_projection.up(x, weight, plan, gate, save_z)

    def down(self, a: Tensor, weight: Weight, plan: RoutingPlan) -> Tensor:
        if isinstance(weight.matrix, Fp8Weight):
            return fp8.down(self.fp8_gemm(weight), a, weight, plan)
        return grouped_gemm.down(a, weight, plan)

    def dgrad(self, rows: GemmRows, weight: Weight, plan: RoutingPlan) -> Tensor:
        if isinstance(weight.matrix, Fp8Weight):
            return fp8.dgrad(self.fp8_gemm(weight), rows, weight, plan)
        assert not isinstance(rows, Fp8Rows)
        return grouped_gemm.dgrad(in_expert_order(rows, plan, gather), weight, plan)

    def fp8_gemm(self, weight: Weight) -> fp8.Gemm:
        """What multiplies rows with an ``Fp8Weight``."""
        return fp8.gemm

    def dout_rows(self, dout: Tensor, down: Matrix, plan: RoutingPlan, gate: Gate) -> Rows:
        if isinstance(down, Fp8Weight):  # rounded once a token, and gathered by the GEMM
            return TokenRows(dout, plan.top_k)
        return super().dout_rows(dout, down, plan, gate)

    def down_grad(
        self,
        dout_rows: Rows,
        weight: Weight,
        z: Tensor,
        topk_weights: Tensor,
        plan: RoutingPlan,
        gate: Gate,
        overwrite_z: bool = False,
        bias_dot: Tensor | None = None,
        needs_wa: bool = True,
    ) -> DownGrads:
        da = TritonBackend.dgrad(self, dout_rows, weight, plan)
        rounds = isinstance(weight.matrix, Fp8Weight) and not gate.interleaved  # nor is such a gate_up
        return dact(da, z, topk_weights, plan, gate, overwrite_z, bias_dot, needs_wa, rounds)

    def wgrad(self, left: Rows, right: Rows, plan: RoutingPlan) -> Tensor:
        return wgrad(in_expert_order(left, plan, gather), in_expert_order(right, plan, gather), plan)
