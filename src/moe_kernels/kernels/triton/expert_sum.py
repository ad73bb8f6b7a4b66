"""Bias gradients: the sum of each expert's rows, in a fixed order and in float32, without atomics."""

import torch
import triton
import triton.language as tl

from moe_kernels.kernels.device import cdiv
from moe_kernels.kernels.launch.launch import launch
from moe_kernels.routing import RoutingPlan

_BLOCK_R, _BLOCK_N = 64, 64


@triton.jit
def expert_sum_kernel(
    rows_ptr,  # (R, N)
    weights_ptr,  # (T * K,), or any pointer unless WEIGHTED
    row_slot_ptr,  # (R,)
    expert_start_ptr,  # (E + 1,)
    out_ptr,  # (E, N)
    N,
    WEIGHTED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    expert = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.load(expert_start_ptr + expert)
    end = tl.load(expert_start_ptr + expert + 1)
    total = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    for r0 in tl.range(start, end, BLOCK_R):
        rows = r0 + tl.arange(0, BLOCK_R)
        mask = (rows < end)[:, None] & (cols < N)[None, :]
        values = tl.load(rows_ptr + rows.to(tl.int64)[:, None] * N + cols[None, :], mask=mask, other=0.0)
        values = values.to(tl.float32)
        if WEIGHTED:
            slot = tl.load(row_slot_ptr + rows, mask=rows < end, other=0)
            values *= tl.load(weights_ptr + slot, mask=rows < end, other=0.0).to(tl.float32)[:, None]
        total += values
    out = tl.sum(total, axis=0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + expert.to(tl.int64) * N + cols, out, mask=cols < N)


def expert_sum(rows: torch.Tensor, plan: RoutingPlan, topk_weights: torch.Tensor | None = None) -> torch.Tensor:
    """Sum over the rows of e of w * rows: rows (R, N) -> (E, N); w = 1 without topk_weights (T, K)."""
    width = rows.shape[1]
    out = rows.new_empty(plan.experts, width)
    launch(
        expert_sum_kernel,
        (plan.experts, cdiv(width, _BLOCK_N)),
        (
            rows,
            rows if topk_weights is None else topk_weights,
            plan.row_slot,
            plan.expert_start,
            out,
            width,
        ),
        {
            "WEIGHTED": topk_weights is not None,
            "BLOCK_R": _BLOCK_R,
            "BLOCK_N": _BLOCK_N,
            "num_warps": 8,
        },
    )
    return out
