"""Steps 5 and 8 on Hopper: weight gradients, dW[e] = left[rows of e]^T right[rows of e].

Here the k blocks are blocks of an expert's rows. Whole blocks are loaded by TMA. The last, partial block is loaded by
cp.async with zero fill past the expert's last row, so that rows of the next expert (or its NaNs) never enter the sum.
Experts without rows get exact zeros. ``left`` may be tokens that are not in expert order (TOP_K): then all of its
blocks are gathered by cp.async.
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
from moe_kernels.kernels.hopper.gluon_names import cp_async, tma_load
from moe_kernels.kernels.hopper.ring import (
    BLOCK_K,
    BLOCK_M,
    CHUNK,
    COOPERATIVE,
    halves,
    matrix,
    new_ring,
    write_chunk,
)
from moe_kernels.kernels.launch.launch import launch
from moe_kernels.kernels.triton.tile import swizzled_tile
from moe_kernels.routing import RoutingPlan, TokenRows


@gluon.constexpr_function
def _layout(columns):
    """Layout of a [rows, columns] block over the producer's 128 threads: 16 bytes per thread and copy."""
    return gl.BlockedLayout([1, 8], [256 // columns, columns // 8], [4, 1], [1, 0])


@gluon.jit
def _copy_rows(buffer, base, sources, row0, row_end, col0, width):
    """cp.async rows ``sources`` (BLOCK_K,) of a (., width) tensor, from column col0 on, into ``buffer``.

    Zero fill for columns past the width, and for those of the sorted rows row0, row0 + 1, ... that are >= row_end.
    """
    layout: gl.constexpr = _layout(buffer.shape[1])
    rows = row0 + gl.arange(0, buffer.shape[0], gl.SliceLayout(1, layout))
    cols = col0 + gl.arange(0, buffer.shape[1], gl.SliceLayout(0, layout))
    pointers = base + sources.to(gl.int64)[:, None] * width + cols[None, :]
    cp_async(buffer, pointers, mask=(rows < row_end)[:, None] & (cols < width)[None, :])


@gluon.jit
def _sources(row_slot_ptr, row0, row_end, COLS: gl.constexpr, BLOCK_K: gl.constexpr, TOP_K: gl.constexpr):
    """Which rows to load for the sorted rows from row0 on: the same ones, or with TOP_K their tokens."""
    rows = row0 + gl.arange(0, BLOCK_K, gl.SliceLayout(1, _layout(COLS)))
    if TOP_K > 0:
        rows = gl.load(row_slot_ptr + rows, mask=rows < row_end, other=0) // TOP_K
    return rows


@gluon.jit
def _first_tile(tiles):
    """(first tile of this program, stride to its second, ``_place`` of the first).

    A tile's time grows with its expert's rows. Tiles are sorted by falling row count and dealt to the programs in
    snake order, so that the program with the longest tile of a round gets the shortest of the next: program p of P
    takes tiles p, 2P - 1 - p, 2P + p, 4P - 1 - p, ...
    """
    tile = gl.program_id(0)
    return tile, 2 * (gl.num_programs(0) - 1 - tile) + 1, _place(tile, tiles)


@gluon.jit
def _next_tile(tile, stride, tiles):
    """The same for this program's next tile. Call it early: ``_place`` is two dependent loads."""
    tile += stride
    return tile, 2 * gl.num_programs(0) - stride, _place(tile, tiles)


@gluon.jit
def _place(tile, tiles):
    """(expert, its first row, end of its rows) of a tile; past the last tile, those of the last expert."""
    expert_start_ptr, expert_order_ptr, experts, per_expert = tiles
    expert = gl.load(expert_order_ptr + gl.minimum(tile // per_expert, experts - 1))
    return expert, gl.load(expert_start_ptr + expert), gl.load(expert_start_ptr + expert + 1)


@gluon.jit
def _producer(
    left,
    right,
    left_ptr,
    right_ptr,
    row_slot_ptr,
    tiles,
    ring,
    sizes,
    TOP_K: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    GROUP_M: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The producer warps: load the k blocks of every tile of this program into the ring."""
    a_ring, b_ring, ready, empty = ring
    num_m, num_n, M, N = sizes
    _, _, experts, per_expert = tiles
    step = 0
    tile, stride, place = _first_tile(tiles)
    while tile < experts * per_expert:
        m, n = swizzled_tile(tile % per_expert, num_m, num_n, GROUP_M)
        _expert, start, end = place
        tile, stride, place = _next_tile(tile, stride, tiles)
        following = _sources(row_slot_ptr, start, end, BLOCK_M, BLOCK_K, TOP_K)
        for row in range(start, end, BLOCK_K):
            sources = following
            following = _sources(row_slot_ptr, row + BLOCK_K, end, BLOCK_M, BLOCK_K, TOP_K)  # prefetched
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            a = a_ring.index(stage)
            b = b_ring.index(stage)
            bar = ready.index(stage)
            whole = row + BLOCK_K <= end
            if whole:
                mbarrier.expect(bar, (BLOCK_N if TOP_K > 0 else BLOCK_M + BLOCK_N) * BLOCK_K * 2)
                tma_load(right, [row, n * BLOCK_N], bar, b)
            else:
                rows = _sources(row_slot_ptr, row, end, BLOCK_N, BLOCK_K, 0)
                _copy_rows(b, right_ptr, rows, row, end, n * BLOCK_N, N)
                mbarrier.arrive(bar, count=1)
            if TOP_K == 0 and whole:
                tma_load(left, [row, m * BLOCK_M], bar, a)
                mbarrier.arrive(bar, count=128)
            else:
                _copy_rows(a, left_ptr, sources, row, end, m * BLOCK_M, M)
                async_copy.mbarrier_arrive(bar, increment_count=False)
            step += 1


@gluon.jit
def _consumer(
    WARPGROUP: gl.constexpr,
    buffers,
    out,
    tiles,
    ring,
    sizes,
    GATHER: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    GROUP_M: gl.constexpr,
    STAGES: gl.constexpr,
):
    """A consumer warpgroup: multiply the k blocks in the ring, then store its half of the tile."""
    a_ring, b_ring, ready, empty = ring
    num_m, num_n, M, _ = sizes
    _, _, experts, per_expert = tiles
    ROWS: gl.constexpr = BLOCK_M // 2
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    step = 0
    tile, stride, place = _first_tile(tiles)
    while tile < experts * per_expert:
        m, n = swizzled_tile(tile % per_expert, num_m, num_n, GROUP_M)
        expert, start, end = place
        tile, stride, place = _next_tile(tile, stride, tiles)
        acc = gl.zeros((ROWS, BLOCK_N), gl.float32, acc_layout)
        for row in range(start, end, BLOCK_K):
            stage = step % STAGES
            mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
            if GATHER or row + BLOCK_K > end:
                fence_async_shared()  # make cp.async writes visible to wgmma's async proxy
            a = a_ring.index(stage).slice(WARPGROUP * ROWS, ROWS, dim=1)
            acc = warpgroup_mma(a.permute((1, 0)), b_ring.index(stage), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            if row > start:
                mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)
            step += 1
        acc = warpgroup_mma_wait(0, deps=(acc,))
        if start < end:
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)
        m0 = m * BLOCK_M + WARPGROUP * ROWS
        if m0 < M:  # M is a multiple of ROWS
            left, right = halves(acc)
            _write(left, buffers, out, expert * M + m0, n * BLOCK_N)
            _write(right, buffers, out, expert * M + m0, n * BLOCK_N + BLOCK_N // 2)
    tma.store_wait(0)


@gluon.jit
def _write(values, buffers, out, row, col):
    """Store values [ROWS, 128] to (row, col) of ``out``; TMA drops columns outside."""
    left, right = halves(values)
    write_chunk(left, buffers.index(0), out, row, col)
    write_chunk(right, buffers.index(1), out, row, col + CHUNK)


@gluon.jit
def hopper_wgrad_kernel(
    left,  # (R, M): descriptor; any pointer with TOP_K
    right,  # (R, N): descriptor
    left_ptr,  # the same tensors by pointer, for the partial block of rows; with TOP_K left is (R / TOP_K, M)
    right_ptr,
    out,  # (E * M, N): descriptor
    row_slot_ptr,  # read with TOP_K
    expert_start_ptr,
    expert_order_ptr,
    E,
    M,
    N,
    TOP_K: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    GROUP_M: gl.constexpr,
    STAGES: gl.constexpr,
):
    dtype: gl.constexpr = left_ptr.dtype.element_ty
    swizzled: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    ROWS: gl.constexpr = BLOCK_M // 2
    a_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_K, BLOCK_M], swizzled)
    b_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_K, BLOCK_N], swizzled)
    buffers0 = gl.allocate_shared_memory(dtype, [2, ROWS, CHUNK], swizzled)
    buffers1 = gl.allocate_shared_memory(dtype, [2, ROWS, CHUNK], swizzled)
    # A stage is ready when the bytes of its TMA loads and the cp.async of all 128 threads have arrived.
    ready, empty = new_ring(STAGES, 129, 2)
    num_m = (M + BLOCK_M - 1) // BLOCK_M
    num_n = (N + BLOCK_N - 1) // BLOCK_N
    ring = (a_ring, b_ring, ready, empty)
    tiles = (expert_start_ptr, expert_order_ptr, E, num_m * num_n)
    sizes = (num_m, num_n, M, N)
    gl.warp_specialize(
        [
            (
                _consumer,
                (
                    0,
                    buffers0,
                    out,
                    tiles,
                    ring,
                    sizes,
                    TOP_K > 0,
                    BLOCK_M,
                    BLOCK_N,
                    BLOCK_K,
                    GROUP_M,
                    STAGES,
                ),
            ),
            (
                _consumer,
                (
                    1,
                    buffers1,
                    out,
                    tiles,
                    ring,
                    sizes,
                    TOP_K > 0,
                    BLOCK_M,
                    BLOCK_N,
                    BLOCK_K,
                    GROUP_M,
                    STAGES,
                ),
            ),
            (
                _producer,
                (
                    left,
                    right,
                    left_ptr,
                    right_ptr,
                    row_slot_ptr,
                    tiles,
                    ring,
                    sizes,
                    TOP_K,
                    BLOCK_M,
                    BLOCK_N,
                    BLOCK_K,
                    GROUP_M,
                    STAGES,
                ),
            ),
        ],
        [4, 4],
        [208, 96],
    )


def wgrad(left: torch.Tensor | TokenRows, right: torch.Tensor, plan: RoutingPlan) -> torch.Tensor:
    """left (R, M) and right (R, N), sorted by expert -> (E, M, N). ``left`` may be the tokens of its rows instead."""
    tokens, top_k = left if isinstance(left, TokenRows) else (left, 0)
    m, n = tokens.shape[1], right.shape[1]
    out = right.new_empty(plan.experts, m, n)
    tiles = plan.experts * cdiv(m, BLOCK_M) * cdiv(n, COOPERATIVE.block_n)
    constants = COOPERATIVE.constants()
    del constants["COOPERATIVE"]
    launch(
        hopper_wgrad_kernel,
        (min(tiles, multiprocessors(out.device)),),
        (
            tokens if top_k else matrix(tokens, BLOCK_K, BLOCK_M),
            matrix(right, BLOCK_K, COOPERATIVE.block_n),
            tokens,
            right,
            matrix(out, COOPERATIVE.rows, CHUNK.value),
            plan.row_slot,
            plan.expert_start,
            plan.expert_order,
            plan.experts,
            m,
            n,
        ),
        {"TOP_K": top_k, **constants, "num_warps": 4},
    )
    return out
