"""LoRA on expert weights over two ranks: the losses and adapter gradients of PEFT's own way in one process."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch

from moe_kernels.shapes import FAMILIES

pytest.importorskip("transformers", reason="needs the extra [transformers]")
pytest.importorskip("peft", reason="needs peft 0.20 or newer")
pytestmark = pytest.mark.slow
each_model = pytest.mark.parametrize("family", [*FAMILIES, "gpt-oss"])


@pytest.fixture(scope="module")
def ranks(torchrun: Callable[..., Any]) -> Any:
    return [rank["lora"] for rank in torchrun("lora")]


def distances(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """Relative L2 distance of every gradient; all must be there, and all of adapters."""
    assert actual.keys() == expected.keys()
    assert all("lora_" in name for name in expected)
    assert any("experts" in name for name in expected)
    assert all(grad.norm() > 0 for grad in expected.values())
    return {name: float((actual[name] - g).norm() / g.norm()) for name, g in expected.items()}


@pytest.mark.parametrize("engine", ["fsdp2", "ddp"])
@each_model
def test_losses_and_gradients_are_those_of_one_process(engine: str, family: str, ranks: Any) -> None:
    for rank in ranks:
        expected, actual = rank[family, "whole"], rank[family, engine]
        assert actual["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert max(distances(actual["grads"], expected["grads"]).values()) < 1e-4
        assert actual["calls"]["torch"] > 0


@each_model
def test_bf16_with_fp32_reduction_is_as_close_as_pefts_own(family: str, ranks: Any) -> None:
    """Parameters gathered as bf16, gradients reduced in fp32: no further from fp32 than merged weights are."""
    results = ranks[0]
    baseline, ours = (results[family, "bf16", experts] for experts in ("grouped_mm", "moe_kernels"))
    # The first step alone: then AdamW makes a different routing of either out of every rounding.
    assert ours["losses"][0] == pytest.approx(results[family, "whole"]["losses"][0], abs=0.03)
    truth = results[family, "whole"]["grads"]
    allowed, measured = (distances(run["grads"], truth) for run in (baseline, ours))
    # The median: one token of 48 whose router rounds to another expert moves that layer's gradients by a tenth.
    assert statistics.median(measured[n] / (1.25 * allowed[n] + 0.005) for n in measured) < 1


@each_model
def test_a_rank_without_tokens_adds_nothing(family: str, ranks: Any) -> None:
    for rank in ranks:
        found = rank[family, "idle"]
        # FSDP averages over ranks, and one of the two had nothing.
        assert max(distances({n: 2 * g for n, g in found["fsdp2"].items()}, found["whole"]).values()) < 1e-4


def test_an_adapter_is_drawn_alike_however_it_is_sharded(ranks: Any) -> None:
    for rank in ranks:
        whole, sharded = rank["drawn"]["whole"], rank["drawn"]["sharded"]
        assert whole["sum"] == sharded["sum"] == ranks[0]["drawn"]["whole"]["sum"]
        assert whole["weights"].keys() == sharded["weights"].keys()
        for name, weight in whole["weights"].items():
            assert torch.equal(sharded["weights"][name], weight), name
