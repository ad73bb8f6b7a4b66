"""Frozen weights in few bits made of 16-bit ones, without the libraries that do so when a checkpoint is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_kernels.fp8 import Fp8Weight, transposed
from moe_kernels.packed import E2M1, MX_BLOCK, SIDE, BlockFp8, FourBit, Mxfp4, PackedWeight, Scales

#: Values of one scale, and scales of one outer scale, as bitsandbytes has them.
BLOCK, OUTER = 64, 256
#: Hidden and intermediate size are multiples of this, so that an expert's matrix divides into blocks.
STEPS = {"4 bits": 8, "mxfp4": MX_BLOCK}


def in_few_bits(weight: Tensor, kind: str, stacked: int = 1) -> PackedWeight:
    """``weight`` (E, N, K) in the format ``kind``, in the memory order in which checkpoints of that format have it.

    Args:
        weight: stored by rows or by columns.
        kind: a key of :data:`FORMATS`; "fp8 activations" is block fp8 that is multiplied in fp8.
        stacked: matrices above each other that were quantised apart: 2 for gate and up.
    """
    if kind != "mxfp4" and not weight.is_contiguous():
        return FORMATS[kind](weight.mT, 1).mT
    return FORMATS[kind](weight, stacked)


def in_fp8(weight: Tensor, stacked: int = 1) -> BlockFp8:
    """``weight`` (E, N, K) in e4m3 with a scale for each 128 x 128 of its ``stacked`` parts."""
    sizes: Any = tuple(weight.shape)
    weight = weight.unflatten(1, (stacked, -1)).flatten(0, 1)
    _, rows, columns = weight.shape
    values = torch.nn.functional.pad(weight.float(), (0, -columns % SIDE, 0, -rows % SIDE))
    values = values.unflatten(2, (-1, SIDE)).unflatten(1, (-1, SIDE))
    scales = values.abs().amax((2, 4)) / torch.finfo(torch.float8_e4m3fn).max
    codes = (values / scales[:, :, None, :, None]).to(torch.float8_e4m3fn).flatten(3).flatten(1, 2)
    data = codes[:, :rows, :columns].reshape(sizes).contiguous()
    return BlockFp8(sizes, weight.dtype, data, scales.unflatten(0, (-1, stacked)).flatten(1, 2), stacked)


def _multiplied_in_fp8(weight: Tensor, stacked: int) -> Fp8Weight:
    found = in_fp8(weight, stacked)
    return Fp8Weight.of(found, transposed(found.data))


def _in_4_bits(weight: Tensor, stacked: int) -> FourBit:
    """In a format like nf4, nested: another table, the same sizes and the same steps to read it."""
    values = weight.float().view(-1, BLOCK)
    scales = values.abs().amax(1)
    table, scales_table = (torch.linspace(-1, 1, n, device=weight.device) for n in (16, 256))
    places = torch.bucketize(values / scales[:, None], (table[1:] + table[:-1]) / 2).to(torch.uint8).view(-1, 2)
    offset = scales.mean()
    outer = torch.nn.functional.pad(scales - offset, (0, -len(scales) % OUTER)).view(-1, OUTER).abs().amax(1)
    near = (scales_table[1:] + scales_table[:-1]) / 2
    inner = torch.bucketize((scales - offset) / outer.repeat_interleave(OUTER)[: len(scales)], near).to(torch.uint8)
    nested = Scales(inner, BLOCK, scales_table, outer, OUTER, offset)
    data = places[:, 0] << 4 | places[:, 1]
    sizes: Any = tuple(weight.shape)
    return FourBit(sizes, weight.dtype, data.view(-1), table, nested, weight.dtype)


def in_mxfp4(weight: Tensor, stacked: int = 1) -> Mxfp4:
    """``weight`` (E, N, K) in mxfp4, stored by rows as gpt-oss's checkpoints have it."""
    experts, rows, columns = weight.shape
    values = weight.float().contiguous().unflatten(2, (-1, MX_BLOCK))
    exponents = values.abs().amax(3, keepdim=True).log2().floor() - 2
    sizes = torch.tensor(E2M1[: len(E2M1) // 2], device=weight.device)
    codes = torch.bucketize(values.abs() / exponents.exp2(), (sizes[1:] + sizes[:-1]) / 2).to(torch.uint8)
    codes |= (values < 0).to(torch.uint8) << 3
    data, scales = codes[..., ::2] | codes[..., 1::2] << 4, (exponents + 127).squeeze(3).to(torch.uint8)
    return Mxfp4((experts, rows, columns), weight.dtype, data, scales)


FORMATS: dict[str, Callable[[Tensor, int], PackedWeight]] = {
    "4 bits": _in_4_bits,
    "fp8": in_fp8,
    "fp8 activations": _multiplied_in_fp8,
    "mxfp4": in_mxfp4,
}
