"""The real thing: `moe-kernels compare` of one tiny pair, with Axolotl, W&B and the plugin; then with LoRA.

Nothing of it may ask the network: W&B is offline, and compare switches Axolotl's own telemetry off.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.version import Version

from moe_kernels.shapes import FAMILIES
from moe_kernels.tools.prepare import tiny_overrides
from network_guard import asked, guarded_environment

if importlib.util.find_spec("axolotl") is None or importlib.util.find_spec("axolotl.utils") is None:
    pytest.skip("axolotl is not installed: needs the extra [axolotl]", allow_module_level=True)

CONFIGS = Path(__file__).parents[2] / "configs" / "moe"
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
    command = [sys.executable, "-m", "moe_kernels", "compare", *arguments, "--no-noise", "--out", name]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert asked(environment) == ""
    [data] = (folder / name).glob("*.json")
    return json.loads(data.read_text()), (folder / name / "report.html").read_text()


TINY = ("qwen2-moe", "--size", "tiny")


def test_a_tiny_pair_from_nothing_to_the_report(environment: dict[str, str], folder: Path) -> None:
    data, page = compare(environment, folder, "qwen2-moe", *TINY, "--steps", "6", "--warmup-steps", "2")
    baseline, optimized = data["runs"]
    assert baseline["wandb"]["project"] == "moe-baseline"
    assert optimized["wandb"]["project"] == "moe-kernels"
    judged = data["judged"]
    # Two expert layers, six steps.
    assert judged["sides"]["optimized"]["expert_calls"] == 12
    assert judged["sides"]["baseline"]["expert_calls"] is None
    assert judged["implementation"] == {"baseline": "grouped_mm", "optimized": "moe_kernels"}
    assert [run["experts"] for run in data["runs"]] == ["grouped_mm", "moe_kernels"], "as the trainer found it"
    assert "Read this first" not in page
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


def test_a_baseline_that_a_plugin_pins_to_the_eager_loop(environment: dict[str, str], folder: Path) -> None:
    family = FAMILIES["qwen2-moe"]
    for name, file in (("pinned", family.baseline), ("ours", family.optimized)):
        config = yaml.safe_load((CONFIGS / file).read_text()) | tiny_overrides("qwen2-moe")
        if name == "pinned":
            config["plugins"] = ["axolotl.integrations.kernels.KernelsPlugin"]
        (folder / f"{name}.yml").write_text(yaml.safe_dump(config))
    files = ("pinned.yml", "ours.yml")
    data, page = compare(environment, folder, "own", *files, "--steps", "4", "--warmup-steps", "1")
    assert data["judged"]["implementation"] == {"baseline": "eager", "optimized": "moe_kernels"}
    assert "experts ran on eager, not on grouped_mm, which transformers picks by itself" in page
    assert "KernelsPlugin, listed without a kernel, sets that" in page


def test_lora_at_real_size_made_small(environment: dict[str, str], folder: Path) -> None:
    """Without weights on the disk: both runs start from the same bits."""
    steps = ("--size", "tiny", "--steps", "4", "--warmup-steps", "1", "--lora", "8")
    data, page = compare(environment, folder, "qwen3-moe-lora8", "qwen3-moe", *steps)
    judged = data["judged"]
    assert judged["sides"]["optimized"]["expert_calls"] == 16, "two expert layers, four steps, all checkpointed"
    assert judged["sides"]["baseline"]["expert_calls"] is None
    assert judged["implementation"] == {"baseline": "grouped_mm", "optimized": "moe_kernels"}
    assert judged["loss"]["verdict"] == "confirmed"
    assert judged["loss"]["first_gradient"] < 1e-4
    assert data["experts"]["measurements"] == [], "the layer's benchmark is of a full training"
    one, two = (run["weights"] for run in data["runs"])
    assert one == two != ""
    assert not [*(folder / "artifacts/models/qwen3-moe-tiny").glob("*.safetensors")]
    logs = [(folder / run["log"]).read_text() for run in data["runs"]]
    assert "LoRA of 4 expert weights runs inside the kernels" in logs[1]
    trainable = [next(line for line in log.splitlines() if "trainable params" in line) for log in logs]
    assert trainable[0].split("trainable params")[1] == trainable[1].split("trainable params")[1]
    assert "qwen3-moe-lora8" in page
    assert "lora_r: 8" in page, "the report shows what was changed in the run files"


@pytest.mark.parametrize(("family", "option"), [("qwen3-moe", "--fp8"), ("gpt-oss", "--mxfp4")])
def test_a_base_in_few_bits(environment: dict[str, str], folder: Path, family: str, option: str) -> None:
    """Both runs start from the values of one checkpoint, which ours keeps and the baseline had dequantised."""
    if option == "--fp8" and Version(version("transformers")) < Version("5.20"):
        pytest.skip("compare refuses: stock transformers loads no such checkpoint")
    name = f"{family}{option.removeprefix('-')}"
    steps = ("--size", "tiny", "--steps", "4", "--warmup-steps", "1")
    data, page = compare(environment, folder, name, family, option, *steps)
    judged = data["judged"]
    assert judged["sides"]["optimized"]["expert_calls"] == 16
    assert judged["implementation"] == {"baseline": "grouped_mm", "optimized": "moe_kernels"}
    assert judged["loss"]["verdict"] == "confirmed"
    assert judged["loss"]["first_gradient"] < 1e-4
    one, two = (run["weights"] for run in data["runs"])
    assert one == two != ""
    whole, kept = (run["frozen"] for run in data["runs"])
    assert list(whole) == ["float32"]
    assert list(kept) == {"--fp8": ["float8_e4m3fn", "float32"], "--mxfp4": ["uint8", "float32"]}[option]
    assert whole["float32"] > 3 * sum(kept.values())
    assert "dequantised as it was loaded" in page
    assert "dequantised ahead of each GEMM" in page
    assert name in page
