"""Steps 1, 2, 4 and 6 on Hopper: warp-specialised, persistent grouped GEMMs.

The same math and the same row tiles as ``kernels/triton/up.py`` and ``grouped_gemm.py``. Rows of X are gathered by
cp.async; everything else is loaded and stored by TMA. Block-fp8 weights are dequantised a block of experts ahead, or
by the producer (``dequantizing.py``).
"""

from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

from moe_kernels.activation import Gate
from moe_kernels.kernels.device import cdiv, multiprocessors
from moe_kernels.kernels.hopper import dequantizing
from moe_kernels.kernels.hopper.epilogue import Epilogue, write_tile
from moe_kernels.kernels.hopper.mainloop import (
    Operands,
    complete,
    k_blocks_per_wait,
    mainloop,
    producer,
    products,
    skipped,
    taken,
    weight_arguments,
)
from moe_kernels.kernels.hopper.ring import (
    BLOCK_K,
    BLOCK_M,
    CHUNK,
    SWIZZLED,
    Matrix,
    RowTiles,
    Schedule,
    accumulator_layout,
    await_turn,
    halves,
    matrix,
    new_ring,
    new_turns,
    pass_turn,
    schedule_of,
    within_experts,
)
from moe_kernels.kernels.launch.launch import launch
from moe_kernels.kernels.operands import Descriptor
from moe_kernels.kernels.triton.dequantize import blocks
from moe_kernels.layer import Rows, Weight
from moe_kernels.routing import RoutingPlan, TokenRows

#: k blocks of a cooperative tile that are being multiplied while the next tile is looked up.
AHEAD = gl.constexpr(2)


@gluon.jit
def consumer(WARPGROUP: gl.constexpr, buffers, epilogue, operands, tiles, ring, turns, COOPERATIVE: gl.constexpr):
    """A consumer warpgroup: multiply the k blocks in the ring, then run the epilogue of the tile."""
    BLOCK_K: gl.constexpr = ring.a.shape[2]
    BLOCK_N: gl.constexpr = ring.b.shape[2] if operands.W_IS_KN else ring.b.shape[1]
    ROWS: gl.constexpr = buffers.shape[1]
    ROW0: gl.constexpr = WARPGROUP * ROWS if COOPERATIVE else 0
    first, stride, step = taken(WARPGROUP, COOPERATIVE, operands, BLOCK_K)
    turn = 0
    if first < tiles.count():
        tile = tiles.at(first)
        for number in range(first, tiles.count(), stride):
            acc = gl.zeros((ROWS, BLOCK_N), gl.float32, accumulator_layout(BLOCK_N))
            if COOPERATIVE:
                acc, step = products(acc, operands, ring, step, ROW0, 0, AHEAD * BLOCK_K)
                following = tiles.at(number + stride)  # while these run
                acc, step = mainloop(acc, operands, ring, step, ROW0, AHEAD)
                acc = complete(acc, ring, step)
            else:
                await_turn(turns, WARPGROUP, turn)
                acc, step = mainloop(acc, operands, ring, step, ROW0, 0)
                pass_turn(turns, WARPGROUP)
                acc = complete(acc, ring, step)
                step = skipped(step, operands, BLOCK_K)
                turn += 1
            left, right = halves(acc)
            write_tile(left, right, buffers, epilogue, tile, tile.row0 + ROW0, operands.GATED)
            if not COOPERATIVE:
                following = tiles.at(number + stride)
            tile = following
    tma.store_wait(0)


@gluon.jit
def hopper_gemm_kernel(
    rows_in,  # (R, K): descriptor; any pointer if GATHER
    rows_ptr,  # (T, K): read if GATHER
    w,  # (E * Z, K), or (E * K, Z) if W_IS_KN: descriptor. Z is 2N with a gate, N without
    low,  # (R, RANK): descriptor; any pointer if RANK is 0, as is factor
    factor,  # (E * Z, RANK), or (E * RANK, N) if LOW_IS_KN: descriptor
    bias_ptr,  # (E, Z): read if HAS_BIAS
    z,  # (R, Z): descriptor, written if SAVE_Z
    z_ptr,
    out,  # (R, N): descriptor
    out_ptr,
    row_slot_ptr,
    expert_start_ptr,
    tile_expert_ptr,
    tile_row_ptr,
    tile_count_ptr,
    K,
    N,
    w_scales_ptr,  # (E, blocks of rows, blocks of columns): read if SIDE
    W_EXPERT_STRIDE,  # of the scales
    W_ROW_STRIDE,
    W_ROWS,  # of an expert's matrix as stored
    WITHIN_EXPERTS: gl.constexpr,
    TOP_K: gl.constexpr,
    ACTIVATION: gl.constexpr,
    P0: gl.constexpr,
    P1: gl.constexpr,
    GATED: gl.constexpr,
    INTERLEAVED: gl.constexpr,
    GATHER: gl.constexpr,
    SAVE_Z: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    W_IS_KN: gl.constexpr,
    LOW_IS_KN: gl.constexpr,
    RANK: gl.constexpr,
    K_BLOCKS_PER_WAIT: gl.constexpr,
    SIDE: gl.constexpr,  # of a block of fp8 weights with one scale; 0: of 16 bits
    COOPERATIVE: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    GROUP_M: gl.constexpr,
    STAGES: gl.constexpr,
):
    gl.static_assert(COOPERATIVE or not GATED, "the epilogue of gated tiles is cooperative only")
    gl.static_assert(SIDE == 0 or (COOPERATIVE and BLOCK_N == 2 * SIDE), "a half tile has one scale a k block")
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    ROWS: gl.constexpr = BLOCK_M // 2 if COOPERATIVE else BLOCK_M
    COLUMNS: gl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    HALVES: gl.constexpr = GATED and not INTERLEAVED
    # A stage is ready when the bytes of its TMA loads and, with GATHER, the cp.async of all 128 threads have arrived.
    # A producer that dequantises arrives once more, with GATHER in place of the TMA loads.
    READY_COUNT: gl.constexpr = 1 + (128 if GATHER else 1 if SIDE else 0)
    W_BLOCK: gl.constexpr = (BLOCK_K, BLOCK_N) if W_IS_KN else (BLOCK_N, BLOCK_K)
    ring = new_ring(dtype, STAGES, (BLOCK_M, BLOCK_K), W_BLOCK, READY_COUNT, 2 if COOPERATIVE else 1)
    turns = ring.empty if COOPERATIVE else new_turns()  # not used if cooperative
    buffers0 = gl.allocate_shared_memory(dtype, [2, ROWS, CHUNK], SWIZZLED)
    buffers1 = gl.allocate_shared_memory(dtype, [2, ROWS, CHUNK], SWIZZLED)
    num_m = gl.load(tile_count_ptr)
    num_n = (N + COLUMNS - 1) // COLUMNS
    tiles = RowTiles(
        expert_start=expert_start_ptr, tile_expert=tile_expert_ptr, tile_row=tile_row_ptr, num_m=num_m, num_n=num_n,
        BLOCK_M=BLOCK_M, GROUP_M=GROUP_M, WITHIN_EXPERTS=WITHIN_EXPERTS, FULL=COOPERATIVE,
    )  # fmt: skip
    operands = Operands(
        rows=Matrix(descriptor=rows_in, pointer=rows_ptr, width=K), weight=w, low=low, factor=factor,
        row_slot=row_slot_ptr, N=2 * N if INTERLEAVED else N, TOP_K=TOP_K, GATED=HALVES, GATHER=GATHER,
        W_IS_KN=W_IS_KN, LOW_IS_KN=LOW_IS_KN, RANK=RANK, LOW_K=min(RANK, BLOCK_K),
        LOW_BLOCKS=(RANK + BLOCK_K - 1) // BLOCK_K,
    )  # fmt: skip
    epilogue = Epilogue(
        z=Matrix(descriptor=z, pointer=z_ptr, width=2 * N if GATED else N),
        out=Matrix(descriptor=out, pointer=out_ptr, width=N), bias=bias_ptr,
        ACTIVATION=ACTIVATION, P0=P0, P1=P1, SAVE_Z=SAVE_Z, INTERLEAVED=INTERLEAVED, HAS_BIAS=HAS_BIAS,
    )  # fmt: skip
    # Registers per thread, whose sum over the three warpgroups is at most 512. A gathering producer needs four warps
    # and registers for pointers, and so does one that dequantises; to issue TMA loads one warp is enough.
    if SIDE > 0:
        codes = dequantizing.new_codes(
            w, w_scales_ptr, W_EXPERT_STRIDE, W_ROW_STRIDE, W_ROWS, K, N, SIDE, 2, HALVES, W_IS_KN, BLOCK_K, STAGES
        )
        gl.warp_specialize(
            [
                (consumer, (0, buffers0, epilogue, operands, tiles, ring, turns, COOPERATIVE)),
                (consumer, (1, buffers1, epilogue, operands, tiles, ring, turns, COOPERATIVE)),
                (dequantizing.producer, (operands, codes, tiles, ring)),
            ],
            [4, 4],
            [208, 88],
        )
    else:
        gl.warp_specialize(
            [
                (consumer, (0, buffers0, epilogue, operands, tiles, ring, turns, COOPERATIVE)),
                (consumer, (1, buffers1, epilogue, operands, tiles, ring, turns, COOPERATIVE)),
                (producer, (operands, tiles, ring, K_BLOCKS_PER_WAIT)),
            ],
            [4, 4 if GATHER else 1],
            [216 if GATHER else 232, 72 if GATHER else 40],
        )


_IDENTITY = {"ACTIVATION": "identity", "P0": 0.0, "P1": 0.0, "GATED": False, "INTERLEAVED": False, "GATHER": False}


def up(rows: Rows, weight: Weight, plan: RoutingPlan, gate: Gate, save_z: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """rows (R, H), sorted by expert, or tokens to gather them from; weight (E, Z, H) -> Z (R, Z), A (R, I).

    Z is empty unless save_z.

    The low-rank parts of weights, here and below, are of a rank in RANKS.
    """
    width, halved = weight.matrix.shape[1], 2 if gate.gated else 1
    gathered = isinstance(rows, TokenRows)
    x = rows.tokens if isinstance(rows, TokenRows) else rows
    z = x.new_empty(plan.rows, width) if save_z else x.new_empty(0)
    a = x.new_empty(plan.rows, width // halved)
    in_load = not gate.interleaved and dequantizing.in_load(weight.matrix, plan, gate.gated)
    schedule = dequantizing.SCHEDULE if in_load else schedule_of("up", x.shape[1], x.device)
    columns = schedule.block_n // halved
    constants = {**gate.constants(), "GATHER": gathered, "SAVE_Z": save_z}
    rows_in = x if gathered else matrix(x, BLOCK_M, BLOCK_K)
    saved = z if save_z else a
    z_arguments = matrix(saved, schedule.rows, CHUNK.value), saved
    for part, tiles in [(weight, plan)] if in_load else blocks(weight, plan):
        _launch("up", rows_in, x, part, z_arguments, a, tiles, schedule, columns, constants)
        del part
    return z, a


def down(a: torch.Tensor, weight: Weight, plan: RoutingPlan) -> torch.Tensor:
    """Y = A W2[e]^T: a (R, I), weight (E, H, I) -> (R, H)."""
    return _rows_times_weight("down", a, weight, plan)


def dgrad(rows: torch.Tensor, weight: Weight, plan: RoutingPlan) -> torch.Tensor:
    """rows @ weight[e]: dA0 from dOs (R, H) and W2 (E, H, I), or dXr from dZ (R, 2I) and W1 (E, 2I, H)."""
    return _rows_times_weight("dgrad", rows, weight, plan)


def _rows_times_weight(kernel: str, rows: torch.Tensor, weight: Weight, plan: RoutingPlan) -> torch.Tensor:
    out = rows.new_empty(plan.rows, weight.matrix.shape[2 if kernel == "dgrad" else 1])
    in_load = dequantizing.in_load(weight.matrix, plan, False)
    schedule = dequantizing.SCHEDULE if in_load else schedule_of(kernel, rows.shape[1], rows.device)
    constants = {**_IDENTITY, "SAVE_Z": False}
    rows_in = matrix(rows, BLOCK_M, BLOCK_K)
    for part, tiles in [(weight, plan)] if in_load else blocks(weight, plan):
        _launch(kernel, rows_in, rows, part, (out, out), out, tiles, schedule, schedule.block_n, constants)
        del part
    return out


def _launch(
    kernel: str,
    rows_in: torch.Tensor | Descriptor,
    rows: torch.Tensor,
    weight: Weight,
    z: tuple[torch.Tensor | Descriptor, torch.Tensor],
    out: torch.Tensor,
    plan: RoutingPlan,
    schedule: Schedule,
    columns: int,
    constants: dict[str, Any],
) -> None:
    """Launch over the plan's row tiles times blocks of ``columns`` columns of out (R, N); z is ignored if unused."""
    width = out.shape[1]
    tiles = plan.max_tiles * cdiv(width, columns)
    if tiles == 0:
        return
    # Gate and up columns come in two loads, or interleaved in one of twice as many.
    loaded = 2 * columns if constants["INTERLEAVED"] else columns
    weights, chosen = weight_arguments(weight, loaded, kernel == "dgrad", unused=out)
    chosen["HAS_BIAS"] = weight.bias is not None
    # In ping-pong tiles have few k blocks, and a longer lookup costs more than weights that are read twice.
    chosen["WITHIN_EXPERTS"] = schedule.cooperative and within_experts(plan)
    stages = k_blocks_per_wait(kernel, plan, weight.matrix) if isinstance(weight.matrix, torch.Tensor) else 1
    chosen["K_BLOCKS_PER_WAIT"] = stages
    launch(
        hopper_gemm_kernel,
        (min(tiles, multiprocessors(out.device)),),
        (
            rows_in,
            rows,
            *weights,
            out if weight.bias is None else weight.bias,
            *z,
            matrix(out, schedule.rows, CHUNK.value),
            out,
            *plan.tile_arguments,
            rows.shape[1],
            width,
            *dequantizing.scale_arguments(weight.matrix, unused=out),
        ),
        {"TOP_K": plan.top_k, **constants, **schedule.constants(), **chosen, "num_warps": 4},
    )
