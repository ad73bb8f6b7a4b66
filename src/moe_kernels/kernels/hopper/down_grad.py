"""Step 4 on Hopper: dA0 = dOs W2[e] with the backward of the activation in its epilogue.

Rows of dO are loaded by TMA from a sorted copy, or (GATHER) from their tokens by cp.async. dA0 stays in registers,
in float32. Z is loaded by TMA while wgmma runs; the epilogue overwrites it with dZ in shared memory and also writes
wA, if the gradient of the down weight or of its lora_a needs it. The routing weight's gradient <dA0, A> is summed per
column block, and a second launch adds these partial sums: a fixed order, no atomics. The consumer warpgroups
ping-pong, so one's epilogue overlaps the other's wgmma, or share wider tiles, which gather each row half as often.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
)

from moe_kernels.activation import Gate, value_and_partials
from moe_kernels.kernels.device import cdiv, multiprocessors
from moe_kernels.kernels.hopper import dequantizing
from moe_kernels.kernels.hopper.gluon_names import aggregate, tma_load, tma_store
from moe_kernels.kernels.hopper.mainloop import (
    CACHED_BYTES,
    Operands,
    complete,
    mainloop,
    producer,
    skipped,
    taken,
    weight_arguments,
)
from moe_kernels.kernels.hopper.ring import (
    BLOCK_K,
    BLOCK_M,
    FEW_ROWS,
    SWIZZLED,
    Matrix,
    RowTiles,
    Schedule,
    accumulator_layout,
    await_turn,
    block_layout,
    halves,
    matrix,
    new_ring,
    new_turns,
    pairs,
    pass_turn,
    put,
    row_halves,
    within_experts,
)
from moe_kernels.kernels.launch.launch import launch
from moe_kernels.kernels.triton.dequantize import blocks
from moe_kernels.layer import DownGrads, Weight
from moe_kernels.routing import RoutingPlan, TokenRows


@gluon.constexpr_function
def pairs_layout():
    """[128, 64] over a warpgroup, so that ``pairs`` of it are in the accumulator's layout of 32 columns."""
    registers = [[0, 1], [0, 2], [8, 0], [0, 16], [0, 32], [64, 0]]
    lanes = [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0], [32, 0]], [], [128, 64])


@aggregate
class Epilogue:
    """The epilogue: dZ and wA from dA0 in registers and Z, which TMA loads into shared memory.

    It takes a tile in four steps of a quarter each; more at a time would spill, because dA0 stays in registers. A
    step has 64 columns, whose rows are 128 bytes: TMA takes as long for rows of 64 bytes, and these loads and stores
    compete with those of the mainloop. Interleaved, 64 columns of Z are 32 of dA0.

    Each consumer has two sets of buffers: a step's Z, which dZ overwrites (gate and up apart, or in one if they are
    interleaved; without a gate the second is not used), and its wA (WRITE_WA). Cooperative ones, whose stages are
    larger, have one buffer of wA for both.
    """

    z: tma.tensor_descriptor
    dz: Matrix
    wa: Matrix
    z_buffers: gl.shared_memory_descriptor  # [8, 64, 64], two for each of four sets, or interleaved [4, 128, 64]
    a_buffers: gl.shared_memory_descriptor  # [4, 64, 64], or 2 of them, or [4, 128, 32]; any unless WRITE_WA
    z_arrived: gl.shared_memory_descriptor  # [4, 1]: the mbarriers of the sets
    ROWS: gl.constexpr  # of a step
    COLUMNS: gl.constexpr
    ACTIVATION: gl.constexpr
    P0: gl.constexpr
    P1: gl.constexpr
    GATED: gl.constexpr
    INTERLEAVED: gl.constexpr
    WRITE_WA: gl.constexpr
    COOPERATIVE: gl.constexpr

    @gluon.jit
    def fetch_z(self, SET: gl.constexpr, row0, col0):
        """Issue the TMA loads of the gate and up columns of Z at (row0, col0) into one set of buffers."""
        arrived = self.z_arrived.index(SET)
        if self.INTERLEAVED:
            mbarrier.expect(arrived, self.z.block_type.nbytes)
            tma_load(self.z, [row0, 2 * col0], arrived, self.z_buffers.index(SET))
        else:
            mbarrier.expect(arrived, (2 if self.GATED else 1) * self.z.block_type.nbytes)
            tma_load(self.z, [row0, col0], arrived, self.z_buffers.index(2 * SET))
            if self.GATED:
                tma_load(self.z, [row0, self.wa.width + col0], arrived, self.z_buffers.index(2 * SET + 1))

    @gluon.jit
    def load_z(self, SET: gl.constexpr):
        """(gate, up) of a set of buffers, in the layout of the sums; up is 1 without a gate."""
        layout: gl.constexpr = accumulator_layout(self.COLUMNS)
        if self.INTERLEAVED:
            gate, up = pairs(self.z_buffers.index(SET).load(pairs_layout()).to(gl.float32))
            gate = gl.convert_layout(gate, layout, assert_trivial=True)
            up = gl.convert_layout(up, layout, assert_trivial=True)
        else:
            gate = self.z_buffers.index(2 * SET).load(layout).to(gl.float32)
            if self.GATED:
                up = self.z_buffers.index(2 * SET + 1).load(layout).to(gl.float32)
            else:
                up = 1.0
        return gate, up

    @gluon.jit
    def put_dz(self, d_gate, d_up, SET: gl.constexpr):
        """dZ in place of Z in a set of buffers."""
        if self.INTERLEAVED:
            buffer = self.z_buffers.index(SET)
            both = gl.reshape(gl.join(d_gate, d_up), (d_gate.shape[0], 2 * d_gate.shape[1]))
            buffer.store(gl.convert_layout(both.to(buffer.dtype), pairs_layout(), assert_trivial=True))
        else:
            put(d_gate, self.z_buffers.index(2 * SET))
            if self.GATED:
                put(d_up, self.z_buffers.index(2 * SET + 1))

    @gluon.jit
    def send_dz(self, SET: gl.constexpr, row0, row_end, col0):
        """Copy dZ of a set of buffers to device memory; the stores of whole tiles are only started."""
        whole = row0 + self.ROWS <= row_end
        if self.INTERLEAVED:
            if whole:
                tma_store(self.dz.descriptor, [row0, 2 * col0], self.z_buffers.index(SET))
            else:
                self.dz.store_masked(self.z_buffers.index(SET), row0, row_end, 2 * col0)
        else:
            if whole:
                tma_store(self.dz.descriptor, [row0, col0], self.z_buffers.index(2 * SET))
            else:
                self.dz.store_masked(self.z_buffers.index(2 * SET), row0, row_end, col0)
            if self.GATED:
                if whole:
                    tma_store(self.dz.descriptor, [row0, self.wa.width + col0], self.z_buffers.index(2 * SET + 1))
                else:
                    up_buffer = self.z_buffers.index(2 * SET + 1)
                    self.dz.store_masked(up_buffer, row0, row_end, self.wa.width + col0)

    @gluon.jit
    def finish(self, da, weight, SET: gl.constexpr, z_phase, row0, row_end, col0, fetch, next_row, next_col):
        """dZ and wA of a step at (row0, col0), from its dA0 (registers) and Z (buffers of SET).

        Returns <dA0, A> of each row over these columns. If ``fetch``, also waits for the other set's stores and
        issues the load of the next step's Z, at (next_row, next_col), into it.
        """
        layout: gl.constexpr = accumulator_layout(self.COLUMNS)
        WA_SET: gl.constexpr = SET // 2 if self.COOPERATIVE else SET
        mbarrier.wait(self.z_arrived.index(SET), z_phase)
        da = gl.convert_layout(da, layout, assert_trivial=True)
        gate, up = self.load_z(SET)
        a, d_gate, d_up = value_and_partials(gate, up, self.ACTIVATION, self.P0, self.P1)
        dw = gl.sum(da * a, axis=1)
        da *= weight[:, None]
        if self.COOPERATIVE:
            tma.store_wait(0)  # of the wA before, too
        if fetch:
            if not self.COOPERATIVE:
                tma.store_wait(0)
            self.fetch_z(SET ^ 1, next_row, next_col)
        self.put_dz(da * d_gate, da * d_up, SET)
        if self.WRITE_WA:
            put(weight[:, None] * a, self.a_buffers.index(WA_SET))
        if row0 + da.shape[0] <= row_end:
            fence_async_shared()
            if self.WRITE_WA:
                tma_store(self.wa.descriptor, [row0, col0], self.a_buffers.index(WA_SET))
        elif self.WRITE_WA:
            self.wa.store_masked(self.a_buffers.index(WA_SET), row0, row_end, col0)
        self.send_dz(SET, row0, row_end, col0)
        return dw


@gluon.jit
def _row_weights(rows, row_end, row_slot, topk_weights_ptr):
    """The routing weights of sorted rows, in float32."""
    mask = rows < row_end
    slot = gl.load(row_slot + rows, mask=mask, other=0)
    return gl.load(topk_weights_ptr + slot, mask=mask, other=0.0).to(gl.float32)


@gluon.jit
def _consumer(WARPGROUP: gl.constexpr, epilogue, dw_ptr, topk_weights_ptr, R, operands, tiles, ring, turns):
    """A consumer warpgroup: multiply and finish its half of every tile (cooperative), or every other (ping-pong)."""
    COOPERATIVE: gl.constexpr = epilogue.COOPERATIVE
    ROWS: gl.constexpr = ring.a.shape[1] // 2 if COOPERATIVE else ring.a.shape[1]
    BLOCK_K: gl.constexpr = ring.a.shape[2]
    BLOCK_N: gl.constexpr = ring.b.shape[2] if operands.W_IS_KN else ring.b.shape[1]
    SET: gl.constexpr = 2 * WARPGROUP  # the first of this consumer's
    ROW0: gl.constexpr = WARPGROUP * ROWS if COOPERATIVE else 0
    # Steps 0 and 1 of the epilogue are the left half of a tile: below each other, interleaved beside each other.
    DOWN: gl.constexpr = ROWS - epilogue.ROWS
    HALF: gl.constexpr = BLOCK_N // 2
    RIGHT: gl.constexpr = HALF - epilogue.COLUMNS
    I = operands.N
    first, stride, step = taken(WARPGROUP, COOPERATIVE, operands, BLOCK_K)
    z_phase = 0
    turn = 0
    for number in range(first, tiles.count(), stride):
        tile = tiles.at(number)
        row0, row_end, col0 = tile.row0 + ROW0, tile.row_end, tile.n * BLOCK_N
        tma.store_wait(0)  # the stores of the tile before are done: the buffers are free
        epilogue.fetch_z(SET, row0, col0)
        epilogue.fetch_z(SET + 1, row0 + DOWN, col0 + RIGHT)
        rows0 = row0 + gl.arange(0, epilogue.ROWS, gl.SliceLayout(1, accumulator_layout(epilogue.COLUMNS)))
        rows1 = rows0 + DOWN
        weight0 = _row_weights(rows0, row_end, operands.row_slot, topk_weights_ptr)
        weight1 = weight0
        if DOWN > 0:
            weight1 = _row_weights(rows1, row_end, operands.row_slot, topk_weights_ptr)
        acc = gl.zeros((ROWS, BLOCK_N), gl.float32, accumulator_layout(BLOCK_N))
        if not COOPERATIVE:
            await_turn(turns, WARPGROUP, turn)
        acc, step = mainloop(acc, operands, ring, step, ROW0, 0)
        if not COOPERATIVE:
            pass_turn(turns, WARPGROUP)
        acc = complete(acc, ring, step)
        if not COOPERATIVE:
            step = skipped(step, operands, BLOCK_K)
            turn += 1
        left, right = halves(acc)
        if DOWN == 0:
            da0, da1 = halves(left)
            da2, da3 = halves(right)
        else:
            da0, da1 = row_halves(left)
            da2, da3 = row_halves(right)
        row1, col1, col2 = row0 + DOWN, col0 + RIGHT, col0 + HALF
        more = col2 < I  # I is a multiple of 64
        dw0 = epilogue.finish(da0, weight0, SET, z_phase, row0, row_end, col0, False, row0, col0)
        dw1 = epilogue.finish(da1, weight1, SET + 1, z_phase, row1, row_end, col1, more, row0, col2)
        z_phase ^= 1
        if more:
            dw0 += epilogue.finish(da2, weight0, SET, z_phase, row0, row_end, col2, True, row1, col2 + RIGHT)
            dw1 += epilogue.finish(da3, weight1, SET + 1, z_phase, row1, row_end, col2 + RIGHT, False, row0, col0)
            z_phase ^= 1
        dw_out = dw_ptr + tile.n.to(gl.int64) * R
        if DOWN == 0:
            gl.store(dw_out + rows0, dw0 + dw1, mask=rows0 < row_end)
        else:
            gl.store(dw_out + rows0, dw0, mask=rows0 < row_end)
            gl.store(dw_out + rows1, dw1, mask=rows1 < row_end)
    tma.store_wait(0)


# Under expert parallelism every step brings another number of rows, for which nothing is to be compiled.
@gluon.jit(do_not_specialize=["R"])
def hopper_down_grad_kernel(
    dout_rows,  # (R, H): descriptor; any pointer with TOP_K
    dout_ptr,  # (R / TOP_K, H): read with TOP_K
    w,  # (E * H, I), or (E * I, H) unless W_IS_KN: descriptor
    low,  # (R, RANK): descriptor; any pointer if RANK is 0, as is factor
    factor,  # (E * RANK, I): descriptor
    z,  # (R, 2I), or (R, I) unless GATED: descriptor
    dz,  # the same: descriptor, may share the memory of z
    dz_ptr,
    wa,  # (R, I): descriptor; any unless WRITE_WA, as is wa_ptr
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
    W_IS_KN: gl.constexpr,
    LOW_IS_KN: gl.constexpr,
    RANK: gl.constexpr,
    WRITE_WA: gl.constexpr,
    SIDE: gl.constexpr,  # of a block of fp8 weights with one scale; 0: of 16 bits
    COOPERATIVE: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    GROUP_M: gl.constexpr,
    STAGES: gl.constexpr,
):
    gl.static_assert(SIDE == 0 or BLOCK_N == SIDE, "a tile has one scale a k block")
    dtype: gl.constexpr = dz_ptr.dtype.element_ty
    GATHER: gl.constexpr = TOP_K > 0
    W_BLOCK: gl.constexpr = (BLOCK_K, BLOCK_N) if W_IS_KN else (BLOCK_N, BLOCK_K)
    READY_COUNT: gl.constexpr = 1 + (128 if GATHER else 1 if SIDE else 0)  # as in hopper_gemm_kernel
    ring = new_ring(dtype, STAGES, (BLOCK_M, BLOCK_K), W_BLOCK, READY_COUNT, 2 if COOPERATIVE else 1)
    turns = ring.empty if COOPERATIVE else new_turns()  # not used if cooperative
    ROWS: gl.constexpr = BLOCK_M if INTERLEAVED else BLOCK_M // 2
    COLUMNS: gl.constexpr = 32 if INTERLEAVED else 64
    z_buffers = gl.allocate_shared_memory(dtype, [4 if INTERLEAVED else 8, ROWS, 64], SWIZZLED)
    a_buffers = z_buffers
    if WRITE_WA:
        a_buffers = gl.allocate_shared_memory(dtype, [2 if COOPERATIVE else 4, ROWS, COLUMNS], block_layout(COLUMNS))
    z_arrived = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(4):
        mbarrier.init(z_arrived.index(i), count=1)
    num_m = gl.load(tile_count_ptr)
    num_n = (I + BLOCK_N - 1) // BLOCK_N
    # Not FULL: dZ may overwrite Z, so no row may be computed twice.
    tiles = RowTiles(
        expert_start=expert_start_ptr, tile_expert=tile_expert_ptr, tile_row=tile_row_ptr, num_m=num_m, num_n=num_n,
        BLOCK_M=BLOCK_M, GROUP_M=GROUP_M, WITHIN_EXPERTS=WITHIN_EXPERTS, FULL=False,
    )  # fmt: skip
    operands = Operands(
        rows=Matrix(descriptor=dout_rows, pointer=dout_ptr, width=H), weight=w, low=low, factor=factor,
        row_slot=row_slot_ptr, N=I, TOP_K=TOP_K, GATED=False, GATHER=GATHER, W_IS_KN=W_IS_KN, LOW_IS_KN=LOW_IS_KN,
        RANK=RANK, LOW_K=min(RANK, BLOCK_K), LOW_BLOCKS=(RANK + BLOCK_K - 1) // BLOCK_K,
    )  # fmt: skip
    epilogue = Epilogue(
        z=z, dz=Matrix(descriptor=dz, pointer=dz_ptr, width=2 * I if GATED else I),
        wa=Matrix(descriptor=wa, pointer=wa_ptr, width=I),
        z_buffers=z_buffers, a_buffers=a_buffers, z_arrived=z_arrived, ROWS=ROWS, COLUMNS=COLUMNS,
        ACTIVATION=ACTIVATION, P0=P0, P1=P1, GATED=GATED, INTERLEAVED=INTERLEAVED, WRITE_WA=WRITE_WA,
        COOPERATIVE=COOPERATIVE,
    )  # fmt: skip
    if SIDE > 0:
        codes = dequantizing.new_codes(
            w, w_scales_ptr, W_EXPERT_STRIDE, W_ROW_STRIDE, W_ROWS, H, I, SIDE, 1, False, W_IS_KN, BLOCK_K, STAGES
        )
        gl.warp_specialize(
            [
                (_consumer, (0, epilogue, dw_ptr, topk_weights_ptr, R, operands, tiles, ring, turns)),
                (_consumer, (1, epilogue, dw_ptr, topk_weights_ptr, R, operands, tiles, ring, turns)),
                (dequantizing.producer, (operands, codes, tiles, ring)),
            ],
            [4, 4],
            [216, 72],
        )
    else:
        gl.warp_specialize(
            [
                (_consumer, (0, epilogue, dw_ptr, topk_weights_ptr, R, operands, tiles, ring, turns)),
                (_consumer, (1, epilogue, dw_ptr, topk_weights_ptr, R, operands, tiles, ring, turns)),
                (producer, (operands, tiles, ring, 1)),
            ],
            [4, 4 if GATHER else 1],
            [216 if GATHER else 232, 72 if GATHER else 40],
        )


@triton.jit(do_not_specialize=["R"])
def sum_weight_grad_kernel(
    parts_ptr,  # (column blocks, R) float32
    row_slot_ptr,  # (R,)
    routed_ptr,  # expert_start[E]: rows at or after it belong to dropped slots
    bias_dot_ptr,  # (R,) float32: read if HAS_BIAS
    dw_ptr,  # (T * K,)
    R,
    blocks,
    HAS_BIAS: tl.constexpr,
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
    if HAS_BIAS:
        dw += tl.load(bias_dot_ptr + rows, mask=kept, other=0.0)
    tl.store(dw_ptr + slot, dw.to(dw_ptr.dtype.element_ty), mask=rows < R)


# Ping-pong, with as many columns as leave registers for the epilogue. Codes take the memory of a stage.
SCHEDULE = Schedule(cooperative=False, block_n=128, stages=4)
_OF_CODES = replace(SCHEDULE, stages=3)
# Cooperative, of twice the columns: rows are gathered half as often, but no epilogue is hidden.
_WIDE = Schedule(cooperative=True, block_n=256, stages=3)
_LONG = 4096  # elements of a row of dO: so many has 30B fine, which is faster, and 2048 7B fine, which is slower
#: group_m where L2 holds an expert's weights, which may then be read more often for fewer rows at a time: 1 to 4%
#: faster on four of eight such layers, the same on the others, but 3% slower on Mixtral-8x7B, of 117 MB an expert
#: (benchmarks/results/h200-log-16-down-grad.json).
_GROUP_M_IN_L2 = 4


def gains_from_wide(dout_rows: torch.Tensor | TokenRows, intermediate: int, plan: RoutingPlan) -> bool:
    """Whether _WIDE is the faster schedule: where gathering, or reading the weights, takes longer than an epilogue.

    benchmarks/results/h200-log-18-schedules.json has ten layers. Tiles are whole.
    """
    if not isinstance(dout_rows, TokenRows) or intermediate % _WIDE.block_n:
        return False
    return plan.rows_per_expert < FEW_ROWS or dout_rows.tokens.shape[1] >= _LONG


def down_grad(
    dout_rows: torch.Tensor | TokenRows,
    weight: Weight,
    z: torch.Tensor,
    topk_weights: torch.Tensor,
    plan: RoutingPlan,
    gate: Gate,
    overwrite_z: bool,
    bias_dot: torch.Tensor | None = None,
    needs_wa: bool = True,
) -> DownGrads:
    """dZ (R, Z), wA (R, I), empty unless needs_wa, and dw (T, K) from the output's gradient.

    Args:
        dout_rows: (R, H), sorted by expert, or unsorted tokens to gather its rows from.
        weight: (E, H, I), without a bias.
        z: (R, Z); overwritten with dZ if overwrite_z.
        topk_weights: (T, K).
        plan, gate: of the forward.
        bias_dot: (R,), added to dw: see :class:`moe_kernels.layer.AddedGrads`.
    """
    intermediate = weight.matrix.shape[2]
    dz = z if overwrite_z else torch.empty_like(z)
    wa = z.new_empty(plan.rows, intermediate) if needs_wa else z.new_empty(0)
    dw = torch.empty_like(topk_weights)
    in_load = not gate.interleaved and dequantizing.in_load(weight.matrix, plan, False)
    schedule = _OF_CODES if in_load else SCHEDULE
    if not (in_load or gate.interleaved) and gains_from_wide(dout_rows, intermediate, plan):
        schedule = _WIDE
    column_blocks = cdiv(intermediate, schedule.block_n)
    if plan.max_tiles * column_blocks == 0:
        return DownGrads(dz, wa, dw)
    parts = torch.empty((column_blocks, plan.rows), dtype=torch.float32, device=z.device)
    dout, top_k = dout_rows if isinstance(dout_rows, TokenRows) else (dout_rows, 0)
    if weight.matrix.shape[1] * intermediate * z.element_size() <= CACHED_BYTES:
        schedule = replace(schedule, group_m=_GROUP_M_IN_L2)
    constants = {"TOP_K": top_k, **gate.constants(), "WRITE_WA": needs_wa, **schedule.constants(), "num_warps": 4}
    rows_in = dout if top_k else matrix(dout, BLOCK_M, BLOCK_K), dout
    rows, columns = (BLOCK_M, 32) if gate.interleaved else (BLOCK_M // 2, 64)  # of a step of the epilogue
    z_in, dz_out = (matrix(t, rows, 64) for t in (z, dz))
    wa_out = (matrix(wa, rows, columns, layout=block_layout(columns)), wa) if needs_wa else (dz_out, dz)
    for part, tiles in [(weight, plan)] if in_load else blocks(weight, plan):
        weights, chosen = weight_arguments(part, schedule.block_n, True, unused=dz)
        launch(
            hopper_down_grad_kernel,
            (min(tiles.max_tiles * column_blocks, multiprocessors(z.device)),),
            (
                *rows_in,
                *weights,
                *(z_in, dz_out, dz, *wa_out, parts, topk_weights),
                *tiles.tile_arguments,
                *weight.matrix.shape[1:],
                plan.rows,
                *dequantizing.scale_arguments(part.matrix, unused=dz),
            ),
            {**constants, **chosen, "WITHIN_EXPERTS": within_experts(plan)},
        )
        del part, weights
    _sum_weight_grad(parts, bias_dot, dw, plan)
    return DownGrads(dz, wa, dw)


def _sum_weight_grad(parts: torch.Tensor, bias_dot: torch.Tensor | None, dw: torch.Tensor, plan: RoutingPlan) -> None:
    """dw (T, K) from the sums of each column block (blocks, R), and of the bias (R,)."""
    routed = plan.expert_start[plan.experts :]
    launch(
        sum_weight_grad_kernel,
        (cdiv(plan.rows, 1024),),
        (parts, plan.row_slot, routed, parts if bias_dot is None else bias_dot, dw, plan.rows, parts.shape[0]),
        {"HAS_BIAS": bias_dot is not None, "BLOCK_R": 1024, "num_warps": 4},
    )
