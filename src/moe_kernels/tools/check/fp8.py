"""The expert layer whose frozen weights are multiplied in fp8, in plain torch: in float64 the truth, else the
yardstick. What is rounded to e4m3 is what the kernels round (docs/numerics.md), and nothing is formed of weight and
adapter, which the rounding leaves alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_kernels.activation import Activation, Gate
from moe_kernels.factors import LowRank, scaled
from moe_kernels.fp8 import Fp8Weight, rounded


def _product(rows: Tensor, matrix: Tensor, pieces: int = 1) -> Tensor:
    """Rounded rows times a matrix of codes times scales, in the dtype of the rows."""
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    return (rounded(rows, pieces).to(wide) @ matrix.to(wide)).to(rows.dtype)


class _Up(torch.autograd.Function):
    """The gradient of the rows is of rounded dZ."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Tensor, pieces: int) -> Tensor:
        ctx.matrix, ctx.pieces = matrix, pieces
        return _product(x, matrix.T)

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor, None, None]:
        return _product(dz, ctx.matrix, ctx.pieces), None, None


class _Down(torch.autograd.Function):
    """w times rounded A times the matrix. dA before w is of rounded dO, and dw = <dA before w, A>."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, matrix: Tensor, w: Tensor) -> Tensor:
        ctx.matrix = matrix
        ctx.save_for_backward(a, w)
        return w[:, None] * _product(a, matrix.T)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, Tensor]:
        a, w = ctx.saved_tensors
        da = _product(dy.to(a.dtype), ctx.matrix)
        return (da * w[:, None]).to(a.dtype), None, (da.to(w.dtype) * a.to(w.dtype)).sum(1)


def fp8_experts(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor | None,
    gate_up: Fp8Weight,
    down: Fp8Weight,
    activation: str | Activation = "silu",
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    reduce: bool = True,
    gate_up_lora: LowRank | None = None,
    down_lora: LowRank | None = None,
) -> Tensor:
    """As :func:`moe_kernels.reference.reference_experts`, of weights that are multiplied in fp8."""
    gate = Gate(Activation.of(activation), gated=gate_up.shape[1] != down.shape[2])
    (tokens, hidden), top_k = x.shape, topk_ids.shape[1]
    if topk_weights is None:
        topk_weights = x.new_ones(topk_ids.shape)
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32  # of codes and scales, which nothing rounds
    w1, w2 = gate_up.to(exact), down.to(exact)
    out = x.new_zeros(tokens if reduce else tokens * top_k, hidden)
    for expert in range(gate_up.shape[0]):
        token, slot = torch.where(topk_ids == expert)
        rows, w = x[token], topk_weights[token, slot]
        z = _Up.apply(rows, w1[expert], gate_up.stacked)
        z = z + _added(rows, expert, gate_up_bias, gate_up_lora)
        a = gate.value(z)
        y = _Down.apply(a, w2[expert], w) + w[:, None] * _added(a, expert, down_bias, down_lora)
        out = out.index_add(0, token if reduce else token * top_k + slot, y.to(out.dtype))
    return out if reduce else out.view(tokens, top_k, hidden)


def _added(rows: Tensor, expert: int, bias: Tensor | None, low: LowRank | None) -> Tensor | float:
    total: Tensor | float = 0.0
    if low is not None and low.lora_a is not None and low.lora_b is not None:
        lora_a = scaled(low.lora_a[expert], low.scaling).to(rows.dtype)
        total = rows @ lora_a.T @ low.lora_b[expert].to(rows.dtype).T
    return total if bias is None else total + bias[expert]
