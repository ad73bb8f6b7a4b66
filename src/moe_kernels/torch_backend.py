"""The plain-torch backend: the same nine steps as the Triton backend, one loop over experts each.

Runs on any device and in any floating dtype, float64 included. It reads the routing on the host, so on a GPU it
synchronises: it exists for the CPU, for debugging and as a second opinion, not for speed.
"""

from __future__ import annotations

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
    for expert, (start, end) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
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


def dact(
    dout: torch.Tensor,
    weight: torch.Tensor,
    z: torch.Tensor,
    topk_weights: torch.Tensor,
    plan: RoutingPlan,
    activation: str,
    persistent: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Step 4: with dA0 = dO[row_token] W2[e], dZ (R, 2I), wA = w * A (R, I) and <dA0, A> in partial sums (1, R)."""
    acc = _accumulator(dout.dtype)
    da = torch.zeros(plan.rows, weight.shape[2], dtype=acc, device=dout.device)
    row_token = _row_token(plan)
    for expert, rows in _experts(plan):
        da[rows] = (dout[row_token[rows]] @ weight[expert]).to(acc)
    w = topk_weights.reshape(-1)[plan.row_slot.long()].to(acc).unsqueeze(1)
    gate, linear = z.to(acc).chunk(2, dim=-1)
    value, derivative = ACTIVATIONS[activation].value(gate), ACTIVATIONS[activation].derivative(gate)
    a = value * linear
    dz = torch.cat([w * da * linear * derivative, w * da * value], dim=-1)
    return dz.to(dout.dtype), (w * a).to(dout.dtype), (da * a).sum(-1).unsqueeze(0)


def wgrad(
    left: torch.Tensor,
    right: torch.Tensor,
    plan: RoutingPlan,
    *,
    gather_left: bool,
    gather_right: bool,
    persistent: bool,
) -> torch.Tensor:
    """Steps 5 and 8: dW[e] = left[rows of e]^T right[rows of e] (E, M, N); a gathered side is indexed by token."""
    row_token = _row_token(plan)
    dw = left.new_zeros(plan.experts, left.shape[1], right.shape[1])
    for expert, rows in _experts(plan):
        lhs = left[row_token[rows]] if gather_left else left[rows]
        rhs = right[row_token[rows]] if gather_right else right[rows]
        dw[expert] = lhs.T @ rhs
    return dw


def dgrad(dz: torch.Tensor, gate_up: torch.Tensor, plan: RoutingPlan, persistent: bool) -> torch.Tensor:
    """Step 6: dXr = dZ W1[e] (R, H)."""
    dxr = dz.new_zeros(plan.rows, gate_up.shape[2])
    for expert, rows in _experts(plan):
        dxr[rows] = dz[rows] @ gate_up[expert]
    return dxr


def combine_grad(dxr: torch.Tensor, plan: RoutingPlan) -> torch.Tensor:
    """Step 7: dX[t] = sum_k dXr[slot_row(t,k)] (T, H)."""
    ones = torch.ones(plan.tokens, plan.top_k, dtype=_accumulator(dxr.dtype), device=dxr.device)
    return combine(dxr, ones, plan)


def weight_grad(partial: torch.Tensor, plan: RoutingPlan, dtype: torch.dtype) -> torch.Tensor:
    """Step 7: dw[t,k] = sum of the partial sums of row slot_row(t,k) (T, K); dropped slots get zero."""
    kept, slot_row = _kept_slots(plan)
    return torch.where(kept, partial.sum(0)[slot_row], 0.0).to(dtype)
