"""The parts of ``benchmarks/scaling.py``: what is trained, by which engine, and what is kept of it."""

import statistics
from typing import Any


def communication(row: dict[str, Any]) -> tuple[float, float] | None:
    """Shares of a step's time: NCCL's kernels, and what of them nothing hides; the mean of the ranks."""
    traffic = [one for one in row.get("traffic") or [] if one["window_ms"]]
    if not traffic:
        return None
    talk, exposed = (
        statistics.fmean(one[name] / one["window_ms"] for one in traffic)
        for name in ("communication_ms", "exposed_ms")
    )
    return talk, exposed
