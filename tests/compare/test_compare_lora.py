"""`moe-kernels compare --lora`: the same pair, both runs with the same adapter, the base frozen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from moe_kernels.shapes import ALL_FAMILIES, FAMILIES, REAL_FAMILIES
from moe_kernels.tools.app import app
from moe_kernels.tools.compare import command
from moe_kernels.tools.compare.pair import Options, Pair, family_pair, lora_overrides
from moe_kernels.tools.prepare import tiny_overrides

KERNEL_KEYS = {"plugins", "moe_kernels", "moe_group_size", "moe_persistent_kernel", "experts_implementation"}
NAMES = {"output_dir", "wandb_project", "wandb_name", "moe_router_telemetry"}
NO_GPU = "--qlora needs an NVIDIA GPU and none is visible: Axolotl loads a 4-bit model onto one"


def pair(family: str, **options: object) -> Pair:
    return family_pair(family, Options(size="tiny", **options), tiny_overrides(family))


@pytest.mark.parametrize("qlora", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_runs_differ_in_the_kernels_alone(family: str, qlora: bool) -> None:
    made = pair(family, lora=16, qlora=qlora)
    baseline, optimized = (next(run for run in made.runs if run.role == role) for role in ("baseline", "optimized"))
    keys = baseline.config.keys() | optimized.config.keys()
    differ = {key for key in keys if baseline.config.get(key) != optimized.config.get(key)}
    assert differ <= KERNEL_KEYS | NAMES
    assert optimized.uses_kernels
    assert not baseline.uses_kernels
    for run in made.runs:
        assert run.config["lora_r"] == 16
        assert run.config["merge_method"] == "legacy"
        assert run.config["lora_target_parameters"] == ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        assert "lora_model_dir" not in run.config, "the trainer draws the adapter"
        assert run.config.get("load_in_4bit", False) == run.config.get("quantize_moe_experts", False) == qlora
    assert made.name == f"{family}-{'q' if qlora else ''}lora16"
    assert made.folder != pair(family).folder, "a LoRA pair must not take the place of the full one's runs"


@pytest.mark.parametrize(
    ("options", "suffix", "changed"),
    [
        ({}, "", {}),
        ({"lora": 64}, "-lora64", {"lora_r": 64, "lora_alpha": 128}),
        ({"qlora": True}, "-qlora", {"adapter": "qlora", "load_in_4bit": True, "quantize_moe_experts": True}),
        ({"liger": True}, "-liger", {"liger_rope": True, "liger_fused_linear_cross_entropy": True}),
        ({"lora": 8, "qlora": True, "liger": True}, "-qlora8-liger", {"lora_r": 8, "liger_rms_norm": True}),
    ],
)
@pytest.mark.parametrize("family", REAL_FAMILIES)
def test_families_at_real_size(family: str, options: dict[str, Any], suffix: str, changed: dict[str, Any]) -> None:
    for size in REAL_FAMILIES[family].sizes:
        made = family_pair(family, Options(size=size, **options), tiny_overrides(family) if size == "tiny" else None)
        assert made.name == family + suffix
        assert len({str(run.folder) for run in made.runs}) == len(made.runs)
        baseline, optimized = made.runs[:2]
        keys = baseline.config.keys() | optimized.config.keys()
        assert {key for key in keys if baseline.config.get(key) != optimized.config.get(key)} <= KERNEL_KEYS | NAMES
        assert optimized.uses_kernels
        assert not baseline.uses_kernels
        for run in made.runs:
            assert run.config["base_model"] == f"artifacts/models/{REAL_FAMILIES[family].sizes[size].name}"
            assert run.config["lora_qkv_kernel"] is run.config["lora_o_kernel"] is False
            assert changed.items() <= run.config.items()
            assert ("axolotl.integrations.liger.LigerPlugin" in run.config.get("plugins", [])) == ("liger" in options)
            assert "liger_glu_activation" not in run.config, "it replaces the experts class"


@pytest.mark.parametrize("size", ["large", "tiny"])
@pytest.mark.parametrize(
    ("family", "options", "suffix", "ours"),
    [
        ("qwen3-moe", {"packed": "fp8"}, "-fp8", {}),
        (
            "qwen3-moe",
            {"packed": "fp8", "fp8_activations": True, "liger": True},
            "-fp8-activations-liger",
            {"moe_fp8_activations": True},
        ),
        ("gpt-oss", {"packed": "mxfp4", "lora": 8}, "-lora8-mxfp4", {}),
    ],
)
def test_a_base_in_few_bits(
    family: str, options: dict[str, Any], suffix: str, ours: dict[str, Any], size: str
) -> None:
    """One checkpoint; the baseline alone has transformers dequantise it, and our keys are in our file alone."""
    size = REAL_FAMILIES[family].large if size == "large" else size
    tiny = tiny_overrides(family) if size == "tiny" else None
    made = family_pair(family, Options(size=size, with_eager=True, **options), tiny)
    others = {key: value for key, value in options.items() if key in ("lora", "liger")}
    plain = family_pair(family, Options(size=size, with_eager=True, **others), tiny)
    assert made.name == family + suffix
    quantizer = {"fp8": "FineGrainedFP8Config", "mxfp4": "Mxfp4Config"}[options["packed"]]
    dequantised = {"model_quantization_config": quantizer, "model_quantization_config_kwargs": {"dequantize": True}}
    base = REAL_FAMILIES[family].sizes[size].name + f"-{options['packed']}"
    for run, other in zip(made.runs, plain.runs, strict=True):
        added = ours if run.role == "optimized" else dequantised
        changed = {key for key in run.config if run.config[key] != other.config.get(key)}
        assert changed == {"output_dir", "base_model", *added}
        assert added.items() <= run.config.items()
        assert run.config["base_model"] == f"artifacts/models/{base}"


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_the_size_for_a_gpu_is_the_default(family: str) -> None:
    assert family_pair(family, Options()).size == ALL_FAMILIES[family].large != "tiny"


def test_without_it_nothing_changes() -> None:
    assert lora_overrides(Options()) == {}
    assert not any(key.startswith("lora") for run in pair("mixtral").runs for key in run.config)


@pytest.mark.parametrize(
    ("gpu", "arguments", "code", "message"),
    [
        (None, ("mixtral", "--lora", "8", "--qlora"), 3, NO_GPU),
        (None, ("qwen3-moe", "--qlora"), 3, NO_GPU),
        ("0", ("qwen3-moe", "mixtral", "--qlora"), 2, "the run files of mixtral train all weights: add --lora 16"),
        (None, ("a.yml", "b.yml", "--lora", "8"), 2, "--lora changes the run files of a family (mixtral, "),
        ("0", ("a.yml", "b.yml", "--qlora"), 2, "Write the adapter into your two run files"),
        ("0", ("a.yml", "b.yml", "--fp8"), 2, "Write the base model into your two run files"),
        ("0", ("qwen3-moe", "--fp8", "--qlora"), 2, "three ways to keep the frozen weights. Cure: name one"),
        ("0", ("gpt-oss", "--mxfp4", "--fp8-activations"), 2, "three ways to keep the frozen weights"),
        ("0", ("qwen3-moe", "--mxfp4"), 2, "none in mxfp4. Cure: leave --mxfp4 out, or compare gpt-oss"),
        (None, ("mixtral", "--fp8"), 2, "mixtral has none in fp8. Cure: leave --fp8 out, or compare qwen3-moe"),
        ("0", ("--fp8-activations",), 2, "mixtral has none in fp8"),
        (None, ("qwen3-moe", "--fp8-activations"), 3, "--fp8-activations needs an NVIDIA GPU and none is visible"),
        ("8.0", ("qwen3-moe", "--fp8"), 3, "compute capability 8.9 or later, and this one has 8.0"),
    ],
)
def test_what_is_refused(
    gpu: str | None,
    arguments: tuple[str, ...],
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("bitsandbytes")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "visible_gpu", lambda: gpu)
    monkeypatch.setattr(command, "installed_version", lambda package: "5.20.1")
    monkeypatch.setattr(command, "compute_capability", lambda gpu: (8, 0) if gpu == "8.0" else None)
    result = CliRunner().invoke(app, ["compare", *arguments])
    said = " ".join(result.output.split())
    assert (result.exit_code, message in said) == (code, True), said
    assert ("--lora" in said) == ("--lora" in message), "what is not in question is not spoken of"


def test_qlora_needs_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "visible_gpu", lambda: "0")
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["compare", "qwen3-moe", "--qlora", "--dry-run"])
    assert result.exit_code == 3, result.output
    assert "pip install bitsandbytes" in result.output


def test_fp8_needs_a_transformers_that_loads_the_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "installed_version", lambda package: "5.16.1")
    for option in ("--fp8", "--fp8-activations"):
        result = CliRunner().invoke(app, ["compare", "qwen3-moe", option, "--size", "tiny", "--dry-run"])
        assert result.exit_code == 3, result.output
        assert "Cure: Python 3.12 with axolotl 0.21" in " ".join(result.output.split())
    result = CliRunner().invoke(app, ["compare", "gpt-oss", "--mxfp4", "--size", "tiny", "--dry-run"])
    assert result.exit_code == 0, result.output
    assert "Mxfp4Config" in result.output
