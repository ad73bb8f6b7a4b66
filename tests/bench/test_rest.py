"""benchmarks/rest.py: calls after rests of several lengths."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import rest  # noqa: E402


def test_every_call_after_every_rest(tmp_path):
    out = tmp_path / "rest.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "rest.py"), "--device", "cpu", "--repeats", "2"]
    ran = subprocess.run(
        [*command, "--rests", "3,6.5", "--out", str(out)], capture_output=True, text=True, timeout=300, check=False
    )
    assert ran.returncode == 0, ran.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [(row["call"], row["rest_ms"]) for row in rows] == [
        ("moe_kernels", 3.0), ("moe_kernels", 6.5), ("dense", 3.0), ("dense", 6.5),
    ]  # fmt: skip
    assert all(row["gpu_ms"]["median"] > 0 for row in rows)
    assert ran.stdout.count("after") == 4


def test_each_call_runs_once_more_before_it_is_timed(monkeypatch):
    """What ran before decides how warm the GPU is; it is always the same call."""
    ran = []

    class Clock:
        cuda = True

        def __init__(self, device):
            pass

        def once(self, call, queue_ms=0.0):
            ran.append((call, queue_ms))
            return 1.0, 2.0

    monkeypatch.setattr(rest, "Clock", Clock)
    assert len(rest.measure("tiny", [3.0, 5.0], 2, torch.device("cpu"))) == 4
    assert len(ran) == 2 * 4 * (2 + 2)
    for before, after in zip(ran[::2], ran[1::2], strict=True):
        assert before == (after[0], 0.0)
        assert after[1] > 0
    with pytest.raises(SystemExit, match="--rests of 1 is too short"):
        rest.measure("tiny", [1.0], 1, torch.device("cpu"))


def test_an_unknown_layer_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["rest.py", "--shapes", "mixtral"])
    with pytest.raises(SystemExit) as refused:
        rest.main()
    assert refused.value.code == 2
    assert "--shapes mixtral: choose from mixtral-1b" in capsys.readouterr().err
