"""One expert-layer problem with its truth: build it, run an implementation, judge every output and gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moe_kernels.activation import Activation
from moe_kernels.factors import LowRank
from moe_kernels.fp8 import Fp8Weight
from moe_kernels.layer import Matrix
from moe_kernels.packed import whole
from moe_kernels.reference import reference_experts
from moe_kernels.shapes import LayerShape
from moe_kernels.tools.check.fp8 import fp8_experts
from moe_kernels.tools.check.packing import STEPS, in_few_bits
from moe_kernels.tools.check.routings import make_routing

#: (x, topk_ids, topk_weights, gate_up, down, **extras and options) -> out
Experts = Callable[..., Tensor]
DIFFERENTIABLE = ("x", "topk_weights", "gate_up", "down")
#: What a frozen base is.
BASE = ("gate_up", "down", "gate_up_bias", "down_bias")
#: (*size, scale=1.0) -> a normal tensor of that size; for cases with a lora_dtype also (..., dtype).
Normal = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """Sizes and data of one problem. T tokens, K experts per token, E experts, H hidden, I intermediate.

    Attributes:
        lora_rank: of the low-rank factors of both weights; 0 without.
        down_rank: of those of down, where it has another.
        scalings: what LoRA multiplies the products of both weights' factors by.
        lora_dtype: of the factors; None: the layer's own.
        frozen: weights and biases get no gradient.
        packed: the weights are frozen and in few bits, a key of :data:`moe_kernels.tools.check.packing.FORMATS`:
            "4 bits" with nested scales, block "fp8" or "mxfp4". "fp8 activations" is block fp8 that is multiplied in
            fp8, which GPUs of compute capability 8.9 do.
    """

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
    down_rank: int | None = None
    scalings: tuple[float, float] = (1.0, 1.0)
    lora_dtype: torch.dtype | None = None
    frozen: bool = False
    packed: str = ""

    @classmethod
    def of(cls, shape: LayerShape, dtype: torch.dtype) -> Case:
        """A plain SwiGLU layer of these sizes."""
        return cls(shape.tokens, shape.top_k, shape.experts, shape.hidden, shape.intermediate, dtype)

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        sizes = f"T{self.tokens}-K{self.top_k}-E{self.experts}-H{self.hidden}-I{self.intermediate}"
        flags = [name for name in ("interleaved", "transposed", "bias") if getattr(self, name)]
        flags += [] if self.gated else ["gateless"]
        flags += ["lora" + "+".join(map(str, dict.fromkeys(self.ranks.values())))] if self.ranks else []
        flags += [self.packed.replace(" ", "-")] if self.packed else ["frozen"] if self.frozen else []
        flags += [] if self.reduce else ["unreduced"]
        flags += [] if self.activation == "silu" else [Activation.of(self.activation).name]
        return "-".join([sizes, kind, self.routing, *flags])

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of the low-rank factors of each weight that has them."""
        down = self.lora_rank if self.down_rank is None else self.down_rank
        return {name: rank for name, rank in (("gate_up", self.lora_rank), ("down", down)) if rank}

    def fitting(self) -> Case:
        """With hidden and intermediate size rounded up to what the format of the weights holds."""
        step = STEPS.get(self.packed, 1)
        hidden, intermediate = (-(-size // step) * step for size in (self.hidden, self.intermediate))
        return replace(self, hidden=hidden, intermediate=intermediate)


@dataclass(frozen=True)
class Inputs:
    """The tensors of a case. ``grad`` (T, H), or (T, K, H) unreduced, is the gradient of the loss to the output.

    ``extras`` holds the optional tensors under the names of :func:`moe_kernels.fused_experts`, low-rank pairs as
    ``..._lora_b`` and ``..._lora_a``; ``options`` its arguments that are no tensors; ``scalings`` what the products
    of gate_up's and down's pairs are multiplied by. Weights in few bits get no gradient; ``frozen`` ones and their
    biases get none either.
    """

    x: Tensor
    topk_ids: Tensor
    topk_weights: Tensor | None
    gate_up: Matrix
    down: Matrix
    grad: Tensor
    extras: dict[str, Tensor] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    frozen: bool = False
    scalings: tuple[float, float] = (1.0, 1.0)

    def to(self, dtype: torch.dtype) -> Inputs:
        """Every floating tensor in another dtype (the routing weights included), no weight in few bits but fp8's."""
        own = self.dequantised()
        named: dict[str, Any] = {name: getattr(own, name) for name in DIFFERENTIABLE} | own.extras
        tensors = {name: tensor.to(dtype) for name, tensor in named.items() if tensor is not None}
        return replace(own._with(tensors), grad=own.grad.to(dtype))

    def dequantised(self) -> Inputs:
        """With 16-bit weights in the place of those in few bits, unless they are multiplied as they are (fp8)."""
        if isinstance(self.gate_up, Fp8Weight):
            return self
        return replace(self, gate_up=whole(self.gate_up), down=whole(self.down))

    def leaves(self) -> dict[str, Tensor]:
        """Every tensor that gets a gradient, by name."""
        named = {name: getattr(self, name) for name in DIFFERENTIABLE} | self.extras
        fixed = BASE if self.frozen else ()
        return {name: leaf for name, leaf in named.items() if isinstance(leaf, Tensor) and name not in fixed}

    def with_own_leaves(self, wanted: tuple[str, ...] | None = None) -> Inputs:
        """With copies of the differentiable tensors; those ``wanted``, or all, require gradients."""
        leaves = {name: leaf.detach().clone() for name, leaf in self.leaves().items()}
        for name, leaf in leaves.items():
            leaf.requires_grad_(wanted is None or name in wanted)
        return self._with(leaves)

    def _with(self, leaves: dict[str, Tensor]) -> Inputs:
        changed: dict[str, Any] = {name: leaf for name, leaf in leaves.items() if name in DIFFERENTIABLE}
        return replace(self, **changed, extras={name: leaves.get(name, own) for name, own in self.extras.items()})


def make_inputs(case: Case, device: str | torch.device = "cpu") -> Inputs:
    """Normal data scaled so that every intermediate is of order one. Drawn on the CPU: equal on every device."""
    g = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = case.dtype) -> Tensor:
        return (torch.randn(*shape, generator=g) * scale).to(dtype).to(device)

    x = normal(case.tokens, case.hidden)
    weights = make_weights(case, normal)
    grad = normal(case.tokens, *([] if case.reduce else [case.top_k]), case.hidden)
    extras = make_extras(case, normal)
    return Inputs(x, *_routing(case, device), *weights, grad, extras, options_of(case), case.frozen, case.scalings)


def _sizes(case: Case) -> dict[str, tuple[int, int]]:
    """(N, K) of both weights."""
    width = case.intermediate * (2 if case.gated else 1)
    return {"gate_up": (width, case.hidden), "down": (case.hidden, case.intermediate)}


def make_weights(case: Case, normal: Normal) -> tuple[Matrix, Matrix]:
    """gate_up and down, in the memory order and the format of the case."""

    def matrix(name: str, rows: int, cols: int) -> Matrix:
        weight = normal(case.experts, rows, cols, scale=cols**-0.5)
        weight = weight.mT.contiguous().mT if case.transposed else weight
        stacked = 2 if name == "gate_up" and case.gated else 1
        return in_few_bits(weight, case.packed, stacked) if case.packed else weight

    gate_up, down = (matrix(name, *size) for name, size in _sizes(case).items())
    return gate_up, down


def make_extras(case: Case, normal: Normal) -> dict[str, Tensor]:
    """``extras`` of :class:`Inputs`: biases, and low-rank factors whose product is as large as the weight."""
    extras, sizes = {}, _sizes(case)
    if case.bias:
        extras = {f"{name}_bias": normal(case.experts, rows) for name, (rows, _) in sizes.items()}
    factor = partial(normal, dtype=case.lora_dtype) if case.lora_dtype else normal
    for name, rank in case.ranks.items():
        rows, cols = sizes[name]
        lora_b = factor(case.experts, rows, rank, scale=rank**-0.5)
        extras[f"{name}_lora_b"] = lora_b.permute(1, 2, 0).contiguous().permute(2, 0, 1)  # as PEFT stores it
        extras[f"{name}_lora_a"] = factor(case.experts, rank, cols, scale=cols**-0.5)
    return extras


def options_of(case: Case) -> dict[str, Any]:
    """``options`` of :class:`Inputs`: what differs from the op's defaults."""
    settings: dict[str, Any] = {"activation": case.activation, "interleaved": case.interleaved, "reduce": case.reduce}
    defaults = {"activation": "silu", "interleaved": False, "reduce": True}
    return {name: value for name, value in settings.items() if value != defaults[name]}


def _routing(case: Case, device: str | torch.device) -> tuple[Tensor, Tensor | None]:
    ids, weights = make_routing(case.routing, case.tokens, case.top_k, case.experts, seed=case.seed + 1)
    return ids.to(device), weights.to(case.weights_dtype).to(device) if case.reduce else None


def rerouted(inputs: Inputs, case: Case) -> Inputs:
    """:func:`make_inputs` of ``case``, from inputs that differ in routing alone: drawing weights takes seconds."""
    ids, weights = _routing(case, inputs.x.device)
    return replace(inputs, topk_ids=ids, topk_weights=weights)


def bound(implementation: Experts, inputs: Inputs) -> Experts:
    """The implementation as a function of (x, topk_ids, topk_weights), with all else of ``inputs``."""
    extras = inputs.extras
    arguments: dict[str, Any] = {name: bias for name, bias in extras.items() if name.endswith("_bias")}
    for name, scaling in zip(("gate_up", "down"), inputs.scalings, strict=True):
        if f"{name}_lora_b" in extras:
            arguments[f"{name}_lora"] = LowRank(extras[f"{name}_lora_b"], extras[f"{name}_lora_a"], scaling)
    return partial(implementation, gate_up=inputs.gate_up, down=inputs.down, **arguments, **inputs.options)


def call(implementation: Experts, inputs: Inputs) -> Tensor:
    """The implementation's output for the tensors and options of ``inputs``."""
    return bound(implementation, inputs)(inputs.x, inputs.topk_ids, inputs.topk_weights)


def run(implementation: Experts, inputs: Inputs, wanted: tuple[str, ...] | None = None) -> dict[str, Tensor | None]:
    """Forward and backward. Returns ``out`` and ``d<name>`` for each differentiable input (None when not wanted)."""
    own = inputs.with_own_leaves(wanted)
    leaves, out = own.leaves(), call(implementation, own)
    if out.requires_grad:
        out.backward(inputs.grad.to(out.dtype))
    return {"out": out.detach(), **{f"d{name}": leaf.grad for name, leaf in leaves.items()}}


def truth(inputs: Inputs) -> dict[str, Tensor]:
    """Output and every gradient in float64, from the rounded inputs and from what weights in few bits stand for."""
    return eager(inputs.to(torch.float64))


def eager(inputs: Inputs) -> dict[str, Tensor]:
    """Output and every gradient by plain PyTorch in the inputs' own dtype: the yardstick of accuracy."""
    reference = fp8_experts if isinstance(inputs.gate_up, Fp8Weight) else reference_experts
    found = run(reference, inputs.dequantised())
    return {name: value for name, value in found.items() if value is not None}
