"""Experts in few bits as a block of 16-bit experts, ahead of the GEMM that reads them.

The arithmetic and its roundings are those of the libraries that made them (bitsandbytes, transformers), so the values
are bitwise those that they give.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from moe_kernels.kernels.device import cdiv
from moe_kernels.kernels.launch.launch import launch
from moe_kernels.kernels.triton.plan import part_of
from moe_kernels.layer import Weight
from moe_kernels.packed import MX_BLOCK, SIDE, BlockFp8, FourBit, Mxfp4, PackedWeight
from moe_kernels.routing import RoutingPlan

_BLOCK = 2048  # bytes of a program


@triton.jit
def four_bit_kernel(
    data_ptr,  # uint8
    table_ptr,  # (16,)
    scales_ptr,  # float32, or uint8 if NESTED
    scales_table_ptr,  # (256,), read if NESTED, as the next two
    outer_ptr,
    offset_ptr,
    out_ptr,  # the values of bytes ``first`` and following
    first,
    count,  # bytes
    BLOCKSIZE: tl.constexpr,  # values of a scale
    OUTER_SIZE: tl.constexpr,  # scales of an outer scale
    NESTED: tl.constexpr,
    STORED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < count
    byte = tl.load(data_ptr + first + place, mask=mask, other=0).to(tl.int32)
    block = (first + place) // (BLOCKSIZE // 2)
    scale = tl.load(scales_ptr + block, mask=mask, other=0)
    if NESTED:
        outer = tl.load(outer_ptr + block // OUTER_SIZE, mask=mask, other=0.0)
        scale = tl.load(scales_table_ptr + scale.to(tl.int32)) * outer + tl.load(offset_ptr)
    left = (tl.load(table_ptr + (byte >> 4)) * scale).to(STORED)
    right = (tl.load(table_ptr + (byte & 15)) * scale).to(STORED)
    values = tl.reshape(tl.join(left, right), (2 * BLOCK,)).to(out_ptr.dtype.element_ty)
    where = tl.program_id(0).to(tl.int64) * 2 * BLOCK + tl.arange(0, 2 * BLOCK)
    tl.store(out_ptr + where, values, mask=where < 2 * count)


@triton.jit
def block_fp8_kernel(
    data_ptr,  # (E, rows, columns) uint8, the codes of e4m3: Triton knows that type only from sm_89 on
    scales_ptr,  # (E, *grid[1::-1]) float32 or bfloat16, a program for each
    out_ptr,  # experts ``first`` and following
    first,
    rows,
    columns,
    STACKED: tl.constexpr,  # matrices above each other in one expert's, each with blocks of its own
    SIDE: tl.constexpr,  # rows and columns of a block
    BLOCK: tl.constexpr,  # rows of a step
):
    block_c, block_r, expert = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    blocks_c, blocks_r = tl.num_programs(0), tl.num_programs(1)
    scale = tl.load(scales_ptr + ((first + expert) * blocks_r + block_r) * blocks_c + block_c).to(tl.float32)
    height, blocks_each = rows // STACKED, blocks_r // STACKED
    above = block_r // blocks_each * height
    data_ptr += (first + expert) * rows * columns
    out_ptr += expert * rows * columns
    c = block_c * SIDE + tl.arange(0, SIDE)
    for step in range(0, SIDE, BLOCK):
        r = block_r % blocks_each * SIDE + step + tl.arange(0, BLOCK)
        mask = (r < height)[:, None] & (c < columns)[None, :]
        place = (above + r).to(tl.int64)[:, None] * columns + c[None, :]
        code = tl.load(data_ptr + place, mask=mask, other=0).to(tl.int32)
        size = code & 0x7F  # 4 bits of exponent, bias 7, and 3 bits; without an exponent, in units of 2^-9
        bits = tl.where(size < 8, (size * 0.001953125).to(tl.int32, bitcast=True), (size << 20) + (120 << 23))
        bits = tl.where(size == 0x7F, 0x7FC00000, bits) | ((code & 0x80) << 24)
        values = bits.to(tl.float32, bitcast=True) * scale
        tl.store(out_ptr + place, values.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def mxfp4_kernel(
    data_ptr,  # uint8
    scales_ptr,  # uint8, the codes of e8m0, one for each block
    out_ptr,  # the values of blocks ``first`` and following
    first,
    count,  # blocks
    SIZE: tl.constexpr,  # bytes of a block
    BLOCK: tl.constexpr,  # blocks of a program
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < count
    code = tl.load(scales_ptr + first + place, mask=mask, other=0).to(tl.int32)
    bits = tl.where(code == 0, 1 << 22, code << 23)  # 2^-127 has no exponent in float32
    scale = tl.where(code == 0xFF, 0x7FC00000, bits).to(tl.float32, bitcast=True)[:, None]
    where = (first + place)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    byte = tl.load(data_ptr + where, mask=mask[:, None], other=0).to(tl.int32)
    low, high = _e2m1(byte & 15) * scale, _e2m1(byte >> 4) * scale
    values = tl.reshape(tl.join(low, high), (BLOCK, 2 * SIZE)).to(out_ptr.dtype.element_ty)
    where = place[:, None] * (2 * SIZE) + tl.arange(0, 2 * SIZE)[None, :]
    tl.store(out_ptr + where, values, mask=mask[:, None])


@triton.jit
def _e2m1(code):
    """The value of a code (int32): 2 bits of exponent, bias 1, and 1 bit; without an exponent, in units of 1/2."""
    size = code & 7
    bits = tl.where(size < 2, (size * 0.5).to(tl.int32, bitcast=True), (size << 22) + (126 << 23))
    return (bits | ((code & 8) << 28)).to(tl.float32, bitcast=True)


def dequantize(weight: PackedWeight, first: int, last: int) -> torch.Tensor:
    """Experts ``first`` to ``last`` (exclusive) of ``weight``: (last - first, N, K)."""
    out = torch.empty((last - first, *weight.sizes[1:]), dtype=weight.dtype, device=weight.device)
    _LAUNCHES[type(weight)](weight, first, last, out)
    return out.mT if weight.by_columns else out


def _four_bit(weight: FourBit, first: int, last: int, out: torch.Tensor) -> None:
    scales, each = weight.scales, weight.sizes[1] * weight.sizes[2] // 2
    nested = scales.table is not None
    count = (last - first) * each
    outer = (scales.table, scales.outer, scales.offset) if nested else (weight.table,) * 3
    launch(
        four_bit_kernel,
        (cdiv(count, _BLOCK),),
        (weight.data, weight.table, scales.values, *outer, out, first * each, count),
        {
            "BLOCKSIZE": scales.blocksize,
            "OUTER_SIZE": scales.outer_size,
            "NESTED": nested,
            "STORED": _TYPES[weight.stored],
            "BLOCK": _BLOCK,
            "num_warps": 4,
            "enable_fp_fusion": False,  # a product and a sum are rounded one after the other
        },
    )


def _block_fp8(weight: BlockFp8, first: int, last: int, out: torch.Tensor) -> None:
    _, blocks_r, blocks_c = weight.scales.shape
    launch(
        block_fp8_kernel,
        (blocks_c, blocks_r, last - first),
        (weight.data.view(torch.uint8), weight.scales, out, first, *weight.sizes[1:]),
        {"STACKED": weight.stacked, "SIDE": SIDE, "BLOCK": 32, "num_warps": 4},
    )


def _mxfp4(weight: Mxfp4, first: int, last: int, out: torch.Tensor) -> None:
    each, size = weight.sizes[1] * weight.sizes[2] // MX_BLOCK, MX_BLOCK // 2
    count = (last - first) * each
    launch(
        mxfp4_kernel,
        (cdiv(count, _BLOCK // size),),
        (weight.data, weight.scales, out, first * each, count),
        {"SIZE": size, "BLOCK": _BLOCK // size, "num_warps": 4},
    )


_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
#: How the kernels read each format.
_LAUNCHES: dict[type[PackedWeight], Callable[[Any, int, int, torch.Tensor], None]] = {
    FourBit: _four_bit,
    BlockFp8: _block_fp8,
    Mxfp4: _mxfp4,
}


def blocks(weight: Weight, plan: RoutingPlan) -> Iterator[tuple[Weight, RoutingPlan]]:
    """The weight and the plan that a GEMM runs with: themselves, or of each block of packed experts in turn.

    Whoever iterates drops the weight of a block before asking for the next.
    """
    if isinstance(weight.matrix, torch.Tensor):
        yield weight, plan
        return
    for first, last in weight.matrix.blocks():
        part = part_of(plan, first, last)
        yield weight.of(first, last, dequantize(weight.matrix, first, last)), part
