"""benchmarks/scaling.py: its arithmetic, what it does about a failing run, and a run of tiny models on two ranks."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from moe_kernels.tools.common.errors import UsageError

distributed = pytest.importorskip("transformers.distributed", reason="needs the extra [transformers]")
pytest.importorskip("yaml", reason="reads run files")
ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "scaling.py"
spec = importlib.util.spec_from_file_location("scaling", SCRIPT)
scaling = importlib.util.module_from_spec(spec)
sys.modules["scaling"] = scaling  # dataclasses look their module up
spec.loader.exec_module(scaling)

HAS_EP = "ep_size" in {field.name for field in dataclasses.fields(distributed.DistributedConfig)}
SETTING = scaling.Setting(2, 6, 2, "tiny", 60.0, None)


def row(engine, experts, rate, losses=(4.0, 2.0), ok=True):
    cell = scaling._cell("mixtral", engine, experts, 1 if engine == scaling.ONE else 2)
    times = {"step_ms": {"median": 1.0, "p20": 1.0, "p80": 1.0}, "tokens_per_s_per_gpu": rate}
    return {**cell, "ok": ok, "error": "" if ok else "it broke", "tail": ["why"], "losses": list(losses), **times,
            "peak_gib": None, "ran": "x"}  # fmt: skip


def test_scaling_is_speed_per_gpu_over_that_of_one():
    rows = [row(scaling.ONE, "grouped_mm", 100.0), row(scaling.ONE, "moe_kernels", 160.0),
            row(scaling.FSDP2, "grouped_mm", 90.0), row(scaling.FSDP2, "moe_kernels", 120.0)]  # fmt: skip
    one, two = scaling.summary(rows)
    assert (one["speedup"], one["efficiency_moe_kernels"]) == (1.6, None)
    assert two["speedup"] == pytest.approx(120 / 90)
    assert (two["efficiency_grouped_mm"], two["efficiency_moe_kernels"]) == (0.9, 0.75)


def test_losses_are_compared_relative_to_their_mean():
    assert scaling.loss_difference([3.0] * 10, [3.3] * 10) == pytest.approx(0.1)
    assert scaling.loss_difference([3.0] * 10, [3.0] * 7) == 0.0


def test_a_failed_run_is_no_part_of_a_pair():
    (line,) = scaling.summary(
        [row(scaling.FSDP2, "grouped_mm", 9.0), row(scaling.FSDP2, "moe_kernels", 9.0, ok=False)]
    )
    assert line["speedup"] is None
    assert line["loss_difference"] is None


def test_what_is_there_is_not_run_again_unless_it_failed(tmp_path):
    path = tmp_path / "scaling.json"
    store = scaling.Store(path, SETTING, fresh=False)
    store.add(row(scaling.FSDP2, "grouped_mm", 9.0))
    store.add(row(scaling.FSDP2, "moe_kernels", 9.0, ok=False))
    again = scaling.Store(path, SETTING, fresh=False)
    assert [r["experts"] for r in again.rows] == ["grouped_mm"]
    assert not again.holds("mixtral", scaling.FSDP2)
    again.add(row(scaling.FSDP2, "moe_kernels", 9.0))
    assert again.holds("mixtral", scaling.FSDP2)
    assert len(scaling.Store(path, dataclasses.replace(SETTING, timeout_s=99.0), fresh=False).rows) == 2
    assert scaling.Store(path, SETTING, fresh=True).rows == []


def test_runs_of_another_kind_are_neither_dropped_nor_mixed(tmp_path, monkeypatch):
    path = tmp_path / "scaling.json"
    scaling.Store(path, SETTING, fresh=False).add(row(scaling.FSDP2, "grouped_mm", 9.0))
    with pytest.raises(UsageError, match="steps 6 there, 7 now"):
        scaling.Store(path, dataclasses.replace(SETTING, steps=7), fresh=False)
    here = scaling.environment()
    monkeypatch.setattr(scaling, "environment", lambda: {**here, "gpu": "another"})
    with pytest.raises(UsageError, match="another now"):
        scaling.Store(path, SETTING, fresh=False)
    monkeypatch.setattr(scaling, "environment", lambda: {**here, "sources": "other kernels"})
    with pytest.raises(UsageError, match="other kernels now"):
        scaling.Store(path, SETTING, fresh=False)
    assert len(json.loads(path.read_text())["rows"]) == 1


def test_each_row_says_what_it_ran_on(tmp_path, monkeypatch):
    path, here = tmp_path / "scaling.json", scaling.environment()
    for commit, experts in (("old", "grouped_mm"), ("new", "moe_kernels")):
        monkeypatch.setattr(scaling, "environment", lambda commit=commit: {**here, "commit": commit})
        scaling.Store(path, SETTING, fresh=False).add(row(scaling.FSDP2, experts, 9.0))
    report = json.loads(path.read_text())
    assert report["environment"]["commit"] == "old"
    assert [r["environment"]["commit"] for r in report["rows"]] == ["old", "new"]


@pytest.mark.parametrize("text", ["# no JSON", '{"kind": "bench"}', "[]"])
def test_a_file_of_something_else_is_refused(tmp_path, text):
    path = tmp_path / "scaling.json"
    path.write_text(text)
    with pytest.raises(UsageError):
        scaling.Store(path, SETTING, fresh=False)


def test_no_run_of_a_comparison_is_deleted(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(scaling, "prepare_missing", lambda *_: None)
    specs = scaling.one_gpu_specs("mixtral", SETTING)
    assert [spec.folder for spec in specs.values()] == [
        scaling.RUNS / f"mixtral-tiny-one-{experts}" for experts in ("grouped_mm", "moe_kernels")
    ]
    for spec in specs.values():
        assert spec.config["output_dir"] == spec.overrides["output_dir"] == str(spec.folder / "output")


def test_what_breaks_a_run_beside_another_is_raised(monkeypatch, tmp_path):
    def breaks(*_):
        raise OSError("no space left")

    monkeypatch.setattr(scaling, "one_gpu_specs", lambda *_: {"grouped_mm": None, "moe_kernels": None})
    monkeypatch.setattr(scaling, "axolotl_row", breaks)
    store = scaling.Store(tmp_path / "scaling.json", SETTING, fresh=False)
    with pytest.raises(OSError, match="no space"):
        scaling.run_pair("mixtral", scaling.ONE, SETTING, store, Console())


def test_ranks_end_with_the_time_limit(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, pathlib, time\n"
        f"pathlib.Path({str(tmp_path)!r}, 'pid' + os.environ['RANK']).write_text(str(os.getpid()))\n"
        "time.sleep(120)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    with (tmp_path / "log").open("wb") as sink:
        problem = scaling._torchrun(command, {**os.environ, "OMP_NUM_THREADS": "1"}, sink, 20.0)
    assert "stopped after 20 s" in problem
    pids = [int(path.read_text()) for path in tmp_path.glob("pid*")]
    assert len(pids) == 2, (tmp_path / "log").read_text()
    assert not [pid for pid in pids if Path("/proc", str(pid)).exists()]


def test_a_failing_training_leaves_a_row_and_the_end_of_its_log(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = (sys.executable, "-c", "raise SystemExit('ValueError: no such thing')")
    run = scaling.RunSpec(
        "fsdp2-x", "baseline", Path("x.yml"), {}, {"max_steps": 3, "output_dir": "out"}, tmp_path / "run", False
    )
    machine = scaling.Machine(None, {}, trainer=trainer, launcher=())
    failed = scaling.axolotl_row("mixtral", scaling.FSDP2, "grouped_mm", run, machine, SETTING)
    assert not failed["ok"]
    assert "no such thing" in failed["error"]
    scaling._say(Console(), failed, 0.0)
    scaling.show([failed], Console())


def test_run_files_of_both_engines_exist_and_are_started_on_all_gpus(monkeypatch):
    monkeypatch.chdir(ROOT)
    for family in scaling.FAMILIES:
        specs = scaling.fsdp2_specs(family, SETTING)
        assert [spec.config["max_steps"] for spec in specs.values()] == [6, 6]
        assert specs["moe_kernels"].config["moe_kernels"] is True
        assert not specs["grouped_mm"].config.get("moe_kernels")
        assert all(spec.config["fsdp_version"] == 2 for spec in specs.values())


@pytest.mark.slow
@pytest.mark.skipif(not HAS_EP, reason="expert parallelism needs transformers 5.19: make test-newest")
def test_a_tiny_model_on_two_ranks(tmp_path):
    command = [sys.executable, str(SCRIPT), "--tiny", "--engines", "ep,trainer", "--families", "qwen2-moe",
               "--steps", "5", "--warmup", "1", "--json", "scaling.json"]  # fmt: skip
    # The newest transformers may stand on a relative path, and the run has a folder of its own.
    paths = [str(Path(path).resolve()) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report = json.loads((tmp_path / "scaling.json").read_text())
    for engine, share in ((scaling.EP, 2), (scaling.TRAINER, 1)):
        stock, ours = (row for row in report["rows"] if row["engine"] == engine)
        assert "torch" in ours["ran"]
        assert ours["held"] == stock["held"]
        held, _, experts, *_ = ours["held"].split()
        assert int(held) * share == int(experts)
    assert all(line["loss_difference"] < 1e-4 for line in report["summary"])
    # The same data and steps, however the experts lie.
    assert scaling.loss_difference(report["rows"][0]["losses"], report["rows"][2]["losses"]) < 1e-3


def test_without_a_gpu_the_large_models_are_refused(capsys):
    if scaling._cuda():
        pytest.skip("there is a GPU here")
    with pytest.raises(SystemExit):
        scaling.main(["--json", "never.json"])
    assert "--tiny" in capsys.readouterr().err
