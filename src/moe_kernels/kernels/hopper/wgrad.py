"""Steps 5 and 8 on Hopper: weight gradients, dW[e] = left[rows of e]^T right[rows of e].

Here the k blocks are blocks of an expert's rows. Whole blocks are loaded by TMA. The last, partial block is loaded by
cp.async with zero fill past the expert's last row, so that rows of the next expert (or its NaNs) never enter the sum.
Experts without rows get exact zeros. One operand may be tokens that are not in expert order: then all of its blocks
are gathered by cp.async. It has the narrow side of a tile of 128 by 256, so that the producer keeps up.
"""

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

from moe_kernels.kernels.device import cdiv, multiprocessors
from moe_kernels.kernels.hopper.gluon_names import aggregate, cp_async, tma_load
from moe_kernels.kernels.hopper.ring import (
    BLOCK_K,
    BLOCK_M,
    CHUNK,
    COOPERATIVE,
    SWIZZLED,
    Matrix,
    accumulator_layout,
    copy_layout,
    halves,
    matrix,
    new_ring,
    row_halves,
    write_chunk,
)
from moe_kernels.kernels.launch.launch import launch
from moe_kernels.kernels.triton.tile import swizzled_tile
from moe_kernels.layer import Rows
from moe_kernels.routing import RoutingPlan, TokenRows

WIDE = COOPERATIVE.block_n  # the longer side of a tile; a gathered operand has the shorter one, BLOCK_M
_STORED = gl.constexpr(64)  # rows that a consumer stores at a time; M is a multiple of it


@gluon.jit
def _copy_rows(buffer, matrix, sources, row0, row_end, col0):
    """cp.async rows ``sources`` (BLOCK_K,) of ``matrix``, from column col0 on, into ``buffer``.

    Zero fill for columns past the width, and for those of the sorted rows row0, row0 + 1, ... that are >= row_end.
    """
    layout: gl.constexpr = copy_layout(buffer.shape[1])
    rows = row0 + gl.arange(0, buffer.shape[0], gl.SliceLayout(1, layout))
    cols = col0 + gl.arange(0, buffer.shape[1], gl.SliceLayout(0, layout))
    pointers = matrix.pointer + sources.to(gl.int64)[:, None] * matrix.width + cols[None, :]
    cp_async(buffer, pointers, mask=(rows < row_end)[:, None] & (cols < matrix.width)[None, :])


@gluon.jit
def _sources(row_slot_ptr, row0, row_end, COLS: gl.constexpr, BLOCK_K: gl.constexpr, TOP_K: gl.constexpr):
    """Which rows to load for the sorted rows from row0 on: the same ones, or with TOP_K their tokens."""
    rows = row0 + gl.arange(0, BLOCK_K, gl.SliceLayout(1, copy_layout(COLS)))
    if TOP_K > 0:
        rows = gl.load(row_slot_ptr + rows, mask=rows < row_end, other=0) // TOP_K
    return rows


@aggregate
class Tile:
    """A tile of one expert's gradient: the sum over the rows start to end."""

    number: gl.tensor
    stride: gl.tensor  # to the number of this program's next tile
    expert: gl.tensor
    start: gl.tensor
    end: gl.tensor


@aggregate
class Tiles:
    """The tiles of all experts' gradients, ``per_expert`` of each: num_m blocks of rows times num_n of columns.

    A tile's time grows with its expert's rows. Tiles are sorted by falling row count and dealt to the programs in
    snake order, so that the program with the longest tile of a round gets the shortest of the next: program p of P
    takes tiles p, 2P - 1 - p, 2P + p, 4P - 1 - p, ...
    """

    expert_start: gl.tensor
    expert_order: gl.tensor
    experts: gl.tensor
    per_expert: gl.tensor
    num_m: gl.tensor
    num_n: gl.tensor
    GROUP_M: gl.constexpr

    @gluon.jit
    def count(self):
        """How many there are."""
        return self.experts * self.per_expert

    @gluon.jit
    def first(self):
        """This program's first tile."""
        number = gl.program_id(0)
        return self._at(number, 2 * (gl.num_programs(0) - 1 - number) + 1)

    @gluon.jit
    def after(self, tile):
        """This program's next tile. Call it early: that is two dependent loads."""
        return self._at(tile.number + tile.stride, 2 * gl.num_programs(0) - tile.stride)

    @gluon.jit
    def _at(self, number, stride):
        """Tile ``number``; past the last one, a tile of the last expert."""
        expert = gl.load(self.expert_order + gl.minimum(number // self.per_expert, self.experts - 1))
        start, end = gl.load(self.expert_start + expert), gl.load(self.expert_start + expert + 1)
        return Tile(number=number, stride=stride, expert=expert, start=start, end=end)

    @gluon.jit
    def blocks(self, tile):
        """(m, n): the blocks of rows and columns of a tile."""
        return swizzled_tile(tile.number % self.per_expert, self.num_m, self.num_n, self.GROUP_M)


@gluon.jit
def _producer(left, right, row_slot_ptr, tiles, ring, LEFT_TOP_K: gl.constexpr, RIGHT_TOP_K: gl.constexpr):
    """The producer warps: load the k blocks of every tile of this program into the ring."""
    BLOCK_K: gl.constexpr = ring.a.shape[1]
    BLOCK_M: gl.constexpr = ring.a.shape[2]
    BLOCK_N: gl.constexpr = ring.b.shape[2]
    TOP_K: gl.constexpr = LEFT_TOP_K + RIGHT_TOP_K  # one of them is 0
    GATHERED: gl.constexpr = BLOCK_N if RIGHT_TOP_K > 0 else BLOCK_M
    LOADED: gl.constexpr = BLOCK_M + BLOCK_N - (GATHERED if TOP_K > 0 else 0)  # columns by TMA
    step = 0
    next_tile = tiles.first()
    while next_tile.number < tiles.count():
        tile = next_tile
        m, n = tiles.blocks(tile)
        next_tile = tiles.after(tile)
        end = tile.end
        following = _sources(row_slot_ptr, tile.start, end, GATHERED, BLOCK_K, TOP_K)
        for row in range(tile.start, end, BLOCK_K):
            sources = following
            following = _sources(row_slot_ptr, row + BLOCK_K, end, GATHERED, BLOCK_K, TOP_K)  # prefetched
            ring.await_empty(step)
            a, b, ready = ring.stage(step)
            whole = row + BLOCK_K <= end
            if whole:
                mbarrier.expect(ready, LOADED * BLOCK_K * 2)
                if RIGHT_TOP_K == 0:
                    tma_load(right.descriptor, [row, n * BLOCK_N], ready, b)
                if LEFT_TOP_K == 0:
                    tma_load(left.descriptor, [row, m * BLOCK_M], ready, a)
            else:
                if RIGHT_TOP_K == 0:
                    rows = _sources(row_slot_ptr, row, end, BLOCK_N, BLOCK_K, 0)
                    _copy_rows(b, right, rows, row, end, n * BLOCK_N)
                if LEFT_TOP_K == 0:
                    rows = _sources(row_slot_ptr, row, end, BLOCK_M, BLOCK_K, 0)
                    _copy_rows(a, left, rows, row, end, m * BLOCK_M)
                mbarrier.arrive(ready, count=1)
            if LEFT_TOP_K > 0:
                _copy_rows(a, left, sources, row, end, m * BLOCK_M)
            elif RIGHT_TOP_K > 0:
                _copy_rows(b, right, sources, row, end, n * BLOCK_N)
            if TOP_K == 0 and whole:
                mbarrier.arrive(ready, count=128)
            else:
                async_copy.mbarrier_arrive(ready, increment_count=False)
            step += 1


@gluon.jit
def _consumer(WARPGROUP: gl.constexpr, buffers, out, M, tiles, ring, GATHER: gl.constexpr):
    """A consumer warpgroup: multiply the k blocks in the ring, then store its half of the tile's rows."""
    BLOCK_K: gl.constexpr = ring.a.shape[1]
    BLOCK_M: gl.constexpr = ring.a.shape[2]
    BLOCK_N: gl.constexpr = ring.b.shape[2]
    ROWS: gl.constexpr = BLOCK_M // 2
    step = 0
    next_tile = tiles.first()
    while next_tile.number < tiles.count():
        tile = next_tile
        m, n = tiles.blocks(tile)
        next_tile = tiles.after(tile)
        acc = gl.zeros((ROWS, BLOCK_N), gl.float32, accumulator_layout(BLOCK_N))
        for row in range(tile.start, tile.end, BLOCK_K):
            ring.await_ready(step)
            if GATHER or row + BLOCK_K > tile.end:
                fence_async_shared()  # make cp.async writes visible to wgmma's async proxy
            a, b, _ready = ring.stage(step)
            a = a.slice(WARPGROUP * ROWS, ROWS, dim=1)
            acc = warpgroup_mma(a.permute((1, 0)), b, acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            if row > tile.start:
                ring.free_before(step)
            step += 1
        acc = warpgroup_mma_wait(0, deps=(acc,))
        if tile.start < tile.end:
            ring.free_before(step)
        m0 = m * BLOCK_M + WARPGROUP * ROWS
        if m0 < M:
            row0 = tile.expert * M + m0
            if ROWS == _STORED:
                left, right = halves(acc)
                _write(left, buffers, out, row0, n * BLOCK_N)
                _write(right, buffers, out, row0, n * BLOCK_N + BLOCK_N // 2)
            else:
                upper, lower = row_halves(acc)
                _write(upper, buffers, out, row0, n * BLOCK_N)
                if m0 + _STORED < M:
                    _write(lower, buffers, out, row0 + _STORED, n * BLOCK_N)
    tma.store_wait(0)


@gluon.jit
def _write(values, buffers, out, row, col):
    """Store values [_STORED, 128] to (row, col) of ``out``; TMA drops columns outside."""
    left, right = halves(values)
    write_chunk(left, buffers.index(0), out, row, col)
    write_chunk(right, buffers.index(1), out, row, col + CHUNK)


@gluon.jit
def hopper_wgrad_kernel(
    left,  # (R, M): descriptor; any pointer with LEFT_TOP_K
    right,  # (R, N): descriptor; any pointer with RIGHT_TOP_K
    left_ptr,  # the same tensors by pointer, for the partial block of rows; with LEFT_TOP_K (R / LEFT_TOP_K, M)
    right_ptr,  # with RIGHT_TOP_K (R / RIGHT_TOP_K, N)
    out,  # (E * M, N): descriptor
    row_slot_ptr,  # read with either TOP_K
    expert_start_ptr,
    expert_order_ptr,
    E,
    M,
    N,
    LEFT_TOP_K: gl.constexpr,
    RIGHT_TOP_K: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    GROUP_M: gl.constexpr,
    STAGES: gl.constexpr,
):
    gl.static_assert(LEFT_TOP_K == 0 or RIGHT_TOP_K == 0, "one operand is gathered")
    GATHER: gl.constexpr = LEFT_TOP_K + RIGHT_TOP_K > 0
    dtype: gl.constexpr = left_ptr.dtype.element_ty
    # A stage is ready when the bytes of its TMA loads and the cp.async of all 128 threads have arrived.
    ring = new_ring(dtype, STAGES, (BLOCK_K, BLOCK_M), (BLOCK_K, BLOCK_N), 129, 2)
    buffers0 = gl.allocate_shared_memory(dtype, [2, _STORED, CHUNK], SWIZZLED)
    buffers1 = gl.allocate_shared_memory(dtype, [2, _STORED, CHUNK], SWIZZLED)
    num_m = (M + BLOCK_M - 1) // BLOCK_M
    num_n = (N + BLOCK_N - 1) // BLOCK_N
    tiles = Tiles(
        expert_start=expert_start_ptr, expert_order=expert_order_ptr, experts=E, per_expert=num_m * num_n,
        num_m=num_m, num_n=num_n, GROUP_M=GROUP_M,
    )  # fmt: skip
    left_matrix = Matrix(descriptor=left, pointer=left_ptr, width=M)
    right_matrix = Matrix(descriptor=right, pointer=right_ptr, width=N)
    gl.warp_specialize(
        [
            (_consumer, (0, buffers0, out, M, tiles, ring, GATHER)),
            (_consumer, (1, buffers1, out, M, tiles, ring, GATHER)),
            (_producer, (left_matrix, right_matrix, row_slot_ptr, tiles, ring, LEFT_TOP_K, RIGHT_TOP_K)),
        ],
        [4, 4],
        [208, 96],
    )


def wgrad(left: Rows, right: Rows, plan: RoutingPlan) -> torch.Tensor:
    """left (R, M) and right (R, N), sorted by expert -> (E, M, N). One may be the tokens of its rows instead."""
    left, left_top_k = (left.tokens, left.top_k) if isinstance(left, TokenRows) else (left, 0)
    right, right_top_k = (right.tokens, right.top_k) if isinstance(right, TokenRows) else (right, 0)
    m, n = left.shape[1], right.shape[1]
    out = right.new_empty(plan.experts, m, n)
    constants = COOPERATIVE.constants()
    del constants["COOPERATIVE"]
    block_m, block_n = (WIDE, BLOCK_M) if right_top_k else (BLOCK_M, WIDE)
    tiles = plan.experts * cdiv(m, block_m) * cdiv(n, block_n)
    launch(
        hopper_wgrad_kernel,
        (min(tiles, multiprocessors(out.device)),),
        (
            left if left_top_k else matrix(left, BLOCK_K, block_m),
            right if right_top_k else matrix(right, BLOCK_K, block_n),
            left,
            right,
            matrix(out, _STORED.value, CHUNK.value),
            plan.row_slot,
            plan.expert_start,
            plan.expert_order,
            plan.experts,
            m,
            n,
        ),
        {
            **constants,
            "LEFT_TOP_K": left_top_k,
            "RIGHT_TOP_K": right_top_k,
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "num_warps": 4,
        },
    )
    return out
