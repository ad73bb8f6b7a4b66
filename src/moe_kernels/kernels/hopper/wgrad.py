"""Steps 5 and 8 on Hopper: weight gradients, dW[e] = left[rows of e]^T right[rows of e].

Whole blocks of rows come by TMA. The last, partial block comes by asynchronous copies that fill with zeros after the
expert's last row, so that rows of the next expert (or its NaNs) never enter. Experts without rows get exact zeros.
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

from moe_kernels.kernels.hopper.ring import (
    BLOCK_K,
    BLOCK_M,
    CHUNK,
    Gathered,
    await_turn,
    halves,
    matrix,
    new_ring,
    pass_turn,
    schedule_of,
    tile_of,
    write_chunk,
)
from moe_kernels.kernels.triton.launch import cdiv, launch, multiprocessors
from moe_kernels.routing import RoutingPlan


@gluon.jit
def _copy_rows(buffer, base, row_slot_ptr, row0, row_end, col0, width, GATHERED: gl.constexpr, TOP_K: gl.constexpr):
    """Sorted rows [row0, row0 + BLOCK_K) at column col0 into ``buffer``; zeros outside.

    base is (R, width), or (T, width) if GATHERED.
    """
    COLS: gl.constexpr = buffer.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // COLS, COLS // 8], [4, 1], [1, 0])
    rows = row0 + gl.arange(0, buffer.shape[0], gl.SliceLayout(1, layout))
    cols = col0 + gl.arange(0, COLS, gl.SliceLayout(0, layout))
    inside = rows < row_end
    if GATHERED:
        rows = gl.load(row_slot_ptr + rows, mask=inside, other=0) // TOP_K
    pointers = base + rows.to(gl.int64)[:, None] * width + cols[None, :]
    async_copy.async_copy_global_to_shared(buffer, pointers, mask=inside[:, None] & (cols < width)[None, :])


@gluon.jit
def _load(
    left,
    right,
    left_ptr,
    right_ptr,
    row_slot_ptr,
    expert_start_ptr,
    a_ring,
    b_ring,
    ready,
    empty,
    E,
    num_m,
    num_n,
    M,
    N,
    LEFT_GATHERED: gl.constexpr,
    RIGHT_GATHERED: gl.constexpr,
    TOP_K: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    GROUP_M: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The loading warps: fill the ring, stage after stage, tile after tile."""
    step = 0
    for pid in range(gl.program_id(0), E * num_m * num_n, gl.num_programs(0)):
        expert = pid // (num_m * num_n)
        m, n = tile_of(pid % (num_m * num_n), num_m, num_n, GROUP_M)
        start = gl.load(expert_start_ptr + expert)
        end = gl.load(expert_start_ptr + expert + 1)
        for row in range(start, end, BLOCK_K):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            a = a_ring.index(stage)
            b = b_ring.index(stage)
            bar = ready.index(stage)
            whole = row + BLOCK_K <= end
            if whole:
                LEFT_BYTES: gl.constexpr = 0 if LEFT_GATHERED else BLOCK_M * BLOCK_K * 2
                RIGHT_BYTES: gl.constexpr = 0 if RIGHT_GATHERED else BLOCK_N * BLOCK_K * 2
                mbarrier.expect(bar, LEFT_BYTES + RIGHT_BYTES)
                if not LEFT_GATHERED:
                    tma.async_copy_global_to_shared(left, [row, m * BLOCK_M], bar, a)
                if not RIGHT_GATHERED:
                    tma.async_copy_global_to_shared(right, [row, n * BLOCK_N], bar, b)
            else:
                mbarrier.arrive(bar, count=1)
                if not LEFT_GATHERED:
                    _copy_rows(a, left_ptr, row_slot_ptr, row, end, m * BLOCK_M, M, False, TOP_K)
                if not RIGHT_GATHERED:
                    _copy_rows(b, right_ptr, row_slot_ptr, row, end, n * BLOCK_N, N, False, TOP_K)
            if LEFT_GATHERED:
                _copy_rows(a, left_ptr, row_slot_ptr, row, end, m * BLOCK_M, M, True, TOP_K)
            if RIGHT_GATHERED:
                _copy_rows(b, right_ptr, row_slot_ptr, row, end, n * BLOCK_N, N, True, TOP_K)
            async_copy.mbarrier_arrive(bar, increment_count=False)
            step += 1


@gluon.jit
def _multiply(
    WARPGROUP: gl.constexpr,
    out,
    expert_start_ptr,
    a_ring,
    b_ring,
    buffers,
    ready,
    empty,
    turns,
    E,
    num_m,
    num_n,
    M,
    N,
    COOPERATIVE: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    GROUP_M: gl.constexpr,
    STAGES: gl.constexpr,
    GATHERED: gl.constexpr,
):
    """One of the two multiplying groups of warps: consume the ring, write the tile."""
    ROWS: gl.constexpr = BLOCK_M // 2 if COOPERATIVE else BLOCK_M
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    step = 0
    turn = 0
    for pid in range(gl.program_id(0), E * num_m * num_n, gl.num_programs(0)):
        expert = pid // (num_m * num_n)
        start = gl.load(expert_start_ptr + expert)
        end = gl.load(expert_start_ptr + expert + 1)
        if COOPERATIVE or turn % 2 == WARPGROUP:
            m, n = tile_of(pid % (num_m * num_n), num_m, num_n, GROUP_M)
            acc = gl.zeros((ROWS, BLOCK_N), gl.float32, acc_layout)
            if not COOPERATIVE:
                await_turn(turns, WARPGROUP, turn // 2)
            for row in range(start, end, BLOCK_K):
                stage = step % STAGES
                mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
                if GATHERED or row + BLOCK_K > end:
                    fence_async_shared()  # wgmma is to see what ordinary copies wrote
                a = a_ring.index(stage)
                if COOPERATIVE:
                    a = a.slice(WARPGROUP * ROWS, ROWS, dim=1)
                acc = warpgroup_mma(a.permute((1, 0)), b_ring.index(stage), acc, is_async=True)
                acc = warpgroup_mma_wait(1, deps=(acc,))
                if row > start:
                    mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)
                step += 1
            acc = warpgroup_mma_wait(0, deps=(acc,))
            if start < end:
                mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)
            if not COOPERATIVE:
                pass_turn(turns, WARPGROUP)
            tma.store_wait(0)  # of the tile before: both buffers are free
            m0 = m * BLOCK_M
            if COOPERATIVE:
                m0 += WARPGROUP * ROWS
            if m0 < M:  # M is a multiple of ROWS
                left, right = halves(acc)
                _write(left, buffers, 0, out, expert * M + m0, n * BLOCK_N)
                _write(right, buffers, 1, out, expert * M + m0, n * BLOCK_N + BLOCK_N // 2)
        else:
            step += (end - start + BLOCK_K - 1) // BLOCK_K
        turn += 1  # noqa: SIM113 (Gluon has no enumerate)
    tma.store_wait(0)


@gluon.jit
def _write(values, buffers, FIRST: gl.constexpr, out, row, col):
    """Write values [ROWS, 64 or 128] at (row, col) of ``out``, a chunk of columns at a time."""
    if values.shape[1] == CHUNK:
        write_chunk(values, buffers.index(FIRST), out, row, col)
    else:
        left, right = halves(values)
        write_chunk(left, buffers.index(0), out, row, col)
        write_chunk(right, buffers.index(1), out, row, col + CHUNK)


@gluon.jit
def hopper_wgrad_kernel(
    left,  # (R, M): descriptor
    right,  # (R, N): descriptor
    left_ptr,  # the same tensors by pointer, for the partial block of rows; (T, M) if LEFT_GATHERED
    right_ptr,  # (T, N) if RIGHT_GATHERED
    out,  # (E * M, N): descriptor
    row_slot_ptr,
    expert_start_ptr,
    E,
    M,
    N,
    LEFT_GATHERED: gl.constexpr,
    RIGHT_GATHERED: gl.constexpr,
    TOP_K: gl.constexpr,
    COOPERATIVE: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    GROUP_M: gl.constexpr,
    STAGES: gl.constexpr,
    LOADER_REGISTERS: gl.constexpr,
    MULTIPLIER_REGISTERS: gl.constexpr,
):
    dtype: gl.constexpr = left_ptr.dtype.element_ty
    swizzled: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    ROWS: gl.constexpr = BLOCK_M // 2 if COOPERATIVE else BLOCK_M
    a_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_K, BLOCK_M], swizzled)
    b_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_K, BLOCK_N], swizzled)
    buffers0 = gl.allocate_shared_memory(dtype, [2, ROWS, CHUNK], swizzled)
    buffers1 = gl.allocate_shared_memory(dtype, [2, ROWS, CHUNK], swizzled)
    # A stage is ready when TMA has brought its bytes, or each loading thread's copies have landed.
    ready, empty, turns = new_ring(STAGES, 129, 2 if COOPERATIVE else 1)
    num_m = (M + BLOCK_M - 1) // BLOCK_M
    num_n = (N + BLOCK_N - 1) // BLOCK_N
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    0,
                    out,
                    expert_start_ptr,
                    a_ring,
                    b_ring,
                    buffers0,
                    ready,
                    empty,
                    turns,
                    E,
                    num_m,
                    num_n,
                    M,
                    N,
                    COOPERATIVE,
                    BLOCK_M,
                    BLOCK_N,
                    BLOCK_K,
                    GROUP_M,
                    STAGES,
                    LEFT_GATHERED or RIGHT_GATHERED,
                ),
            ),
            (
                _multiply,
                (
                    1,
                    out,
                    expert_start_ptr,
                    a_ring,
                    b_ring,
                    buffers1,
                    ready,
                    empty,
                    turns,
                    E,
                    num_m,
                    num_n,
                    M,
                    N,
                    COOPERATIVE,
                    BLOCK_M,
                    BLOCK_N,
                    BLOCK_K,
                    GROUP_M,
                    STAGES,
                    LEFT_GATHERED or RIGHT_GATHERED,
                ),
            ),
            (
                _load,
                (
                    left,
                    right,
                    left_ptr,
                    right_ptr,
                    row_slot_ptr,
                    expert_start_ptr,
                    a_ring,
                    b_ring,
                    ready,
                    empty,
                    E,
                    num_m,
                    num_n,
                    M,
                    N,
                    LEFT_GATHERED,
                    RIGHT_GATHERED,
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
        [MULTIPLIER_REGISTERS, LOADER_REGISTERS],
    )


def wgrad(left: torch.Tensor | Gathered, right: torch.Tensor | Gathered, plan: RoutingPlan) -> torch.Tensor:
    """left (R, M) and right (R, N), sorted by expert or gathered on the way -> (E, M, N)."""
    left_rows, right_rows = (t.source if isinstance(t, Gathered) else t for t in (left, right))
    gathered = [t for t in (left, right) if isinstance(t, Gathered)]
    m, n = left_rows.shape[1], right_rows.shape[1]
    out = left_rows.new_empty(plan.experts, m, n)
    schedule = schedule_of("wgrad")
    if m % schedule.rows:
        raise ValueError(
            f"{m} rows of a weight gradient are no multiple of {schedule.rows}: use a cooperative schedule"
        )
    tiles = plan.experts * cdiv(m, BLOCK_M) * cdiv(n, schedule.block_n)
    launch(
        hopper_wgrad_kernel,
        (min(tiles, multiprocessors(out.device)),),
        (
            left_rows if isinstance(left, Gathered) else matrix(left, BLOCK_K, BLOCK_M),
            right_rows if isinstance(right, Gathered) else matrix(right, BLOCK_K, schedule.block_n),
            left_rows,
            right_rows,
            matrix(out, schedule.rows, CHUNK.value),
            plan.row_slot,
            plan.expert_start,
            plan.experts,
            m,
            n,
        ),
        {
            "LEFT_GATHERED": isinstance(left, Gathered),
            "RIGHT_GATHERED": isinstance(right, Gathered),
            "TOP_K": gathered[0].plan.top_k if gathered else 1,
            **schedule.constants(),
            "LOADER_REGISTERS": 96,
            "MULTIPLIER_REGISTERS": 208,
            "num_warps": 4,
        },
    )
    return out
