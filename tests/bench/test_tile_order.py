"""The model of the order of tiles: every tile once, and the less read the more is shared."""

import dataclasses
import math

import pytest

import tile_order
from moe_kernels.shapes import LAYERS

COUNTS = [0, 1, 64, 65, 300, 2500, 128]
SMALL = dataclasses.replace(LAYERS["deepseek-v3"], tokens=512, hidden=1024, intermediate=512, experts=16)


@pytest.mark.parametrize("group_m", [1, 8])
@pytest.mark.parametrize("order", tile_order.ORDERS)
def test_every_row_and_column_once(order, group_m):
    width = 128 if order == "tall" else 256
    rows = dict.fromkeys(range(len(COUNTS)), 0)
    seen = set()
    for tile in tile_order.tiles(order, COUNTS, 768, group_m):
        assert (tile.rows, tile.column) not in seen
        assert 1 <= tile.blocks <= (4 if order == "tall" else 2)
        seen.add((tile.rows, tile.column))
        rows[tile.expert] += tile.blocks
    blocks = [math.ceil(count / 64) for count in COUNTS]
    whole = blocks if order in ("half", "tall") else [2 * math.ceil(count / 2) for count in blocks]
    assert list(rows.values()) == [count * 768 // width for count in whole]


def test_what_l2_holds_is_read_once(monkeypatch):
    monkeypatch.setattr(tile_order, "L2_BYTES", math.inf)
    found = tile_order.up(SMALL, "within")
    tiles = {tile.rows for tile in tile_order.tiles("within", tile_order.rows_of_experts(SMALL), 1024, 8)}
    once = 2 * 1024 * (16 * 1024 + 128 * len(tiles))
    assert found["read_gb"] == pytest.approx(once / 1e9)
    assert found["products_ms"] < found["ms"]
    monkeypatch.setattr(tile_order, "L2_BYTES", 0)
    assert tile_order.up(SMALL, "within")["read_gb"] == pytest.approx(found["asked_gb"])
