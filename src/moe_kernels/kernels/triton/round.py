"""Rows rounded to e4m3 with a float32 scale for each 128 elements: :func:`moe_kernels.fp8.quantized` on GPUs."""

import torch
import triton
import triton.language as tl

from moe_kernels.fp8 import LARGEST, SMALLEST, Fp8Rows
from moe_kernels.kernels.device import cdiv
from moe_kernels.kernels.launch.launch import launch
from moe_kernels.layer import GemmRows
from moe_kernels.packed import SIDE
from moe_kernels.routing import RoutingPlan

#: What kernels that round rows know of the format.
ROUNDING = {"SIDE": SIDE, "LARGEST": LARGEST, "SMALLEST": SMALLEST}


@triton.jit
def to_fp8(values, LARGEST: tl.constexpr, SMALLEST: tl.constexpr):
    """values [rows, blocks, elements of a block] float32 -> their codes, and the scales [rows, blocks].

    LARGEST is that of e4m3, SMALLEST what a block is taken to hold at least, so that no scale is zero.
    """
    # Infinity has an infinite scale and becomes NaN, as NaN does: the cast would make 448 of a number beyond it.
    most = tl.maximum(tl.max(tl.abs(values), axis=2), SMALLEST)
    codes = (values * tl.div_rn(LARGEST, most)[:, :, None]).to(tl.float8e4nv)
    return codes, tl.div_rn(most, LARGEST)


@triton.jit
def store_fp8(
    codes_ptr,
    scales_ptr,
    values,
    first,
    own,
    block0,
    blocks,
    SIDE: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
):
    """Round values [rows, columns], and store them from block0 of a piece on, which has ``blocks`` in each row.

    ``first`` [rows] are the numbers of the rows' first blocks of the piece, and ``own`` says which rows to store.
    """
    SIDES: tl.constexpr = values.shape[1] // SIDE
    values = tl.reshape(values.to(tl.float32), (values.shape[0], SIDES, SIDE))
    codes, scales = to_fp8(values, LARGEST, SMALLEST)
    block = block0 + tl.arange(0, SIDES)
    kept = own[:, None] & (block < blocks)[None, :]
    places = first[:, None] + block[None, :]
    code_ptrs = codes_ptr + (places * SIDE)[:, :, None] + tl.arange(0, SIDE)[None, None, :]
    tl.store(code_ptrs, codes, mask=kept[:, :, None])
    tl.store(scales_ptr + places, scales, mask=kept)


@triton.jit
def quantize_kernel(
    rows_ptr,  # (R, PIECES * K), or with TOP_K the tokens (R / TOP_K, PIECES * K)
    codes_ptr,  # (R, PIECES * blocks * SIDE) float8e4nv, zeros behind the last element of a piece
    scales_ptr,  # (R, PIECES * blocks) float32
    slot_row_ptr,  # (R,): read with TOP_K, as is routed_ptr
    routed_ptr,  # expert_start[E]: rows at or after it belong to dropped slots, and stay unwritten
    count,  # rows, or tokens
    K,  # elements of a piece
    blocks,  # of a piece
    TOP_K: tl.constexpr,
    PIECES: tl.constexpr,
    SIDE: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    r = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    width = PIECES * blocks
    c = tl.arange(0, SIDE)
    column = (block % blocks * SIDE)[:, None] + c[None, :]
    source = (block // blocks * K)[:, None] + column
    inside = (block < width)[:, None] & (column < K)
    mask = (r < count)[:, None, None] & inside[None]
    values = tl.load(rows_ptr + (r * (PIECES * K))[:, None, None] + source[None], mask=mask, other=0.0)
    codes, scales = to_fp8(values.to(tl.float32), LARGEST, SMALLEST)
    place = (block * SIDE)[:, None] + c[None, :]
    if TOP_K == 0:
        kept = (r < count)[:, None] & (block < width)[None, :]
        tl.store(codes_ptr + (r * (width * SIDE))[:, None, None] + place[None], codes, mask=kept[:, :, None])
        tl.store(scales_ptr + (r * width)[:, None] + block[None, :], scales, mask=kept)
    else:  # each token is read once, and written to its K rows
        routed = tl.load(routed_ptr)
        for k in tl.static_range(TOP_K):
            row = tl.load(slot_row_ptr + r * TOP_K + k, mask=r < count, other=0).to(tl.int64)
            kept = ((r < count) & (row < routed))[:, None] & (block < width)[None, :]
            tl.store(codes_ptr + (row * (width * SIDE))[:, None, None] + place[None], codes, mask=kept[:, :, None])
            tl.store(scales_ptr + (row * width)[:, None] + block[None, :], scales, mask=kept)


def empty_fp8(count: int, width: int, pieces: int, device: torch.device) -> Fp8Rows:
    """Room for ``count`` rows of ``pieces`` of ``width`` elements."""
    blocks = pieces * cdiv(width, SIDE)
    return Fp8Rows(
        torch.empty(count, blocks * SIDE, dtype=torch.float8_e4m3fn, device=device),
        torch.empty(count, blocks, dtype=torch.float32, device=device),
    )


def quantize(rows: torch.Tensor, pieces: int = 1) -> Fp8Rows:
    """As :func:`moe_kernels.fp8.quantized`: rows (R, K) -> codes (R, blocks * 128), scales (R, blocks)."""
    return _quantize(rows, rows.shape[0], 0, pieces, rows, rows)


def in_order(rows: GemmRows, pieces: int, plan: RoutingPlan) -> Fp8Rows:
    """Rows in expert order, or tokens, rounded once and copied into it: as ``quantize`` of those rows."""
    if isinstance(rows, Fp8Rows):
        return rows
    if isinstance(rows, torch.Tensor):
        return quantize(rows, pieces)
    return _quantize(rows.tokens, plan.rows, rows.top_k, pieces, plan.slot_row, plan.expert_start[plan.experts :])


def _quantize(
    rows: torch.Tensor, count: int, top_k: int, pieces: int, slot_row: torch.Tensor, routed: torch.Tensor
) -> Fp8Rows:
    width = rows.shape[1] // pieces
    blocks = cdiv(width, SIDE)
    rounded = empty_fp8(count, width, pieces, rows.device)
    if rows.numel() > 0:
        launch(
            quantize_kernel,
            (cdiv(rows.shape[0], 8), cdiv(pieces * blocks, 4)),
            (rows, *rounded, slot_row, routed, rows.shape[0], width, blocks),
            {"TOP_K": top_k, "PIECES": pieces, **ROUNDING, "BLOCK_R": 8, "BLOCKS": 4, "num_warps": 4},
        )
    return rounded
