"""The plain-torch backend: the same steps as the Triton backend, one loop over experts each.

Runs on any device and in any floating dtype, float64 included. It reads the routing on the host, so on a GPU it
synchronises: it exists for the CPU, for debugging and as a second opinion, not for speed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from moe_kernels.activation import Gate
from moe_kernels.backends import Problem
from moe_kernels.routing import RoutingPlan

LowRank = tuple[torch.Tensor, torch.Tensor]

NAME = "torch"
COMPILES = False  # nothing


def why_not(problem: Problem) -> str | None:
    """None: this backend runs everything that the op accepts."""
    return None


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _experts(plan: RoutingPlan) -> Iterator[tuple[int, slice]]:
    starts = plan.expert_start.tolist()
    for expert, (start, end) in enumerate(itertools.pairwise(starts)):
        yield expert, slice(start, end)


def _row_token(plan: RoutingPlan) -> torch.Tensor:
    return plan.row_slot.long() // plan.top_k


def make_plan(topk_ids: torch.Tensor, experts: int, group_size: int) -> RoutingPlan:
    """Step 0: stable sort of the slots by expert, and the tiles of the sorted rows."""
    tokens, top_k = topk_ids.shape
    plan = RoutingPlan.empty(tokens, top_k, experts, group_size, topk_ids.device)
    ids = topk_ids.reshape(-1).long()
    ids = torch.where((ids >= 0) & (ids < experts), ids, experts)
    order = torch.sort(ids, stable=True).indices
    counts = torch.bincount(ids, minlength=experts + 1)[:experts]
    plan.packed.zero_()
    plan.row_slot.copy_(order)
    plan.slot_row[order] = torch.arange(plan.rows, dtype=torch.int32, device=ids.device)
    plan.expert_start[1:] = counts.cumsum(0)
    plan.expert_order.copy_(counts.sort(descending=True, stable=True).indices)
    tiles = (counts + group_size - 1) // group_size
    first_tile = tiles.cumsum(0) - tiles
    tile_expert = torch.repeat_interleave(torch.arange(experts, device=ids.device), tiles)
    tile_in_expert = torch.arange(len(tile_expert), device=ids.device) - first_tile[tile_expert]
    plan.tile_expert[: len(tile_expert)] = tile_expert
    plan.tile_row[: len(tile_expert)] = plan.expert_start[tile_expert] + tile_in_expert * group_size
    plan.tile_count.fill_(len(tile_expert))
    return plan


def _project(
    rows: torch.Tensor,
    weight: torch.Tensor,
    plan: RoutingPlan,
    bias: torch.Tensor | None = None,
    low_rank: LowRank | None = None,
) -> torch.Tensor:
    """rows (R, K) @ weight[e] (E, K, N) + bias[e] (E, N) + low (R, r) @ factor[e] (E, r, N) -> (R, N)."""
    out = rows.new_zeros(plan.rows, weight.shape[2])
    for expert, block in _experts(plan):
        total = rows[block] @ weight[expert]
        if low_rank is not None:
            low, factor = low_rank
            total = total + low[block] @ factor[expert]
        out[block] = total if bias is None else total + bias[expert]
    return out


def up(
    x: torch.Tensor,
    weight: torch.Tensor,
    plan: RoutingPlan,
    gate: Gate,
    persistent: bool,
    save_z: bool,
    bias: torch.Tensor | None = None,
    low_rank: LowRank | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Step 1: Z = X[row_token] W1[e]^T + b1[e] (R, 2I) and A = f(Z) (R, I)."""
    z = _project(gather(x, plan), weight.mT, plan, bias, _transposed(low_rank))
    a = gate.value(z.to(_accumulator(x.dtype))).to(x.dtype)
    return (z if save_z else z.new_empty(0)), a


def _transposed(low_rank: LowRank | None) -> LowRank | None:
    return None if low_rank is None else (low_rank[0], low_rank[1].mT)


def up_low(x: torch.Tensor, right: torch.Tensor, plan: RoutingPlan, persistent: bool) -> torch.Tensor:
    """X[row_token] right[e]^T: x (T, H), right (E, r, H) -> (R, r)."""
    return _project(gather(x, plan), right.mT, plan)


def down(
    a: torch.Tensor,
    weight: torch.Tensor,
    plan: RoutingPlan,
    persistent: bool,
    bias: torch.Tensor | None = None,
    low_rank: LowRank | None = None,
) -> torch.Tensor:
    """Step 2: Y = A W2[e]^T + b2[e] (R, H)."""
    return _project(a, weight.mT, plan, bias, _transposed(low_rank))


def combine(y: torch.Tensor, topk_weights: torch.Tensor, plan: RoutingPlan) -> torch.Tensor:
    """Step 3: O[t] = sum_k w(t,k) Y[slot_row(t,k)] (T, H); dropped slots add nothing."""
    out = y.new_zeros(plan.tokens, y.shape[1], dtype=_accumulator(y.dtype))
    kept, slot_row = _kept_slots(plan)
    for k in range(plan.top_k):
        row = y[slot_row[:, k]].to(out.dtype) * topk_weights[:, k, None].to(out.dtype)
        out += torch.where(kept[:, k, None], row, 0.0)
    return out.to(y.dtype)


def _kept_slots(plan: RoutingPlan) -> tuple[torch.Tensor, torch.Tensor]:
    slot_row = plan.slot_row.view(plan.tokens, plan.top_k).long()
    return slot_row < plan.expert_start[-1], slot_row


def gather(x: torch.Tensor, plan: RoutingPlan) -> torch.Tensor:
    """Xs[r] = X[token of row r]: (T, H) -> (R, H), sorted by expert."""
    return x[_row_token(plan)]


def dout_rows(dout: torch.Tensor, weight: torch.Tensor, plan: RoutingPlan, gate: Gate, plain: bool) -> torch.Tensor:
    """dO (T, H) in expert order (R, H), for ``down_grad`` and the gradient of W2."""
    return gather(dout, plan)


def dgrad(
    rows: torch.Tensor, weight: torch.Tensor, plan: RoutingPlan, persistent: bool, low_rank: LowRank | None = None
) -> torch.Tensor:
    """rows @ weight[e]: dA0 from dOs (R, H) and W2 (E, H, I), or dXr from dZ (R, 2I) and W1 (E, 2I, H)."""
    return _project(rows, weight, plan, None, low_rank)


def down_grad(
    dout_rows: torch.Tensor,
    weight: torch.Tensor,
    z: torch.Tensor,
    topk_weights: torch.Tensor,
    plan: RoutingPlan,
    gate: Gate,
    persistent: bool,
    overwrite_z: bool = False,
    bias: torch.Tensor | None = None,
    low_rank: LowRank | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Step 4: from dO in sorted rows (R, H), W2 (E, H, I) and Z (R, 2I): dZ (R, 2I), w * A (R, I) and dw (T, K)."""
    da = dgrad(dout_rows, weight, plan, persistent, low_rank)
    return dact(da, z, topk_weights, plan, gate, overwrite_z, dout_rows, bias)


def dact(
    da: torch.Tensor,
    z: torch.Tensor,
    topk_weights: torch.Tensor,
    plan: RoutingPlan,
    gate: Gate,
    overwrite_z: bool = False,
    dout_rows: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """From dA0 (R, I) and Z (R, 2I): dZ (R, 2I), wA = w * A (R, I) and dw = <dO, Y> (T, K)."""
    acc = _accumulator(da.dtype)
    slots = plan.row_slot.long()
    kept = torch.arange(plan.rows, device=da.device) < plan.expert_start[-1]
    w = topk_weights.reshape(-1)[slots].to(acc).unsqueeze(1)
    da_acc, z_acc = da.to(acc), z.to(acc)
    a = gate.value(z_acc)
    dz = gate.join(*(w * da_acc * partial for partial in gate.partials(z_acc))).to(da.dtype)
    dots = (da_acc * a).sum(-1)
    if dout_rows is not None and down_bias is not None:
        for expert, rows in _experts(plan):
            dots[rows] += dout_rows[rows].to(acc) @ down_bias[expert].to(acc)
    dw = torch.empty_like(topk_weights)
    dw.view(-1)[slots] = torch.where(kept, dots, 0.0).to(dw.dtype)
    return (z.copy_(dz) if overwrite_z else dz), (w * a).to(da.dtype), dw


def wgrad(left: torch.Tensor, right: torch.Tensor, plan: RoutingPlan) -> torch.Tensor:
    """Steps 5 and 8: dW[e] = left[rows of e]^T right[rows of e]: (R, M), (R, N) -> (E, M, N)."""
    dw = left.new_zeros(plan.experts, left.shape[1], right.shape[1])
    for expert, rows in _experts(plan):
        dw[expert] = left[rows].T @ right[rows]
    return dw


def combine_grad(dxr: torch.Tensor, plan: RoutingPlan) -> torch.Tensor:
    """Step 7: dX[t] = sum_k dXr[slot_row(t,k)] (T, H)."""
    ones = torch.ones(plan.tokens, plan.top_k, dtype=_accumulator(dxr.dtype), device=dxr.device)
    return combine(dxr, ones, plan)


def expert_sum(rows: torch.Tensor, plan: RoutingPlan, topk_weights: torch.Tensor | None = None) -> torch.Tensor:
    """Bias gradients, sum over the rows of e of w * rows: (R, N) -> (E, N); w = 1 without topk_weights (T, K)."""
    acc = _accumulator(rows.dtype)
    out = rows.new_zeros(plan.experts, rows.shape[1])
    for expert, block in _experts(plan):
        total = rows[block].to(acc)
        if topk_weights is not None:
            total = total * topk_weights.reshape(-1)[plan.row_slot[block].long(), None].to(acc)
        out[expert] = total.sum(0).to(out.dtype)
    return out
