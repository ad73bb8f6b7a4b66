"""`moe-kernels compare --lora`: the same pair, both runs with the same adapter, the base frozen."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moe_kernels.cli.app import app
from moe_kernels.compare import command
from moe_kernels.compare.plan import Options, Plan, lora_overrides, plan_family
from moe_kernels.prepare import tiny_overrides
from moe_kernels.shapes import FAMILIES

HAS_AXOLOTL = (
    importlib.util.find_spec("axolotl") is not None and importlib.util.find_spec("axolotl.utils") is not None
)
KERNEL_KEYS = {"plugins", "moe_kernels", "moe_group_size", "moe_persistent_kernel", "experts_implementation"}
NAMES = {"output_dir", "wandb_project", "wandb_name", "moe_router_telemetry"}


def plan(family: str, **options: object) -> Plan:
    return plan_family(family, Options(size="tiny", **options), tiny_overrides(family))


@pytest.mark.parametrize("qlora", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_runs_differ_in_the_kernels_alone(family: str, qlora: bool) -> None:
    made = plan(family, lora=16, qlora=qlora)
    baseline, optimized = (next(run for run in made.runs if run.role == role) for role in ("baseline", "optimized"))
    keys = baseline.config.keys() | optimized.config.keys()
    differ = {key for key in keys if baseline.config.get(key) != optimized.config.get(key)}
    assert differ <= KERNEL_KEYS | NAMES
    assert optimized.uses_kernels
    assert not baseline.uses_kernels
    for run in made.runs:
        assert run.config["lora_r"] == 16
        assert run.config["lora_target_parameters"] == ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        assert run.config["lora_model_dir"] == f"artifacts/adapters/{FAMILIES[family].sizes['tiny'].name}-r16"
        assert run.config.get("load_in_4bit", False) == run.config.get("quantize_moe_experts", False) == qlora
    assert made.name == f"{family}-{'q' if qlora else ''}lora16"
    assert made.folder != plan(family).folder, "a LoRA pair must not take the place of the full one's runs"


def test_without_it_nothing_changes() -> None:
    assert lora_overrides(Options(), "model") == {}
    assert not any(key.startswith("lora") for run in plan("mixtral").runs for key in run.config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mixtral", "--lora", "8", "--qlora"), "--qlora needs --lora and an NVIDIA GPU"),
        (("mixtral", "--qlora"), "--qlora needs --lora"),
        (("a.yml", "b.yml", "--lora", "8"), "--lora is for mixtral, qwen2-moe and deepseek-v3"),
    ],
)
def test_what_is_refused(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "visible_gpu", lambda: None)
    result = CliRunner().invoke(app, ["compare", *arguments])
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())


@pytest.mark.axolotl
@pytest.mark.slow
@pytest.mark.skipif(not HAS_AXOLOTL, reason="axolotl is not installed: pip install 'moe-kernels[axolotl]'")
def test_a_tiny_pair_from_nothing_to_the_report(tmp_path: Path) -> None:
    arguments = ["compare", "qwen2-moe", "--lora", "8", "--size", "tiny", "--no-noise"]
    arguments += ["--steps", "4", "--warmup-steps", "1", "--out", "out"]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "moe_kernels", *arguments], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    data = json.loads((tmp_path / "out" / "qwen2-moe-lora8.json").read_text())
    judged = data["judged"]
    assert judged["sides"]["optimized"]["expert_calls"] == 8, "two expert layers, four steps"
    assert judged["sides"]["baseline"]["expert_calls"] is None
    assert judged["implementation"] == {"baseline": "grouped_mm", "optimized": "moe_kernels"}
    assert judged["loss"]["verdict"] == "confirmed"
    assert judged["loss"]["first_gradient"] < 1e-4
    assert data["experts"]["measurements"] == [], "the layer's benchmark is of a full training"
    logs = [(tmp_path / run["log"]).read_text() for run in data["runs"]]
    assert "LoRA of 4 expert weights runs inside the kernels" in logs[1]
    trainable = [next(line for line in log.splitlines() if "trainable params" in line) for log in logs]
    assert trainable[0].split("trainable params")[1] == trainable[1].split("trainable params")[1]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "qwen2-moe-lora8" in page
    assert "lora_target_parameters" in page, "the report shows what was changed in the run files"
