"""The plain-torch backend: the same nine steps as the Triton backend, one loop over experts each.

Runs on any device and in any floating dtype, float64 included. It reads the routing on the host, so on a GPU it
synchronises: it exists for the CPU, for debugging and as a second opinion, not for speed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from moe_kernels.activation import ACTIVATIONS
from moe_kernels.backends import Problem
from moe_kernels.routing import RoutingPlan

NAME = "torch"


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
    tiles = (counts + group_size - 1) // group_size
    first_tile = tiles.cumsum(0) - tiles
    tile_expert = torch.repeat_interleave(torch.arange(experts, device=ids.device), tiles)
    tile_in_expert = torch.arange(len(tile_expert), device=ids.device) - first_tile[tile_expert]
    plan.tile_expert[: len(tile_expert)] = tile_expert
    plan.tile_row[: len(tile_expert)] = plan.expert_start[tile_expert] + tile_in_expert * group_size
    plan.tile_count.fill_(len(tile_expert))
    return plan


def up(
    x: torch.Tensor, gate_up: torch.Tensor, plan: RoutingPlan, activation: str, persistent: bool, save_z: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Step 1: Z = X[row_token] W1[e]^T (R, 2I) and A = act(Z_gate) * Z_up (R, I)."""
    intermediate = gate_up.shape[1] // 2
    z = x.new_zeros(plan.rows, 2 * intermediate)
    row_token = _row_token(plan)
    for expert, rows in _experts(plan):
        z[rows] = x[row_token[rows]] @ gate_up[expert].T
    gate, linear = z.to(_accumulator(x.dtype)).chunk(2, dim=-1)
    a = (ACTIVATIONS[activation].value(gate) * linear).to(x.dtype)
    return (z if save_z else z.new_empty(0)), a


def down(a: torch.Tensor, weight: torch.Tensor, plan: RoutingPlan, persistent: bool) -> torch.Tensor:
    """Step 2: Y = A W2[e]^T (R, H)."""
    y = a.new_zeros(plan.rows, weight.shape[1])
    for expert, rows in _experts(plan):
        y[rows] = a[rows] @ weight[expert].T
    return y


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


def dgrad(rows: torch.Tensor, weight: torch.Tensor, plan: RoutingPlan, persistent: bool) -> torch.Tensor:
    """rows @ weight[e]: dA0 from dOs (R, H) and W2 (E, H, I), or dXr from dZ (R, 2I) and W1 (E, 2I, H)."""
    out = rows.new_zeros(plan.rows, weight.shape[2])
    for expert, block in _experts(plan):
        out[block] = rows[block] @ weight[expert]
    return out


def dact(
    da: torch.Tensor, z: torch.Tensor, topk_weights: torch.Tensor, plan: RoutingPlan, activation: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Step 4: from dA0 (R, I) and Z (R, 2I): dZ (R, 2I), wA = w * A (R, I) and dw = <dA0, A> (T, K)."""
    acc = _accumulator(da.dtype)
    slots = plan.row_slot.long()
    kept = torch.arange(plan.rows, device=da.device) < plan.expert_start[-1]
    w = topk_weights.reshape(-1)[slots].to(acc).unsqueeze(1)
    da_acc = da.to(acc)
    gate, linear = z.to(acc).chunk(2, dim=-1)
    value, derivative = ACTIVATIONS[activation].value(gate), ACTIVATIONS[activation].derivative(gate)
    a = value * linear
    dz = torch.cat([w * da_acc * linear * derivative, w * da_acc * value], dim=-1)
    dw = torch.empty_like(topk_weights)
    dw.view(-1)[slots] = torch.where(kept, (da_acc * a).sum(-1), 0.0).to(dw.dtype)
    return dz.to(da.dtype), (w * a).to(da.dtype), dw


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
