"""Step 1: gathered up projection with the gate's activation in the epilogue.

Gate and up columns of one block live in one program (two accumulators), so A never re-reads Z.
"""

import torch
import triton
import triton.language as tl

from moe_kernels.activation import gate_value
from moe_kernels.kernels.triton.launch import descriptor, dot_precision, launch_tiles, tma_fits
from moe_kernels.kernels.triton.tile import (
    gathered_tokens,
    load_rows,
    load_weight_nk,
    row_tile,
    store_tile,
    swizzled_tile,
)
from moe_kernels.routing import RoutingPlan
from moe_kernels.tuning.config import select_config


@triton.jit
def up_kernel(
    x_ptr,  # (T, H)
    w,  # (E, 2I, H): tensor or descriptor
    z_ptr,  # (R, 2I); not written unless SAVE_Z
    a_ptr,  # (R, I)
    row_slot_ptr,
    expert_start_ptr,
    tile_expert_ptr,
    tile_row_ptr,
    tile_count_ptr,
    H,
    I,
    TOP_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SAVE_Z: tl.constexpr,
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
        _, token = gathered_tokens(row_slot_ptr, rows, row_mask, TOP_K)
        n0 = n * BLOCK_N
        gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k0 in tl.range(0, H, BLOCK_K):
            x = load_rows(x_ptr, token, row_mask, k0, H, BLOCK_K, EVEN_K, False)
            w_gate = load_weight_nk(w, expert, n0, k0, 2 * I, H, BLOCK_N, BLOCK_K, USE_TMA)
            w_up = load_weight_nk(w, expert, I + n0, k0, 2 * I, H, BLOCK_N, BLOCK_K, USE_TMA)
            gate = tl.dot(x, w_gate.T, gate, input_precision=PRECISION)
            up = tl.dot(x, w_up.T, up, input_precision=PRECISION)
        if SAVE_Z:
            store_tile(z_ptr, rows, row_mask, n0, 2 * I, gate, BLOCK_N, I - n0)
            store_tile(z_ptr, rows, row_mask, I + n0, 2 * I, up, BLOCK_N, I - n0)
        store_tile(a_ptr, rows, row_mask, n0, I, gate_value(gate, ACTIVATION) * up, BLOCK_N, I - n0)


def up(
    x: torch.Tensor, gate_up: torch.Tensor, plan: RoutingPlan, activation: str, persistent: bool, save_z: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """x (T, H), gate_up (E, 2I, H) -> Z (R, 2I), or empty unless save_z, and A (R, I)."""
    _, two_i, hidden = gate_up.shape
    intermediate = two_i // 2
    z = x.new_empty(plan.rows, two_i) if save_z else x.new_empty(0)
    a = x.new_empty(plan.rows, intermediate)
    tma = tma_fits(gate_up, x, a)
    config = select_config("up", gate_up.device, x.dtype, plan.group_size, tma)
    w = descriptor(gate_up, 1, config.block_n, config.block_k) if tma else gate_up
    launch_tiles(
        up_kernel,
        config,
        plan,
        intermediate,
        persistent,
        (x, w, z, a, plan.row_slot, plan.expert_start, plan.tile_expert, plan.tile_row, plan.tile_count),
        (hidden, intermediate),
        TOP_K=plan.top_k,
        ACTIVATION=activation,
        SAVE_Z=save_z,
        USE_TMA=tma,
        EVEN_K=hidden % config.block_k == 0,
        PRECISION=dot_precision(x.dtype),
    )
    return z, a
