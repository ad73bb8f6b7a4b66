"""benchmarks/scaling.py: its arithmetic, what it does about a failing run, and a run of tiny models on two ranks."""

import dataclasses
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers.distributed import DistributedConfig

import scaling
from moe_kernels.telemetry.load import LayerLoad, Loads
from moe_kernels.tools.common.errors import UsageError
from moe_kernels.tools.common.runfile import dump_yaml
from moe_kernels.tools.compare.pair import RunSpec
from moe_kernels.tools.compare.runner import Machine
from several_gpus import axolotl_runs, report, trainer_runs, watch
from several_gpus.setting import (
    AXOLOTL_EP,
    BY_AXOLOTL,
    CELLS,
    DDP,
    EP,
    FSDP2,
    FULL,
    LARGE,
    ONE,
    RUNS,
    TRAINER,
    TRAINER_ONE,
    Setting,
    full_micro_batch,
)
from several_gpus.watch import Operation

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "scaling.py"
HAS_EP = "ep_size" in {field.name for field in dataclasses.fields(DistributedConfig)}
SETTING = Setting(2, 6, 1, True, 60.0, None, None)
try:
    PINNED = f"transformers=={metadata.version('transformers')}" in (metadata.requires("axolotl") or [])
except metadata.PackageNotFoundError:
    PINNED = False
with_axolotl = pytest.mark.skipif(not PINNED, reason="needs the extra [axolotl], and the transformers that it pins")


def row(engine, experts, rate, losses=(4.0, 2.0), ok=True):
    cell = report.cell("mixtral", engine, experts, SETTING.ranks(engine))
    times = {"step_ms": {"median": 1.0, "p20": 1.0, "p80": 1.0}, "tokens_per_s_per_gpu": rate}
    return {**cell, "ok": ok, "error": "" if ok else "it broke", "tail": ["why"], "losses": list(losses), **times,
            "peak_gib": None, "ran": "x"}  # fmt: skip


def test_scaling_is_speed_per_gpu_over_that_of_one():
    rows = [row(ONE, "grouped_mm", 100.0), row(ONE, "moe_kernels", 160.0),
            row(FSDP2, "grouped_mm", 90.0), row(FSDP2, "moe_kernels", 120.0)]  # fmt: skip
    one, two = report.summary(rows)
    assert (one["speedup"], one["efficiency_moe_kernels"]) == (1.6, None)
    assert two["speedup"] == pytest.approx(120 / 90)
    assert (two["efficiency_grouped_mm"], two["efficiency_moe_kernels"]) == (0.9, 0.75)


def test_losses_are_compared_relative_to_their_mean():
    assert report.loss_difference([3.0] * 10, [3.3] * 10) == pytest.approx(0.1)
    assert report.loss_difference([3.0] * 10, [3.0] * 7) == 0.0


def test_a_failed_run_is_no_part_of_a_pair():
    (line,) = report.summary(
        [row(FSDP2, "grouped_mm", 9.0), row(FSDP2, "moe_kernels", 9.0, ok=False)]
    )
    assert line["speedup"] is None
    assert line["loss_difference"] is None


def test_what_is_there_is_not_run_again_unless_it_failed(tmp_path):
    path = tmp_path / "scaling.json"
    store = report.Store(path, SETTING, fresh=False)
    store.add(row(FSDP2, "grouped_mm", 9.0))
    store.add(row(FSDP2, "moe_kernels", 9.0, ok=False))
    again = report.Store(path, SETTING, fresh=False)
    assert [r["experts"] for r in again.rows] == ["grouped_mm"]
    assert not again.holds("mixtral", FSDP2)
    again.add(row(FSDP2, "moe_kernels", 9.0))
    assert again.holds("mixtral", FSDP2)
    assert len(report.Store(path, dataclasses.replace(SETTING, timeout_s=99.0), fresh=False).rows) == 2
    assert report.Store(path, SETTING, fresh=True).rows == []


def test_runs_of_another_kind_are_neither_dropped_nor_mixed(tmp_path, monkeypatch):
    path = tmp_path / "scaling.json"
    report.Store(path, SETTING, fresh=False).add(row(FSDP2, "grouped_mm", 9.0))
    with pytest.raises(UsageError, match="steps 6 there, 7 now"):
        report.Store(path, dataclasses.replace(SETTING, steps=7), fresh=False)
    written = json.loads(path.read_text())
    del written["setting"]["liger"]  # as in a file from before there was a choice
    path.write_text(json.dumps(written))
    with pytest.raises(UsageError, match="liger False there, True now"):
        report.Store(path, dataclasses.replace(SETTING, liger=True), fresh=False)
    assert report.Store(path, SETTING, fresh=False).rows
    here = report.environment()
    monkeypatch.setattr(report, "environment", lambda: {**here, "gpu": "another"})
    with pytest.raises(UsageError, match="another now"):
        report.Store(path, SETTING, fresh=False)
    monkeypatch.setattr(report, "environment", lambda: {**here, "sources": "other kernels"})
    with pytest.raises(UsageError, match="other kernels now"):
        report.Store(path, SETTING, fresh=False)
    assert len(json.loads(path.read_text())["rows"]) == 1


def test_each_row_says_what_it_ran_on(tmp_path, monkeypatch):
    path, here = tmp_path / "scaling.json", report.environment()
    for commit, experts in (("old", "grouped_mm"), ("new", "moe_kernels")):
        monkeypatch.setattr(report, "environment", lambda commit=commit: {**here, "commit": commit})
        report.Store(path, SETTING, fresh=False).add(row(FSDP2, experts, 9.0))
    written = json.loads(path.read_text())
    assert written["environment"]["commit"] == "old"
    assert [r["environment"]["commit"] for r in written["rows"]] == ["old", "new"]


@pytest.mark.parametrize("text", ["# no JSON", '{"kind": "bench"}', "[]"])
def test_a_file_of_something_else_is_refused(tmp_path, text):
    path = tmp_path / "scaling.json"
    path.write_text(text)
    with pytest.raises(UsageError):
        report.Store(path, SETTING, fresh=False)


@pytest.fixture
def nothing_made(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(axolotl_runs, "prepare_missing", lambda *_: None)


def test_no_run_of_a_comparison_is_deleted(nothing_made):
    specs = axolotl_runs.one_gpu_specs("mixtral", SETTING)
    assert [spec.folder for spec in specs.values()] == [
        RUNS / f"mixtral-tiny-one-{experts}" for experts in ("grouped_mm", "moe_kernels")
    ]
    for spec in specs.values():
        assert spec.config["output_dir"] == spec.overrides["output_dir"] == str(spec.folder / "output")


def test_what_breaks_a_run_beside_another_is_raised(monkeypatch, tmp_path):
    def breaks(*_):
        raise OSError("no space left")

    monkeypatch.setattr(axolotl_runs, "one_gpu_specs", lambda *_: {"grouped_mm": None, "moe_kernels": None})
    monkeypatch.setattr(axolotl_runs, "row_of", breaks)
    store = report.Store(tmp_path / "scaling.json", SETTING, fresh=False)
    with pytest.raises(OSError, match="no space"):
        scaling.run_family("mixtral", [ONE], SETTING, store, Console())


def test_ranks_end_with_the_time_limit(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, pathlib, time\n"
        f"pathlib.Path({str(tmp_path)!r}, 'pid' + os.environ['RANK']).write_text(str(os.getpid()))\n"
        "time.sleep(120)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    with (tmp_path / "log").open("wb") as sink:
        problem = trainer_runs.torchrun(command, {**os.environ, "OMP_NUM_THREADS": "1"}, sink, 45.0)
    assert "stopped after 45 s" in problem  # a busy machine takes half of it to start them
    pids = [int(path.read_text()) for path in tmp_path.glob("pid*")]
    assert len(pids) == 2, (tmp_path / "log").read_text()
    assert not [pid for pid in pids if Path("/proc", str(pid)).exists()]


def test_a_failing_training_leaves_a_row_and_the_end_of_its_log(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = (sys.executable, "-c", "raise SystemExit('ValueError: no such thing')")
    run = RunSpec(
        "fsdp2-x", "baseline", Path("x.yml"), {}, {"max_steps": 3, "output_dir": "out"}, tmp_path / "run", False
    )
    machine = Machine(None, {}, trainer=trainer, launcher=())
    failed = axolotl_runs.row_of("mixtral", FSDP2, "grouped_mm", run, machine, SETTING)
    assert not failed["ok"]
    assert "no such thing" in failed["error"]
    scaling._say(Console(), failed, 0.0)
    report.show([failed], Console())


def test_1b_models_are_sharded_by_the_run_files_of_several_gpus(nothing_made):
    """What is trained is the shipped file, but for its length and its folders."""
    real = dataclasses.replace(SETTING, tiny=False)
    for family in axolotl_runs.FAMILIES:
        for experts, spec in axolotl_runs.specs_of(family, FSDP2, real).items():
            shipped = axolotl_runs.load_yaml(spec.source)
            assert "multi-gpu" in str(spec.source)
            assert spec.config["moe_kernels" if experts == "moe_kernels" else "fsdp_version"]
            apart = {key for key in shipped.keys() | spec.config.keys() if shipped.get(key) != spec.config.get(key)}
            assert apart == {"max_steps", "output_dir", "wandb_name"}


@pytest.mark.parametrize("family", ["qwen3-moe", "mixtral"])
@pytest.mark.parametrize("engine", [ONE, FSDP2])
def test_liger_is_on_both_sides(family, engine, nothing_made):
    real = dataclasses.replace(SETTING, tiny=False, liger=True)
    plain = axolotl_runs.specs_of(family, engine, dataclasses.replace(real, liger=False))
    for experts, spec in axolotl_runs.specs_of(family, engine, real).items():
        assert spec.config["liger_fused_linear_cross_entropy"]
        assert "axolotl.integrations.liger.LigerPlugin" in spec.config["plugins"]
        assert spec.folder != plain[experts].folder


@with_axolotl
@pytest.mark.parametrize(("family", "engine"), [(f, e) for f, engines in CELLS.items() for e in engines
                                                if e in BY_AXOLOTL])  # fmt: skip
def test_axolotl_accepts_every_cell(family, engine, nothing_made, monkeypatch):
    """A key that Axolotl refuses, or drops without a word, would be found out on rented GPUs."""
    from axolotl.utils.config import prepare_plugins, validate_config
    from axolotl.utils.dict import DictDefault

    from axolotl.integrations import base

    if engine == AXOLOTL_EP and not scaling.has_expert_parallelism():
        pytest.skip("Axolotl's expert parallelism came with 0.20")
    monkeypatch.setattr(axolotl_runs, "full_micro_batch", lambda *_: 2)
    monkeypatch.setattr(axolotl_runs, "gpu_memory", lambda: 150e9)
    hopper = {"bf16": True, "fp8": True, "tf32": True, "n_gpu": 2, "n_node": 1, "compute_capability": "sm_90"}
    real = dataclasses.replace(SETTING, tiny=False)
    for spec in axolotl_runs.specs_of(family, engine, real).values():
        monkeypatch.setattr(base.PluginManager, "_instance", None)
        config = DictDefault(json.loads(json.dumps(spec.config)))
        prepare_plugins(config)
        found = validate_config(config, capabilities=hopper, env_capabilities={"torch_version": "2.13.0"}).to_dict()
        lost = {key for key, value in spec.config.items()
                if key not in ("datasets", "fsdp_config", "plugins") and found.get(key) != value}  # fmt: skip
        assert not lost
        assert ("fsdp_version" in spec.config) == (engine not in (ONE, DDP))
        assert (spec.config.get("adapter") == "lora") == (family == LARGE)
        assert dump_yaml(spec.config)
        if family == FULL:
            assert not [key for key in spec.config if "lora" in key or key == "adapter"]
            assert spec.config["micro_batch_size"] == 2


def test_all_weights_of_the_large_model_train_where_they_fit():
    h200, h100 = 150e9, 85e9
    assert [full_micro_batch(gpus, h200) for gpus in (1, 2, 4, 8)] == [None, 2, 4, 4]
    assert [full_micro_batch(gpus, h100) for gpus in (2, 4)] == [None, 2]


def test_trainers_engines_are_measured_against_trainer_on_one_gpu():
    rows = [row(ONE, "moe_kernels", 200.0), row(EP, "moe_kernels", 90.0)]
    assert report.summary(rows)[1]["efficiency_moe_kernels"] == 0.45
    rows.append(row(TRAINER_ONE, "moe_kernels", 100.0))
    assert [line["efficiency_moe_kernels"] for line in report.summary(rows)] == [None, 0.9, None]


def test_a_start_of_ranks_serves_engines_that_stand_together(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(trainer_runs, "rows", lambda family, engines, setting: asked.append(engines) or [])
    monkeypatch.setattr(axolotl_runs, "rows", lambda family, engine, *_: asked.append(engine) or [])
    store = report.Store(tmp_path / "s.json", SETTING, fresh=False)
    for experts in ("grouped_mm", "moe_kernels"):
        store.add({**row(TRAINER, experts, 1.0), "family": "deepseek-v3"})
    for family in ("qwen2-moe", "deepseek-v3", "mixtral"):
        scaling.run_family(family, [ONE, TRAINER_ONE, TRAINER, EP], SETTING, store, Console())
    assert asked == [ONE, [TRAINER_ONE], [TRAINER, EP], ONE, [TRAINER_ONE], [EP], ONE, [TRAINER_ONE], [TRAINER]]


# ------------------------------------------------------------------------------------------------- what is watched
def test_exposed_is_what_no_other_kernel_hides():
    def op(name, begin, end):
        return Operation(name, begin, end)

    gather = "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
    found = watch.shares(
        [
            op("gemm", 0, 4000), op(gather, 3000, 6000), op("gemm", 5000, 7000),  # 1 ms of 3 alone
            op("ncclDevKernel_SendRecv(x)", 8000, 9000), op(gather, 8500, 9500),  # two that overlap
            op("Memcpy DtoD", 9900, 10000),
        ],
        steps=2,
    )  # fmt: skip
    assert found["window_ms"] == 5.0
    assert found["communication_ms"] == (3.0 + 1.5) / 2
    assert found["exposed_ms"] == (1.0 + 1.5) / 2
    assert found["idle_ms"] == pytest.approx((1.0 + 0.4) / 2)
    assert found["collectives_ms"] == {"AllGather": 2.0, "SendRecv": 0.5}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "ReduceScatter"),
        ("ncclSymkDevKernel_AllGather_LL(ncclSymkDevWorkArgs const*)", "AllGather"),
        ("ncclKernel_AllReduce_RING_LL_Sum_float(ncclWorkElem)", "AllReduce"),
        ("gloo:all_to_all", "all_to_all"),
        ("void at::native::elementwise_kernel<128, 2>", None),
        ("nccl:all_reduce", None),  # the annotation around the kernel
    ],
)
def test_collectives_are_known_by_name(name, kind):
    assert Operation(name, 0, 1).collective == kind


def test_busiest_rank():
    even, one_sided = LayerLoad((1, 3, 2, 2), 8), LayerLoad((4, 2, 1, 1), 8)
    assert watch.rank_imbalance(Loads.of([even, one_sided]), 2) == {"mean": 1.25, "worst": 1.5}
    assert watch.rank_imbalance(Loads.of([even, one_sided]), 1) == {"mean": 1.0, "worst": 1.0}


@pytest.mark.slow
@pytest.mark.skipif(not HAS_EP, reason="expert parallelism needs transformers 5.19: make test-newest")
def test_a_tiny_model_on_two_ranks(tmp_path):
    found = run_tiny(tmp_path, "--engines", "ep,trainer", "--families", "qwen2-moe", "--steps", "6", "--warmup", "1")
    for engine, share in ((EP, 2), (TRAINER, 1)):
        stock, ours = (row for row in found["rows"] if row["engine"] == engine)
        assert "torch" in ours["ran"]
        assert ours["held"] == stock["held"]
        held, _, experts, *_ = ours["held"].split()
        assert int(held) * share == int(experts)
        for each in (stock, ours):
            assert [0.0 < one["communication_ms"] < one["window_ms"] for one in each["traffic"]] == [True, True]
            assert ("all_to_all" in each["traffic"][0]["collectives_ms"]) == (engine == EP)
    assert all(line["loss_difference"] < 1e-4 for line in found["summary"])
    # The same data and steps, however the experts lie.
    assert report.loss_difference(found["rows"][0]["losses"], found["rows"][2]["losses"]) < 1e-3
    assert len({json.dumps(each["imbalance"]) for each in found["rows"]}) == 1


@with_axolotl
@pytest.mark.skipif(
    torch.version.cuda is not None and not torch.cuda.is_available(),
    reason="Axolotl asks CUDA which ranks are peers, which a CUDA build of torch refuses without a GPU",
)
@pytest.mark.axolotl
@pytest.mark.slow
def test_axolotl_trains_a_large_models_adapter_on_two_ranks(tmp_path):
    """`axolotl train` itself, in ranks that talk gloo, on weights drawn in each of them."""
    found = run_tiny(tmp_path, "--engines", "ddp", "--families", "qwen3-moe", "--steps", "6", "--warmup", "1")
    stock, ours = found["rows"]
    assert stock["weights"] == ours["weights"] != ""
    assert report.loss_difference(stock["losses"], ours["losses"]) < 1e-4
    assert "expert calls dispatched" in ours["ran"]
    assert len(ours["traffic"]) == 2
    assert ours["imbalance"]["worst"] > 1


def run_tiny(folder, *options):
    command = [sys.executable, str(SCRIPT), "--tiny", *options, "--timeout", "420", "--json", "scaling.json"]
    # The newest transformers may stand on a relative path, and the run has a folder of its own.
    paths = [str(Path(path).resolve()) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads((folder / "scaling.json").read_text())


def test_without_a_gpu_the_large_models_are_refused(capsys):
    if scaling.cuda():
        pytest.skip("there is a GPU here")
    with pytest.raises(SystemExit):
        scaling.main(["--json", "never.json"])
    assert "--tiny" in capsys.readouterr().err


def test_liger_with_trainer_is_refused(capsys):
    with pytest.raises(SystemExit):
        scaling.main(["--tiny", "--liger", "--engines", TRAINER, "--json", "never.json"])
    assert "--liger says nothing" in capsys.readouterr().err


@pytest.mark.parametrize("gpus", ["0", "-2"])
def test_no_gpus_are_refused(capsys, gpus):
    """Trainer was started on no ranks, until the time limit."""
    with pytest.raises(SystemExit):
        scaling.main(["--tiny", "--gpus", gpus, "--json", "never.json"])
    assert f"--gpus {gpus}: name at least one" in capsys.readouterr().err
