"""One expert-layer problem with its truth: build it, run an implementation, judge every output and gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_kernels.reference import reference_experts
from moe_kernels.testing.routings import make_routing
from moe_kernels.testing.tolerances import Closeness, assert_close_to_truth

#: (x, topk_ids, topk_weights, gate_up, down) -> out
Experts = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
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

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        sizes = f"T{self.tokens}-K{self.top_k}-E{self.experts}-H{self.hidden}-I{self.intermediate}"
        return f"{sizes}-{kind}-{self.routing}"


@dataclass(frozen=True)
class Inputs:
    """The tensors of a case. ``grad`` (T, H) is the gradient of the loss with respect to the output."""

    x: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    gate_up: Tensor
    down: Tensor
    grad: Tensor

    def to(self, dtype: torch.dtype) -> Inputs:
        """Every floating tensor in another dtype (the routing weights included)."""
        return Inputs(
            self.x.to(dtype), self.topk_ids, self.topk_weights.to(dtype),
            self.gate_up.to(dtype), self.down.to(dtype), self.grad.to(dtype),
        )  # fmt: skip


def make_inputs(case: Case, device: str | torch.device = "cpu") -> Inputs:
    """Normal data scaled so that every intermediate is of order one. Drawn on the CPU: equal on every device."""
    g = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=g) * scale).to(case.dtype).to(device)

    ids, weights = make_routing(case.routing, case.tokens, case.top_k, case.experts, seed=case.seed + 1)
    return Inputs(
        x=normal(case.tokens, case.hidden),
        topk_ids=ids.to(device),
        topk_weights=weights.to(case.weights_dtype).to(device),
        gate_up=normal(case.experts, 2 * case.intermediate, case.hidden, scale=case.hidden**-0.5),
        down=normal(case.experts, case.hidden, case.intermediate, scale=case.intermediate**-0.5),
        grad=normal(case.tokens, case.hidden),
    )


def run(
    implementation: Experts, inputs: Inputs, wanted: tuple[str, ...] = DIFFERENTIABLE
) -> dict[str, Tensor | None]:
    """Forward and backward. Returns ``out`` and ``d<name>`` for each differentiable input (None when not wanted)."""
    leaves = {name: getattr(inputs, name).detach().clone().requires_grad_(name in wanted) for name in DIFFERENTIABLE}
    out = implementation(leaves["x"], inputs.topk_ids, leaves["topk_weights"], leaves["gate_up"], leaves["down"])
    if wanted:
        out.backward(inputs.grad.to(out.dtype))
    return {"out": out.detach(), **{f"d{name}": leaf.grad for name, leaf in leaves.items()}}


def truth(inputs: Inputs, activation: str = "silu") -> dict[str, Tensor]:
    """Output and every gradient in float64, from the rounded inputs."""
    results = run(functools.partial(reference_experts, activation=activation), inputs.to(torch.float64))
    return {name: value for name, value in results.items() if value is not None}


def eager(inputs: Inputs, activation: str = "silu") -> dict[str, Tensor]:
    """Output and every gradient by plain PyTorch in the inputs' own dtype: the yardstick of accuracy."""
    results = run(functools.partial(reference_experts, activation=activation), inputs)
    return {name: value for name, value in results.items() if value is not None}


def check(
    implementation: Experts, inputs: Inputs, label: str = "", activation: str = "silu"
) -> dict[str, Closeness]:
    """Judge the output and every gradient of ``implementation``. Returns what was measured, by tensor name.

    Raises:
        AssertionError: naming the tensor and the limit it broke.
    """
    expected, plain, actual = truth(inputs, activation), eager(inputs, activation), run(implementation, inputs)
    measured = {}
    for name, value in actual.items():
        assert value is not None, f"{label} {name}: no gradient"
        measured[name] = assert_close_to_truth(
            value, expected[name], plain[name].to(value.dtype), f"{label} {name}", compute_dtype=inputs.gate_up.dtype
        )
    return measured
