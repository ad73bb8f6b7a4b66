"""The planner: parameters that are known, one row worked by hand, and a page that shows what the command prints."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import plan_error
from moe_kernels.shapes import FAMILIES
from moe_kernels.tools.app import app
from moe_kernels.tools.plan.command import MEASURED, measured_rates
from moe_kernels.tools.plan.estimate import MODELS, Assumptions, Rates, estimate

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "planning.md"
RATES = Rates(500e12, 600e12, "")


@pytest.mark.parametrize(
    ("name", "billions"), [("mixtral-8x7b", 46.7), ("qwen3-30b-a3b", 30.5), ("deepseek-v3", 671.0)]
)
def test_parameters_are_the_published_ones(name: str, billions: float) -> None:
    model = MODELS[name]
    assert (model.expert_parameters + model.other_parameters) / 1e9 == pytest.approx(billions, abs=0.05)


def test_mixtral_on_eight_gpus_by_hand() -> None:
    row = estimate("mixtral-8x7b", 8, 8, RATES, Assumptions(other_flops=300e12))
    # 46.70 B parameters over 8 GPUs, 4 + 4 + 8 bytes each.
    assert (row.weights + row.grads + row.optimizer) / 1e9 == pytest.approx(16 * 46.70 / 8, rel=1e-3)
    # Out and back, three times, in 32 layers: 16384 rows of 4096 bfloat16, of which 7/8 leave the GPU.
    assert row.all_to_all == 6 * 32 * 16384 * 4096 * 2 * 7 / 8
    assert row.all_to_all_s == row.all_to_all / 300e9
    # 6 * R * H * I forward, once for the recomputation; three times that forward and backward.
    flops = 6 * 16384 * 4096 * 14336 * 32
    assert row.experts_s == pytest.approx(flops / 500e12 + 3 * flops / 600e12)
    # Experts are not sharded further: all but them travels, weights twice and gradients once.
    assert row.fsdp_s == pytest.approx((2 * 2 + 4) * MODELS["mixtral-8x7b"].other_parameters * 7 / 8 / 300e9)
    assert row.other_s is not None
    assert row.step_s == pytest.approx(row.experts_s + row.other_s + row.all_to_all_s)


def test_what_leaves_the_node_takes_the_network() -> None:
    within, across = (estimate("qwen3-30b-a3b", 64, ep, RATES, Assumptions()) for ep in (8, 64))
    rows = 6 * 48 * 65536 * 2048 * 2
    assert within.all_to_all_s == pytest.approx(rows * 7 / 8 / 300e9)
    assert across.all_to_all_s == pytest.approx(rows * 7 / 8 / 40e9 + rows * (63 / 64 - 7 / 8) / 300e9)
    assert across.gathered < within.gathered


def test_gpus_of_a_node_share_what_they_fetch() -> None:
    """Without expert parallelism every GPU of a node needs the same bytes; with EP=8 each needs its own."""
    whole, spread = (estimate("mixtral-8x7b", 64, ep, RATES, Assumptions()) for ep in (1, 8))
    model = MODELS["mixtral-8x7b"]
    other = 8 * model.other_parameters * 63 / 64 / 300e9
    assert whole.fsdp_s == pytest.approx(8 * model.expert_parameters * 63 / 64 / 300e9 + other)
    assert spread.fsdp_s == pytest.approx(8 * model.expert_parameters / 8 * 7 / 8 / 40e9 + other)
    assert whole.all_to_all == whole.all_to_all_s == 0


def test_every_group_that_divides_gpus_and_experts_is_a_row() -> None:
    rows = json.loads(run("--json", "--gpus", "8,64,8"))["estimates"]
    assert [row["ep"] for row in rows if row["model"] == "mixtral-8x7b"] == [1, 8, 1, 8]
    assert [row["ep"] for row in rows if row["model"] == "deepseek-v3"] == [1, 8, 1, 8, 64]


ROW = {"implementation": "moe_kernels", "device": "GPU", "shape": "mixtral-8x7b", "intermediate": 14336,
       "dtype": "bfloat16", "routing": "mild", "tokens": 4096, "forward_tflops": 1.0,
       "forward_backward_tflops": 2.0}  # fmt: skip


def test_own_layer_is_preferred_and_the_nearest_named(tmp_path: Path) -> None:
    row = ROW
    twin, wide, narrow, own = (
        row | {"shape": shape, "intermediate": width}
        for shape, width in (("twin", 14336), ("wide", 9000), ("narrow", 700), ("mixtral-8x7b", 14336))
    )
    file = tmp_path / "bench.json"
    for rows, expected in (([twin, narrow, own], "mixtral-8x7b"), ([narrow, wide], "wide")):
        file.write_text(json.dumps({"results": rows}))
        rates = measured_rates(file, "mixtral-8x7b")
        assert rates.source.startswith(f"{expected} ")
        assert (rates.forward, rates.forward_backward) == (1e12, 2e12)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"# Title", "is not JSON"),
        (b"\xff", "is not JSON"),
        (b"[]", "is no result of `moe-kernels bench`"),
        (b"{}", "is no result of `moe-kernels bench`"),
        (b'{"results": [{"implementation": "moe_kernels"}]}', "is no result of `moe-kernels bench`"),
        (json.dumps({"results": [{**ROW, "forward_tflops": "x"}]}).encode(), "is no result of `moe-kernels bench`"),
        (json.dumps({"results": [{**ROW, "intermediate": 0}]}).encode(), "is no result of `moe-kernels bench`"),
        (json.dumps({"results": [{**ROW, "device": "cpu"}]}).encode(), "no measurement of moe_kernels on a GPU"),
        (
            json.dumps({"results": [ROW, {**ROW, "routing": "heavy", "dtype": "float32"}]}).encode(),
            "holds mixtral-8x7b 2 times (bfloat16, mild routing, 4096 tokens; float32, heavy routing, 4096 tokens)",
        ),
    ],
)
def test_a_file_of_something_else_is_a_sentence(tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "bench.json"
    file.write_bytes(content)
    result = CliRunner().invoke(app, ["plan", "--measured", str(file)])
    assert result.exit_code == 2
    assert words in result.output


def test_another_dtype_is_said(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    file.write_text(json.dumps({"results": [{**ROW, "dtype": "float32"}]}))
    assert "(I=14336, float32)" in measured_rates(file, "mixtral-8x7b").source


def test_every_result_file_that_has_the_columns_can_be_read() -> None:
    for name in ("h100-layers.json", "h200-layers.json", "h200-log-2-layers.json"):
        assert measured_rates(ROOT / MEASURED.parent / name, "mixtral-8x7b").forward > 1e14


def test_outside_a_clone_the_measurements_of_the_clone_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(app, ["plan"]).exit_code == 0
    monkeypatch.setattr("moe_kernels.__file__", str(tmp_path / "lib/site-packages/moe_kernels/__init__.py"))
    result = CliRunner().invoke(app, ["plan"])
    assert result.exit_code == 3
    assert "run this in a clone of the project, or name with --measured a file" in result.output


def test_what_no_ep_divides_is_said() -> None:
    notes = json.loads(run("--gpus", "3,8", "--ep", "2", "--json"))["notes"]
    assert notes[-1].startswith("Left out, since no --ep of 2 divides GPUs and experts: mixtral-8x7b on 3 GPUs, ")
    assert "on 8 GPUs" not in notes[-1]


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["plan", "--measured", str(ROOT / MEASURED), *arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_no_rate_that_nobody_stated_or_measured_makes_a_time_of_a_step() -> None:
    report = json.loads(run("--json", "--models", "deepseek-v3"))
    assert {(row["other_s"], row["step_s"]) for row in report["estimates"]} == {(None, None)}
    assert all(row["experts_s"] > 0 for row in report["estimates"])
    assert any("Name --other-tflops" in note for note in report["notes"])
    shown = run("--markdown", "--models", "mixtral-8x7b", "--gpus", "8", "--ep", "1").splitlines()[2]
    assert [cell.strip() for cell in shown.split("|")][-6:] == ["-", "0", "1090", "-", "-", ""]
    stated = json.loads(run("--json", "--models", "deepseek-v3", "--other-tflops", "250"))
    assert all(row["step_s"] >= row["other_s"] > 0 for row in stated["estimates"])
    assert any(note == "Assumed: everything else runs at 250 TFLOP/s (--other-tflops)." for note in stated["notes"])


def test_a_narrow_terminal_cuts_no_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert "optimizer" in run("--models", "qwen3-30b-a3b")
    assert "…" not in run("--models", "qwen3-30b-a3b")


def test_a_step_of_few_tokens_is_one_sequence() -> None:
    assert json.loads(run("--json", "--tokens", "1024"))["assumptions"]["sequence"] == 1024


def test_json_states_every_assumption() -> None:
    report = json.loads(run("--json", "--models", "deepseek-v3", "--gpus", "64", "--network-link", "50"))
    assert report["assumptions"]["network_link"] == 50e9
    assert any("50 GB/s to other nodes" in note for note in report["notes"])
    assert {(row["model"], row["gpus"]) for row in report["estimates"]} == {("deepseek-v3", 64)}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--models", "gpt-9"], "--models gpt-9: choose from"),
        (["--models", ","], "--models ',' names nothing"),
        (["--gpus", "3", "--ep", "2"], "No --ep of 2 divides both the GPUs (3) and the experts"),
        (["--gpus", "²"], "not a list of numbers of GPUs"),
        (["--gpus", "9" * 5000], "not a list of numbers of GPUs"),
        (["--node-link", "inf"], "--node-link is inf: name a finite number"),
        (["--tokens", "9" * 400], "name a finite number"),
        (["--ep", "0"], "--ep '0' is not a list of numbers"),
        (["--gpus", "many"], "not a list of numbers of GPUs"),
        (["--measured", "nowhere.json"], "nowhere.json is not there"),
        (["--sequence", "50000"], "--sequence 50000 is longer than the 8192 --tokens of a step"),
    ],
)
def test_wrong_usage_is_a_sentence(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(app, ["plan", "--measured", str(ROOT / MEASURED), *arguments])
    assert result.exit_code == 2
    assert words in result.output


def test_no_number_is_none() -> None:
    """typer 0.29 says so itself, as the option has a lower bound; older ones let it through to us."""
    result = CliRunner().invoke(app, ["plan", "--measured", str(ROOT / MEASURED), "--other-tflops", "nan"])
    said = " ".join(result.output.replace("│", " ").split())
    assert result.exit_code == 2
    assert re.search("--other-tflops(?: is nan: name a finite number|': Input should be greater than)", said)


def test_the_page_shows_what_the_command_prints() -> None:
    page = PAGE.read_text(encoding="utf-8")
    shown = page.partition("<!-- plan:begin -->\n")[2].partition("<!-- plan:end -->")[0]
    arguments = ("--other-tflops", "300", "--markdown")
    assert shown == run(*arguments), f"docs/planning.md: run `moe-kernels plan {' '.join(arguments)}` and paste it in"


# ------------------------------------------------------------------------------------ judged by what was measured
def scaling_rows(step_ms: float, engine: str, gpus: int) -> dict[str, Any]:
    return {
        "family": "qwen2-moe", "engine": engine, "experts": "moe_kernels", "gpus": gpus, "ok": True,
        "step_ms": {"median": step_ms}, "peak_gib": 20.0,
    }  # fmt: skip


def test_a_prediction_is_the_step_of_one_gpu_and_the_all_to_all() -> None:
    rows = [scaling_rows(100.0, "one GPU", 1), scaling_rows(150.0, "axolotl-ep", 4), scaling_rows(80.0, "fsdp2", 4)]
    spread, whole = plan_error.judged("f.json", {"rows": [*rows, {**rows[1], "ok": False}]})
    # Six layers, 16384 tokens to 8 experts each, of width 1024 in bfloat16: out and back, in forward and backward.
    all_to_all_ms = 4 * 6 * 16384 * 8 * 1024 * 2 * 3 / 4 / 300e9 * 1000
    assert spread["step_ms"] == (pytest.approx(100.0 + all_to_all_ms), 150.0)
    assert whole["step_ms"] == (pytest.approx(100.0), 80.0)
    assert plan_error.error(whole["step_ms"]) == pytest.approx(0.25)


def test_traffic_that_takes_longer_than_the_compute_is_the_step() -> None:
    rows = [scaling_rows(1.0, "one GPU", 1), scaling_rows(50.0, "fsdp2", 2)]
    (whole,) = plan_error.judged("f.json", {"rows": rows})
    model = plan_error.model_of(FAMILIES["qwen2-moe"].sizes["1b"])
    assert whole["step_ms"][0] == pytest.approx(
        6 * (model.expert_parameters + model.other_parameters) / 2 / 300e9 * 1000
    )


@pytest.mark.parametrize(("family", "billions"), [("mixtral", 0.973), ("qwen2-moe", 1.025), ("deepseek-v3", 1.020)])
def test_the_1b_models_have_their_parameters(family: str, billions: float) -> None:
    from moe_kernels.tools.prepare.models import model_config

    model = plan_error.model_of(FAMILIES[family].sizes["1b"])
    counted = model.expert_parameters + model.other_parameters
    assert counted / 1e9 == pytest.approx(billions, abs=1e-3)
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        real = transformers.AutoModelForCausalLM.from_config(model_config(family))
    # But for norms, biases and the gate of a shared expert.
    assert counted == pytest.approx(sum(p.numel() for p in real.parameters()), rel=1e-3)


def test_without_checkpointing_there_is_no_second_forward_pass() -> None:
    kept, again = (
        estimate("qwen3-30b-a3b", 8, 8, RATES, Assumptions(other_flops=300e12, checkpointing=checkpointing))
        for checkpointing in (False, True)
    )
    assert kept.all_to_all == pytest.approx(again.all_to_all * 4 / 6)
    assert kept.other_s == pytest.approx((again.other_s or 0) * 3 / 4)
    assert kept.experts_s < again.experts_s
    assert kept.activations > 3 * again.activations
    assert kept.fsdp_s == again.fsdp_s


def test_the_page_says_how_far_off_the_estimate_was() -> None:
    """Cure: python benchmarks/plan_error.py."""
    for page, new in plan_error.parts(ROOT).items():
        text = (ROOT / page).read_text()
        assert plan_error.pages.updated(page, text, "error", new) == text
