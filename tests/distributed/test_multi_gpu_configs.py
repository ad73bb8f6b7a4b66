"""The run files of ``configs/moe/multi-gpu``: the one-GPU pairs plus FSDP2, accepted by Axolotl."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_kernels.shapes import FAMILIES, Family

FOLDER = Path(__file__).parents[2] / "configs" / "moe"
MULTI = FOLDER / "multi-gpu"
FSDP = {"fsdp_version", "fsdp_config"}
NAMING = {"wandb_name", "output_dir"}
LAYERS = {
    "mixtral": "MixtralDecoderLayer",
    "qwen2-moe": "Qwen2MoeDecoderLayer",
    "deepseek-v3": "DeepseekV3DecoderLayer",
}
NODES = {
    "mixtral": "mixtral-8x7b-nodes.yml",
    "qwen2-moe": "qwen2-57b-a14b-nodes.yml",
    "deepseek-v3": "moonlight-16b-a3b-nodes.yml",
}
PAIRS = [f"{name}-1b-fsdp2{kind}.yml" for name in FAMILIES for kind in ("", "-baseline")]
ALL = [*PAIRS, *NODES.values()]
each_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)


def load(path: Path) -> dict[str, Any]:
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(config, dict)
    return config


def differing(a: dict[str, Any], b: dict[str, Any]) -> set[str]:
    missing = object()
    return {key for key in a.keys() | b.keys() if a.get(key, missing) != b.get(key, missing)}


def test_exactly_these_exist() -> None:
    assert sorted(path.name for path in MULTI.iterdir()) == sorted(ALL)


@each_family
def test_they_are_the_one_gpu_files_plus_sharding(family: Family) -> None:
    for multi, single in (
        (f"{family.name}-1b-fsdp2", family.optimized),
        (f"{family.name}-1b-fsdp2-baseline", family.baseline),
    ):
        assert differing(load(MULTI / f"{multi}.yml"), load(FOLDER / single)) == FSDP | NAMING
    nodes = differing(load(MULTI / NODES[family.name]), load(FOLDER / family.optimized))
    assert nodes - FSDP - NAMING == {
        "base_model", "dp_shard_size", "dp_replicate_size", "micro_batch_size", "gradient_accumulation_steps",
        "gradient_checkpointing", "learning_rate", "save_strategy", "save_steps",
    }  # fmt: skip


@each_family
def test_the_layer_that_is_wrapped_exists(family: Family) -> None:
    """A misspelt class is an error only after the weights were loaded on every node."""
    transformers = pytest.importorskip("transformers")
    module = getattr(transformers.models, family.model_type)
    for name in (f"{family.name}-1b-fsdp2.yml", f"{family.name}-1b-fsdp2-baseline.yml", NODES[family.name]):
        wrapped = load(MULTI / name)["fsdp_config"]["transformer_layer_cls_to_wrap"]
        assert wrapped == LAYERS[family.name]
        assert hasattr(getattr(module, f"modeling_{family.model_type}"), wrapped)


@pytest.mark.parametrize("name", ALL)
def test_header_says_how_to_run_it(name: str) -> None:
    header, config = (MULTI / name).read_text(encoding="utf-8").split("\n\n")[0], load(MULTI / name)
    assert f"axolotl train configs/moe/multi-gpu/{name} --launcher torchrun" in header
    assert config["wandb_name"] == Path(name).stem
    assert config["output_dir"] == f"artifacts/runs/{Path(name).stem}"


@pytest.mark.parametrize("name", ALL)
def test_axolotl_accepts_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = pytest.importorskip("axolotl.integrations.base", reason="needs the extra [axolotl]")
    from axolotl.utils.config import prepare_plugins, validate_config
    from axolotl.utils.dict import DictDefault

    monkeypatch.setattr(base.PluginManager, "_instance", None)
    raw = load(MULTI / name)
    config = DictDefault(copy.deepcopy(raw))
    prepare_plugins(config)
    nodes = raw.get("dp_replicate_size", 1)
    hopper = {"bf16": True, "fp8": True, "tf32": True, "n_gpu": 8, "n_node": nodes, "compute_capability": "sm_90"}
    result = validate_config(config, capabilities=hopper, env_capabilities={"torch_version": "2.11.0"}).to_dict()
    lost = {key for key, value in raw.items() if key not in ("datasets", "fsdp_config") and result.get(key) != value}
    lost |= {key for key, value in raw["fsdp_config"].items() if result["fsdp_config"].get(key) != value}
    assert not lost, "Axolotl drops a key it does not know without a word"
