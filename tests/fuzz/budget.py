"""How much is tried: in the suite a little, always the same; with ``make fuzz`` 10,000 and more, new each time."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

from hypothesis import HealthCheck, settings

BUDGET = int(os.environ.get("MOE_KERNELS_FUZZ", "0"))
SMALL = 30
tried: Counter[str] = Counter()


def fuzz(share: float = 1.0) -> Any:
    """Settings of one fuzz test; ``share`` below 1 for what takes long."""
    return settings(
        max_examples=max(5, int((BUDGET or SMALL) * share)),
        suppress_health_check=[*HealthCheck],
    )
