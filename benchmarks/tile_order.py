"""What the order of tiles costs: a model of the programs of `up`, their rings, L2 and device memory. Needs no GPU.

    python benchmarks/tile_order.py --layers deepseek-v3 --out tile-order.json

Orders: "across", groups of row tiles whatever their expert; "within", of one expert; "half", as across, with last
tiles of half the rows where these are enough; "tall", within, tiles of up to four blocks of 64 rows by 128 columns.

Each program takes every 132nd tile. It loads a k block of weights and rows when the stage of four k blocks ago is
free, and multiplies it when it is there: from L2 after some cycles, from device memory when that queue has served it.
L2 drops what was touched longest ago. A few constants are guesses, so compare orders and trust no single number: of
DeepSeek-V3, counters and clocks have 23.2 GB across, 18.6 within, and 10.5 ms with half tiles
(benchmarks/results/h200-log-18-counters.json, h200-log-17-half-tiles.json).
"""

from __future__ import annotations

import argparse
import heapq
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moe_kernels.shapes import LAYERS, LayerShape
from moe_kernels.tools.common.files import write_json
from moe_kernels.tools.common.machine import environment
from tile_counts import PROGRAMS, rows_of_experts

ORDERS = ("across", "within", "half", "tall")
STAGES, BLOCK_K = 4, 64
CLOCK_HZ, MEMORY = 1.45e9, 3.9e12  # under load, as counters and copies have them; bytes a second
L2_BYTES = 30e6  # of 50 MB in two halves: a guess, as are the three below
HIT, MISS, EPILOGUE = 700, 900, 5200  # cycles


@dataclass(frozen=True)
class Tile:
    """One of ``blocks`` blocks of 64 rows; row tiles and blocks of columns are numbered over all experts."""

    expert: int
    rows: int
    column: int
    blocks: int


def tiles(order: str, counts: list[int], columns: int, group_m: int) -> Iterator[Tile]:
    """The tiles in the order in which programs take them."""
    per_tile, width = (4, 128) if order == "tall" else (2, 256)
    row_tiles: list[list[tuple[int, int]]] = []  # of each expert: (expert, blocks)
    for expert, rows in enumerate(counts):
        blocks = -(-rows // 64)
        number = -(-blocks // per_tile)
        most = -(-blocks // number) if order == "tall" and number else per_tile
        left = [min(most, blocks - i * most) for i in range(number)]
        row_tiles.append([(expert, size if order in ("half", "tall") else per_tile) for size in left])
    groups = row_tiles if order in ("within", "tall") else [[tile for of_expert in row_tiles for tile in of_expert]]
    first = 0
    for group in groups:
        even = -(-len(group) // max(1, -(-len(group) // group_m))) if order in ("within", "tall") else group_m
        for start in range(0, len(group), max(1, even)):
            part = group[start : start + even]
            for column in range(-(-columns // width)):
                for place, (expert, blocks) in enumerate(part):
                    yield Tile(expert, first + start + place, column, blocks)
        first += len(group)


class Memory:
    """L2, which drops what was touched longest ago, before device memory, which serves one load after the other."""

    def __init__(self) -> None:
        self._held: OrderedDict[tuple[int, ...], tuple[int, float]] = OrderedDict()
        self._bytes, self._free = 0, 0.0
        self.read = self.asked = 0

    def load(self, key: tuple[int, ...], size: int, now: float) -> float:
        """The cycle in which the bytes are there."""
        self.asked += size
        if key in self._held:
            self._held.move_to_end(key)
            return max(now + HIT, self._held[key][1])
        self.read += size
        return self._put(key, size, now) + MISS

    def store(self, key: tuple[int, ...], size: int, now: float) -> None:
        """Bytes that are written, and take room until then."""
        self._put(key, size, now)

    def _put(self, key: tuple[int, ...], size: int, now: float) -> float:
        self._free = max(self._free, now) + size * CLOCK_HZ / MEMORY
        self._held[key] = (size, self._free + MISS)
        self._bytes += size
        while self._bytes > L2_BYTES:
            self._bytes -= self._held.popitem(last=False)[1][0]
        return self._free


def up(shape: LayerShape, order: str, group_m: int = 8) -> dict[str, float]:
    """Milliseconds of up, those of its products alone, GB read from device memory and asked of L2."""
    work = list(tiles(order, rows_of_experts(shape), 2 * shape.intermediate, group_m))
    width = 128 if order == "tall" else 256
    k_blocks, memory = shape.hidden // BLOCK_K, Memory()
    weights = width * BLOCK_K * 2
    number, k = list(range(PROGRAMS)), [0] * PROGRAMS
    ends = [[0.0] * STAGES for _ in number]  # of the last products, per program
    waiting = [(0.0, program) for program in number if program < len(work)]
    last = 0.0
    while waiting:
        now, program = heapq.heappop(waiting)
        tile = work[number[program]]
        there = max(
            memory.load((tile.expert, tile.column, k[program]), weights, now),
            memory.load((tile.rows, k[program]), tile.blocks * 64 * BLOCK_K * 2, now),
        )
        end = max(ends[program][-1], there) + tile.blocks * width * 2
        k[program] += 1
        if k[program] == k_blocks:  # Z and A are 1.5 times the products
            memory.store((number[program],), tile.blocks * 64 * width * 3, now)
            end += EPILOGUE * tile.blocks * width / 512
            number[program] += PROGRAMS
            k[program] = 0
        ends[program] = [*ends[program][1:], end]
        last = max(last, end)
        if number[program] < len(work):
            heapq.heappush(waiting, (max(now, ends[program][0]), program))
    multiplied = sum(tile.blocks * width * 2 for tile in work) * k_blocks / PROGRAMS
    return {
        "ms": 1e3 * last / CLOCK_HZ,
        "products_ms": 1e3 * multiplied / CLOCK_HZ,
        "read_gb": memory.read / 1e9,
        "asked_gb": memory.asked / 1e9,
    }


def main() -> None:
    """Every order of every layer, each printed as it ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="deepseek-v3", help=f"of {', '.join(LAYERS)}")
    parser.add_argument("--orders", default=",".join(ORDERS), help="comma-separated")
    parser.add_argument("--group-m", default="8", help="row tiles of a group, comma-separated")
    parser.add_argument("--out", type=Path, default=Path("tile-order.json"))
    args = parser.parse_args()
    for chosen, known in ((args.layers, LAYERS), (args.orders, ORDERS)):
        if unknown := [name for name in chosen.split(",") if name not in known]:
            parser.error(f"no {', '.join(unknown)}: choose from {', '.join(known)}")
    rows = []
    for name in args.layers.split(","):
        for order in args.orders.split(","):
            for group_m in map(int, args.group_m.split(",")):
                found = {what: round(value, 3) for what, value in up(LAYERS[name], order, group_m).items()}
                rows.append({"layer": name, "order": order, "group_m": group_m, **found})
                print(*(f"{what}={value}" for what, value in rows[-1].items()), flush=True)
    write_json(args.out, {"schema": 1, "kind": "tile-order", "environment": environment(), "rows": rows})


if __name__ == "__main__":
    main()
