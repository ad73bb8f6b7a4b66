"""Step 4: backward of the gate, elementwise over the sorted rows.

A is recomputed from Z instead of saved, and the routing weight's gradient <dA0, A> = <dO[t], Y> needs no Y. One
pass reads dA0 and Z and writes dZ and wA; wA takes the memory of dA0. A GEMM with this as its epilogue was slower:
the loads and stores of the epilogue did not overlap its math.
"""

import torch
import triton
import triton.language as tl

from moe_kernels.activation import gate_value_and_derivative
from moe_kernels.routing import RoutingPlan


@triton.jit
def dact_kernel(
    da_ptr,  # (R, I): dA0 in, wA out
    z_ptr,  # (R, 2I)
    topk_weights_ptr,  # (T * K,)
    dz_ptr,  # (R, 2I)
    dw_ptr,  # (T * K,)
    row_slot_ptr,  # (R,)
    routed_ptr,  # expert_start[E]: rows at or after it belong to dropped slots
    R,
    I,
    ACTIVATION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    slot = tl.load(row_slot_ptr + rows, mask=rows < R, other=0)
    routed = rows < tl.load(routed_ptr)
    weight = tl.load(topk_weights_ptr + slot, mask=routed, other=0.0).to(tl.float32)[:, None]
    dw = tl.zeros((BLOCK_R,), tl.float32)
    a_rows = rows.to(tl.int64)[:, None] * I
    for i0 in range(0, I, BLOCK_I):
        cols = (i0 + tl.arange(0, BLOCK_I))[None, :]
        mask = routed[:, None] & (cols < I)
        gate_offsets = 2 * a_rows + cols
        da = tl.load(da_ptr + a_rows + cols, mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(z_ptr + gate_offsets, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(z_ptr + gate_offsets + I, mask=mask, other=0.0).to(tl.float32)
        value, derivative = gate_value_and_derivative(gate, ACTIVATION)
        a = value * up
        dw += tl.sum(da * a, axis=1)
        da *= weight
        tl.store(da_ptr + a_rows + cols, (weight * a).to(da_ptr.dtype.element_ty), mask=mask)
        tl.store(dz_ptr + gate_offsets, (da * up * derivative).to(dz_ptr.dtype.element_ty), mask=mask)
        tl.store(dz_ptr + gate_offsets + I, (da * value).to(dz_ptr.dtype.element_ty), mask=mask)
    tl.store(dw_ptr + slot, dw.to(dw_ptr.dtype.element_ty), mask=rows < R)


def dact(
    da: torch.Tensor, z: torch.Tensor, topk_weights: torch.Tensor, plan: RoutingPlan, activation: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """da (R, I) = dA0, z (R, 2I), topk_weights (T, K) -> dZ (R, 2I), wA (R, I) in the memory of ``da``, dw (T, K)."""
    dz, dw = torch.empty_like(z), torch.empty_like(topk_weights)
    if plan.rows == 0:
        return dz, da, dw
    intermediate = da.shape[1]
    block_i = min(triton.next_power_of_2(intermediate), 1024)
    block_r = max(1, 1024 // block_i)
    dact_kernel[(triton.cdiv(plan.rows, block_r),)](
        da,
        z,
        topk_weights,
        dz,
        dw,
        plan.row_slot,
        plan.expert_start[plan.experts :],
        plan.rows,
        intermediate,
        ACTIVATION=activation,
        BLOCK_R=block_r,
        BLOCK_I=block_i,
        num_warps=4,
    )
    return dz, da, dw
