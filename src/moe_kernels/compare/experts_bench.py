"""Measures the model's expert layer in a process of its own, at the tokens of one micro-batch.

Run as ``python -m moe_kernels.compare.experts_bench REQUEST.json ANSWER.json``: the trainings must not share
a GPU with a process that holds memory, and a crash here must not take the report with it.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_type_hints

from moe_kernels.bench.experts import Measurement
from moe_kernels.cli.errors import UsageError
from moe_kernels.compare.decode import Misfit, decode
from moe_kernels.compare.environment import SOURCES
from moe_kernels.compare.metrics import OURS
from moe_kernels.compare.plan import OPTIMIZED, Plan, digest, tokens_per_micro_batch
from moe_kernels.compare.runner import Machine, last_error, read_json, write_json
from moe_kernels.shapes import LayerShape

READ_ALWAYS = ("implementation", "ok", "note", "dtype")
GPU_REPEATS, CPU_REPEATS = 30, 20
STOCK = ("eager", "grouped_mm")


def measure_experts(plan: Plan, machine: Machine, fresh: bool, show: Callable[[str], object]) -> dict[str, Any]:
    """Measure the plan's expert layer, or take the measurement from the store where nothing has changed.

    Returns:
        ``measurements`` (as of ``moe-kernels bench``), ``layer`` and ``moe_layers`` of the model, ``default``
        (what transformers picks for this model where the run file names no experts_implementation), and
        ``error``: empty, or why there are no measurements.
    """
    config = next(run.config for run in plan.runs if run.role == OPTIMIZED)
    request = {
        "model": config["base_model"],
        "name": plan.layer.name if plan.layer else Path(config["base_model"]).name,
        "tokens": tokens_per_micro_batch(config),
        "group_size": config.get("moe_group_size", 128),
        "persistent": config.get("moe_persistent_kernel", True),
        "device": "cpu" if machine.device is None else "cuda",
        "dtype": "bfloat16" if config.get("bf16") else "float16" if config.get("fp16") else "float32",
        "repeats": CPU_REPEATS if machine.device is None else GPU_REPEATS,
        # The layer's benchmark computes every weight's gradient: what it says is nothing about frozen weights.
        "implementations": [] if config.get("adapter") else [*STOCK, OURS],
    }
    folder = plan.folder / "experts"
    stored, mark = (
        folder / "answer.json",
        digest(request, machine.versions[SOURCES], machine.versions["torch"]),
    )
    if stored.is_file() and not fresh:
        answer = _stored(stored)
        if answer is not None and answer["fingerprint"] == mark:
            return answer
    stored.unlink(missing_ok=True)
    write_json(folder / "request.json", request)
    command = [
        sys.executable,
        "-m",
        "moe_kernels.compare.experts_bench",
        str(folder / "request.json"),
        str(stored),
    ]
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
        return {"measurements": [], "error": reason, "tail": tail, "request": request}
    answer = {
        **read_json(stored),
        "fingerprint": mark,
        "request": request,
        "error": "",
    }
    write_json(stored, answer)
    return answer


def _stored(path: Path) -> dict[str, Any] | None:
    """The answer in a file; None where it is damaged or of another version."""
    try:
        answer = decode(dict[str, Any], read_json(path))
        check_experts(answer)
    except (Misfit, UsageError):
        return None
    return answer if "fingerprint" in answer else None


def check_experts(experts: dict[str, Any]) -> None:
    """Raise Misfit where this is no answer of :func:`measure_experts` (none at all is one)."""
    hints = get_type_hints(Measurement)
    rows = decode(list[dict[str, Any]], experts.get("measurements", []), "experts.measurements")
    for index, row in enumerate(rows):
        where = f"experts.measurements[{index}]"
        if missing := [key for key in READ_ALWAYS if key not in row]:
            raise Misfit(f"{where} lacks {missing[0]!r}")
        # Keys of a newer or an older version are left alone: nothing reads them.
        found = {key: decode(hints[key], row[key], f"{where}.{key}") for key in row.keys() & hints.keys()}
        for times in (found.get("forward_ms"), found.get("forward_backward_ms")):
            if times is not None and not 0 < times.median < math.inf:
                raise Misfit(f"{where} took {times.median} ms")
        for size in (found.get("saved_mb"), found.get("peak_mb")):
            if size is not None and not 0 <= size < math.inf:
                raise Misfit(f"{where} needs {size} MiB")
    others = {"error": str, "default": str, "moe_layers": int | None, "layer": LayerShape | None}
    for key, kind in others.items():
        if key in experts:
            decode(kind, experts[key], f"experts.{key}")


def inspect_model(folder: str, name: str, tokens: int) -> tuple[LayerShape, int, str]:
    """The expert layer of a model folder, how many it has, and the implementation transformers picks for it.

    The model is built without memory for its weights.

    Raises:
        UsageError: the model has no expert layers with 3-D weights.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layers = [module for module in model.modules() if getattr(module, "gate_up_proj", None) is not None]
    layers = [module for module in layers if module.gate_up_proj.ndim == 3]
    if not layers:
        raise UsageError(f"{folder} has no expert layers: there is nothing for moe-kernels to speed up.")
    experts, double, hidden = layers[0].gate_up_proj.shape
    shape = LayerShape(name, tokens, hidden, double // 2, experts, config.num_experts_per_tok)
    return shape, len(layers), str(model.config._experts_implementation)


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    import torch

    from moe_kernels.bench.experts import measure

    shape, layers, default = inspect_model(request["model"], request["name"], request["tokens"])
    measurements = request["implementations"] and measure(
        shape,
        implementations=tuple(request["implementations"]),
        device=request["device"],
        dtype=getattr(torch, request["dtype"]),
        repeats=request["repeats"],
        group_sizes=(request["group_size"],),
        persistent=(request["persistent"],),
        progress=lambda message: print(message, flush=True),
    )
    return {
        "measurements": [measurement.to_json() for measurement in measurements],
        "layer": asdict(shape),
        "moe_layers": layers,
        "default": default,
    }


if __name__ == "__main__":
    write_json(Path(sys.argv[2]), _answer(read_json(Path(sys.argv[1]))))
