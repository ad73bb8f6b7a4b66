"""From raw rows to numbers: one :class:`RunMetrics` for each training, one :class:`SideMetrics` for each side."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

from moe_kernels.tools.bench.timing import Spread
from moe_kernels.tools.compare.decode import NOT_FINITE
from moe_kernels.tools.compare.gpu import GIB
from moe_kernels.tools.compare.pair import calls_per_step
from moe_kernels.tools.compare.runner import FINISHED, Row, RunResult

OURS = "moe_kernels"
# Keys of a layer's measurement that hold text; the others hold numbers.
WORDS = ("implementation", "shape", "routing", "dtype", "device", "note")
# Its times that are read, in JSON each a spread.
TIMES = ("forward_ms", "forward_backward_ms", "forward_backward_queued_ms", "forward_backward_host_ms")
#: Percentages of a side, in words.
COUNTERS = {
    "tensor_active": "tensor cores busy",
    "sm_active": "multiprocessors busy",
    "dram_active": "memory bandwidth in use",
    "gpu_busy": "any kernel running",
}
EXPERT_CALLS = "train/moe/expert_calls"
T = TypeVar("T")
_DISPATCHED = re.compile(r"(\d+) expert calls dispatched")


@dataclass(frozen=True)
class Numbers:
    """What has one number for a training and for a side; None = not measured."""

    tokens_per_step: float | None  # trainable tokens of a timed step, median
    peak_allocated_gib: float | None  # highest of the whole run, to 0.01 GiB, as the next
    peak_active_gib: float | None
    frozen_gib: float | None  # experts that get no gradient, at rest
    gpu_busy: float | None  # percent, mean over the timed steps, as the next three
    sm_active: float | None
    tensor_active: float | None
    dram_active: float | None
    power_w: float | None  # mean over the timed steps
    startup_s: float | None  # process start to the trainer's start
    first_step_s: float | None  # from there to the first step's log
    expert_calls: int | None  # that our kernels ran in the whole run; None where it was never logged


@dataclass(frozen=True)
class RunMetrics(Numbers):
    """Numbers of one training. Times, rates, utilisation: of the steps after warm-up."""

    run_id: str
    role: str
    ok: bool
    steps: int  # in the log
    timed_steps: int
    step_ms: list[float]  # each timed step, from one trainer log to the next (Axolotl waits for the loss there)
    tokens_per_s: list[float]  # of each timed step, by Axolotl's own count of trainable tokens
    peak_reserved_gib: float | None  # highest of the whole run, to 0.01 GiB
    device_memory_gib: float | None  # highest that NVML saw on the device
    total_s: float
    idle_step: int | None  # the first step, from 1, without an expert call; None where all are alike
    losses: list[float]  # every step, from the first, as the next
    grad_norms: list[float]


@dataclass(frozen=True)
class SideMetrics(Numbers):
    """Numbers of one side: all finished runs of one role taken together, times as median and spread."""

    role: str
    runs: int
    step_ms: Spread | None
    tokens_per_s: Spread | None
    energy_j_per_step: float | None  # power times step time


@dataclass(frozen=True)
class Share:
    """The experts' part of a training step, from the layer's own measurement."""

    implementation: str  # what the layer was measured with
    experts_ms: float  # expert layers x calls a step x (forward + backward) ms
    step_ms: float  # the measured step
    fraction: float  # of the step; above 1 where the two measurements do not fit together
    limit: float | None  # speed-up of the step if the experts took no time (Amdahl); None from a share of 1 on


def run_metrics(result: RunResult, warmup: int) -> RunMetrics:
    """The numbers of one training; its first ``warmup`` steps are not timed."""
    rows, samples, trainer = result.rows, result.samples, result.trainer_started_at
    # From the log of the last warm-up step on: a step's time is the distance to the log before it.
    timed = rows[max(warmup - 1, 0) :]
    stamps = _column(timed, "_timestamp")
    start, end = (stamps[0], stamps[-1]) if len(stamps) > 1 else (math.inf, -math.inf)
    tokens = _column(timed, "train/tokens/trainable")

    def mean_inside(times: Sequence[float], values: Sequence[float]) -> float | None:
        return _of(_mean, [value for time, value in zip(times, values, strict=True) if start <= time <= end])

    return RunMetrics(
        run_id=result.run_id,
        role=result.role,
        ok=result.status == FINISHED,
        steps=len(rows),
        timed_steps=max(len(timed) - 1, 0),
        step_ms=[1000 * (after - before) for before, after in pairwise(stamps)],
        tokens_per_s=_column(timed[1:], "train/tokens/train_per_sec_per_gpu"),
        tokens_per_step=_of(statistics.median, [after - before for before, after in pairwise(tokens)]),
        # Axolotl logs zeros where there is no GPU.
        peak_allocated_gib=_of(max, _column(rows, "train/memory/max_allocated (GiB)")) or None,
        peak_active_gib=_of(max, _column(rows, "train/memory/max_active (GiB)")) or None,
        frozen_gib=sum(result.frozen.values()) / GIB or None,
        peak_reserved_gib=_of(max, _column(rows, "train/memory/device_reserved (GiB)")) or None,
        gpu_busy=mean_inside(samples.t, samples.busy),
        sm_active=mean_inside(samples.counters_t, samples.sm_active),
        tensor_active=mean_inside(samples.counters_t, samples.tensor_active),
        dram_active=mean_inside(samples.counters_t, samples.dram_active),
        power_w=mean_inside(samples.t, samples.power),
        device_memory_gib=_of(max, samples.memory),
        startup_s=None if trainer is None else trainer - result.started_at,
        first_step_s=None if trainer is None or not rows else float(rows[0]["_timestamp"]) - trainer,
        total_s=result.ended_at - result.started_at,
        expert_calls=expert_calls(result),
        idle_step=_idle_step(rows),
        losses=_column(rows, "train/loss"),
        grad_norms=_column(rows, "train/grad_norm"),
    )


def expert_calls(result: RunResult) -> int | None:
    """Expert calls that our kernels ran: the sum of the logged metric, else as in the plugin's first line."""
    logged = _column(result.rows, EXPERT_CALLS)
    if logged:
        return int(sum(calls for calls in logged if math.isfinite(calls)))
    said = _DISPATCHED.search(result.plugin_line)
    return int(said.group(1)) if said else None


def _idle_step(rows: Sequence[Row]) -> int | None:
    busy = [float(row.get(EXPERT_CALLS) or 0) > 0 for row in rows]
    return busy.index(False) + 1 if any(busy) and not all(busy) else None


def side_metrics(runs: Sequence[RunMetrics], role: str) -> SideMetrics:
    """All finished runs of one role as one side."""
    mine = [run for run in runs if run.role == role and run.ok]
    measured = {name: [found for run in mine if (found := getattr(run, name)) is not None] for name in OF_RUNS}
    numbers = {name: _of(how, measured[name]) for name, how in OF_RUNS.items()}
    step_ms = _of(Spread.of, [ms for run in mine for ms in run.step_ms])
    power = numbers["power_w"]
    return SideMetrics(
        role=role,
        runs=len(mine),
        step_ms=step_ms,
        tokens_per_s=_of(Spread.of, [rate for run in mine for rate in run.tokens_per_s]),
        energy_j_per_step=power * step_ms.median / 1000 if power is not None and step_ms is not None else None,
        **numbers,
    )


def experts_by_name(experts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Measurements by implementation, ours as ``"moe_kernels"``; times are medians, ``largest_error`` is of them all.

    The error of an implementation that is wrong may be NaN, which is a word in JSON and a number here.
    """
    found = {}
    for row in experts.get("measurements", []):
        numbers = {key: float(value) for key, value in row.items() if value in NOT_FINITE and key not in WORDS}
        medians = {key: float(row[key]["median"]) for key in TIMES if row.get(key)}
        errors = [float(error) for error in row.get("rel_error", {}).values()]
        worst = max(errors, key=lambda error: (math.isnan(error), error), default=None)
        name = str(row["implementation"])
        found[OURS if name.startswith(OURS) else name] = row | numbers | medians | {"largest_error": worst}
    return found


def share(
    side: SideMetrics, layer: dict[str, Any] | None, moe_layers: int | None, config: dict[str, Any]
) -> Share | None:
    """The experts' share of a side's step; None where the step or the layer was not measured."""
    if side.step_ms is None or layer is None or not moe_layers or not layer.get("forward_backward_ms"):
        return None
    # With gradient checkpointing the forward pass runs twice.
    again = layer["forward_ms"] if config.get("gradient_checkpointing") else 0.0
    experts_ms = moe_layers * calls_per_step(config) * (layer["forward_backward_ms"] + again)
    step_ms = side.step_ms.median
    limit = step_ms / (step_ms - experts_ms) if step_ms > experts_ms else None
    return Share(str(layer["implementation"]), experts_ms, step_ms, experts_ms / step_ms, limit)


def _column(rows: Sequence[Row], key: str) -> list[float]:
    return [float(row[key]) for row in rows if row.get(key) is not None]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _of(how: Callable[[list[Any]], T], values: list[Any]) -> T | None:
    """What ``how`` makes of ``values``; None where there are none."""
    return how(values) if values else None


#: How the numbers of the runs of one side become one.
OF_RUNS: dict[str, Callable[[list[Any]], Any]] = {
    "tokens_per_step": statistics.median,
    **dict.fromkeys(("peak_allocated_gib", "peak_active_gib", "frozen_gib"), max),
    **dict.fromkeys((*COUNTERS, "power_w"), _mean),
    **dict.fromkeys(("startup_s", "first_step_s"), statistics.median),
    "expert_calls": min,
}
