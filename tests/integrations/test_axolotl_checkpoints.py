"""What a real ``axolotl train`` saves can be gone on with, and merged, without losing the experts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
import transformers
import yaml
from test_axolotl_train import OFFLINE, folder, small_adapter, tiny, train  # noqa: F401

from moe_kernels.shapes import FAMILIES

pytestmark = [pytest.mark.axolotl, pytest.mark.slow]
SAVED_AT, STEPS = 2, 4


def test_a_resumed_training_is_the_uninterrupted_one(folder: Path) -> None:  # noqa: F811
    """Weights, optimizer state and loss curve to the bit; Mixtral's router has another name in the checkpoint too."""
    saving = {"save_strategy": "steps", "save_steps": SAVED_AT, "max_steps": STEPS}
    config = tiny(FAMILIES["mixtral"].optimized, "mixtral") | saving
    whole = train(folder, "whole", config)
    assert whole.returncode == 0, whole.log[-4000:]
    out = folder / "runs" / "whole" / "out"
    resumed = train(folder, "resumed", config | {"resume_from_checkpoint": str(out / f"checkpoint-{SAVED_AT}")})
    assert resumed.returncode == 0, resumed.log[-4000:]

    assert len(whole.losses) == STEPS
    assert resumed.losses == whole.losses[SAVED_AT:]
    again = folder / "runs" / "resumed" / "out"
    for file in ("model.safetensors", f"checkpoint-{STEPS}/model.safetensors"):
        assert_equal(safetensors.torch.load_file(again / file), safetensors.torch.load_file(out / file))
    states = [torch.load(place / f"checkpoint-{STEPS}" / "optimizer.pt")["state"] for place in (again, out)]
    assert states[0].keys() == states[1].keys()
    for index, state in states[1].items():
        assert_equal(states[0][index], state)
    # The two further steps moved the experts from where the checkpoint has them, and that from the base model.
    key = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    base = safetensors.torch.load_file(folder / config["base_model"] / "model.safetensors")
    saved = safetensors.torch.load_file(out / f"checkpoint-{SAVED_AT}" / "model.safetensors")
    last = safetensors.torch.load_file(out / "model.safetensors")
    assert len({tensors[key].sum().item() for tensors in (base, saved, last)}) == 3


def assert_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(actual[name], tensor)] == []


def test_a_checkpoint_without_optimizer_is_refused(folder: Path) -> None:  # noqa: F811
    config = tiny(FAMILIES["mixtral"].test, "mixtral") | {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    whole = train(folder, "model-only", config | {"save_only_model": True})
    assert whole.returncode == 0, whole.log[-4000:]
    checkpoint = folder / "runs" / "model-only" / "out" / "checkpoint-1"
    resumed = train(folder, "no-optimizer", config | {"resume_from_checkpoint": str(checkpoint)})
    assert resumed.returncode != 0
    assert resumed.losses == []
    assert "holds no state of the optimizer and the scheduler" in resumed.log


def merge(folder: Path, name: str, config: dict[str, Any]) -> subprocess.CompletedProcess[str]:  # noqa: F811
    """``axolotl merge-lora`` of the adapter in ``output_dir``."""
    file = folder / "runs" / f"{name}.yml"
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    environment = os.environ | OFFLINE
    environment.pop("TRITON_INTERPRET", None)  # as in train()
    command = [sys.executable, "-m", "axolotl.cli.main", "merge-lora", str(file), "--lora-model-dir"]
    return subprocess.run(
        [*command, config["output_dir"]],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )


def test_a_merged_model_has_the_experts_adapter(folder: Path) -> None:  # noqa: F811
    """As the run file merges it, stock transformers computes what the adapter does; Axolotl's default is refused."""
    config = tiny("qwen3-30b-a3b-lora.yml", "mixtral")
    assert config["merge_method"] == "legacy"
    # A new adapter changes nothing; this one does before a step is taken.
    trained = train(folder, "lora", config | {"lora_model_dir": small_adapter(folder, config), "max_steps": 2})
    assert trained.returncode == 0, trained.log[-4000:]
    out = folder / "runs" / "lora" / "out"

    config |= {"output_dir": str(out)}
    done = merge(folder, "as-the-run-file", config)
    assert done.returncode == 0, done.stdout[-4000:]
    ids = torch.arange(3, 60)[None]

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model.eval()(input_ids=ids).logits

    def load(path: Path) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    merged, base = load(out / "merged"), load(folder / config["base_model"])
    for name, weight in base.state_dict().items():
        if "experts." in name:
            assert not torch.equal(merged.state_dict()[name], weight), name
    plain = logits(base)
    adapted = logits(peft.PeftModel.from_pretrained(base, out))
    assert (logits(merged) - adapted).abs().max() < 1e-5
    assert (adapted - plain).abs().max() > 0.1

    del config["merge_method"]
    refused = merge(folder, "by-default", config)
    assert refused.returncode != 0, refused.stdout[-4000:]
    assert "the experts' part of the adapter" in refused.stdout
    assert "Set merge_method: legacy" in refused.stdout
