"""What this project set out to reach, as a check list of one result file of `moe-kernels bench --json`.

    python benchmarks/goals.py benchmarks/results/h200-layers.json

Exit code 1 if a goal that was measured is not reached. The goals are for an H200 in bfloat16, mild routing and each
layer's own tokens. Ratios are to ``dense``, ``grouped_mm`` and ``sonicmoe`` of the same run, so that they hold on
another day. Where a run has no SonicMoE, its memory and its errors on most layers of h200-layers.json stand in.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moe_kernels.shapes import LAYERS
from moe_kernels.tools.bench.layer import OURS

Row = dict[str, Any]

#: Fraction of dense in GPU time, forward and backward.
DENSE_FRACTION = {
    "mixtral-1b": 0.91,
    "qwen2-moe-1b": 0.81,
    "deepseek-v3-1b": 0.72,
    "mixtral-8x7b": 0.94,
    "qwen2-57b-a14b": 0.94,
    "qwen3-30b-a3b": 0.85,
    "olmoe-7b": 0.94,
    "deepseek-v3": 0.74,
    "7b-fine": 0.77,
    "30b-fine": 0.86,
    "gpt-oss-like": 0.76,
}
GEOMEAN = 0.84
#: Times as fast as SonicMoE in GPU time, forward and backward, on every layer.
OVER_SONICMOE = 1.08
#: Times grouped_mm and eager, forward alone.
FORWARD_SPEEDUP = {
    "mixtral-1b": {"grouped_mm": 2.0, "eager": 3.0},
    "qwen2-moe-1b": {"grouped_mm": 4.0, "eager": 15.0},
    "deepseek-v3-1b": {"grouped_mm": 4.0, "eager": 50.0},
}
HOST_MS = 0.35
#: MiB above weights and gradients.
SONICMOE_PEAK = {"mixtral-1b": 1012, "qwen2-moe-1b": 709, "deepseek-v3-1b": 418, "qwen3-30b-a3b": 962,
                 "deepseek-v3": 1521, "30b-fine": 4872}  # fmt: skip
SONICMOE_ERROR = {"out": 2.9e-3, "dx": 3.4e-3, "dgate_up": 3.0e-3, "ddown": 3.5e-3, "dw": 3.1e-3}
#: Saved beside X, Z and the plan: routing weights and ids. And the spread of two runs of one error.
SAVED_SLACK, ERROR_SLACK = 1.05, 1.05


@dataclass(frozen=True)
class Check:
    """One goal. ``value`` None: not measured in this run. ``at_least``: the value must not be below the goal."""

    what: str
    value: float | None
    goal: float
    at_least: bool

    @property
    def ok(self) -> bool | None:
        """Whether it was reached; None where it was not measured."""
        if self.value is None:
            return None
        return self.value >= self.goal if self.at_least else self.value <= self.goal


def checks(results: list[Row], routing: str = "mild") -> list[Check]:
    """Every goal that concerns a measured layer, and what was measured of it."""
    rows = {(row["shape"], row["implementation"]): row for row in results if row["routing"] == routing}
    shapes = [shape for shape in DENSE_FRACTION if (shape, OURS) in rows]
    found = [
        Check(f"{shape}: fraction of dense, forward + backward", _times(shape, "dense", rows), goal, True)
        for shape, goal in DENSE_FRACTION.items()
        if shape in shapes
    ]
    measured = [check.value for check in found if check.value is not None]
    everything = statistics.geometric_mean(measured) if len(measured) == len(DENSE_FRACTION) else None
    found.append(Check("geometric mean of all eleven fractions of dense", everything, GEOMEAN, True))
    for shape in shapes:
        found += _of_shape(shape, rows)
    return found


def _of_shape(shape: str, rows: dict[tuple[str, str], Row]) -> Iterator[Check]:
    ours = rows[shape, OURS]
    for peer, goal in FORWARD_SPEEDUP.get(shape, {}).items():
        yield Check(f"{shape}: forward, times {peer}", _times(shape, peer, rows, "forward_ms"), goal, True)
    if shape in FORWARD_SPEEDUP:
        yield Check(
            f"{shape}: host ms, forward + backward", _median(ours, "forward_backward_host_ms"), HOST_MS, False
        )
    if (shape, "sonicmoe") in rows:
        speed = _times(shape, "sonicmoe", rows)
        yield Check(f"{shape}: forward + backward, times SonicMoE", speed, OVER_SONICMOE, True)
    layer = LAYERS[shape]
    bar = (2 * layer.tokens * layer.hidden + 4 * layer.rows * layer.intermediate) / 2**20
    yield Check(f"{shape}: saved MiB (2TH + 4TKI bytes and indices)", ours["saved_mb"], bar * SAVED_SLACK, False)
    sonic = rows.get((shape, "sonicmoe"), {})
    peak = sonic.get("peak_mb") or SONICMOE_PEAK.get(shape)
    if peak is not None:
        yield Check(f"{shape}: peak MiB, SonicMoE's", ours["peak_mb"], peak, False)
    errors = sonic.get("rel_error") or SONICMOE_ERROR
    worst = max((ours["rel_error"][name] / errors[name] for name in ours["rel_error"]), default=None)
    yield Check(f"{shape}: worst error over SonicMoE's", worst, ERROR_SLACK, False)


def _times(
    shape: str, peer: str, rows: dict[tuple[str, str], Row], field: str = "forward_backward_queued_ms"
) -> float | None:
    """How often our time fits into that of ``peer``; None unless both were measured."""
    theirs, own = (_median(rows.get((shape, name)), field) for name in (peer, OURS))
    return theirs / own if theirs and own else None


def _median(row: Row | None, field: str) -> float | None:
    spread = None if row is None else row[field]
    return None if spread is None else spread["median"]


def table(found: list[Check]) -> Table:
    """What is printed of ``found``."""
    goals = Table(title="Goals, set for an H200, bf16, mild routing, each layer's own tokens", title_justify="left")
    for column in ("goal", "measured", "wanted", ""):
        goals.add_column(column, justify="left" if column == "goal" else "right", no_wrap=True)
    for check in found:
        sign = "at least" if check.at_least else "at most"
        verdict = {True: "[green]reached", False: "[red]short", None: "[dim]not measured"}[check.ok]
        value = "" if check.value is None else format(check.value, ".3g")
        goals.add_row(check.what, value, f"{sign} {check.goal:.3g}", verdict)
    return goals


def main() -> int:
    """Print the goals of the layers in one file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path, help="written by `moe-kernels bench --json` on a GPU")
    found = checks(json.loads(parser.parse_args().file.read_text())["results"])
    Console(width=150).print(table(found))
    return int(any(check.ok is False for check in found))


if __name__ == "__main__":
    sys.exit(main())
