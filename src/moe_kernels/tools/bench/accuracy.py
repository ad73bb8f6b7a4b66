"""Correctness before speed: the error of an implementation against the reference in a wider dtype."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from moe_kernels.fp8 import Fp8Weight
from moe_kernels.layer import Matrix
from moe_kernels.tools.bench.layer import Experts, Layer
from moe_kernels.tools.check.problems import eager

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
    """Relative L2 error of the output and of every gradient: out, and what :meth:`Layer.leaves` names.

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
    whole = layer.inputs()
    with exact_float32():
        for expert in range(layer.shape.experts):
            token, slot = torch.where(layer.topk_ids == expert)
            own = slice(expert, expert + 1)
            part = replace(
                whole,
                x=whole.x.detach()[token],
                topk_ids=torch.zeros_like(slot)[:, None],
                topk_weights=layer.topk_weights.detach()[token, slot, None],
                gate_up=_expert(whole.gate_up, expert),
                down=_expert(whole.down, expert),
                grad=whole.grad[token],
                extras={name: extra.detach()[own] for name, extra in whole.extras.items()},
            )
            found = eager(part.to(wide))
            truth["out"].index_add_(0, token, found["out"])
            truth["dx"].index_add_(0, token, found["dx"])
            truth["dw"][token, slot] = found["dtopk_weights"][:, 0]
            for name in errors.keys() - truth.keys():
                errors[name].add(ours[name][own], found[name])
    for name, right in truth.items():
        errors[name].add(ours[name], right)
    layer.clear_gradients()
    return {name: error.value() for name, error in errors.items()}


def _expert(weight: Matrix, expert: int) -> Matrix:
    """The weight of one expert, (1, N, K)."""
    own = slice(expert, expert + 1)
    if isinstance(weight, Fp8Weight):
        sizes = (1, *weight.sizes[1:])
        return replace(weight, sizes=sizes, data=weight.data[own], scales=weight.scales[own], transposed=None)
    return weight.detach()[own] if isinstance(weight, torch.Tensor) else weight.experts(expert, expert + 1)


def what_is_wrong(errors: dict[str, float], yardstick: dict[str, float], floor: float) -> str | None:
    """One sentence if an error is not finite or exceeds three times the yardstick's, else None.

    ``floor`` is the rounding of the dtype, for a yardstick that happens to be more exact.
    """
    for name, error in errors.items():
        limit = WRONG_FACTOR * max(yardstick.get(name, 0.0), floor)
        if not math.isfinite(error) or error > limit:
            return f"wrong {name}: relative error {error:.2e}, limit {limit:.2e}"
    return None
