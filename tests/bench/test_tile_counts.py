"""What docs/performance.md says of tiles is what the script computes."""

import subprocess
import sys
from pathlib import Path

import pytest

import tile_counts

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_is_up_to_date():
    script = ROOT / "benchmarks" / "tile_counts.py"
    checked = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr


def test_tiles_over_rows():
    full = [128] * tile_counts.PROGRAMS
    assert tile_counts.over_rows(full, 512, 256) == 1
    assert tile_counts.over_rows([64] * tile_counts.PROGRAMS, 512, 256) == 2
    assert tile_counts.over_rows([*full, 128], 512, 256) == pytest.approx(1.5 * 132 / 133, rel=1e-6)
    assert tile_counts.over_rows(full, 640, 256) == pytest.approx(1.2)


def test_tiles_of_weight_gradients():
    assert tile_counts.gradient_tiles([100, 1], 256, 256, (128, 256)) == [6, 6, 5, 5]
    assert tile_counts.over_gradient([128], 128, 384, (128, 256)) == pytest.approx(2 / 1.5)


def test_the_longest_program():
    times = [2, *[1] * (2 * tile_counts.PROGRAMS - 1)]
    mean = sum(times) / tile_counts.PROGRAMS
    assert tile_counts.snake(times) == pytest.approx(3 / mean)
    assert tile_counts.counter(times) == pytest.approx(3 / mean)
