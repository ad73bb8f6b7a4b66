"""Block-fp8 weights that are multiplied in fp8: the rows that they meet are rounded to e4m3 as well.

Rows get a float32 scale for each 128 elements of the inner dimension (DeepSeek-V3, arXiv 2412.19437, section 3.3):
the largest of them divided by 448, so that no number is beyond e4m3; the codes are the rows times 448 over the
largest. A block with NaN or infinity gives NaN. The products of 128 elements are summed, multiplied with both scales,
and added in float32. The steps in torch are here; those of GPUs are in :mod:`moe_kernels.kernels.triton.fp8`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moe_kernels.packed import SIDE, BlockFp8
from moe_kernels.problem import UnsupportedProblem, device_capability

#: The largest number of e4m3.
LARGEST = torch.finfo(torch.float8_e4m3fn).max
#: What a block is taken to hold at least: with zeros alone it would have the scale zero.
SMALLEST = 2.0**-100
CURE = "leave fp8_activations (moe_fp8_activations in YAML) out: the weights are then dequantised ahead of each GEMM."


class Fp8Rows(NamedTuple):
    """Rows (R, K), or tokens, rounded as :func:`quantized` does.

    Attributes:
        codes: (R, blocks * 128) float8_e4m3fn.
        scales: (R, blocks) float32; the kernels store those of a block next to each other.
    """

    codes: Tensor
    scales: Tensor


@dataclass(frozen=True)
class Fp8Weight(BlockFp8):
    """Block-fp8 weights whose GEMMs run in fp8.

    Attributes:
        transposed: (E, columns, rows), the codes once more, for the gradient of the rows on a GPU, or None where
            nobody asks for it. Hopper multiplies fp8 operands whose inner dimension is contiguous.
    """

    transposed: Tensor | None = None

    @classmethod
    def of(cls, weight: BlockFp8, transposed: Tensor | None = None) -> Fp8Weight:
        """``weight``, to be multiplied in fp8; ``transposed``: see :func:`transposed`."""
        return cls(
            weight.sizes, weight.dtype, weight.data, weight.scales, stacked=weight.stacked, transposed=transposed,
            by_columns=weight.by_columns,
        )  # fmt: skip

    def operand(self, transposed: bool) -> tuple[Tensor, int]:
        """(codes (E, N, K), pieces of K that begin a block each) of a GEMM over K; dgrad's are ``transposed``."""
        if not transposed:
            return self.data, 1
        if self.transposed is None:
            raise ValueError("an Fp8Weight without transposed codes has no dgrad: give it those of fp8.transposed()")
        return self.transposed, self.stacked

    def scale_strides(self, transposed: bool) -> tuple[int, int, int]:
        """In a GEMM over K: from an expert's scales to the next one's, from one block of columns to the next, and
        from one k block to the next."""
        _, rows, columns = self.scales.shape
        return (rows * columns, 1, columns) if transposed else (rows * columns, columns, 1)

    def _why_not(self) -> str:
        experts, rows, columns = self.sizes
        copy = self.transposed
        if copy is not None and (copy.dtype != self.data.dtype or copy.shape != (experts, columns, rows)):
            found = f"{copy.dtype} {tuple(copy.shape)}"
            return f"the transposed codes are {found}, wanted {self.data.dtype} {(experts, columns, rows)}"
        return super()._why_not()


def transposed(codes: Tensor) -> Tensor:
    """(E, rows, columns) -> (E, columns, rows), contiguous."""
    return codes.view(torch.uint8).mT.contiguous().view(codes.dtype)


def why_not(weight: BlockFp8, gated: bool, interleaved: bool, device: torch.device) -> str | None:
    """Why the GEMMs of ``weight`` cannot run in fp8 on ``device``, with the cure; None if they can.

    ``gated``: it is a gate_up with a gate; ``interleaved``: gate and up rows alternate.
    """
    capability = device_capability(device)
    if capability is not None and capability < (8, 9):
        return f"a GPU of compute capability {capability} does not multiply fp8, (8, 9) and later do: {CURE}"
    if weight.by_columns or interleaved:
        return f"weights stored by columns, or whose gate and up rows alternate, are not multiplied in fp8: {CURE}"
    parts = 2 if gated else 1
    if not weight.has_scales_of(parts):
        if weight.stacked == 1:
            return f"a block of scales holds rows of gate and of up, so that no tile has one scale: {CURE}"
        return f"its scales are those of {weight.stacked} matrices above each other, and it has {parts}: {CURE}"
    return None


def check_fp8(weight: object, gated: bool, interleaved: bool, device: torch.device) -> None:
    """Raise UnsupportedProblem where ``weight`` is to be multiplied in fp8 and cannot be."""
    if not isinstance(weight, Fp8Weight):
        return
    if torch.compiler.is_compiling():
        reason: str | None = f"torch.compile would take the weights dequantised: do not compile, or {CURE}"
    else:
        reason = why_not(weight, gated, interleaved, device)
    if reason is not None:
        raise UnsupportedProblem(reason)


# ------------------------------------------------------------------------------------------------------- in torch
def quantized(rows: Tensor, pieces: int = 1) -> Fp8Rows:
    """Rows (R, K) of any dtype -> codes (R, blocks * 128) float8_e4m3fn and their scales (R, blocks) float32.

    Each of the ``pieces`` of a row begins a block; the last block of a piece is filled with zeros.
    """
    values = rows.float().unflatten(1, (pieces, -1))
    values = torch.nn.functional.pad(values, (0, -values.shape[2] % SIDE)).flatten(1).unflatten(1, (-1, SIDE))
    most = values.abs().amax(2, keepdim=True).clamp(min=SMALLEST)
    largest = most.new_full((), LARGEST)  # by a number, torch divides on a GPU with its reciprocal: other bits
    codes = (values * (largest / most)).to(torch.float8_e4m3fn).flatten(1)
    return Fp8Rows(codes, (most / largest)[..., 0])


def rounded(rows: Tensor, pieces: int = 1) -> Tensor:
    """(R, K) -> (R, K) float32: what :func:`quantized` rows stand for."""
    codes, scales = quantized(rows, pieces)
    values = codes.float().unflatten(1, (-1, SIDE)) * scales[..., None]
    return values.flatten(1).unflatten(1, (pieces, -1))[:, :, : rows.shape[1] // pieces].flatten(1)
