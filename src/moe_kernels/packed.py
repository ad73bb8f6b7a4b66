"""Frozen expert weights in few bits, read a block of experts at a time.

Three formats. :class:`FourBit` is bitsandbytes' (nf4 and fp4, QLoRA, arXiv 2305.14314): an index of 4 bits into a
table of 16 values, times one scale for each block of neighbouring values; scales may be quantised once more (nested),
to 8 bits. :class:`BlockFp8` is that of DeepSeek-V3 (arXiv 2412.19437, section 3.3) and transformers'
``finegrained_fp8``: e4m3, times one scale for each 128 x 128 values. :class:`Mxfp4` is that of gpt-oss (OCP
Microscaling Formats, version 1.0): e2m1, times one power of two for each 32 neighbouring values.

A format is a subclass of :class:`PackedWeight`: its tensors, what must hold of them, and how torch reads them. How
kernels read them is an entry in :mod:`moe_kernels.kernels.triton.dequantize`. Nothing else knows formats.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

#: What one block of dequantised experts may take. Smaller blocks leave multiprocessors without work.
BLOCK_BYTES = 128 * 2**20

Packed = TypeVar("Packed", bound="PackedWeight")


@dataclass(frozen=True)
class PackedWeight(ABC):
    """Every expert's matrix in few bits. It takes the place of a weight (E, N, K) of ``fused_experts``.

    Attributes:
        sizes: (E, rows, columns) as stored.
        dtype: float32, bfloat16, float16 or float64, that the matrices are used in.
        by_columns: the matrices are the transposes of what is stored.

    Raises:
        ValueError: the parts do not fit together; later changes of them are not looked at.
    """

    sizes: tuple[int, int, int]
    dtype: torch.dtype
    by_columns: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        _check_dtype(self.dtype)
        wrong = self._why_not()
        if wrong:
            raise ValueError(f"{type(self).__name__} of sizes {tuple(self.sizes)}: {wrong}")
        tensors = [part for part in self.parts() if isinstance(part, Tensor)]
        if len(places := {str(t.device) for t in tensors}) > 1:
            raise ValueError(f"{type(self).__name__}: its tensors are on {' and '.join(sorted(places))}")
        if not all(t.is_contiguous() for t in tensors):
            raise ValueError(f"{type(self).__name__}: its tensors must be contiguous: call contiguous() on them")

    @abstractmethod
    def _why_not(self) -> str:
        """What is wrong with the tensors; empty if nothing."""

    @abstractmethod
    def _values(self, first: int, last: int) -> Tensor:
        """Experts ``first`` to ``last`` (exclusive) as stored, in torch: (last - first, rows, columns)."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where it is stored."""

    @property
    def shape(self) -> torch.Size:
        """(E, N, K)."""
        experts, rows, columns = self.sizes
        return torch.Size((experts, columns, rows) if self.by_columns else self.sizes)

    @property
    def requires_grad(self) -> bool:
        """It is frozen."""
        return False

    @property
    def mT(self: Packed) -> Packed:
        """The same with every matrix transposed."""
        return self._with("by_columns", not self.by_columns)

    def to(self: Packed, dtype: torch.dtype) -> Packed:
        """The same, to be used in ``dtype``."""
        _check_dtype(dtype)
        return self._with("dtype", dtype)

    def _with(self: Packed, name: str, value: Any) -> Packed:
        """Not dataclasses.replace, which would check the tensors once more, in every forward.

        Nor copy.copy, which torch.compile looks into from torch 2.12 on alone.
        """
        other = object.__new__(type(self))
        for each in dataclasses.fields(self):
            object.__setattr__(other, each.name, getattr(self, each.name))
        object.__setattr__(other, name, value)
        return other

    def like(self) -> Tensor:
        """A tensor of this shape, dtype and layout without data."""
        empty = torch.empty(self.sizes, dtype=self.dtype, device="meta")
        return empty.mT if self.by_columns else empty

    def parts(self) -> tuple[Any, ...]:
        """Its tensors, and all else that tells it from another: what a recording of launches depends on."""
        return type(self), *_fields(self)

    def versions(self) -> tuple[int, ...]:
        """How often each of its tensors was written to; torch does not count that of a tensor of inference mode."""
        return tuple(t._version for t in self.parts() if isinstance(t, Tensor) and not t.is_inference())

    def unwritten(self: Packed, versions: tuple[int, ...]) -> Packed:
        """This weight in a backward, whose forward found ``versions``.

        Raises:
            RuntimeError: it was written to since, as autograd says of a tensor that is saved.
        """
        if self.versions() != versions:
            raise RuntimeError(
                f"a {type(self).__name__} of sizes {tuple(self.sizes)} was written to between forward and backward, "
                "whose gradients would be those of other weights: write to it after the backward."
            )
        return self

    def blocks(self) -> Iterator[tuple[int, int]]:
        """(first, last): the experts of each block, as many in each but the last."""
        experts, rows, columns = self.sizes
        most = max(1, BLOCK_BYTES // (rows * columns * self.dtype.itemsize))
        size = -(-experts // -(-experts // most))
        for first in range(0, experts, size):
            yield first, min(first + size, experts)

    def experts(self, first: int, last: int) -> Tensor:
        """Experts ``first`` to ``last`` (exclusive), dequantised: (last - first, N, K)."""
        values = self._values(first, last)
        return values.mT if self.by_columns else values

    def __getitem__(self, expert: int) -> Tensor:
        """(N, K), one expert's matrix."""
        return self.experts(expert, expert + 1)[0]


def _check_dtype(dtype: torch.dtype) -> None:
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise ValueError(f"a packed weight is used in float32, bfloat16, float16 or float64, not in {dtype}")


def _fields(record: Any) -> Iterator[Any]:
    for each in dataclasses.fields(record):
        value = getattr(record, each.name)
        if isinstance(value, Scales):
            yield from _fields(value)
        else:
            yield value


def whole(weight: Tensor | PackedWeight) -> Tensor:
    """All experts in one tensor: for steps that cannot take them a block at a time."""
    return weight if isinstance(weight, Tensor) else weight.experts(0, weight.shape[0])


# -------------------------------------------------------------------------------------------------------- 4 bits
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

    def why_not(self, elements: int) -> str:
        """What is wrong with them as the scales of ``elements`` values; empty if nothing."""
        count, nested = elements // self.blocksize, (self.table, self.outer, self.offset)
        if self.values.numel() != count:
            return f"{self.values.numel()} scales, blocks of {self.blocksize} values need {count}"
        if all(part is None for part in nested):
            return "" if self.values.dtype == torch.float32 else f"scales in {self.values.dtype}, not float32"
        if any(part is None or part.dtype != torch.float32 for part in nested) or self.values.dtype != torch.uint8:
            return "nested scales need values in uint8, and table, outer and offset in float32"
        table, outer, offset = (part.numel() for part in nested if part is not None)
        if table != 256 or offset != 1 or self.outer_size < 1 or outer != -(-count // self.outer_size):
            return (
                f"nested scales have a table of {table}, {outer} outer scales, one for each {self.outer_size}, and "
                f"{offset} offsets; wanted 256, one for each outer_size of {count}, and 1"
            )
        return ""


@dataclass(frozen=True)
class FourBit(PackedWeight):
    """4 bits a value.

    Attributes:
        data: (E * rows * columns / 2,) uint8, two values a byte, the first in the upper half.
        table: (16,) float32.
        scales: of blocks that each lie in one expert.
        stored: dtype that values are rounded to first.
    """

    data: Tensor
    table: Tensor
    scales: Scales
    stored: torch.dtype

    def _why_not(self) -> str:
        experts, rows, columns = self.sizes
        each, block = rows * columns, self.scales.blocksize
        if block < 2 or block % 2 or each % block:
            return f"the {block} values of a 4-bit block do not divide an expert's {(rows, columns)}"
        if self.data.dtype != torch.uint8 or self.data.shape != (experts * each // 2,):
            return f"data is {self.data.dtype} {tuple(self.data.shape)}, wanted uint8 ({experts * each // 2},)"
        if self.table.dtype != torch.float32 or self.table.shape != (16,):
            return f"table is {self.table.dtype} {tuple(self.table.shape)}, wanted float32 (16,)"
        return self.scales.why_not(experts * each)

    @property
    def device(self) -> torch.device:
        return self.data.device

    def _values(self, first: int, last: int) -> Tensor:
        elements, block = self.sizes[1] * self.sizes[2], self.scales.blocksize
        scales = self.scales.of(first * elements // block, last * elements // block)
        packed = self.data[first * elements // 2 : last * elements // 2].int()
        values = self.table[torch.stack([packed >> 4, packed & 15], dim=-1)]
        values = (values.view(-1, block) * scales[:, None]).to(self.stored).to(self.dtype)
        return values.view(last - first, *self.sizes[1:])


# ----------------------------------------------------------------------------------------------------- block fp8
#: Rows and columns of a block of equal scale.
SIDE = 128


def scale_grid(rows: int, columns: int, stacked: int = 1) -> tuple[int, int]:
    """(rows, columns) of the scales of a matrix, or of ``stacked`` ones of equal size above each other, each with
    blocks of its own. The last block of a row or column may be smaller."""
    return stacked * -(-(rows // stacked) // SIDE), -(-columns // SIDE)


@dataclass(frozen=True)
class BlockFp8(PackedWeight):
    """e4m3, 8 bits a value, with one scale for each 128 x 128.

    A value is the product in float32, rounded once to ``dtype``. The codes 0x7f and 0xff are NaN.

    Attributes:
        data: (E, rows, columns) float8_e4m3fn.
        scales: (E, R, C) float32 or bfloat16, (R, C) of :func:`scale_grid`.
        stacked: matrices above each other in one expert's: 2 where gate and up were quantised apart.
    """

    data: Tensor
    scales: Tensor
    stacked: int = 1

    def _why_not(self) -> str:
        experts, rows, columns = self.sizes
        if self.data.dtype != torch.float8_e4m3fn or self.data.shape != torch.Size(self.sizes):
            return f"data is {self.data.dtype} {tuple(self.data.shape)}, wanted float8_e4m3fn {tuple(self.sizes)}"
        if self.stacked < 1 or rows % self.stacked:
            return f"{self.stacked} matrices above each other do not divide {rows} rows"
        wanted = experts, *scale_grid(rows, columns, self.stacked)
        if self.scales.dtype not in (torch.float32, torch.bfloat16) or self.scales.shape != wanted:
            found = f"{self.scales.dtype} {tuple(self.scales.shape)}"
            return f"scales are {found}, wanted float32 or bfloat16 {wanted}: one for each {SIDE} x {SIDE}"
        return ""

    def has_scales_of(self, matrices: int) -> bool:
        """Whether the scales are also those of so many matrices above each other, each with blocks of its own."""
        return self.stacked == matrices or not any(self.sizes[1] // n % SIDE for n in (self.stacked, matrices))

    @property
    def device(self) -> torch.device:
        return self.data.device

    def _values(self, first: int, last: int) -> Tensor:
        values = self.data[first:last].float().unflatten(1, (self.stacked, -1))
        scales = self.scales[first:last].float().unflatten(1, (self.stacked, -1))
        for dim in (2, 3):
            scales = scales.repeat_interleave(SIDE, dim).narrow(dim, 0, values.shape[dim])
        return (values * scales).flatten(1, 2).to(self.dtype)


# ---------------------------------------------------------------------------------------------------------- mxfp4
#: Neighbouring values of a row with one scale.
MX_BLOCK = 32
#: The value of each code of e2m1.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


@dataclass(frozen=True)
class Mxfp4(PackedWeight):
    """e2m1, 4 bits a value, with one e8m0 scale for each 32 of a row.

    A value is the product, which float32 and bfloat16 hold exactly but for the largest scales, rounded once to
    ``dtype``. The scale of code 255 is NaN.

    Attributes:
        data: (E, rows, columns / 32, 16) uint8, two values a byte, the first in the lower half.
        scales: (E, rows, columns / 32) uint8, the codes of e8m0: code c is 2^(c - 127).
    """

    data: Tensor
    scales: Tensor

    def _why_not(self) -> str:
        experts, rows, columns = self.sizes
        if columns % MX_BLOCK:
            return f"blocks of {MX_BLOCK} values do not divide {columns} columns"
        grid = experts, rows, columns // MX_BLOCK
        for name, tensor, wanted in (("blocks", self.data, (*grid, MX_BLOCK // 2)), ("scales", self.scales, grid)):
            if tensor.dtype != torch.uint8 or tensor.shape != wanted:
                return f"{name} are {tensor.dtype} {tuple(tensor.shape)}, wanted uint8 {wanted}"
        return ""

    @property
    def device(self) -> torch.device:
        return self.data.device

    def _values(self, first: int, last: int) -> Tensor:
        pairs = self.data[first:last].int()
        values = torch.tensor(E2M1, device=self.device)[torch.stack([pairs & 15, pairs >> 4], dim=-1)]
        scales = self.scales[first:last].view(torch.float8_e8m0fnu).float()
        return (values.flatten(-2) * scales[..., None]).flatten(-2).to(self.dtype)
