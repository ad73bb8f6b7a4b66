"""Step 4 on Hopper: dA0 = dOs W2[e] with the backward of the activation in its epilogue.

Rows of dO are loaded by TMA from a sorted copy, or (GATHER) from their tokens by cp.async. dA0 stays in registers,
in float32. Z is loaded by TMA while wgmma runs; the epilogue overwrites it with dZ in shared memory and also writes
wA. The routing weight's gradient <dA0, A> is summed per column block, and a second launch adds these partial sums: a
fixed order, no atomics. The consumer warpgroups ping-pong, so one's epilogue overlaps the other's wgmma.
"""

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from moe_kernels.activation import Gate, value_and_partials
from moe_kernels.kernels.device import cdiv, multiprocessors
from moe_kernels.kernels.hopper.gemm import producer
from moe_kernels.kernels.hopper.gluon_names import tma_load, tma_store
from moe_kernels.kernels.hopper.ring import (
    BLOCK_K,
    BLOCK_M,
    Schedule,
    await_turn,
    halves,
    matrix,
    new_ring,
    new_turns,
    pass_turn,
    put,
    store_masked,
)
from moe_kernels.kernels.launch.launch import launch
from moe_kernels.kernels.triton.tile import swizzled_tile
from moe_kernels.routing import RoutingPlan, TokenRows

COLUMNS = gl.constexpr(32)  # per step of the epilogue: more would spill, because the accumulator stays in registers


@gluon.jit
def _fetch_z(z, buffers, z_arrived, SET: gl.constexpr, row0, col0, I):
    """Issue the TMA loads of the gate and up columns of Z at (row0, col0) into one set of buffers."""
    arrived = z_arrived.index(SET)
    mbarrier.expect(arrived, 2 * z.block_type.nbytes)
    tma_load(z, [row0, col0], arrived, buffers.index(3 * SET))
    tma_load(z, [row0, I + col0], arrived, buffers.index(3 * SET + 1))


@gluon.jit
def _finish(
    da,
    weight,
    buffers,
    z_arrived,
    SET: gl.constexpr,
    z_phase,
    fetch,
    tensors,
    row0,
    row_end,
    col0,
    I,
    ACTIVATION: gl.constexpr,
    P0: gl.constexpr,
    P1: gl.constexpr,
):
    """One step of the epilogue: dZ and wA of COLUMNS columns from dA0 (registers) and Z (buffers of SET).

    Returns <dA0, A> of each row over these columns. If ``fetch``, also waits for the other set's stores and issues
    the load of the next columns of Z into it.
    """
    z, dz, dz_ptr, wa, wa_ptr = tensors
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    mbarrier.wait(z_arrived.index(SET), z_phase)
    da = gl.convert_layout(da, layout, assert_trivial=True)
    gate = buffers.index(3 * SET).load(layout).to(gl.float32)
    up = buffers.index(3 * SET + 1).load(layout).to(gl.float32)
    a, d_gate, d_up = value_and_partials(gate, up, ACTIVATION, P0, P1)
    dw = gl.sum(da * a, axis=1)
    da *= weight[:, None]
    if fetch:
        tma.store_wait(0)
        _fetch_z(z, buffers, z_arrived, 1 - SET, row0, col0 + COLUMNS, I)
    put(da * d_gate, buffers.index(3 * SET))
    put(da * d_up, buffers.index(3 * SET + 1))
    put(weight[:, None] * a, buffers.index(3 * SET + 2))
    if row0 + da.shape[0] <= row_end:
        fence_async_shared()
        tma_store(dz, [row0, col0], buffers.index(3 * SET))
        tma_store(dz, [row0, I + col0], buffers.index(3 * SET + 1))
        tma_store(wa, [row0, col0], buffers.index(3 * SET + 2))
    else:
        store_masked(buffers.index(3 * SET), dz_ptr, row0, row_end, col0, 2 * I)
        store_masked(buffers.index(3 * SET + 1), dz_ptr, row0, row_end, I + col0, 2 * I)
        store_masked(buffers.index(3 * SET + 2), wa_ptr, row0, row_end, col0, I)
    return dw


@gluon.jit
def _consumer(
    WARPGROUP: gl.constexpr,
    buffers,
    z_arrived,
    tensors,
    dw_ptr,
    topk_weights_ptr,
    row_slot_ptr,
    tiles,
    ring,
    turns,
    sizes,
    GATHER: gl.constexpr,
    ACTIVATION: gl.constexpr,
    P0: gl.constexpr,
    P1: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    GROUP_M: gl.constexpr,
    STAGES: gl.constexpr,
):
    """A consumer warpgroup: multiply and finish every other tile (ping-pong)."""
    z, _, _, _, _ = tensors
    expert_start_ptr, tile_expert_ptr, tile_row_ptr, num_m, num_n = tiles
    a_ring, b_ring, ready, empty = ring
    H, I, R = sizes
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16]))
    steps_per_tile = (H + BLOCK_K - 1) // BLOCK_K
    step = WARPGROUP * steps_per_tile
    z_phase = 0
    turn = 0
    first = gl.program_id(0) + WARPGROUP * gl.num_programs(0)
    for pid in range(first, num_m * num_n, 2 * gl.num_programs(0)):
        m, n = swizzled_tile(pid, num_m, num_n, GROUP_M)
        expert = gl.load(tile_expert_ptr + m)
        row0 = gl.load(tile_row_ptr + m)
        row_end = gl.load(expert_start_ptr + expert + 1)
        col0 = n * BLOCK_N
        tma.store_wait(0)  # the stores of the tile before are done: the buffers are free
        _fetch_z(z, buffers, z_arrived, 0, row0, col0, I)
        _fetch_z(z, buffers, z_arrived, 1, row0, col0 + COLUMNS, I)
        rows = row0 + gl.arange(0, BLOCK_M, row_layout)
        row_mask = rows < row_end
        slot = gl.load(row_slot_ptr + rows, mask=row_mask, other=0)
        weight = gl.load(topk_weights_ptr + slot, mask=row_mask, other=0.0).to(gl.float32)
        acc = gl.zeros((BLOCK_M, BLOCK_N), gl.float32, acc_layout)
        await_turn(turns, WARPGROUP, turn)
        for k0 in range(0, H, BLOCK_K):
            stage = step % STAGES
            mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
            if GATHER:
                fence_async_shared()  # make cp.async writes visible to wgmma's async proxy
            acc = warpgroup_mma(a_ring.index(stage), b_ring.index(stage), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            if k0 > 0:
                mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)
            step += 1
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)
        pass_turn(turns, WARPGROUP)
        step += steps_per_tile  # skip the other consumer's tile
        turn += 1  # noqa: SIM113 (Gluon has no enumerate)
        left, right = halves(acc)
        da0, da1 = halves(left)
        da2, da3 = halves(right)
        more = col0 + 2 * COLUMNS < I  # I is a multiple of 64
        dw = _finish(
            da0, weight, buffers, z_arrived, 0, z_phase, False, tensors, row0, row_end, col0, I, ACTIVATION, P0, P1
        )
        col0 += COLUMNS
        dw += _finish(
            da1, weight, buffers, z_arrived, 1, z_phase, more, tensors, row0, row_end, col0, I, ACTIVATION, P0, P1
        )
        z_phase ^= 1
        if more:
            col0 += COLUMNS
            dw += _finish(
                da2, weight, buffers, z_arrived, 0, z_phase, True, tensors, row0, row_end, col0, I, ACTIVATION, P0, P1
            )
            col0 += COLUMNS
            dw += _finish(
                da3,
                weight,
                buffers,
                z_arrived,
                1,
                z_phase,
                False,
                tensors,
                row0,
                row_end,
                col0,
                I,
                ACTIVATION,
                P0,
                P1,
            )
            z_phase ^= 1
        gl.store(dw_ptr + n.to(gl.int64) * R + rows, dw, mask=row_mask)
    tma.store_wait(0)


@gluon.jit
def hopper_down_grad_kernel(
    dout_rows,  # (R, H): descriptor; any pointer with TOP_K
    dout_ptr,  # (R / TOP_K, H): read with TOP_K
    w,  # (E * H, I): descriptor
    z,  # (R, 2I): descriptor
    dz,  # (R, 2I): descriptor, may share the memory of z
    dz_ptr,
    wa,  # (R, I): descriptor
    wa_ptr,
    dw_ptr,  # (column blocks, R) float32
    topk_weights_ptr,  # (T * K,)
    row_slot_ptr,
    expert_start_ptr,
    tile_expert_ptr,
    tile_row_ptr,
    tile_count_ptr,
    H,
    I,
    R,
    TOP_K: gl.constexpr,
    ACTIVATION: gl.constexpr,
    P0: gl.constexpr,
    P1: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    GROUP_M: gl.constexpr,
    STAGES: gl.constexpr,
):
    dtype: gl.constexpr = wa_ptr.dtype.element_ty
    GATHER: gl.constexpr = TOP_K > 0
    swizzled: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    a_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_K], swizzled)
    b_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_K, BLOCK_N], swizzled)
    narrow: gl.constexpr = gl.NVMMASharedLayout(64, 16, 2)
    # Each consumer has two sets of three buffers: gate, up and wA.
    buffers0 = gl.allocate_shared_memory(dtype, [6, BLOCK_M, COLUMNS], narrow)
    buffers1 = gl.allocate_shared_memory(dtype, [6, BLOCK_M, COLUMNS], narrow)
    z_arrived0 = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    z_arrived1 = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(z_arrived0.index(i), count=1)
        mbarrier.init(z_arrived1.index(i), count=1)
    ready, empty = new_ring(STAGES, 1 + (128 if GATHER else 0), 1)
    turns = new_turns()
    num_m = gl.load(tile_count_ptr)
    num_n = (I + BLOCK_N - 1) // BLOCK_N
    tensors = (z, dz, dz_ptr, wa, wa_ptr)
    tiles = (expert_start_ptr, tile_expert_ptr, tile_row_ptr, num_m, num_n)
    ring = (a_ring, b_ring, ready, empty)
    gl.warp_specialize(
        [
            (
                _consumer,
                (
                    0,
                    buffers0,
                    z_arrived0,
                    tensors,
                    dw_ptr,
                    topk_weights_ptr,
                    row_slot_ptr,
                    tiles,
                    ring,
                    turns,
                    (H, I, R),
                    GATHER,
                    ACTIVATION,
                    P0,
                    P1,
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
                    z_arrived1,
                    tensors,
                    dw_ptr,
                    topk_weights_ptr,
                    row_slot_ptr,
                    tiles,
                    ring,
                    turns,
                    (H, I, R),
                    GATHER,
                    ACTIVATION,
                    P0,
                    P1,
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
                    dout_rows,
                    dout_ptr,
                    w,
                    row_slot_ptr,
                    tiles,
                    ring,
                    (H, I),
                    TOP_K,
                    False,
                    GATHER,
                    True,
                    1,
                    False,  # dZ may overwrite Z, so no row may be computed twice
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


@triton.jit
def sum_weight_grad_kernel(
    parts_ptr,  # (column blocks, R) float32
    row_slot_ptr,  # (R,)
    routed_ptr,  # expert_start[E]: rows at or after it belong to dropped slots
    dw_ptr,  # (T * K,)
    R,
    blocks,
    BLOCK_R: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    slot = tl.load(row_slot_ptr + rows, mask=rows < R, other=0)
    kept = rows < tl.load(routed_ptr)
    dw = tl.zeros((BLOCK_R,), tl.float32)
    part = parts_ptr + rows
    for _ in range(blocks):
        dw += tl.load(part, mask=kept, other=0.0)
        part += R
    tl.store(dw_ptr + slot, dw.to(dw_ptr.dtype.element_ty), mask=rows < R)


# The only schedule: ping-pong, with as many columns as leave registers for the epilogue.
SCHEDULE = Schedule(cooperative=False, block_n=128, stages=4)
_NARROW = gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=2)


def down_grad(
    dout_rows: torch.Tensor | TokenRows,
    weight: torch.Tensor,
    z: torch.Tensor,
    topk_weights: torch.Tensor,
    plan: RoutingPlan,
    gate: Gate,
    overwrite_z: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dZ (R, 2I), wA (R, I) and dw (T, K) from the output's gradient.

    Args:
        dout_rows: (R, H), sorted by expert, or unsorted tokens to gather its rows from.
        weight: (E, H, I).
        z: (R, 2I); overwritten with dZ if overwrite_z.
        topk_weights: (T, K).
        plan, gate: of the forward.
    """
    hidden, intermediate = weight.shape[1:]
    dz = z if overwrite_z else torch.empty_like(z)
    wa = z.new_empty(plan.rows, intermediate)
    dw = torch.empty_like(topk_weights)
    blocks = cdiv(intermediate, SCHEDULE.block_n)
    tiles = plan.max_tiles * blocks
    if tiles == 0:
        return dz, wa, dw
    parts = torch.empty((blocks, plan.rows), dtype=torch.float32, device=z.device)
    dout, top_k = dout_rows if isinstance(dout_rows, TokenRows) else (dout_rows, 0)
    constants = {"TOP_K": top_k, **SCHEDULE.constants()}
    activation = gate.constants()
    del constants["COOPERATIVE"], activation["GATED"], activation["INTERLEAVED"]
    launch(
        hopper_down_grad_kernel,
        (min(tiles, multiprocessors(z.device)),),
        (
            dout if top_k else matrix(dout, BLOCK_M, BLOCK_K),
            dout,
            matrix(weight, BLOCK_K, SCHEDULE.block_n),
            *(matrix(t, BLOCK_M, COLUMNS.value, layout=_NARROW) for t in (z, dz)),
            dz,
            matrix(wa, BLOCK_M, COLUMNS.value, layout=_NARROW),
            wa,
            parts,
            topk_weights,
            plan.row_slot,
            plan.expert_start,
            plan.tile_expert,
            plan.tile_row,
            plan.tile_count,
            hidden,
            intermediate,
            plan.rows,
        ),
        {
            **activation,
            **constants,
            "num_warps": 4,
        },
    )
    launch(
        sum_weight_grad_kernel,
        (cdiv(plan.rows, 1024),),
        (parts, plan.row_slot, plan.expert_start[plan.experts :], dw, plan.rows, blocks),
        {"BLOCK_R": 1024, "num_warps": 4},
    )
    return dz, wa, dw
