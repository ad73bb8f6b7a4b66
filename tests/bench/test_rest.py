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
    command += ["--rests", "3,6.5,0", "--peers", "grouped_mm", "--out", str(out)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    rows = json.loads(out.read_text())["rows"]
    calls = [(call, length) for call in ("moe_kernels", "grouped_mm", "dense") for length in (3.0, 6.5, 0.0)]
    assert [(row["call"], row["rest_ms"]) for row in rows] == calls
    assert all(row["gpu_ms"]["median"] > 0 for row in rows)
    assert (ran.stdout.count("after"), ran.stdout.count("in a row")) == (6, 3)


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
    assert len(rest.measure("tiny", [], [3.0, 5.0], 2, torch.device("cpu"))) == 4
    assert len(ran) == 2 * 4 * (2 + 2)
    for before, after in zip(ran[::2], ran[1::2], strict=True):
        assert before == (after[0], 0.0)
        assert after[1] > 0
    with pytest.raises(SystemExit, match="--rests of 1 is too short"):
        rest.measure("tiny", [], [1.0], 1, torch.device("cpu"))


def test_calls_in_a_row_are_timed_together():
    ran, rests = [], []

    class Clock:
        def once(self, call, queue_ms=0.0):
            rests.append(queue_ms)
            call()
            return 30.0, 20.0

    assert rest.timed_once(Clock(), lambda: ran.append(1), 0.0) == (3.0, 2.0)
    assert (len(ran), rests) == (1 + rest.IN_A_ROW, [0.0, 0.0])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--shapes", "mixtral"), "--shapes mixtral: choose from mixtral-1b"),
        (("--peers", "sonic"), "--peers sonic: choose from eager"),
        (("--rests", "4,"), "--rests: invalid milliseconds value: '4,'"),
        (("--rests", "4,-1"), "--rests: invalid milliseconds value: '4,-1'"),
        (("--repeats", "0"), "--repeats 0: at least 1"),
    ],
)
def test_what_is_unknown_is_refused(arguments, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["rest.py", *arguments])
    with pytest.raises(SystemExit) as refused:
        rest.main()
    assert refused.value.code == 2
    assert said in capsys.readouterr().err


def test_a_peer_that_cannot_run_here_says_why():
    with pytest.raises(SystemExit, match="tiny: sonicmoe needs an NVIDIA GPU"):
        rest.measure("tiny", ["sonicmoe"], [3.0], 1, torch.device("cpu"))
