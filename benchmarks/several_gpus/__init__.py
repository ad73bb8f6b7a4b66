"""The parts of ``benchmarks/scaling.py``: what is trained, by which engine, and what is kept of it."""

import statistics
from typing import Any, NamedTuple


class Traffic(NamedTuple):
    """Shares of a step's time, the mean of the ranks: NCCL's kernels, what of them nothing hides, and no kernel."""

    communication: float
    exposed: float
    idle: float


def traffic(row: dict[str, Any]) -> Traffic | None:
    """What a row's profile saw; None if there is none."""
    ranks = [one for one in row.get("traffic") or [] if one["window_ms"]]
    if not ranks:
        return None
    shares = (statistics.fmean(one[f"{name}_ms"] / one["window_ms"] for one in ranks) for name in Traffic._fields)
    return Traffic(*shares)
