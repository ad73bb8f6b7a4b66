"""Which triton runs the Hopper kernels: by what its Gluon has, and past the tried releases only after a check."""

import json
import logging
import subprocess
import sys
import types

import pytest
import torch
import triton

from moe_kernels import backends, trial
from moe_kernels.activation import Activation, Gate
from moe_kernels.backends import gluon
from moe_kernels.kernels import device
from moe_kernels.kernels.hopper import gluon_names
from moe_kernels.kernels.tiles import tuned
from moe_kernels.layer import Weight
from moe_kernels.routing import TokenRows

GPU = torch.device("cuda", 0)
HOPPER = backends.Problem("cuda", (9, 0), torch.bfloat16, experts=8, top_k=2, hidden=1024, intermediate=512)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(tuned.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(tuned, "device_name", lambda device: "NVIDIA H200")
    trial.refusal.cache_clear()
    yield tmp_path
    trial.refusal.cache_clear()


@pytest.fixture
def check(cache, monkeypatch):
    """check(script): the process that judges is this script; returns how often one was started, as a list."""
    started = []

    def chosen(script):
        real = subprocess.run

        def run(command, **options):
            assert command == [sys.executable, "-m", trial.CHECK, "0"]
            started.append(command)
            return real([sys.executable, "-c", script], **options)

        monkeypatch.setattr(
            trial, "subprocess", types.SimpleNamespace(run=run, TimeoutExpired=subprocess.TimeoutExpired)
        )
        return started

    return chosen


def again():
    """The verdict as another process gets it."""
    trial.refusal.cache_clear()
    return trial.refusal(GPU)


@pytest.fixture
def tried(monkeypatch):
    """As under a release that was tried: torch may have brought a newer one."""
    monkeypatch.setattr(gluon_names, "TRIED", (gluon_names.release(),))


def test_the_installed_gluon_has_all_that_the_kernels_use(tried):
    assert gluon_names.lacks() is None
    assert gluon.GluonBackend().why_not(HOPPER) is None


@pytest.mark.parametrize(("columns", "gathers"), [(512, True), (2048, True), (1408, False), (2304, False)])
def test_rows_of_x_are_gathered_where_gate_up_is_narrow(columns, gathers, monkeypatch):
    monkeypatch.setattr(gluon.TritonBackend, "gather", lambda self, x, plan: "copied")
    x, gate_up = torch.zeros(4, 64, dtype=torch.bfloat16), torch.zeros(2, columns, 64, dtype=torch.bfloat16)
    plan = types.SimpleNamespace(top_k=2)
    rows = gluon.GluonBackend().x_rows(x, gate_up, plan)
    assert rows == (TokenRows(x, 2) if gathers else "copied")
    with gluon.use_gathered(not gathers):
        assert isinstance(gluon.GluonBackend().x_rows(x, gate_up, plan), TokenRows) is not gathers


@pytest.mark.parametrize(
    ("columns", "rows", "copies"),
    [(4096, 4096, True), (4032, 4096, False), (3072, 512, False), (3072, 64, True), (1024, 128, False)],
)
def test_up_reads_a_copy_of_x_where_gate_up_is_wide(columns, rows, copies, monkeypatch):
    seen = []
    monkeypatch.setattr(gluon.TritonBackend, "gather", lambda self, x, plan: "copied")
    monkeypatch.setattr(gluon.gemm, "up", lambda rows, *_: seen.append(rows))
    x, gate_up = torch.zeros(4, 64, dtype=torch.bfloat16), torch.zeros(2, columns, 64, dtype=torch.bfloat16)
    plan = types.SimpleNamespace(top_k=2, rows_per_expert=rows)
    arguments = x, Weight(gate_up), plan, Gate(Activation("silu")), True
    gluon.GluonBackend().up(*arguments)
    with gluon.use_gathered(copies):
        gluon.GluonBackend().up(*arguments)
    assert [isinstance(rows, TokenRows) for rows in seen] == [not copies, copies]


def test_a_name_of_either_release_will_do(monkeypatch):
    module = types.SimpleNamespace(async_copy_global_to_shared="old", other="else")
    monkeypatch.setitem(sys.modules, "tma", module)
    assert gluon_names._find("tma", gluon_names._LOAD) == "old"
    module.async_load = "new"
    assert gluon_names._find("tma", gluon_names._LOAD) == "new"


def test_what_is_missing_is_named_and_the_triton_kernels_run(monkeypatch):
    from triton.experimental.gluon.language.nvidia import hopper

    monkeypatch.delattr(hopper, "warpgroup_mma")
    assert gluon_names.lacks() == "triton.experimental.gluon.language.nvidia.hopper.warpgroup_mma"
    monkeypatch.setattr(gluon, "_LACKS", gluon_names.lacks())
    backends.select.cache_clear()
    chosen, why = backends.select(HOPPER)
    assert chosen == "triton"
    assert f"the Gluon of triton {triton.__version__} has no triton.experimental" in why
    with pytest.raises(backends.UnsupportedProblem, match=r"use backend='triton', or install triton 3\.6 or 3\.7"):
        backends.select(HOPPER, "gluon")
    backends.select.cache_clear()


WITHOUT_GLUON = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("triton.experimental.gluon"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
import torch
for name in [name for name in sys.modules if name.startswith("triton")]:
    del sys.modules[name]
sys.meta_path.insert(0, Absent())
import triton
real = triton.__version__
import moe_kernels
from moe_kernels import backends
problem = backends.Problem("cuda", (9, 0), torch.bfloat16, 8, 2, 1024, 512)
print(backends.select(problem)[0], "|", backends.why_not("gluon", problem))
"""


def test_a_gluon_without_aggregates_is_named(monkeypatch):
    monkeypatch.delattr(triton.language.core, "_aggregate")
    assert gluon_names.lacks() == "triton.language.core._aggregate"


@pytest.mark.parametrize("fields", [{"size": 1}, {"size": 1, "TOP_K": 2, "other": 3}], ids=["too few", "too many"])
def test_an_aggregate_takes_each_of_its_fields(fields):
    @gluon_names.aggregate
    class Sizes:
        size: triton.language.constexpr
        TOP_K: triton.language.constexpr

    assert Sizes(TOP_K=2, size=1).size.value == 1
    with pytest.raises(TypeError, match="Sizes takes size, TOP_K, not size"):
        Sizes(**fields)


def test_a_triton_without_gluon_runs_the_triton_kernels():
    """In a process of its own: this one has imported Gluon already."""
    ran = subprocess.run([sys.executable, "-c", WITHOUT_GLUON], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("triton | the Gluon of triton")
    assert "has no triton.experimental.gluon.jit" in ran.stdout


@pytest.fixture
def untried(monkeypatch):
    monkeypatch.setattr(gluon_names, "TRIED", ("0.1",))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    backends.select.cache_clear()
    yield
    backends.select.cache_clear()


def test_a_release_that_was_tried_is_not_checked(check, tried):
    started = check("raise SystemExit(1)")
    assert gluon.GluonBackend().why_not(HOPPER) is None
    assert not started


def test_an_untried_release_runs_once_its_check_passed(check, untried, caplog):
    started = check("")
    with caplog.at_level(logging.INFO, "moe_kernels"):
        assert backends.select(HOPPER)[0] == "gluon"
    assert f"are right under triton {triton.__version__} on NVIDIA H200" in caplog.text
    assert again() is None
    assert len(started) == 1


def test_an_untried_release_that_fails_is_not_used_and_the_log_says_why(check, untried, caplog):
    started = check("import sys; print('dx: rms error 3.1 > 0.01', file=sys.stderr); sys.exit(1)")
    with caplog.at_level(logging.INFO, "moe_kernels"):
        chosen, why = backends.select(HOPPER)
    assert chosen == "triton"
    assert "its check failed: dx: rms error 3.1 > 0.01" in why
    assert why in caplog.text
    verdict = again()
    assert "remove it to check again" in verdict
    assert len(started) == 1


def test_one_that_crashes_is_a_refusal(check, untried):
    check("import os, signal; os.kill(os.getpid(), signal.SIGABRT)")
    assert trial.refusal(GPU).startswith("its check failed: exit code -6")


def test_one_that_hangs_is_a_refusal(check, untried, monkeypatch):
    check("import time; time.sleep(60)")
    monkeypatch.setattr(trial, "PATIENCE", 0.2)
    assert trial.refusal(GPU) == "its check did not end in 0 s"


def test_a_full_gpu_says_nothing_about_the_kernels(check, untried):
    started = check(f"import sys; print('too little free memory', file=sys.stderr); sys.exit({trial.OUT_OF_MEMORY})")
    assert trial.refusal(GPU) == "its check failed: too little free memory"
    again()
    assert len(started) == 2, "a verdict was kept"


def test_other_kernels_versions_and_cards_are_checked_anew(check, untried, monkeypatch):
    started = check("")
    names = set()
    for change in (lambda: None, lambda: monkeypatch.setattr(torch, "__version__", "9.9"),
                   lambda: monkeypatch.setattr(triton, "__version__", "9.9.0"),
                   lambda: monkeypatch.setattr(tuned, "device_name", lambda device: "NVIDIA H100")):  # fmt: skip
        change()
        names.add(trial._file(GPU).name)
        assert again() is None
    assert len(names) == len(started) == 4


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", json.dumps({"schema": 2, "kind": "trial", "refusal": None})])
def test_a_broken_verdict_is_no_permission(check, untried, text):
    started = check("")
    trial._file(GPU).write_text(text)
    assert "remove it to check again" in trial.refusal(GPU)
    assert not started


def test_a_cache_that_cannot_be_written_costs_a_check_each_time(check, untried, cache, monkeypatch, caplog):
    started = check("")
    (cache / "file").write_text("")
    monkeypatch.setenv(tuned.CACHE_VARIABLE, str(cache / "file"))
    assert again() is None
    assert again() is None
    assert len(started) == 2
    assert "can be kept" in caplog.text


@pytest.mark.parametrize(
    "error", [RuntimeError("0 active drivers"), subprocess.CalledProcessError(1, "gcc"), FileNotFoundError("gcc")]
)
def test_a_triton_that_cannot_launch_is_said_before_the_first_launch(monkeypatch, error):
    """A layer would say so in the first step only, after the model was loaded and the data prepared."""

    class Driver:
        @property
        def active(self):
            raise error

    monkeypatch.setattr(device, "interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(triton.runtime, "driver", Driver())
    device.driver_fault.cache_clear()
    backends.select.cache_clear()
    with pytest.raises(backends.UnsupportedProblem, match=r"cannot launch on the GPU that torch sees .* C compiler"):
        backends.select(HOPPER)
    device.driver_fault.cache_clear()


def test_the_interpreter_beside_a_gpu_is_refused(monkeypatch):
    """A variable that was left over: losses would be wrong in bfloat16, and steps take minutes."""
    monkeypatch.setattr(device, "interpreting", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    backends.select.cache_clear()
    with pytest.raises(backends.UnsupportedProblem, match=r"TRITON_INTERPRET=1 runs .* on the CPU.* unset"):
        backends.select(HOPPER)
    backends.select.cache_clear()
