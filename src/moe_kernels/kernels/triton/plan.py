"""Step 0: the routing plan, a stable counting sort in two launches, without atomics and without a sync.

``count_kernel``: each program counts the experts of its chunk of slots. ``place_kernel``: each program sums the
counts of all chunks (its own base = expert start + what earlier chunks hold), then ranks its slots in order, so the
sort is stable and repeatable. It also writes expert_start and the tile tables.
"""

import functools

import torch
import triton
import triton.language as tl

from moe_kernels.kernels.triton.launch import cdiv, launch
from moe_kernels.routing import RoutingPlan

_MAX_CHUNKS = 256
_RUNTIME_INTS = ["R", "blocks_per_chunk", "num_chunks", "max_tiles"]


@triton.jit
def _one_hot(ids_ptr, slots, R, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """(one_hot [slots, BLOCK_E] int32, dropped [slots] int32) of a block of slots."""
    in_range = slots < R
    ids = tl.load(ids_ptr + slots, mask=in_range, other=-1)
    valid = (ids >= 0) & (ids < E)
    one_hot = (ids[:, None] == tl.arange(0, BLOCK_E)[None, :]) & valid[:, None]
    return one_hot.to(tl.int32), (in_range & ~valid).to(tl.int32)


@triton.jit(do_not_specialize=_RUNTIME_INTS)
def count_kernel(
    ids_ptr,  # (R,)
    counts_ptr,  # (num_chunks, BLOCK_E)
    R,
    blocks_per_chunk,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    chunk = tl.program_id(0)
    counts = tl.zeros((BLOCK_E,), tl.int32)
    for block in range(blocks_per_chunk):
        slots = (chunk * blocks_per_chunk + block) * BLOCK_S + tl.arange(0, BLOCK_S)
        one_hot, _ = _one_hot(ids_ptr, slots, R, E, BLOCK_E)
        counts += tl.sum(one_hot, axis=0)
    tl.store(counts_ptr + chunk * BLOCK_E + tl.arange(0, BLOCK_E), counts)


@triton.jit(do_not_specialize=_RUNTIME_INTS)
def place_kernel(
    ids_ptr,  # (R,)
    counts_ptr,  # (num_chunks, BLOCK_E)
    row_slot_ptr,  # (R,)
    slot_row_ptr,  # (R,)
    expert_start_ptr,  # (E + 1,)
    tile_expert_ptr,  # (>= max_tiles,)
    tile_row_ptr,
    tile_count_ptr,  # (1,)
    R,
    blocks_per_chunk,
    num_chunks,
    max_tiles,
    E: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    chunk = tl.program_id(0)
    experts = tl.arange(0, BLOCK_E)
    total = tl.zeros((BLOCK_E,), tl.int32)
    earlier = tl.zeros((BLOCK_E,), tl.int32)
    for c0 in range(0, num_chunks, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        counts = tl.load(
            counts_ptr + c[:, None] * BLOCK_E + experts[None, :], mask=(c < num_chunks)[:, None], other=0
        )
        total += tl.sum(counts, axis=0)
        earlier += tl.sum(tl.where((c < chunk)[:, None], counts, 0), axis=0)
    start = tl.cumsum(total, axis=0) - total
    routed = tl.sum(total, axis=0)

    if chunk == 0:
        tl.store(expert_start_ptr + experts, start, mask=experts < E)
        tl.store(expert_start_ptr + E, routed)

    # Tiles: a block of tile indices finds its expert by counting the experts whose tiles all come before it.
    tiles = (total + GROUP_SIZE - 1) // GROUP_SIZE
    tile_end = tl.cumsum(tiles, axis=0)
    tile_count = tl.sum(tiles, axis=0)
    if chunk == 0:
        tl.store(tile_count_ptr, tile_count)
    for t0 in range(chunk * BLOCK_T, max_tiles, num_chunks * BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        before = tile_end[None, :] <= t[:, None]
        expert = tl.sum(before.to(tl.int32), axis=1)
        first_tile = tl.max(tl.where(before, tile_end[None, :], 0), axis=1)
        first_row = tl.sum(tl.where(experts[None, :] == expert[:, None], start[None, :], 0), axis=1)
        tl.store(tile_expert_ptr + t, expert, mask=t < tile_count)
        tl.store(tile_row_ptr + t, first_row + (t - first_tile) * GROUP_SIZE, mask=t < tile_count)

    # Slots: next free row of every expert, and of the dropped ones, which go behind the last expert.
    next_row = start + earlier
    first_slot = chunk * blocks_per_chunk * BLOCK_S
    next_dropped = routed + first_slot - tl.sum(earlier, axis=0)
    for block in range(blocks_per_chunk):
        slots = first_slot + block * BLOCK_S + tl.arange(0, BLOCK_S)
        one_hot, dropped = _one_hot(ids_ptr, slots, R, E, BLOCK_E)
        rank = tl.cumsum(one_hot, axis=0) - 1 + next_row[None, :]
        row = tl.sum(tl.where(one_hot == 1, rank, 0), axis=1)
        row = tl.where(dropped == 1, next_dropped + tl.cumsum(dropped, axis=0) - 1, row)
        tl.store(slot_row_ptr + slots, row, mask=slots < R)
        tl.store(row_slot_ptr + row, slots, mask=slots < R)
        next_row += tl.sum(one_hot, axis=0)
        next_dropped += tl.sum(dropped, axis=0)


@functools.cache
def plan_blocks(experts: int) -> tuple[dict[str, int], int]:
    """(block sizes that both kernels take, not to be changed; warps): 4096 one-hot elements in a block of slots."""
    block_e = max(16, triton.next_power_of_2(experts))
    return {"E": experts, "BLOCK_E": block_e, "BLOCK_S": max(16, 4096 // block_e)}, 4 if block_e < 256 else 8


def make_plan(topk_ids: torch.Tensor, experts: int, group_size: int) -> RoutingPlan:
    """Fill a plan from topk_ids (T, K) int32 or int64, contiguous."""
    tokens, top_k = topk_ids.shape
    plan = RoutingPlan.empty(tokens, top_k, experts, group_size, topk_ids.device)
    blocks, num_warps = plan_blocks(experts)
    block_e = blocks["BLOCK_E"]
    num_blocks = cdiv(plan.rows, blocks["BLOCK_S"])
    blocks_per_chunk = cdiv(num_blocks, _MAX_CHUNKS)
    num_chunks = max(1, cdiv(num_blocks, max(1, blocks_per_chunk)))
    counts = torch.empty((num_chunks, block_e), dtype=torch.int32, device=topk_ids.device)
    grid = (num_chunks,)
    options = {**blocks, "num_warps": num_warps}
    launch(count_kernel, grid, (topk_ids, counts, plan.rows, blocks_per_chunk), options)
    launch(
        place_kernel,
        grid,
        (
            topk_ids,
            counts,
            plan.row_slot,
            plan.slot_row,
            plan.expert_start,
            plan.tile_expert,
            plan.tile_row,
            plan.tile_count,
            plan.rows,
            blocks_per_chunk,
            num_chunks,
            plan.max_tiles,
        ),
        {
            **blocks,
            "GROUP_SIZE": group_size,
            "BLOCK_C": max(1, 4096 // block_e),
            "BLOCK_T": 16,
            "num_warps": num_warps,
        },
    )
    return plan
