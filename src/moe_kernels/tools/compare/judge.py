"""What the numbers say: do the losses agree, did the kernels run, does each claim hold here."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moe_kernels.tools.compare.metrics import OURS, RunMetrics, SideMetrics

CONFIRMED, NOT_CONFIRMED, NOT_JUDGED = "confirmed", "not confirmed", "cannot be judged here"

SMOOTHING = 5
NOISE_FACTOR = 3.0
# Shares of the loss that rounding alone may move it by: over a run (another order of additions, then training
# on), and at the first step (same weights, so only the forward pass differs).
CURVE_FLOOR = {"bf16": 0.01, "fp16": 0.01, "fp32": 0.001}
FIRST_STEP_FLOOR = {"bf16": 0.002, "fp16": 0.001, "fp32": 0.0001}
FIRST_GRADIENT_FLOOR = {"bf16": 0.03, "fp16": 0.02, "fp32": 0.001}
# Shares of the loss, and of the gradient norm, beyond which a tolerance that the baseline's own noise sets would let
# anything pass: then nothing can be judged.
LOSS_CEILING, GRADIENT_CEILING = 0.05, 0.2
# What _distances measures: words, form, and how.
_WORDS = (
    ("the first step differs", "{:.2g}", ""),
    ("the smoothed curves differ", "{:.2g}", " on average"),
    ("the smoothed curves differ", "{:.2g}", " at worst"),
    ("the first gradient norm differs", "{:.2%}", ""),
)
CLAIMED_SPEEDUP = 2.0
# Axolotl logs memory in hundredths of a GiB, and the allocator rounds: less is no difference.
SMALLEST_MEMORY_GAIN = 0.01
SMALLEST_UTILISATION_GAIN = 1.0


@dataclass(frozen=True)
class LossAgreement:
    """The two loss curves against each other and against the baseline's own repetition.

    All differences are absolute, in units of the loss. The curve is smoothed by a running mean over
    ``smoothing`` steps before the largest difference is taken.

    Attributes:
        verdict: ``"confirmed"``, ``"not confirmed"`` or ``"cannot be judged here"``; ``words`` says why.
        first: difference at the first step, with ``first_tolerance``.
        first_gradient: relative difference of the first gradient norm, with ``first_gradient_tolerance``.
        mean, largest: of the smoothed curves, with ``tolerance`` and ``largest_tolerance``.
        last: difference of the smoothed curves at the last step.
        noise_first, noise_mean, noise_largest: the same between the two runs of the baseline that are furthest
            apart; None with one.
        differences, noise: optimised (or second baseline) minus baseline, step by step, not smoothed.
    """

    verdict: str
    words: str
    dtype: str
    smoothing: int = SMOOTHING
    first: float | None = None
    first_tolerance: float | None = None
    first_gradient: float | None = None
    first_gradient_tolerance: float | None = None
    mean: float | None = None
    largest: float | None = None
    last: float | None = None
    tolerance: float | None = None
    largest_tolerance: float | None = None
    noise_first: float | None = None
    noise_mean: float | None = None
    noise_largest: float | None = None
    differences: tuple[float, ...] = ()
    noise: tuple[float, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Claim:
    """One promise and what became of it here."""

    title: str
    verdict: str
    evidence: str

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def smooth(values: Sequence[float], window: int = SMOOTHING) -> list[float]:
    """Running mean over the last ``window`` values (fewer at the start)."""
    return [sum(part) / len(part) for i in range(len(values)) if (part := values[max(0, i + 1 - window) : i + 1])]


def judge_loss(runs: Sequence[RunMetrics], dtype: str) -> LossAgreement:
    """Compare every optimised run with the first baseline, measured against the baselines' own noise; the worst."""
    baselines = [run for run in runs if run.role == "baseline" and run.ok]
    optimized = [run for run in runs if run.role == "optimized" and run.ok]
    for run in (*baselines, *optimized):
        bad = next((i for i, loss in enumerate(run.losses) if not math.isfinite(loss)), None)
        if bad is not None:
            return LossAgreement(
                NOT_CONFIRMED, f"the loss of {run.run_id} is {run.losses[bad]} at step {bad + 1}", dtype
            )
    if not baselines or not optimized:
        missing = "baseline" if not baselines else "optimised"
        return LossAgreement(NOT_JUDGED, f"no finished {missing} run", dtype)
    steps = min(len(run.losses) for run in (*baselines, *optimized))
    if steps == 0:
        return LossAgreement(NOT_JUDGED, "no losses were logged", dtype)
    one = baselines[0]
    level = sum(abs(loss) for loss in one.losses[:steps]) / steps
    scales = (abs(one.losses[0]), level, level, 1.0)
    floors = (FIRST_STEP_FLOOR[dtype], CURVE_FLOOR[dtype], CURVE_FLOOR[dtype], FIRST_GRADIENT_FLOOR[dtype])
    ceilings = (*[LOSS_CEILING] * 3, GRADIENT_CEILING)
    pairs = [_distances(a, b, steps) for a, b in itertools.combinations(baselines, 2)]
    noise = [max(numbers) for numbers in zip(*pairs, strict=True)] if pairs else [0.0] * len(floors)
    tolerances = [
        max(NOISE_FACTOR * apart, floor * scale) for apart, floor, scale in zip(noise, floors, scales, strict=True)
    ]

    def excess(run: RunMetrics) -> float:
        """How far beyond what is allowed a run is: the largest quotient; not a number counts as infinite."""
        found = [
            apart / tolerance if tolerance else math.inf if apart else 0.0
            for apart, tolerance in zip(_distances(one, run, steps), tolerances, strict=True)
        ]
        return max(math.inf if math.isnan(quotient) else quotient for quotient in found)

    other = max(optimized, key=excess)
    apart = _distances(one, other, steps)
    first, mean, largest, gradient = apart
    faults = [
        f"{what} by {form.format(found)}{how}, more than {form.format(tolerance)}"
        for (what, form, how), found, tolerance in zip(_WORDS, apart, tolerances, strict=True)
        if not found <= tolerance
    ]
    wide = any(
        tolerance > max(floor, ceiling) * scale
        for tolerance, floor, ceiling, scale in zip(tolerances, floors, ceilings, scales, strict=True)
    )
    measured = bool(one.grad_norms and other.grad_norms)
    against = f"two baseline runs differ by {noise[1]:.2g}" if pairs else "the baseline was not repeated"
    words = (
        "; ".join(faults)
        or f"the smoothed curves differ by {mean:.2g} on average and {largest:.2g} at worst "
        f"(tolerance {tolerances[1]:.2g}; {against}), "
        f"the first step by {first:.2g} (tolerance {tolerances[0]:.2g})"
    )
    if wide and not faults:
        words = f"two equal baseline runs differ by so much that a fault would not show: {words}"
    last = abs(smooth(other.losses[:steps])[-1] - smooth(one.losses[:steps])[-1])
    return LossAgreement(
        verdict=NOT_CONFIRMED if faults else NOT_JUDGED if wide else CONFIRMED,
        words=f"{other.run_id}, the furthest off of {len(optimized)}: {words}" if len(optimized) > 1 else words,
        dtype=dtype,
        first=first,
        first_tolerance=tolerances[0],
        first_gradient=gradient if measured else None,
        first_gradient_tolerance=tolerances[3] if measured else None,
        mean=mean,
        largest=largest,
        last=last,
        tolerance=tolerances[1],
        largest_tolerance=tolerances[2],
        noise_first=noise[0] if pairs else None,
        noise_mean=noise[1] if pairs else None,
        noise_largest=noise[2] if pairs else None,
        differences=_differences(one.losses, other.losses, steps),
        noise=_differences(one.losses, baselines[1].losses, steps) if pairs else (),
    )


def kernels_ran(runs: Sequence[RunMetrics], uses_kernels: dict[str, bool]) -> str | None:
    """None where each run used what it was meant to use; otherwise what went wrong."""
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


def judge_claims(
    sides: dict[str, SideMetrics],
    layer: dict[str, dict[str, Any]],
    loss: LossAgreement,
    on_gpu: bool,
    fault: str | None,
    note: str = "",
) -> list[Claim]:
    """The README's claims in its order, each with its numbers; ``note`` says why there is no ``layer``."""
    if fault is not None:
        return [Claim("The optimised run used the kernels", NOT_CONFIRMED, fault)]
    before, after = sides["baseline"], sides["optimized"]
    claims = [
        *(_faster_experts(layer, stock, on_gpu, note) for stock in ("eager", "grouped_mm")),
        _faster_step(before, after, on_gpu),
        _less_memory(before, after, layer, on_gpu),
        _fewer_launches(layer, on_gpu, note),
        _better_utilisation(before, after, on_gpu),
        Claim("The same loss curve", loss.verdict, loss.words),
    ]
    return claims


def _faster_experts(layer: dict[str, dict[str, Any]], stock: str, on_gpu: bool, note: str) -> Claim:
    title = f"Expert forward at least {CLAIMED_SPEEDUP:.0f}x as fast as {stock}"
    theirs, ours = (_median(layer.get(name), "forward_ms") for name in (stock, OURS))
    if theirs is None or ours is None:
        return Claim(title, NOT_JUDGED, _why_missing(layer, stock, note))
    both = [_median(layer.get(name), "forward_backward_ms") for name in (stock, OURS)]
    evidence = f"{theirs / ours:.2f}x: {theirs:.3g} ms to {ours:.3g} ms"
    if both[0] is not None and both[1] is not None:
        evidence += f"; forward and backward {both[0] / both[1]:.2f}x: {both[0]:.3g} ms to {both[1]:.3g} ms"
    return Claim(title, _verdict(theirs / ours >= CLAIMED_SPEEDUP, on_gpu), evidence)


def _faster_step(before: SideMetrics, after: SideMetrics, on_gpu: bool) -> Claim:
    title = "A faster training step"
    if before.step_ms is None or after.step_ms is None:
        return Claim(title, NOT_JUDGED, "a side has no finished run")
    ratio = before.step_ms.median / after.step_ms.median
    apart = after.step_ms.p80 < before.step_ms.p20
    evidence = (
        f"{ratio:.2f}x: {before.step_ms.median:.4g} ms ({before.step_ms.p20:.4g} to {before.step_ms.p80:.4g})"
        f" to {after.step_ms.median:.4g} ms ({after.step_ms.p20:.4g} to {after.step_ms.p80:.4g})"
    )
    if ratio > 1 and not apart:
        evidence += "; the spreads overlap"
    return Claim(title, _verdict(ratio > 1 and apart, on_gpu), evidence)


def _less_memory(before: SideMetrics, after: SideMetrics, layer: dict[str, dict[str, Any]], on_gpu: bool) -> Claim:
    title = "Less memory"
    saved = [(layer.get(name) or {}).get("saved_mb") for name in ("grouped_mm", OURS)]
    evidence = (
        [f"saved for backward per layer {saved[0]:.4g} to {saved[1]:.4g} MiB (grouped_mm)"] if all(saved) else []
    )
    peaks = before.peak_allocated_gib, after.peak_allocated_gib
    if peaks[0] is None or peaks[1] is None:
        return Claim(title, NOT_JUDGED, "; ".join(["the training's peak needs a GPU", *evidence]))
    evidence.insert(0, f"peak of the training {peaks[0]:.2f} to {peaks[1]:.2f} GiB ({peaks[1] / peaks[0] - 1:+.1%})")
    return Claim(title, _verdict(peaks[1] <= peaks[0] * (1 - SMALLEST_MEMORY_GAIN), on_gpu), "; ".join(evidence))


def _fewer_launches(layer: dict[str, dict[str, Any]], on_gpu: bool, note: str) -> Claim:
    title = "Fewer kernel launches per expert layer"
    counts = {
        name: (layer.get(name) or {}).get("launches_forward_backward") for name in ("eager", "grouped_mm", OURS)
    }
    if counts[OURS] is None or counts["grouped_mm"] is None:
        return Claim(
            title,
            NOT_JUDGED,
            "launches are counted on a GPU" if not on_gpu else _why_missing(layer, "grouped_mm", note),
        )
    evidence = ", ".join(f"{name} {count}" for name, count in counts.items() if count is not None)
    fewest = min(count for name, count in counts.items() if count is not None and name != OURS)
    return Claim(title, _verdict(counts[OURS] < fewest, on_gpu), f"forward and backward: {evidence}")


def _better_utilisation(before: SideMetrics, after: SideMetrics, on_gpu: bool) -> Claim:
    title = "Better GPU utilisation"
    parts, gains = [], []
    for name, what in (
        ("tensor_active", "tensor cores busy"),
        ("sm_active", "multiprocessors busy"),
        ("gpu_busy", "any kernel running"),
    ):
        one, two = getattr(before, name), getattr(after, name)
        if one is not None and two is not None:
            parts.append(f"{what} {one:.0f}% to {two:.0f}%")
            gains.append(two - one)
    if not gains:
        return Claim(title, NOT_JUDGED, "needs an NVIDIA GPU with NVML")
    # The most telling counter decides: "any kernel running" is near 100% for a slow kernel too.
    return Claim(title, _verdict(gains[0] >= SMALLEST_UTILISATION_GAIN, on_gpu), "; ".join(parts))


def _verdict(holds: bool, on_gpu: bool) -> str:
    if not on_gpu:
        return NOT_JUDGED
    return CONFIRMED if holds else NOT_CONFIRMED


def _why_missing(layer: dict[str, dict[str, Any]], stock: str, note: str) -> str:
    if note and not layer:
        return f"the expert layer was not measured: {note}"
    for name in (OURS, stock):
        if name not in layer:
            return f"the expert layer was not measured with {name}"
        if not layer[name]["ok"]:
            return f"{name}: {layer[name]['note']}"
    return "the expert layer was not timed"


def _median(row: dict[str, Any] | None, key: str) -> float | None:
    return None if row is None or not row.get(key) else float(row[key]["median"])


def _differences(one: Sequence[float], other: Sequence[float], steps: int) -> tuple[float, ...]:
    return tuple(b - a for a, b in zip(one[:steps], other[:steps], strict=False))


def _distances(one: RunMetrics, other: RunMetrics, steps: int) -> tuple[float, float, float, float]:
    """(loss of the first step, mean of the smoothed curves, largest, first gradient norm, relative) in that order."""
    apart = [abs(d) for d in _differences(smooth(one.losses[:steps]), smooth(other.losses[:steps]), steps)]
    return apart[0], sum(apart) / len(apart), max(apart), _relative(one.grad_norms, other.grad_norms)


def _relative(one: Sequence[float], other: Sequence[float]) -> float:
    if not one or not other or one[0] == other[0]:
        return 0.0
    return abs(other[0] / one[0] - 1) if one[0] else math.inf
