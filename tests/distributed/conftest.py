"""Starts the ranks: two processes on the CPU that talk gloo, as torchrun starts them on GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

WORKERS = Path(__file__).with_name("workers.py")
TESTS = WORKERS.parents[1]
RANKS = 2
Results = list[dict[str, Any]]


@pytest.fixture(scope="session")
def torchrun(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Results]:
    """``torchrun(scenario, ...)``: what each rank reports of these scenarios of workers.py."""

    def start(*scenarios: str) -> Results:
        folder = tmp_path_factory.mktemp("ranks")
        # The kernels are not under test here, every rank has one core, and DeepSpeed must not look for a GPU.
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TRITON_INTERPRET": "0",
            "DS_ACCELERATOR": "cpu",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")])),
        }
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
        done = subprocess.run(
            [*command, str(WORKERS), str(folder), *scenarios],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,  # of which a test needs about 30 s: a hang is a failure, not a stuck suite
        )
        assert done.returncode == 0, done.stdout[-6000:]
        return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(RANKS)]

    return start
