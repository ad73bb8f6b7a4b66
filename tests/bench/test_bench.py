"""`moe-kernels bench` on a tiny layer on the CPU: numbers are there, right, and wrong implementations are caught."""

import dataclasses
import io
import itertools
import json
import math
import threading

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import goals
from moe_kernels.reference import reference_experts
from moe_kernels.shapes import LayerShape
from moe_kernels.tools.app import app
from moe_kernels.tools.bench import accuracy, experts, layer, peers, store, timing
from moe_kernels.tools.bench import command as bench_command
from moe_kernels.tools.bench.plots import bytes_moved
from moe_kernels.tools.common import machine

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


def test_recomputing_keeps_less():
    kept, again, _ = measure(implementations=("moe_kernels",), recompute=(False, True))
    assert (kept.implementation, again.implementation) == (
        "moe_kernels[g=128,p=1]",
        "moe_kernels[g=128,p=1,recompute]",
    )
    z = 4 * SHAPE.rows * 2 * SHAPE.intermediate / timing.MIB
    assert kept.saved_mb - again.saved_mb == pytest.approx(z, rel=0.01)
    assert again.rel_error == kept.rel_error


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


def test_in_float32_nobody_is_exact_because_it_rounds_as_the_reference_does():
    """Eager sums in the reference's order: against a float32 reference it had no error, and others were wrong."""
    stock, ours = (row.rel_error for row in measure(implementations=("eager", "moe_kernels"))[:2])
    eps = torch.finfo(torch.float32).eps
    for name, error in stock.items():
        assert 0.1 * eps < error < 10 * eps, name
        assert ours[name] < 2 * error, name


@pytest.mark.parametrize("setting", ["tf32", "ieee"])
def test_the_reference_is_exact_however_tf32_was_chosen(setting):
    switch, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.fp32_precision
    try:
        switch.fp32_precision = setting  # the older switch cannot be read from here on
        with accuracy.exact_float32():
            assert switch.fp32_precision == "ieee"
        assert switch.fp32_precision == setting
    finally:
        switch.fp32_precision = before


def test_routings_differ_in_balance():
    shape = LayerShape("uneven", 512, 16, 16, 32, 4)
    spread = {name: layer.make_layer(shape, name, CPU, torch.float32).imbalance() for name in layer.ROUTINGS}
    assert spread["balanced"] == 1.0
    assert 1.0 < spread["mild"] < spread["heavy"]
    assert spread["heavy"] > 6


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


def test_every_queued_call_rests_as_long(monkeypatch):
    """As long as the slowest launches take, but never so long that the queue of the GPU is full."""
    hosts, rests = {"quick": 1.0, "slow": 4.0}, []

    def once(call, queue_ms=0.0):
        name = call()
        if queue_ms:
            rests.append((name, queue_ms))
        return 10.0, hosts[name]

    clock = timing.Clock(CPU)
    monkeypatch.setattr(clock, "cuda", True)
    monkeypatch.setattr(clock, "once", once)
    calls = {name: (lambda name=name: name) for name in hosts}
    times = clock.compare(calls, 3, cleanup=lambda: None, progress=lambda: None)
    assert times["quick"].queued == timing.Spread(10.0, 10.0, 10.0)
    assert rests[1:] == [("slow", 9.0), ("slow", 9.0), ("quick", 9.0), ("quick", 9.0), ("slow", 9.0)]
    hosts["slow"] = timing.LONGEST_QUEUE_MS
    clock.compare(calls, 3, cleanup=lambda: None, progress=lambda: None)
    assert rests[-1][1] == timing.LONGEST_QUEUE_MS


def test_slow_calls_are_timed_less_often(monkeypatch):
    seconds = iter(range(10**6))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(seconds)))
    calls = ("slow", "also slow")
    counts = dict.fromkeys(calls, 0)

    def counted(name):
        counts[name] += 1

    timed = {name: (lambda name=name: counted(name)) for name in calls}
    timing.Clock(CPU).compare(timed, 9, cleanup=lambda: None, progress=lambda: None)
    assert counts == dict.fromkeys(calls, timing.SLOW_REPEATS)
    monkeypatch.setattr(timing, "SLOW_MS", 1e9)
    timing.Clock(CPU).compare(timed, 9, cleanup=lambda: None, progress=lambda: None)
    assert counts == dict.fromkeys(calls, timing.SLOW_REPEATS + 9)


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
    assert (report["schema"], report["kind"]) == (2, "bench")
    assert report["arguments"]["peers"] == ["eager", "grouped_mm"]
    assert report["ceilings"]["matmul_tflops"] > 0
    assert {"gpu", "driver", "torch", "triton", "transformers", "python", "commit", "command", "date"} <= set(
        report["environment"]
    )
    fields = {field.name for field in dataclasses.fields(experts.Measurement)}
    for row in report["results"]:
        assert set(row) == fields
        assert set(row["forward_ms"]) == {"median", "p20", "p80"}


def test_tokens_are_those_asked_for_on_a_cpu_too(tmp_path):
    file = tmp_path / "bench.json"
    result = bench("--tokens", "32", "--peers", "none", "--json", str(file))
    assert result.exit_code == 0, result.output
    assert {row["tokens"] for row in json.loads(file.read_text())["results"]} == {32}


@pytest.mark.parametrize("command", ["bench", "tune", "verify"])
@pytest.mark.parametrize("names", [",", ""])
def test_no_layer_at_all_is_refused(tmp_path, command, names):
    file = tmp_path / "out.json"
    result = CliRunner().invoke(app, [command, "--shapes", names, "--json", str(file)])
    assert result.exit_code == 2
    assert f"--shapes {names!r} names nothing: choose from " in result.output
    assert not file.exists()


def test_a_seed_beyond_torchs_is_refused():
    result = bench("--seed", "99999999999999999999")
    assert result.exit_code == 2
    assert "'--seed'" in result.output


def test_command_fails_when_an_implementation_is_wrong(monkeypatch):
    monkeypatch.setitem(bench_command.LAYERS, "tiny", SHAPE)
    monkeypatch.setattr(experts, "what_is_wrong", lambda *args: "wrong on purpose")
    result = CliRunner().invoke(app, ["bench", "--shapes", "tiny", "--device", "cpu", "--repeats", "1"])
    assert result.exit_code == 1
    assert "wrong on purpose" in result.output


def bench(*args):
    return CliRunner().invoke(app, ["bench", "--device", "cpu", "--dtype", "fp32", "--repeats", "1", *args])


def test_every_peer_is_measured_or_says_why(monkeypatch):
    results = {row.implementation: row for row in measure(implementations=(*peers.PEERS, "moe_kernels"))}
    assert list(results) == [*peers.PEERS, "moe_kernels", "dense"]
    for name in ("eager", "grouped_mm", "batched_mm", "moe_kernels"):
        assert results[name].ok, results[name].note
        assert results[name].forward_ms
    for name in ("scattermoe", "liger", "sonicmoe"):
        row = results[name]
        assert (row.ok, row.available, row.forward_ms) == (False, False, None)
        assert row.note.endswith(".")
    monkeypatch.setitem(bench_command.LAYERS, "tiny", SHAPE)
    result = bench("--shapes", "tiny", "--peers", "all")
    assert result.exit_code == 0, result.output
    for name in ("scattermoe", "liger", "sonicmoe"):
        assert f"{name} was not measured: " in result.output


BF16, GPU = torch.bfloat16, torch.device("cuda")


def test_why_gpu_peers_cannot_be_measured(monkeypatch):
    for name in ("scattermoe", "liger", "sonicmoe"):
        why_not = peers.PEERS[name].why_not
        assert "fp16" in why_not(SHAPE, GPU, torch.float32)
        assert f"{name} needs an NVIDIA GPU, and this runs on the cpu." == why_not(SHAPE, CPU, BF16)
    import transformers.integrations.sonicmoe  # noqa: F401 (before what it asks is replaced)

    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    assert peers.PEERS["liger"].why_not(SHAPE, GPU, BF16).endswith("Cure: pip install liger-kernel")
    assert peers.PEERS["scattermoe"].why_not(SHAPE, GPU, BF16).endswith("Cure: pip install axolotl")
    assert "'.[peers]'" in peers.PEERS["sonicmoe"].why_not(SHAPE, GPU, BF16)
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: name)
    assert peers.PEERS["liger"].why_not(SHAPE, GPU, BF16) is None
    assert peers.PEERS["scattermoe"].why_not(SHAPE, GPU, BF16) is None
    large = dataclasses.replace(SHAPE, tokens=10**6, hidden=4096, intermediate=4096)
    assert "Use fewer --tokens" in peers.PEERS["batched_mm"].why_not(large, CPU, BF16)


@pytest.mark.parametrize("when", ["set up", "run"])
def test_a_peer_that_fails_is_reported_and_the_others_measured(monkeypatch, when):
    def broken(*args):
        raise RuntimeError("no kernel image\nfor this device")

    experts_of = broken if when == "set up" else lambda layer: broken
    peer = peers.Peer(lambda *args: None, experts_of)
    monkeypatch.setitem(peers.PEERS, "broken", peer)
    results = {row.implementation: row for row in measure(implementations=("broken", "eager"))}
    assert "RuntimeError: no kernel image" in results["broken"].note
    assert "for this device" not in results["broken"].note
    assert results["broken"].available == (when == "run")
    assert not results["broken"].ok
    assert results["eager"].ok


def test_our_own_failure_is_not_reported_but_raised(monkeypatch):
    real = experts.transformers_experts

    def broken(tensors, implementation):
        def fail(*args):
            raise RuntimeError("ours")

        return fail if "bench" in implementation else real(tensors, implementation)

    monkeypatch.setattr(experts, "transformers_experts", broken)
    with pytest.raises(RuntimeError, match="ours"):
        measure()


@pytest.fixture
def two_layers(monkeypatch):
    for name in ("tiny", "other"):
        monkeypatch.setitem(bench_command.LAYERS, name, dataclasses.replace(SHAPE, name=name))
    monkeypatch.setattr("moe_kernels.tools.common.machine.commit", lambda: "abc")
    measured = []
    real = experts.measure

    def counted(shape, **arguments):
        measured.append((shape.name, arguments["routing"]))
        return real(shape, **arguments)

    monkeypatch.setattr(experts, "measure", counted)
    return measured


def test_a_killed_run_goes_on_from_its_file(two_layers, monkeypatch, tmp_path):
    file = tmp_path / "bench.json"
    arguments = ("--shapes", "tiny,other", "--routing", "balanced,heavy", "--peers", "none", "--json", str(file))
    real = experts.measure

    def killed(shape, **options):
        if len(two_layers) == 3:
            raise KeyboardInterrupt
        return real(shape, **options)

    monkeypatch.setattr(experts, "measure", killed)
    assert bench(*arguments).exit_code != 0
    monkeypatch.setattr(experts, "measure", real)
    cells = [(name, routing) for name in ("tiny", "other") for routing in ("balanced", "heavy")]
    assert two_layers == cells[:3]
    before = json.loads(file.read_text())["results"]

    result = bench(*arguments)
    assert result.exit_code == 0, result.output
    assert "holds 3 of 4 layers already" in " ".join(result.output.split())
    assert two_layers == cells
    after = json.loads(file.read_text())["results"]
    assert after[: len(before)] == before
    assert {(row["shape"], row["routing"]) for row in after} == set(cells)

    result = bench(*arguments)
    assert "holds 4 of 4" in " ".join(result.output.split())
    assert two_layers == cells
    assert "wrote" not in result.output
    assert all(f"{name}: T=48" in result.output for name in ("tiny", "other"))
    assert bench(*arguments, "--fresh").exit_code == 0
    assert two_layers == cells * 2


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda report: report["environment"].update(torch="1.0"), "measured with torch='1.0'"),
        (lambda report: report["arguments"].update(repeats=9), "measured with repeats=9, this call has 1"),
        (lambda report: report["environment"].update(sources="0"), "measured with sources='0'"),
        (lambda report: report["environment"].update({"liger-kernel": "0"}), "measured with liger-kernel='0'"),
        (lambda report: report.update(schema=1), "no result of this version"),
        (lambda report: report.pop("environment"), "no result of this version"),
        (lambda report: report.pop("ceilings"), "no result of this version"),
        (lambda report: report["results"][0].pop("routing"), "no result of this version"),
        (lambda report: report.update(results=[[]]), "no result of this version"),
        (None, "is not JSON"),
    ],
)
def test_a_file_of_something_else_is_refused(two_layers, tmp_path, spoil, message):
    file = tmp_path / "bench.json"
    arguments = ("--shapes", "tiny", "--peers", "none", "--json", str(file))
    assert bench(*arguments).exit_code == 0
    report = json.loads(file.read_text())
    if spoil:
        spoil(report)
    text = json.dumps(report) if spoil else file.read_text()[:100]
    file.write_text(text)
    result = bench(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert "--fresh" in result.output
    assert file.read_text() == text, "a refused file must be left alone"
    assert bench(*arguments, "--fresh").exit_code == 0


def test_what_two_calls_write_to_one_file_at_once_is_all_kept(tmp_path):
    file = tmp_path / "bench.json"
    (row, _) = measure(implementations=("moe_kernels",))

    def call(name):
        mine = store.Store(file, {"gpu": None}, {"repeats": 1}, fresh=False)
        for tokens in range(20):
            mine.add([{**row.to_json(), "shape": name, "tokens": tokens}])

    calls = [threading.Thread(target=call, args=(name,)) for name in ("one", "other")]
    for thread in calls:
        thread.start()
    for thread in calls:
        thread.join()
    found = [(row["shape"], row["tokens"]) for row in json.loads(file.read_text())["results"]]
    assert sorted(found) == [(name, tokens) for name in ("one", "other") for tokens in range(20)]


def test_the_hash_of_the_environment_sees_files_that_git_does_not_know(tmp_path, monkeypatch):
    package = tmp_path / "moe_kernels"
    (package / "tools" / "bench").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(machine.moe_kernels, "__file__", str(package / "__init__.py"))
    names = ("sources", "bench_sources")
    seen = [machine.environment()]
    for file in ("moe.py", "tools/bench/timing.py"):
        (package / file).write_text("1")
        seen.append(machine.environment())
    changed = [[a[name] != b[name] for name in names] for a, b in itertools.pairwise(seen)]
    assert changed == [[True, False], [False, True]]


def test_a_place_that_cannot_be_written_to_is_said_before_anything_is_measured(two_layers, tmp_path):
    (tmp_path / "afile").write_text("")
    result = bench("--shapes", "tiny", "--json", str(tmp_path / "afile" / "bench.json"))
    assert result.exit_code == 2
    assert "Cure: name a folder" in result.output
    assert not two_layers


def test_plots(two_layers, tmp_path):
    pytest.importorskip("matplotlib")
    result = bench("--shapes", "tiny,other", "--routing", "mild,heavy", "--peers", "all", "--plots", str(tmp_path))
    assert result.exit_code == 0, result.output
    names = {f"{kind}-{routing}.png" for kind in ("bars", "roofline") for routing in ("mild", "heavy")}
    assert {file.name for file in tmp_path.iterdir()} == names
    assert all(
        file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size > 10_000 for file in tmp_path.iterdir()
    )


def test_missing_matplotlib_is_said_before_anything_is_measured(two_layers, monkeypatch, tmp_path):
    monkeypatch.setattr(bench_command.importlib.util, "find_spec", lambda name: None)
    result = bench("--shapes", "tiny", "--plots", str(tmp_path))
    assert result.exit_code == 3
    assert "'.[report]'" in result.output
    assert not two_layers


def test_bytes_that_must_move():
    """T=2 K=1 H=3 I=5 E=7, counted by hand in 16-bit elements: X 6, weights 315, Z 20, dO 6."""
    row = {"tokens": 2, "top_k": 1, "hidden": 3, "intermediate": 5, "experts": 7}
    forward = 6 + 315 + 20 + 6
    backward = 6 + 6 + 20 + 315 + 6 + 315
    assert bytes_moved(row) == 2 * (forward + backward)


def rows_of(shape, **ours):
    """Rows of a run that reaches every goal, with changes to ours."""
    spread = {"median": 1.0, "p20": 1.0, "p80": 1.0}
    common = {"shape": shape, "routing": "mild", "saved_mb": 1.0, "peak_mb": 1.0, "dense_fraction": 0.9,
              "forward_ms": spread, "forward_backward_host_ms": {**spread, "median": 0.2},
              "forward_backward_queued_ms": spread, "rel_error": {"out": 1e-3}}  # fmt: skip
    slow = {**common, "forward_ms": {**spread, "median": 60.0}}
    return [
        {**common, "implementation": "moe_kernels", **ours},
        {**slow, "implementation": "eager"},
        {**slow, "implementation": "grouped_mm"},
        {**common, "implementation": "dense", "forward_backward_queued_ms": {**spread, "median": 0.95}},
    ]


def test_goals_are_checked():
    everything = [row for shape in goals.DENSE_FRACTION for row in rows_of(shape)]
    found = goals.checks(everything)
    assert all(check.ok for check in found), [check for check in found if not check.ok]
    assert sum("fraction of dense" in check.what for check in found) == 11
    mean = next(check for check in found if check.what.startswith("geometric mean"))
    assert mean.value == pytest.approx(0.95)
    # A mean over fewer layers is none: it could be of the easy ones.
    few = {check.what: check for check in goals.checks(rows_of("mixtral-1b"))}
    assert few[mean.what].ok is None
    assert few["mixtral-1b: forward, times eager"].value == 60
    for change, what in [
        ({"forward_backward_queued_ms": {"median": 1.1}}, "mixtral-1b: fraction of dense, forward + backward"),
        ({"forward_ms": {"median": 20.1}}, "mixtral-1b: forward, times eager"),
        ({"forward_backward_host_ms": {"median": 0.36}}, "mixtral-1b: host ms, forward + backward"),
        ({"saved_mb": 505.0}, "mixtral-1b: saved MiB (2TH + 4TKI bytes and indices)"),
        ({"peak_mb": 1013.0}, "mixtral-1b: peak MiB, SonicMoE's"),
        ({"rel_error": {"out": 3.2e-3}}, "mixtral-1b: worst error over SonicMoE's"),
    ]:
        short = [check.what for check in goals.checks(rows_of("mixtral-1b", **change)) if check.ok is False]
        assert short == [what]
    sonic = {**rows_of("mixtral-1b")[0], "implementation": "sonicmoe", "peak_mb": 0.5, "rel_error": {"out": 1e-4}}
    short = [check.what for check in goals.checks([*rows_of("mixtral-1b"), sonic]) if check.ok is False]
    beaten = "forward + backward, times SonicMoE", "peak MiB, SonicMoE's", "worst error over SonicMoE's"
    assert short == [f"mixtral-1b: {what}" for what in beaten]


def test_goals_of_a_file_are_printed(tmp_path, monkeypatch, capsys):
    file = tmp_path / "layers.json"
    monkeypatch.setattr("sys.argv", ["goals.py", str(file)])
    file.write_text(json.dumps({"results": rows_of("mixtral-1b")}))
    assert goals.main() == 0
    capsys.readouterr()
    file.write_text(json.dumps({"results": rows_of("mixtral-1b", forward_backward_queued_ms={"median": 1.9})}))
    assert goals.main() == 1
    lines = capsys.readouterr().out.splitlines()
    fraction = next(line for line in lines if "mixtral-1b: fraction of dense" in line)
    assert "0.5" in fraction
    assert "at least 0.91" in fraction
    assert "short" in fraction
    assert "not measured" in next(line for line in lines if "geometric mean of all eleven" in line)
    assert "reached" in next(line for line in lines if "mixtral-1b: host ms" in line)


def test_fractions_and_their_mean_are_printed():
    text = io.StringIO()
    rows = rows_of("mixtral-1b", dense_fraction=0.4) + rows_of("olmoe-7b", dense_fraction=0.9)
    bench_command._summarise(Console(file=text, width=150), rows)
    line = next(line for line in text.getvalue().splitlines() if "moe_kernels" in line)
    assert [cell.strip() for cell in line.split("│")[2:5]] == ["0.40", "0.90", "0.600"]


def test_fractions_are_by_routing():
    rows = rows_of("mixtral-1b", dense_fraction=0.4) + rows_of("olmoe-7b", dense_fraction=0.9)
    rows.append({**rows[0], "routing": "heavy", "dense_fraction": 0.1})
    found = bench_command.fractions_of_dense(rows)
    assert found["mild"]["moe_kernels"] == {"mixtral-1b": 0.4, "olmoe-7b": 0.9}
    assert found["heavy"] == {"moe_kernels": {"mixtral-1b": 0.1}}
    assert "dense" not in found["mild"]


@pytest.mark.parametrize(
    "args",
    [["--shapes", "x"], ["--dtype", "x"], ["--routing", "x"], ["--peers", "x"], ["--group-sizes", "100"],
     ["--persistent", "x"], ["--device", "x"]],
)  # fmt: skip
def test_wrong_usage(args):
    result = CliRunner().invoke(app, ["bench", *args])
    assert result.exit_code == 2
    assert "choose from" in result.output
