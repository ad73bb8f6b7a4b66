"""benchmarks/forms.py on a CPU: every form is right and in the file, and a wrong gradient shows."""

import json
import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "forms.py"


@pytest.fixture
def measured(tmp_path, monkeypatch):
    out = tmp_path / "forms.json"
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--device", "cpu", "--repeats", "1", "--out", str(out)])
    names = runpy.run_path(str(SCRIPT), run_name="__main__")
    return names, json.loads(out.read_text())


def test_every_form_is_right(measured):
    names, data = measured
    rows = {row["form"]: row for row in data["rows"] if row["implementation"] == "torch"}
    assert list(rows) == list(names["FORMS"])
    for form, row in rows.items():
        trained = {"out", "x", "topk_weights"}
        if not names["FORMS"][form].frozen:
            trained |= {"gate_up", "down"} | ({"gate_up_bias", "down_bias"} if names["FORMS"][form].biases else set())
        if names["FORMS"][form].rank:
            trained |= {f"{weight}_lora_{letter}" for weight in ("gate_up", "down") for letter in "ab"}
        assert row["rel_error"].keys() == trained, form
        assert 1e-4 < max(row["rel_error"].values()) < (0.06 if "activations" in form else 0.02), form
