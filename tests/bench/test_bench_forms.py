"""`moe-kernels bench --form`: each form is right and timed, wrong ones and peers that have none of it say so."""

import dataclasses
import json

import pytest
import torch
from typer.testing import CliRunner

from moe_kernels.backends.torch import TorchBackend
from moe_kernels.shapes import LayerShape
from moe_kernels.tools.app import app
from moe_kernels.tools.bench import command as bench_command
from moe_kernels.tools.bench import experts
from moe_kernels.tools.bench.layer import make_layer
from moe_kernels.tools.check.forms import FORMS, in_form
from moe_kernels.tools.check.problems import Case

pytest.importorskip("transformers")
SHAPE = LayerShape("tiny", 48, 64, 32, 4, 2)
CPU = torch.device("cpu")
LORA = {"dgate_up_lora_a", "dgate_up_lora_b", "ddown_lora_a", "ddown_lora_b"}


def measure(form, *peers, dtype=torch.bfloat16):
    rows = experts.measure(
        SHAPE, implementations=(*peers, "moe_kernels"), device=CPU, dtype=dtype, repeats=1, form=form
    )
    return {row.implementation: row for row in rows}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_right_and_timed(form):
    rows = measure(form)
    ours, dense, own = rows["moe_kernels"], rows["dense"], in_form(Case.of(SHAPE, torch.bfloat16), form)
    assert ours.ok, ours.note
    assert (ours.form, dense.form) == (form, form)
    trained = {"out", "dx", "dw"} | (LORA if own.lora_rank else set())
    if not own.frozen:
        trained |= {"dgate_up", "ddown"} | ({"dgate_up_bias", "ddown_bias"} if own.bias else set())
    assert ours.rel_error.keys() == trained
    assert 1e-4 < max(ours.rel_error.values()) < 0.03
    assert dense.note.startswith("four" if own.frozen else "six")
    for row in rows.values():
        assert row.forward_backward_tflops / row.forward_tflops == pytest.approx(
            (2 if own.frozen else 3) * row.forward_ms.median / row.forward_backward_ms.median
        )
    gemms = 2 if own.gated else 1
    operations = 2 * SHAPE.rows * SHAPE.hidden * SHAPE.intermediate * (gemms + 1)
    assert ours.forward_tflops == pytest.approx(operations / ours.forward_ms.median * 1e-9)


@pytest.mark.parametrize(("form", "step"), [("lora-16", "lora_a_grad"), ("frozen", "combine_grad")])
def test_a_wrong_form_is_not_timed(form, step, monkeypatch):
    right = getattr(TorchBackend, step)
    monkeypatch.setattr(TorchBackend, step, lambda *args: right(*args) * 1.1)
    row = measure(form)["moe_kernels"]
    assert not row.ok
    assert f"wrong {'dx' if form == 'frozen' else 'd'}" in row.note
    assert row.forward_ms is None


@pytest.mark.parametrize("form", ["frozen", "lora-16"])
def test_peers_form_the_merged_weight(form):
    rows = measure(form, "eager", "grouped_mm", "liger", dtype=torch.float32)
    for name in ("eager", "grouped_mm", "moe_kernels"):
        assert rows[name].ok, rows[name].note
        assert rows[name].rel_error.keys() == {"out", "dx", "dw"} | (LORA if form == "lora-16" else set())
        assert max(rows[name].rel_error.values()) < 1e-5
    assert "measured in the plain form alone" in rows["liger"].note
    if form == "lora-16":
        merged = 4 * SHAPE.experts * 3 * SHAPE.hidden * SHAPE.intermediate / 2**20
        without = measure("frozen", "eager", dtype=torch.float32)["eager"]
        assert rows["eager"].saved_mb - without.saved_mb > merged


@pytest.mark.parametrize("form", ["qlora-16", "biases", "gpt-oss", "no-gate"])
def test_a_peer_without_the_form_says_so(form):
    row = measure(form, "grouped_mm")["grouped_mm"]
    assert (row.ok, row.available) == (False, False)
    assert "16-bit weights by rows and no biases; this form has others" in row.note


def test_a_frozen_base_has_no_gradient():
    for name in FORMS:
        layer = make_layer(SHAPE, "mild", CPU, torch.bfloat16, form=name)
        assert all(leaf.requires_grad for leaf in layer.leaves().values()), name
        frozen = {"gate_up": layer.gate_up, "down": layer.down} | layer.extras
        for other in frozen.keys() - {leaf[1:] for leaf in layer.leaves()}:
            assert not frozen[other].requires_grad, (name, other)


def test_the_file_goes_on_form_by_form(tmp_path, monkeypatch):
    monkeypatch.setitem(bench_command.LAYERS, "tiny", SHAPE)
    monkeypatch.setattr("moe_kernels.tools.common.machine.commit", lambda: "abc")
    measured = []
    real = experts.measure

    def counted(shape, **arguments):
        measured.append(arguments["form"])
        return real(shape, **arguments)

    monkeypatch.setattr(experts, "measure", counted)
    file = tmp_path / "bench.json"
    command = [
        "bench",
        "--device",
        "cpu",
        "--shapes",
        "tiny",
        "--peers",
        "none",
        "--repeats",
        "1",
        "--json",
        str(file),
    ]
    for forms in ("lora-16", "lora-16,frozen,plain"):
        result = CliRunner().invoke(app, [*command, "--form", forms])
        assert result.exit_code == 0, result.output
    assert measured == ["lora-16", "frozen", "plain"]
    assert [row["form"] for row in json.loads(file.read_text())["results"]] == [f for f in measured for _ in range(2)]
    assert "tiny, frozen: T=48" in result.output


def test_plots_are_of_the_plain_form():
    result = CliRunner().invoke(app, ["bench", "--device", "cpu", "--form", "lora-16", "--plots", "plots"])
    assert result.exit_code == 2
    assert "--plots draws layers in the plain form" in " ".join(result.output.split())


def test_files_of_before_have_the_plain_form():
    fields = {field.name: field.default for field in dataclasses.fields(experts.Measurement)}
    assert fields["form"] == "plain"
    rows = [{"routing": "mild", "implementation": "moe_kernels", "shape": "x", "dense_fraction": 0.5}]
    assert bench_command.fractions_of_dense(rows) == {"mild": {"moe_kernels": {"x": 0.5}}}
