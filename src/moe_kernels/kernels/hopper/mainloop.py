"""What the GEMMs of 16-bit rows share: their operands, the producer that loads these, and the consumers' mainloop."""

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

from moe_kernels.kernels.hopper import dequantizing
from moe_kernels.kernels.hopper.gluon_names import aggregate, cp_async, reinterpret, tma_load
from moe_kernels.kernels.hopper.ring import (
    BLOCK_K,
    BLOCK_M,
    FEW_ROWS,
    SWIZZLED,
    Matrix,
    block_layout,
    copy_layout,
    has_fast_memory,
    matrix,
)
from moe_kernels.kernels.operands import Descriptor, low_rank_arguments, stored
from moe_kernels.kernels.tiles.config import Override
from moe_kernels.layer import Weight
from moe_kernels.packed import SIDE, BlockFp8
from moe_kernels.routing import RoutingPlan


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


# --------------------------------------------------------------------------------------------------- host side
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
