"""`moe-kernels verify --form`: every form passes on right steps, and fails on one step that is wrong for it."""

import importlib
import json
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from moe_kernels.backends.torch import TorchBackend
from moe_kernels.kernels.device import interpreting
from moe_kernels.shapes import LAYERS, LayerShape
from moe_kernels.tools import verify
from moe_kernels.tools.app import app
from moe_kernels.tools.check.forms import FORMS, called, in_form
from moe_kernels.tools.check.problems import Case, eager, make_inputs, truth
from moe_kernels.tools.check.tolerances import assert_close_to_truth
from moe_kernels.tools.check.verification import TORCH_CONFIGURATIONS, verify_case
from support.tiles import use_small_tiles

#: No multiple of a block of fp8, nor of a tile.
SHAPE = LayerShape("tiny", 33, 160, 72, 5, 2)
BF16 = torch.bfloat16
ROUTINGS = ("sentinels", "empty_first_middle_last")


def judge(form, dtype=BF16, backend="torch", shape=SHAPE, routings=ROUTINGS, **changes):
    case = replace(in_form(Case.of(shape, dtype), form), **changes).fitting()
    device = torch.device("cpu")
    (verdict,) = verify_case(
        case,
        shape.name,
        device=device,
        routings=routings,
        configurations=TORCH_CONFIGURATIONS,
        backend=backend,
        form=form,
    )
    return verdict


@pytest.mark.parametrize("form", FORMS)
def test_right_steps_pass(form):
    verdict = judge(form)
    assert verdict.ok, verdict.failures
    assert (verdict.form, verdict.backend, verdict.routings) == (form, "torch", 2)
    assert 0 < verdict.rms_ratio < 2


@pytest.mark.skipif(not interpreting(), reason="needs Triton's interpreter: TRITON_INTERPRET=1")
@pytest.mark.parametrize(
    ("form", "factors"),
    [("qlora-16", torch.float32), ("fp8-activations-lora-16", torch.float32), ("mxfp4-lora-16", None)],
)
def test_right_kernels_pass(form, factors):
    tiny = LayerShape("tiny", 11, 64, 32, 4, 2)
    with use_small_tiles():
        verdict = judge(form, backend="triton", shape=tiny, routings=("sentinels",), lora_dtype=factors)
    assert verdict.ok, verdict.failures


def scaled(name, by, index=None):
    """A step of the torch backend whose result, or that part of it, is so many times as large."""
    original = getattr(TorchBackend, name)

    def changed(*args, **options):
        found = original(*args, **options)
        if index is None:
            return found * by
        part = getattr(found, index)
        return found if part is None else found._replace(**{index: part * by})

    return changed


@pytest.mark.parametrize(
    ("step", "index", "names", "passes"),
    [
        ("lora_a_grad", None, ("dgate_up_lora_a", "ddown_lora_a"), "frozen"),
        ("added_grads", "factor", ("dgate_up_lora_b", "ddown_lora_b"), "frozen"),
        ("added_grads", "bias", ("dgate_up_bias", "ddown_bias"), "lora-16"),
        ("wgrad", None, ("dgate_up", "ddown"), "qlora-16"),
    ],
)
def test_half_a_percent_too_much_is_found_where_it_is(step, index, names, passes, monkeypatch):
    monkeypatch.setattr(TorchBackend, step, scaled(step, 1.005, index))
    form = {"dgate_up_lora_a": "qlora-16", "dgate_up_lora_b": "mxfp4-lora-16", "dgate_up_bias": "gpt-oss"}
    wrong = judge(form.get(names[0], "plain"), torch.float32).failures
    assert {name for name in names for failure in wrong if f": {name} (" in failure} == {*names}
    assert len({failure.split(" (")[0] for failure in wrong}) == 2 * len(names), wrong  # on both routings, no other
    assert judge(passes, torch.float32).ok


@pytest.mark.parametrize("form", [name for name, form in FORMS.items() if "packed" in form])
def test_a_weight_read_a_little_wrong_is_found(form, monkeypatch):
    """A percent in what the steps make of it; the reference reads the same weight by itself."""
    monkeypatch.setattr(TorchBackend, "dgrad", scaled("dgrad", 1.01))
    assert any(": out (" in failure for failure in judge(form).failures)


@pytest.mark.parametrize("rows", [lambda rows, pieces: rows, lambda rows, pieces: rows.to(torch.float8_e5m2).float()])
def test_rows_that_are_not_rounded_as_they_should_are_found(rows, monkeypatch):
    """More exact is not right either: it is another arithmetic than the one that is promised."""
    backend = importlib.import_module(TorchBackend.__module__)
    monkeypatch.setattr(backend, "rounded", lambda values, pieces=1: rows(values.float(), pieces))
    failures = judge("fp8-activations-lora-16").failures
    for name in ("out", "dx"):
        assert any(f": {name} (" in failure for failure in failures), failures


def test_where_the_reference_rounds_to_fp8():
    """It is off the unrounded one by what e4m3 makes of it, its yardstick by a fraction of that."""
    case = in_form(Case.of(SHAPE, BF16), "fp8-activations-lora-16")
    inputs = make_inputs(case)
    exact, plain = truth(inputs), eager(inputs)
    unrounded = truth(make_inputs(in_form(Case.of(SHAPE, BF16), "fp8-lora-16")))

    def error(found, want):
        return ((found.double() - want).norm() / want.norm()).item()

    for name in ("out", "dx"):
        assert 0.01 < error(unrounded[name], exact[name]) < 0.06, name
        assert 0.002 < error(plain[name], exact[name]) < 0.02, name


@pytest.mark.parametrize("form", FORMS)
def test_the_layers_keep_their_sizes(form):
    for shape in LAYERS.values():
        case = in_form(Case.of(shape, BF16), form)
        assert case.fitting() == case, shape.name


def test_the_forms_of_run_files_have_the_names_of_the_table():
    for name, form in FORMS.items():
        if "frozen" in form:  # the rest is the model's own
            assert called(in_form(Case.of(SHAPE, BF16), name)) == name.removeprefix("gpt-oss-")


def run(*arguments):
    return CliRunner().invoke(app, ["verify", "--device", "cpu", *arguments])


def test_the_command_checks_each_form(monkeypatch, tmp_path):
    monkeypatch.setattr(verify, "SMALL_SHAPES", (LayerShape("one", 33, 40, 24, 5, 2),))
    file = tmp_path / "verify.json"
    result = run("--shapes", "small", "--form", "lora-64, mxfp4-lora-16", "--json", str(file))
    assert result.exit_code == 0, result.output
    assert [row["form"] for row in json.loads(file.read_text())["results"]] == ["lora-64", "mxfp4-lora-16"]
    monkeypatch.setattr(TorchBackend, "lora_a_grad", scaled("lora_a_grad", 1.02))
    result = run("--shapes", "small", "--form", "lora-64")
    assert result.exit_code == 1
    assert "one, lora-64, group_size" in result.output
    assert "dgate_up_lora_a" in result.output


@pytest.mark.parametrize("command", ["verify", "bench"])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--form", "lora-17"], "--form lora-17: choose from plain, frozen, lora-16"),
        (["--form", ","], "--form ',' names nothing"),
        (["--form", ""], "--form '' names nothing"),
        (["--form", "fp8-activations-lora-16", "--dtype", "fp32"], "use --dtype bf16 or fp16"),
    ],
)
def test_forms_that_cannot_be_checked(command, arguments, words):
    result = CliRunner().invoke(app, [command, "--device", "cpu", *arguments])
    assert result.exit_code == 2, result.output
    assert words in " ".join(result.output.split())


def test_all_leaves_out_what_cannot_be_checked_and_says_so(monkeypatch):
    monkeypatch.setattr(verify, "SMALL_SHAPES", (LayerShape("one", 3, 16, 8, 2, 1),))
    monkeypatch.setattr(
        "moe_kernels.tools.common.options.FORMS", {n: FORMS[n] for n in ("fp8-activations-lora-16", "plain")}
    )
    result = run("--shapes", "small", "--form", "all", "--dtype", "fp32")
    assert result.exit_code == 0, result.output
    assert "fp8-activations-lora-16 is left out: in float32" in " ".join(result.output.split())
    assert "1 of 1 configurations right" in result.output


def test_a_gpu_that_multiplies_no_fp8_is_said(monkeypatch):
    monkeypatch.setattr("moe_kernels.fp8.device_capability", lambda device: (8, 0))
    result = run("--form", "fp8-activations-lora-16")
    assert result.exit_code == 2
    assert "compute capability (8, 0) does not multiply fp8" in " ".join(result.output.split())
    failures = judge("fp8-activations-lora-16").failures
    assert failures, "also where a problem is checked from Python"
    assert "does not multiply fp8" in failures[0]


def test_one_number_astray_is_luck_in_few_and_an_error_in_many():
    generator = torch.Generator().manual_seed(0)
    for count, step, by, right in (
        (64, 0.0, 1.06, False),
        (64, 0.125, 1.06, True),
        (64, 0.125, 1.3, False),
        (10**5, 0.125, 1.06, False),
    ):
        truth = torch.randn(count, dtype=torch.float64, generator=generator)
        plain = truth.to(BF16)
        ours = plain.clone()
        ours[truth.abs().argmax()] *= by
        with nullcontext() if right else pytest.raises(AssertionError, match="max error"):
            assert_close_to_truth(ours, truth, plain, "out", step=step)


def test_a_matrix_of_low_rank_is_a_few_numbers():
    """Errors of its rows and of its columns, however many elements it has: here 1.8% against 1% in one of four."""
    left, right = torch.randn(2, 500, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    truth = left @ right.T
    ours, plain = (truth * by for by in (1.018, 1.01))
    with pytest.raises(AssertionError, match="rms error"):
        assert_close_to_truth(ours.float(), truth, plain.float(), "dlora_a")
    assert_close_to_truth(ours.float(), truth, plain.float(), "dlora_a", independent=4)
