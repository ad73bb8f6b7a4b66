"""One expert layer to measure: its tensors, its routing, and the implementations that run on them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from moe_kernels.moe import fused_experts
from moe_kernels.settings import GroupSize
from moe_kernels.shapes import LayerShape
from moe_kernels.tools.check.forms import PLAIN, in_form
from moe_kernels.tools.check.problems import Case, Inputs, bound, make_extras, make_weights, options_of

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
    gate_up: Any  # (E, 2I, H), scaled by 1/sqrt(H): a torch.nn.Parameter, or a PackedWeight
    down: Any  # (E, H, I), scaled by 1/sqrt(I), the same
    grad_out: torch.Tensor  # (T, H), unit variance: the gradient of the loss with respect to the output
    case: Case  # the form in which it is trained
    extras: dict[str, torch.Tensor]  # biases and low-rank factors, as in Inputs

    def inputs(self) -> Inputs:
        """The same tensors as a problem."""
        tensors = self.x, self.topk_ids, self.topk_weights, self.gate_up, self.down, self.grad_out, self.extras
        return Inputs(*tensors, options_of(self.case), self.case.frozen)

    def leaves(self) -> dict[str, torch.Tensor]:
        """The tensors that get a gradient, by the name under which their error is reported."""
        leaves = self.inputs().leaves()
        return {"dw" if name == "topk_weights" else f"d{name}": leaf for name, leaf in leaves.items()}

    @property
    def forward_flops(self) -> int:
        """Floating-point operations of the GEMMs of a forward pass, without low-rank factors."""
        return self.shape.forward_flops if self.case.gated else self.shape.forward_flops * 2 // 3

    @property
    def forward_backward_flops(self) -> int:
        """Forward and backward together: frozen weights have no gradient."""
        return (2 if self.case.frozen else 3) * self.forward_flops

    def clear_gradients(self) -> None:
        """Drop every gradient, as ``zero_grad(set_to_none=True)`` does."""
        for leaf in self.leaves().values():
            leaf.grad = None

    def imbalance(self) -> float:
        """Rows of the busiest expert over the mean."""
        counts = torch.bincount(self.topk_ids.reshape(-1), minlength=self.shape.experts)
        return float(counts.max() / counts.float().mean())


def make_layer(
    shape: LayerShape,
    routing: str,
    device: torch.device,
    dtype: torch.dtype,
    seed: int = 0,
    form: str = PLAIN,
) -> Layer:
    """Random tensors for ``shape``, equal for equal arguments on one device."""
    case = in_form(Case.of(shape, dtype), form)
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
    x = normal(shape.tokens, shape.hidden).requires_grad_()
    gate_up, down = (
        torch.nn.Parameter(weight, requires_grad=not case.frozen) if isinstance(weight, torch.Tensor) else weight
        for weight in make_weights(case, normal)
    )
    grad_out, extras = normal(shape.tokens, shape.hidden), make_extras(case, normal)
    layer = Layer(shape, routing, x, topk_ids, weights, gate_up, down, grad_out, case, extras)
    for leaf in layer.leaves().values():
        leaf.requires_grad_()
    return layer


def our_settings(
    group_sizes: Sequence[GroupSize], persistent: Sequence[bool], recompute: Sequence[bool] = (False,)
) -> dict[str, dict[str, Any]]:
    """The settings of the op for each combination of knobs: {name of the row: settings}."""
    single = len(group_sizes) == len(persistent) == len(recompute) == 1
    rows = {}
    for size, persists, recomputes in itertools.product(group_sizes, persistent, recompute):
        knobs = f"[g={size},p={int(persists)}{',recompute' if recomputes else ''}]"
        settings = {"group_size": size, "persistent": persists, "recompute": recomputes}
        rows[OURS if single else OURS + knobs] = settings
    return rows


def our_variants(
    group_sizes: Sequence[GroupSize],
    persistent: Sequence[bool],
    backend: str = "auto",
    recompute: Sequence[bool] = (False,),
) -> dict[str, str]:
    """Register one transformers implementation per knob setting: {name of the row: registered name}."""
    from moe_kernels.integrations.transformers import register

    rows = our_settings(group_sizes, persistent, recompute)
    names = {}
    for row, settings in rows.items():
        names[row] = "_".join([OURS, "bench", *(str(value) for value in settings.values()), backend])
        register(**settings, backend=backend, name=names[row])
    return names


def op_experts(layer: Layer, **settings: Any) -> Experts:
    """The op on the layer's own weights: what no module of transformers would hold without its checkpoint."""
    return bound(partial(fused_experts, **settings), layer.inputs())


def transformers_experts(layer: Layer, implementation: str) -> Experts:
    """transformers' real ``MixtralExperts`` on the layer's own weights, running ``implementation``.

    With low-rank factors as PEFT does it: each call adds their product to the weights, which are thus formed.
    """
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
    if not layer.case.ranks:
        return module

    def adapted(*arguments: torch.Tensor) -> torch.Tensor:
        weights = {
            f"{name}_proj": torch.baddbmm(weight, layer.extras[f"{name}_lora_b"], layer.extras[f"{name}_lora_a"])
            for name, weight in (("gate_up", layer.gate_up), ("down", layer.down))
        }
        out: torch.Tensor = torch.func.functional_call(module, weights, arguments)
        return out

    return adapted
