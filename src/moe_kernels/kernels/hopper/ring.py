"""What the Hopper kernels share: the ring of stages in shared memory, the epilogue's stores, and the schedules.

Each kernel is warp-specialised: producer warps and two consumer warpgroups. The producer fills the stages of the ring
and runs ahead into the next tile. The consumers multiply with wgmma. They are cooperative (each takes half the rows
of every tile) or ping-pong (they alternate whole tiles, so that one's epilogue overlaps the other's wgmma). Each
stage has two mbarriers: ``ready`` (the producer's data has arrived) and ``empty`` (every consumer has read it).
"""

import contextlib
import functools
from dataclasses import dataclass

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from moe_kernels.kernels.hopper.gluon_names import aggregate, tma_store
from moe_kernels.kernels.operands import Descriptor
from moe_kernels.kernels.tiles.config import Override
from moe_kernels.kernels.triton.tile import swizzled_tile
from moe_kernels.routing import RoutingPlan

#: Rows per tile, and length of a k block.
BLOCK_M, BLOCK_K = 128, 64
CHUNK = gl.constexpr(64)  # columns per store of the epilogue: 128 bytes, the width of a swizzled row
#: Layout of a block in shared memory, as TMA and wgmma know it.
SWIZZLED = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))


@gluon.constexpr_function
def block_layout(columns, bits=16):
    """Layout in shared memory of a block, rows of so many columns, 32 to 128 bytes: SWIZZLED for 64 of 16 bits."""
    return gl.NVMMASharedLayout(swizzle_byte_width=columns * bits // 8, element_bitwidth=bits, rank=2)


@gluon.constexpr_function
def accumulator_layout(columns):
    """Layout of wgmma's accumulator [rows, columns] over a warpgroup."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.constexpr_function
def copy_layout(columns):
    """Layout of a [rows, columns] block over 128 threads: 16 bytes per thread and copy, neighbours side by side."""
    return gl.BlockedLayout([1, 8], [256 // columns, columns // 8], [4, 1], [1, 0])


@aggregate
class Ring:
    """The stages of a kernel. Each holds a k block of both operands, and has the mbarriers ready and empty.

    Producer and consumers count the k blocks of their program: number ``step`` is in stage ``step % STAGES``.
    """

    a: gl.shared_memory_descriptor  # [STAGES, rows, columns]
    b: gl.shared_memory_descriptor
    ready: gl.shared_memory_descriptor  # [STAGES, 1]
    empty: gl.shared_memory_descriptor
    STAGES: gl.constexpr

    @gluon.jit
    def stage(self, step):
        """(a, b, ready) of k block ``step``: its two blocks, and the mbarrier at which their loads arrive."""
        stage = step % self.STAGES
        return self.a.index(stage), self.b.index(stage), self.ready.index(stage)

    @gluon.jit
    def await_empty(self, step):
        """Producer: wait until the stage of k block ``step`` may be filled, which at first it may."""
        mbarrier.wait(self.empty.index(step % self.STAGES), ((step // self.STAGES) & 1) ^ 1)

    @gluon.jit
    def await_ready(self, step):
        """Consumer: wait until k block ``step`` is in its stage."""
        mbarrier.wait(self.ready.index(step % self.STAGES), (step // self.STAGES) & 1)

    @gluon.jit
    def free_before(self, step):
        """Consumer: the k block before ``step`` has been read, so the producer may fill its stage."""
        mbarrier.arrive(self.empty.index((step + self.STAGES - 1) % self.STAGES), count=1)


@gluon.jit
def new_ring(
    dtype: gl.constexpr,
    STAGES: gl.constexpr,
    a,
    b,
    READY_COUNT: gl.constexpr,
    EMPTY_COUNT: gl.constexpr,
    LAYOUT: gl.constexpr = SWIZZLED,
):
    """Ring of STAGES blocks of shapes a and b.

    A phase of its mbarriers completes after READY_COUNT or EMPTY_COUNT arrivals.
    """
    a_blocks = gl.allocate_shared_memory(dtype, [STAGES, a[0], a[1]], LAYOUT)
    b_blocks = gl.allocate_shared_memory(dtype, [STAGES, b[0], b[1]], LAYOUT)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=READY_COUNT)
        mbarrier.init(empty.index(i), count=EMPTY_COUNT)
    fence_async_shared()
    return Ring(a=a_blocks, b=b_blocks, ready=ready, empty=empty, STAGES=STAGES)


@gluon.jit
def new_turns():
    """The mbarriers of ``await_turn``, for ping-pong kernels only. In a kernel that never waits on them the compiler
    reuses their memory, which tools that track mbarriers would still take for barriers."""
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(turns.index(0), count=1)
    mbarrier.init(turns.index(1), count=1)
    return turns


@gluon.jit
def await_turn(turns, WARPGROUP: gl.constexpr, tile):
    """Ping-pong: before the mainloop of this consumer's ``tile``-th tile, wait for the other to end its own.

    Waiting on the ring is not enough: ``mbarrier.wait`` knows only the parity of a phase, so a consumer that waits
    too early would take a stage of an earlier round for its own.
    """
    mbarrier.wait(turns.index(WARPGROUP), (tile + 1 - WARPGROUP) & 1)


@gluon.jit
def pass_turn(turns, WARPGROUP: gl.constexpr):
    """Ping-pong: after this consumer's mainloop, let the other start its own."""
    mbarrier.arrive(turns.index(1 - WARPGROUP), count=1)


@gluon.jit
def halves(x):
    """The left and the right half of the columns of x. Each thread keeps its registers; no data moves."""
    return gl.split(gl.permute(gl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@gluon.jit
def row_halves(x):
    """The upper and the lower half of the rows of x. Each thread keeps its registers; no data moves."""
    return gl.split(gl.permute(gl.reshape(x, (2, x.shape[0] // 2, x.shape[1])), (1, 2, 0)))


@gluon.jit
def pairs(x):
    """The even and the odd columns of x, neighbours in a thread's registers: no data moves."""
    return gl.split(gl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))


@gluon.jit
def put(values, buffer):
    """Store values [rows, columns], in the accumulator's layout, to the shared memory of ``buffer``."""
    buffer.store(gl.convert_layout(values.to(buffer.dtype), accumulator_layout(buffer.shape[1]), assert_trivial=True))


@aggregate
class Matrix:
    """A (rows, width) tensor in device memory: TMA copies whole blocks of it, and threads those that are partial."""

    descriptor: tma.tensor_descriptor | gl.tensor  # any pointer where nothing is copied by TMA
    pointer: gl.tensor
    width: gl.tensor

    @gluon.jit
    def store_masked(self, buffer, row0, row_end, col0):
        """Copy the rows of ``buffer`` that are below row_end to (row0, col0), by masked st.global."""
        COLUMNS: gl.constexpr = buffer.shape[1]
        layout: gl.constexpr = copy_layout(COLUMNS)
        rows = row0 + gl.arange(0, buffer.shape[0], gl.SliceLayout(1, layout))
        cols = col0 + gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))
        pointers = self.pointer + rows.to(gl.int64)[:, None] * self.width + cols[None, :]
        gl.store(pointers, buffer.load(layout), mask=(rows < row_end)[:, None])


@gluon.jit
def write_chunk(values, buffer, descriptor, row, col):
    """Start a TMA store of values [rows, CHUNK] to (row, col) of a matrix, through ``buffer``.

    Callers alternate between two buffers, so ``buffer`` is free once at most one store is in flight.
    """
    tma.store_wait(1)
    put(values, buffer)
    fence_async_shared()
    tma_store(descriptor, [row, col], buffer)


@aggregate
class RowTile:
    """Rows row0, row0 + 1, ... of one expert, below its row_end, and block ``n`` of the columns."""

    expert: gl.tensor
    row0: gl.tensor
    row_end: gl.tensor
    n: gl.tensor


@aggregate
class RowTiles:
    """The tiles of a GEMM over the plan's row tiles: num_m of them, times num_n blocks of columns.

    GROUP_M row tiles are visited together for each block of columns, so that the weights of that block come from L2
    for all but the first.

    WITHIN_EXPERTS: all row tiles of a group are one expert's; an expert with more than GROUP_M has several groups,
    of one size but for the last. Else the weights of an expert whose tiles two groups share are read in both.

    FULL: if an expert's last tile would be partial, move its start back until it is full, so that it needs no masked
    stores. The rows that it then shares with the tile before are computed twice, with bitwise equal results.
    """

    expert_start: gl.tensor
    tile_expert: gl.tensor
    tile_row: gl.tensor
    num_m: gl.tensor
    num_n: gl.tensor
    BLOCK_M: gl.constexpr
    GROUP_M: gl.constexpr
    WITHIN_EXPERTS: gl.constexpr
    FULL: gl.constexpr

    @gluon.jit
    def count(self):
        """How many there are."""
        return self.num_m * self.num_n

    @gluon.jit
    def at(self, number):
        """Tile ``number`` in the order in which programs take them; past the last one, the last."""
        number = gl.minimum(number, self.count() - 1)
        if self.WITHIN_EXPERTS:
            # A group of m row tiles has m * num_n numbers: this row tile is one of the group's.
            some = number // self.num_n
            expert, some_row = gl.load(self.tile_expert + some), gl.load(self.tile_row + some)
            start, row_end = gl.load(self.expert_start + expert), gl.load(self.expert_start + expert + 1)
            count = (row_end - start + self.BLOCK_M - 1) // self.BLOCK_M
            groups = (count + self.GROUP_M - 1) // self.GROUP_M
            largest = (count + groups - 1) // groups
            before = (some_row - start) // self.BLOCK_M  # row tiles of the expert before this one
            first = before // largest * largest
            in_group = number - (some - before + first) * self.num_n
            size = gl.minimum(largest, count - first)
            row0 = start + (first + in_group % size) * self.BLOCK_M
            n = in_group // size
        else:
            m, n = swizzled_tile(number, self.num_m, self.num_n, self.GROUP_M)
            expert, row0 = gl.load(self.tile_expert + m), gl.load(self.tile_row + m)
            row_end = gl.load(self.expert_start + expert + 1)
            start = row_end
            if self.FULL:
                start = gl.load(self.expert_start + expert)
        if self.FULL:
            row0 = gl.maximum(gl.minimum(row0, row_end - self.BLOCK_M), start)
        return RowTile(expert=expert, row0=row0, row_end=row_end, n=n)


# --------------------------------------------------------------------------------------------------- host side
@dataclass(frozen=True)
class Schedule:
    """Tile shape and warp schedule of a kernel.

    Attributes:
        cooperative: True: both consumer warpgroups share a tile; False: ping-pong.
        block_n: columns per tile.
        stages: of the ring.
        group_m: row tiles that are visited together for each block of columns: see ``RowTiles``.
    """

    cooperative: bool
    block_n: int
    stages: int
    group_m: int = 8

    @property
    def rows(self) -> int:
        """Rows of a tile that one consumer warpgroup multiplies and stores."""
        return BLOCK_M // 2 if self.cooperative else BLOCK_M

    def constants(self) -> dict[str, object]:
        """The kernels' compile-time arguments."""
        return {
            "COOPERATIVE": self.cooperative,
            "BLOCK_M": BLOCK_M,
            "BLOCK_N": self.block_n,
            "BLOCK_K": BLOCK_K,
            "GROUP_M": self.group_m,
            "STAGES": self.stages,
        }


COOPERATIVE = Schedule(cooperative=True, block_n=256, stages=4)
PING_PONG = Schedule(cooperative=False, block_n=128, stages=5, group_m=4)
_PING_PONG_MAX_K = 1024  # up to this K, ping-pong is faster than cooperative on an H200
_overrides: dict[str, Override[Schedule]] = {kernel: Override() for kernel in ("up", "down", "dgrad")}


#: Experts of fewer rows are bound by reading their weights. A group of eight row tiles holds several of them.
FEW_ROWS = 512


def within_experts(plan: RoutingPlan) -> bool:
    """WITHIN_EXPERTS of ``RowTiles``: where experts have few rows, so that most groups would end within one.

    Looking up a tile takes two more divisions, which costs up to 10% of a kernel whose tiles have four k blocks
    (benchmarks/results/h200-log-18-schedules.json).
    """
    return plan.rows_per_expert < FEW_ROWS if _within.choice is None else _within.choice


_within: Override[bool] = Override()
#: Within ``use_within_experts(chosen)`` it is ``chosen``: for checks and tests.
use_within_experts = _within.use


def schedule_of(kernel: str, depth: int, device: torch.device) -> Schedule:
    """The schedule of ``kernel`` ("up", "down" or "dgrad") for K = ``depth`` on ``device``.

    Ping-pong hides the epilogue, which pays where tiles have few k blocks. But its tiles have half the columns, so
    rows are read twice as often; on an H100 that costs more than it gains
    (benchmarks/results/h*00-log-9-epilogues.json).
    """
    if (chosen := _overrides[kernel].choice) is not None:
        return chosen
    return PING_PONG if kernel != "up" and depth <= _PING_PONG_MAX_K and has_fast_memory(device) else COOPERATIVE


@functools.cache
def has_fast_memory(device: torch.device) -> bool:
    """Whether this is an H200 or GH200, whose memory is 1.4 times as fast as an H100's."""
    return device.type == "cuda" and "H200" in torch.cuda.get_device_name(device)


def use_schedule(kernel: str, schedule: Schedule) -> contextlib.AbstractContextManager[None]:
    """Within this context ``kernel`` uses ``schedule``: for measuring candidates and for tests, not for training."""
    return _overrides[kernel].use(schedule)


def matrix(tensor: torch.Tensor, *block: int, layout: gl.NVMMASharedLayout = SWIZZLED.value) -> Descriptor:
    """TMA descriptor of a contiguous tensor as a matrix; all dimensions but the last are its rows."""
    return Descriptor(tensor.view(-1, tensor.shape[-1]), block, layout)
