"""The results in README and docs are exactly what the committed JSON files say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import make_readme_table as tables
import pages
import step_times as steps
from moe_kernels.shapes import LayerShape
from moe_kernels.tools.bench import experts

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "make_readme_table.py"

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
SPREAD = {"median": 100.04, "p20": 99.0, "p80": 101.0}


def bench_json(gpu):
    pytest.importorskip("transformers")
    shape = LayerShape("tiny", 16, 16, 16, 4, 2)
    rows = experts.measure(shape, device="cpu", dtype=torch.float32, repeats=1)
    machine = {"gpu": gpu, "torch": "2", "triton": "3", "transformers": "5", "date": "2026-01-02T03:04:05"}
    machine["command"] = "moe-kernels bench"
    return {"schema": 1, "kind": "bench", "environment": machine, "results": [row.to_json() for row in rows]}


def layer_row():
    nothing = dict.fromkeys(("forward_backward_queued_ms", "dense_fraction", "launches_forward_backward"))
    return nothing | {
        "shape": "mixtral-1b", "tokens": 64, "implementation": "moe_kernels", "forward_ms": SPREAD, "note": "",
        "forward_backward_ms": SPREAD, "launches_forward": None, "saved_mb": 1.0, "peak_mb": 2.0, "rel_error": {},
    }  # fmt: skip


def compare_json(gpu):
    side = {"step_ms": SPREAD, "tokens_per_s": {"median": 163840.0}, "peak_allocated_gib": 28.4}
    return {
        "schema": "moe-kernels compare 1", "name": "mixtral", "gpu": gpu and {"name": gpu}, "created": "2026-01-02",
        "versions": dict.fromkeys(("axolotl", "transformers", "torch", "triton"), "1"),
        "judged": {
            "sides": {"baseline": side, "optimized": {**side, "step_ms": None, "tokens_per_s": None}},
            "implementation": {"baseline": "grouped_mm", "optimized": "moe_kernels"},
            "shares": {"baseline": {"experts_ms": 41.0, "step_ms": 100.0}},
            "loss": {"verdict": "confirmed"},
        },
        "experts": {"measurements": [layer_row()]},
    }  # fmt: skip


def lora_json(gpu):
    row = {
        "base": "bf16", "adapters": "float32", "implementation": "moe_kernels", "note": "", "saved_mb": 1.0,
        "forward": {"total": SPREAD, "queued": SPREAD}, "forward_backward": {"total": SPREAD, "queued": SPREAD},
        "peak_mb": 2.0, "weights_mb": 3.0, "rel_error": {"out": 1e-3, "dx": 5.1e-3},
    }  # fmt: skip
    absent = {**row, "implementation": "scattermoe", "note": "not here", "forward": None, "forward_backward": None,
              "saved_mb": None, "peak_mb": None, "weights_mb": None, "rel_error": {}}  # fmt: skip
    machine = {"gpu": gpu, "date": "2026-01-02T03:04:05", **dict.fromkeys(tables.LORA_PACKAGES, "1")}
    shape = dict.fromkeys(("name", "tokens", "hidden", "intermediate", "experts", "top_k"), 8)
    return {"kind": "lora", "environment": machine, "shape": shape, "rank": 16, "repeats": 20, "rows": [row, absent]}


def test_lora_tables():
    text = tables.lora([("lora.json", lora_json("GPU X")), ("cpu.json", lora_json(None))])
    assert "`benchmarks/results/lora.json`: GPU X, torch 1, triton 1" in text
    assert "cpu.json" not in text
    assert "| bf16 | float32 | moe_kernels | 100.04 | 100.04 | 100.04 | 1 | 2 | 3 | 5.1e-03 |" in text
    assert "| bf16 | float32 | scattermoe |  | not here |  |  |  |  |  |" in text
    assert tables.lora([("cpu.json", lora_json(None))]) == tables.NOTHING


def test_layers_beside_sonicmoe():
    bench = bench_json("GPU X")
    (ours,) = [row for row in bench["results"] if row["implementation"] == "moe_kernels"]
    twice = {"median": 2 * ours["forward_backward_ms"]["median"], "p20": 0.0, "p80": 0.0}
    for row in bench["results"]:
        row["forward_queued_ms"] = row["forward_backward_queued_ms"] = row["forward_backward_ms"]
    bench["results"].append({**ours, "implementation": "sonicmoe", "forward_backward_queued_ms": twice})
    text = tables.layers([("layers.json", bench | {"note": "Tuned."})])
    assert "forward and backward: 2.00 of GPU time (2.00 to 2.00), 1.00 of wall time (1.00 to 1.00). Tuned." in text
    assert "| forward: ours, sonicmoe, " in text
    assert "sonicmoe" not in tables.layers([("layers.json", bench_json("GPU X"))])


def test_releases_of_triton_side_by_side():
    def under(triton, time):
        bench = bench_json("GPU X")
        bench["environment"]["triton"] = triton
        for row in bench["results"]:
            row["forward_backward_queued_ms"] = {**SPREAD, "median": time}
        return bench

    results = [("h-triton-1.json", under("1.0", 2.0)), ("h-triton-2.json", under("2.0", 3.0))]
    text = tables.releases(results)
    assert "| layer | 1.0 (`h-triton-1.json`) | 2.0 (`h-triton-2.json`) |" in text
    assert "| tiny | 2.00 | 3.00 |" in text
    assert "| 1.000 | 1.500 |" in text
    assert tables.layers(results) == tables.releases([]) == tables.NOTHING


def test_readme_is_in_sync():
    subprocess.run([sys.executable, str(SCRIPT), "--check"], check=True, timeout=60)


def test_a_line_a_pair_for_the_readme():
    whole, adapter = compare_json("NVIDIA H200"), {**compare_json("NVIDIA H200"), "name": "a-liger"}
    sides = whole["judged"]["sides"]
    ours = {**sides["baseline"], "step_ms": {**SPREAD, "median": 50.04}, "tokens_per_s": {"median": 245760.0}}
    sides |= {"optimized": ours, "eager": {**ours, "tokens_per_s": {"median": 24576.0}}}
    stock = {**layer_row(), "implementation": "grouped_mm", "forward_ms": {"median": 300.12}, "peak_mb": 8.0}
    whole["experts"]["measurements"].append(stock | {"launches_forward_backward": 86})
    text = tables.summary([("b.json", adapter), ("a.json", whole), ("c.json", compare_json(None))])
    first, second = (line for line in text.splitlines() if "H200" in line)
    assert first == "| mixtral | H200, 1, 1 | 100, 50 | 1.50 | 10.00 | 28.4, 28.4 | confirmed | `a.json` |"
    assert second == "| a-liger | H200, 1, 1 | 100, failed |  |  | 28.4, 28.4 | confirmed | `b.json` |"
    assert text.endswith("\n| mixtral-1b, T=64 | 300.12, 100.04 | 3.00 | 100.04, 100.04 | 1.00 | 86,  | 8, 2 |")
    assert text.count("T=64") == 1  # nothing to set beside ours where stock was not timed
    assert tables.summary([("c.json", compare_json(None))]) == tables.NOTHING


def test_tables_show_gpu_results_and_name_their_files():
    results = [("a.json", compare_json("GPU X")), ("b.json", bench_json("GPU X"))]
    text = tables.trainings(results)
    assert "| mixtral, baseline | grouped_mm | 100.0 (99.0-101.0) | 163,840 | 28.4 | 41% |  | `a.json` |" in text
    assert "| mixtral, optimized | moe_kernels | failed |" in text
    assert "| mixtral-1b, T=64 | moe_kernels | 100.04 | 100.04 |" in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("| mixtral, ")}
    assert widths == {len(tables.COMPARE_COLUMNS) + 1}
    text = tables.layers(results)
    assert "| tiny | mild | -, -, - |" in text
    assert "`b.json`: `moe-kernels bench` on GPU X" in text
    assert tables.knobs(results) == tables.NOTHING


def test_settings_of_the_knobs_have_a_page_of_their_own():
    bench = bench_json("GPU X")
    for row in bench["results"]:
        if row["implementation"] == "moe_kernels":
            row["implementation"] = "moe_kernels[g=64,p=1]"
    text = tables.knobs([("b.json", bench)])
    assert "| tiny, T=16 | moe_kernels[g=64,p=1] |" in text
    assert "`benchmarks/results/b.json`" in text
    assert tables.layers([("b.json", bench)]) == tables.NOTHING


def test_the_newest_comparison_of_a_pair_is_shown():
    old, new = compare_json("GPU X"), {**compare_json("GPU Y"), "created": "2026-02-02"}
    for order in ([("old.json", old), ("new.json", new)], [("new.json", new), ("old.json", old)]):
        text = tables.trainings(order)
        assert "`new.json`" in text
        assert "`old.json`" not in text
        assert "on one GPU Y" in text


def test_a_pair_has_a_row_with_each_axolotl():
    old = compare_json("GPU X")
    new = {**old, "versions": {**old["versions"], "axolotl": "2"}, "created": "2026-02-02"}
    text = tables.trainings([("new.json", new), ("old.json", old)])
    for name, axolotl in (("old.json", "1"), ("new.json", "2")):
        (table,) = (part for part in text.split("**Whole training**") if f"`{name}`" in part)
        assert f": axolotl {axolotl}, " in table
        assert table.count("| mixtral, baseline |") == 1


def test_a_table_of_several_days_names_them():
    later = {**compare_json("GPU X"), "name": "qwen2-moe", "created": "2026-01-03T04:05:06"}
    text = tables.trainings([("later.json", later), ("a.json", compare_json("GPU X"))])
    assert text.count("**Whole training**") == 1
    assert "triton 1, 2026-01-02 and 2026-01-03. The share" in text


def test_scaling_tables():
    row = {"family": "mixtral", "engine": "fsdp2", "gpus": 2, "experts": "moe_kernels", "ok": True, "step_ms": SPREAD,
           "tokens_per_s_per_gpu": 1000.4, "peak_gib": 18.61}  # fmt: skip
    stock = {**row, "experts": "grouped_mm", "tokens_per_s_per_gpu": 765.6, "peak_gib": None}
    machine = {"gpu": "GPU X", "command": "c", "torch": "2", "axolotl": "0", "date": "2026-01-02T03"}
    pair = {
        "family": "mixtral",
        "engine": "fsdp2",
        "speedup": 1.3067,
        "loss_difference": 0.0006,
        "efficiency_grouped_mm": 0.972,
        "efficiency_moe_kernels": 0.901,
    }
    nothing = dict.fromkeys(("speedup", "loss_difference", "efficiency_grouped_mm", "efficiency_moe_kernels"))
    alone = {"family": "mixtral", "engine": "ep", **nothing}
    rows = [row, stock, {**row, "ok": False}, {**row, "engine": "ep"}]  # a run that is repeated comes last
    data = {"kind": "scaling", "environment": machine, "setting": {"gpus": 2}, "rows": rows, "summary": [pair, alone]}
    text = tables.scaling([("s.json", data)])
    times, speeds = "100 (99-101), 100 (99-101)", "766, 1,000"
    assert f"| mixtral | fsdp2 | 2 | {times} | {speeds} | , 18.6 | 1.31 | 0.97, 0.90 | 0.06% |" in text
    assert "| mixtral | ep | 2 | -, 100 (99-101) | -, 1,000 | -, 18.6 |  |  |  |" in text
    assert tables.scaling([("s.json", {**data, "environment": {**machine, "gpu": None}})]) == tables.NOTHING
    assert "busiest rank" not in text
    ranks = [{"window_ms": 10.0, "communication_ms": talk, "exposed_ms": 1.0, "idle_ms": 0.5} for talk in (2.0, 4.0)]
    versions = {"axolotl": "0", "transformers": "5"}
    seen = {**row, "traffic": ranks, "imbalance": {"mean": 1.204, "worst": 2.0}, "versions": versions}
    text = tables.scaling([("s.json", {**data, "rows": [seen, stock]})])
    assert "| losses apart | communication (exposed): stock, ours | no kernel: stock, ours | busiest rank |" in text
    assert "| 0.06% | -, 30% (10%) | -, 5% | 1.20 |" in text
    assert "grouped_mm. On transformers 5: fsdp2. Scaling" in text


def test_cpu_results_are_left_out():
    results = [("a.json", compare_json(None)), ("b.json", bench_json(None))]
    assert tables.trainings(results) == tables.layers(results) == tables.NOTHING


def test_rewrites_between_the_markers_and_notices_a_stale_table(tmp_path):
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    for name in tables.DOCUMENTS:
        (tmp_path / name).write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    command = [sys.executable, str(SCRIPT), "--root", str(tmp_path)]
    assert subprocess.run([*command, "--check"], capture_output=True, timeout=60).returncode == 1
    subprocess.run(command, check=True, timeout=60)
    readme = (tmp_path / "README.md").read_text()
    assert readme == f"before\n{BEGIN}\n{tables.NOTHING}\n{END}\nafter\n"
    assert subprocess.run([*command, "--check"], timeout=60).returncode == 0
    (results / "new.json").write_text(json.dumps(compare_json("GPU X")))
    stale = subprocess.run([*command, "--check"], capture_output=True, text=True, timeout=60)
    assert stale.returncode == 1
    assert "README.md is out of date. Cure:" in stale.stderr


def test_missing_markers_are_named():
    with pytest.raises(SystemExit, match=r"README.md lacks the markers <!-- results:begin -->"):
        pages.updated("README.md", "no markers here", "results", "")


def test_the_steps_against_their_floors_are_those_measured():
    results = ROOT / "benchmarks" / "results"
    table = steps.table(results / "h200-steps.json", results / "h200-routings.json")
    assert table in (ROOT / "docs" / "performance.md").read_text()


def test_the_floor_of_a_step(tmp_path):
    """Mixtral-1B's down projection: A and Y of R = 32768 rows and W2 of 8 experts, 2 R H I flop."""
    moved = 2 * (32768 * 3584 + 32768 * 1024 + 8 * 1024 * 3584)
    flop = 2.0 * 32768 * 1024 * 3584
    row = {"shape": "mixtral-1b", "step": "down", "backend": "gluon", "flop": flop, "ms": {"median": 1.0}}
    plan = row | {"step": "make_plan", "flop": 0, "ms": {"median": 0.5}}
    measured, ceilings = tmp_path / "steps.json", tmp_path / "bench.json"
    measured.write_text(json.dumps({"rows": [plan, row, row | {"backend": "triton"}]}))
    for speeds, floor in (((1e9, 500.0), flop / 500e9), ((1.0, 1e9), moved / 1e9)):
        ceilings.write_text(json.dumps({"ceilings": dict(zip(("copy_tbs", "matmul_tflops"), speeds, strict=True))}))
        assert steps.table(measured, ceilings).splitlines() == [
            "| step | mixtral-1b |", "| --- | --- |", "| make_plan | 0.500 |",
            f"| down | 1.000; {moved / 1e9:.2f} GB, {flop / 1e12:.2f} TFLOP; {floor:.2f} |",
        ]  # fmt: skip
