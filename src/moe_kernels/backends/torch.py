"""The plain-torch backend: the same steps as the Triton backend, one loop over experts each.

Runs on any device and in any floating dtype, float64 included. It reads the routing on the host, so on a GPU it
synchronises: it exists for the CPU, for debugging and as a second opinion, not for speed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from moe_kernels.activation import Gate
from moe_kernels.backends.protocol import Backend
from moe_kernels.fp8 import Fp8Weight, rounded
from moe_kernels.layer import AddedGrads, DownGrads, GemmRows, Rows, Weight, in_expert_order
from moe_kernels.plain import without_autocast
from moe_kernels.problem import Problem
from moe_kernels.routing import RoutingPlan


class TorchBackend(Backend):
    """Steps in plain torch."""

    name = "torch"

    def why_not(self, problem: Problem) -> str | None:
        """None: this backend runs everything that the op accepts."""
        return None

    def make_plan(self, topk_ids: Tensor, experts: int, group_size: int, persistent: bool = True) -> RoutingPlan:
        plan = RoutingPlan.empty(topk_ids, experts, group_size, persistent)
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

    def up(self, x: Tensor, weight: Weight, plan: RoutingPlan, gate: Gate, save_z: bool) -> tuple[Tensor, Tensor]:
        z = self.down(self.gather(x, plan), weight, plan)
        a = gate.value(z.to(_accumulator(x.dtype))).to(x.dtype)
        return (z if save_z else z.new_empty(0)), a

    def low(self, rows: Rows, lora_a: Tensor, plan: RoutingPlan) -> Tensor:
        return self.down(in_expert_order(rows, plan, self.gather), Weight(lora_a), plan)

    def down(self, a: Tensor, weight: Weight, plan: RoutingPlan) -> Tensor:
        factor = None if weight.factor is None else weight.factor.mT
        return self.dgrad(a, weight._replace(matrix=weight.matrix.mT, factor=factor), plan)

    def combine(self, y: Tensor, topk_weights: Tensor, plan: RoutingPlan) -> Tensor:
        out = y.new_zeros(plan.tokens, y.shape[1], dtype=_accumulator(y.dtype))
        slot_row = plan.slot_row.view(plan.tokens, plan.top_k).long()
        kept = slot_row < plan.expert_start[-1]
        for k in range(plan.top_k):
            row = y[slot_row[:, k]].to(out.dtype) * topk_weights[:, k, None].to(out.dtype)
            out += torch.where(kept[:, k, None], row, 0.0)
        return out.to(y.dtype)

    def gather(self, x: Tensor, plan: RoutingPlan) -> Tensor:
        return x[plan.row_slot.long() // plan.top_k]

    def dgrad(self, rows: GemmRows, weight: Weight, plan: RoutingPlan) -> Tensor:
        assert isinstance(rows, Tensor)  # this backend makes no others
        out = rows.new_zeros(plan.rows, weight.matrix.shape[2])
        if isinstance(weight.matrix, Fp8Weight):
            rows = rounded(rows, 1 if weight.matrix.by_columns else weight.matrix.stacked)
            weight = Weight(*(None if part is None else part.to(rows.dtype) for part in weight))  # type: ignore[arg-type]
        for expert, block in _experts(plan):
            total = _product(rows[block], weight.matrix[expert])  # in few bits: dequantised here, one at a time
            if weight.low is not None and weight.factor is not None:
                total = total + _product(weight.low[block], weight.factor[expert])
            out[block] = total if weight.bias is None else total + weight.bias[expert]
        return out

    def down_grad(
        self,
        dout_rows: Rows,
        weight: Weight,
        z: Tensor,
        topk_weights: Tensor,
        plan: RoutingPlan,
        gate: Gate,
        overwrite_z: bool = False,
        bias_dot: Tensor | None = None,
        needs_wa: bool = True,
    ) -> DownGrads:
        da = self.dgrad(in_expert_order(dout_rows, plan, self.gather), weight, plan)
        return self.dact(da, z, topk_weights, plan, gate, overwrite_z, bias_dot, needs_wa)

    def dact(
        self,
        da: Tensor,
        z: Tensor,
        topk_weights: Tensor,
        plan: RoutingPlan,
        gate: Gate,
        overwrite_z: bool = False,
        bias_dot: Tensor | None = None,
        needs_wa: bool = True,
    ) -> DownGrads:
        """From dA0 (R, I), Z (R, Z): dZ (R, Z), wA = w * A (R, I), empty unless needs_wa, and dw = <dO, Y> (T, K)."""
        acc = _accumulator(da.dtype)
        slots = plan.row_slot.long()
        kept = torch.arange(plan.rows, device=da.device) < plan.expert_start[-1]
        w = topk_weights.reshape(-1)[slots].to(acc).unsqueeze(1)
        da_acc, z_acc = da.to(acc), z.to(acc)
        a = gate.value(z_acc)
        dz = gate.join(*(w * da_acc * partial for partial in gate.partials(z_acc))).to(da.dtype)
        dots = (da_acc * a).sum(-1)
        if bias_dot is not None:
            dots = dots + bias_dot
        dw = torch.empty_like(topk_weights)
        dw.view(-1)[slots] = torch.where(kept, dots, 0.0).to(dw.dtype)
        wa = (w * a).to(da.dtype) if needs_wa else da.new_empty(0)
        return DownGrads(z.copy_(dz) if overwrite_z else dz, wa, dw)

    def wgrad(self, left: Rows, right: Rows, plan: RoutingPlan) -> Tensor:
        left, right = (in_expert_order(rows, plan, self.gather) for rows in (left, right))
        return _wgrad(left, right, plan, right.dtype)

    def lora_a_grad(self, low: Tensor, rows: Rows, plan: RoutingPlan, lora_a: Tensor, scaling: float = 1.0) -> Tensor:
        right = in_expert_order(rows, plan, self.gather)
        grad = _wgrad(low[:, : lora_a.shape[1]], right, plan, _accumulator(low.dtype))
        return (grad * scaling).to(lora_a.dtype)

    def combine_grad(self, dxr: Tensor, plan: RoutingPlan) -> Tensor:
        ones = torch.ones(plan.tokens, plan.top_k, dtype=_accumulator(dxr.dtype), device=dxr.device)
        return self.combine(dxr, ones, plan)

    def added_grads(
        self,
        dy: Rows,
        weight: Weight,
        plan: RoutingPlan,
        lora_b: Tensor | None,
        needs_bias: bool,
        topk_weights: Tensor | None = None,
    ) -> AddedGrads:
        rows = in_expert_order(dy, plan, self.gather)
        acc = _accumulator(rows.dtype)
        weighted = rows.to(acc)
        if topk_weights is not None:
            weighted = weighted * topk_weights.reshape(-1)[plan.row_slot.long(), None].to(acc)
        low = None if weight.factor is None else self.dgrad(rows, Weight(weight.factor), plan)
        factor = bias = bias_dot = None
        if lora_b is not None and weight.low is not None:
            factor = _wgrad(weighted, weight.low[:, : lora_b.shape[2]], plan, acc).to(lora_b.dtype)
        if needs_bias:
            bias = rows.new_empty(plan.experts, rows.shape[1])
            for expert, block in _experts(plan):
                bias[expert] = weighted[block].sum(0)
        if weight.bias is not None and topk_weights is not None:
            bias_dot = torch.zeros(plan.rows, dtype=acc, device=rows.device)
            for expert, block in _experts(plan):
                bias_dot[block] = _product(rows[block].to(acc), weight.bias[expert].to(acc))
        return AddedGrads(rows, low, factor, bias, bias_dot)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in their own dtype: autocast would round float32 to 16 bits, here and in a backward inside it."""
    with without_autocast(left.device.type):
        return left @ right


def _wgrad(left: Tensor, right: Tensor, plan: RoutingPlan, dtype: torch.dtype) -> Tensor:
    """left[rows of e]^T right[rows of e] (E, M, N), multiplied in ``dtype``."""
    dw = left.new_zeros(plan.experts, left.shape[1], right.shape[1], dtype=dtype)
    for expert, rows in _experts(plan):
        dw[expert] = _product(left[rows].to(dtype).T, right[rows].to(dtype))
    return dw


def _experts(plan: RoutingPlan) -> Iterator[tuple[int, slice]]:
    starts = plan.expert_start.tolist()
    for expert, (start, end) in enumerate(itertools.pairwise(starts)):
        yield expert, slice(start, end)
