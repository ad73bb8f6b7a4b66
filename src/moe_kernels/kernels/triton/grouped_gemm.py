"""Steps 2, 4 and 6: out = rows @ w[expert], for rows that are already sorted by expert."""

import torch
import triton
import triton.language as tl

from moe_kernels.kernels.triton.launch import descriptor, dot_precision, launch_tiles, tma_fits
from moe_kernels.kernels.triton.tile import (
    load_rows,
    load_weight_kn,
    load_weight_nk,
    row_tile,
    store_tile,
    swizzled_tile,
)
from moe_kernels.routing import RoutingPlan
from moe_kernels.tuning.config import select_config


@triton.jit
def grouped_gemm_kernel(
    rows_in,  # (R, K): tensor or descriptor
    w,  # (E, N, K), or (E, K, N) if W_IS_KN: tensor or descriptor
    out_ptr,  # (R, N)
    expert_start_ptr,
    tile_expert_ptr,
    tile_row_ptr,
    tile_count_ptr,
    K,
    N,
    W_IS_KN: tl.constexpr,
    USE_TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    num_m = tl.load(tile_count_ptr)
    num_n = tl.cdiv(N, BLOCK_N)
    for pid in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0), flatten=FLATTEN):
        m, n = swizzled_tile(pid, num_m, num_n, GROUP_M)
        expert, row0, rows, row_mask = row_tile(m, tile_expert_ptr, tile_row_ptr, expert_start_ptr, BLOCK_M)
        n0 = n * BLOCK_N
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k0 in tl.range(0, K, BLOCK_K):
            if USE_TMA:  # rows of the next expert come along; their results are not stored
                a = rows_in.load([row0, k0])
            else:
                a = load_rows(rows_in, rows.to(tl.int64), row_mask, k0, K, BLOCK_K, EVEN_K, True)
            if W_IS_KN:
                b = load_weight_kn(w, expert, k0, n0, K, N, BLOCK_K, BLOCK_N, USE_TMA)
                total = tl.dot(a, b, total, input_precision=PRECISION)
            else:
                b = load_weight_nk(w, expert, n0, k0, N, K, BLOCK_N, BLOCK_K, USE_TMA)
                total = tl.dot(a, b.T, total, input_precision=PRECISION)
        store_tile(out_ptr, rows, row_mask, n0, N, total, BLOCK_N, N - n0)


def _grouped_gemm(
    kernel_name: str,
    rows_in: torch.Tensor,
    weight: torch.Tensor,
    plan: RoutingPlan,
    persistent: bool,
    w_is_kn: bool,
) -> torch.Tensor:
    inner = rows_in.shape[1]
    width = weight.shape[2] if w_is_kn else weight.shape[1]
    out = rows_in.new_empty(plan.rows, width)
    tma = tma_fits(rows_in, weight, out)
    config = select_config(kernel_name, weight.device, rows_in.dtype, plan.group_size, tma)
    block = (config.block_k, config.block_n) if w_is_kn else (config.block_n, config.block_k)
    a = descriptor(rows_in, config.block_m, config.block_k) if tma else rows_in
    w = descriptor(weight, 1, *block) if tma else weight
    launch_tiles(
        grouped_gemm_kernel,
        config,
        plan,
        width,
        persistent,
        (a, w, out, plan.expert_start, plan.tile_expert, plan.tile_row, plan.tile_count),
        (inner, width),
        W_IS_KN=w_is_kn,
        USE_TMA=tma,
        EVEN_K=inner % config.block_k == 0,
        PRECISION=dot_precision(rows_in.dtype),
        FLATTEN=config.flatten,
    )
    return out


def down(a: torch.Tensor, weight: torch.Tensor, plan: RoutingPlan, persistent: bool) -> torch.Tensor:
    """Y = A W2[e]^T: a (R, I), weight (E, H, I) -> (R, H)."""
    return _grouped_gemm("down", a, weight, plan, persistent, w_is_kn=False)


def dgrad(rows: torch.Tensor, weight: torch.Tensor, plan: RoutingPlan, persistent: bool) -> torch.Tensor:
    """rows @ weight[e]: dA0 from dOs (R, H) and W2 (E, H, I), or dXr from dZ (R, 2I) and W1 (E, 2I, H)."""
    return _grouped_gemm("dgrad", rows, weight, plan, persistent, w_is_kn=True)
