"""Whether this host trains on several GPUs, and what it does when a rank is lost: one command before a long run.

    pytest tests/distributed/test_one_host.py

On two or more GPUs: FSDP2 over NCCL, with the kernels that a training takes there. Elsewhere the same over gloo, two
ranks on the CPU, with plain torch.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra [transformers]")
WORKER = Path(__file__).with_name("one_host.py")
CUDA = torch.cuda.device_count() > 1
RANKS = max(torch.cuda.device_count(), 2)
SAVED, TIMEOUT_S = 4, 20 if CUDA else 45  # as in one_host.py, which is not imported here: it holds DTensors and hooks
# bfloat16 and another order of sums.
CLOSE = 5e-3 if CUDA else 1e-5
STOP_S = 30 if CUDA else 120  # what torchrun gives its ranks, and a start, on a CPU beside other work
pytestmark = pytest.mark.slow


def torchrun(folder: Path, scenario: str, ranks: int = RANKS) -> tuple[int, str, float]:
    """Exit code, output and seconds."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    began = time.monotonic()
    done = subprocess.run(
        [*command, str(WORKER), str(folder), scenario],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, time.monotonic() - began


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("one-host")


@pytest.fixture(scope="module")
def whole(folder: Path) -> tuple[Any, float]:
    """What rank 0 saw of the run that nothing happened to, and how long it took."""
    code, output, seconds = torchrun(folder, "whole")
    assert code == 0, output[-6000:]
    return torch.load(folder / "whole.pt", weights_only=False, map_location="cpu"), seconds


@pytest.fixture(scope="module")
def killed(folder: Path, whole: Any) -> tuple[int, str, float]:
    return torchrun(folder, "killed")


def test_ranks_train_as_with_stock_experts(whole: Any) -> None:
    found, _ = whole
    stock, ours = found["grouped_mm"], found["moe_kernels"]
    assert ours["losses"] == pytest.approx(stock["losses"], rel=CLOSE)
    assert ours["losses"][-2] < ours["losses"][0]  # of the same batch
    assert not stock["calls"]
    assert sum(ours["calls"].values()) == 6 * 2  # steps and layers
    assert ("torch" in ours["calls"]) == (not CUDA), "the GPU's kernels did not run"


def test_a_rank_without_tokens(whole: Any) -> None:
    found, _ = whole
    stock, ours = found["idle", "grouped_mm"], found["idle", "moe_kernels"]
    for name, expected in {"dx": stock["dx"], **stock["grads"]}.items():
        actual = ours["dx"] if name == "dx" else ours["grads"][name] * RANKS  # the mean over the ranks
        assert float((actual - expected).norm() / expected.norm()) < CLOSE, name


def test_a_killed_rank_ends_the_run_with_its_name(whole: Any, killed: tuple[int, str, float]) -> None:
    (_, uninterrupted), (code, output, seconds) = whole, killed
    assert code != 0
    assert "Signal 9 (SIGKILL) received by PID" in output
    assert seconds < uninterrupted + TIMEOUT_S + STOP_S


def test_a_stuck_rank_ends_the_run_within_the_timeout(whole: Any, folder: Path) -> None:
    _, uninterrupted = whole
    code, output, seconds = torchrun(folder, "stuck")
    assert code != 0
    assert "timeout" in output.lower() or "timed out" in output.lower(), output[-3000:]
    assert seconds < uninterrupted + TIMEOUT_S + 2 * STOP_S


def test_what_a_killed_run_saved_goes_on_on_one_gpu(whole: Any, killed: tuple[int, str, float], folder: Path) -> None:
    code, output, _ = torchrun(folder, "resumed", ranks=1)
    assert code == 0, output[-6000:]
    losses = torch.load(folder / "resumed.pt", weights_only=False)["losses"]
    assert losses == pytest.approx(whole[0]["moe_kernels"]["losses"][SAVED:], rel=CLOSE)
