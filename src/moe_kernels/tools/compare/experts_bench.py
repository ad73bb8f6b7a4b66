"""Measures the model's expert layer in a process of its own, at the tokens of one micro-batch.

Run as ``python -m moe_kernels.tools.compare.experts_bench REQUEST.json ANSWER.json``: the trainings must not share
a GPU with a process that holds memory, and a crash here must not take the report with it.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_type_hints

from moe_kernels.activation import Activation
from moe_kernels.integrations.support import UnsupportedExperts
from moe_kernels.settings import DEFAULT_GROUP_SIZE
from moe_kernels.shapes import ALL_FAMILIES, LayerShape
from moe_kernels.tools.bench.experts import Measurement
from moe_kernels.tools.common.errors import UsageError
from moe_kernels.tools.common.files import read_json, write_json
from moe_kernels.tools.common.layers import OVERRIDES, Target, build, kinds_of_layers
from moe_kernels.tools.common.runfile import precision, tokens_per_micro_batch
from moe_kernels.tools.compare.decode import LARGEST, Misfit, Number, decode
from moe_kernels.tools.compare.environment import NOT_FOR_LAYER, inputs
from moe_kernels.tools.compare.metrics import OURS
from moe_kernels.tools.compare.pair import OPTIMIZED, Pair, digest
from moe_kernels.tools.compare.runner import Machine, log_tail, run_command, why_ended

READ_ALWAYS = ("implementation", "ok", "note", "dtype")
GPU_REPEATS, CPU_REPEATS = 30, 20
STOCK = ("eager", "grouped_mm")


def measure_experts(pair: Pair, machine: Machine, fresh: bool, show: Callable[[str], object]) -> dict[str, Any]:
    """Measure the pair's expert layer, or return the stored measurement where nothing has changed.

    Returns:
        ``measurements`` (as of ``moe-kernels bench``), ``layer`` and ``moe_layers`` of the model, ``default``
        (what transformers picks for this model where the run file names no experts_implementation), ``note``: empty,
        or why the benchmark cannot run this layer, and ``error``: empty, or why the measurement failed.
    """
    config = next(run.config for run in pair.runs if run.role == OPTIMIZED)
    request = {
        "model": config["base_model"],
        "overrides": config.get(OVERRIDES) or {},
        "name": ALL_FAMILIES[pair.family].sizes[pair.size].name if pair.family else "",
        "tokens": tokens_per_micro_batch(config),
        "group_size": config.get("moe_group_size") or DEFAULT_GROUP_SIZE,
        "persistent": config.get("moe_persistent_kernel") is not False,
        "recompute": bool(config.get("moe_recompute")),
        "device": "cpu" if machine.device is None else "cuda",
        "dtype": {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[precision(config)],
        "repeats": CPU_REPEATS if machine.device is None else GPU_REPEATS,
        "frozen": bool(config.get("adapter")),
    }
    folder = pair.folder / "experts"
    stored, log = folder / "answer.json", folder / "bench.log"
    mark = digest(request, machine.identity(NOT_FOR_LAYER), inputs({"base_model": config["base_model"]}))
    if stored.is_file() and not fresh:
        answer = _stored(stored)
        if answer is not None and answer["fingerprint"] == mark:
            return answer
    stored.unlink(missing_ok=True)
    write_json(folder / "request.json", request)
    command = [sys.executable, "-m", __spec__.name, str(folder / "request.json"), str(stored)]
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if machine.device is not None:
        env["CUDA_VISIBLE_DEVICES"] = machine.device

    def feed(text: str) -> None:
        for line in text.split("\n"):
            if line.strip():
                show(line.strip())

    exit_code = run_command(command, env, log, machine.timeout_s, feed)
    if exit_code != 0:
        tail = log_tail(log)
        error = why_ended("the measurement", exit_code, tail, machine)
        return {"measurements": [], "error": error, "tail": tail, "request": request}
    answer = {**read_json(stored), "fingerprint": mark, "request": request, "error": ""}
    write_json(stored, answer)
    return answer


def _stored(path: Path) -> dict[str, Any] | None:
    """The answer in a file, or None where it is damaged or of another version."""
    try:
        answer = decode(dict[str, Any], read_json(path))
        check_experts(answer)
    except (Misfit, UsageError):
        return None
    return answer if "fingerprint" in answer else None


def check_experts(experts: dict[str, Any]) -> None:
    """Raise Misfit unless this is an answer of :func:`measure_experts`, or empty."""
    hints = get_type_hints(Measurement)
    kinds = {key: Number | None if hint == float | None else hint for key, hint in hints.items()}
    kinds["rel_error"] = dict[str, Number]
    rows = decode(list[dict[str, Any]], experts.get("measurements", []), "experts.measurements")
    for index, row in enumerate(rows):
        where = f"experts.measurements[{index}]"
        if missing := [key for key in READ_ALWAYS if key not in row]:
            raise Misfit(f"{where}.{missing[0]} is missing")
        # Nothing reads keys of a newer or an older version.
        found = {key: decode(kinds[key], row[key], f"{where}.{key}") for key in row.keys() & kinds.keys()}
        times = {key: found.get(key) for key in ("forward_ms", "forward_backward_ms")}
        if [*times.values()].count(None) == 1:
            raise Misfit(f"{where} has one of forward_ms and forward_backward_ms alone")
        for key, spread in times.items():
            if spread is not None and not 0 < spread.median < LARGEST:
                raise Misfit(f"{where}.{key} is {spread.median}")
        for key in ("saved_mb", "peak_mb"):
            if not 0 <= (found.get(key) or 0) < math.inf:
                raise Misfit(f"{where}.{key} is {found[key]}")
    others = {"error": str, "note": str, "default": str, "moe_layers": int | None, "layer": LayerShape | None}
    for key in experts.keys() & others.keys():
        decode(others[key], experts[key], f"experts.{key}")


def inspect_model(folder: str, name: str, tokens: int, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """``layer``, ``moe_layers``, ``default`` and ``note`` of :func:`measure_experts`, from a model's configuration.

    Raises:
        UsageError: the configuration cannot be used.
        MissingDependency: the model is not on this machine.
    """
    target = Target(folder, tokens, overrides=overrides or {})
    model = build(target)
    found = {"layer": None, "moe_layers": None, "default": str(model.config._experts_implementation)}
    try:
        kinds = kinds_of_layers(model, target)
    except (UsageError, UnsupportedExperts) as error:
        return {**found, "note": str(error)}
    if len(kinds) > 1:
        return {**found, "note": f"{folder} has {len(kinds)} kinds of expert layers, and the benchmark measures one"}
    [(case, names)] = kinds.items()
    # The dtype of the routing weights depends on the name.
    shape = LayerShape(
        name or model.config.model_type, tokens, case.hidden, case.intermediate, case.experts, case.top_k
    )
    activation = Activation.of(case.activation).name
    special = [word for word in ("bias", "interleaved", "transposed") if getattr(case, word)]
    special += ([] if case.gated else ["no gate"]) + ([] if case.reduce else ["a norm after each expert"])
    special += [] if activation == "silu" else [activation]
    note = f"the benchmark has no experts like this model's: {', '.join(special)}" if special else ""
    return {**found, "layer": asdict(shape), "moe_layers": len(names), "note": note}


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    import torch

    from moe_kernels.tools.bench.experts import measure

    found = inspect_model(request["model"], request["name"], request["tokens"], request["overrides"])
    if request["frozen"]:
        found["note"] = "the benchmark computes every weight's gradient, and here the weights are frozen"
    if found["note"]:
        return {**found, "measurements": []}
    measurements = measure(
        LayerShape(**found["layer"]),
        implementations=(*STOCK, OURS),
        device=request["device"],
        dtype=getattr(torch, request["dtype"]),
        repeats=request["repeats"],
        group_sizes=(request["group_size"],),
        persistent=(request["persistent"],),
        recompute=(request["recompute"],),
        progress=lambda message: print(message, flush=True),
    )
    return {**found, "measurements": [measurement.to_json() for measurement in measurements]}


if __name__ == "__main__":
    write_json(Path(sys.argv[2]), _answer(read_json(Path(sys.argv[1]))))
