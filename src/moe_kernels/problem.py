"""What decides whether a backend can run an expert layer, and the error where none can."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from moe_kernels.packed import PackedWeight
from moe_kernels.settings import DEFAULT_GROUP_SIZE, GroupSize


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
        down: torch.Tensor | PackedWeight,
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
