"""LoRA over experts in 4 bits, block-fp8 and mxfp4 on two ranks: the losses and adapter gradients of the values that
they stand for, in float32, in PEFT's own way and in one process."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra [transformers]")
pytest.importorskip("peft", reason="needs peft 0.20 or newer")
pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
pytestmark = pytest.mark.slow
each_kind = pytest.mark.parametrize("kind", ["4 bits", "fp8", "mxfp4"])
FACTORS = 2 * 2 * (2 + 2)  # A and B; layers; of two weights of the experts and of two of attention


@pytest.fixture(scope="module")
def ranks(torchrun: Callable[..., Any]) -> Any:
    return [rank["packed"] for rank in torchrun("packed")]


def distances(actual: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    """Relative L2 distance of every gradient."""
    found, grads = actual["grads"], expected["grads"]
    assert found.keys() == grads.keys()
    assert len(grads) == FACTORS
    assert all(torch.count_nonzero(grad) for grad in grads.values())
    return {name: float((found[name] - grad).norm() / grad.norm()) for name, grad in grads.items()}


# gloo sends no fp8, which DDP would have to.
@pytest.mark.parametrize(
    ("kind", "engine"),
    [("4 bits", "fsdp2"), ("4 bits", "ddp"), ("fp8", "fsdp2"), ("mxfp4", "fsdp2"), ("mxfp4", "ddp")],
)
def test_losses_and_gradients_are_those_of_one_process(kind: str, engine: str, ranks: Any) -> None:
    for rank in ranks:
        expected, actual = rank[kind, "whole"], rank[kind, engine]
        assert actual["losses"] == pytest.approx(expected["losses"], rel=2e-5)
        assert max(distances(actual, expected).values()) < 1e-4
        assert actual["calls"]["torch"] > 0


@each_kind
def test_bf16_with_fp32_reduction_is_as_close_as_over_16_bits(kind: str, ranks: Any) -> None:
    results = ranks[0]
    baseline, ours = (results[kind, "bf16", experts] for experts in ("grouped_mm", "moe_kernels"))
    allowed, measured = (distances(run, results[kind, "whole"]) for run in (baseline, ours))
    assert ours["losses"][0] == pytest.approx(baseline["losses"][0], abs=2e-3)
    # The median: one token whose router rounds to another expert moves that layer's gradients by a tenth.
    assert statistics.median(measured[n] / (1.25 * allowed[n] + 0.005) for n in measured) < 1


@each_kind
def test_mixed_precision_gathers_the_weights_as_they_are_stored(kind: str, ranks: Any) -> None:
    for rank in ranks:
        seen = rank[kind, "seen"]
        assert len(seen) == (2 + 2 * 4 if kind == "fp8" else 2)  # attention is in fp8 there, too
        assert all(seen.values()), [name for name, same in seen.items() if not same]


def test_a_sharded_model_is_saved_as_it_was_loaded(ranks: Any) -> None:
    for rank in ranks:
        assert rank["fp8", "saved"] == {"adapter": True}
        assert rank["mxfp4", "saved"] == {"adapter": True, "whole": True}


def test_sharded_codes_keep_no_transposed_copy_from_step_to_step(ranks: Any) -> None:
    """With fp8_activations: whole copies of every layer would be what FSDP2 is to save."""
    for rank in ranks:
        whole, sharded = rank["fp8 activations", "whole"], rank["fp8 activations", "fsdp2"]
        assert whole["copied"] == 4  # two layers
        assert sharded["copied"] == 0
        assert sharded["losses"] == pytest.approx(whole["losses"], rel=1e-3)
        assert max(distances(sharded, whole).values()) < 0.02
