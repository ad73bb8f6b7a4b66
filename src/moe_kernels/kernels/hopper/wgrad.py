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
    await_turn,
    halves,
    matrix,
    new_ring,
    pass_turn,
    schedule_of,
    write_chunk,
)
from moe_kernels.kernels.triton.launch import cdiv, launch, multiprocessors
from moe_kernels.kernels.triton.tile import swizzled_tile
from moe_kernels.routing import RoutingPlan


@gluon.jit
def _copy_rows(buffer, base, row0, row_end, col0, width):
    """Rows [row0, row0 + BLOCK_K) of a (R, width) tensor at column col0 into ``buffer``; zeros outside."""
    COLS: gl.constexpr = buffer.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // COLS, COLS // 8], [4, 1], [1, 0])
    rows = row0 + gl.arange(0, buffer.shape[0], gl.SliceLayout(1, layout))
    cols = col0 + gl.arange(0, COLS, gl.SliceLayout(0, layout))
    pointers = base + rows.to(gl.int64)[:, None] * width + cols[None, :]
    async_copy.async_copy_global_to_shared(buffer, pointers, mask=(rows < row_end)[:, None] & (cols < width)[None, :])


@gluon.jit
def _load(
    left,
    right,
    left_ptr,
    right_ptr,
    expert_start_ptr,
    ring,
    sizes,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    GROUP_M: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The loading warps: fill the ring, stage after stage, tile after tile."""
    a_ring, b_ring, ready, empty = ring
    E, num_m, num_n, M, N = sizes
    step = 0
    for pid in range(gl.program_id(0), E * num_m * num_n, gl.num_programs(0)):
        expert = pid // (num_m * num_n)
        m, n = swizzled_tile(pid % (num_m * num_n), num_m, num_n, GROUP_M)
        start = gl.load(expert_start_ptr + expert)
        end = gl.load(expert_start_ptr + expert + 1)
        for row in range(start, end, BLOCK_K):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            a = a_ring.index(stage)
            b = b_ring.index(stage)
            bar = ready.index(stage)
            if row + BLOCK_K <= end:
                mbarrier.expect(bar, (BLOCK_M + BLOCK_N) * BLOCK_K * 2)
                tma.async_copy_global_to_shared(left, [row, m * BLOCK_M], bar, a)
                tma.async_copy_global_to_shared(right, [row, n * BLOCK_N], bar, b)
                mbarrier.arrive(bar, count=128)
            else:
                _copy_rows(a, left_ptr, row, end, m * BLOCK_M, M)
                _copy_rows(b, right_ptr, row, end, n * BLOCK_N, N)
                async_copy.mbarrier_arrive(bar, increment_count=False)
                mbarrier.arrive(bar, count=1)
            step += 1


@gluon.jit
def _multiply(
    WARPGROUP: gl.constexpr,
    buffers,
    out,
    expert_start_ptr,
    ring,
    turns,
    sizes,
    COOPERATIVE: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    GROUP_M: gl.constexpr,
    STAGES: gl.constexpr,
):
    """One of the two multiplying groups of warps: consume the ring, write the tile."""
    a_ring, b_ring, ready, empty = ring
    E, num_m, num_n, M, _ = sizes
    ROWS: gl.constexpr = BLOCK_M // 2 if COOPERATIVE else BLOCK_M
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    step = 0
    turn = 0
    for pid in range(gl.program_id(0), E * num_m * num_n, gl.num_programs(0)):
        expert = pid // (num_m * num_n)
        start = gl.load(expert_start_ptr + expert)
        end = gl.load(expert_start_ptr + expert + 1)
        if COOPERATIVE or turn % 2 == WARPGROUP:
            m, n = swizzled_tile(pid % (num_m * num_n), num_m, num_n, GROUP_M)
            acc = gl.zeros((ROWS, BLOCK_N), gl.float32, acc_layout)
            if not COOPERATIVE:
                await_turn(turns, WARPGROUP, turn // 2)
            for row in range(start, end, BLOCK_K):
                stage = step % STAGES
                mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
                if row + BLOCK_K > end:
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
    left_ptr,  # the same tensors by pointer, for the partial block of rows
    right_ptr,
    out,  # (E * M, N): descriptor
    expert_start_ptr,
    E,
    M,
    N,
    COOPERATIVE: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    GROUP_M: gl.constexpr,
    STAGES: gl.constexpr,
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
    ring = (a_ring, b_ring, ready, empty)
    sizes = (E, num_m, num_n, M, N)
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    0,
                    buffers0,
                    out,
                    expert_start_ptr,
                    ring,
                    turns,
                    sizes,
                    COOPERATIVE,
                    BLOCK_M,
                    BLOCK_N,
                    BLOCK_K,
                    GROUP_M,
                    STAGES,
                ),
            ),
            (
                _multiply,
                (
                    1,
                    buffers1,
                    out,
                    expert_start_ptr,
                    ring,
                    turns,
                    sizes,
                    COOPERATIVE,
                    BLOCK_M,
                    BLOCK_N,
                    BLOCK_K,
                    GROUP_M,
                    STAGES,
                ),
            ),
            (
                _load,
                (
                    left,
                    right,
                    left_ptr,
                    right_ptr,
                    expert_start_ptr,
                    ring,
                    sizes,
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


def wgrad(left: torch.Tensor, right: torch.Tensor, plan: RoutingPlan) -> torch.Tensor:
    """left (R, M) and right (R, N), sorted by expert -> (E, M, N)."""
    m, n = left.shape[1], right.shape[1]
    out = left.new_empty(plan.experts, m, n)
    schedule = schedule_of("wgrad" if m % BLOCK_M == 0 else "wgrad, odd", out.device)
    tiles = plan.experts * cdiv(m, BLOCK_M) * cdiv(n, schedule.block_n)
    launch(
        hopper_wgrad_kernel,
        (min(tiles, multiprocessors(out.device)),),
        (
            matrix(left, BLOCK_K, BLOCK_M),
            matrix(right, BLOCK_K, schedule.block_n),
            left,
            right,
            matrix(out, schedule.rows, CHUNK.value),
            plan.expert_start,
            plan.experts,
            m,
            n,
        ),
        {**schedule.constants(), "num_warps": 4},
    )
    return out
