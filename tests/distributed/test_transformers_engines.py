"""transformers' own engines over two ranks, our experts as the local kernel: tensor and expert parallelism, Trainer.

The file passes on transformers 5.16.1, 5.20.1 and the newest release. Before 5.19 the engine leaves each rank with
its own part of the router's gradient, whatever runs the experts: there, ours are held against theirs. From 5.19 to
5.22 the experts' gradients of ranks with tokens of their own are divided by the number of ranks once too often.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Callable
from typing import Any

import pytest
import torch
from packaging.version import Version

from moe_kernels.shapes import FAMILIES

distributed = pytest.importorskip("transformers.distributed", reason="needs the extra [transformers]")
pytestmark = pytest.mark.slow
each_family = pytest.mark.parametrize("family", FAMILIES)
ALL_TO_ALL = "ep_size" in {field.name for field in dataclasses.fields(distributed.DistributedConfig)}
# Expert parallelism: ranks see the same tokens, or each its own.
LAYOUTS = ("shared batch", "own batch") if ALL_TO_ALL else ("shared batch",)
TRAINS_RIGHT = ("tensor parallel", *(LAYOUTS if ALL_TO_ALL else ()))
DIVIDES_TWICE = ALL_TO_ALL and Version(importlib.metadata.version("transformers")) < Version("5.23")
RANKS = 2


@pytest.fixture(scope="module")
def ranks(torchrun: Callable[..., Any]) -> Any:
    return torchrun("expert_parallel", "trainer")


def distance(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert actual.keys() == expected.keys()
    return max(float((actual[n] - g).norm() / g.norm().clamp_min(1e-30)) for n, g in expected.items())


@each_family
@pytest.mark.parametrize("layout", LAYOUTS)
def test_local_kernel_agrees_with_transformers_own(layout: str, family: str, ranks: Any) -> None:
    experts = FAMILIES[family].sizes["tiny"].experts
    for rank in ranks:
        results = rank["expert_parallel"]
        baseline, ours = (results[family, layout, name] for name in ("grouped_mm", "moe_kernels"))
        assert ours["losses"] == pytest.approx(baseline["losses"], rel=1e-3 if not ALL_TO_ALL else 1e-5)
        assert distance(ours["grads"], baseline["grads"]) < 1e-4
        assert ours["calls"]["torch"] > 0
        assert not baseline["calls"]
        assert {shape[0] for shape in ours["held"]} == {experts // 2}


@each_family
@pytest.mark.parametrize("layout", TRAINS_RIGHT)
def test_training_is_that_of_the_whole_model(layout: str, family: str, ranks: Any) -> None:
    for rank in ranks:
        results = rank["expert_parallel"]
        whole, ours = results[family, "whole"], results[family, layout, "moe_kernels"]
        assert ours["losses"] == pytest.approx(whole["losses"], rel=1e-5)
        expected = whole["grads"]
        if layout == "own batch" and DIVIDES_TWICE:
            expected = {name: grad / RANKS if ".experts." in name else grad for name, grad in expected.items()}
        assert distance(ours["grads"], expected) < 1e-4


@each_family
@pytest.mark.parametrize("layout", TRAINS_RIGHT)
def test_router_telemetry_counts_every_row_once(layout: str, family: str, ranks: Any) -> None:
    for rank in ranks:
        results = rank["expert_parallel"]
        expected = [rows // RANKS for rows in results[family, "whole"]["routed"]]  # each rank saw every token
        routed = results[family, layout, "moe_kernels"]["routed"]
        if layout == "own batch" and DIVIDES_TWICE:  # the experts, and so the routers, learn something else
            routed, expected = [sum(routed)], [sum(expected)]
        assert routed == expected


@each_family
def test_a_rank_whose_experts_get_no_token(family: str, ranks: Any) -> None:
    starved = [rank["expert_parallel"][family, "starved"] for rank in ranks]
    assert all(torch.isfinite(torch.tensor(rank["losses"])).all() for rank in starved)
    # Equal scores send every token to the experts of one rank; torch decides which.
    idle, busy = sorted(rank["nonzero"] for rank in starved)
    assert not any(idle)
    assert all(busy)


@each_family
@pytest.mark.parametrize("engine", ("ddp", "fsdp2", "ep") if ALL_TO_ALL else ("ddp",))
def test_trainer(engine: str, family: str, ranks: Any) -> None:
    """Two micro-batches a step, activation checkpointing, every engine that this Trainer has on a CPU."""
    size = FAMILIES[family].sizes["tiny"]
    for rank in ranks:
        results = rank["trainer"]
        baseline, ours = (results[family, engine, name] for name in ("grouped_mm", "moe_kernels"))
        assert ours["losses"] == pytest.approx(baseline["losses"], rel=1e-5)
        if engine != "ep" or not DIVIDES_TWICE:
            assert ours["losses"] == pytest.approx(results[family, "ddp", "grouped_mm"]["losses"], rel=1e-5)
        # Steps, micro-batches, and once more in the backward pass.
        assert ours["calls"] == {"torch": len(ours["losses"]) * 2 * 2 * size.moe_layers}
