"""Axolotl's own expert parallelism over two ranks, our experts as its local kernel, against the whole model."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch

from moe_kernels.shapes import FAMILIES

if importlib.util.find_spec("axolotl") is None or importlib.util.find_spec("axolotl.utils") is None:
    pytest.skip("axolotl is not installed: needs the extra [axolotl]", allow_module_level=True)
if tuple(map(int, importlib.metadata.version("axolotl").split(".")[:2])) < (0, 20):
    pytest.skip("the expert parallelism of axolotl before 0.20 has a list of kernels", allow_module_level=True)

pytestmark = [pytest.mark.axolotl, pytest.mark.slow]
STEPS, TOKENS, GPT_OSS = 4, 2 * 12, "gpt-oss"
each_model = pytest.mark.parametrize("model", [*FAMILIES, GPT_OSS])


@pytest.fixture(scope="module")
def ranks(torchrun: Callable[..., Any]) -> Any:
    return [rank["axolotl"] for rank in torchrun("axolotl")]


def sizes(model: str) -> tuple[int, int, int]:
    """Experts, top k and expert layers."""
    if model == GPT_OSS:
        return 8, 2, 2
    shape = FAMILIES[model].sizes["tiny"]
    return shape.experts, shape.top_k, shape.moe_layers


def distance(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert actual.keys() == expected.keys()
    return max(float((actual[n] - g).norm() / g.norm().clamp_min(1e-30)) for n, g in expected.items())


@each_model
@pytest.mark.parametrize(("way", "calls"), [("1 chunks", 1), ("3 chunks", 3), ("checkpointing", 2)])
def test_training_is_that_of_the_whole_model(way: str, calls: int, model: str, ranks: Any) -> None:
    experts, top_k, layers = sizes(model)
    for results in ranks:
        whole, ours = results[model, "whole"], results[model, way]
        assert ours["losses"] == pytest.approx(whole["losses"], rel=1e-5)
        assert distance(ours["grads"], whole["grads"]) < 1e-5
        assert ours["calls"] == {"torch": STEPS * layers * calls}
        assert {shape[0] for shape in ours["held"]} == {experts // len(ranks)}
        # Router telemetry sees the ids of all experts, each rank those of its own tokens.
        assert len(ours["routed"]) == layers * experts
        assert sum(ours["routed"]) == STEPS * layers * len(ranks) * TOKENS * top_k


@each_model
def test_lora_runs_inside_the_kernels_of_each_rank(model: str, ranks: Any) -> None:
    for results in ranks:
        whole, ours = results[model, "lora, whole"], results[model, "lora"]
        assert ours["losses"] == pytest.approx(whole["losses"], rel=1e-5)
        assert distance(ours["grads"], whole["grads"]) < 1e-5


def test_lora_over_experts_in_4_bits(ranks: Any) -> None:
    for results in ranks:
        whole, ours = results["4 bits, whole"], results["4 bits"]
        assert ours["losses"] == pytest.approx(whole["losses"], rel=2e-5)
        assert distance(ours["grads"], whole["grads"]) < 2e-5
        assert {shape[0] for shape in ours["held"]} == {2}


@each_model
def test_a_rank_whose_experts_get_no_token(model: str, ranks: Any) -> None:
    starved = [results[model, "starved"] for results in ranks]
    assert all(torch.isfinite(torch.tensor(rank["losses"])).all() for rank in starved)
    # Equal scores send every token to the experts of one rank; torch decides which.
    idle, busy = sorted(rank["nonzero"] for rank in starved)
    assert not any(idle)
    assert all(busy)


@each_model
@pytest.mark.parametrize("chunks", [1, 2])
def test_a_rank_without_tokens(chunks: int, model: str, ranks: Any) -> None:
    """Its experts work for the other rank, whose input gradient is that of the whole block."""
    whole = ranks[0][model, "idle", chunks]["whole"]
    first, second = (results[model, "idle", chunks]["sharded"] for results in ranks)
    torch.testing.assert_close(first["dx"], whole["dx"], rtol=1e-5, atol=1e-5 * float(whole["dx"].abs().max()))
    assert second["dx"].shape[1] == 0
    for name, expected in whole["grads"].items():
        of_experts = name.startswith("experts.")
        grad = first["grads"][name] if of_experts else first["grads"][name] + second["grads"].get(name, 0)
        assert float((grad - expected).norm() / expected.norm()) < 1e-5, name
