"""benchmarks/fp8_numerics.py: a layer's errors in both modes; the training takes minutes and is not run."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import fp8_numerics as script


@pytest.mark.parametrize("data", script.DATA)
def test_each_mode_has_its_error(data, monkeypatch):
    for name, value in {"T": 32, "H": 256, "I": 128, "RANK": 4}.items():
        monkeypatch.setattr(script, name, value)
    exact, fp8 = script.errors(data)
    assert (exact["mode"], fp8["mode"], exact["rel_error"].keys()) == ("exact", "fp8", fp8["rel_error"].keys())
    assert len(exact["rel_error"]) == 7
    for name, value in exact["rel_error"].items():
        assert 0 < value < 0.02, name
        assert value < 2 * fp8["rel_error"][name] < 0.2, name
    if data == "normal":
        assert min(fp8["rel_error"].values()) > 2 * max(exact["rel_error"].values())


def test_batches_are_of_the_files_and_repeat(tmp_path):
    (tmp_path / "a").write_bytes(bytes(range(200)))
    (tmp_path / "b").write_bytes(bytes(range(200)))
    files = [tmp_path / "a", tmp_path / "b"]
    found = script.batches(files, 2, 0)
    assert [batch.shape for batch in found] == 2 * [(script.BATCH, script.SEQUENCE)]
    assert all((one == other).all() for one, other in zip(found, script.batches(files, 2, 0), strict=True))
    assert all((row.diff()[row.diff() != 1].numel()) <= 2 for row in found[0])
