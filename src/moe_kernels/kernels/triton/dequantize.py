"""Experts in 4 bits as a block of 16-bit experts, ahead of the GEMM that reads them.

The arithmetic and its roundings are bitsandbytes' own, so the values are bitwise those that it gives.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from moe_kernels.kernels.device import cdiv
from moe_kernels.kernels.launch.launch import launch
from moe_kernels.kernels.triton.plan import part_of
from moe_kernels.layer import Weight
from moe_kernels.packed import PackedWeight
from moe_kernels.routing import RoutingPlan

_BLOCK = 2048  # bytes of a program


@triton.jit
def dequantize_kernel(
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


def dequantize(weight: PackedWeight, first: int, last: int) -> torch.Tensor:
    """Experts ``first`` to ``last`` (exclusive) of ``weight``: (last - first, N, K)."""
    out = torch.empty((last - first, *weight.sizes[1:]), dtype=weight.dtype, device=weight.device)
    scales, each = weight.scales, weight.sizes[1] * weight.sizes[2] // 2
    nested = scales.table is not None
    count = (last - first) * each
    outer = (scales.table, scales.outer, scales.offset) if nested else (weight.table,) * 3
    launch(
        dequantize_kernel,
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
    return out.mT if weight.by_columns else out


_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def blocks(weight: Weight, plan: RoutingPlan) -> Iterator[tuple[Weight, RoutingPlan]]:
    """The weight and the plan that a GEMM runs with: themselves, or of each block of experts in 4 bits in turn.

    Whoever iterates drops the weight of a block before asking for the next.
    """
    if isinstance(weight.matrix, torch.Tensor):
        yield weight, plan
        return
    for first, last in weight.matrix.blocks():
        part = part_of(plan, first, last)
        yield weight.of(first, last, dequantize(weight.matrix, first, last)), part
