"""What the trainer of a comparison keeps of a run."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

if importlib.util.find_spec("axolotl") is None or importlib.util.find_spec("axolotl.utils") is None:
    pytest.skip("axolotl is not installed: needs the extra [axolotl]", allow_module_level=True)

from moe_kernels.tools.compare import trainer
from moe_kernels.tools.compare.weights import DrawnWeights
from support.models import tiny_config


def read(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("compiled", [False, True])
def test_the_record_says_what_ran_and_what_was_logged(tmp_path: Path, compiled: bool) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(tiny_config("mixtral"), experts_implementation="eager")
    model.model.layers[0].mlp.experts.requires_grad_(False)
    drawn = DrawnWeights()
    drawn.checksum = "0123abcd"
    record = trainer.Recorder(tmp_path / "record.jsonl", drawn)
    arguments, state = SimpleNamespace(torch_compile=compiled), SimpleNamespace(global_step=1)
    record.on_train_begin(arguments, state, None, model=model)
    if not compiled:  # there no hook would see the call
        model(torch.zeros(1, 3, dtype=torch.long))
    for state.global_step in (1, 2):
        record.on_step_end(arguments, state, None, model=model)
        record.on_log(arguments, state, None, logs={"loss": torch.tensor(1.5), "memory/max_active (GiB)": 0.25})
    record.on_log(arguments, state, None, logs={"eval_loss": 3.0})
    record.on_log(arguments, state, None, logs={"train_loss": 3.0, "train_runtime": 9.0})
    first, *rows = read(tmp_path / "record.jsonl")
    frozen = sum(weight.nbytes for weight in model.model.layers[0].mlp.experts.parameters())
    assert first["experts"] == "eager"
    assert first["frozen"] == {"float32": frozen}
    assert first["weights"] == "0123abcd"
    stamps = [row.pop("_timestamp") for row in rows]
    assert stamps == sorted(stamps)
    assert rows == [{"train/loss": 1.5, "train/memory/max_active (GiB)": 0.25}] * 2
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_experts_that_are_not_called_are_not_named(tmp_path: Path) -> None:
    """The configuration of a model may name an implementation that a plugin has replaced."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(tiny_config("mixtral"))
    record = trainer.Recorder(tmp_path / "record.jsonl", DrawnWeights())
    arguments, state = SimpleNamespace(torch_compile=False), SimpleNamespace(global_step=1)
    record.on_train_begin(arguments, state, None, model=model)
    record.on_step_end(arguments, state, None, model=model)
    assert read(tmp_path / "record.jsonl")[0]["experts"] == "no experts module"


def test_the_run_of_wandb_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = trainer.Recorder(tmp_path / "record.jsonl", DrawnWeights())
    state = SimpleNamespace(global_step=1)
    wandb = types.ModuleType("wandb")
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for wandb.run in (None, SimpleNamespace(project="p", id="i", name=None)):  # type: ignore[attr-defined]
        record.on_step_end(None, state, None, model=torch.nn.Linear(1, 1))
    without, named = read(tmp_path / "record.jsonl")
    assert without["wandb"] == {}
    assert named["wandb"] == {"project": "p", "id": "i", "name": ""}


@pytest.mark.parametrize(("rank", "keeps"), [(None, True), ("0", True), ("1", False)])
def test_of_several_ranks_the_first_keeps_the_record(
    rank: str | None, keeps: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    callbacks: list[object] = []
    monkeypatch.setattr(trainer.trainer, "DEFAULT_CALLBACKS", callbacks)
    monkeypatch.setattr(trainer, "main", lambda: None)
    monkeypatch.setattr(DrawnWeights, "installed", lambda self: self)
    monkeypatch.setattr(sys, "argv", ["trainer.py", "train", str(tmp_path / "derived.yml"), "--launcher", "python"])
    trainer.train("another")
    files = [callback.file for callback in callbacks if isinstance(callback, trainer.Recorder)]
    assert files == [tmp_path / "record.jsonl"] * keeps
    assert "another" in callbacks
