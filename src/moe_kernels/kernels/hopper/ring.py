"""What the Hopper kernels share: the ring of stages in shared memory, the epilogue's stores, and the schedules.

Each kernel is warp-specialised: producer warps and two consumer warpgroups. The producer fills the stages of the ring
and runs ahead into the next tile. The consumers multiply with wgmma. They are cooperative (each takes half the rows
of every tile) or ping-pong (they alternate whole tiles, so that one's epilogue overlaps the other's wgmma). Each
stage has two mbarriers: ``ready`` (the producer's data has arrived) and ``empty`` (every consumer has read it).
"""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from moe_kernels.kernels.hopper.gluon_names import tma_store
from moe_kernels.kernels.operands import Descriptor
from moe_kernels.kernels.tiles import config

#: Rows per tile, and length of a k block.
BLOCK_M, BLOCK_K = 128, 64
CHUNK = gl.constexpr(64)  # columns per store of the epilogue: 128 bytes, the width of a swizzled row


@gluon.jit
def new_ring(STAGES: gl.constexpr, READY_COUNT: gl.constexpr, EMPTY_COUNT: gl.constexpr):
    """(ready, empty): the mbarriers of a ring. A phase completes after READY_COUNT or EMPTY_COUNT arrivals."""
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=READY_COUNT)
        mbarrier.init(empty.index(i), count=EMPTY_COUNT)
    fence_async_shared()
    return ready, empty


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
    """Ping-pong: before the mainloop of this consumer's ``tile``-th tile, wait for the other's mainloop to end.

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
def put(values, buffer):
    """Store values [rows, columns], in the accumulator's layout, to the shared memory of ``buffer``."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, buffer.shape[1], 16])
    buffer.store(gl.convert_layout(values.to(buffer.dtype), layout, assert_trivial=True))


@gluon.jit
def store_masked(buffer, out_ptr, row0, row_end, col0, width):
    """Copy the rows below row_end of ``buffer`` to (row0, col0) of a (., width) tensor, by masked st.global."""
    COLUMNS: gl.constexpr = buffer.shape[1]
    coalesced: gl.constexpr = gl.BlockedLayout([1, 8], [256 // COLUMNS, COLUMNS // 8], [4, 1], [1, 0])
    rows = row0 + gl.arange(0, buffer.shape[0], gl.SliceLayout(1, coalesced))
    cols = col0 + gl.arange(0, COLUMNS, gl.SliceLayout(0, coalesced))
    pointers = out_ptr + rows.to(gl.int64)[:, None] * width + cols[None, :]
    gl.store(pointers, buffer.load(coalesced), mask=(rows < row_end)[:, None])


@gluon.jit
def write_chunk(values, buffer, out, row, col):
    """Start a TMA store of values [rows, CHUNK] to (row, col) of the descriptor ``out``, through ``buffer``.

    Callers alternate between two buffers, so ``buffer`` is free once at most one store is in flight.
    """
    tma.store_wait(1)
    put(values, buffer)
    fence_async_shared()
    tma_store(out, [row, col], buffer)


# --------------------------------------------------------------------------------------------------- host side
_SWIZZLED = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


@dataclass(frozen=True)
class Schedule:
    """Tile shape and warp schedule of a kernel.

    Attributes:
        cooperative: True: both consumer warpgroups share a tile; False: ping-pong.
        block_n: columns per tile.
        stages: of the ring.
        group_m: row tiles that are visited together for each block of columns, for L2 reuse of the weights.
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
_overrides: dict[str, Schedule] = {}


def schedule_of(kernel: str, depth: int, device: torch.device) -> Schedule:
    """The schedule of ``kernel`` ("up", "down" or "dgrad") for K = ``depth`` on ``device``.

    Ping-pong hides the epilogue, which pays where tiles have few k blocks. But its tiles have half the columns, so
    rows are read twice as often; on an H100 that costs more than it gains
    (benchmarks/results/h*00-log-9-epilogues.json).
    """
    if kernel in _overrides:
        return _overrides[kernel]
    return PING_PONG if kernel != "up" and depth <= _PING_PONG_MAX_K and has_fast_memory(device) else COOPERATIVE


@functools.cache
def has_fast_memory(device: torch.device) -> bool:
    """Whether this is an H200 or GH200, whose memory is 1.4 times as fast as an H100's."""
    return device.type == "cuda" and "H200" in torch.cuda.get_device_name(device)


@contextlib.contextmanager
def use_schedule(kernel: str, schedule: Schedule) -> Iterator[None]:
    """Within this context ``kernel`` uses ``schedule``: for measuring candidates and for tests, not for training."""
    with config.override(_overrides, kernel, schedule):
        yield


def matrix(tensor: torch.Tensor, *block: int, layout: gl.NVMMASharedLayout = _SWIZZLED) -> Descriptor:
    """TMA descriptor of a contiguous tensor as a matrix; all dimensions but the last are its rows."""
    return Descriptor(tensor.view(-1, tensor.shape[-1]), block, layout)
