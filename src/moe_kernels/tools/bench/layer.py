"""One expert layer to measure: its tensors, its routing, and the implementations that run on them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from moe_kernels.settings import GroupSize
from moe_kernels.shapes import LayerShape

#: How uneven the router is: scale of the per-expert bias added to unit-variance logits.
ROUTINGS: dict[str, float] = {"balanced": 0.0, "mild": 0.3, "heavy": 0.3}
OURS = "moe_kernels"

#: (x, topk_ids, topk_weights) -> out; the weights are bound inside.
Experts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Layer:
    """Tensors of one layer. T tokens, K experts per token, E experts, H hidden, I intermediate."""

    shape: LayerShape
    routing: str
    x: torch.Tensor  # (T, H), unit variance, a leaf that requires grad
    topk_ids: torch.Tensor  # (T, K) int64
    topk_weights: torch.Tensor  # (T, K), softmax weights, a leaf that requires grad
    gate_up: torch.nn.Parameter  # (E, 2I, H), scaled by 1/sqrt(H)
    down: torch.nn.Parameter  # (E, H, I), scaled by 1/sqrt(I)
    grad_out: torch.Tensor  # (T, H), unit variance: the gradient of the loss with respect to the output

    def leaves(self) -> dict[str, torch.Tensor]:
        """The four tensors that get a gradient, by the name under which their error is reported."""
        return {"dx": self.x, "dgate_up": self.gate_up, "ddown": self.down, "dw": self.topk_weights}

    def clear_gradients(self) -> None:
        """Drop every gradient, as ``zero_grad(set_to_none=True)`` does."""
        for leaf in self.leaves().values():
            leaf.grad = None

    def imbalance(self) -> float:
        """Rows of the busiest expert over the mean."""
        counts = torch.bincount(self.topk_ids.reshape(-1), minlength=self.shape.experts)
        return float(counts.max() / counts.float().mean())


def make_layer(shape: LayerShape, routing: str, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Layer:
    """Random tensors for ``shape``, equal for equal arguments on one device."""
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(*size: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=dtype).mul_(scale)

    logits = torch.randn(shape.tokens, shape.experts, generator=generator, device=device)
    logits += ROUTINGS[routing] * torch.randn(shape.experts, generator=generator, device=device)
    if routing == "balanced":
        topk_ids = torch.arange(shape.rows, device=device).view(shape.tokens, shape.top_k) % shape.experts
    else:
        if routing == "heavy":
            # One expert in sixteen (at least one) takes nearly every token; the rest share the other slots.
            logits[:, : max(1, shape.experts // 16)] += 4.0
        topk_ids = logits.topk(shape.top_k, dim=-1).indices
    # Mixtral's router returns float32 weights, the others the activations' dtype.
    weights_dtype = torch.float32 if shape.name.startswith("mixtral") else dtype
    weights = logits.gather(1, topk_ids).softmax(-1).to(weights_dtype)
    hidden, intermediate, experts = shape.hidden, shape.intermediate, shape.experts
    return Layer(
        shape,
        routing,
        normal(shape.tokens, hidden).requires_grad_(),
        topk_ids,
        weights.requires_grad_(),
        torch.nn.Parameter(normal(experts, 2 * intermediate, hidden, scale=hidden**-0.5)),
        torch.nn.Parameter(normal(experts, hidden, intermediate, scale=intermediate**-0.5)),
        normal(shape.tokens, hidden),
    )


def our_variants(
    group_sizes: Sequence[GroupSize],
    persistent: Sequence[bool],
    backend: str = "auto",
    recompute: Sequence[bool] = (False,),
) -> dict[str, str]:
    """Register one transformers implementation per knob setting: {name of the row: registered name}."""
    from moe_kernels.integrations.transformers import register

    single = len(group_sizes) == len(persistent) == len(recompute) == 1
    rows = {}
    for size, persists, recomputes in itertools.product(group_sizes, persistent, recompute):
        knobs = f"[g={size},p={int(persists)}{',recompute' if recomputes else ''}]"
        name = f"{OURS}_bench_{size}_{int(persists)}_{int(recomputes)}_{backend}"
        register(group_size=size, persistent=persists, recompute=recomputes, backend=backend, name=name)
        rows[OURS if single else OURS + knobs] = name
    return rows


def transformers_experts(layer: Layer, implementation: str) -> Experts:
    """transformers' real ``MixtralExperts`` on the layer's own weights, running ``implementation``."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = MixtralConfig(
        hidden_size=layer.shape.hidden,
        intermediate_size=layer.shape.intermediate,
        num_local_experts=layer.shape.experts,
        num_experts_per_tok=layer.shape.top_k,
        hidden_act="silu",
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        module = MixtralExperts(config)
    module.gate_up_proj, module.down_proj = layer.gate_up, layer.down
    return module
