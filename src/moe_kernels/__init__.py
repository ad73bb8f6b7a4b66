"""Train Mixture-of-Experts layers fast: ``fused_experts`` is the op, everything else serves it."""

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
