"""Which backend runs an expert layer, why, and proof that it ran.

A backend is a module of :mod:`moe_kernels.registry` with ``why_not(problem)`` and the steps called by
:mod:`moe_kernels.moe`. Nothing falls back in silence: :func:`select` returns the reason for its choice, and every
expert call is counted.
"""

from __future__ import annotations

import collections
import functools
import logging
from dataclasses import dataclass

import torch

from moe_kernels.registry import load, modules
from moe_kernels.settings import DEFAULT_GROUP_SIZE, GroupSize

logger = logging.getLogger("moe_kernels")


class UnsupportedProblem(ValueError):
    """No backend, or not the one asked for, can run this problem; the message names the reason and the cure."""


@dataclass(frozen=True)
class Problem:
    """Everything that decides whether a backend can run an expert layer.

    Attributes:
        device_type: "cuda", "cpu", ...
        capability: CUDA compute capability such as (9, 0); None off CUDA.
        dtype: compute dtype, that of the expert weights.
        experts, top_k, hidden, intermediate: E, K, H, I.
        activation: its name.
        group_size, persistent: see :class:`moe_kernels.settings.ExpertsSettings`.
    """

    device_type: str
    capability: tuple[int, int] | None
    dtype: torch.dtype
    experts: int
    top_k: int
    hidden: int
    intermediate: int
    activation: str = "silu"
    group_size: GroupSize = DEFAULT_GROUP_SIZE
    persistent: bool = True

    @classmethod
    def of(
        cls,
        down: torch.Tensor,
        top_k: int,
        activation: str = "silu",
        group_size: GroupSize = DEFAULT_GROUP_SIZE,
        persistent: bool = True,
    ) -> Problem:
        """The problem posed by weights ``down`` (E, H, I) and K experts per token."""
        experts, hidden, intermediate = down.shape
        return cls(
            down.device.type,
            device_capability(down.device),
            down.dtype,
            experts,
            top_k,
            hidden,
            intermediate,
            activation,
            group_size,
            persistent,
        )


@functools.cache
def device_capability(device: torch.device) -> tuple[int, int] | None:
    """CUDA compute capability of ``device``, or None off CUDA."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def why_not(name: str, problem: Problem) -> str | None:
    """None if backend ``name`` runs ``problem``, else the reason and the cure in one sentence."""
    reason: str | None = load(name).why_not(problem)
    return reason


def explain(problem: Problem) -> list[tuple[str, str | None]]:
    """``why_not`` of every backend: the package's own in order of preference, then those that were added."""
    return [(name, why_not(name, problem)) for name in modules()]


@functools.lru_cache(maxsize=256)
def select(problem: Problem, name: str = "auto") -> tuple[str, str]:
    """The backend that runs ``problem`` and the reason, logged once per problem.

    On a GPU ``auto`` takes gluon where it runs and triton elsewhere; torch only off CUDA: on a GPU it would be a
    silent slowdown, so it must be asked for by name.

    Raises:
        UnsupportedProblem: the backend asked for, or on CUDA the Triton backend, cannot run the problem.
    """
    if name != "auto":
        reason = why_not(name, problem)
        if reason is not None:
            raise UnsupportedProblem(f"backend {name!r} cannot run this: {reason}")
        chosen, why = name, "asked for by name"
    elif problem.device_type == "cuda":
        reason = why_not("triton", problem)
        if reason is not None:
            raise UnsupportedProblem(
                f"the Triton kernels cannot run this: {reason} backend='torch' runs it slowly; "
                "experts_implementation='grouped_mm' runs it without these kernels."
            )
        slower = why_not("gluon", problem)
        gpu = f"CUDA compute capability {problem.capability}"
        chosen, why = ("gluon", gpu) if slower is None else ("triton", f"{gpu}; not gluon: {slower}")
    else:
        chosen, why = "torch", f"tensors are on {problem.device_type}, Triton kernels need an NVIDIA GPU"
    logger.info("expert layers run on backend %s (%s)", chosen, why)
    _reasons[chosen] = why
    return chosen, why


_counts: collections.Counter[str] = collections.Counter()
_reasons: dict[str, str] = {}


def count_dispatch(name: str, times: int = 1, why: str = "") -> None:
    """Called once by every forward of the op that runs; -1 takes back what did not run. ``why``: where none chose."""
    _counts[name] += times
    if why:
        _reasons.setdefault(name, why)


def dispatch_counts() -> dict[str, int]:
    """Expert forward calls that ran since the start or the last reset, by backend."""
    return dict(_counts)


def dispatch_reason() -> str:
    """Why the backends in :func:`dispatch_counts` were chosen."""
    return "; ".join(_reasons[name] for name in sorted(_counts))


def reset_dispatch_counts() -> None:
    """Forget the counts."""
    _counts.clear()
