"""Steps 1, 2, 4 and 6 on Hopper: warp-specialised, persistent grouped GEMMs.

The same math and the same row tiles as ``kernels/triton/up.py`` and ``grouped_gemm.py``. Rows of X are gathered by
cp.async; everything else is loaded and stored by TMA.
"""

import contextlib
from collections.abc import Iterator

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
from moe_kernels.kernels.hopper.gluon_names import cp_async, tma_load, tma_store
from moe_kernels.kernels.hopper.ring import (
    BLOCK_K,
    BLOCK_M,
    CHUNK,
    Schedule,
    await_turn,
    halves,
    has_fast_memory,
    matrix,
    new_ring,
    new_turns,
    pass_turn,
    put,
    schedule_of,
    store_masked,
    write_chunk,
)
from moe_kernels.kernels.launch.launch import launch
from moe_kernels.kernels.operands import Descriptor
from moe_kernels.kernels.tiles import config
from moe_kernels.kernels.triton.tile import swizzled_tile
from moe_kernels.routing import RoutingPlan


@gluon.jit
def tile_rows(tiles, m, BLOCK_M: gl.constexpr, FULL: gl.constexpr):
    """(expert, first row, end of the expert's rows) of row tile m.

    FULL: if the expert's last tile would be partial, move its start back until it is full, so that it needs no masked
    stores. The rows that it then shares with the tile before are computed twice, with bitwise equal results.
    """
    expert_start_ptr, tile_expert_ptr, tile_row_ptr, _, _ = tiles
    expert = gl.load(tile_expert_ptr + m)
    row0 = gl.load(tile_row_ptr + m)
    row_end = gl.load(expert_start_ptr + expert + 1)
    if FULL:
        row0 = gl.maximum(gl.minimum(row0, row_end - BLOCK_M), gl.load(expert_start_ptr + expert))
    return expert, row0, row_end


@gluon.jit
def _fill(
    rows_in,
    pointers,
    w,
    ring,
    stage,
    expert,
    row0,
    n,
    k0,
    sizes,
    GATED: gl.constexpr,
    GATHER: gl.constexpr,
    W_IS_KN: gl.constexpr,
):
    """Issue the loads of the k block at k0 into one stage of the ring."""
    a_ring, b_ring, ready, _ = ring
    K, N = sizes
    a = a_ring.index(stage)
    b = b_ring.index(stage)
    bar = ready.index(stage)
    mbarrier.expect(bar, b.numel * 2 if GATHER else (a.numel + b.numel) * 2)
    if GATED:
        HALF: gl.constexpr = b.shape[0] // 2
        gate_row = expert * N * 2 + n * HALF
        tma_load(w, [gate_row, k0], bar, b.slice(0, HALF))
        tma_load(w, [gate_row + N, k0], bar, b.slice(HALF, HALF))
    elif W_IS_KN:
        tma_load(w, [expert * K + k0, n * b.shape[1]], bar, b)
    else:
        tma_load(w, [expert * N + n * b.shape[0], k0], bar, b)
    if GATHER:
        cp_async(a, pointers + k0)
        async_copy.mbarrier_arrive(bar, increment_count=False)
    else:
        tma_load(rows_in, [row0, k0], bar, a)


@gluon.jit
def producer(
    rows_in,
    rows_ptr,
    w,
    row_slot_ptr,
    tiles,
    ring,
    sizes,
    TOP_K: gl.constexpr,
    GATED: gl.constexpr,
    GATHER: gl.constexpr,
    W_IS_KN: gl.constexpr,
    K_BLOCKS_PER_WAIT: gl.constexpr,
    FULL: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_K: gl.constexpr,
    GROUP_M: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The producer warps: load the k blocks of every tile of this program into the ring.

    K_BLOCKS_PER_WAIT: wait for this many empty stages, 1 or 2, then load them back to back; see
    ``k_blocks_per_wait``.
    """
    _, _, _, num_m, num_n = tiles
    _, _, _, empty = ring
    K, _ = sizes
    gathered: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    step = 0
    for pid in range(gl.program_id(0), num_m * num_n, gl.num_programs(0)):
        m, n = swizzled_tile(pid, num_m, num_n, GROUP_M)
        expert, row0, row_end = tile_rows(tiles, m, BLOCK_M, FULL)
        if GATHER:
            rows = row0 + gl.arange(0, BLOCK_M, gl.SliceLayout(1, gathered))
            # Rows past the expert's end read slot 0: a valid token, whose result is not stored.
            slot = gl.load(row_slot_ptr + rows, mask=rows < row_end, other=0)
            cols = gl.arange(0, BLOCK_K, gl.SliceLayout(0, gathered))
            pointers = rows_ptr + (slot // TOP_K).to(gl.int64)[:, None] * K + cols[None, :]
        else:
            pointers = rows_ptr
        for k0 in range(0, K, K_BLOCKS_PER_WAIT * BLOCK_K):
            mbarrier.wait(empty.index(step % STAGES), ((step // STAGES) & 1) ^ 1)
            if K_BLOCKS_PER_WAIT == 2:
                k1 = k0 + BLOCK_K
                if k1 < K:
                    mbarrier.wait(empty.index((step + 1) % STAGES), (((step + 1) // STAGES) & 1) ^ 1)
            stage = step % STAGES
            _fill(rows_in, pointers, w, ring, stage, expert, row0, n, k0, sizes, GATED, GATHER, W_IS_KN)
            step += 1
            if K_BLOCKS_PER_WAIT == 2:
                stage = step % STAGES
                if k1 < K:
                    _fill(rows_in, pointers, w, ring, stage, expert, row0, n, k1, sizes, GATED, GATHER, W_IS_KN)
                    step += 1


@gluon.jit
def _consumer(
    WARPGROUP: gl.constexpr,
    buffers,
    tensors,
    tiles,
    ring,
    turns,
    sizes,
    ACTIVATION: gl.constexpr,
    P0: gl.constexpr,
    P1: gl.constexpr,
    GATED: gl.constexpr,
    GATHER: gl.constexpr,
    SAVE_Z: gl.constexpr,
    W_IS_KN: gl.constexpr,
    COOPERATIVE: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    GROUP_M: gl.constexpr,
    STAGES: gl.constexpr,
):
    """A consumer warpgroup: multiply the k blocks in the ring, then run the epilogue of the tile."""
    z, z_ptr, out, out_ptr = tensors
    _, _, _, num_m, num_n = tiles
    a_ring, b_ring, ready, empty = ring
    K, N = sizes
    ROWS: gl.constexpr = BLOCK_M // 2 if COOPERATIVE else BLOCK_M
    HALF: gl.constexpr = BLOCK_N // 2
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    step = 0
    turn = 0
    for pid in range(gl.program_id(0), num_m * num_n, gl.num_programs(0)):
        if COOPERATIVE or turn % 2 == WARPGROUP:
            m, n = swizzled_tile(pid, num_m, num_n, GROUP_M)
            _expert, row0, row_end = tile_rows(tiles, m, BLOCK_M, COOPERATIVE)
            acc = gl.zeros((ROWS, BLOCK_N), gl.float32, acc_layout)
            if not COOPERATIVE:
                await_turn(turns, WARPGROUP, turn // 2)
            for k0 in range(0, K, BLOCK_K):
                stage = step % STAGES
                mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
                if GATHER:
                    fence_async_shared()  # make cp.async writes visible to wgmma's async proxy
                a = a_ring.index(stage)
                if COOPERATIVE:
                    a = a.slice(WARPGROUP * ROWS, ROWS)
                b = b_ring.index(stage)
                if not W_IS_KN:
                    b = b.permute((1, 0))
                acc = warpgroup_mma(a, b, acc, is_async=True)
                acc = warpgroup_mma_wait(1, deps=(acc,))
                if k0 > 0:
                    mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)
                step += 1
            acc = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)
            if not COOPERATIVE:
                pass_turn(turns, WARPGROUP)
            if COOPERATIVE:
                row0 += WARPGROUP * ROWS
            left, right = halves(acc)
            if GATED:
                # Two chunks share a fence, and the activation is computed while the stores before are in flight.
                gate0, gate1 = halves(left)
                up0, up1 = halves(right)
                if SAVE_Z:
                    _write_pair(gate0, gate1, buffers, z, z_ptr, row0, row_end, n * HALF, N, 2 * N)
                a0 = value(gate0, up0, ACTIVATION, P0, P1).to(out.dtype)
                if SAVE_Z:
                    _write_pair(up0, up1, buffers, z, z_ptr, row0, row_end, N + n * HALF, 2 * N, 2 * N)
                a1 = value(gate1, up1, ACTIVATION, P0, P1).to(out.dtype)
                _write_pair(a0, a1, buffers, out, out_ptr, row0, row_end, n * HALF, N, N)
            else:
                tma.store_wait(0)  # the stores of the tile before are done: both buffers are free
                if COOPERATIVE:
                    left0, left1 = halves(left)
                    right0, right1 = halves(right)
                    _write(left0, buffers.index(0), out, out_ptr, row0, row_end, n * BLOCK_N, N)
                    _write(left1, buffers.index(1), out, out_ptr, row0, row_end, n * BLOCK_N + CHUNK, N)
                    _write(right0, buffers.index(0), out, out_ptr, row0, row_end, n * BLOCK_N + HALF, N)
                    _write(right1, buffers.index(1), out, out_ptr, row0, row_end, n * BLOCK_N + HALF + CHUNK, N)
                else:
                    _write(left, buffers.index(0), out, out_ptr, row0, row_end, n * BLOCK_N, N)
                    _write(right, buffers.index(1), out, out_ptr, row0, row_end, n * BLOCK_N + HALF, N)
        else:
            step += (K + BLOCK_K - 1) // BLOCK_K
        turn += 1  # noqa: SIM113 (Gluon has no enumerate)
    tma.store_wait(0)


@gluon.jit
def _write(values, buffer, out, out_ptr, row0, row_end, col0, width):
    """Store values [rows, CHUNK] to (row0, col0) of a (., width) tensor; only rows < row_end and columns < width."""
    if col0 >= width:  # widths are multiples of CHUNK, so a chunk is inside or outside as a whole
        tma.store_wait(0)
    elif row0 + values.shape[0] <= row_end:
        write_chunk(values, buffer, out, row0, col0)
    else:
        # A partial tile: its rows from row_end on belong to the next expert.
        tma.store_wait(0)
        put(values, buffer)
        store_masked(buffer, out_ptr, row0, row_end, col0, width)


@gluon.jit
def _write_pair(left, right, buffers, out, out_ptr, row0, row_end, col0, col_end, width):
    """The same for two neighbouring chunks; columns < col_end."""
    tma.store_wait(0)
    put(left, buffers.index(0))
    put(right, buffers.index(1))
    if col0 < col_end:
        two = col0 + CHUNK < col_end
        if row0 + left.shape[0] <= row_end:
            fence_async_shared()
            tma_store(out, [row0, col0], buffers.index(0))
            if two:
                tma_store(out, [row0, col0 + CHUNK], buffers.index(1))
        else:
            store_masked(buffers.index(0), out_ptr, row0, row_end, col0, width)
            if two:
                store_masked(buffers.index(1), out_ptr, row0, row_end, col0 + CHUNK, width)


@gluon.jit
def hopper_gemm_kernel(
    rows_in,  # (R, K): descriptor; any pointer if GATHER
    rows_ptr,  # (T, K): read if GATHER
    w,  # (E * N, K), (E * 2N, K) if GATED, or (E * K, N) if W_IS_KN: descriptor
    z,  # (R, 2N): descriptor, written if SAVE_Z
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
    TOP_K: gl.constexpr,
    ACTIVATION: gl.constexpr,
    P0: gl.constexpr,
    P1: gl.constexpr,
    GATED: gl.constexpr,
    GATHER: gl.constexpr,
    SAVE_Z: gl.constexpr,
    W_IS_KN: gl.constexpr,
    K_BLOCKS_PER_WAIT: gl.constexpr,
    COOPERATIVE: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    GROUP_M: gl.constexpr,
    STAGES: gl.constexpr,
):
    gl.static_assert(COOPERATIVE or not GATED, "the epilogue of gated tiles is cooperative only")
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    swizzled: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    ROWS: gl.constexpr = BLOCK_M // 2 if COOPERATIVE else BLOCK_M
    a_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_K], swizzled)
    if W_IS_KN:
        b_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_K, BLOCK_N], swizzled)
    else:
        b_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_K], swizzled)
    buffers0 = gl.allocate_shared_memory(dtype, [2, ROWS, CHUNK], swizzled)
    buffers1 = gl.allocate_shared_memory(dtype, [2, ROWS, CHUNK], swizzled)
    # A stage is ready when the bytes of its TMA loads and, with GATHER, the cp.async of all 128 threads have arrived.
    ready, empty = new_ring(STAGES, 1 + (128 if GATHER else 0), 2 if COOPERATIVE else 1)
    turns = empty if COOPERATIVE else new_turns()  # not used if cooperative
    num_m = gl.load(tile_count_ptr)
    COLUMNS: gl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    num_n = (N + COLUMNS - 1) // COLUMNS
    tensors = (z, z_ptr, out, out_ptr)
    tiles = (expert_start_ptr, tile_expert_ptr, tile_row_ptr, num_m, num_n)
    ring = (a_ring, b_ring, ready, empty)
    # Registers per thread, whose sum over the three warpgroups is at most 512. A gathering producer needs four warps
    # and registers for pointers; to issue TMA loads one warp is enough.
    gl.warp_specialize(
        [
            (
                _consumer,
                (
                    0,
                    buffers0,
                    tensors,
                    tiles,
                    ring,
                    turns,
                    (K, N),
                    ACTIVATION,
                    P0,
                    P1,
                    GATED,
                    GATHER,
                    SAVE_Z,
                    W_IS_KN,
                    COOPERATIVE,
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
                    tensors,
                    tiles,
                    ring,
                    turns,
                    (K, N),
                    ACTIVATION,
                    P0,
                    P1,
                    GATED,
                    GATHER,
                    SAVE_Z,
                    W_IS_KN,
                    COOPERATIVE,
                    BLOCK_M,
                    BLOCK_N,
                    BLOCK_K,
                    GROUP_M,
                    STAGES,
                ),
            ),
            (
                producer,
                (
                    rows_in,
                    rows_ptr,
                    w,
                    row_slot_ptr,
                    tiles,
                    ring,
                    (K, N),
                    TOP_K,
                    GATED,
                    GATHER,
                    W_IS_KN,
                    K_BLOCKS_PER_WAIT,
                    COOPERATIVE,
                    BLOCK_M,
                    BLOCK_K,
                    GROUP_M,
                    STAGES,
                ),
            ),
        ],
        [4, 4 if GATHER else 1],
        [216 if GATHER else 232, 72 if GATHER else 40],
    )


#: Experts of fewer rows are bound by reading their weights. Two k blocks per wait were faster at 256 rows and slower
#: from 1024 on; nothing was measured between.
_ROWS_PER_EXPERT = 512
#: Weights of at most this many bytes may stay in L2. An estimate, not a measurement.
_CACHED_BYTES = 64 * 2**20
#: On an H100, reading 128 bytes of each weight row is slow if the row stride is a multiple of this many bytes.
_SLOW_STRIDE = 2048


def k_blocks_per_wait(kernel: str, plan: RoutingPlan, weight: torch.Tensor) -> int:
    """Empty stages that the producer of ``kernel`` waits for before it loads: 2 where that is faster, else 1.

    2 helps where weights are always read from device memory. A k block is 128 bytes of each row, and loads of
    neighbouring 128-byte pieces are faster if they are issued together. Waiting for two stages costs a few percent.
    Measured (benchmarks/results/h*00-log-9-epilogues.json): faster for dgrad on both GPUs, for up and down on H100.
    """
    if _forced:
        return _forced["all"]
    few_rows = plan.rows < _ROWS_PER_EXPERT * plan.experts
    if not few_rows or weight.numel() * weight.element_size() <= _CACHED_BYTES:
        return 1
    slow = not has_fast_memory(weight.device) and weight.shape[2] * weight.element_size() % _SLOW_STRIDE == 0
    return 2 if kernel == "dgrad" or slow else 1


_forced: dict[str, int] = {}


@contextlib.contextmanager
def use_k_blocks_per_wait(number: int) -> Iterator[None]:
    """Within this context :func:`k_blocks_per_wait` is ``number``: for checks and tests."""
    with config.override(_forced, "all", number):
        yield


_IDENTITY = {"ACTIVATION": "identity", "P0": 0.0, "P1": 0.0, "GATED": False, "GATHER": False, "SAVE_Z": False}


def up(
    x: torch.Tensor, weight: torch.Tensor, plan: RoutingPlan, gate: Gate, save_z: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """x (T, H), weight (E, 2I, H) rows [gate; up] -> Z (R, 2I), empty unless save_z, and A (R, I)."""
    width = weight.shape[1] // 2
    z = x.new_empty(plan.rows, 2 * width) if save_z else x.new_empty(0)
    a = x.new_empty(plan.rows, width)
    schedule = schedule_of("up", x.shape[1], x.device)
    columns = schedule.block_n // 2
    constants = {**gate.constants(), "GATHER": True, "SAVE_Z": save_z, "W_IS_KN": False}
    constants["K_BLOCKS_PER_WAIT"] = k_blocks_per_wait("up", plan, weight)
    del constants["INTERLEAVED"]
    saved = z if save_z else a
    z_arguments = matrix(saved, schedule.rows, CHUNK.value), saved
    _launch(x, x, matrix(weight, columns, BLOCK_K), z_arguments, a, plan, schedule, columns, constants)
    return z, a


def down(a: torch.Tensor, weight: torch.Tensor, plan: RoutingPlan) -> torch.Tensor:
    """Y = A W2[e]^T: a (R, I), weight (E, H, I) -> (R, H)."""
    return _rows_times_weight("down", a, weight, plan)


def dgrad(rows: torch.Tensor, weight: torch.Tensor, plan: RoutingPlan) -> torch.Tensor:
    """rows @ weight[e]: dA0 from dOs (R, H) and W2 (E, H, I), or dXr from dZ (R, 2I) and W1 (E, 2I, H)."""
    return _rows_times_weight("dgrad", rows, weight, plan)


def _rows_times_weight(kernel: str, rows: torch.Tensor, weight: torch.Tensor, plan: RoutingPlan) -> torch.Tensor:
    w_is_kn = kernel == "dgrad"
    out = rows.new_empty(plan.rows, weight.shape[2 if w_is_kn else 1])
    schedule = schedule_of(kernel, rows.shape[1], rows.device)
    columns = schedule.block_n
    w = matrix(weight, *((BLOCK_K, columns) if w_is_kn else (columns, BLOCK_K)))
    constants = {**_IDENTITY, "W_IS_KN": w_is_kn, "K_BLOCKS_PER_WAIT": k_blocks_per_wait(kernel, plan, weight)}
    _launch(matrix(rows, BLOCK_M, BLOCK_K), rows, w, (out, out), out, plan, schedule, columns, constants)
    return out


def _launch(
    rows_in: torch.Tensor | Descriptor,
    rows: torch.Tensor,
    weight: Descriptor,
    z: tuple[torch.Tensor | Descriptor, torch.Tensor],
    out: torch.Tensor,
    plan: RoutingPlan,
    schedule: Schedule,
    columns: int,
    constants: dict[str, object],
) -> None:
    """Launch over the plan's row tiles times blocks of ``columns`` columns of out (R, N); z is ignored if unused."""
    width = out.shape[1]
    tiles = plan.max_tiles * cdiv(width, columns)
    if tiles == 0:
        return
    launch(
        hopper_gemm_kernel,
        (min(tiles, multiprocessors(out.device)),),
        (
            rows_in,
            rows,
            weight,
            *z,
            matrix(out, schedule.rows, CHUNK.value),
            out,
            plan.row_slot,
            plan.expert_start,
            plan.tile_expert,
            plan.tile_row,
            plan.tile_count,
            rows.shape[1],
            width,
        ),
        {"TOP_K": plan.top_k, **constants, **schedule.constants(), "num_warps": 4},
    )
