"""Grouped GEMMs in 16 bits of block-fp8 weights, which the producer warps dequantise between load and wgmma.

The GEMMs of ``gemm.py`` on cooperative tiles, with the same consumers. The producer warpgroup loads codes two k
blocks ahead, reads those that have arrived from shared memory, and writes a stage's 16-bit block of weights. So
nothing is written to device memory, and weights are read at one byte a value. A value is the product of code and
scale in float32, rounded once, as :class:`moe_kernels.packed.BlockFp8` says: bitwise what dequantising first gives.
"""

from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from moe_kernels.activation import Gate
from moe_kernels.kernels.device import cdiv, multiprocessors
from moe_kernels.kernels.hopper.gemm import Epilogue, Operands, consumer, low_rank_blocks
from moe_kernels.kernels.hopper.gluon_names import aggregate, cp_async, tma_load
from moe_kernels.kernels.hopper.ring import (
    BLOCK_K,
    BLOCK_M,
    CHUNK,
    SWIZZLED,
    Matrix,
    RowTiles,
    Schedule,
    block_layout,
    matrix,
    new_ring,
)
from moe_kernels.kernels.launch.launch import launch
from moe_kernels.layer import Weight
from moe_kernels.packed import SIDE, BlockFp8
from moe_kernels.routing import RoutingPlan

#: A stage has 48 KiB of 16-bit blocks and 16 KiB of codes.
SCHEDULE = Schedule(cooperative=True, block_n=256, stages=3)


@gluon.constexpr_function
def _values_layout(columns):
    """[rows, columns] over a warpgroup, 8 neighbouring elements a thread: 16 bytes of them in 16 bits."""
    return gl.BlockedLayout([1, 8], [256 // columns, columns // 8], [4, 1], [1, 0])


@aggregate
class Codes:
    """The codes of the weights (E * rows, columns), SIDE columns of the product at a time, and their scales."""

    weight: tma.tensor_descriptor
    buffers: gl.shared_memory_descriptor  # [2 * SLOTS, SIDE, BLOCK_K], or [.., BLOCK_K, SIDE] if IS_KN
    ready: gl.shared_memory_descriptor  # [SLOTS, 1]: the codes of a slot have arrived
    scales: gl.tensor  # (E, blocks of rows, blocks of columns)
    expert_stride: gl.tensor
    row_stride: gl.tensor
    rows: gl.tensor  # of an expert's matrix as stored
    K: gl.tensor
    N: gl.tensor
    SIDE: gl.constexpr
    BLOCK_K: gl.constexpr
    GATED: gl.constexpr
    IS_KN: gl.constexpr
    SLOTS: gl.constexpr

    @gluon.jit
    def load(self, count, tile, k0):
        """Issue the loads of both halves of a tile's columns at k0: the ``count``-th codes of this program."""
        slot = count % self.SLOTS
        arrived = self.ready.index(slot)
        mbarrier.expect(arrived, 2 * self.SIDE * self.BLOCK_K)
        first = tile.expert * self.rows
        left, right = self.buffers.index(2 * slot), self.buffers.index(2 * slot + 1)
        if self.GATED:
            tma_load(self.weight, [first + tile.n * self.SIDE, k0], arrived, left)
            tma_load(self.weight, [first + self.N + tile.n * self.SIDE, k0], arrived, right)
        elif self.IS_KN:
            tma_load(self.weight, [first + k0, tile.n * 2 * self.SIDE], arrived, left)
            tma_load(self.weight, [first + k0, (tile.n * 2 + 1) * self.SIDE], arrived, right)
        else:
            tma_load(self.weight, [first + tile.n * 2 * self.SIDE, k0], arrived, left)
            tma_load(self.weight, [first + (tile.n * 2 + 1) * self.SIDE, k0], arrived, right)

    @gluon.jit
    def scales_at(self, tile, k0):
        """The scales of the left and of the right half of a tile's columns at k0, clamped to the last k block."""
        k0 = gl.minimum(k0, self.K - 1)
        blocks_n = (self.N + self.SIDE - 1) // self.SIDE
        if self.GATED:
            left, right = tile.n, blocks_n + tile.n
        else:
            left, right = tile.n * 2, gl.minimum(tile.n * 2 + 1, blocks_n - 1)
        of_expert = self.scales + tile.expert.to(gl.int64) * self.expert_stride
        if self.IS_KN:
            of_row = of_expert + k0 // self.SIDE * self.row_stride
            left_scale, right_scale = gl.load(of_row + left), gl.load(of_row + right)
        else:
            of_column = of_expert + k0 // self.SIDE
            left_scale = gl.load(of_column + left * self.row_stride)
            right_scale = gl.load(of_column + right * self.row_stride)
        return left_scale.to(gl.float32), right_scale.to(gl.float32)

    @gluon.jit
    def dequantize(self, count, b, left_scale, right_scale):
        """Wait for the ``count``-th codes and write the 16-bit block ``b`` of them."""
        slot = count % self.SLOTS
        mbarrier.wait(self.ready.index(slot), (count // self.SLOTS) & 1)
        AXIS: gl.constexpr = 1 if self.IS_KN else 0
        layout: gl.constexpr = _values_layout(self.buffers.shape[2])
        # Both loads before the first store, behind which they could not be moved.
        left, right = self.buffers.index(2 * slot).load(layout), self.buffers.index(2 * slot + 1).load(layout)
        b.slice(0, self.SIDE, dim=AXIS).store((left.to(gl.float32) * left_scale).to(b.dtype))
        b.slice(self.SIDE, self.SIDE, dim=AXIS).store((right.to(gl.float32) * right_scale).to(b.dtype))


@gluon.jit
def _load(operands, codes, tile, sources, ring, step, count, k0):
    """Issue the loads of a k block once its stage is empty: codes and rows."""
    ring.await_empty(step)
    a, _b, ready = ring.stage(step)
    # The slot's codes before these were read by all threads before they arrived at their stage's mbarrier.
    codes.load(count, tile, k0)
    if operands.GATHER:
        cp_async(a, sources + k0)
        async_copy.mbarrier_arrive(ready, increment_count=False)
    else:
        mbarrier.expect(ready, a.numel * 2)
        tma_load(operands.rows.descriptor, [tile.row0, k0], ready, a)


@gluon.jit
def _producer(operands, codes, tiles, ring):
    """The producer warps: of every tile load the k blocks, dequantise them, and load the low-rank blocks."""
    BLOCK_K: gl.constexpr = ring.a.shape[2]
    K = operands.rows.width
    step = 0
    count = 0
    for pid in range(gl.program_id(0), tiles.count(), gl.num_programs(0)):
        tile = tiles.at(pid)
        sources = operands.sources(tile, ring.a.shape[1], BLOCK_K)
        next_left, next_right = codes.scales_at(tile, 0)
        _load(operands, codes, tile, sources, ring, step, count, 0)
        if BLOCK_K < K:
            _load(operands, codes, tile, sources, ring, step + 1, count + 1, BLOCK_K)
        for k0 in range(0, K, BLOCK_K):
            left_scale, right_scale = next_left, next_right
            next_left, next_right = codes.scales_at(tile, k0 + BLOCK_K)
            _a, b, ready = ring.stage(step)
            codes.dequantize(count, b, left_scale, right_scale)
            fence_async_shared()  # make these writes visible to wgmma's async proxy
            mbarrier.arrive(ready, count=1)
            if k0 + 2 * BLOCK_K < K:
                _load(operands, codes, tile, sources, ring, step + 2, count + 2, k0 + 2 * BLOCK_K)
            step += 1
            count += 1
        for block in gl.static_range(operands.LOW_BLOCKS):
            ring.await_empty(step)
            if not operands.GATHER:  # with it, load_low itself arrives once more than the rows of a k block
                mbarrier.arrive(ring.ready.index(step % ring.STAGES), count=1)
            operands.load_low(operands.low_stage(ring, step), tile, block)
            step += 1


@gluon.jit
def hopper_dequantizing_gemm_kernel(
    rows_in,  # (R, K): descriptor; any pointer if GATHER
    rows_ptr,  # (T, K): read if GATHER
    w,  # codes (E * Z, K), or (E * K, N) if W_IS_KN: descriptor. Z is 2N with a gate, N without
    scales_ptr,  # (E, blocks of rows, blocks of columns)
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
    W_ROWS,  # of an expert's matrix as stored
    EXPERT_STRIDE,  # of the scales
    ROW_STRIDE,
    TOP_K: gl.constexpr,
    ACTIVATION: gl.constexpr,
    P0: gl.constexpr,
    P1: gl.constexpr,
    GATED: gl.constexpr,
    GATHER: gl.constexpr,
    SAVE_Z: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    W_IS_KN: gl.constexpr,
    RANK: gl.constexpr,
    SIDE: gl.constexpr,
    COOPERATIVE: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    GROUP_M: gl.constexpr,
    STAGES: gl.constexpr,
):
    gl.static_assert(COOPERATIVE and BLOCK_N == 2 * SIDE, "each half of a tile's columns has one scale a k block")
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    ROWS: gl.constexpr = BLOCK_M // 2
    COLUMNS: gl.constexpr = SIDE if GATED else BLOCK_N
    W_BLOCK: gl.constexpr = (BLOCK_K, BLOCK_N) if W_IS_KN else (BLOCK_N, BLOCK_K)
    CODES: gl.constexpr = [2 * STAGES, BLOCK_K, SIDE] if W_IS_KN else [2 * STAGES, SIDE, BLOCK_K]
    # A stage is ready when its weights are written and its rows there: by TMA, or the cp.async of all 128 threads.
    ring = new_ring(dtype, STAGES, (BLOCK_M, BLOCK_K), W_BLOCK, 1 + (128 if GATHER else 1), 2)
    code_buffers = gl.allocate_shared_memory(w.dtype, CODES, block_layout(SIDE if W_IS_KN else BLOCK_K, 8))
    codes_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(codes_ready.index(i), count=1)
    buffers0 = gl.allocate_shared_memory(dtype, [2, ROWS, CHUNK], SWIZZLED)
    buffers1 = gl.allocate_shared_memory(dtype, [2, ROWS, CHUNK], SWIZZLED)
    tiles = RowTiles(
        expert_start=expert_start_ptr, tile_expert=tile_expert_ptr, tile_row=tile_row_ptr,
        num_m=gl.load(tile_count_ptr), num_n=(N + COLUMNS - 1) // COLUMNS,
        BLOCK_M=BLOCK_M, GROUP_M=GROUP_M, FULL=True,
    )  # fmt: skip
    operands = Operands(
        rows=Matrix(descriptor=rows_in, pointer=rows_ptr, width=K), weight=w, low=low, factor=factor,
        row_slot=row_slot_ptr, N=N, TOP_K=TOP_K, GATED=GATED, GATHER=GATHER, W_IS_KN=W_IS_KN, LOW_IS_KN=W_IS_KN,
        RANK=RANK, LOW_K=min(RANK, BLOCK_K), LOW_BLOCKS=(RANK + BLOCK_K - 1) // BLOCK_K,
    )  # fmt: skip
    codes = Codes(
        weight=w, buffers=code_buffers, ready=codes_ready, scales=scales_ptr, expert_stride=EXPERT_STRIDE,
        row_stride=ROW_STRIDE, rows=W_ROWS, K=K, N=N, SIDE=SIDE, BLOCK_K=BLOCK_K, GATED=GATED, IS_KN=W_IS_KN,
        SLOTS=STAGES,
    )  # fmt: skip
    epilogue = Epilogue(
        z=Matrix(descriptor=z, pointer=z_ptr, width=2 * N if GATED else N),
        out=Matrix(descriptor=out, pointer=out_ptr, width=N), bias=bias_ptr,
        ACTIVATION=ACTIVATION, P0=P0, P1=P1, SAVE_Z=SAVE_Z, INTERLEAVED=False, HAS_BIAS=HAS_BIAS,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (consumer, (0, buffers0, epilogue, operands, tiles, ring, ring.empty, True)),
            (consumer, (1, buffers1, epilogue, operands, tiles, ring, ring.empty, True)),
            (_producer, (operands, codes, tiles, ring)),
        ],
        [4, 4],
        [208, 88],
    )


def fits(packed: BlockFp8, gated: bool) -> bool:
    """Whether these kernels read it: stored by rows, and blocks of scales that begin where a tile's columns do."""
    return not packed.by_columns and packed.has_scales_of(2 if gated else 1) and packed.data.data_ptr() % 16 == 0


def up(
    x: torch.Tensor, weight: Weight, plan: RoutingPlan, gate: Gate, save_z: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`moe_kernels.kernels.hopper.gemm.up`, of weights that ``fits``."""
    width = weight.matrix.shape[1]
    z = x.new_empty(plan.rows, width) if save_z else x.new_empty(0)
    a = x.new_empty(plan.rows, width // 2 if gate.gated else width)
    constants = gate.constants()
    del constants["INTERLEAVED"]
    _launch(x, x, weight, plan, a, z if save_z else None, {**constants, "GATHER": True})
    return z, a


def down(a: torch.Tensor, weight: Weight, plan: RoutingPlan) -> torch.Tensor:
    """Y = A W2[e]^T: a (R, I), weight (E, H, I) -> (R, H)."""
    return _rows_times_weight(a, weight, plan, False)


def dgrad(rows: torch.Tensor, weight: Weight, plan: RoutingPlan) -> torch.Tensor:
    """rows @ weight[e]: dA0 from dOs (R, H) and W2 (E, H, I), or dXr from dZ (R, 2I) and W1 (E, 2I, H)."""
    return _rows_times_weight(rows, weight, plan, True)


_PLAIN = {"ACTIVATION": "identity", "P0": 0.0, "P1": 0.0, "GATED": False, "GATHER": False}


def _rows_times_weight(rows: torch.Tensor, weight: Weight, plan: RoutingPlan, untransposed: bool) -> torch.Tensor:
    out = rows.new_empty(plan.rows, weight.matrix.shape[2 if untransposed else 1])
    _launch(matrix(rows, BLOCK_M, BLOCK_K), rows, weight, plan, out, None, _PLAIN, untransposed)
    return out


def _launch(
    rows_in: Any,
    rows: torch.Tensor,
    weight: Weight,
    plan: RoutingPlan,
    out: torch.Tensor,
    z: torch.Tensor | None,
    constants: dict[str, object],
    untransposed: bool = False,
) -> None:
    packed = weight.matrix
    assert isinstance(packed, BlockFp8)
    width, columns = out.shape[1], SIDE if constants["GATED"] else SCHEDULE.block_n
    number = plan.max_tiles * cdiv(width, columns)
    if number == 0:
        return
    block = (BLOCK_K, SIDE) if untransposed else (SIDE, BLOCK_K)
    low, factor, rank = low_rank_blocks(weight, columns, untransposed, out)
    saved = out if z is None else z
    _, scale_rows, scale_columns = packed.scales.shape
    launch(
        hopper_dequantizing_gemm_kernel,
        (min(number, multiprocessors(out.device)),),
        (
            *(rows_in, rows),
            matrix(packed.data, *block, layout=block_layout(block[1], 8)),
            *(packed.scales, low, factor, out if weight.bias is None else weight.bias),
            *(matrix(saved, SCHEDULE.rows, CHUNK.value), saved),
            *(matrix(out, SCHEDULE.rows, CHUNK.value), out),
            *plan.tile_arguments,
            *(rows.shape[1], width, packed.sizes[1], scale_rows * scale_columns, scale_columns),
        ),
        {
            "TOP_K": plan.top_k,
            **constants,
            "SAVE_Z": z is not None,
            "HAS_BIAS": weight.bias is not None,
            "W_IS_KN": untransposed,
            "RANK": rank,
            "SIDE": SIDE,
            **SCHEDULE.constants(),
            "num_warps": 4,
        },
    )
