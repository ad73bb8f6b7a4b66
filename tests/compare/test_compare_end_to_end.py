"""The real thing once: `moe-kernels compare` of one tiny pair, with Axolotl, W&B and the plugin."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("axolotl") is None or importlib.util.find_spec("axolotl.utils") is None:
    pytest.skip("axolotl is not installed: pip install 'moe-kernels[axolotl]'", allow_module_level=True)

pytestmark = [pytest.mark.axolotl, pytest.mark.slow]


def test_a_tiny_pair_from_nothing_to_the_report(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "moe_kernels", "compare", "qwen2-moe", "--size", "tiny", "--no-noise"]
    command += ["--steps", "6", "--warmup-steps", "2", "--out", "out"]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    data = json.loads((tmp_path / "out" / "qwen2-moe.json").read_text())
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

    page = (tmp_path / "out" / "report.html").read_text()
    assert "Pipeline check, not a benchmark" in page
    assert page.count("<svg") >= 5
    assert (tmp_path / "artifacts/runs/compare/qwen2-moe-tiny/optimized-1/result.json").is_file()
