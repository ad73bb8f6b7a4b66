"""Steps 2, 4 and 6: out = rows @ w[expert], for rows that are already sorted by expert."""

import torch
import triton
import triton.language as tl

from moe_kernels.kernels.device import cdiv, dot_precision
from moe_kernels.kernels.launch.launch import launch_grid
from moe_kernels.kernels.operands import descriptor, low_rank_arguments, stored, tma_fits
from moe_kernels.kernels.tiles.config import select_config
from moe_kernels.kernels.tiles.fit import fit_columns, fit_rank
from moe_kernels.kernels.triton.dequantize import blocks
from moe_kernels.kernels.triton.tile import (
    add_bias,
    add_low_rank,
    load_rows,
    load_weight,
    multiply_add,
    row_tile,
    store_tile,
    swizzled_tile,
)
from moe_kernels.layer import Weight
from moe_kernels.routing import RoutingPlan


@triton.jit
def grouped_gemm_kernel(
    rows_in,  # (R, K): tensor or descriptor
    w,  # (E, N, K), or (E, K, N) if W_IS_KN: tensor or descriptor
    bias_ptr,  # (E, N), or any pointer unless HAS_BIAS
    low_ptr,  # (R, RANK), or any pointer if RANK is 0
    factor_ptr,  # (E, N, RANK), or (E, RANK, N) if LOW_IS_KN
    out_ptr,  # (R, N)
    expert_start_ptr,
    tile_expert_ptr,
    tile_row_ptr,
    tile_count_ptr,
    K,
    N,
    W_STRIDE,  # elements from one expert's matrix to the next
    W_IS_KN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RANK: tl.constexpr,
    LOW_IS_KN: tl.constexpr,
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
            if USE_TMA:  # also loads rows of the next expert, whose results are not stored
                a = rows_in.load([row0, k0])
            else:
                a = load_rows(rows_in, rows.to(tl.int64), row_mask, k0, K, BLOCK_K, EVEN_K, True)
            b = load_weight(w, expert, n0, k0, N, K, W_STRIDE, BLOCK_N, BLOCK_K, W_IS_KN, USE_TMA)
            total = multiply_add(a, b, total, PRECISION)
        if RANK > 0:
            total = add_low_rank(
                total, low_ptr, factor_ptr, expert, rows, row_mask, n0, N, RANK, LOW_IS_KN, BLOCK_N, PRECISION
            )
        if HAS_BIAS:
            total = add_bias(total, bias_ptr, expert, n0, N, BLOCK_N)
        store_tile(out_ptr, rows, row_mask, n0, N, total, BLOCK_N, N - n0)


def _grouped_gemm(kernel_name: str, rows_in: torch.Tensor, weight: Weight, plan: RoutingPlan) -> torch.Tensor:
    transposed = kernel_name == "dgrad"  # multiply by the weight itself instead of by its transpose
    out = rows_in.new_empty(plan.rows, weight.matrix.shape[2 if transposed else 1])
    for part, tiles in blocks(weight, plan):
        _launch(kernel_name, rows_in, part, tiles, out)
        del part
    return out


def _launch(kernel_name: str, rows_in: torch.Tensor, weight: Weight, plan: RoutingPlan, out: torch.Tensor) -> None:
    transposed = kernel_name == "dgrad"
    inner, width = rows_in.shape[1], out.shape[1]
    assert isinstance(weight.matrix, torch.Tensor)
    matrix, by_columns = stored(weight.matrix)
    w_is_kn = by_columns != transposed
    tma = tma_fits(rows_in, matrix, out)
    sizes = (plan.rows_per_expert, width, inner) if weight.plain and not by_columns else None
    config = fit_columns(select_config(kernel_name, out.device, rows_in.dtype, plan.group_size, tma, sizes), width)
    block = (config.block_k, config.block_n) if w_is_kn else (config.block_n, config.block_k)
    low, factor, rank = low_rank_arguments(weight, out)
    config = fit_rank(config, rank, rows_in.device, rows_in.element_size())
    launch_grid(
        grouped_gemm_kernel,
        config,
        plan.max_tiles * cdiv(width, config.block_n),
        plan.persistent,
        (
            descriptor(rows_in, config.block_m, config.block_k) if tma else rows_in,
            descriptor(matrix, 1, *block) if tma else matrix,
            *(out if weight.bias is None else weight.bias, low, factor, out),
            *plan.tile_arguments[1:],
        ),
        (inner, width, matrix.stride(0)),
        {
            "W_IS_KN": w_is_kn,
            "HAS_BIAS": weight.bias is not None,
            "RANK": rank,
            "LOW_IS_KN": transposed,
            "USE_TMA": tma,
            "EVEN_K": inner % config.block_k == 0,
            "PRECISION": dot_precision(rows_in.dtype),
            "FLATTEN": config.flatten,
        },
    )


def down(a: torch.Tensor, weight: Weight, plan: RoutingPlan) -> torch.Tensor:
    """Y = A W2[e]^T + b2[e]: a (R, I), weight (E, H, I) -> (R, H)."""
    return _grouped_gemm("down", a, weight, plan)


def dgrad(rows: torch.Tensor, weight: Weight, plan: RoutingPlan) -> torch.Tensor:
    """rows W[e]: dA0 from dOs (R, H) and W2 (E, H, I), or dXr from dZ (R, Z) and W1 (E, Z, H)."""
    return _grouped_gemm("dgrad", rows, weight, plan)
