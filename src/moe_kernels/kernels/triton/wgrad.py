"""Steps 5 and 8: weight gradients, dW[e] = left[rows of e]^T right[rows of e].

One program owns a tile of one expert's gradient and loops over that expert's rows, so nothing is accumulated across
programs. Experts without rows get exact zeros. Whole blocks of rows need no row mask. The last, partial block is
peeled off the loop and masked, so that rows of the next expert (or its NaNs) never enter. ``persistent`` is ignored,
the grid has one program per tile: two small programs share an SM, and one's epilogue overlaps the other's mainloop.
"""

import dataclasses

import torch
import triton
import triton.language as tl

from moe_kernels.kernels.device import cdiv, dot_precision
from moe_kernels.kernels.launch.launch import launch_grid
from moe_kernels.kernels.operands import descriptor, tma_fits
from moe_kernels.kernels.tiles.config import select_config
from moe_kernels.kernels.tiles.fit import fit_columns
from moe_kernels.kernels.triton.tile import load_rows, multiply_add, swizzled_tile
from moe_kernels.routing import RoutingPlan


@triton.jit
def wgrad_kernel(
    left,  # (R, M): tensor or descriptor
    right,  # (R, N): tensor or descriptor
    left_ptr,  # the same tensors by pointer, for the partial block of rows
    right_ptr,
    out_ptr,  # (E, M, N)
    expert_start_ptr,
    E,
    M,
    N,
    USE_TMA: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_N: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    num_m = tl.cdiv(M, BLOCK_M)
    num_n = tl.cdiv(N, BLOCK_N)
    for pid in tl.range(tl.program_id(0), E * num_m * num_n, tl.num_programs(0)):
        expert = pid // (num_m * num_n)
        m, n = swizzled_tile(pid % (num_m * num_n), num_m, num_n, GROUP_M)
        m0 = m * BLOCK_M
        n0 = n * BLOCK_N
        start = tl.load(expert_start_ptr + expert)
        end = tl.load(expert_start_ptr + expert + 1)
        whole_end = start + (end - start) // BLOCK_K * BLOCK_K
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for r0 in tl.range(start, whole_end, BLOCK_K):
            if USE_TMA:
                lhs = left.load([r0, m0])
                rhs = right.load([r0, n0])
            else:
                rows = r0 + tl.arange(0, BLOCK_K)
                lhs = load_rows(left_ptr, rows.to(tl.int64), rows < end, m0, M, BLOCK_M, EVEN_M, False)
                rhs = load_rows(right_ptr, rows.to(tl.int64), rows < end, n0, N, BLOCK_N, EVEN_N, False)
            total = multiply_add(lhs.T, rhs, total, PRECISION)
        if whole_end < end:
            rows = whole_end + tl.arange(0, BLOCK_K)
            lhs = load_rows(left_ptr, rows.to(tl.int64), rows < end, m0, M, BLOCK_M, EVEN_M, True)
            rhs = load_rows(right_ptr, rows.to(tl.int64), rows < end, n0, N, BLOCK_N, EVEN_N, True)
            total = multiply_add(lhs.T, rhs, total, PRECISION)
        cols_m = m0 + tl.arange(0, BLOCK_M)
        cols_n = n0 + tl.arange(0, BLOCK_N)
        out = out_ptr + expert.to(tl.int64) * M * N + cols_m.to(tl.int64)[:, None] * N + cols_n[None, :]
        tl.store(out, total.to(out_ptr.dtype.element_ty), mask=(cols_m < M)[:, None] & (cols_n < N)[None, :])


def wgrad(left: torch.Tensor, right: torch.Tensor, plan: RoutingPlan) -> torch.Tensor:
    """left (R, M) and right (R, N), sorted by expert -> (E, M, N)."""
    m, n = left.shape[1], right.shape[1]
    out = left.new_empty(plan.experts, m, n)
    tma = tma_fits(left, right)
    sizes = (plan.rows_per_expert, n, m)
    config = fit_columns(select_config("wgrad", left.device, left.dtype, None, tma, sizes), n)
    if m <= 64 < config.block_m:  # wgmma takes 64 rows
        config = dataclasses.replace(config, block_m=64)
    launch_grid(
        wgrad_kernel,
        config,
        plan.experts * cdiv(m, config.block_m) * cdiv(n, config.block_n),
        False,
        (
            descriptor(left, config.block_k, config.block_m) if tma else left,
            descriptor(right, config.block_k, config.block_n) if tma else right,
            *(left, right, out, plan.expert_start),
        ),
        (plan.experts, m, n),
        {
            "USE_TMA": tma,
            "EVEN_M": m % config.block_m == 0,
            "EVEN_N": n % config.block_n == 0,
            "PRECISION": dot_precision(left.dtype),
        },
    )
    return out
