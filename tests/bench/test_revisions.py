"""Two states of the sources side by side: benchmarks/revisions.py."""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import revisions

ROOT = Path(__file__).resolve().parents[2]
DOUBLED = """
_op = fused_experts


def fused_experts(*args, **kwargs):
    return 2 * _op(*args, **kwargs)
"""


@pytest.fixture
def changed(tmp_path):
    """A checkout whose op gives twice the output."""
    package = tmp_path / "checkout" / revisions.PACKAGE
    shutil.copytree(ROOT / revisions.PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    with (package / "moe.py").open("a") as file:
        file.write(DOUBLED)
    return tmp_path / "checkout"


def compare(tmp_path, *arguments):
    out = tmp_path / "revisions.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "revisions.py"), *arguments, "--device", "cpu"]
    ran = subprocess.run([*command, "--repeats", "2", "--out", str(out)], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    return json.loads(out.read_text()), ran.stdout


@pytest.mark.parametrize("form", ["plain", "fp8-lora-16"])
def test_what_a_change_did(changed, tmp_path, form):
    """Weights in few bits are of each package's own class."""
    trees = [f"now={ROOT}", f"again={ROOT}", f"doubled={changed}"]
    report, said = compare(tmp_path, *trees, "--forms", form)
    now, again, doubled = report["rows"]
    assert [row["tree"] for row in report["rows"]] == ["now", "again", "doubled"]
    assert report["trees"]["now"] == report["trees"]["again"] != report["trees"]["doubled"]
    assert now["differs"] == again["differs"] == {}
    assert {"out", "dx", "dw"} <= doubled["differs"].keys()
    assert set(doubled["differs"].values()) == {1.0}
    assert all(row["gpu_ms"]["median"] > 0 for row in report["rows"])
    assert said.count("equal to the bit") == 2
    assert "differs: " in said


def test_what_is_missing_differs():
    one, two = torch.ones(2), torch.tensor([1.0, 2.0])
    assert revisions.differences({"out": one, "dx": one}, {"out": two}) == {
        "out": pytest.approx(5**-0.5), "dx": float("inf"),
    }  # fmt: skip


def test_a_revision_of_git(tmp_path, monkeypatch):
    package = tmp_path / "clone" / revisions.PACKAGE
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("from moe_kernels.moe import fused_experts  # not moe_kernels_now\n")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.com"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], cwd=tmp_path / "clone", check=True)
    (package / "__init__.py").write_text("changed")
    monkeypatch.setattr(revisions, "ROOT", tmp_path / "clone")
    assert revisions.copied("old", "HEAD", tmp_path) == "moe_kernels_old"
    copied = (tmp_path / "moe_kernels_old" / "__init__.py").read_text()
    assert copied == "from moe_kernels_old.moe import fused_experts  # not moe_kernels_now\n"
    assert len(revisions.identity("HEAD")) == 40
    with pytest.raises(SystemExit, match="nowhere is no folder with src/moe_kernels, and no revision of git: fatal"):
        revisions.copied("new", "nowhere", tmp_path)


def test_kernels_are_profiled_in_turns(monkeypatch):
    turns = []

    def kernel_times(call, calls):
        turns.append(call.args[0])
        return {"gemm": [len(turns) + 0.0, 10.0]}

    monkeypatch.setattr(revisions, "kernel_times", kernel_times)
    args = argparse.Namespace(device="cpu", routing="mild", repeats=1, kernels=3)
    one, two = revisions.measure({"one": "moe_kernels", "two": "moe_kernels"}, args, "tiny", "plain")
    assert len(turns) == 6
    assert one["kernels_us"] == {"gemm": [3.0, 10.0]}  # of 1, 3 and 5
    assert two["kernels_us"] == {"gemm": [4.0, 10.0]}


def test_launches_that_the_profiler_lost():
    turns = [{"gemm": [2.0]}, {"gemm": [1.0, 7.0], "sum": [3.0]}, {"gemm": [3.0, 5.0], "sum": [1.0]}, {"sum": [9.0]}]
    assert revisions.medians(turns) == {"gemm": [2.0, 6.0], "sum": [2.0]}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--kernels", "2"], "--kernels needs a GPU"),
        (["--forms", "plain,lora-17"], "--forms lora-17: choose from plain, "),
        (["--device", "cuda", "--shapes", "mixtral"], "--shapes mixtral: choose from mixtral-1b, "),
    ],
)
def test_wrong_usage_says_what_there_is(arguments, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["revisions.py", "now=HEAD", "--device", "cpu", *arguments])
    with pytest.raises(SystemExit, match="2"):
        revisions.main()
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("trees", [["HEAD"], ["a=HEAD", "a=."], ["a/b=HEAD"], ["a="]])
def test_names_that_are_none(trees, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["revisions.py", *trees])
    with pytest.raises(SystemExit, match="2"):
        revisions.main()
    assert "each state is NAME=REVISION or NAME=FOLDER" in capsys.readouterr().err
