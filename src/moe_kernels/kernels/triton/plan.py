"""Step 0: the routing plan, a stable counting sort in two launches, without global atomics and without a sync.

The sorted row of slot s, routed to expert e, is ``start(e) + before(s)``: start(e) counts the slots of the experts
before e, before(s) the slots of e before s. Each program has a chunk of the slots, and processes it in blocks::

    before(s) = [in earlier chunks] + [in earlier blocks of this chunk] + [earlier in this block]

``count_kernel`` writes the histogram of each chunk. Every program of ``place_kernel`` reads all of these histograms.
Their sum gives start and the tile tables; the sum over the earlier chunks is the first term. The second term is
carried from block to block. For the third term the block is sorted by the keys ``e * BLOCK_S + position``, which are
distinct and make it a stable sort by expert. The slot at place j of the sorted block has ``j - first(e)`` slots of
its expert before it, where first is the exclusive prefix sum of the block's histogram. So its row is ::

    (start + earlier chunks + earlier blocks - first)[e] + j

which takes one look-up per slot, and neighbours in the sorted block go to neighbouring rows. Sorting takes
log2(BLOCK_S) ** 2 / 2 exchanges per slot, whatever the number of experts.

Dropped slots sort as expert E, after all others; the number of dropped slots before a slot is the number of slots
before it less the routed ones. Positions past the last slot sort as E + 1 and are not stored. All sums are integer
sums, so no result depends on an order, not even on that of the shared-memory atomics inside tl.histogram.
"""

import dataclasses
import functools

import torch
import triton
import triton.language as tl

from moe_kernels.kernels.device import cdiv
from moe_kernels.kernels.launch.launch import launch
from moe_kernels.routing import RoutingPlan

# Tunable.
_MAX_CHUNKS = 128  # programs: about one an SM, because each reads this many histograms
_BLOCK_S = 512  # slots per sort: a power of two, at least 32 * _NUM_WARPS
_NUM_WARPS = 4
_COUNTS = 2048 * _NUM_WARPS  # histogram elements per load: 64 a thread
_BLOCK_T = 32  # entries of the tile table per store
_RUNTIME_INTS = ["R", "blocks_per_chunk", "num_chunks"]


@triton.jit
def _load_experts(ids_ptr, slots, R, E: tl.constexpr):
    """The experts of a block of slots, as int32: E if the slot is dropped, E + 1 past the last slot."""
    in_range = slots < R
    ids = tl.load(ids_ptr + slots, mask=in_range, other=-1)
    experts = tl.where((ids >= 0) & (ids < E), ids, E).to(tl.int32)
    return tl.where(in_range, experts, E + 1)


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
    slots = chunk * blocks_per_chunk * BLOCK_S + tl.arange(0, BLOCK_S)
    experts = _load_experts(ids_ptr, slots, R, E)
    counts = tl.zeros((BLOCK_E,), tl.int32)
    for _ in range(blocks_per_chunk):
        slots += BLOCK_S
        following = _load_experts(ids_ptr, slots, R, E)  # prefetched while this block is counted
        counts += tl.histogram(experts, BLOCK_E, mask=experts < E)
        experts = following
    tl.store(counts_ptr + chunk * BLOCK_E + tl.arange(0, BLOCK_E), counts)


@triton.jit(do_not_specialize=_RUNTIME_INTS)
def place_kernel(
    ids_ptr,  # (R,)
    counts_ptr,  # (num_chunks, BLOCK_E)
    row_slot_ptr,  # (R,)
    slot_row_ptr,  # (R,)
    expert_start_ptr,  # (E + 1,)
    expert_order_ptr,  # (E,)
    tile_expert_ptr,  # (at least the number of tiles,)
    tile_row_ptr,
    tile_count_ptr,  # (1,)
    R,
    blocks_per_chunk,
    num_chunks,
    E: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    chunk = tl.program_id(0)
    place = tl.arange(0, BLOCK_S)
    first_slot = chunk * blocks_per_chunk * BLOCK_S
    experts = _load_experts(ids_ptr, first_slot + place, R, E)

    bins = tl.arange(0, BLOCK_E)
    total = tl.zeros((BLOCK_E,), tl.int32)
    earlier = tl.zeros((BLOCK_E,), tl.int32)
    for c0 in range(0, num_chunks, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        counts = tl.load(counts_ptr + c[:, None] * BLOCK_E + bins[None, :], mask=(c < num_chunks)[:, None], other=0)
        total += tl.sum(counts, axis=0)
        earlier += tl.sum(tl.where((c < chunk)[:, None], counts, 0), axis=0)
    start = tl.cumsum(total, axis=0) - total
    routed = tl.sum(total, axis=0)
    tiles = (total + GROUP_SIZE - 1) // GROUP_SIZE
    tile_end = tl.cumsum(tiles, axis=0)
    tile_count = tl.sum(tiles, axis=0)
    if chunk == 0:
        tl.store(expert_start_ptr + bins, start, mask=bins < E)
        tl.store(expert_start_ptr + E, routed)
        tl.store(tile_count_ptr, tile_count)
        by_rows = tl.sort(bins - total.to(tl.int64) * BLOCK_E)  # experts past E have no rows and come last
        tl.store(expert_order_ptr + bins, (by_rows & (BLOCK_E - 1)).to(tl.int32), mask=bins < E)

    # The expert of tile t is the number of experts whose tiles all end at or before t.
    row_of_tile_0 = start - (tile_end - tiles) * GROUP_SIZE  # the row of tile t, less t * GROUP_SIZE
    for t0 in range(chunk * BLOCK_T, tile_count, num_chunks * BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        expert = tl.sum((tile_end[None, :] <= t[:, None]).to(tl.int32), axis=1)
        row = tl.gather(row_of_tile_0, tl.minimum(expert, BLOCK_E - 1), axis=0) + t * GROUP_SIZE
        tl.store(tile_expert_ptr + t, expert, mask=t < tile_count)
        tl.store(tile_row_ptr + t, row, mask=t < tile_count)

    next_row = start + earlier
    routed_before = tl.sum(earlier, axis=0)
    for _ in range(blocks_per_chunk):
        following = _load_experts(ids_ptr, first_slot + BLOCK_S + place, R, E)
        key = tl.sort(experts * BLOCK_S + place)
        expert = key // BLOCK_S
        slot = first_slot + key % BLOCK_S
        counts = tl.histogram(experts, BLOCK_E, mask=experts < E)
        first = tl.cumsum(counts, axis=0) - counts
        in_block = tl.sum(counts, axis=0)
        base = tl.gather(next_row - first, tl.minimum(expert, BLOCK_E - 1), axis=0)
        base = tl.where(expert < E, base, routed + first_slot - routed_before - in_block)
        row = base + place
        tl.store(row_slot_ptr + row, slot, mask=expert <= E)
        tl.store(slot_row_ptr + slot, row, mask=expert <= E)
        next_row += counts
        routed_before += in_block
        first_slot += BLOCK_S
        experts = following


@functools.cache
def plan_blocks(experts: int) -> tuple[dict[str, int], dict[str, int], int]:
    """(block sizes of ``count_kernel``, of ``place_kernel``, warps of both). Cached: do not mutate them."""
    block_e = max(32, triton.next_power_of_2(experts))
    count = {"E": experts, "BLOCK_E": block_e, "BLOCK_S": _BLOCK_S}
    return count, count | {"BLOCK_C": max(1, _COUNTS // block_e), "BLOCK_T": _BLOCK_T}, _NUM_WARPS


def make_plan(topk_ids: torch.Tensor, experts: int, group_size: int, persistent: bool = True) -> RoutingPlan:
    """Fill a plan from topk_ids (T, K) int32 or int64, contiguous."""
    plan = RoutingPlan.empty(topk_ids, experts, group_size, persistent)
    count_blocks, place_blocks, num_warps = plan_blocks(experts)
    num_blocks = cdiv(plan.rows, count_blocks["BLOCK_S"])
    blocks_per_chunk = cdiv(num_blocks, _MAX_CHUNKS)
    num_chunks = max(1, cdiv(num_blocks, max(1, blocks_per_chunk)))
    counts = torch.empty((num_chunks, count_blocks["BLOCK_E"]), dtype=torch.int32, device=topk_ids.device)
    grid = (num_chunks,)
    launch(
        count_kernel, grid, (topk_ids, counts, plan.rows, blocks_per_chunk), {**count_blocks, "num_warps": num_warps}
    )
    launch(
        place_kernel,
        grid,
        (
            topk_ids,
            counts,
            plan.row_slot,
            plan.slot_row,
            plan.expert_start,
            plan.expert_order,
            plan.tile_expert,
            plan.tile_row,
            plan.tile_count,
            plan.rows,
            blocks_per_chunk,
            num_chunks,
        ),
        {**place_blocks, "GROUP_SIZE": group_size, "num_warps": num_warps},
    )
    return plan


@triton.jit(do_not_specialize=["first", "last"])
def part_kernel(
    expert_start_ptr,
    tile_expert_ptr,
    tile_row_ptr,
    part_expert_ptr,
    part_row_ptr,
    part_count_ptr,
    first,
    last,
    GROUP_SIZE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    e = tl.arange(0, BLOCK_E)
    start = tl.load(expert_start_ptr + e, mask=e < last, other=0)
    end = tl.load(expert_start_ptr + e + 1, mask=e < last, other=0)
    tiles = (end - start + GROUP_SIZE - 1) // GROUP_SIZE
    before = tl.sum(tl.where(e < first, tiles, 0), axis=0)
    count = tl.sum(tiles, axis=0) - before
    if tl.program_id(0) == 0:
        tl.store(part_count_ptr, count)
    for t0 in range(tl.program_id(0) * BLOCK_T, count, tl.num_programs(0) * BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        mine = t < count
        tl.store(part_expert_ptr + t, tl.load(tile_expert_ptr + before + t, mask=mine, other=0) - first, mask=mine)
        tl.store(part_row_ptr + t, tl.load(tile_row_ptr + before + t, mask=mine, other=0), mask=mine)


def part_of(plan: RoutingPlan, first: int, last: int) -> RoutingPlan:
    """The tiles of experts ``first`` to ``last`` (exclusive), numbered from 0. Rows keep their numbers."""
    size = len(plan.tile_expert)
    count, expert, row = (torch.empty(n, dtype=torch.int32, device=plan.packed.device) for n in (1, size, size))
    launch(
        part_kernel,
        (8,),
        (plan.expert_start, plan.tile_expert, plan.tile_row, expert, row, count, first, last),
        {
            "GROUP_SIZE": plan.group_size,
            "BLOCK_E": triton.next_power_of_2(plan.experts),
            "BLOCK_T": 128,
            "num_warps": 4,
        },
    )
    return dataclasses.replace(
        plan,
        expert_start=plan.expert_start[first : last + 1],
        tile_expert=expert,
        tile_row=row,
        tile_count=count,
        all_experts=plan.experts,
    )
