"""What a real ``axolotl train`` saves can be gone on with, and merged, without losing the experts."""

from __future__ import annotations

import os
import shutil
import subprocess
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from test_axolotl_train import OFFLINE, folder, small_adapter, tiny, train  # noqa: F401

from axolotl.integrations.moe_kernels.merge import check_merge, refuse_lossy_merge
from moe_kernels.shapes import FAMILIES
from support.axolotl_cli import axolotl

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.axolotl, pytest.mark.slow]
SAVED_AT, STEPS = 2, 4


@pytest.fixture(scope="module")
def whole(folder: Path) -> tuple[Path, dict[str, Any], list[float]]:  # noqa: F811
    """``output_dir``, configuration and losses of an uninterrupted run; Mixtral's router too is renamed on disk."""
    saving = {"save_strategy": "steps", "save_steps": SAVED_AT, "max_steps": STEPS}
    config = tiny(FAMILIES["mixtral"].optimized, "mixtral") | saving
    done = train(folder, "whole", config)
    assert done.returncode == 0, done.log[-4000:]
    assert len(done.losses) == STEPS
    return folder / "runs" / "whole" / "out", config, done.losses


def test_a_resumed_training_is_the_uninterrupted_one(folder: Path, whole: Any) -> None:  # noqa: F811
    """Weights, optimizer state and loss curve, to the bit."""
    out, config, losses = whole
    resumed = train(folder, "resumed", config | {"resume_from_checkpoint": str(out / f"checkpoint-{SAVED_AT}")})
    assert resumed.returncode == 0, resumed.log[-4000:]
    assert resumed.losses == losses[SAVED_AT:]
    again = folder / "runs" / "resumed" / "out"
    for file in ("model.safetensors", f"checkpoint-{STEPS}/model.safetensors"):
        assert_equal(safetensors.torch.load_file(again / file), safetensors.torch.load_file(out / file))
    states = [torch.load(place / f"checkpoint-{STEPS}" / "optimizer.pt")["state"] for place in (again, out)]
    assert states[0].keys() == states[1].keys()
    for index, state in states[1].items():
        assert_equal(states[0][index], state)
    # The two further steps moved the experts from where the checkpoint has them, and that from the base model.
    key = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    places = (folder / config["base_model"], out / f"checkpoint-{SAVED_AT}", out)
    assert len({safetensors.torch.load_file(at / "model.safetensors")[key].sum().item() for at in places}) == 3


def assert_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(actual[name], tensor)] == []


def test_a_checkpoint_without_optimizer_is_refused(folder: Path, whole: Any, tmp_path: Path) -> None:  # noqa: F811
    """As ``save_only_model`` leaves it."""
    out, config, _ = whole
    checkpoint = tmp_path / f"checkpoint-{SAVED_AT}"
    shutil.copytree(out / checkpoint.name, checkpoint, ignore=shutil.ignore_patterns("optimizer.pt", "scheduler.pt"))
    resumed = train(folder, "no-optimizer", config | {"resume_from_checkpoint": str(checkpoint)})
    assert resumed.returncode != 0
    assert resumed.losses == []
    assert "holds no state of the optimizer and the scheduler" in resumed.log


EXPERT, QUERY = "model.layers.1.mlp.experts.0.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"
FACTOR = "base_model.model.model.layers.1.mlp.experts.base_layer.lora_B.weight"


@pytest.mark.parametrize("check", [refuse_lossy_merge, check_merge])
@pytest.mark.parametrize(
    ("base", "factor", "method", "lossy"),
    [
        (EXPERT, 1.0, None, True),
        (EXPERT, 1.0, "memory_efficient", True),
        (EXPERT, 1.0, "legacy", False),
        ("model.layers.1.mlp.experts.up_proj_blocks", 1.0, None, True),  # mxfp4
        (EXPERT, 0.0, None, False),  # an adapter that changes nothing
        ("model.layers.1.mlp.experts.up_proj", 1.0, None, False),  # stacked in the files: that merges right
    ],
)
def test_which_merge_is_lossy(
    base: str, factor: float, method: str | None, lossy: bool, check: Any, tmp_path: Path
) -> None:
    for name in ("base", "adapter", "merged"):
        (tmp_path / name).mkdir()
    weights = {base: torch.ones(2), QUERY: torch.ones(2)}
    safetensors.torch.save_file(weights, tmp_path / "base" / "model.safetensors")
    safetensors.torch.save_file(
        {FACTOR: torch.full((2,), factor)}, tmp_path / "adapter" / "adapter_model.safetensors"
    )
    weights |= {QUERY: torch.zeros(2)} | ({} if lossy else {base: torch.zeros(2)})
    safetensors.torch.save_file(weights, tmp_path / "merged" / "model.safetensors")
    cfg = {"base_model": str(tmp_path / "base"), "lora_model_dir": str(tmp_path / "adapter"), "merge_method": method}
    arguments = (cfg,) if check is refuse_lossy_merge else (cfg, cfg["lora_model_dir"], str(tmp_path / "merged"))
    with pytest.raises(ValueError, match="Set merge_method: legacy") if lossy else nullcontext():
        check(*arguments)


def merge(folder: Path, name: str, config: dict[str, Any]) -> subprocess.CompletedProcess[str]:  # noqa: F811
    """``axolotl merge-lora`` of the adapter in ``output_dir``."""
    file = folder / "runs" / f"{name}.yml"
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    environment = os.environ | OFFLINE
    environment.pop("TRITON_INTERPRET", None)  # as in train()
    return axolotl(["merge-lora", str(file), "--lora-model-dir", config["output_dir"]], folder, environment)


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
