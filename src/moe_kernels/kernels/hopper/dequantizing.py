"""Block-fp8 weights that the producer warps of the GEMMs in ``gemm.py`` dequantise, between load and wgmma.

The producer warpgroup loads codes two k blocks ahead, reads those that have arrived from shared memory, and writes a
stage's 16-bit block of weights. So nothing is written to device memory, and weights are read at one byte a value. A
value is the product of code and scale in float32, rounded once, as :class:`moe_kernels.packed.BlockFp8` says: bitwise
what dequantising first gives.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from moe_kernels.kernels.hopper.gluon_names import aggregate, cp_async, tma_load
from moe_kernels.kernels.hopper.ring import BLOCK_K, Schedule, block_layout, matrix
from moe_kernels.kernels.operands import Descriptor
from moe_kernels.kernels.tiles.config import Override
from moe_kernels.layer import Matrix
from moe_kernels.packed import SIDE, BlockFp8
from moe_kernels.routing import RoutingPlan

#: Of up, down and dgrad. A stage has 48 KiB of 16-bit blocks and 16 KiB of codes.
SCHEDULE = Schedule(cooperative=True, block_n=256, stages=3)


@gluon.constexpr_function
def _values_layout(columns):
    """[rows, columns] over a warpgroup, 8 neighbouring elements a thread: 16 bytes of them in 16 bits."""
    return gl.BlockedLayout([1, 8], [256 // columns, columns // 8], [4, 1], [1, 0])


@aggregate
class Codes:
    """The codes of the weights (E * rows, columns), SIDE columns of the product at a time, and their scales."""

    weight: tma.tensor_descriptor
    buffers: gl.shared_memory_descriptor  # [BLOCKS * SLOTS, SIDE, BLOCK_K], or [.., BLOCK_K, SIDE] if IS_KN
    ready: gl.shared_memory_descriptor  # [SLOTS, 1]: the codes of a slot have arrived
    scales: gl.tensor  # (E, blocks of rows, blocks of columns)
    expert_stride: gl.tensor
    row_stride: gl.tensor
    rows: gl.tensor  # of an expert's matrix as stored
    K: gl.tensor
    N: gl.tensor
    SIDE: gl.constexpr
    BLOCKS: gl.constexpr  # of SIDE columns in a tile: 2, or 1
    GATED: gl.constexpr
    IS_KN: gl.constexpr
    SLOTS: gl.constexpr

    @gluon.jit
    def load(self, count, tile, k0):
        """Issue the loads of a tile's columns at k0: the ``count``-th codes of this program."""
        slot = count % self.SLOTS
        arrived = self.ready.index(slot)
        mbarrier.expect(arrived, self.BLOCKS * self.buffers.shape[1] * self.buffers.shape[2])
        first = tile.expert * self.rows
        for block in gl.static_range(self.BLOCKS):
            codes = self.buffers.index(self.BLOCKS * slot + block)
            if self.GATED:
                tma_load(self.weight, [first + block * self.N + tile.n * self.SIDE, k0], arrived, codes)
            elif self.IS_KN:
                tma_load(self.weight, [first + k0, (tile.n * self.BLOCKS + block) * self.SIDE], arrived, codes)
            else:
                tma_load(self.weight, [first + (tile.n * self.BLOCKS + block) * self.SIDE, k0], arrived, codes)

    @gluon.jit
    def scale_at(self, tile, k0, BLOCK: gl.constexpr):
        """The scale of one block of a tile's columns at k0, clamped to the last k block."""
        k_block = gl.minimum(k0, self.K - 1) // self.SIDE
        blocks_n = (self.N + self.SIDE - 1) // self.SIDE
        if self.GATED:
            n_block = BLOCK * blocks_n + tile.n
        else:
            n_block = gl.minimum(tile.n * self.BLOCKS + BLOCK, blocks_n - 1)
        of_expert = self.scales + tile.expert.to(gl.int64) * self.expert_stride
        if self.IS_KN:
            pointer = of_expert + k_block * self.row_stride + n_block
        else:
            pointer = of_expert + n_block * self.row_stride + k_block
        return gl.load(pointer).to(gl.float32)

    @gluon.jit
    def scales_at(self, tile, k0):
        """The scales of a tile's first and last block of columns at k0."""
        return self.scale_at(tile, k0, 0), self.scale_at(tile, k0, self.BLOCKS - 1)

    @gluon.jit
    def dequantize(self, count, b, left_scale, right_scale):
        """Wait for the ``count``-th codes and write the 16-bit block ``b`` of them."""
        slot = count % self.SLOTS
        mbarrier.wait(self.ready.index(slot), (count // self.SLOTS) & 1)
        AXIS: gl.constexpr = 1 if self.IS_KN else 0
        layout: gl.constexpr = _values_layout(self.buffers.shape[2])
        left = self.buffers.index(self.BLOCKS * slot).load(layout)
        if self.BLOCKS == 2:
            # Both loads before the first store, behind which they could not be moved.
            right = self.buffers.index(2 * slot + 1).load(layout)
            b.slice(0, self.SIDE, dim=AXIS).store((left.to(gl.float32) * left_scale).to(b.dtype))
            b.slice(self.SIDE, self.SIDE, dim=AXIS).store((right.to(gl.float32) * right_scale).to(b.dtype))
        else:
            b.store((left.to(gl.float32) * left_scale).to(b.dtype))


@gluon.jit
def new_codes(
    weight, scales, expert_stride, row_stride, rows, K, N, SIDE: gl.constexpr, BLOCKS: gl.constexpr,
    GATED: gl.constexpr, IS_KN: gl.constexpr, BLOCK_K: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """Codes with memory for SLOTS k blocks."""
    BLOCK: gl.constexpr = (BLOCK_K, SIDE) if IS_KN else (SIDE, BLOCK_K)
    layout: gl.constexpr = block_layout(BLOCK[1], 8)
    buffers = gl.allocate_shared_memory(weight.dtype, [BLOCKS * SLOTS, BLOCK[0], BLOCK[1]], layout)
    ready = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS):
        mbarrier.init(ready.index(i), count=1)
    return Codes(
        weight=weight, buffers=buffers, ready=ready, scales=scales, expert_stride=expert_stride,
        row_stride=row_stride, rows=rows, K=K, N=N, SIDE=SIDE, BLOCKS=BLOCKS, GATED=GATED, IS_KN=IS_KN, SLOTS=SLOTS,
    )  # fmt: skip


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
def producer(operands, codes, tiles, ring):
    """The producer warps: of every tile load the k blocks, dequantise them, and load the low-rank blocks.

    A stage is ready when its weights are written and its rows there: by TMA, or the cp.async of all 128 threads.
    """
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


#: Rows an expert from which layers are faster on block-fp8 weights that were dequantised ahead: with 256 rows those
#: of DeepSeek-V3 and gpt-oss-like take 32.6 and 11.7 ms in place of 57.2 and 15.0, with 1024 rows Qwen3-30B's takes
#: 6.7 in place of 6.4 (benchmarks/results/h200-log-16-dequantising.json). Nothing between was measured.
_ROWS_PER_EXPERT = 512
_forced: Override[bool] = Override()
#: Within ``use_dequantizing(chosen)`` weights are dequantised between load and wgmma, or never: for checks, tests.
use_dequantizing = _forced.use


def in_load(weight: Matrix, plan: RoutingPlan, gated: bool) -> bool:
    """Whether a weight is dequantised between load and wgmma, not a block of experts ahead.

    It must be stored by rows, with blocks of scales that begin where a tile's columns do.
    """
    if not isinstance(weight, BlockFp8) or weight.by_columns or not weight.has_scales_of(2 if gated else 1):
        return False
    few = plan.rows_per_expert < _ROWS_PER_EXPERT if _forced.choice is None else _forced.choice
    return few and weight.data.data_ptr() % 16 == 0


def codes_argument(weight: BlockFp8, untransposed: bool) -> Descriptor:
    """The descriptor of the codes, whose loads have SIDE columns of the product."""
    block = (BLOCK_K, SIDE) if untransposed else (SIDE, BLOCK_K)
    return matrix(weight.data, *block, layout=block_layout(block[1], 8))


def scale_arguments(weight: Matrix, unused: torch.Tensor) -> tuple[torch.Tensor, int, int, int]:
    """Of block-fp8 weights the scales, their strides from expert to expert and row to row, and rows of an expert."""
    if not isinstance(weight, BlockFp8):
        return unused, 0, 0, 0
    _, rows, columns = weight.scales.shape
    return weight.scales, rows * columns, columns, weight.sizes[1]
