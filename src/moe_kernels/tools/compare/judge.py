"""Verdicts: do the losses agree, did the kernels run, does each claim hold here."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moe_kernels.tools.compare.metrics import COUNTERS, OURS, RunMetrics, SideMetrics

CONFIRMED, NOT_CONFIRMED, NOT_JUDGED = "confirmed", "not confirmed", "cannot be judged here"

SMOOTHING = 5
NOISE_FACTOR = 3.0
CLAIMED_SPEEDUP = 2.0
# Axolotl logs memory in hundredths of a GiB, and the allocator rounds: a smaller gain is none.
SMALLEST_MEMORY_GAIN = 0.01
SMALLEST_UTILISATION_GAIN = 1.0


@dataclass(frozen=True)
class Distance:
    """One measure of how far two trainings are apart."""

    words: str  # for a distance and the tolerance that it exceeds
    floor: dict[str, float]  # by precision, the share of the loss (or gradient norm) that rounding may move it by
    ceiling: float = 0.05  # the share above which a tolerance, set by the baselines' own noise, hides every fault


# Over a run rounding adds up; at the first step the weights are the same and only the forward pass differs.
CURVE_FLOOR = {"bf16": 0.01, "fp16": 0.01, "fp32": 0.001}
FIRST_STEP_FLOOR = {"bf16": 0.002, "fp16": 0.001, "fp32": 0.0001}
FIRST_GRADIENT_FLOOR = {"bf16": 0.03, "fp16": 0.02, "fp32": 0.001}
#: In the order of :func:`_distances`.
DISTANCES = (
    Distance("the first step differs by {:.2g}, more than {:.2g}", FIRST_STEP_FLOOR),
    Distance("the smoothed curves differ by {:.2g} on average, more than {:.2g}", CURVE_FLOOR),
    Distance("the smoothed curves differ by {:.2g} at worst, more than {:.2g}", CURVE_FLOOR),
    Distance("the first gradient norm differs by {:.2%}, more than {:.2%}", FIRST_GRADIENT_FLOOR, ceiling=0.2),
)


@dataclass(frozen=True)
class LossAgreement:
    """The two loss curves against each other and against the baseline's own repetition.

    Differences are absolute, in units of the loss, but for the relative one of the gradient norms. ``noise_...`` is
    the same between the two runs of the baseline that are furthest apart, None with one.
    """

    verdict: str
    words: str  # why
    dtype: str
    smoothing: int = SMOOTHING  # steps of the running mean that smooths the curves
    first: float | None = None  # at the first step
    first_tolerance: float | None = None
    first_gradient: float | None = None
    first_gradient_tolerance: float | None = None
    mean: float | None = None  # of the smoothed curves, with ``tolerance``
    largest: float | None = None  # of the smoothed curves
    last: float | None = None  # of the smoothed curves at the last step
    tolerance: float | None = None
    largest_tolerance: float | None = None
    noise_first: float | None = None
    noise_mean: float | None = None
    noise_largest: float | None = None
    differences: tuple[float, ...] = ()  # optimised minus baseline, step by step, not smoothed
    noise: tuple[float, ...] = ()  # second baseline minus first


@dataclass(frozen=True)
class Claim:
    """One claim of the README and its verdict here."""

    title: str
    verdict: str
    evidence: str


def smooth(values: Sequence[float]) -> list[float]:
    """Running mean over the last five values (fewer at the start)."""
    parts = [values[max(0, i + 1 - SMOOTHING) : i + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def judge_loss(runs: Sequence[RunMetrics], dtype: str) -> LossAgreement:
    """Compare the optimised run that is furthest off with the first baseline, by the baselines' own noise."""
    finished = [run for run in runs if run.ok]
    baselines = [run for run in finished if run.role == "baseline"]
    optimized = [run for run in finished if run.role == "optimized"]
    for run in (*baselines, *optimized):
        for step, loss in enumerate(run.losses, start=1):
            if not math.isfinite(loss):
                return LossAgreement(NOT_CONFIRMED, f"the loss of {run.run_id} is {loss} at step {step}", dtype)
    if not baselines or not optimized:
        missing = "baseline" if not baselines else "optimised"
        return LossAgreement(NOT_JUDGED, f"no finished {missing} run", dtype)
    steps = min(len(run.losses) for run in (*baselines, *optimized))
    if steps == 0:
        return LossAgreement(NOT_JUDGED, "no losses were logged", dtype)
    one = baselines[0]
    pairs = [_distances(a, b, steps) for a, b in itertools.combinations(baselines, 2)]
    noise = [max(apart) for apart in zip(*pairs, strict=True)] if pairs else [0.0] * len(DISTANCES)
    tolerances, wide = _tolerances(one.losses[:steps], noise, dtype)
    other = max(optimized, key=lambda run: _excess(_distances(one, run, steps), tolerances))
    apart = _distances(one, other, steps)
    faults = [
        distance.words.format(found, tolerance)
        for distance, found, tolerance in zip(DISTANCES, apart, tolerances, strict=True)
        if not found <= tolerance
    ]
    against = f"two baseline runs differ by {noise[1]:.2g}" if pairs else "the baseline was not repeated"
    words = "; ".join(faults) or (
        f"the smoothed curves differ by {apart[1]:.2g} on average and {apart[2]:.2g} at worst "
        f"(tolerance {tolerances[1]:.2g}; {against}), "
        f"the first step by {apart[0]:.2g} (tolerance {tolerances[0]:.2g})"
    )
    if wide and not faults:
        words = f"two equal baseline runs differ by so much that a fault would not show: {words}"
    measured = bool(one.grad_norms and other.grad_norms)
    return LossAgreement(
        verdict=NOT_CONFIRMED if faults else NOT_JUDGED if wide else CONFIRMED,
        words=f"{other.run_id}, the furthest off of {len(optimized)}: {words}" if len(optimized) > 1 else words,
        dtype=dtype,
        first=apart[0],
        first_tolerance=tolerances[0],
        first_gradient=apart[3] if measured else None,
        first_gradient_tolerance=tolerances[3] if measured else None,
        mean=apart[1],
        largest=apart[2],
        last=abs(smooth(other.losses[:steps])[-1] - smooth(one.losses[:steps])[-1]),
        tolerance=tolerances[1],
        largest_tolerance=tolerances[2],
        noise_first=noise[0] if pairs else None,
        noise_mean=noise[1] if pairs else None,
        noise_largest=noise[2] if pairs else None,
        differences=_differences(one.losses, other.losses, steps),
        noise=_differences(one.losses, baselines[1].losses, steps) if pairs else (),
    )


def _tolerances(losses: Sequence[float], noise: Sequence[float], dtype: str) -> tuple[list[float], bool]:
    """The largest allowed distances, and whether one is so large that no fault would show."""
    level = sum(abs(loss) for loss in losses) / len(losses)
    scales = (abs(losses[0]), level, level, 1.0)
    tolerances, wide = [], False
    for distance, apart, scale in zip(DISTANCES, noise, scales, strict=True):
        floor = distance.floor[dtype]
        tolerances.append(max(NOISE_FACTOR * apart, floor * scale))
        wide = wide or tolerances[-1] > max(floor, distance.ceiling) * scale
    return tolerances, wide


def _excess(distances: Sequence[float], tolerances: Sequence[float]) -> float:
    """The largest of the distances over their tolerances; not a number counts as infinite."""
    quotients = [
        apart / tolerance if tolerance else math.inf if apart else 0.0
        for apart, tolerance in zip(distances, tolerances, strict=True)
    ]
    return max(math.inf if math.isnan(quotient) else quotient for quotient in quotients)


def _distances(one: RunMetrics, other: RunMetrics, steps: int) -> tuple[float, float, float, float]:
    """Of the first loss, the smoothed curves (mean and largest) and, relative, the first gradient norm."""
    apart = [abs(d) for d in _differences(smooth(one.losses[:steps]), smooth(other.losses[:steps]), steps)]
    gradient = 0.0
    if one.grad_norms and other.grad_norms and (norm := one.grad_norms[0]) != other.grad_norms[0]:
        gradient = abs(other.grad_norms[0] / norm - 1) if norm else math.inf
    return apart[0], sum(apart) / len(apart), max(apart), gradient


def _differences(one: Sequence[float], other: Sequence[float], steps: int) -> tuple[float, ...]:
    return tuple(b - a for a, b in zip(one[:steps], other[:steps], strict=False))


def kernels_ran(runs: Sequence[RunMetrics], uses_kernels: dict[str, bool]) -> str | None:
    """Which run did not use the kernels that it should use, or None."""
    for run in runs:
        if not run.ok:
            continue
        if uses_kernels[run.run_id] and (not run.expert_calls or run.idle_step):
            step = f" at step {run.idle_step}" if run.expert_calls else ""
            return (
                f"{run.run_id} did not use the kernels{step}: no expert call was dispatched to moe_kernels. "
                "Its times are those of the stock kernels. Cure: moe-kernels doctor says why."
            )
        if not uses_kernels[run.run_id] and run.expert_calls:
            return f"{run.run_id} should show the stock kernels, but moe_kernels took {run.expert_calls} calls."
    return None


Layer = dict[str, dict[str, Any]]
#: A claim, whether it holds (None: not measured), and the numbers.
Judged = tuple[str, bool | None, str]


def judge_claims(
    sides: dict[str, SideMetrics], layer: Layer, loss: LossAgreement, on_gpu: bool, fault: str | None, note: str = ""
) -> list[Claim]:
    """The README's claims in its order; ``note`` says why there is no ``layer``."""
    if fault is not None:
        return [Claim("The optimised run used the kernels", NOT_CONFIRMED, fault)]
    before, after = sides["baseline"], sides["optimized"]
    judged = (
        *(_faster_experts(layer, stock, note) for stock in ("eager", "grouped_mm")),
        _faster_step(before, after),
        _less_memory(before, after, layer),
        _fewer_launches(layer, note if on_gpu else None),
        _better_utilisation(before, after),
    )
    claims = [
        Claim(title, NOT_JUDGED if holds is None or not on_gpu else CONFIRMED if holds else NOT_CONFIRMED, evidence)
        for title, holds, evidence in judged
    ]
    return [*claims, Claim("The same loss curve", loss.verdict, loss.words)]


def _faster_experts(layer: Layer, stock: str, note: str) -> Judged:
    title = f"Expert forward at least {CLAIMED_SPEEDUP:.0f}x as fast as {stock}"
    theirs, ours = layer.get(stock, {}), layer.get(OURS, {})
    if not theirs.get("forward_ms") or not ours.get("forward_ms"):
        return title, None, _why_missing(layer, stock, note)
    ratio = theirs["forward_ms"] / ours["forward_ms"]
    evidence = f"{ratio:.2f}x: {theirs['forward_ms']:.3g} ms to {ours['forward_ms']:.3g} ms"
    one, two = theirs.get("forward_backward_ms"), ours.get("forward_backward_ms")
    if one and two:
        evidence += f"; forward and backward {one / two:.2f}x: {one:.3g} ms to {two:.3g} ms"
    return title, ratio >= CLAIMED_SPEEDUP, evidence


def _faster_step(before: SideMetrics, after: SideMetrics) -> Judged:
    title, one, two = "A faster training step", before.step_ms, after.step_ms
    if one is None or two is None:
        return title, None, "a side has no finished run"
    ratio, apart = one.median / two.median, two.p80 < one.p20
    times = " to ".join(f"{side.median:.4g} ms ({side.p20:.4g} to {side.p80:.4g})" for side in (one, two))
    overlap = "; the spreads overlap" if ratio > 1 and not apart else ""
    return title, ratio > 1 and apart, f"{ratio:.2f}x: {times}{overlap}"


def _less_memory(before: SideMetrics, after: SideMetrics, layer: Layer) -> Judged:
    saved = [layer.get(name, {}).get("saved_mb") for name in ("grouped_mm", OURS)]
    of_layer = f"saved for backward per layer {saved[0]:.4g} to {saved[1]:.4g} MiB (grouped_mm)" if all(saved) else ""
    holds, one, two = None, before.peak_allocated_gib, after.peak_allocated_gib
    peak = "the training's peak needs a GPU"
    if one is not None and two is not None:
        holds = two <= one * (1 - SMALLEST_MEMORY_GAIN)
        peak = f"peak of the training {one:.2f} to {two:.2f} GiB ({two / one - 1:+.1%})"
    return "Less memory", holds, "; ".join(filter(None, (peak, of_layer)))


def _fewer_launches(layer: Layer, note: str | None) -> Judged:
    """``note`` is None without a GPU."""
    title = "Fewer kernel launches per expert layer"
    counts = {name: layer.get(name, {}).get("launches_forward_backward") for name in ("eager", "grouped_mm", OURS)}
    if counts[OURS] is None or counts["grouped_mm"] is None:
        why = "launches are counted on a GPU" if note is None else _why_missing(layer, "grouped_mm", note)
        return title, None, why
    known = {name: count for name, count in counts.items() if count is not None}
    fewest = min(count for name, count in known.items() if name != OURS)
    evidence = ", ".join(f"{name} {count}" for name, count in known.items())
    return title, known[OURS] < fewest, f"forward and backward: {evidence}"


def _better_utilisation(before: SideMetrics, after: SideMetrics) -> Judged:
    title, parts, gains = "Better GPU utilisation", [], []
    # The most telling counter first, which decides: "any kernel running" is near 100% for a slow kernel too.
    for name in ("tensor_active", "sm_active", "gpu_busy"):
        one, two = getattr(before, name), getattr(after, name)
        if one is not None and two is not None:
            parts.append(f"{COUNTERS[name]} {one:.0f}% to {two:.0f}%")
            gains.append(two - one)
    if not gains:
        return title, None, "needs an NVIDIA GPU with NVML"
    return title, gains[0] >= SMALLEST_UTILISATION_GAIN, "; ".join(parts)


def _why_missing(layer: Layer, stock: str, note: str) -> str:
    if note and not layer:
        return f"the expert layer was not measured: {note}"
    for name in (OURS, stock):
        if name not in layer:
            return f"the expert layer was not measured with {name}"
        if not layer[name]["ok"]:
            return f"{name}: {layer[name]['note']}"
    return "the expert layer was not timed"
