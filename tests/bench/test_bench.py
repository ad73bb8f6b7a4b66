"""`moe-kernels bench` on a tiny layer on the CPU: numbers are there, right, and wrong implementations are caught."""

import dataclasses
import json
import math

import pytest
import torch
from typer.testing import CliRunner

from moe_kernels.bench import accuracy, experts, layer, timing
from moe_kernels.bench import command as bench_command
from moe_kernels.cli.app import app
from moe_kernels.reference import reference_experts
from moe_kernels.shapes import LayerShape

pytest.importorskip("transformers")
SHAPE = LayerShape("tiny", 48, 32, 24, 6, 2)
CPU = torch.device("cpu")
SPREADS = ("forward_ms", "forward_backward_ms", "forward_host_ms", "forward_backward_host_ms")


def measure(**changes):
    return experts.measure(SHAPE, **{"device": CPU, "dtype": torch.float32, "repeats": 2, **changes})


def test_every_implementation_is_measured_and_right():
    results = {row.implementation: row for row in measure()}
    assert list(results) == ["eager", "grouped_mm", "moe_kernels", "dense"]
    for row in results.values():
        assert row.ok, row.note
        for name in SPREADS:
            spread = getattr(row, name)
            assert 0 < spread.p20 <= spread.median <= spread.p80
        assert row.forward_tflops == pytest.approx(SHAPE.forward_flops / row.forward_ms.median * 1e-9)
        assert row.launches_forward is None
        assert row.peak_mb is None
    for name in ("eager", "grouped_mm", "moe_kernels"):
        assert set(results[name].rel_error) == {"out", "dx", "dgate_up", "ddown", "dw"}
        assert max(results[name].rel_error.values()) < 1e-5
    assert results["dense"].dense_fraction == 1.0


def test_saved_memory_of_ours_is_what_the_op_promises():
    """X, Z, the routing weights and the plan; neither A, nor Y, nor gathered rows."""
    (row, _) = measure(implementations=("moe_kernels",))
    floats = SHAPE.tokens * SHAPE.hidden + SHAPE.rows * 2 * SHAPE.intermediate + SHAPE.rows
    saved = row.saved_mb * timing.MIB
    assert saved >= 4 * floats
    # The plan is integers of the size of the rows and tiles.
    assert saved < 4 * (floats + 8 * SHAPE.rows + 200)


def test_knobs_become_rows():
    names = [row.implementation for row in measure(implementations=("moe_kernels",), group_sizes=(64, "auto"),
                                                   persistent=(True, False))]  # fmt: skip
    assert names == [
        "moe_kernels[g=64,p=1]", "moe_kernels[g=64,p=0]", "moe_kernels[g=auto,p=1]", "moe_kernels[g=auto,p=0]",
        "dense",
    ]  # fmt: skip


@pytest.mark.parametrize("breakage", [lambda out: out * 1.001, lambda out: out * math.nan])
def test_a_wrong_implementation_is_not_timed(monkeypatch, breakage):
    real = experts.transformers_experts

    def sabotaged(tensors, implementation):
        runner = real(tensors, implementation)
        return (lambda *args: breakage(runner(*args))) if "bench" in implementation else runner

    monkeypatch.setattr(experts, "transformers_experts", sabotaged)
    row = next(row for row in measure() if row.implementation == "moe_kernels")
    assert not row.ok
    assert "wrong out" in row.note
    assert row.forward_ms is None


@pytest.mark.parametrize("routing", layer.ROUTINGS)
def test_errors_agree_with_the_reference_in_one_piece(routing):
    tensors = layer.make_layer(SHAPE, routing, CPU, torch.float32)

    def bf16(x, ids, weights):
        return reference_experts(
            x.bfloat16(), ids, weights, tensors.gate_up.bfloat16(), tensors.down.bfloat16()
        ).float()

    found = accuracy.relative_errors(tensors, bf16)
    out = bf16(tensors.x, tensors.topk_ids, tensors.topk_weights)
    ours = torch.autograd.grad(out, tuple(tensors.leaves().values()), tensors.grad_out)
    true_out = reference_experts(tensors.x, tensors.topk_ids, tensors.topk_weights, tensors.gate_up, tensors.down)
    truth = torch.autograd.grad(true_out, tuple(tensors.leaves().values()), tensors.grad_out)
    for name, a, b in zip(("out", *tensors.leaves()), (out, *ours), (true_out, *truth), strict=True):
        assert found[name] == pytest.approx(((a - b).norm() / b.norm()).item(), rel=1e-3)
        assert 1e-4 < found[name] < 0.1
    assert all(leaf.grad is None for leaf in tensors.leaves().values())


def test_routings_differ_in_balance():
    shape = LayerShape("uneven", 512, 16, 16, 32, 4)
    spread = {name: layer.make_layer(shape, name, CPU, torch.float32).imbalance() for name in layer.ROUTINGS}
    assert spread["balanced"] == 1.0
    assert 1.0 < spread["mild"] < spread["hot"]
    assert spread["hot"] > 6


def test_a_layer_is_the_same_for_the_same_seed():
    first, second, other = (layer.make_layer(SHAPE, "mild", CPU, torch.float32, seed) for seed in (0, 0, 1))
    assert torch.equal(first.gate_up, second.gate_up)
    assert torch.equal(first.topk_ids, second.topk_ids)
    assert not torch.equal(first.x, other.x)


def test_spread():
    spread = timing.Spread.of([float(n) for n in range(11)])
    assert (spread.p20, spread.median, spread.p80) == (2.0, 5.0, 8.0)
    assert timing.Spread.of([3.0]) == timing.Spread(3.0, 3.0, 3.0)


def test_the_clock_takes_turns():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    timing.Clock(CPU).compare(calls, 3, cleanup=lambda: None, progress=lambda: None)
    assert "".join(order) == "abcbcacab"


def test_saved_bytes_counts_each_storage_once():
    weight = torch.randn(8, 8, requires_grad=True)
    x = torch.randn(4, 8, requires_grad=True)
    # relu saves its result, which is the second product's input: one storage, kept twice.
    assert timing.saved_bytes(lambda: (x @ weight).relu() @ weight, [weight]) == x.nbytes + 4 * 8 * 4


def test_unknown_implementation():
    with pytest.raises(ValueError, match="choose from eager"):
        measure(implementations=("nonesuch",))


def test_command_writes_the_schema(tmp_path, monkeypatch):
    monkeypatch.setitem(bench_command.LAYERS, "tiny", SHAPE)
    file = tmp_path / "out" / "bench.json"
    result = CliRunner().invoke(
        app,
        ["bench", "--shapes", "tiny", "--device", "cpu", "--dtype", "fp32", "--repeats", "2", "--json", str(file)],
    )
    assert result.exit_code == 0, result.output
    assert "nothing about speed" in result.output
    report = json.loads(file.read_text())
    assert (report["schema"], report["kind"]) == (1, "bench")
    assert {"gpu", "driver", "torch", "triton", "transformers", "python", "commit", "command", "date"} <= set(
        report["environment"]
    )
    fields = {field.name for field in dataclasses.fields(experts.Measurement)}
    for row in report["results"]:
        assert set(row) == fields
        assert set(row["forward_ms"]) == {"median", "p20", "p80"}


def test_command_fails_when_an_implementation_is_wrong(monkeypatch):
    monkeypatch.setitem(bench_command.LAYERS, "tiny", SHAPE)
    monkeypatch.setattr(experts, "what_is_wrong", lambda *args: "wrong on purpose")
    result = CliRunner().invoke(app, ["bench", "--shapes", "tiny", "--device", "cpu", "--repeats", "1"])
    assert result.exit_code == 1
    assert "wrong on purpose" in result.output


@pytest.mark.parametrize(
    "args",
    [["--shapes", "x"], ["--dtype", "x"], ["--routing", "x"], ["--implementations", "x"], ["--group-sizes", "100"],
     ["--persistent", "x"], ["--device", "x"]],
)  # fmt: skip
def test_wrong_usage(args):
    result = CliRunner().invoke(app, ["bench", *args])
    assert result.exit_code == 2
    assert "choose from" in result.output
