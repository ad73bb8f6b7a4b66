"""Step 4: gathered dO W2[e] with the activation's backward in the epilogue.

The epilogue reads Z, so A is recomputed there instead of saved, and the routing weight's gradient
<dO[t] W2[e], A> needs no Y: each column block leaves one partial sum per row, added up in a fixed order later.
"""

import torch
import triton
import triton.language as tl

from moe_kernels.activation import gate_value_and_derivative
from moe_kernels.kernels.triton.launch import descriptor, dot_precision, launch_tiles, tma_fits
from moe_kernels.kernels.triton.tile import (
    gathered_tokens,
    load_rows,
    load_weight_kn,
    row_tile,
    split_columns,
    store_tile,
    swizzled_tile,
)
from moe_kernels.routing import RoutingPlan
from moe_kernels.tuning.config import select_config


@triton.jit
def _epilogue(
    da,  # [BLOCK_M, QUARTER] of dA0
    z_ptr,
    dz_ptr,
    wa_ptr,
    rows,
    row_mask,
    weight,
    n0,
    I,
    ACTIVATION: tl.constexpr,
    QUARTER: tl.constexpr,
):
    """Store dZ and wA of columns [n0, n0 + QUARTER) and return each row's <dA0, A> over them."""
    cols = n0 + tl.arange(0, QUARTER)
    mask = row_mask[:, None] & (cols < I)[None, :]
    gate_ptrs = z_ptr + rows.to(tl.int64)[:, None] * (2 * I) + cols[None, :]
    gate = tl.load(gate_ptrs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_ptrs + I, mask=mask, other=0.0).to(tl.float32)
    value, derivative = gate_value_and_derivative(gate, ACTIVATION)
    a = value * up
    weighted = da * weight[:, None]
    store_tile(wa_ptr, rows, row_mask, n0, I, a * weight[:, None], QUARTER, I - n0)
    store_tile(dz_ptr, rows, row_mask, n0, 2 * I, weighted * up * derivative, QUARTER, I - n0)
    store_tile(dz_ptr, rows, row_mask, I + n0, 2 * I, weighted * value, QUARTER, I - n0)
    return tl.sum(tl.where(mask, da * a, 0.0), axis=1)


@triton.jit
def dact_kernel(
    dout_ptr,  # (T, H)
    w,  # (E, H, I): tensor or descriptor
    z_ptr,  # (R, 2I)
    topk_weights_ptr,  # (T * K,)
    dz_ptr,  # (R, 2I)
    wa_ptr,  # (R, I)
    partial_ptr,  # (cdiv(I, BLOCK_N), R) float32
    row_slot_ptr,
    expert_start_ptr,
    tile_expert_ptr,
    tile_row_ptr,
    tile_count_ptr,
    H,
    I,
    R,
    TOP_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    USE_TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    num_m = tl.load(tile_count_ptr)
    num_n = tl.cdiv(I, BLOCK_N)
    for pid in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0)):
        m, n = swizzled_tile(pid, num_m, num_n, GROUP_M)
        expert, _, rows, row_mask = row_tile(m, tile_expert_ptr, tile_row_ptr, expert_start_ptr, BLOCK_M)
        slot, token = gathered_tokens(row_slot_ptr, rows, row_mask, TOP_K)
        n0 = n * BLOCK_N
        da = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k0 in tl.range(0, H, BLOCK_K):
            dout = load_rows(dout_ptr, token, row_mask, k0, H, BLOCK_K, EVEN_K, False)
            w_block = load_weight_kn(w, expert, k0, n0, H, I, BLOCK_K, BLOCK_N, USE_TMA)
            da = tl.dot(dout, w_block, da, input_precision=PRECISION)

        weight = tl.load(topk_weights_ptr + slot, mask=row_mask, other=0.0).to(tl.float32)
        partial = tl.zeros((BLOCK_M,), tl.float32)
        # Column quarters one after the other: the whole tile's Z, A, dZ and wA would not fit the registers.
        left, right = split_columns(da)
        da0, da1 = split_columns(left)
        da2, da3 = split_columns(right)
        QUARTER: tl.constexpr = BLOCK_N // 4
        for q in tl.static_range(4):
            da_q = da0 if q == 0 else (da1 if q == 1 else (da2 if q == 2 else da3))
            partial += _epilogue(
                da_q, z_ptr, dz_ptr, wa_ptr, rows, row_mask, weight, n0 + q * QUARTER, I, ACTIVATION, QUARTER
            )
        tl.store(partial_ptr + n.to(tl.int64) * R + rows, partial, mask=row_mask)


def dact(
    dout: torch.Tensor,
    weight: torch.Tensor,
    z: torch.Tensor,
    topk_weights: torch.Tensor,
    plan: RoutingPlan,
    activation: str,
    persistent: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dout (T, H), weight (E, H, I), z (R, 2I), topk_weights (T, K) -> dZ (R, 2I), wA (R, I), partial <dA0, A>."""
    _, hidden, intermediate = weight.shape
    tma = tma_fits(weight)
    config = select_config("dact", weight.device, dout.dtype, plan.group_size, tma)
    w = descriptor(weight, 1, config.block_k, config.block_n) if tma else weight
    dz = torch.empty_like(z)
    wa = z.new_empty(plan.rows, intermediate)
    partial = z.new_empty(triton.cdiv(intermediate, config.block_n), plan.rows, dtype=torch.float32)
    launch_tiles(
        dact_kernel,
        config,
        plan,
        intermediate,
        persistent,
        (
            *(dout, w, z, topk_weights, dz, wa, partial),
            *(plan.row_slot, plan.expert_start, plan.tile_expert, plan.tile_row, plan.tile_count),
        ),
        (hidden, intermediate, plan.rows),
        TOP_K=plan.top_k,
        ACTIVATION=activation,
        USE_TMA=tma,
        EVEN_K=hidden % config.block_k == 0,
        PRECISION=dot_precision(dout.dtype),
    )
    return dz, wa, partial
