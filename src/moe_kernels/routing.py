"""RoutingPlan: which routed row goes where.

``topk_ids`` (T, K) names K experts per token. Flat *slot* ``s = t * K + k`` is one routed row. A stable counting
sort orders the slots by expert, so that each expert's rows are contiguous. Slots whose id is outside [0, E)
(expert-parallel sentinels) sort to the tail, after the last expert, and no kernel touches them.

Worked example: T=4, K=2, E=3, topk_ids = [[1, 0], [1, 2], [0, 1], [9, 1]] (9 is a sentinel)::

    slot             0  1  2  3  4  5  6  7
    expert id        1  0  1  2  0  1  9  1
    row_slot         1  4 | 0  2  5  7 | 3 | 6      sorted row r came from slot row_slot[r]
    row's token      0  2 | 0  1  2  3 | 1 | 3      row_slot[r] // K
    slot_row         2  0  3  6  1  4  7  5         slot s went to sorted row slot_row[s]
    expert_start     [0, 2, 6, 7]                   expert e owns rows [expert_start[e], expert_start[e+1])
    expert_order     [1, 0, 2]                      the experts with most rows first

With ``group_size`` 2 rows per tile (2 for the example; 64, 128 or 256 in use)::

    tile_expert      [0, 1, 1, 2]                   a tile never straddles two experts
    tile_row         [0, 2, 4, 6]                   its first sorted row
    tile_count       [4]
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch

from moe_kernels.settings import GroupSize

AUTO_GROUP_SIZE = 0  # how "auto" crosses the custom-op boundary, where arguments have one type
_MIN_GROUP_SIZE = 64
_ALIGN = 32  # int32 elements: every field starts on 128 bytes, so that kernels are compiled for one alignment


def resolve_group_size(group_size: GroupSize, rows: int, experts: int) -> int:
    """Rows per tile: the number given, or for "auto" the tile that wastes least at ``rows / experts``.

    An expert's last tile is half empty on average, so small experts want small tiles.
    """
    if group_size not in ("auto", AUTO_GROUP_SIZE):
        return int(group_size)
    return 128 if rows >= 128 * max(experts, 1) else 64


def _aligned(n: int) -> int:
    return (n + _ALIGN - 1) // _ALIGN * _ALIGN


def _field_sizes(rows: int, experts: int) -> tuple[int, ...]:
    # The tile tables are sized for the smallest tile, so that the plan's shape depends on (T, K, E) alone.
    tiles = rows // _MIN_GROUP_SIZE + experts
    return rows, rows, experts + 1, experts, tiles, tiles, 1


@functools.lru_cache(maxsize=256)
def _layout(rows: int, experts: int, _smallest_tile: int) -> list[int]:
    """Elements of each field and of the gap behind it, alternating. The last argument is part of the key alone."""
    return [n for size in _field_sizes(rows, experts) for n in (size, _aligned(size) - size)]


def plan_elements(rows: int, experts: int) -> int:
    """Number of int32 elements of a packed plan: a function of R = T*K and E, never of the routing."""
    return sum(_aligned(n) for n in _field_sizes(rows, experts))


@dataclass(frozen=True)
class RoutingPlan:
    """Views into one packed int32 tensor; the module's docstring works an example.

    Attributes:
        packed: (plan_elements(R, E),) int32, the only tensor that is saved.
        row_slot: (R,) slot of each sorted row.
        slot_row: (R,) sorted row of each slot, the inverse of row_slot.
        expert_start: (E + 1,) first sorted row of each expert; the last entry is the number of routed rows.
        expert_order: (E,) the experts by falling number of rows, equal ones by number.
        tile_expert: (at least the number of tiles,) expert of each tile.
        tile_row: first sorted row of each tile.
        tile_count: (1,) number of tiles in use.
        top_k: K.
        group_size: rows per tile.
        persistent: kernels over these tiles run one program per multiprocessor, instead of one per tile.
        all_experts: in a plan of a part of the experts, the number of all; else 0.
    """

    packed: torch.Tensor
    row_slot: torch.Tensor
    slot_row: torch.Tensor
    expert_start: torch.Tensor
    expert_order: torch.Tensor
    tile_expert: torch.Tensor
    tile_row: torch.Tensor
    tile_count: torch.Tensor
    top_k: int
    group_size: int
    persistent: bool = True
    all_experts: int = 0

    @classmethod
    def from_packed(
        cls, packed: torch.Tensor, tokens: int, top_k: int, experts: int, group_size: int, persistent: bool = True
    ) -> RoutingPlan:
        """View a packed plan, filled or just allocated, as its fields."""
        parts = packed.split_with_sizes(_layout(tokens * top_k, experts, _MIN_GROUP_SIZE))
        row_slot, slot_row, start, order, tile_expert, tile_row, tile_count = parts[::2]
        fields = packed, row_slot, slot_row, start, order, tile_expert, tile_row, tile_count
        return cls(*fields, top_k, group_size, persistent)

    @classmethod
    def empty(cls, topk_ids: torch.Tensor, experts: int, group_size: int, persistent: bool = True) -> RoutingPlan:
        """An unfilled plan for ``topk_ids`` (T, K), on its device."""
        packed = topk_ids.new_empty(plan_elements(topk_ids.numel(), experts), dtype=torch.int32)
        tokens, top_k = topk_ids.shape
        return cls.from_packed(packed, tokens, top_k, experts, group_size, persistent)

    @property
    def rows(self) -> int:
        """R = T*K, sentinels included."""
        return self.row_slot.shape[0]

    @property
    def tile_arguments(self) -> tuple[torch.Tensor, ...]:
        """What kernels over these tiles take of the plan, in the order in which they name it."""
        return self.row_slot, self.expert_start, self.tile_expert, self.tile_row, self.tile_count

    @property
    def tokens(self) -> int:
        """T."""
        return self.rows // self.top_k

    @property
    def experts(self) -> int:
        """E."""
        return self.expert_start.shape[0] - 1

    @property
    def rows_per_expert(self) -> int:
        """The mean, rounded down."""
        return self.rows // (self.all_experts or self.experts)

    @property
    def max_tiles(self) -> int:
        """An upper bound of tile_count that is known without reading the device."""
        return self.rows // self.group_size + min(self.experts, self.rows)


class TokenRows(NamedTuple):
    """Routed rows that were not copied into expert order: sorted row r is ``tokens[row_slot[r] // top_k]``.

    Attributes:
        tokens: (T, H), or (R, H) by slot with top_k 1.
        top_k: rows of each token.
    """

    tokens: torch.Tensor
    top_k: int
