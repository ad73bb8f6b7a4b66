"""Write into docs/performance.md what the Hopper kernels' tiles compute beyond the rows' own products. Needs no GPU.

    python benchmarks/tile_counts.py [--check]

Rows an expert are drawn as `moe-kernels bench --routing mild` draws them, from another generator. A tile of a GEMM
over rows has 128 of one expert's, and the last is moved back or masked; a tile of a weight gradient runs over the
expert's rows in blocks of 64. Programs take tiles in turn, weight gradients in snake order.
"""

from __future__ import annotations

import heapq
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

import pages
from moe_kernels.backends.gluon import gathers_x
from moe_kernels.shapes import LAYERS, LayerShape
from moe_kernels.tools.bench.layer import ROUTINGS

PROGRAMS = 132  # multiprocessors of an H100 or H200
EPILOGUE = 4  # of a weight gradient's tile, in k blocks: a guess, on which little depends
COLUMNS = ("layer", "rows an expert: mean, most", "up", "down, dgrad", "down_grad", "dW2", "dW1",
           "dW2's longest program: snake order, a counter", "dW1's")  # fmt: skip


def rows_of_experts(shape: LayerShape) -> list[int]:
    """Rows of every expert, by its number."""
    generator = np.random.default_rng(0)
    logits = generator.standard_normal((shape.tokens, shape.experts), dtype=np.float32)
    logits += ROUTINGS["mild"] * generator.standard_normal(shape.experts, dtype=np.float32)
    chosen = np.argpartition(-logits, shape.top_k - 1)[:, : shape.top_k]
    return list(map(int, np.bincount(chosen.ravel(), minlength=shape.experts)))


def over_rows(counts: list[int], columns: int, block: int) -> float:
    """What a GEMM over rows multiplies, over what it must: 1 if every tile were full and every round of tiles too."""
    tiles = sum(math.ceil(rows / 128) for rows in counts) * math.ceil(columns / block)
    return math.ceil(tiles / PROGRAMS) * PROGRAMS * 128 * block / (sum(counts) * columns)


def gradient_tiles(counts: list[int], m: int, n: int, blocks: tuple[int, int]) -> list[int]:
    """The time of each tile of a weight gradient (M, N), in k blocks, those of the busiest expert first."""
    per_expert = math.ceil(m / blocks[0]) * math.ceil(n / blocks[1])
    return [math.ceil(rows / 64) + EPILOGUE for rows in counts for _ in range(per_expert)]


def over_gradient(counts: list[int], m: int, n: int, blocks: tuple[int, int]) -> float:
    """The same of a weight gradient, programs as even as they can be."""
    needed = sum(rows / 64 + EPILOGUE for rows in counts) * (m / blocks[0]) * (n / blocks[1])
    return sum(gradient_tiles(counts, m, n, blocks)) / needed


def snake(times: list[int]) -> float:
    """The longest program's time over the mean, tiles dealt in snake order."""
    ends = [0] * PROGRAMS
    for number, time in enumerate(times):
        turn, place = divmod(number, PROGRAMS)
        ends[place if turn % 2 == 0 else PROGRAMS - 1 - place] += time
    return max(ends) * PROGRAMS / sum(times)


def counter(times: list[int]) -> float:
    """The same where each program takes the next tile as it ends one."""
    ends = [0] * PROGRAMS
    for time in times:
        heapq.heapreplace(ends, ends[0] + time)
    return max(ends) * PROGRAMS / sum(times)


def line(shape: LayerShape) -> list[str]:
    """The row of one layer."""
    counts, width = sorted(rows_of_experts(shape), reverse=True), 2 * shape.intermediate
    gradients = [(shape.hidden, shape.intermediate, (128, 256)),
                 (width, shape.hidden, (256, 128) if gathers_x(width) else (128, 256))]  # fmt: skip
    orders: tuple[Callable[[list[int]], float], ...] = (snake, counter)
    return [
        shape.name,
        f"{shape.rows / shape.experts:.0f}, {counts[0]}",
        f"{over_rows(counts, width, 256):.2f}",
        f"{over_rows(counts, shape.hidden, 256):.2f}",
        f"{over_rows(counts, shape.intermediate, 128):.2f}",
        *(f"{over_gradient(counts, *sizes):.2f}" for sizes in gradients),
        *(", ".join(f"{order(gradient_tiles(counts, *sizes)):.3f}" for order in orders) for sizes in gradients),
    ]


def page(_root: Path) -> dict[str, str]:
    """docs/performance.md's table."""
    return {"docs/performance.md": pages.table(COLUMNS, [line(shape) for shape in LAYERS.values()])}


if __name__ == "__main__":
    sys.exit(pages.main(__doc__ or "", "tiles", page))
