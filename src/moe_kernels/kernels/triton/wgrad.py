"""Steps 5 and 8: weight gradients, dW[e] = left[rows of e]^T right[rows of e].

One program owns a tile of one expert's gradient and walks that expert's rows, so nothing is accumulated across
programs. Experts without rows get exact zeros. Whole blocks of rows need no row mask; the last, partial block is a
second step with masks, so that rows of the next expert (or its NaNs) never enter.
"""

import torch
import triton
import triton.language as tl

from moe_kernels.kernels.triton.launch import descriptor, dot_precision, launch_grid, tma_fits
from moe_kernels.kernels.triton.tile import gathered_tokens, load_rows, swizzled_tile
from moe_kernels.routing import RoutingPlan
from moe_kernels.tuning.config import select_config


@triton.jit
def _operand_rows(row_slot_ptr, rows, row_mask, TOP_K: tl.constexpr, GATHER: tl.constexpr):
    if GATHER:
        _, index = gathered_tokens(row_slot_ptr, rows, row_mask, TOP_K)
    else:
        index = rows.to(tl.int64)
    return index


@triton.jit
def wgrad_kernel(
    left,  # (T or R, M): tensor or descriptor
    right,  # (T or R, N): tensor or descriptor
    left_ptr,  # the same tensors by pointer, for the partial block of rows
    right_ptr,
    out_ptr,  # (E, M, N)
    row_slot_ptr,
    expert_start_ptr,
    E,
    M,
    N,
    TOP_K: tl.constexpr,
    GATHER_LEFT: tl.constexpr,
    GATHER_RIGHT: tl.constexpr,
    LEFT_TMA: tl.constexpr,
    RIGHT_TMA: tl.constexpr,
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
            rows = r0 + tl.arange(0, BLOCK_K)
            row_mask = rows < end
            if LEFT_TMA:
                lhs = left.load([r0, m0])
            else:
                index = _operand_rows(row_slot_ptr, rows, row_mask, TOP_K, GATHER_LEFT)
                lhs = load_rows(left_ptr, index, row_mask, m0, M, BLOCK_M, EVEN_M, False)
            if RIGHT_TMA:
                rhs = right.load([r0, n0])
            else:
                index = _operand_rows(row_slot_ptr, rows, row_mask, TOP_K, GATHER_RIGHT)
                rhs = load_rows(right_ptr, index, row_mask, n0, N, BLOCK_N, EVEN_N, False)
            total = tl.dot(lhs.T, rhs, total, input_precision=PRECISION)
        if whole_end < end:
            rows = whole_end + tl.arange(0, BLOCK_K)
            row_mask = rows < end
            index = _operand_rows(row_slot_ptr, rows, row_mask, TOP_K, GATHER_LEFT)
            lhs = load_rows(left_ptr, index, row_mask, m0, M, BLOCK_M, EVEN_M, True)
            index = _operand_rows(row_slot_ptr, rows, row_mask, TOP_K, GATHER_RIGHT)
            rhs = load_rows(right_ptr, index, row_mask, n0, N, BLOCK_N, EVEN_N, True)
            total = tl.dot(lhs.T, rhs, total, input_precision=PRECISION)
        cols_m = m0 + tl.arange(0, BLOCK_M)
        cols_n = n0 + tl.arange(0, BLOCK_N)
        out = out_ptr + expert.to(tl.int64) * M * N + cols_m.to(tl.int64)[:, None] * N + cols_n[None, :]
        tl.store(out, total.to(out_ptr.dtype.element_ty), mask=(cols_m < M)[:, None] & (cols_n < N)[None, :])


def wgrad(
    left: torch.Tensor,
    right: torch.Tensor,
    plan: RoutingPlan,
    *,
    gather_left: bool,
    gather_right: bool,
    persistent: bool,
) -> torch.Tensor:
    """left (T or R, M), right (T or R, N) -> (E, M, N). A gathered side is (T, .), read through the plan."""
    m, n = left.shape[1], right.shape[1]
    out = left.new_empty(plan.experts, m, n)
    if plan.rows == 0:
        return out.zero_()
    left_tma = not gather_left and tma_fits(left)
    right_tma = not gather_right and tma_fits(right)
    config = select_config(
        "wgrad_down" if gather_left else "wgrad_up", left.device, left.dtype, None, left_tma or right_tma
    )
    lhs = descriptor(left, config.block_k, config.block_m) if left_tma else left
    rhs = descriptor(right, config.block_k, config.block_n) if right_tma else right
    tiles = plan.experts * triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
    launch_grid(
        wgrad_kernel,
        config,
        tiles,
        persistent,
        (lhs, rhs, left, right, out, plan.row_slot, plan.expert_start),
        (plan.experts, m, n),
        TOP_K=plan.top_k,
        GATHER_LEFT=gather_left,
        GATHER_RIGHT=gather_right,
        LEFT_TMA=left_tma,
        RIGHT_TMA=right_tma,
        EVEN_M=m % config.block_m == 0,
        EVEN_N=n % config.block_n == 0,
        PRECISION=dot_precision(left.dtype),
    )
    return out
