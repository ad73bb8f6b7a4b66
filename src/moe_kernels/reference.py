"""The definition of truth: the expert layer in plain differentiable torch, any dtype and any device.

Tests, ``moe-kernels verify`` and the benchmarks judge every backend against this function evaluated in
float64 or float32. It is written to be read, not to be fast.
"""

from __future__ import annotations

import torch

from moe_kernels.activation import ACTIVATIONS


def reference_experts(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    activation: str = "silu",
) -> torch.Tensor:
    """``out[t] = sum_k w[t,k] * W2[e] (act(W1g[e] x[t]) * (W1u[e] x[t]))`` with ``e = topk_ids[t,k]``.

    Args:
        x: (T, H) tokens.
        topk_ids: (T, K) integer expert ids; ids outside [0, E) are dropped.
        topk_weights: (T, K) routing weights.
        gate_up: (E, 2I, H), rows ``[gate; up]``.
        down: (E, H, I).
        activation: key of :data:`moe_kernels.activation.ACTIVATIONS`.

    Returns:
        (T, H) in ``x.dtype``, differentiable in x, topk_weights, gate_up and down.
    """
    act = ACTIVATIONS[activation].value
    out = torch.zeros_like(x)
    for expert in range(gate_up.shape[0]):
        token, slot = torch.where(topk_ids == expert)
        gate, up = (x[token] @ gate_up[expert].T).chunk(2, dim=-1)
        y = (act(gate) * up) @ down[expert].T
        out = out.index_add(0, token, (y * topk_weights[token, slot, None]).to(out.dtype))
    return out
