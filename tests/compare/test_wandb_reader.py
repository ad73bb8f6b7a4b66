"""The reader of offline W&B runs."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from wandb_files import run_file

from moe_kernels.tools.compare.wandb_reader import NotAWandbRun, find_run, read_run

ROWS = [{"train/loss": 7.0 - i / 3, "_timestamp": 1.7e9 + i / 7, "note": "x" * (i * 50)} for i in range(60)]


def test_reads_rows_at_full_precision_across_blocks(tmp_path: Path) -> None:
    path = tmp_path / "run-abc123.wandb"
    path.write_bytes(run_file("moe-baseline", "a name", ROWS))
    assert path.stat().st_size > 2 * 32768
    run = read_run(path)
    assert (run.project, run.run_id, run.name, run.truncated) == ("moe-baseline", "abc123", "a name", False)
    assert run.history == ROWS


@pytest.mark.parametrize("cut", [10, 500, 32768, 32770, 40000, 60000])
def test_a_truncated_file_keeps_what_came_before(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "run-abc123.wandb"
    path.write_bytes(run_file("p", "n", ROWS)[:cut])
    run = read_run(path)
    assert run.truncated
    assert run.history == ROWS[: len(run.history)]
    assert len(run.history) < len(ROWS)


def test_no_cut_gives_half_a_row(tmp_path: Path) -> None:
    whole = run_file("p", "n", ROWS[:3])
    path = tmp_path / "run-abc123.wandb"
    for cut in range(len(whole) - 150, len(whole)):
        path.write_bytes(whole[:cut])
        found = read_run(path).history
        assert found == ROWS[: len(found)], cut


@pytest.mark.parametrize("left", range(10))
def test_the_end_of_a_block_is_skipped_where_no_fragment_fits(tmp_path: Path, left: int) -> None:
    path = tmp_path / "run-abc123.wandb"
    # The first row is as long as it takes for its record to end `left` bytes before the end of the block.
    length = 32768 - left - len(run_file("p", "n", [{"a": "x" * 20000}])) + 20000
    rows = [{"a": "x" * length}, {"a": 1.0}]
    assert len(run_file("p", "n", rows[:1])) == 32768 - left
    path.write_bytes(run_file("p", "n", rows))
    run = read_run(path)
    assert run.history == rows
    assert not run.truncated


def test_a_tail_of_zeros_is_a_truncation(tmp_path: Path) -> None:
    path = tmp_path / "run-abc123.wandb"
    path.write_bytes(run_file("p", "n", ROWS[:3]) + bytes(100))
    run = read_run(path)
    assert run.truncated
    assert run.history == ROWS[:3]


def test_nan_is_read_as_nan(tmp_path: Path) -> None:
    path = tmp_path / "run-abc123.wandb"
    path.write_bytes(run_file("p", "n", [{"train/loss": math.nan}]))
    assert math.isnan(read_run(path).history[0]["train/loss"])


def test_another_kind_of_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run-abc123.wandb"
    path.write_text("hello")
    with pytest.raises(NotAWandbRun, match=r"run-abc123\.wandb is not an offline W&B run"):
        read_run(path)


@pytest.mark.slow
def test_reads_what_wandb_itself_writes(tmp_path: Path) -> None:
    script = (
        "import wandb\n"
        "run = wandb.init(project='moe-baseline', name='real')\n"
        "for i in range(5): run.log({'train/loss': 1 / (i + 3), 'train/moe/expert_calls': 4})\n"
        "run.finish()\n"
    )
    env = {**os.environ, "WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}
    subprocess.run([sys.executable, "-c", script], env=env, check=True, cwd=tmp_path)
    path = find_run(tmp_path)
    assert path is not None
    run = read_run(path)
    assert (run.project, run.name, run.truncated) == ("moe-baseline", "real", False)
    assert [row["train/loss"] for row in run.history] == [1 / (i + 3) for i in range(5)]
    assert all(row["_timestamp"] > 1.7e9 for row in run.history)
