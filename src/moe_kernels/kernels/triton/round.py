"""Rows rounded to e4m3 with a float32 scale for each 128 elements: :func:`moe_kernels.fp8.quantized` on GPUs."""

import torch
import triton
import triton.language as tl

from moe_kernels.fp8 import LARGEST, SMALLEST, Fp8Rows
from moe_kernels.kernels.device import cdiv, column_block
from moe_kernels.kernels.launch.launch import launch
from moe_kernels.layer import GemmRows
from moe_kernels.packed import SIDE
from moe_kernels.routing import RoutingPlan

_SIDE = tl.constexpr(SIDE)
_LARGEST = tl.constexpr(LARGEST)
_SMALLEST = tl.constexpr(SMALLEST)
#: Scales behind those of the last row, which may be read: GEMMs read those of whole tiles.
_PADDING = 256


@triton.jit
def to_fp8(values):
    """values [rows, columns], whole blocks -> codes [rows, blocks, SIDE] and scales [rows, blocks]."""
    BLOCKS: tl.constexpr = values.shape[1] // _SIDE
    values = tl.reshape(values.to(tl.float32), (values.shape[0], BLOCKS, _SIDE))
    # Infinity has an infinite scale and becomes NaN, as NaN does: the cast would make 448 of a number beyond it.
    most = tl.maximum(tl.max(tl.abs(values), axis=2), _SMALLEST)
    codes = (values * tl.div_rn(_LARGEST, most)[:, :, None]).to(tl.float8e4nv)
    return codes, tl.div_rn(most, _LARGEST)


@triton.jit
def store_fp8(codes_ptr, scales_ptr, pitch, codes, scales, rows, own, k0, K, piece, PIECES: tl.constexpr):
    """Store what ``to_fp8`` made of the columns from k0 on, of K, in ``piece`` of these rows; only of ``own`` rows.

    codes (R, PIECES * blocks * SIDE), scales (PIECES * blocks, pitch).
    """
    blocks = tl.cdiv(K, _SIDE)
    block = k0 // _SIDE + tl.arange(0, codes.shape[1])
    kept = own[:, None] & (block < blocks)[None, :]
    place = piece * blocks + block
    first = rows.to(tl.int64)[:, None] * (PIECES * blocks) + place[None, :]
    code_ptrs = codes_ptr + (first * _SIDE)[:, :, None] + tl.arange(0, _SIDE)[None, None, :]
    tl.store(code_ptrs, codes, mask=kept[:, :, None])
    tl.store(scales_ptr + place.to(tl.int64)[None, :] * pitch + rows[:, None], scales, mask=kept)


# Under expert parallelism every step brings another number of rows, for which nothing is to be compiled.
@triton.jit(do_not_specialize=["count", "pitch"])
def quantize_kernel(
    rows_ptr,  # (R, PIECES * K), or with TOP_K the tokens (R / TOP_K, PIECES * K)
    codes_ptr,  # (R, PIECES * blocks * SIDE) float8e4nv, zeros behind the last element of a piece
    scales_ptr,  # (PIECES * blocks, pitch) float32
    slot_row_ptr,  # (R,): read with TOP_K, as is routed_ptr
    routed_ptr,  # expert_start[E]: rows at or after it belong to dropped slots, and stay unwritten
    count,  # rows, or tokens
    pitch,
    K,  # elements of a piece
    TOP_K: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    chunks = tl.cdiv(K, BLOCK_K)
    piece, k0 = tl.program_id(1) // chunks, tl.program_id(1) % chunks * BLOCK_K
    k = k0 + tl.arange(0, BLOCK_K)
    own = rows < count
    places = (rows.to(tl.int64) * PIECES + piece)[:, None] * K + k[None, :]
    codes, scales = to_fp8(tl.load(rows_ptr + places, mask=own[:, None] & (k < K)[None, :], other=0.0))
    if TOP_K == 0:
        store_fp8(codes_ptr, scales_ptr, pitch, codes, scales, rows, own, k0, K, piece, PIECES)
    else:  # each token is read once, and written to its K rows
        routed = tl.load(routed_ptr)
        for slot in tl.static_range(TOP_K):
            row = tl.load(slot_row_ptr + rows * TOP_K + slot, mask=own, other=0)
            kept = own & (row < routed)
            store_fp8(codes_ptr, scales_ptr, pitch, codes, scales, row, kept, k0, K, piece, PIECES)


def empty_fp8(count: int, width: int, pieces: int, device: torch.device) -> Fp8Rows:
    """Room for ``count`` rows of ``pieces`` of ``width`` elements. Scales of a block are next to each other."""
    blocks = pieces * cdiv(width, SIDE)
    codes = torch.empty(count, blocks * SIDE, dtype=torch.float8_e4m3fn, device=device)
    pitch = cdiv(count, 16) * 16 + _PADDING  # kernels are compiled anew for one that is no multiple of 16
    scales = torch.empty(blocks, pitch, dtype=torch.float32, device=device)
    return Fp8Rows(codes, scales[:, :count].T)


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
    rounded = empty_fp8(count, width, pieces, rows.device)
    block_k = max(column_block(width), SIDE)
    block_r = 4096 // block_k
    if rows.numel() > 0:
        launch(
            quantize_kernel,
            (cdiv(rows.shape[0], block_r), pieces * cdiv(width, block_k)),
            (rows, *rounded, slot_row, routed, rows.shape[0], rounded.scales.stride(1), width),
            {"TOP_K": top_k, "PIECES": pieces, "BLOCK_R": block_r, "BLOCK_K": block_k, "num_warps": 4},
        )
    return rounded
