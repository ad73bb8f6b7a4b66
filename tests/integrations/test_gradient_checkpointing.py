"""Gradient checkpointing of whole models: what of the experts is computed again, in transformers and in Axolotl."""

from __future__ import annotations

import collections
import importlib.util
import logging
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import moe_kernels.integrations.transformers as mk
from moe_kernels import backends, steps
from moe_kernels.autograd import backward_op, forward_op
from support.models import tiny_config, tiny_model

LAYERS = 2
FAMILIES = ("qwen3_moe", "mixtral", "gpt_oss", "qwen2_moe")
PATTERN = "moe_kernels::experts_forward"  # as docs/axolotl.md has it
axolotl = pytest.mark.skipif(importlib.util.find_spec("axolotl.utils") is None, reason="needs the extra [axolotl]")


def make_model(name: str, **changes: Any) -> nn.Module:
    mk.register(backend="torch")
    return tiny_model(tiny_config(name, **changes), "moe_kernels").train()


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> collections.Counter[str]:
    counts: collections.Counter[str] = collections.Counter()
    instance = backends.load("torch")

    def counting(step: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[step] += sys._getframe(1).f_globals is vars(steps)  # the backend calls itself too
            return run(*args, **kwargs)

        return call

    for step in ("up", "down", "combine"):
        monkeypatch.setattr(instance, step, counting(step, getattr(instance, step)))
    return counts


def results(model: nn.Module) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(3))
    model.zero_grad(set_to_none=True)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_bitwise(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    assert some.keys() == others.keys()
    assert [name for name, value in some.items() if not torch.equal(value, others[name])] == []


@pytest.mark.parametrize(("name", "down"), [("qwen3_moe", 1), ("mixtral", 1), ("gpt_oss", 1), ("qwen2_moe", 2)])
def test_the_down_projection_is_not_computed_again(
    name: str, down: int, counted: collections.Counter[str]
) -> None:
    """Qwen2-MoE's shared expert saves more after the routed ones: there all of it is, and must be."""
    model = make_model(name)
    expected = results(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    counted.clear()
    assert_bitwise(results(model), expected)
    assert counted == {"up": 2 * LAYERS, "down": down * LAYERS, "combine": down * LAYERS}


@axolotl
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_axolotl_keeps_the_experts(
    name: str, offload: bool, counted: collections.Counter[str], caplog: pytest.LogCaptureFixture
) -> None:
    from axolotl.monkeypatch import selective_checkpointing

    model = make_model(name)
    expected = results(model)
    selective_checkpointing.apply_selective_checkpointing(model, save=["attention", PATTERN], offload=offload)
    model.gradient_checkpointing_enable()
    # After so many regions it warns of what kept nothing.
    for _ in range(selective_checkpointing._NO_MATCH_WARN_REGIONS // LAYERS + 1):
        counted.clear()
        with caplog.at_level(logging.WARNING):
            assert_bitwise(results(model), expected)
        assert counted == {"up": LAYERS, "down": LAYERS, "combine": LAYERS}
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert not [message for message in warnings if "selective" in message]


@axolotl
def test_axolotl_keeps_attention_alone(counted: collections.Counter[str]) -> None:
    from axolotl.monkeypatch.selective_checkpointing import apply_selective_checkpointing

    model = make_model("qwen3_moe")
    expected = results(model)
    apply_selective_checkpointing(model)
    model.gradient_checkpointing_enable()
    counted.clear()
    assert_bitwise(results(model), expected)
    assert counted == {"up": 2 * LAYERS, "down": LAYERS, "combine": LAYERS}


@axolotl
@pytest.mark.parametrize(("options", "kept"), [({}, 1), ({"save_sliding_window": True}, 2)], ids=str)
def test_axolotl_recomputes_layers_with_a_sliding_window(
    options: dict[str, bool], kept: int, counted: collections.Counter[str]
) -> None:
    """Whatever is named, unless it is told otherwise: in gpt-oss every second layer."""
    from axolotl.monkeypatch.selective_checkpointing import apply_selective_checkpointing

    model = make_model("gpt_oss", layer_types=["sliding_attention", "full_attention"])
    expected = results(model)
    apply_selective_checkpointing(model, save=["attention", PATTERN], **options)
    model.gradient_checkpointing_enable()
    counted.clear()
    assert_bitwise(results(model), expected)
    assert counted["up"] == 2 * LAYERS - kept


def test_the_pattern_names_the_op_and_no_backward() -> None:
    """Axolotl looks for it in an operator's name."""
    assert PATTERN in forward_op.name()
    assert PATTERN not in backward_op.name()
