"""What is kept of the runs, and what they say together: scaling, ours over stock, losses."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from moe_kernels.tools.bench.timing import Spread
from moe_kernels.tools.common.errors import UsageError
from moe_kernels.tools.common.files import read_json, write_json
from moe_kernels.tools.common.machine import environment
from moe_kernels.tools.compare.judge import smooth
from several_gpus import traffic
from several_gpus.setting import EP, ONE, OURS, STOCK, TRAINER, TRAINER_ONE, Row, Setting

# What must be the same in one file. Not the commit: unlike the kernels it changes between the parts of a measurement.
MACHINE = ("gpu", "python", "torch", "triton", "transformers", "axolotl", "sources")
# Where the newest packages lie, and how long a run may take, say nothing about what was run.
NOT_SAID = ("newest", "newest_axolotl", "timeout_s")
KEY = ("family", "engine", "experts")


def cell(family: str, engine: str, experts: str, gpus: int) -> Row:
    """What a row is about."""
    return {"family": family, "engine": engine, "experts": experts, "gpus": gpus}


def times(step_ms: Sequence[float], tokens: int) -> Row:
    """Median and spread of the timed steps, and the speed of a GPU that trains ``tokens`` in each."""
    if not step_ms:
        return {"step_ms": None, "tokens_per_s_per_gpu": None}
    spread = Spread.of(list(step_ms))
    return {"step_ms": asdict(spread), "tokens_per_s_per_gpu": 1000 * tokens / spread.median}


def summary(rows: Sequence[Row]) -> list[Row]:
    """For each family and engine: ours over stock, scaling from one GPU, and how far the losses are apart.

    Trainer's engines are measured against Trainer on one GPU, where that was run.
    """
    by = {tuple(row[name] for name in KEY): row for row in rows if row["ok"]}
    found = []
    for family, engine in dict.fromkeys((row["family"], row["engine"]) for row in rows):
        stock, ours = by.get((family, engine, STOCK)), by.get((family, engine, OURS))
        line: Row = {"family": family, "engine": engine, "speedup": None, "loss_difference": None}
        if stock and ours:
            line["speedup"] = ours["tokens_per_s_per_gpu"] / stock["tokens_per_s_per_gpu"]
            line["loss_difference"] = loss_difference(stock["losses"], ours["losses"])
        for name, row in ((STOCK, stock), (OURS, ours)):
            alone = by.get((family, ONE, name))
            if engine in (TRAINER, EP):
                alone = by.get((family, TRAINER_ONE, name), alone)
            scaled = row and alone and engine not in (ONE, TRAINER_ONE)
            line[f"efficiency_{name}"] = (
                row["tokens_per_s_per_gpu"] / alone["tokens_per_s_per_gpu"] if scaled else None
            )
        found.append(line)
    return found


def loss_difference(one: Sequence[float], other: Sequence[float]) -> float:
    """Mean distance of the smoothed curves over the mean loss."""
    steps = min(len(one), len(other))
    pairs = zip(smooth(one[:steps]), smooth(other[:steps]), strict=True)
    return statistics.fmean(abs(a - b) for a, b in pairs) / statistics.fmean(one[:steps])


def show(rows: Sequence[Row], console: Console) -> None:
    """A line for every run, and one for every pair."""
    table = Table(title="Every run", title_justify="left")
    for column in ("family", "engine", "GPUs", "experts", "step ms (p20-p80)", "tokens/s per GPU", "peak GiB",
                   "NCCL (exposed)", "busiest rank", "ran"):  # fmt: skip
        table.add_column(column)
    for row in rows:
        head = (row["family"], row["engine"], str(row["gpus"]), row["experts"])
        if not row["ok"]:
            table.add_row(*head, "[red]failed", "", "", "", "", row["error"][:80])
            continue
        ms, seen, load = row["step_ms"], traffic(row), row.get("imbalance")
        table.add_row(
            *head,
            f"{ms['median']:.1f} ({ms['p20']:.1f}-{ms['p80']:.1f})",
            f"{row['tokens_per_s_per_gpu']:,.0f}",
            "" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}",
            "" if seen is None else f"{seen.communication:.0%} ({seen.exposed:.0%})",
            "" if load is None else f"{load['mean']:.2f}",
            row["ran"][:60],
        )
    console.print(table)
    table = Table(title="Every pair", title_justify="left")
    for column in ("family", "engine", "moe_kernels faster", "scaling stock", "scaling ours", "losses apart"):
        table.add_column(column)
    for line in summary(rows):
        numbers = (line["speedup"], line[f"efficiency_{STOCK}"], line[f"efficiency_{OURS}"])
        difference = line["loss_difference"]
        table.add_row(
            line["family"],
            line["engine"],
            *("" if n is None else f"{n:.2f}" for n in numbers),
            "" if difference is None else f"{difference:.2%}",
        )
    console.print(table)


class Store:
    """The JSON file: a row is added when a run ends, and one that went well is not run again.

    A row says what it ran on; one without that is of an older version, and ran on what the file says.
    """

    def __init__(self, path: Path, setting: Setting, fresh: bool) -> None:
        self.path = path
        said = {key: value for key, value in asdict(setting).items() if key not in NOT_SAID}
        cure = "use another --json, or --fresh to measure all of it again."
        old = read_json(path, cure) if path.is_file() and not fresh else None
        here = environment()
        if old is not None:
            if not isinstance(old, dict) or old.get("kind") != "scaling":
                raise UsageError(f"{path} is no result of this program: {cure}")
            then = {key: old["setting"].get(key, getattr(Setting, key, None)) for key in said}
            then |= _machine(old["environment"])
            now = {**said, **_machine(here)}
            if apart := [f"{key} {then[key]} there, {now[key]} now" for key in now if then[key] != now[key]]:
                raise UsageError(
                    f"{path} holds runs of another kind ({'; '.join(apart)}), which one table must not mix. "
                    f"Cure: {cure}"
                )
        self.rows: list[Row] = [row for row in old["rows"] if row["ok"]] if old is not None else []
        first = here if old is None else old["environment"]
        self.report: Row = {"schema": 1, "kind": "scaling", "setting": said, "environment": first}

    def holds(self, family: str, engine: str) -> bool:
        """Both runs of a pair are there."""
        return sum(row["family"] == family and row["engine"] == engine for row in self.rows) == 2

    def add(self, row: Row) -> None:
        """Add a row, or put it in the place of an older one, and write the file."""
        self.rows = [r for r in self.rows if [r[name] for name in KEY] != [row[name] for name in KEY]]
        self.rows.append({**row, "environment": environment()})
        write_json(self.path, {**self.report, "rows": self.rows, "summary": summary(self.rows)})


def _machine(found: Row) -> Row:
    return {key: found.get(key) for key in MACHINE}
