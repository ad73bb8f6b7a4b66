"""Grouped GEMMs of block-fp8 weights in fp8 on Hopper: the same math as ``kernels/triton/fp8.py``.

Warp-specialised and persistent, on the tiles of the cooperative kernels in ``gemm.py``: 128 rows and 256 columns, of
which each consumer warpgroup multiplies 64 rows. A k block has 128 elements, as many as share a scale. Its products
are summed by wgmma for 128 columns at a time, 64 registers a thread beside the 128 of the float32 sums, multiplied
with both scales and added to them, while the other consumer's wgmma runs. Codes are loaded by TMA alone, of rows in
expert order, and scales by the consumers, a k block ahead.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from moe_kernels.activation import Gate
from moe_kernels.fp8 import Fp8Weight
from moe_kernels.kernels.device import cdiv, multiprocessors
from moe_kernels.kernels.hopper.epilogue import Epilogue, write_tile
from moe_kernels.kernels.hopper.gluon_names import aggregate, tma_load
from moe_kernels.kernels.hopper.mainloop import Operands, load_columns, low_rank_blocks
from moe_kernels.kernels.hopper.ring import (
    BLOCK_M,
    CHUNK,
    COOPERATIVE,
    SWIZZLED,
    Matrix,
    RowTiles,
    accumulator_layout,
    block_layout,
    matrix,
    new_ring,
)
from moe_kernels.kernels.launch.launch import launch
from moe_kernels.kernels.triton.round import in_order
from moe_kernels.layer import GemmRows, Weight
from moe_kernels.packed import SIDE
from moe_kernels.routing import RoutingPlan

#: Layout of a block of codes in shared memory.
_CODES = gl.constexpr(block_layout(SIDE, 8))


@gluon.constexpr_function
def _products_layout(columns):
    """Layout of wgmma's sums of fp8 products: each thread has the elements that it has in accumulator_layout."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 32])


@aggregate
class _Scales:
    """Of rows (blocks, pitch) and weights (E, W_SCALES), for a product with ``blocks`` k blocks."""

    rows: gl.tensor
    pitch: gl.tensor
    weight: gl.tensor
    blocks: gl.tensor
    expert_stride: gl.tensor
    column_stride: gl.tensor  # from one block of 128 columns to the next
    k_stride: gl.tensor
    column_blocks: gl.tensor  # of one of the stacked parts, gate or up
    GATED: gl.constexpr

    @gluon.jit
    def of_tile(self, tile, row0, ROWS: gl.constexpr, layout: gl.constexpr):
        """Pointers to the first scales of a consumer's rows, and of its left and right columns."""
        of_rows = self.rows + row0 + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
        of_expert = self.weight + tile.expert.to(gl.int64) * self.expert_stride
        if self.GATED:
            left, right = tile.n, self.column_blocks + tile.n
        else:
            left, right = tile.n * 2, gl.minimum(tile.n * 2 + 1, self.column_blocks - 1)
        return of_rows, of_expert + left * self.column_stride, of_expert + right * self.column_stride

    @gluon.jit
    def at(self, pointers, block):
        """The scales of k block ``block``: of the rows, the left columns and the right columns."""
        rows, left, right = pointers
        block = gl.minimum(block, self.blocks - 1)
        columns = block * self.k_stride
        return gl.load(rows + block.to(gl.int64) * self.pitch), gl.load(left + columns), gl.load(right + columns)


@gluon.jit
def _producer(operands, tiles, ring, blocks, PIECES: gl.constexpr):
    """The producer warp: load the codes of every k block, and the low-rank blocks, of every tile into the ring."""
    SIDE: gl.constexpr = ring.a.shape[2]
    inner = operands.rows.width  # elements of a piece
    step = 0
    for pid in range(gl.program_id(0), tiles.count(), gl.num_programs(0)):
        tile = tiles.at(pid)
        for block in range(0, PIECES * blocks):
            ring.await_empty(step)
            a, b, ready = ring.stage(step)
            mbarrier.expect(ready, a.numel + b.numel)
            # Behind a piece's last element the rows have zeros, and the weights the next piece or TMA's zeros.
            k0 = block // blocks * inner + block % blocks * SIDE
            load_columns(operands.weight, b, ready, tile, k0, inner, operands.N, operands.GATED, False)
            tma_load(operands.rows.descriptor, [tile.row0, block * SIDE], ready, a)
            step += 1
        step = operands.load_all_low(ring, step, tile)


@gluon.jit
def _products(a, b, layout: gl.constexpr):
    """a [rows, k] times b [k, columns], in registers of their own."""
    ROWS: gl.constexpr = a.shape[0]
    COLUMNS: gl.constexpr = b.shape[1]
    nothing = gl.zeros((ROWS, COLUMNS), gl.float32, layout)
    products = warpgroup_mma(a, b, nothing, use_acc=False, is_async=True)
    return warpgroup_mma_wait(0, deps=(products,))


@gluon.jit
def _low_products(
    operands, ring, step, ROW0: gl.constexpr, ROWS: gl.constexpr, COL0: gl.constexpr, COLUMNS: gl.constexpr
):
    """Of the low-rank block of ``step``: a consumer's rows from ROW0 on, times columns from COL0 on."""
    ring.await_ready(step)
    low, factor, _ready = operands.low_stage(ring, step)
    if not operands.LOW_IS_KN:
        factor = factor.permute((1, 0))
    return _products(low.slice(ROW0, ROWS), factor.slice(COL0, COLUMNS, dim=1), accumulator_layout(COLUMNS))


@gluon.jit
def _consumer(WARPGROUP: gl.constexpr, buffers, epilogue, operands, scales, tiles, ring):
    """A consumer warpgroup: multiply the codes in the ring and add the products, then run the tile's epilogue."""
    HALF: gl.constexpr = ring.b.shape[1] // 2
    ROWS: gl.constexpr = buffers.shape[1]
    ROW0: gl.constexpr = WARPGROUP * ROWS
    layout: gl.constexpr = _products_layout(HALF)
    # LOW_BLOCKS as a number that the compiler does not know: it keeps the loops over them apart. In one, the products
    # of both halves are alive at the same time.
    low_blocks = gl.minimum(operands.rows.width, operands.LOW_BLOCKS)
    step = 0
    if gl.program_id(0) < tiles.count():
        tile = tiles.at(gl.program_id(0))
        first = scales.at(scales.of_tile(tile, tile.row0 + ROW0, ROWS, layout), 0)
        for pid in range(gl.program_id(0), tiles.count(), gl.num_programs(0)):
            row0 = tile.row0 + ROW0
            pointers = scales.of_tile(tile, row0, ROWS, layout)
            left = gl.zeros((ROWS, HALF), gl.float32, layout)
            right = gl.zeros((ROWS, HALF), gl.float32, layout)
            next_rows, next_left, next_right = first
            for block in range(0, scales.blocks):
                left_scale = next_rows * next_left.to(gl.float32)
                right_scale = next_rows * next_right.to(gl.float32)
                next_rows, next_left, next_right = scales.at(pointers, block + 1)
                ring.await_ready(step)
                a, b, _ready = ring.stage(step)
                a = a.slice(ROW0, ROWS)
                b = b.permute((1, 0))
                left += _products(a, b.slice(0, HALF, dim=1), layout) * left_scale[:, None]
                right += _products(a, b.slice(HALF, HALF, dim=1), layout) * right_scale[:, None]
                step += 1
                ring.free_before(step)
            # The next tile and its first scales, whose loads the epilogue hides.
            following = tiles.at(pid + gl.num_programs(0))
            first = scales.at(scales.of_tile(following, following.row0 + ROW0, ROWS, layout), 0)
            left = gl.convert_layout(left, accumulator_layout(HALF), assert_trivial=True)
            right = gl.convert_layout(right, accumulator_layout(HALF), assert_trivial=True)
            if operands.LOW_BLOCKS > 0:
                # wgmma does not add to the sums itself: ptxas then keeps them elsewhere in the loop, and spills.
                for block in range(0, low_blocks):
                    left += _low_products(operands, ring, step + block, ROW0, ROWS, 0, HALF)
                for block in range(0, low_blocks):
                    right += _low_products(operands, ring, step + block, ROW0, ROWS, HALF, HALF)
                    ring.free_before(step + block + 1)
                step += low_blocks
            write_tile(left, right, buffers, epilogue, tile, row0, operands.GATED)
            tile = following
    tma.store_wait(0)


@gluon.jit
def hopper_fp8_gemm_kernel(
    codes,  # (R, PIECES * blocks * SIDE) e4m3: descriptor
    row_scales_ptr,  # (PIECES * blocks, pitch) float32
    w,  # (E * Z, PIECES * K) e4m3: descriptor. Z is 2N with a gate, N without
    w_scales_ptr,
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
    K,  # elements of a piece of the inner dimension
    N,
    blocks,  # k blocks of a piece
    pitch,
    W_SCALES,  # from one expert to the next
    SCALE_N,  # from one block of columns to the next
    SCALE_K,  # from one k block to the next
    PIECES: gl.constexpr,
    SIDE: gl.constexpr,
    ACTIVATION: gl.constexpr,
    P0: gl.constexpr,
    P1: gl.constexpr,
    GATED: gl.constexpr,
    SAVE_Z: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    LOW_IS_KN: gl.constexpr,
    RANK: gl.constexpr,
    COOPERATIVE: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,  # of low-rank blocks
    GROUP_M: gl.constexpr,
    STAGES: gl.constexpr,
):
    gl.static_assert(COOPERATIVE, "both consumers share a tile")
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    ROWS: gl.constexpr = BLOCK_M // 2
    COLUMNS: gl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    ring = new_ring(codes.dtype, STAGES, (BLOCK_M, SIDE), (BLOCK_N, SIDE), 1, 2, _CODES)
    buffers0 = gl.allocate_shared_memory(dtype, [2, ROWS, CHUNK], SWIZZLED)
    buffers1 = gl.allocate_shared_memory(dtype, [2, ROWS, CHUNK], SWIZZLED)
    tiles = RowTiles(
        expert_start=expert_start_ptr, tile_expert=tile_expert_ptr, tile_row=tile_row_ptr,
        num_m=gl.load(tile_count_ptr), num_n=(N + COLUMNS - 1) // COLUMNS,
        BLOCK_M=BLOCK_M, GROUP_M=GROUP_M, WITHIN_EXPERTS=False, FULL=True,
    )  # fmt: skip
    operands = Operands(
        rows=Matrix(descriptor=codes, pointer=row_scales_ptr, width=K), weight=w, low=low, factor=factor,
        row_slot=row_slot_ptr, N=N, TOP_K=1, GATED=GATED, GATHER=False, W_IS_KN=False, LOW_IS_KN=LOW_IS_KN, RANK=RANK,
        LOW_K=min(RANK, BLOCK_K), LOW_BLOCKS=(RANK + BLOCK_K - 1) // BLOCK_K,
    )  # fmt: skip
    scales = _Scales(
        rows=row_scales_ptr, pitch=pitch, weight=w_scales_ptr, blocks=PIECES * blocks, expert_stride=W_SCALES,
        column_stride=SCALE_N, k_stride=SCALE_K, column_blocks=(N + SIDE - 1) // SIDE, GATED=GATED,
    )  # fmt: skip
    epilogue = Epilogue(
        z=Matrix(descriptor=z, pointer=z_ptr, width=2 * N if GATED else N),
        out=Matrix(descriptor=out, pointer=out_ptr, width=N), bias=bias_ptr,
        ACTIVATION=ACTIVATION, P0=P0, P1=P1, SAVE_Z=SAVE_Z, INTERLEAVED=False, HAS_BIAS=HAS_BIAS,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (_consumer, (0, buffers0, epilogue, operands, scales, tiles, ring)),
            (_consumer, (1, buffers1, epilogue, operands, scales, tiles, ring)),
            (_producer, (operands, tiles, ring, blocks, PIECES)),
        ],
        [4, 1],
        [232, 40],
    )


def fits(packed: Fp8Weight) -> bool:
    """Whether its codes can be loaded by TMA."""
    return all(t is None or t.data_ptr() % 16 == 0 for t in (packed.data, packed.transposed))


_PLAIN = {"ACTIVATION": "identity", "P0": 0.0, "P1": 0.0}


def gemm(
    rows: GemmRows,
    weight: Weight,
    plan: RoutingPlan,
    out: torch.Tensor,
    transposed: bool,
    z: torch.Tensor | None,
    gate: Gate | None,
) -> None:
    """As :data:`moe_kernels.kernels.triton.fp8.Gemm` says."""
    packed = weight.matrix
    assert isinstance(packed, Fp8Weight)
    data, pieces = packed.operand(transposed)
    gated = gate is not None and gate.gated
    width, inner = out.shape[1], data.shape[2] // pieces
    columns = COOPERATIVE.block_n // 2 if gated else COOPERATIVE.block_n
    number = plan.max_tiles * cdiv(width, columns)
    if number == 0:
        return
    codes, row_scales = in_order(rows, pieces, plan)
    low, factor, rank = low_rank_blocks(weight, columns, transposed, out)
    save_z = z is not None and z.numel() > 0
    saved = z if z is not None and save_z else out
    launch(
        hopper_fp8_gemm_kernel,
        (min(number, multiprocessors(out.device)),),
        (
            matrix(codes, BLOCK_M, SIDE, layout=_CODES.value),
            row_scales,
            matrix(data, columns, SIDE, layout=_CODES.value),
            *(packed.scales, low, factor, out if weight.bias is None else weight.bias),
            *(matrix(saved, COOPERATIVE.rows, CHUNK.value), saved),
            *(matrix(out, COOPERATIVE.rows, CHUNK.value), out),
            *plan.tile_arguments,
            *(inner, width, cdiv(inner, SIDE), row_scales.stride(1), *packed.scale_strides(transposed)),
        ),
        {
            "PIECES": pieces,
            "SIDE": SIDE,
            **(_PLAIN if gate is None else {name: gate.constants()[name] for name in _PLAIN}),
            "GATED": gated,
            "SAVE_Z": save_z,
            "HAS_BIAS": weight.bias is not None,
            "LOW_IS_KN": transposed,
            "RANK": rank,
            **COOPERATIVE.constants(),
            "num_warps": 4,
        },
    )
