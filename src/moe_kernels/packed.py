"""Frozen expert weights in 4 bits, read a block of experts at a time.

The format is bitsandbytes' (nf4 and fp4, QLoRA, arXiv 2305.14314): an index of 4 bits into a table of 16 values,
times one scale for each block of neighbouring values. Scales may be quantised once more (nested), to 8 bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: What one block of dequantised experts may take. Smaller blocks leave multiprocessors without work.
BLOCK_BYTES = 128 * 2**20


@dataclass(frozen=True)
class Scales:
    """The scale of each block of ``blocksize`` values: values, or with a table ``table[values] * outer + offset``.

    Attributes:
        values: float32, or uint8 with a table.
        table: (256,) float32.
        outer: float32, one for each ``outer_size`` values.
        offset: float32, one element.
    """

    values: Tensor
    blocksize: int
    table: Tensor | None = None
    outer: Tensor | None = None
    outer_size: int = 0
    offset: Tensor | None = None

    def of(self, first: int, last: int) -> Tensor:
        """Scales ``first`` to ``last`` (exclusive) in float32."""
        values = self.values[first:last]
        if self.table is None or self.outer is None or self.offset is None:
            return values.float()
        places = torch.arange(first, last, device=values.device) // self.outer_size
        return self.table[values.int()] * self.outer[places] + self.offset


@dataclass(frozen=True)
class PackedWeight:
    """Every expert's matrix in 4 bits. It takes the place of a weight (E, N, K) of ``fused_experts``.

    Attributes:
        data: (E * N * K / 2,) uint8, two values a byte, the first in the upper half.
        table: (16,) float32.
        scales: of blocks that each lie in one expert.
        sizes: (E, rows, columns) as stored.
        stored: dtype that values are rounded to first.
        dtype: dtype that they are used in.
        by_columns: the matrices are the transposes of what is stored.
    """

    data: Tensor
    table: Tensor
    scales: Scales
    sizes: tuple[int, int, int]
    stored: torch.dtype
    dtype: torch.dtype
    by_columns: bool = False

    @property
    def shape(self) -> torch.Size:
        """(E, N, K)."""
        experts, rows, columns = self.sizes
        return torch.Size((experts, columns, rows) if self.by_columns else self.sizes)

    @property
    def device(self) -> torch.device:
        """Where it is stored."""
        return self.data.device

    @property
    def requires_grad(self) -> bool:
        """It is frozen."""
        return False

    @property
    def mT(self) -> PackedWeight:
        """The same with every matrix transposed."""
        return dataclasses.replace(self, by_columns=not self.by_columns)

    def to(self, dtype: torch.dtype) -> PackedWeight:
        """The same, to be used in ``dtype``."""
        return dataclasses.replace(self, dtype=dtype)

    def like(self) -> Tensor:
        """A tensor of this shape, dtype and layout without data."""
        empty = torch.empty(self.sizes, dtype=self.dtype, device="meta")
        return empty.mT if self.by_columns else empty

    def parts(self) -> tuple[Any, ...]:
        """Its tensors, and all else that tells it from another: what a recording of launches depends on."""
        scales = self.scales
        tensors = self.data, self.table, scales.values, scales.table, scales.outer, scales.offset
        return *tensors, self.sizes, scales.blocksize, scales.outer_size, self.stored, self.dtype, self.by_columns

    def blocks(self) -> Iterator[tuple[int, int]]:
        """(first, last): the experts of each block, as many in each but the last."""
        experts, rows, columns = self.sizes
        most = max(1, BLOCK_BYTES // (rows * columns * self.dtype.itemsize))
        size = -(-experts // -(-experts // most))
        for first in range(0, experts, size):
            yield first, min(first + size, experts)

    def experts(self, first: int, last: int) -> Tensor:
        """Experts ``first`` to ``last`` (exclusive), dequantised: (last - first, N, K)."""
        elements, block = self.sizes[1] * self.sizes[2], self.scales.blocksize
        scales = self.scales.of(first * elements // block, last * elements // block)
        packed = self.data[first * elements // 2 : last * elements // 2].int()
        values = self.table[torch.stack([packed >> 4, packed & 15], dim=-1)]
        values = (values.view(-1, block) * scales[:, None]).to(self.stored).to(self.dtype)
        values = values.view(last - first, *self.sizes[1:])
        return values.mT if self.by_columns else values

    def __getitem__(self, expert: int) -> Tensor:
        """(N, K), one expert's matrix."""
        return self.experts(expert, expert + 1)[0]


def whole(weight: Tensor | PackedWeight) -> Tensor:
    """All experts in one tensor: for steps that cannot take them a block at a time."""
    return weight if isinstance(weight, Tensor) else weight.experts(0, weight.shape[0])
