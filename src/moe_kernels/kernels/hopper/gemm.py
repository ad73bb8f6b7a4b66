"""Steps 1, 2, 4 and 6 on Hopper: warp-specialised, persistent grouped GEMMs.

The same math and the same row tiles as ``kernels/triton/up.py`` and ``grouped_gemm.py``. Rows of X are gathered by
cp.async; everything else is loaded and stored by TMA. Block-fp8 weights are dequantised a block of experts ahead, or
by the producer (``dequantizing.py``).
"""

from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from moe_kernels.activation import Gate, value
from moe_kernels.kernels.device import cdiv, multiprocessors
from moe_kernels.kernels.hopper import dequantizing
from moe_kernels.kernels.hopper.gluon_names import aggregate, cp_async, reinterpret, tma_load, tma_store
from moe_kernels.kernels.hopper.ring import (
    BLOCK_K,
    BLOCK_M,
    CHUNK,
    FEW_ROWS,
    SWIZZLED,
    Matrix,
    RowTiles,
    Schedule,
    accumulator_layout,
    await_turn,
    block_layout,
    copy_layout,
    halves,
    has_fast_memory,
    matrix,
    new_ring,
    new_turns,
    pairs,
    pass_turn,
    put,
    schedule_of,
    within_experts,
    write_chunk,
)
from moe_kernels.kernels.launch.launch import launch
from moe_kernels.kernels.operands import Descriptor, low_rank_arguments, stored
from moe_kernels.kernels.tiles.config import Override
from moe_kernels.kernels.triton.dequantize import blocks
from moe_kernels.layer import Rows, Weight
from moe_kernels.packed import SIDE, BlockFp8
from moe_kernels.routing import RoutingPlan, TokenRows


@gluon.jit
def load_columns(matrices, b, ready, tile, k0, K, N, GATED: gl.constexpr, IS_KN: gl.constexpr):
    """Issue the load of the k block at k0 of a tile's columns of its expert's matrix, (N, K), or (K, N) if IS_KN.

    GATED: of N gate and N up columns, half of ``b`` each.
    """
    if GATED:
        HALF: gl.constexpr = b.shape[0] // 2
        gate_row = tile.expert * N * 2 + tile.n * HALF
        tma_load(matrices, [gate_row, k0], ready, b.slice(0, HALF))
        tma_load(matrices, [gate_row + N, k0], ready, b.slice(HALF, HALF))
    elif IS_KN:
        tma_load(matrices, [tile.expert * K + k0, tile.n * b.shape[1]], ready, b)
    else:
        tma_load(matrices, [tile.expert * N + tile.n * b.shape[0], k0], ready, b)


@aggregate
class Operands:
    """The rows and the weights that a GEMM multiplies, (R, K) times (K, N) of each expert.

    GATED: the weights have N gate and N up columns, each loaded by itself.

    A low-rank part adds (R, RANK) times (RANK, N) of each expert: LOW_BLOCKS more k blocks of every tile, of LOW_K.
    They are as narrow as the rank: zeros in their place would make NaN of another expert's Inf.
    """

    rows: Matrix  # with GATHER the tokens that are the sorted rows' sources, else the sorted rows
    weight: tma.tensor_descriptor
    low: tma.tensor_descriptor | gl.tensor  # sorted rows; any pointer if RANK is 0, as is factor
    factor: tma.tensor_descriptor | gl.tensor
    row_slot: gl.tensor
    N: gl.tensor
    TOP_K: gl.constexpr
    GATED: gl.constexpr
    GATHER: gl.constexpr
    W_IS_KN: gl.constexpr  # each expert's matrix is stored (K, N), not (N, K)
    LOW_IS_KN: gl.constexpr  # the same of the factor
    RANK: gl.constexpr  # 0: no low-rank part
    LOW_K: gl.constexpr
    LOW_BLOCKS: gl.constexpr

    @gluon.jit
    def sources(self, tile, BLOCK_M: gl.constexpr, BLOCK_K: gl.constexpr):
        """With GATHER, pointers to the first k block of the tokens of a tile's rows."""
        if self.GATHER:
            layout: gl.constexpr = copy_layout(BLOCK_K)
            rows = tile.row0 + gl.arange(0, BLOCK_M, gl.SliceLayout(1, layout))
            # Rows past the expert's end read slot 0: a valid token, whose result is not stored.
            slot = gl.load(self.row_slot + rows, mask=rows < tile.row_end, other=0)
            cols = gl.arange(0, BLOCK_K, gl.SliceLayout(0, layout))
            token = (slot // self.TOP_K).to(gl.int64)
            pointers = self.rows.pointer + token[:, None] * self.rows.width + cols[None, :]
        else:
            pointers = self.rows.pointer
        return pointers

    @gluon.jit
    def load(self, stage, sources, tile, k0):
        """Issue the loads of the k block at k0 of ``tile`` into a stage of the ring."""
        a, b, ready = stage
        mbarrier.expect(ready, b.numel * 2 if self.GATHER else (a.numel + b.numel) * 2)
        load_columns(self.weight, b, ready, tile, k0, self.rows.width, self.N, self.GATED, self.W_IS_KN)
        if self.GATHER:
            cp_async(a, sources + k0)
            async_copy.mbarrier_arrive(ready, increment_count=False)
        else:
            tma_load(self.rows.descriptor, [tile.row0, k0], ready, a)

    @gluon.jit
    def low_stage(self, ring, step):
        """``ring.stage`` of a low-rank block: the beginning of its memory, as blocks of LOW_K of k."""
        a, b, ready = ring.stage(step)
        LOW_K: gl.constexpr = self.LOW_K
        BLOCK_N: gl.constexpr = b.shape[1] if self.W_IS_KN else b.shape[0]
        dtype: gl.constexpr = self.low.dtype
        LOW_ROW: gl.constexpr = dtype.primitive_bitwidth // a.dtype.primitive_bitwidth * LOW_K
        layout: gl.constexpr = block_layout(LOW_K)
        # A view has the size of the whole stage: triton 3.8 takes no smaller one.
        low = reinterpret(a, dtype, [a.numel // LOW_ROW, LOW_K], layout).slice(0, a.shape[0])
        if self.LOW_IS_KN:
            factor = reinterpret(b, dtype, [LOW_K, b.numel // LOW_ROW], SWIZZLED).slice(0, BLOCK_N, dim=1)
        else:
            factor = reinterpret(b, dtype, [b.numel // LOW_ROW, LOW_K], layout).slice(0, BLOCK_N)
        return low, factor, ready

    @gluon.jit
    def load_low(self, stage, tile, block: gl.constexpr):
        """Issue the loads of low-rank block ``block`` of ``tile`` into a ``low_stage``, all by TMA.

        Rows past the expert's end are those of the next one, whose results are not stored.
        """
        a, b, ready = stage
        mbarrier.expect(ready, (a.numel + b.numel) * 2)
        if self.GATHER:
            mbarrier.arrive(ready, count=128)  # in place of the cp.async of all threads
        k0 = block * self.LOW_K
        load_columns(self.factor, b, ready, tile, k0, self.RANK, self.N, self.GATED, self.LOW_IS_KN)
        tma_load(self.low, [tile.row0, k0], ready, a)

    @gluon.jit
    def load_all_low(self, ring, step, tile):
        """The producer's low-rank blocks of ``tile``, from k block ``step`` on. Returns the next."""
        for block in gl.static_range(self.LOW_BLOCKS):
            ring.await_empty(step)
            self.load_low(self.low_stage(ring, step), tile, block)
            step += 1
        return step

    @gluon.jit
    def add_low(self, acc, ring, step, ROW0: gl.constexpr):
        """A consumer's sums, of a tile's rows from ROW0 on, plus the low-rank part: the k blocks from ``step`` on."""
        for _ in gl.static_range(self.LOW_BLOCKS):
            ring.await_ready(step)
            a, b, _ready = self.low_stage(ring, step)
            if acc.shape[0] < a.shape[0]:
                a = a.slice(ROW0, acc.shape[0])
            if not self.LOW_IS_KN:
                b = b.permute((1, 0))
            acc = warpgroup_mma(a, b, acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            ring.free_before(step)
            step += 1
        return acc


@gluon.jit
def producer(operands, tiles, ring, K_BLOCKS_PER_WAIT: gl.constexpr):
    """The producer warps: load the k blocks of every tile of this program into the ring.

    K_BLOCKS_PER_WAIT: wait for this many empty stages, 1 or 2, then load them back to back; see
    ``k_blocks_per_wait``.
    """
    BLOCK_M: gl.constexpr = ring.a.shape[1]
    BLOCK_K: gl.constexpr = ring.a.shape[2]
    K = operands.rows.width
    step = 0
    for pid in range(gl.program_id(0), tiles.count(), gl.num_programs(0)):
        tile = tiles.at(pid)
        sources = operands.sources(tile, BLOCK_M, BLOCK_K)
        for k0 in range(0, K, K_BLOCKS_PER_WAIT * BLOCK_K):
            k1 = k0 + BLOCK_K
            ring.await_empty(step)
            if K_BLOCKS_PER_WAIT == 2 and k1 < K:
                ring.await_empty(step + 1)
            first = ring.stage(step)
            operands.load(first, sources, tile, k0)
            step += 1
            if K_BLOCKS_PER_WAIT == 2 and k1 < K:
                second = ring.stage(step)
                operands.load(second, sources, tile, k1)
                step += 1
        step = operands.load_all_low(ring, step, tile)


@aggregate
class Epilogue:
    """What is written of a tile: its sums and a bias, or those as Z, with SAVE_Z, and the activation of them."""

    z: Matrix
    out: Matrix
    bias: gl.tensor  # (E, width of the sums): read if HAS_BIAS
    ACTIVATION: gl.constexpr  # "identity": the sums are what is written
    P0: gl.constexpr
    P1: gl.constexpr
    SAVE_Z: gl.constexpr
    INTERLEAVED: gl.constexpr  # the sums are [g0, u0, g1, u1, ...]
    HAS_BIAS: gl.constexpr

    @gluon.jit
    def biased(self, values, expert, col0, width):
        """values [rows, columns] of the sums' columns from col0 on, plus the bias."""
        if self.HAS_BIAS:
            layout: gl.constexpr = accumulator_layout(values.shape[1])
            values = gl.convert_layout(values, layout, assert_trivial=True)
            cols = col0 + gl.arange(0, values.shape[1], gl.SliceLayout(0, layout))
            bias = gl.load(self.bias + expert.to(gl.int64) * width + cols, mask=cols < width, other=0.0)
            values += bias.to(gl.float32)[None, :]
        return values

    @gluon.jit
    def activated(self, gate, up):
        """The activation, rounded."""
        return value(gate, up, self.ACTIVATION, self.P0, self.P1).to(self.out.descriptor.dtype)


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
def skipped(step, operands, BLOCK_K: gl.constexpr):
    """Ping-pong: the k block after those of the other consumer's tile, of which ``step`` is the first."""
    return step + (operands.rows.width + BLOCK_K - 1) // BLOCK_K + operands.LOW_BLOCKS


@gluon.jit
def taken(WARPGROUP: gl.constexpr, COOPERATIVE: gl.constexpr, operands, BLOCK_K: gl.constexpr):
    """(first, stride, step): a consumer's tiles are first, first + stride, ..., and ``step`` the first's k block.

    Cooperative consumers take all tiles of their program, in ping-pong every other.
    """
    first, stride = gl.program_id(0), gl.num_programs(0)
    step = 0
    if not COOPERATIVE:
        if WARPGROUP == 1:
            first += stride
            step = skipped(step, operands, BLOCK_K)
        stride *= 2
    return first, stride, step


@gluon.jit
def products(acc, operands, ring, step, ROW0: gl.constexpr, k_begin, k_end):
    """A consumer's sums, of a tile's rows from ROW0 on, plus the products of the k blocks from k_begin to k_end.

    Returns the sums, to which the last product is still being added, and the k block after the last.
    """
    BLOCK_K: gl.constexpr = ring.a.shape[2]
    for k0 in range(k_begin, gl.minimum(k_end, operands.rows.width), BLOCK_K):
        ring.await_ready(step)
        if operands.GATHER:
            fence_async_shared()  # make cp.async writes visible to wgmma's async proxy
        a, b, _ready = ring.stage(step)
        if acc.shape[0] < a.shape[0]:
            a = a.slice(ROW0, acc.shape[0])
        if not operands.W_IS_KN:
            b = b.permute((1, 0))
        acc = warpgroup_mma(a, b, acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=(acc,))
        if k0 > 0:
            ring.free_before(step)
        step += 1
    return acc, step


@gluon.jit
def mainloop(acc, operands, ring, step, ROW0: gl.constexpr, BEGIN: gl.constexpr):
    """``products`` of k block BEGIN and all that follow, and of the low-rank blocks."""
    BLOCK_K: gl.constexpr = ring.a.shape[2]
    acc, step = products(acc, operands, ring, step, ROW0, BEGIN * BLOCK_K, operands.rows.width)
    acc = operands.add_low(acc, ring, step, ROW0)
    return acc, step + operands.LOW_BLOCKS


@gluon.jit
def complete(acc, ring, step):
    """The sums of ``mainloop``, once its last product is added."""
    acc = warpgroup_mma_wait(0, deps=(acc,))
    ring.free_before(step)
    return acc


@gluon.jit
def write_tile(left, right, buffers, epilogue, tile, row0, GATED: gl.constexpr):
    """The epilogue of a consumer's half tile from row0 on, whose sums are ``left`` and ``right`` [rows, columns].

    GATED: these are the sums of gate and of up; else those of neighbouring columns.
    """
    HALF: gl.constexpr = left.shape[1]
    expert, row_end = tile.expert, tile.row_end
    if epilogue.INTERLEAVED:
        _write_interleaved(left, right, buffers, epilogue, expert, row0, row_end, tile.n * HALF)
    elif GATED:
        _write_gated(left, right, buffers, epilogue, expert, row0, row_end, tile.n * HALF)
    elif epilogue.ACTIVATION == "identity":
        _write(left, right, buffers, epilogue, expert, row0, row_end, tile.n * (2 * HALF))
    else:
        col0 = tile.n * (2 * HALF)
        _write_ungated(left, buffers, epilogue, expert, row0, row_end, col0)
        _write_ungated(right, buffers, epilogue, expert, row0, row_end, col0 + HALF)


@gluon.jit
def _write(left, right, buffers, epilogue, expert, row0, row_end, col0):
    """Store two blocks of columns to (row0, col0); only rows < row_end and columns inside."""
    out = epilogue.out
    HALF: gl.constexpr = left.shape[1]
    tma.store_wait(0)  # the stores of the tile before are done: both buffers are free
    if HALF == CHUNK:
        left = epilogue.biased(left, expert, col0, out.width)
        _write_chunk(left, buffers.index(0), out, row0, row_end, col0)
        right = epilogue.biased(right, expert, col0 + HALF, out.width)
        _write_chunk(right, buffers.index(1), out, row0, row_end, col0 + HALF)
    else:
        left0, left1 = halves(left)
        right0, right1 = halves(right)
        left0 = epilogue.biased(left0, expert, col0, out.width)
        _write_chunk(left0, buffers.index(0), out, row0, row_end, col0)
        left1 = epilogue.biased(left1, expert, col0 + CHUNK, out.width)
        _write_chunk(left1, buffers.index(1), out, row0, row_end, col0 + CHUNK)
        right0 = epilogue.biased(right0, expert, col0 + HALF, out.width)
        _write_chunk(right0, buffers.index(0), out, row0, row_end, col0 + HALF)
        right1 = epilogue.biased(right1, expert, col0 + HALF + CHUNK, out.width)
        _write_chunk(right1, buffers.index(1), out, row0, row_end, col0 + HALF + CHUNK)


@gluon.jit
def _write_chunk(values, buffer, out, row0, row_end, col0):
    """The same for values [rows, CHUNK]."""
    if col0 >= out.width:  # widths are multiples of CHUNK, so a chunk is inside or outside as a whole
        tma.store_wait(0)
    elif row0 + values.shape[0] <= row_end:
        write_chunk(values, buffer, out.descriptor, row0, col0)
    else:
        # A partial tile: its rows from row_end on belong to the next expert.
        tma.store_wait(0)
        put(values, buffer)
        out.store_masked(buffer, row0, row_end, col0)


@gluon.jit
def _write_gated(gate, up, buffers, epilogue, expert, row0, row_end, col0):
    """Store gate and up [rows, two chunks], with SAVE_Z, and their activation.

    Two chunks share a fence, and the activation is computed while the stores before are in flight.
    """
    z, out = epilogue.z, epilogue.out
    N = out.width
    gate0, gate1 = halves(gate)
    up0, up1 = halves(up)
    gate0 = epilogue.biased(gate0, expert, col0, 2 * N)
    gate1 = epilogue.biased(gate1, expert, col0 + CHUNK, 2 * N)
    if epilogue.SAVE_Z:
        _write_pair(gate0, gate1, buffers, z, row0, row_end, col0, N)
    up0 = epilogue.biased(up0, expert, N + col0, 2 * N)
    up1 = epilogue.biased(up1, expert, N + col0 + CHUNK, 2 * N)
    a0 = epilogue.activated(gate0, up0)
    if epilogue.SAVE_Z:
        _write_pair(up0, up1, buffers, z, row0, row_end, N + col0, 2 * N)
    a1 = epilogue.activated(gate1, up1)
    _write_pair(a0, a1, buffers, out, row0, row_end, col0, N)


@gluon.jit
def _write_ungated(sums, buffers, epilogue, expert, row0, row_end, col0):
    """Store sums [rows, two chunks] of experts without a gate, with SAVE_Z, and their activation."""
    N = epilogue.out.width
    left, right = halves(sums)
    left = epilogue.biased(left, expert, col0, N)
    right = epilogue.biased(right, expert, col0 + CHUNK, N)
    if epilogue.SAVE_Z:
        _write_pair(left, right, buffers, epilogue.z, row0, row_end, col0, N)
    a_left, a_right = epilogue.activated(left, 1.0), epilogue.activated(right, 1.0)
    _write_pair(a_left, a_right, buffers, epilogue.out, row0, row_end, col0, N)


@gluon.jit
def _write_interleaved(left, right, buffers, epilogue, expert, row0, row_end, col0):
    """Store neighbouring blocks of pairs of gate and up columns, with SAVE_Z, and their activation."""
    z, N = epilogue.z, epilogue.out.width
    left = epilogue.biased(left, expert, 2 * col0, 2 * N)
    if epilogue.SAVE_Z:
        z0, z1 = halves(left)
        _write_pair(z0, z1, buffers, z, row0, row_end, 2 * col0, 2 * N)
    gate, up = pairs(left)
    a0 = epilogue.activated(gate, up)
    right = epilogue.biased(right, expert, 2 * (col0 + CHUNK), 2 * N)
    if epilogue.SAVE_Z:
        z2, z3 = halves(right)
        _write_pair(z2, z3, buffers, z, row0, row_end, 2 * (col0 + CHUNK), 2 * N)
    gate, up = pairs(right)
    a1 = epilogue.activated(gate, up)
    tma.store_wait(0)
    buffers.index(0).store(a0)
    buffers.index(1).store(a1)
    _send_pair(buffers, epilogue.out, row0, row_end, col0, N)


@gluon.jit
def _write_pair(left, right, buffers, out, row0, row_end, col0, col_end):
    """Store two neighbouring chunks to (row0, col0) of ``out``; only rows < row_end and columns < col_end."""
    tma.store_wait(0)
    put(left, buffers.index(0))
    put(right, buffers.index(1))
    _send_pair(buffers, out, row0, row_end, col0, col_end)


@gluon.jit
def _send_pair(buffers, out, row0, row_end, col0, col_end):
    """The same for what is in ``buffers``."""
    if col0 < col_end:
        two = col0 + CHUNK < col_end
        if row0 + buffers.shape[1] <= row_end:
            fence_async_shared()
            tma_store(out.descriptor, [row0, col0], buffers.index(0))
            if two:
                tma_store(out.descriptor, [row0, col0 + CHUNK], buffers.index(1))
        else:
            out.store_masked(buffers.index(0), row0, row_end, col0)
            if two:
                out.store_masked(buffers.index(1), row0, row_end, col0 + CHUNK)


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


#: Weights of at most this many bytes may stay in L2. An estimate, not a measurement.
CACHED_BYTES = 64 * 2**20
#: On an H100, reading 128 bytes of each weight row is slow if the row stride is a multiple of this many bytes.
_SLOW_STRIDE = 2048


def k_blocks_per_wait(kernel: str, plan: RoutingPlan, weight: torch.Tensor) -> int:
    """Empty stages that the producer of ``kernel`` waits for before it loads: 2 where that is faster, else 1.

    2 helps where weights are always read from device memory. A k block is 128 bytes of each row, and loads of
    neighbouring 128-byte pieces are faster if they are issued together. Waiting for two stages costs a few percent.
    Measured (benchmarks/results/h*00-log-9-epilogues.json): faster at 256 rows an expert for dgrad on both GPUs, for
    up and down on H100, and slower from 1024 rows on; nothing was measured between.
    """
    if _forced.choice is not None:
        return _forced.choice
    if plan.rows_per_expert >= FEW_ROWS or weight.numel() * weight.element_size() <= CACHED_BYTES:
        return 1
    slow = not has_fast_memory(weight.device) and weight.shape[2] * weight.element_size() % _SLOW_STRIDE == 0
    return 2 if kernel == "dgrad" or slow else 1


_forced: Override[int] = Override()
#: Within ``use_k_blocks_per_wait(number)`` it is ``number``: for checks and tests.
use_k_blocks_per_wait = _forced.use


#: Ranks of low-rank parts.
RANKS = (16, 32, 64, 128)


def weight_arguments(
    weight: Weight, columns: int, untransposed: bool, unused: torch.Tensor
) -> tuple[list[Descriptor | torch.Tensor], dict[str, object]]:
    """(w, low, factor) of a kernel whose loads have ``columns`` columns of the product, and what it is told of them.

    untransposed: rows are multiplied with the weight itself, as in dgrad, not with its transpose.
    """
    if isinstance(weight.matrix, BlockFp8):
        side, w_is_kn, w = SIDE, untransposed, dequantizing.codes_argument(weight.matrix, untransposed)
    else:
        assert isinstance(weight.matrix, torch.Tensor)  # blocks() has dequantised it
        stored_by_rows, by_columns = stored(weight.matrix)
        side, w_is_kn = 0, untransposed != by_columns
        w = matrix(stored_by_rows, *((BLOCK_K, columns) if w_is_kn else (columns, BLOCK_K)))
    low, factor, rank = low_rank_blocks(weight, columns, untransposed, unused)
    return [w, low, factor], {"W_IS_KN": w_is_kn, "LOW_IS_KN": untransposed, "RANK": rank, "SIDE": side}


def low_rank_blocks(
    weight: Weight, columns: int, untransposed: bool, unused: torch.Tensor
) -> tuple[Descriptor | torch.Tensor, Descriptor | torch.Tensor, int]:
    """(low, factor, RANK) of the same kernels: ``unused`` and 0 without a low-rank part."""
    low, factor, rank = low_rank_arguments(weight, unused)
    if rank == 0:
        return low, factor, 0
    low_k = min(rank, BLOCK_K)
    narrow = block_layout(low_k)
    outer = matrix(factor, low_k, columns) if untransposed else matrix(factor, columns, low_k, layout=narrow)
    return matrix(low, BLOCK_M, low_k, layout=narrow), outer, rank


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
