"""Train Mixture-of-Experts layers fast: ``fused_experts`` is the op, everything else serves it.

The names below are imported at first use: ``moe-kernels --help`` and reading a table must not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe_kernels.backends import UnsupportedProblem, dispatch_counts, explain
    from moe_kernels.moe import fused_experts
    from moe_kernels.reference import reference_experts
    from moe_kernels.settings import ExpertsSettings

__version__ = "0.1.0"
__all__ = [
    "ExpertsSettings",
    "UnsupportedProblem",
    "dispatch_counts",
    "explain",
    "fused_experts",
    "reference_experts",
]

_HOME = {
    "ExpertsSettings": "settings",
    "UnsupportedProblem": "backends",
    "dispatch_counts": "backends",
    "explain": "backends",
    "fused_experts": "moe",
    "reference_experts": "reference",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'moe_kernels' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"moe_kernels.{_HOME[name]}"), name)
    globals()[name] = value
    return value
