"""What the Hopper kernels share: a ring of shared memory, and how two multiplying groups of warps write results.

Each kernel has three groups of warps. One loads: it fills a ring of shared memory and runs ahead into the next tile.
Two multiply with wgmma, either the upper and the lower half of every tile (COOPERATIVE), or whole tiles in turn, so
that one writes its results while the other multiplies. Each stage of the ring has two barriers: ``ready`` (filled)
and ``empty`` (read by everyone who multiplies it).
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
from moe_kernels.kernels.triton.launch import Descriptor
from moe_kernels.tuning import config

#: Rows per tile, and length of the inner blocks.
BLOCK_M, BLOCK_K = 128, 64
CHUNK = gl.constexpr(64)  # columns that are written at a time: 128 bytes, the width of a swizzled row


@gluon.jit
def new_ring(STAGES: gl.constexpr, READY_COUNT: gl.constexpr, EMPTY_COUNT: gl.constexpr):
    """(ready, empty): the barriers of a ring, which so many arrivals complete."""
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=READY_COUNT)
        mbarrier.init(empty.index(i), count=EMPTY_COUNT)
    fence_async_shared()
    return ready, empty


@gluon.jit
def new_turns():
    """The barriers of ``await_turn``. Only for kernels that wait there: where nobody does, the compiler gives their
    memory to something else, while tools that follow barriers still take it for one."""
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(turns.index(0), count=1)
    mbarrier.init(turns.index(1), count=1)
    return turns


@gluon.jit
def await_turn(turns, WARPGROUP: gl.constexpr, tile):
    """Wait, before a group multiplies the ``tile``-th tile of its own, until the other has multiplied the one before.

    A wait on the ring names the parity of a barrier's phase alone: a group that looked there before its steps are
    next would take a stage of an earlier round for its own.
    """
    mbarrier.wait(turns.index(WARPGROUP), (tile + 1 - WARPGROUP) & 1)


@gluon.jit
def pass_turn(turns, WARPGROUP: gl.constexpr):
    """After its multiplication: the other group may start, while this one writes."""
    mbarrier.arrive(turns.index(1 - WARPGROUP), count=1)


@gluon.jit
def halves(x):
    """The left and the right half of the columns of x: other registers of the same threads, nothing moves."""
    return gl.split(gl.permute(gl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@gluon.jit
def put(values, buffer):
    """Write values [rows, columns] from the accumulator's layout to ``buffer``."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, buffer.shape[1], 16])
    buffer.store(gl.convert_layout(values.to(buffer.dtype), layout, assert_trivial=True))


@gluon.jit
def store_masked(buffer, out_ptr, row0, row_end, col0, width):
    """Copy ``buffer`` to (row0, col0) of a (., width) tensor by ordinary stores: rows below row_end."""
    COLUMNS: gl.constexpr = buffer.shape[1]
    coalesced: gl.constexpr = gl.BlockedLayout([1, 8], [256 // COLUMNS, COLUMNS // 8], [4, 1], [1, 0])
    rows = row0 + gl.arange(0, buffer.shape[0], gl.SliceLayout(1, coalesced))
    cols = col0 + gl.arange(0, COLUMNS, gl.SliceLayout(0, coalesced))
    pointers = out_ptr + rows.to(gl.int64)[:, None] * width + cols[None, :]
    gl.store(pointers, buffer.load(coalesced), mask=(rows < row_end)[:, None])


@gluon.jit
def write_chunk(values, buffer, out, row, col):
    """Start to write values [rows, CHUNK] at (row, col) of the descriptor ``out`` through ``buffer``.

    Callers alternate between two buffers: the copy from this one is done when at most one other is under way.
    """
    tma.store_wait(1)
    put(values, buffer)
    fence_async_shared()
    tma_store(out, [row, col], buffer)


# --------------------------------------------------------------------------------------------------- host side
_SWIZZLED = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


@dataclass(frozen=True)
class Schedule:
    """How a kernel divides its work.

    Attributes:
        cooperative: both multiplying groups work on one tile; False: on tiles of their own, in turn.
        block_n: columns per tile.
        stages: of the ring.
        group_m: row tiles that walk all columns together, for L2 reuse of the weights.
    """

    cooperative: bool
    block_n: int
    stages: int
    group_m: int = 8

    @property
    def rows(self) -> int:
        """Rows of a tile that one group of warps multiplies and writes."""
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
_SHALLOW = 1024  # inner length up to which an H200 is better off with tiles in turn
_overrides: dict[str, Schedule] = {}


def schedule_of(kernel: str, depth: int, device: torch.device) -> Schedule:
    """The schedule of ``kernel`` ("up", "down" or "dgrad") for an inner length of ``depth`` on ``device``.

    In turn, one group of warps writes while the other multiplies, which pays where tiles have few inner blocks. But
    the rows are read twice as often, which costs an H100 more than it gains (h*00-log-9-epilogues.json among the
    results of benchmarks).
    """
    if kernel in _overrides:
        return _overrides[kernel]
    return PING_PONG if kernel != "up" and depth <= _SHALLOW and has_fast_memory(device) else COOPERATIVE


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
    """Descriptor of a contiguous tensor as a matrix: all but the last dimension are rows."""
    return Descriptor(tensor.view(-1, tensor.shape[-1]), block, layout)
