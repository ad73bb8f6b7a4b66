"""`moe-kernels verify`: passes on a right backend, and fails on one broken on purpose."""

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from moe_kernels import backends
from moe_kernels.backends.torch import TorchBackend
from moe_kernels.reference import reference_experts
from moe_kernels.shapes import LayerShape
from moe_kernels.tools import verify
from moe_kernels.tools.app import app
from moe_kernels.tools.check import verification
from moe_kernels.tools.check.problems import Case, make_inputs, rerouted
from moe_kernels.tools.check.verification import TORCH_CONFIGURATIONS, verify_case

SHAPE = LayerShape("tiny", 33, 40, 24, 5, 2)
ROUTINGS = ("random", "sentinels", "empty_first_middle_last")


def judge(dtype=torch.bfloat16, **changes):
    options = {
        "device": torch.device("cpu"),
        "routings": ROUTINGS,
        "configurations": TORCH_CONFIGURATIONS,
        "backend": "torch",
    }
    return verify_case(Case.of(SHAPE, dtype), SHAPE.name, **{**options, **changes})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_right_backend_passes(dtype):
    (verdict,) = judge(dtype=dtype)
    assert verdict.ok, verdict.failures
    assert verdict.backend == "torch"
    assert verdict.routings == len(ROUTINGS)
    assert 0 < verdict.rms_ratio < 2


@pytest.mark.parametrize("wrong", [None, 1, 2])
def test_what_sizes_decide_is_checked_both_ways(wrong, monkeypatch):
    """On Hopper sizes and card choose how the kernels work, and those of the check may choose otherwise."""
    mainloop = pytest.importorskip("moe_kernels.kernels.hopper.mainloop")
    seen = []

    def experts(*tensors, backend, group_size, persistent, **options):
        backends.count_dispatch(backend)
        seen.append(mainloop.k_blocks_per_wait("up", None, None))  # without a choice it would look at its arguments
        out = reference_experts(*tensors, **options)
        return out * 2 if seen[-1] == wrong else out

    monkeypatch.setattr(backends, "select", lambda problem, backend: ("gluon", ""))
    monkeypatch.setattr(verification, "fused_experts", experts)
    with backends.uncounted():
        (verdict,) = judge(routings=("random",))
    assert seen == [1, 1, 2, 2]
    assert verdict.ok == (wrong is None)
    tiles = {1: "cooperative tiles", 2: "ping-pong tiles"}
    assert all(f"random, {tiles[wrong]}" in failure for failure in verdict.failures)


def broken(step, breakage):
    """The torch backend's function ``step`` with its first result changed by ``breakage``."""
    original = getattr(TorchBackend, step)

    def changed(*args, **options):
        result = original(*args, **options)
        breakage(result[0] if isinstance(result, tuple) else result)
        return result

    return changed


BREAKAGES = {
    "half a percent too large": lambda t: t.mul_(1.005),
    "last row lost": lambda t: t[-1].zero_(),
    "unwritten element": lambda t: t.view(-1)[0].fill_(float("nan")),
    "not repeatable": lambda t: t.add_(torch.randn_like(t) * 1e-4),
}


@pytest.mark.parametrize("step", ["combine", "combine_grad", "wgrad"])
@pytest.mark.parametrize("breakage", BREAKAGES)
def test_a_broken_backend_fails(monkeypatch, step, breakage):
    monkeypatch.setattr(TorchBackend, step, broken(step, BREAKAGES[breakage]))
    (verdict,) = judge(routings=("random",))
    assert not verdict.ok
    assert verdict.failures


def test_a_backend_that_did_not_run_fails(monkeypatch):
    monkeypatch.setattr("moe_kernels.backends.count_dispatch", lambda name: None)
    (verdict,) = judge(routings=("random",))
    assert "did not run" in verdict.failures[0]


def test_an_unsupported_backend_fails():
    if torch.cuda.is_available():
        pytest.skip("a GPU runs the triton backend")
    (verdict,) = judge(backend="triton", routings=("random",), dtype=torch.float64)
    assert "cannot run" in verdict.failures[0]


@pytest.mark.parametrize("reduce", [True, False])
def test_another_routing_of_the_same_inputs(reduce):
    case = Case(9, 2, 5, 8, 4, torch.float32, "random", bias=True, lora_rank=2, reduce=reduce)
    for routing in ROUTINGS:
        wanted = make_inputs(replace(case, routing=routing))
        found = rerouted(make_inputs(case), replace(case, routing=routing))
        assert torch.equal(found.topk_ids, wanted.topk_ids), routing
        assert found.leaves().keys() == wanted.leaves().keys()
        assert all(torch.equal(tensor, wanted.leaves()[name]) for name, tensor in found.leaves().items()), routing
        assert torch.equal(found.grad, wanted.grad)


@pytest.mark.slow
def test_command_passes_and_writes_json(tmp_path):
    file = tmp_path / "verify.json"
    result = CliRunner().invoke(app, ["verify", "--device", "cpu", "--json", str(file)])
    assert result.exit_code == 0, result.output
    assert "8 of 8 configurations right on the CPU" in result.output
    report = json.loads(file.read_text())
    assert report["kind"] == "verify"
    assert {row["shape"] for row in report["results"]} >= {"odd", "one-token", "mixtral-1b", "deepseek-v3-1b"}


def test_a_file_that_cannot_be_written_is_said_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr("moe_kernels.tools.check.verification.verify_case", None)  # not called
    (tmp_path / "file").touch()
    result = CliRunner().invoke(app, ["verify", "--device", "cpu", "--json", str(tmp_path / "file" / "verify.json")])
    assert result.exit_code == 2
    assert "name a folder, or move away the file" in result.output
    monkeypatch.setattr("os.access", lambda path, mode: False)
    result = CliRunner().invoke(app, ["verify", "--device", "cpu", "--json", str(tmp_path / "new" / "verify.json")])
    assert result.exit_code == 3
    assert "run this in a folder that you may write to" in " ".join(result.output.split())


def test_command_fails_with_the_reason(monkeypatch):
    monkeypatch.setattr(TorchBackend, "combine", broken("combine", BREAKAGES["half a percent too large"]))
    monkeypatch.setattr(verify, "SMALL_SHAPES", (SHAPE,))
    result = CliRunner().invoke(app, ["verify", "--device", "cpu", "--shapes", "small"])
    assert result.exit_code == 1
    assert "WRONG" in result.output
    assert "slope error" in result.output


def test_a_backend_that_cannot_run_here_is_a_sentence():
    result = CliRunner().invoke(app, ["verify", "--device", "cpu", "--shapes", "small", "--backend", "gluon"])
    assert result.exit_code == 2
    assert "Nothing of this runs here" in result.output
    assert "WRONG" not in result.output


@pytest.mark.parametrize(
    "args", [["--dtype", "fp8"], ["--shapes", "nonesuch"], ["--backend", "x"], ["--device", "tpu"]]
)
def test_wrong_usage(args):
    result = CliRunner().invoke(app, ["verify", *args])
    assert result.exit_code == 2
    assert "choose from" in result.output


def test_help_names_the_backends_that_are_registered(monkeypatch):
    monkeypatch.setattr(verify, "names", lambda: ("auto", "triton", "somebodys"))
    result = CliRunner().invoke(app, ["verify", "--help"], env={"COLUMNS": "200"})
    assert "auto, triton, somebodys." in result.output


def test_no_gpu_is_missing():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert CliRunner().invoke(app, ["verify", "--device", "cuda"]).exit_code == 3
