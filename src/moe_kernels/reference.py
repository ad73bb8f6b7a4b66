"""The definition of truth: the expert layer in plain differentiable torch, any dtype and any device.

Tests, ``moe-kernels verify`` and the benchmarks judge every backend against this function evaluated in
float64 or float32. It is written to be read, not to be fast.
"""

from __future__ import annotations

import torch

from moe_kernels.activation import Activation, Gate
from moe_kernels.factors import LowRank, scaled

LowRankPair = tuple[torch.Tensor, torch.Tensor]


def reference_experts(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor | None,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    activation: str | Activation = "silu",
    *,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    interleaved: bool = False,
    reduce: bool = True,
    gate_up_lora: LowRank | LowRankPair | None = None,
    down_lora: LowRank | LowRankPair | None = None,
) -> torch.Tensor:
    """``out[t] = sum_k w[t,k] * (W2[e] f(W1[e] x[t] + b1[e]) + b2[e])`` with ``e = topk_ids[t,k]``.

    Arguments and result are those of :func:`moe_kernels.moe.fused_experts`; differentiable in every tensor.
    """
    if gate_up_lora is not None:
        gate_up = gate_up + low_rank_product(gate_up.dtype, *gate_up_lora)
    if down_lora is not None:
        down = down + low_rank_product(down.dtype, *down_lora)
    gate = Gate(Activation.of(activation), gated=gate_up.shape[1] != down.shape[2], interleaved=interleaved)
    (tokens, hidden), top_k = x.shape, topk_ids.shape[1]
    out = x.new_zeros(tokens, hidden) if reduce else x.new_zeros(tokens * top_k, hidden)
    for expert in range(gate_up.shape[0]):
        token, slot = torch.where(topk_ids == expert)
        z = x[token] @ gate_up[expert].T
        if gate_up_bias is not None:
            z = z + gate_up_bias[expert]
        y = gate.value(z) @ down[expert].T
        if down_bias is not None:
            y = y + down_bias[expert]
        if topk_weights is not None:
            y = (y * topk_weights[token, slot, None]).to(out.dtype)
        out = out.index_add(0, token if reduce else token * top_k + slot, y)
    return out if reduce else out.view(tokens, top_k, hidden)


def low_rank_product(
    dtype: torch.dtype, lora_b: torch.Tensor, lora_a: torch.Tensor, scaling: float = 1.0
) -> torch.Tensor:
    """What LoRA adds to a weight, (E, N, K): ``scaling * lora_b[e] @ lora_a[e]``, of factors that are cast to the
    weight's ``dtype`` first, as torch.autocast does around PEFT."""
    return lora_b.to(dtype) @ scaled(lora_a, scaling).to(dtype)
