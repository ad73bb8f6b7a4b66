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
        changes = names["FORMS"][form]
        if "frozen" not in changes:
            trained |= {"gate_up", "down"} | ({"gate_up_bias", "down_bias"} if "bias" in changes else set())
        if "lora_rank" in changes:
            trained |= {f"{weight}_lora_{letter}" for weight in ("gate_up", "down") for letter in "ab"}
        assert row["rel_error"].keys() == trained, form
        assert 1e-4 < max(row["rel_error"].values()) < (0.06 if "activations" in form else 0.02), form
