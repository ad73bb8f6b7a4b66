"""Correctness before speed: the error of an implementation against the reference in a wider dtype."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from moe_kernels.reference import reference_experts
from moe_kernels.tools.bench.layer import Experts, Layer

#: An implementation is called wrong when an error exceeds this many times that of the yardstick.
WRONG_FACTOR = 3.0


@contextmanager
def exact_float32() -> Iterator[None]:
    """float32 products in float32, whatever the process had chosen (TF32 keeps ten bits of mantissa)."""
    switches: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        yield
    finally:
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision


class Error:
    """Accumulates ||ours - truth|| / ||truth|| over pieces."""

    def __init__(self) -> None:
        self.difference = self.truth = 0.0

    def add(self, ours: torch.Tensor, truth: torch.Tensor) -> None:
        self.difference += (ours.to(truth.dtype) - truth).square().sum(dtype=torch.float64).item()
        self.truth += truth.square().sum(dtype=torch.float64).item()

    def value(self) -> float:
        if self.truth == 0.0:
            return 0.0 if self.difference == 0.0 else math.inf
        return math.sqrt(self.difference / self.truth)


def relative_errors(layer: Layer, experts: Experts) -> dict[str, float]:
    """Relative L2 error of the output and of every gradient: keys out, dx, dgate_up, ddown, dw.

    The reference is evaluated expert by expert, so that wide copies of all weights and gradients never exist at once.
    It is in float32, and in float64 for float32 layers: an implementation that sums in the reference's order would
    have no error there, and the others would be judged by that.
    """
    wide = torch.float64 if layer.x.dtype == torch.float32 else torch.float32
    layer.clear_gradients()
    out = experts(layer.x, layer.topk_ids, layer.topk_weights)
    out.backward(layer.grad_out)
    ours = {"out": out.detach()}
    for name, leaf in layer.leaves().items():
        assert leaf.grad is not None, f"{name}: no gradient"
        ours[name] = leaf.grad
    errors = {name: Error() for name in ours}
    truth = {name: torch.zeros_like(ours[name], dtype=wide) for name in ("out", "dx", "dw")}
    with exact_float32():
        for expert in range(layer.shape.experts):
            token, slot = torch.where(layer.topk_ids == expert)
            own = slice(expert, expert + 1)
            inputs = (
                layer.x.detach()[token].to(wide).requires_grad_(),
                layer.topk_weights.detach()[token, slot, None].to(wide).requires_grad_(),
                layer.gate_up.detach()[own].to(wide).requires_grad_(),
                layer.down.detach()[own].to(wide).requires_grad_(),
            )
            x, weights, gate_up, down = inputs
            y = reference_experts(x, torch.zeros_like(slot)[:, None], weights, gate_up, down)
            dx, dw, dgate_up, ddown = torch.autograd.grad(y, inputs, layer.grad_out[token].to(wide))
            truth["out"].index_add_(0, token, y.detach())
            truth["dx"].index_add_(0, token, dx)
            truth["dw"][token, slot] = dw[:, 0]
            errors["dgate_up"].add(ours["dgate_up"][own], dgate_up)
            errors["ddown"].add(ours["ddown"][own], ddown)
    for name, right in truth.items():
        errors[name].add(ours[name], right)
    layer.clear_gradients()
    return {name: error.value() for name, error in errors.items()}


def what_is_wrong(errors: dict[str, float], yardstick: dict[str, float], floor: float) -> str | None:
    """One sentence if an error is not finite or exceeds three times the yardstick's, else None.

    ``floor`` is the rounding of the dtype, for a yardstick that happens to be more exact.
    """
    for name, error in errors.items():
        limit = WRONG_FACTOR * max(yardstick.get(name, 0.0), floor)
        if not math.isfinite(error) or error > limit:
            return f"wrong {name}: relative error {error:.2e}, limit {limit:.2e}"
    return None
