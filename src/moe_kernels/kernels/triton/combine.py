"""Between tokens and sorted rows, at copy speed.

Steps 3 and 7 sum each token's K rows in a fixed order and in float32, without atomics. ``gather`` is the opposite:
the backward reads dO twice and X once in sorted order, and a copy at memory bandwidth lets those GEMMs load whole
tiles by TMA instead of gathering rows.
"""

import functools

import torch
import triton
import triton.language as tl

from moe_kernels.kernels.launch.launch import launch
from moe_kernels.routing import RoutingPlan


@triton.jit
def combine_kernel(
    rows_ptr,  # (R, H)
    weights_ptr,  # (T, K), or any pointer when WEIGHTED is False
    slot_row_ptr,  # (T * K,)
    routed_ptr,  # expert_start[E]: rows at or after it belong to dropped slots
    out_ptr,  # (T, H)
    H,
    TOP_K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    col_mask = cols < H
    routed = tl.load(routed_ptr)
    total = tl.zeros((BLOCK_H,), tl.float32)
    for k in tl.static_range(TOP_K):
        row = tl.load(slot_row_ptr + token * TOP_K + k)
        kept = row < routed
        values = tl.load(rows_ptr + row.to(tl.int64) * H + cols, mask=col_mask & kept, other=0.0).to(tl.float32)
        if WEIGHTED:
            weight = tl.load(weights_ptr + token * TOP_K + k, mask=kept, other=0.0).to(tl.float32)
            total += weight * values
        else:
            total += values
    tl.store(out_ptr + token * H + cols, total.to(out_ptr.dtype.element_ty), mask=col_mask)


@triton.jit
def gather_kernel(
    x_ptr,  # (T, H)
    slot_row_ptr,  # (T * K,)
    routed_ptr,  # expert_start[E]: rows at or after it belong to dropped slots, and stay unwritten
    out_ptr,  # (R, H)
    H,
    TOP_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    values = tl.load(x_ptr + token * H + cols, mask=cols < H, other=0.0)  # read once, stored to K rows
    routed = tl.load(routed_ptr)
    for k in tl.static_range(TOP_K):
        row = tl.load(slot_row_ptr + token * TOP_K + k)
        tl.store(out_ptr + row.to(tl.int64) * H + cols, values, mask=(cols < H) & (row < routed))


@functools.cache
def _column_blocks(hidden: int) -> tuple[int, int, int]:
    """(BLOCK_H, number of blocks, warps) of a row ``hidden`` wide: eight elements a thread."""
    block_h = min(triton.next_power_of_2(hidden), 1024)
    return block_h, triton.cdiv(hidden, block_h), max(1, block_h // 256)


def _launch(rows: torch.Tensor, weights: torch.Tensor | None, plan: RoutingPlan) -> torch.Tensor:
    out = rows.new_empty(plan.tokens, rows.shape[1])
    if out.numel() == 0:
        return out
    hidden = rows.shape[1]
    block_h, blocks, warps = _column_blocks(hidden)
    launch(
        combine_kernel,
        (plan.tokens, blocks),
        (
            rows,
            rows if weights is None else weights,
            plan.slot_row,
            plan.expert_start[plan.experts :],
            out,
            hidden,
        ),
        {
            "TOP_K": plan.top_k,
            "WEIGHTED": weights is not None,
            "BLOCK_H": block_h,
            "num_warps": warps,
        },
    )
    return out


def combine(y: torch.Tensor, topk_weights: torch.Tensor, plan: RoutingPlan) -> torch.Tensor:
    """O[t] = sum_k w[t,k] Y[slot_row(t,k)]: y (R, H), topk_weights (T, K) -> (T, H)."""
    return _launch(y, topk_weights, plan)


def combine_grad(dxr: torch.Tensor, plan: RoutingPlan) -> torch.Tensor:
    """dX[t] = sum_k dXr[slot_row(t,k)]: (R, H) -> (T, H)."""
    return _launch(dxr, None, plan)


def gather(x: torch.Tensor, plan: RoutingPlan) -> torch.Tensor:
    """Xs[r] = X[token of row r]: (T, H) -> (R, H), sorted by expert; rows of dropped slots are not written."""
    hidden = x.shape[1]
    out = x.new_empty(plan.rows, hidden)
    if out.numel() == 0:
        return out
    block_h, blocks, warps = _column_blocks(hidden)
    launch(
        gather_kernel,
        (plan.tokens, blocks),
        (x, plan.slot_row, plan.expert_start[plan.experts :], out, hidden),
        {
            "TOP_K": plan.top_k,
            "BLOCK_H": block_h,
            "num_warps": warps,
        },
    )
    return out
