"""One expert-layer problem with its truth: build it, run an implementation, judge every output and gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from moe_kernels.activation import Activation
from moe_kernels.reference import reference_experts
from moe_kernels.shapes import LayerShape
from moe_kernels.tools.check.routings import make_routing

#: (x, topk_ids, topk_weights, gate_up, down, **extras and options) -> out
Experts = Callable[..., Tensor]
DIFFERENTIABLE = ("x", "topk_weights", "gate_up", "down")


@dataclass(frozen=True)
class Case:
    """Sizes and data of one problem. T tokens, K experts per token, E experts, H hidden, I intermediate."""

    tokens: int
    top_k: int
    experts: int
    hidden: int
    intermediate: int
    dtype: torch.dtype = torch.float32
    routing: str = "random"
    weights_dtype: torch.dtype = torch.float32
    seed: int = 0
    activation: str | Activation = "silu"
    gated: bool = True
    interleaved: bool = False
    transposed: bool = False
    bias: bool = False
    lora_rank: int = 0
    reduce: bool = True

    @classmethod
    def of(cls, shape: LayerShape, dtype: torch.dtype) -> Case:
        """A plain SwiGLU layer of these sizes."""
        return cls(shape.tokens, shape.top_k, shape.experts, shape.hidden, shape.intermediate, dtype)

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        sizes = f"T{self.tokens}-K{self.top_k}-E{self.experts}-H{self.hidden}-I{self.intermediate}"
        flags = [name for name in ("interleaved", "transposed", "bias") if getattr(self, name)]
        flags += [] if self.gated else ["gateless"]
        flags += [f"lora{self.lora_rank}"] if self.lora_rank else []
        flags += [] if self.reduce else ["unreduced"]
        flags += [] if self.activation == "silu" else [Activation.of(self.activation).name]
        return "-".join([sizes, kind, self.routing, *flags])


@dataclass(frozen=True)
class Inputs:
    """The tensors of a case. ``grad`` (T, H), or (T, K, H) unreduced, is the gradient of the loss to the output.

    ``extras`` holds the optional tensors under the names of :func:`moe_kernels.fused_experts`, low-rank pairs as
    ``..._lora_b`` and ``..._lora_a``; ``options`` its arguments that are no tensors.
    """

    x: Tensor
    topk_ids: Tensor
    topk_weights: Tensor | None
    gate_up: Tensor
    down: Tensor
    grad: Tensor
    extras: dict[str, Tensor] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> Inputs:
        """Every floating tensor in another dtype (the routing weights included)."""
        leaves = {name: leaf.to(dtype) for name, leaf in self.leaves().items()}
        return replace(self._with(leaves), grad=self.grad.to(dtype))

    def leaves(self) -> dict[str, Tensor]:
        """Every differentiable tensor by name."""
        named = {name: getattr(self, name) for name in DIFFERENTIABLE}
        return {name: tensor for name, tensor in named.items() if tensor is not None} | self.extras

    def with_own_leaves(self, wanted: tuple[str, ...] | None = None) -> Inputs:
        """With copies of the differentiable tensors; those ``wanted``, or all, require gradients."""
        leaves = {name: leaf.detach().clone() for name, leaf in self.leaves().items()}
        for name, leaf in leaves.items():
            leaf.requires_grad_(wanted is None or name in wanted)
        return self._with(leaves)

    def _with(self, leaves: dict[str, Tensor]) -> Inputs:
        changed: dict[str, Any] = {name: leaf for name, leaf in leaves.items() if name in DIFFERENTIABLE}
        return replace(self, **changed, extras={name: leaves[name] for name in self.extras})


def make_inputs(case: Case, device: str | torch.device = "cpu") -> Inputs:
    """Normal data scaled so that every intermediate is of order one. Drawn on the CPU: equal on every device."""
    g = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=g) * scale).to(case.dtype).to(device)

    def matrix(*shape: int, scale: float) -> Tensor:
        weight = normal(*shape, scale=scale)
        return weight.mT.contiguous().mT if case.transposed else weight

    experts, hidden, intermediate = case.experts, case.hidden, case.intermediate
    width = intermediate * (2 if case.gated else 1)
    x = normal(case.tokens, hidden)
    gate_up = matrix(experts, width, hidden, scale=hidden**-0.5)
    down = matrix(experts, hidden, intermediate, scale=intermediate**-0.5)
    grad = normal(case.tokens, hidden) if case.reduce else normal(case.tokens, case.top_k, hidden)
    extras: dict[str, Tensor] = {}
    if case.bias:
        extras |= {"gate_up_bias": normal(experts, width), "down_bias": normal(experts, hidden)}
    if case.lora_rank:
        rank = case.lora_rank
        for name, (rows, cols) in (("gate_up", (width, hidden)), ("down", (hidden, intermediate))):
            lora_b = normal(experts, rows, rank, scale=rank**-0.5)
            extras[f"{name}_lora_b"] = lora_b.permute(1, 2, 0).contiguous().permute(2, 0, 1)  # as PEFT stores it
            extras[f"{name}_lora_a"] = normal(experts, rank, cols, scale=cols**-0.5)
    settings: dict[str, Any] = {"activation": case.activation, "interleaved": case.interleaved, "reduce": case.reduce}
    defaults = {"activation": "silu", "interleaved": False, "reduce": True}
    options = {name: value for name, value in settings.items() if value != defaults[name]}
    return Inputs(x, *_routing(case, device), gate_up, down, grad, extras, options)


def _routing(case: Case, device: str | torch.device) -> tuple[Tensor, Tensor | None]:
    ids, weights = make_routing(case.routing, case.tokens, case.top_k, case.experts, seed=case.seed + 1)
    return ids.to(device), weights.to(case.weights_dtype).to(device) if case.reduce else None


def rerouted(inputs: Inputs, case: Case) -> Inputs:
    """:func:`make_inputs` of ``case``, from inputs that differ in routing alone: drawing weights takes seconds."""
    ids, weights = _routing(case, inputs.x.device)
    return replace(inputs, topk_ids=ids, topk_weights=weights)


def call(implementation: Experts, inputs: Inputs) -> Tensor:
    """The implementation's output for the tensors and options of ``inputs``."""
    extras = inputs.extras
    arguments: dict[str, Any] = {name: bias for name, bias in extras.items() if name.endswith("_bias")}
    for name in ("gate_up", "down"):
        if f"{name}_lora_b" in extras:
            arguments[f"{name}_lora"] = (extras[f"{name}_lora_b"], extras[f"{name}_lora_a"])
    return implementation(
        inputs.x, inputs.topk_ids, inputs.topk_weights, inputs.gate_up, inputs.down, **arguments, **inputs.options
    )


def run(implementation: Experts, inputs: Inputs, wanted: tuple[str, ...] | None = None) -> dict[str, Tensor | None]:
    """Forward and backward. Returns ``out`` and ``d<name>`` for each differentiable input (None when not wanted)."""
    own = inputs.with_own_leaves(wanted)
    leaves, out = own.leaves(), call(implementation, own)
    if out.requires_grad:
        out.backward(inputs.grad.to(out.dtype))
    return {"out": out.detach(), **{f"d{name}": leaf.grad for name, leaf in leaves.items()}}


def truth(inputs: Inputs) -> dict[str, Tensor]:
    """Output and every gradient in float64, from the rounded inputs."""
    return eager(inputs.to(torch.float64))


def eager(inputs: Inputs) -> dict[str, Tensor]:
    """Output and every gradient by plain PyTorch in the inputs' own dtype: the yardstick of accuracy."""
    return {name: value for name, value in run(reference_experts, inputs).items() if value is not None}
