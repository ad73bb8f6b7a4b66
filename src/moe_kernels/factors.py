"""LoRA's factors on their way from the caller's memory to the kernels, and their gradients on the way back.

The kernels take lora_b (E, N, RANK) and lora_a (E, RANK, K), contiguous, in the dtype of the layer, of a rank that
tiles have, and with the scaling in lora_a. The op takes them as they are stored: in any floating dtype, of any rank
up to 128, and in any memory order, such as PEFT's, where experts are the fastest dimension of lora_b. The steps of a
forward and of a backward pack them first, so that nothing packed is saved. Gradients are rounded once, to the dtype
of the factor.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class LowRank(NamedTuple):
    """What is added to a weight (E, N, K): ``scaling * lora_b[e] @ lora_a[e]``; without factors nothing.

    Attributes:
        lora_b: (E, N, r) of any floating dtype and any strides.
        lora_a: (E, r, K), the same. A step that packs may want one of the two alone.
        scaling: a number of the host; it gets no gradient.
    """

    lora_b: Tensor | None = None
    lora_a: Tensor | None = None
    scaling: float = 1.0


def padded_rank(rank: int) -> int:
    """The rank that the kernels compute with: a power of two of at least 16, a tile's."""
    return max(16, 1 << (rank - 1).bit_length())


def scaled(lora_a: Tensor, scaling: float) -> Tensor:
    """scaling * lora_a, in the dtype of lora_a."""
    return lora_a if scaling == 1.0 else lora_a * scaling


def packed(factor: Tensor, dtype: torch.dtype, dim: int, scaling: float = 1.0) -> Tensor:
    """``factor``, whose rank is dimension ``dim``, as the kernels take it, by plain steps of torch."""
    factor = scaled(factor, scaling).to(dtype)
    missing = padded_rank(factor.shape[dim]) - factor.shape[dim]
    if missing:
        factor = torch.nn.functional.pad(factor, (0, missing) if dim == 2 else (0, 0, 0, missing))
    return factor.contiguous()


def is_packed(factor: Tensor, dtype: torch.dtype, dim: int, scaling: float = 1.0) -> bool:
    """Whether the kernels can read ``factor`` where it is."""
    return (
        factor.dtype == dtype
        and scaling == 1.0
        and factor.shape[dim] == padded_rank(factor.shape[dim])
        and factor.is_contiguous()
        and factor.data_ptr() % 16 == 0
    )


def has_experts_last(lora_b: Tensor) -> bool:
    """Whether lora_b (E, N, r) is stored (N, r, E), as PEFT does."""
    return not lora_b.is_contiguous() and lora_b.permute(1, 2, 0).is_contiguous()


def factor_room(factor: Tensor) -> Tensor:
    """Room for the gradient of a factor: that of PEFT's lora_b has its memory order, any other is contiguous."""
    if has_experts_last(factor):
        experts, rows, rank = factor.shape
        return factor.new_empty(rows, rank, experts).permute(2, 0, 1)
    return factor.new_empty(factor.shape)
