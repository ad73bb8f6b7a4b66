"""Measures the family's expert layer in a process of its own, at the tokens of one micro-batch of the training.

Run as ``python -m moe_kernels.compare.experts_bench REQUEST.json ANSWER.json``: the trainings must not share a GPU
with a process that holds memory, and a crash here must not take the report with it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moe_kernels.compare.environment import SOURCES
from moe_kernels.compare.plan import OPTIMIZED, RUN_FOLDER, Plan, digest
from moe_kernels.compare.runner import Machine, last_error, write_json
from moe_kernels.shapes import LayerShape

TIMEOUT_S = 900
GPU_REPEATS, CPU_REPEATS = 30, 20


def measure_experts(plan: Plan, machine: Machine, fresh: bool, show: Callable[[str], object]) -> dict[str, Any]:
    """``{"measurements": [...], "error": ""}`` for the plan's layer, from the store where nothing has changed."""
    if plan.layer is None:
        return {"measurements": [], "error": "the expert layer is only measured for the three families"}
    config = next(run.config for run in plan.runs if run.role == OPTIMIZED)
    request = {
        "shape": asdict(plan.layer),
        "group_size": config.get("moe_group_size", 128),
        "persistent": config.get("moe_persistent_kernel", True),
        "device": "cpu" if machine.device is None else "cuda",
        "dtype": "bfloat16" if config.get("bf16") else "float16" if config.get("fp16") else "float32",
        "repeats": CPU_REPEATS if machine.device is None else GPU_REPEATS,
    }
    folder = RUN_FOLDER / f"{plan.name}-{plan.size}" / "experts"
    stored, mark = folder / "answer.json", digest(request, machine.versions[SOURCES], machine.versions["torch"])
    if stored.is_file() and not fresh:
        answer: dict[str, Any] = json.loads(stored.read_text())
        if answer["fingerprint"] == mark:
            return answer
    stored.unlink(missing_ok=True)
    write_json(folder / "request.json", request)
    command = [sys.executable, "-m", "moe_kernels.compare.experts_bench", str(folder / "request.json"), str(stored)]
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if machine.device is not None:
        env["CUDA_VISIBLE_DEVICES"] = machine.device
    tail: list[str] = []
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            tail = [*tail[-39:], line.rstrip()]
            show(line.strip())
    if child.returncode != 0:
        reason = last_error(tail) or f"exit code {child.returncode}"
        return {"measurements": [], "error": reason, "tail": tail, "command": command, "request": request}
    answer = {**json.loads(stored.read_text()), "fingerprint": mark, "command": command, "request": request, "error": ""}
    write_json(stored, answer)
    return answer


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    import torch

    from moe_kernels.bench.experts import measure

    measurements = measure(
        LayerShape(**request["shape"]),
        device=request["device"],
        dtype=getattr(torch, request["dtype"]),
        repeats=request["repeats"],
        group_sizes=(request["group_size"],),
        persistent=(request["persistent"],),
        progress=lambda message: print(message, flush=True),
    )
    return {"measurements": [measurement.to_json() for measurement in measurements]}


if __name__ == "__main__":
    write_json(Path(sys.argv[2]), _answer(json.loads(Path(sys.argv[1]).read_text())))
