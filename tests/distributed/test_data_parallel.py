"""FSDP2 and DDP over two ranks: the losses and gradients of the whole model on transformers' own experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from moe_kernels.shapes import FAMILIES

pytest.importorskip("transformers", reason="needs the extra [transformers]")
pytestmark = pytest.mark.slow
each_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def ranks(torchrun: Callable[..., Any]) -> Any:
    return torchrun("data_parallel", "no_tokens")


def distances(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """Relative L2 distance of every gradient; all must be there."""
    assert actual.keys() == expected.keys()
    return {name: float((actual[name] - g).norm() / g.norm().clamp_min(1e-30)) for name, g in expected.items()}


@pytest.mark.parametrize(
    ("family", "engine"),
    [*((family, engine) for family in FAMILIES for engine in ("fsdp2", "ddp")), ("gpt-oss", "fsdp2")],
)
def test_losses_and_gradients_are_those_of_one_process(engine: str, family: str, ranks: Any) -> None:
    for rank in ranks:
        expected, actual = rank["data_parallel"][family, "whole"], rank["data_parallel"][family, engine]
        assert actual["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert max(distances(actual["grads"], expected["grads"]).values()) < 1e-4
        assert actual["calls"]["torch"] > 0


@each_family
def test_a_resumed_run_continues_the_curve_bitwise(family: str, ranks: Any) -> None:
    for rank in ranks:
        expected, actual = rank["data_parallel"][family, "not interrupted"], rank["data_parallel"][family, "resumed"]
        assert actual["losses"] == expected["losses"]
        for name, grad in expected["grads"].items():
            assert torch.equal(actual["grads"][name], grad), name


@each_family
def test_bf16_with_fp32_reduction_is_as_close_as_the_baseline(family: str, ranks: Any) -> None:
    """Parameters gathered as bf16, gradients reduced in fp32: no further from fp32 than transformers' experts."""
    results = ranks[0]["data_parallel"]
    truth = results[family, "whole"]
    baseline, ours = (results[family, "bf16", experts] for experts in ("grouped_mm", "moe_kernels"))
    assert ours["losses"] == pytest.approx(baseline["losses"], abs=0.03)
    allowed, measured = (distances(run["grads"], truth["grads"]) for run in (baseline, ours))
    assert {n: d for n, d in measured.items() if d > 1.25 * allowed[n] + 0.01} == {}


@each_family
def test_a_rank_without_tokens_adds_nothing(family: str, ranks: Any) -> None:
    whole = ranks[0]["no_tokens"][family, "whole"]["grads"]
    busy, idle = (rank["no_tokens"][family, "fsdp2"] for rank in ranks)
    for rank in (busy, idle):
        # FSDP averages over ranks, and one of the two had nothing.
        assert max(distances({n: 2 * g for n, g in rank["grads"].items()}, whole).values()) < 1e-4
    assert idle["dx"].shape[1] == 0 < busy["dx"].shape[1]
