"""Step 1: gathered up projection with the activation in the epilogue.

One program computes the gate and the up columns of a block of A, so that the activation needs no second pass over Z.
It has two accumulators, or one of double width where gate and up rows are interleaved, or one where there is no gate.
"""

import torch
import triton
import triton.language as tl

from moe_kernels.activation import Gate, value
from moe_kernels.kernels.device import cdiv, dot_precision
from moe_kernels.kernels.launch.launch import launch_grid
from moe_kernels.kernels.operands import descriptor, low_rank_arguments, stored, tma_fits
from moe_kernels.kernels.tiles.config import select_config
from moe_kernels.kernels.tiles.fit import fit_columns, fit_rank
from moe_kernels.kernels.triton.dequantize import blocks
from moe_kernels.kernels.triton.tile import (
    add_bias,
    add_low_rank,
    gathered_tokens,
    load_rows,
    load_weight,
    multiply_add,
    row_tile,
    store_tile,
    swizzled_tile,
)
from moe_kernels.layer import Weight
from moe_kernels.routing import RoutingPlan, TokenRows


@triton.jit
def up_kernel(
    x_ptr,  # (T, H)
    w,  # (E, Z, H), or (E, H, Z) if W_IS_KN, with Z = 2I or I: tensor or descriptor
    bias_ptr,  # (E, Z), or any pointer unless HAS_BIAS
    low_ptr,  # (R, RANK), or any pointer if RANK is 0
    factor_ptr,  # (E, Z, RANK)
    z_ptr,  # (R, Z); not written unless SAVE_Z
    a_ptr,  # (R, I)
    row_slot_ptr,
    expert_start_ptr,
    tile_expert_ptr,
    tile_row_ptr,
    tile_count_ptr,
    H,
    I,
    W_STRIDE,  # elements from one expert's matrix to the next
    TOP_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    P0: tl.constexpr,
    P1: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    W_IS_KN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RANK: tl.constexpr,
    SAVE_Z: tl.constexpr,
    USE_TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # columns of A
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    num_m = tl.load(tile_count_ptr)
    num_n = tl.cdiv(I, BLOCK_N)
    for pid in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0)):
        m, n = swizzled_tile(pid, num_m, num_n, GROUP_M)
        expert, _, rows, row_mask = row_tile(m, tile_expert_ptr, tile_row_ptr, expert_start_ptr, BLOCK_M)
        _, token = gathered_tokens(row_slot_ptr, rows, row_mask, TOP_K)
        n0 = n * BLOCK_N
        if GATED and not INTERLEAVED:
            gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for k0 in tl.range(0, H, BLOCK_K):
                x = load_rows(x_ptr, token, row_mask, k0, H, BLOCK_K, EVEN_K, False)
                w_gate = load_weight(w, expert, n0, k0, 2 * I, H, W_STRIDE, BLOCK_N, BLOCK_K, W_IS_KN, USE_TMA)
                w_up = load_weight(w, expert, I + n0, k0, 2 * I, H, W_STRIDE, BLOCK_N, BLOCK_K, W_IS_KN, USE_TMA)
                gate = multiply_add(x, w_gate, gate, PRECISION)
                up = multiply_add(x, w_up, up, PRECISION)
            if RANK > 0:
                gate = add_low_rank(
                    gate, low_ptr, factor_ptr, expert, rows, row_mask, n0, 2 * I, RANK, False, BLOCK_N, PRECISION
                )
                up = add_low_rank(
                    up, low_ptr, factor_ptr, expert, rows, row_mask, I + n0, 2 * I, RANK, False, BLOCK_N, PRECISION
                )
            if HAS_BIAS:
                gate = add_bias(gate, bias_ptr, expert, n0, 2 * I, BLOCK_N)
                up = add_bias(up, bias_ptr, expert, I + n0, 2 * I, BLOCK_N)
            if SAVE_Z:
                store_tile(z_ptr, rows, row_mask, n0, 2 * I, gate, BLOCK_N, I - n0)
                store_tile(z_ptr, rows, row_mask, I + n0, 2 * I, up, BLOCK_N, I - n0)
            a = value(gate, up, ACTIVATION, P0, P1)
        else:
            PER_COLUMN: tl.constexpr = 2 if INTERLEAVED else 1  # columns of Z for one column of A
            BLOCK_Z: tl.constexpr = PER_COLUMN * BLOCK_N
            z0 = PER_COLUMN * n0
            z = tl.zeros((BLOCK_M, BLOCK_Z), tl.float32)
            for k0 in tl.range(0, H, BLOCK_K):
                x = load_rows(x_ptr, token, row_mask, k0, H, BLOCK_K, EVEN_K, False)
                block = load_weight(
                    w, expert, z0, k0, PER_COLUMN * I, H, W_STRIDE, BLOCK_Z, BLOCK_K, W_IS_KN, USE_TMA
                )
                z = multiply_add(x, block, z, PRECISION)
            if RANK > 0:
                z = add_low_rank(
                    *(z, low_ptr, factor_ptr, expert, rows, row_mask, z0, PER_COLUMN * I),
                    *(RANK, False, BLOCK_Z, PRECISION),
                )
            if HAS_BIAS:
                z = add_bias(z, bias_ptr, expert, z0, PER_COLUMN * I, BLOCK_Z)
            if SAVE_Z:
                store_tile(z_ptr, rows, row_mask, z0, PER_COLUMN * I, z, BLOCK_Z, PER_COLUMN * I - z0)
            if INTERLEAVED:
                gate, up = tl.split(tl.reshape(z, (BLOCK_M, BLOCK_N, 2)))
                a = value(gate, up, ACTIVATION, P0, P1)
            else:
                a = value(z, 1.0, ACTIVATION, P0, P1)
        store_tile(a_ptr, rows, row_mask, n0, I, a, BLOCK_N, I - n0)


def up(
    x: torch.Tensor, weight: Weight, plan: RoutingPlan, gate: Gate, save_z: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """x (T, H), weight (E, Z, H) -> Z (R, Z), empty unless save_z, and A (R, I)."""
    width = weight.matrix.shape[1]
    z = x.new_empty(plan.rows, width) if save_z else x.new_empty(0)
    a = x.new_empty(plan.rows, width // 2 if gate.gated else width)
    for part, tiles in blocks(weight, plan):
        _launch(x, part, tiles, plan.top_k, gate.constants(), z, a)
        del part
    return z, a


def gathered_low(rows: TokenRows, lora_a: torch.Tensor, plan: RoutingPlan) -> torch.Tensor:
    """X[token] lora_a[e]^T: x (T, H), lora_a (E, r, H) -> (R, r), the inner half of a low-rank product."""
    x, top_k = rows
    low = x.new_empty(plan.rows, lora_a.shape[1])
    identity = {"ACTIVATION": "identity", "P0": 0.0, "P1": 0.0, "GATED": False, "INTERLEAVED": False}
    _launch(x, Weight(lora_a), plan, top_k, identity, x.new_empty(0), low)
    return low


def _launch(
    x: torch.Tensor,
    weight: Weight,
    plan: RoutingPlan,
    top_k: int,
    gate: dict[str, object],
    z: torch.Tensor,
    a: torch.Tensor,
) -> None:
    hidden, width = x.shape[1], a.shape[1]
    assert isinstance(weight.matrix, torch.Tensor)
    matrix, w_is_kn = stored(weight.matrix)
    tma = tma_fits(matrix, x, a)
    plain = weight.plain and not w_is_kn and gate["GATED"] and not gate["INTERLEAVED"]
    sizes = (plan.rows_per_expert, width, hidden) if plain else None
    config = fit_columns(select_config("up", x.device, x.dtype, plan.group_size, tma, sizes), width)
    columns = config.block_n * (2 if gate["INTERLEAVED"] else 1)
    block = (config.block_k, columns) if w_is_kn else (columns, config.block_k)
    low, factor, rank = low_rank_arguments(weight, a)
    config = fit_rank(config, rank, x.device, x.element_size())
    launch_grid(
        up_kernel,
        config,
        plan.max_tiles * cdiv(width, config.block_n),
        plan.persistent,
        (
            x,
            descriptor(matrix, 1, *block) if tma else matrix,
            *(a if weight.bias is None else weight.bias, low, factor, z, a),
            *plan.tile_arguments,
        ),
        (hidden, width, matrix.stride(0)),
        {
            "TOP_K": top_k,
            **gate,
            "W_IS_KN": w_is_kn,
            "HAS_BIAS": weight.bias is not None,
            "RANK": rank,
            "SAVE_Z": z.numel() > 0,
            "USE_TMA": tma,
            "EVEN_K": hidden % config.block_k == 0,
            "PRECISION": dot_precision(x.dtype),
        },
    )
