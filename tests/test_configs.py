"""The run files of ``configs/moe``: complete, comparable in pairs, and accepted by Axolotl."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_kernels.shapes import FAMILIES, REAL_FAMILIES, TOKENS_PER_STEP, Family
from moe_kernels.tools.compare.pair import Options, family_pair
from moe_kernels.tools.prepare import tiny_overrides

FOLDER = Path(__file__).parents[1] / "configs" / "moe"
PLUGIN = "axolotl.integrations.moe_kernels.plugin.MoeOptimizedPlugin"
OURS = {
    "plugins": [PLUGIN],
    "moe_kernels": True,
    "moe_group_size": 128,
    "moe_persistent_kernel": True,
    "experts_implementation": "moe_kernels",
    "wandb_project": "moe-kernels",
}
NAMING = {"wandb_name", "output_dir"}
BASELINES = [family.baseline for family in FAMILIES.values()]
WITH_KERNELS = [name for family in FAMILIES.values() for name in (family.optimized, family.test)]
LORA = [family.optimized for family in REAL_FAMILIES.values()]
LORA_BASELINES = [family.baseline for family in REAL_FAMILIES.values()]
QLORA, QLORA_BASELINE = "qwen3-30b-a3b-qlora.yml", "qwen3-30b-a3b-qlora-baseline.yml"
ALL = [*BASELINES, *WITH_KERNELS, *LORA, *LORA_BASELINES, QLORA, QLORA_BASELINE]

each_pair = pytest.mark.parametrize(
    "family", [*FAMILIES.values(), *REAL_FAMILIES.values()], ids=lambda family: family.name
)
each_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))


def differing(a: dict[str, Any], b: dict[str, Any]) -> set[str]:
    missing = object()
    return {key for key in a.keys() | b.keys() if a.get(key, missing) != b.get(key, missing)}


def test_exactly_these_exist() -> None:
    assert {path.name for path in FOLDER.glob("*.yml")} == {
        "mixtral-1b-baseline.yml", "mixtral-8x7b-moe-optimized.yml", "mixtral-8x7b-moe-test.yml",
        "qwen2-moe-1b-baseline.yml", "qwen2-moe-a14b-optimized.yml", "qwen2-moe-7b-test.yml",
        "deepseek-v3-1b-baseline.yml", "deepseek-v3-1b-moe-optimized.yml", "deepseek-v3-1b-test.yml",
        "qwen3-30b-a3b-lora-baseline.yml", "qwen3-30b-a3b-lora.yml",
        "qwen3-30b-a3b-qlora-baseline.yml", "qwen3-30b-a3b-qlora.yml",
        "gpt-oss-20b-lora-baseline.yml", "gpt-oss-20b-lora.yml",
    } == {*ALL}  # fmt: skip


@each_pair
def test_pair_differs_only_in_the_kernels_and_the_run_name(family: Family) -> None:
    baseline, optimized = load(family.baseline), load(family.optimized)
    assert differing(baseline, optimized) == OURS.keys() | NAMING


@each_family
def test_quick_run_is_the_optimized_one_cut_short(family: Family) -> None:
    optimized, quick = load(family.optimized), load(family.test)
    assert differing(optimized, quick) == {"max_steps", "warmup_steps", *NAMING}
    assert quick["max_steps"] <= 10 < optimized["max_steps"]


@pytest.mark.parametrize("name", [*WITH_KERNELS, *LORA, QLORA])
def test_kernels_are_on(name: str) -> None:
    config = load(name)
    assert {key: config[key] for key in OURS} == OURS


def test_merging_keeps_the_experts_adapter() -> None:
    """Axolotl's default leaves it out, see tests/integrations/test_axolotl_checkpoints.py."""
    with_adapter = {path.name for path in FOLDER.rglob("*.yml") if "lora_target_parameters" in path.read_text()}
    assert with_adapter == {*LORA, *LORA_BASELINES, QLORA, QLORA_BASELINE}
    assert {load(name)["merge_method"] for name in with_adapter} == {"legacy"}


@pytest.mark.parametrize("family", REAL_FAMILIES.values(), ids=lambda family: family.name)
def test_lora_of_attention_and_experts_at_real_size(family: Family) -> None:
    for name in (family.baseline, family.optimized):
        config, stem = load(name), Path(name).stem
        assert (config["adapter"], config["lora_r"], config["lora_dropout"]) == ("lora", 16, 0.0)
        assert config["lora_target_modules"] == ["q_proj", "k_proj", "v_proj", "o_proj"]
        assert config["lora_target_parameters"] == ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        assert config["gradient_checkpointing"] is True
        assert config["optimizer"] == "adamw_torch_fused"
        assert "/" in config["base_model"], "the checkpoint on the Hub"
        assert config["output_dir"] == f"artifacts/runs/{stem}"
        assert config["wandb_name"] == stem
        steps = config["sequence_len"] * config["micro_batch_size"] * config["gradient_accumulation_steps"]
        assert steps == TOKENS_PER_STEP
        header = (FOLDER / name).read_text(encoding="utf-8").split("\n\n")[0]
        assert f"axolotl train configs/moe/{name}" in header
        assert f"moe-kernels compare {family.name}`" in header


@pytest.mark.parametrize(("name", "lora"), [(QLORA, "optimized"), (QLORA_BASELINE, "baseline")])
def test_qlora_is_the_lora_run_in_4_bits(name: str, lora: str) -> None:
    """As ``compare --qlora`` makes it."""
    family = REAL_FAMILIES["qwen3-moe"]
    config, base = load(name), load(getattr(family, lora))
    assert differing(config, base) == {"adapter", "load_in_4bit", "quantize_moe_experts", *NAMING}
    run = next(run for run in family_pair("qwen3-moe", Options(qlora=True)).runs if run.role == lora)
    assert {key: run.config[key] for key in differing(config, base) - NAMING} == {
        key: config[key] for key in differing(config, base) - NAMING
    }
    assert f"axolotl train configs/moe/{name}" in (FOLDER / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [*BASELINES, *LORA_BASELINES, QLORA_BASELINE])
def test_baseline_is_stock(name: str) -> None:
    config = load(name)
    assert not {key for key in config if key.startswith("moe_")}
    assert not config.keys() & (OURS.keys() - {"wandb_project"})
    assert config["wandb_project"] == "moe-baseline"


@each_family
def test_paths_and_sizes(family: Family) -> None:
    for name in (family.baseline, family.optimized, family.test):
        config, stem = load(name), Path(name).stem
        assert config["base_model"] == f"artifacts/models/{family.sizes['1b'].name}"
        assert config["datasets"] == [
            {"path": "artifacts/data/stdlib.jsonl", "ds_type": "json", "type": "completion", "field": "text"}
        ]
        assert config["dataset_prepared_path"] == "artifacts/prepared"
        assert config["output_dir"] == f"artifacts/runs/{stem}"
        assert config["wandb_name"] == stem
        steps = config["sequence_len"] * config["micro_batch_size"] * config["gradient_accumulation_steps"]
        assert steps == TOKENS_PER_STEP
        assert config["save_strategy"] == "no"  # unquoted, YAML reads it as False
        assert config["logging_steps"] == 1


@each_family
def test_header_says_what_it_is_and_how_to_run_it(family: Family) -> None:
    for name in (family.baseline, family.optimized, family.test):
        header = (FOLDER / name).read_text(encoding="utf-8").split("\n\n")[0]
        assert f"moe-kernels prepare {family.sizes['1b'].name}" in header
        assert f"axolotl train configs/moe/{name}" in header


@pytest.fixture
def plugin_manager(monkeypatch: pytest.MonkeyPatch) -> Any:
    base = pytest.importorskip("axolotl.integrations.base", reason="needs the extra [axolotl]")
    monkeypatch.setattr(base.PluginManager, "_instance", None)
    return base.PluginManager.get_instance()


def validated(raw: dict[str, Any], plugin_manager: Any, **capabilities: Any) -> dict[str, Any]:
    """What Axolotl's whole validation makes of a run file on a machine with ``capabilities``."""
    from axolotl.utils.config import prepare_plugins, validate_config
    from axolotl.utils.dict import DictDefault

    config = DictDefault(copy.deepcopy(raw))
    prepare_plugins(config)
    assert {*raw.get("plugins", [])} <= plugin_manager.plugins.keys()  # Axolotl 0.21 has some of its own as well
    env_capabilities = {"torch_version": "2.11.0"}
    return validate_config(config, capabilities=capabilities, env_capabilities=env_capabilities).to_dict()


HOPPER = {"bf16": True, "fp8": True, "tf32": True, "n_gpu": 1, "n_node": 1, "compute_capability": "sm_90"}


def changed(raw: dict[str, Any], result: dict[str, Any]) -> set[str]:
    """Keys that got another value or were lost: Axolotl drops a key it does not know without a word."""
    return {key for key, value in raw.items() if key != "datasets" and result.get(key) != value}


@pytest.mark.parametrize("name", ALL)
def test_axolotl_accepts_it_for_a_gpu(name: str, plugin_manager: Any) -> None:
    """As on a machine with one Hopper GPU: this one may have none."""
    raw = load(name)
    result = validated(raw, plugin_manager, **HOPPER)
    assert not changed(raw, result)
    assert [dataset["path"] for dataset in result["datasets"]] == ["artifacts/data/stdlib.jsonl"]


@pytest.mark.parametrize("options", [{"liger": True}, {"qlora": True}, {"lora": 64, "qlora": True, "liger": True}])
@pytest.mark.parametrize("family", REAL_FAMILIES)
def test_axolotl_accepts_what_compare_makes_of_it(
    family: str, options: dict[str, Any], plugin_manager: Any
) -> None:
    for run in family_pair(family, Options(**options)).runs[:2]:
        result = validated(run.config, plugin_manager, **HOPPER)
        assert not changed(run.config, result)


@each_pair
def test_axolotl_accepts_the_tiny_run_for_a_cpu(family: Family, plugin_manager: Any) -> None:
    for name in (family.baseline, family.optimized):
        raw = load(name) | tiny_overrides(family.name)
        nothing = {"bf16": False, "fp8": False, "tf32": False, "n_gpu": 0, "n_node": 1}
        result = validated(raw, plugin_manager, compute_capability=None, **nothing)
        assert not changed(raw, result)
        assert result["datasets"][0]["split"] == "train[:4]"
