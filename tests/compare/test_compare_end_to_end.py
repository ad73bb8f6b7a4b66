"""The real thing: `moe-kernels compare` of one tiny pair, with Axolotl, W&B and the plugin; then with LoRA.

Nothing of it may ask the network: W&B is offline, and compare switches Axolotl's own telemetry off.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from network_guard import asked, guarded_environment

if importlib.util.find_spec("axolotl") is None or importlib.util.find_spec("axolotl.utils") is None:
    pytest.skip("axolotl is not installed: needs the extra [axolotl]", allow_module_level=True)

pytestmark = [pytest.mark.axolotl, pytest.mark.slow]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    found = guarded_environment(tmp_path_factory.mktemp("guard"))
    found.pop("TRITON_INTERPRET", None)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Empty at first; model and data that one test makes serve the next."""
    return tmp_path_factory.mktemp("compare")


def compare(environment: dict[str, str], folder: Path, name: str, *arguments: str) -> tuple[dict[str, Any], str]:
    """The report's JSON and page."""
    command = [
        sys.executable,
        "-m",
        "moe_kernels",
        "compare",
        "qwen2-moe",
        "--size",
        "tiny",
        "--no-noise",
        *arguments,
    ]
    done = subprocess.run([*command, "--out", name], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert asked(environment) == ""
    return json.loads((folder / name / f"{name}-tiny.json").read_text()), (folder / name / "report.html").read_text()


def test_a_tiny_pair_from_nothing_to_the_report(environment: dict[str, str], folder: Path) -> None:
    data, page = compare(environment, folder, "qwen2-moe", "--steps", "6", "--warmup-steps", "2")
    baseline, optimized = data["runs"]
    assert baseline["wandb"]["project"] == "moe-baseline"
    assert optimized["wandb"]["project"] == "moe-kernels"
    judged = data["judged"]
    # Two expert layers, six steps.
    assert judged["sides"]["optimized"]["expert_calls"] == 12
    assert judged["sides"]["baseline"]["expert_calls"] is None
    assert judged["implementation"] == {"baseline": "grouped_mm", "optimized": "moe_kernels"}
    assert [len(run["losses"]) for run in judged["runs"]] == [6, 6]
    assert judged["loss"]["verdict"] == "confirmed"
    assert 0 <= judged["loss"]["mean"] < 1e-4
    measured = {row["implementation"]: row for row in data["experts"]["measurements"]}
    assert measured["grouped_mm"]["ok"]
    assert measured["moe_kernels"]["ok"]
    assert data["experts"]["moe_layers"] == 2

    assert "Pipeline check, not a benchmark" in page
    assert page.count("<svg") >= 5
    assert "Load of every expert over time" in page, "the router's telemetry is on"
    assert (folder / "artifacts/runs/compare/qwen2-moe-tiny/optimized-1/result.json").is_file()


def test_lora(environment: dict[str, str], folder: Path) -> None:
    data, page = compare(environment, folder, "qwen2-moe-lora8", "--lora", "8", "--steps", "4", "--warmup-steps", "1")
    judged = data["judged"]
    assert judged["sides"]["optimized"]["expert_calls"] == 8, "two expert layers, four steps"
    assert judged["sides"]["baseline"]["expert_calls"] is None
    assert judged["implementation"] == {"baseline": "grouped_mm", "optimized": "moe_kernels"}
    assert judged["loss"]["verdict"] == "confirmed"
    assert judged["loss"]["first_gradient"] < 1e-4
    assert data["experts"]["measurements"] == [], "the layer's benchmark is of a full training"
    logs = [(folder / run["log"]).read_text() for run in data["runs"]]
    assert "LoRA of 4 expert weights runs inside the kernels" in logs[1]
    trainable = [next(line for line in log.splitlines() if "trainable params" in line) for log in logs]
    assert trainable[0].split("trainable params")[1] == trainable[1].split("trainable params")[1]
    assert "qwen2-moe-lora8" in page
    assert "lora_target_parameters" in page, "the report shows what was changed in the run files"
