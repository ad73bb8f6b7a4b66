"""From raw rows to numbers: one :class:`RunMetrics` a training, one :class:`SideMetrics` for each side."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from moe_kernels.tools.bench.timing import Spread
from moe_kernels.tools.compare.decode import NOT_FINITE
from moe_kernels.tools.compare.plan import calls_per_step
from moe_kernels.tools.compare.runner import FINISHED, RunResult
from moe_kernels.tools.compare.wandb_reader import Row

OURS = "moe_kernels"
# What a measurement says in words; all else in it are numbers.
WORDS = ("implementation", "shape", "routing", "dtype", "device", "note")
EXPERT_CALLS = "train/moe/expert_calls"
_DISPATCHED = re.compile(r"(\d+) expert calls dispatched")


@dataclass(frozen=True)
class RunMetrics:
    """Numbers of one training. Times, rates, utilisation: of the steps after warm-up. None = not measured.

    Attributes:
        steps: steps in the log, and ``timed_steps`` those that times are taken from.
        step_ms: each timed step, from one trainer log to the next (Axolotl waits for the loss there).
        tokens_per_s: of each timed step, by Axolotl's own count of trainable tokens.
        tokens_per_step: trainable tokens of a timed step, median.
        peak_allocated_gib, peak_active_gib, peak_reserved_gib: highest of the whole run, to 0.01 GiB.
        gpu_busy, sm_active, tensor_active, dram_active: percent, mean over the timed steps.
        power_w: mean over the timed steps; ``energy_j_per_step`` is power times step time.
        device_memory_gib: highest that NVML saw on the device.
        startup_s: process start to the trainer's start; ``first_step_s``: from there to the first step's log.
        expert_calls: expert calls that our kernels took in the whole run; None where it was never logged.
        idle_step: the first step, from 1, that logged no such call while others did; None where all did, or none.
        losses, grad_norms: every step, from the first.
    """

    run_id: str
    role: str
    ok: bool
    steps: int
    timed_steps: int
    step_ms: list[float]
    tokens_per_s: list[float]
    tokens_per_step: float | None
    peak_allocated_gib: float | None
    peak_active_gib: float | None
    peak_reserved_gib: float | None
    gpu_busy: float | None
    sm_active: float | None
    tensor_active: float | None
    dram_active: float | None
    power_w: float | None
    device_memory_gib: float | None
    startup_s: float | None
    first_step_s: float | None
    total_s: float
    expert_calls: int | None
    idle_step: int | None
    losses: list[float]
    grad_norms: list[float]


@dataclass(frozen=True)
class SideMetrics:
    """Numbers of one side: all finished runs of one role taken together, times as median and spread."""

    role: str
    runs: int
    step_ms: Spread | None
    tokens_per_s: Spread | None
    tokens_per_step: float | None
    peak_allocated_gib: float | None
    peak_active_gib: float | None
    gpu_busy: float | None
    sm_active: float | None
    tensor_active: float | None
    dram_active: float | None
    power_w: float | None
    energy_j_per_step: float | None
    startup_s: float | None
    first_step_s: float | None
    expert_calls: int | None

    def to_json(self) -> dict[str, Any]:
        """Plain values; a spread becomes {median, p20, p80}."""
        return asdict(self)


@dataclass(frozen=True)
class Share:
    """The experts' part of a training step, from the layer's own measurement.

    Attributes:
        implementation: what the layer was measured with.
        experts_ms: expert layers x calls a step x (forward + backward) ms.
        step_ms: the measured step.
        fraction: of the step; above 1 where the two measurements do not fit together.
        limit: speed-up of the step if the experts took no time (Amdahl); None where the share is 1 or more.
    """

    implementation: str
    experts_ms: float
    step_ms: float

    @property
    def fraction(self) -> float:
        return self.experts_ms / self.step_ms

    @property
    def limit(self) -> float | None:
        rest = self.step_ms - self.experts_ms
        return self.step_ms / rest if rest > 0 else None

    def to_json(self) -> dict[str, Any]:
        """Plain values, the derived ones too."""
        return {**asdict(self), "fraction": self.fraction, "limit": self.limit}


def run_metrics(result: RunResult, warmup: int) -> RunMetrics:
    """The numbers of one training; ``warmup`` steps at its start give no times."""
    rows = result.rows
    # From the log of the last warm-up step on: a step's time is the distance to the log before it.
    timed = rows[max(warmup - 1, 0) :]
    start, end = (float(timed[0]["_timestamp"]), float(timed[-1]["_timestamp"])) if len(timed) > 1 else (0.0, 0.0)
    samples = result.samples
    busy, power = (_mean(_inside(samples.t, values, start, end)) for values in (samples.busy, samples.power))
    counters = [
        _mean(_inside(samples.counters_t, values, start, end))
        for values in (samples.sm_active, samples.tensor_active, samples.dram_active)
    ]
    first = float(rows[0]["_timestamp"]) if rows else None
    trainer = result.trainer_started_at
    return RunMetrics(
        run_id=result.run_id,
        role=result.role,
        ok=result.status == FINISHED,
        steps=len(rows),
        timed_steps=max(len(timed) - 1, 0),
        step_ms=[1000 * (float(b["_timestamp"]) - float(a["_timestamp"])) for a, b in pairwise(timed)],
        tokens_per_s=_column(timed[1:], "train/tokens/train_per_sec_per_gpu"),
        tokens_per_step=_median([b - a for a, b in pairwise(_column(timed, "train/tokens/trainable"))]),
        peak_allocated_gib=_peak(rows, "train/memory/max_allocated (GiB)"),
        peak_active_gib=_peak(rows, "train/memory/max_active (GiB)"),
        peak_reserved_gib=_peak(rows, "train/memory/device_reserved (GiB)"),
        gpu_busy=busy,
        sm_active=counters[0],
        tensor_active=counters[1],
        dram_active=counters[2],
        power_w=power,
        device_memory_gib=max(samples.memory, default=None),
        startup_s=None if trainer is None else trainer - result.started_at,
        first_step_s=None if trainer is None or first is None else first - trainer,
        total_s=result.ended_at - result.started_at,
        expert_calls=expert_calls(result),
        idle_step=_idle_step(rows),
        losses=_column(rows, "train/loss"),
        grad_norms=_column(rows, "train/grad_norm"),
    )


def expert_calls(result: RunResult) -> int | None:
    """Expert calls our kernels took: the sum of the logged metric, else what the plugin's first line says."""
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
    step_ms = _spread([ms for run in mine for ms in run.step_ms])
    power = _mean_of(run.power_w for run in mine)
    calls = [run.expert_calls for run in mine if run.expert_calls is not None]
    return SideMetrics(
        role=role,
        runs=len(mine),
        step_ms=step_ms,
        tokens_per_s=_spread([rate for run in mine for rate in run.tokens_per_s]),
        tokens_per_step=_median([run.tokens_per_step for run in mine if run.tokens_per_step is not None]),
        peak_allocated_gib=_max_of(run.peak_allocated_gib for run in mine),
        peak_active_gib=_max_of(run.peak_active_gib for run in mine),
        gpu_busy=_mean_of(run.gpu_busy for run in mine),
        sm_active=_mean_of(run.sm_active for run in mine),
        tensor_active=_mean_of(run.tensor_active for run in mine),
        dram_active=_mean_of(run.dram_active for run in mine),
        power_w=power,
        energy_j_per_step=power * step_ms.median / 1000 if power is not None and step_ms is not None else None,
        startup_s=_median([run.startup_s for run in mine if run.startup_s is not None]),
        first_step_s=_median([run.first_step_s for run in mine if run.first_step_s is not None]),
        expert_calls=min(calls, default=None),
    )


def experts_by_name(experts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Measurements by implementation; ours under ``"moe_kernels"`` whatever its settings.

    The error of an implementation that is wrong may be NaN, which is a word in JSON and a number here.
    """
    found = {}
    for row in experts.get("measurements", []):
        name = str(row["implementation"])
        numbers = {key: float(value) for key, value in row.items() if value in NOT_FINITE and key not in WORDS}
        errors = {key: float(error) for key, error in row.get("rel_error", {}).items()}
        found[OURS if name.startswith(OURS) else name] = row | numbers | {"rel_error": errors}
    return found


def share(
    side: SideMetrics, layer: dict[str, Any] | None, moe_layers: int | None, config: dict[str, Any]
) -> Share | None:
    """The experts' share of a side's step; None where the step or the layer was not measured."""
    if side.step_ms is None or layer is None or not moe_layers or not layer.get("forward_backward_ms"):
        return None
    one_call = float(layer["forward_backward_ms"]["median"])
    if config.get("gradient_checkpointing"):
        # The forward pass runs twice.
        one_call += float(layer["forward_ms"]["median"])
    return Share(str(layer["implementation"]), moe_layers * calls_per_step(config) * one_call, side.step_ms.median)


def _column(rows: Sequence[Row], key: str) -> list[float]:
    return [float(row[key]) for row in rows if row.get(key) is not None]


def _peak(rows: Sequence[Row], key: str) -> float | None:
    # Axolotl logs zeros where there is no GPU.
    return max(_column(rows, key), default=0.0) or None


def _inside(times: Sequence[float], values: Sequence[float], start: float, end: float) -> list[float]:
    return [value for time, value in zip(times, values, strict=True) if start <= time <= end]


def _spread(samples: list[float]) -> Spread | None:
    return Spread.of(samples) if samples else None


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _mean_of(values: Any) -> float | None:
    return _mean([value for value in values if value is not None])


def _max_of(values: Any) -> float | None:
    return max((value for value in values if value is not None), default=None)
