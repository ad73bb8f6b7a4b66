"""Grouped GEMMs of block-fp8 weights as they are stored, with rows that are rounded to e4m3 first.

Both operands have a scale for each 128 elements of the inner dimension. So the products of 128 elements are summed by
the tensor cores, multiplied with the two scales and added in float32. Hopper sums fp8 products with some 14 bits,
over a whole row of one sign with an error of percents.

Hopper multiplies fp8 operands whose inner dimension is contiguous. The forward reads the codes of the checkpoint, and
dgrad, whose inner dimension is the other one, a transposed copy of them. Of the codes as they are stored the compiler
makes that copy in every k block, byte by byte through registers: 64 stores to shared memory and 64 permutes a thread,
for 4 matrix instructions.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import triton
import triton.language as tl

from moe_kernels.activation import Gate, value
from moe_kernels.fp8 import Fp8Weight
from moe_kernels.kernels.device import cdiv, dot_precision, loads_by_tma
from moe_kernels.kernels.launch.launch import launch_grid
from moe_kernels.kernels.operands import descriptor, low_rank_arguments
from moe_kernels.kernels.tiles.config import Override
from moe_kernels.kernels.tiles.fit import fit_rank
from moe_kernels.kernels.tiles.table import GemmConfig
from moe_kernels.kernels.triton.round import in_order, quantize
from moe_kernels.kernels.triton.tile import (
    add_bias,
    add_low_rank,
    gathered_tokens,
    load_rows,
    row_tile,
    store_tile,
    swizzled_tile,
)
from moe_kernels.layer import GemmRows, Weight
from moe_kernels.packed import SIDE
from moe_kernels.problem import device_capability
from moe_kernels.routing import RoutingPlan, TokenRows


@triton.jit
def _load_codes(
    w,
    expert,
    n0,
    block,
    N,
    K,
    blocks,
    PIECES: tl.constexpr,
    SIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    """[SIDE, BLOCK_N] at column n0 and k block ``block`` of w[expert] (N, PIECES, K); zero outside a piece."""
    piece, k0 = block // blocks, block % blocks * SIDE
    if USE_TMA:
        codes = w.load([expert, piece, n0, k0]).reshape(BLOCK_N, SIDE)
    else:
        n, k = n0 + tl.arange(0, BLOCK_N), k0 + tl.arange(0, SIDE)
        row = expert.to(tl.int64) * N + n
        pointers = w + (row * PIECES + piece)[:, None] * K + k[None, :]
        codes = tl.load(pointers, mask=(n < N)[:, None] & (k < K)[None, :], other=0.0)
    return codes.T


@triton.jit
def fp8_gemm_kernel(
    rows_in,  # (R, PIECES * blocks * SIDE) codes, or with TOP_K of the tokens: tensor or, sorted, descriptor
    row_scales_ptr,  # (PIECES * blocks, pitch), or of the tokens
    w,  # (E, PIECES, N or 2N, K) codes: tensor or descriptor; in memory N or 2N is the second dimension
    w_scales_ptr,  # W_SCALES elements for each expert
    bias_ptr,  # (E, N or 2N), or any pointer unless HAS_BIAS
    low_ptr,  # (R, RANK), or any pointer if RANK is 0
    factor_ptr,  # (E, N or 2N, RANK), or (E, RANK, N) if LOW_IS_KN
    z_ptr,  # (R, N or 2N), the sums before the activation: written if SAVE_Z
    out_ptr,  # (R, N)
    row_slot_ptr,
    expert_start_ptr,
    tile_expert_ptr,
    tile_row_ptr,
    tile_count_ptr,
    K,  # elements of a piece of the inner dimension
    N,
    blocks,  # k blocks of a piece
    pitch,
    W_SCALES,
    SCALE_N,  # from one block of columns to the next
    SCALE_K,  # from one k block to the next
    PIECES: tl.constexpr,
    SIDE: tl.constexpr,
    TOP_K: tl.constexpr,
    ACTIVATION: tl.constexpr,  # "" for a plain product
    P0: tl.constexpr,
    P1: tl.constexpr,
    GATED: tl.constexpr,
    SAVE_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RANK: tl.constexpr,
    LOW_IS_KN: tl.constexpr,
    USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # divides SIDE
    BLOCK_K: tl.constexpr,  # SIDE
    GROUP_M: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    num_m = tl.load(tile_count_ptr)
    num_n = tl.cdiv(N, BLOCK_N)
    WIDTH = 2 * N if GATED else N
    for pid in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0), flatten=FLATTEN):
        m, n = swizzled_tile(pid, num_m, num_n, GROUP_M)
        expert, row0, rows, row_mask = row_tile(m, tile_expert_ptr, tile_row_ptr, expert_start_ptr, BLOCK_M)
        source = rows.to(tl.int64)
        if TOP_K > 0:
            _, source = gathered_tokens(row_slot_ptr, rows, row_mask, TOP_K)
        n0 = n * BLOCK_N
        row_scales = row_scales_ptr + source
        w_scales = w_scales_ptr + expert.to(tl.int64) * W_SCALES + n0 // SIDE * SCALE_N
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for block in tl.range(0, PIECES * blocks):
            row_scale = tl.load(row_scales + block * pitch.to(tl.int64), mask=row_mask, other=0.0)
            scale = tl.load(w_scales + block * SCALE_K).to(tl.float32)
            if USE_TMA and TOP_K == 0:  # also loads rows of the next expert, whose results are not stored
                a = rows_in.load([row0, block * SIDE])
            else:
                a = load_rows(
                    rows_in, source, row_mask, block * SIDE, PIECES * blocks * SIDE, SIDE, True, TOP_K == 0
                )
            b = _load_codes(w, expert, n0, block, WIDTH, K, blocks, PIECES, SIDE, BLOCK_N, USE_TMA)
            total += tl.dot(a, b) * (row_scale * scale)[:, None]
            if GATED:
                scale = tl.load(w_scales + tl.cdiv(N, SIDE) * SCALE_N + block * SCALE_K).to(tl.float32)
                b = _load_codes(w, expert, N + n0, block, WIDTH, K, blocks, PIECES, SIDE, BLOCK_N, USE_TMA)
                up += tl.dot(a, b) * (row_scale * scale)[:, None]
        if RANK > 0:
            total = add_low_rank(
                *(total, low_ptr, factor_ptr, expert, rows, row_mask, n0, WIDTH),
                *(RANK, LOW_IS_KN, BLOCK_N, PRECISION),
            )
            if GATED:
                up = add_low_rank(
                    *(up, low_ptr, factor_ptr, expert, rows, row_mask, N + n0, WIDTH),
                    *(RANK, False, BLOCK_N, PRECISION),
                )
        if HAS_BIAS:
            total = add_bias(total, bias_ptr, expert, n0, WIDTH, BLOCK_N)
            if GATED:
                up = add_bias(up, bias_ptr, expert, N + n0, WIDTH, BLOCK_N)
        if SAVE_Z:
            store_tile(z_ptr, rows, row_mask, n0, WIDTH, total, BLOCK_N, N - n0)
            if GATED:
                store_tile(z_ptr, rows, row_mask, N + n0, WIDTH, up, BLOCK_N, N - n0)
        if ACTIVATION != "":
            if GATED:
                total = value(total, up, ACTIVATION, P0, P1)
            else:
                total = value(total, 1.0, ACTIVATION, P0, P1)
        store_tile(out_ptr, rows, row_mask, n0, N, total, BLOCK_N, N - n0)


# By (two products, group size), for loads by TMA and by pointers. Compiled ahead of time, and not tuned: a layer with
# those of 128 rows by TMA takes 6.3 ms where that of Hopper took 4.3 (h200-log-14-fp8-first.json).
_TILES = {
    (True, 64): GemmConfig(64, 64, SIDE, 4, 4),
    (True, 128): GemmConfig(128, 64, SIDE, 8, 4),
    (True, 256): GemmConfig(256, 32, SIDE, 8, 3),
    (False, 64): GemmConfig(64, 128, SIDE, 8, 4),
    (False, 128): GemmConfig(128, 128, SIDE, 8, 4),
    (False, 256): GemmConfig(256, 64, SIDE, 8, 4),
}
_POINTER_TILES = {
    (True, 64): GemmConfig(64, 32, SIDE, 4, 3),
    (True, 128): GemmConfig(128, 32, SIDE, 8, 3),
    (True, 256): GemmConfig(256, 16, SIDE, 8, 2),
    (False, 64): GemmConfig(64, 64, SIDE, 4, 3),
    (False, 128): GemmConfig(128, 64, SIDE, 8, 3),
    (False, 256): GemmConfig(256, 32, SIDE, 8, 2),
}


_overrides: dict[bool, Override[GemmConfig]] = {True: Override(), False: Override()}


def use_tile(gated: bool, config: GemmConfig) -> AbstractContextManager[None]:
    """Within this context GEMMs of two products at a time, or of one, use ``config``: for measuring and for tests."""
    return _overrides[gated].use(config)


def tile(gated: bool, group_size: int, tma: bool) -> GemmConfig:
    """The tile of a GEMM, of two products at a time if ``gated``. ``block_n`` divides 128, ``block_k`` is 128."""
    return _overrides[gated].choice or (_TILES if tma else _POINTER_TILES)[gated, group_size]


#: (rows, weight, plan, out, transposed, z, gate): ``out`` = rows W[e]^T, or rows W[e] if ``transposed``; with a gate
#: through it, and the sums in ``z`` unless that is empty.
Gemm = Callable[[GemmRows, Weight, RoutingPlan, torch.Tensor, bool, torch.Tensor | None, Gate | None], None]


def up(
    gemm: Gemm, x: torch.Tensor, weight: Weight, plan: RoutingPlan, gate: Gate, save_z: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """x (T, H), weight (E, Z, H) -> Z (R, Z), empty unless save_z, and A (R, I)."""
    width = weight.matrix.shape[1]
    z = x.new_empty(plan.rows, width) if save_z else x.new_empty(0)
    a = x.new_empty(plan.rows, width // 2 if gate.gated else width)
    gemm(TokenRows(x, plan.top_k), weight, plan, a, False, z, gate)
    return z, a


def down(gemm: Gemm, a: torch.Tensor, weight: Weight, plan: RoutingPlan) -> torch.Tensor:
    """Y = A W2[e]^T + b2[e]: a (R, I), weight (E, H, I) -> (R, H)."""
    out = a.new_empty(plan.rows, weight.matrix.shape[1])
    gemm(a, weight, plan, out, False, None, None)
    return out


def dgrad(gemm: Gemm, rows: GemmRows, weight: Weight, plan: RoutingPlan) -> torch.Tensor:
    """rows W[e]: dA0 from dO (T, H) and W2 (E, H, I), or dXr from dZ (R, Z) and W1 (E, Z, H)."""
    out = torch.empty(plan.rows, weight.matrix.shape[2], dtype=weight.matrix.dtype, device=plan.row_slot.device)
    gemm(rows, weight, plan, out, True, None, None)
    return out


def gemm(
    rows: GemmRows,
    weight: Weight,
    plan: RoutingPlan,
    out: torch.Tensor,
    transposed: bool,
    z: torch.Tensor | None,
    gate: Gate | None,
) -> None:
    """As :data:`Gemm` says."""
    matrix = weight.matrix
    assert isinstance(matrix, Fp8Weight)
    data, pieces = matrix.operand(transposed)
    # Tokens are rounded once, and gathered by the kernel.
    top_k = rows.top_k if isinstance(rows, TokenRows) else 0
    codes, row_scales = quantize(rows.tokens, pieces) if isinstance(rows, TokenRows) else in_order(rows, pieces, plan)
    gated = gate is not None and gate.gated
    width, inner = out.shape[1], data.shape[2] // pieces
    tma = loads_by_tma(device_capability(out.device)) and inner % 16 == 0 and data.data_ptr() % 16 == 0
    config = tile(gated, plan.group_size, tma)
    low, factor, rank = low_rank_arguments(weight, out)
    config = fit_rank(config, rank, out.device, out.element_size())
    w = data.unflatten(2, (pieces, inner)).transpose(1, 2)
    constants = {"ACTIVATION": "", "P0": 0.0, "P1": 0.0} if gate is None else gate.constants()
    constants.pop("INTERLEAVED", None)
    launch_grid(
        fp8_gemm_kernel,
        config,
        plan.max_tiles * cdiv(width, config.block_n),
        plan.persistent,
        (
            descriptor(codes, config.block_m, SIDE) if tma and not top_k else codes,
            row_scales,
            descriptor(w, 1, 1, config.block_n, SIDE) if tma else data,
            *(matrix.scales, out if weight.bias is None else weight.bias, low, factor),
            *(out if z is None else z, out),
            *plan.tile_arguments,
        ),
        (inner, width, cdiv(inner, SIDE), row_scales.stride(1), *matrix.scale_strides(transposed)),
        {
            "PIECES": pieces,
            "SIDE": SIDE,
            "TOP_K": top_k,
            **constants,
            "GATED": gated,
            "SAVE_Z": z is not None and z.numel() > 0,
            "HAS_BIAS": weight.bias is not None,
            "RANK": rank,
            "LOW_IS_KN": transposed,
            "USE_TMA": tma,
            "PRECISION": dot_precision(out.dtype),
            "FLATTEN": config.flatten,
        },
    )
