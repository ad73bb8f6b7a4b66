"""What router telemetry costs a training step: one training in which it goes off and on every few steps.

    python benchmarks/telemetry_cost.py deepseek-v3 --json benchmarks/results/telemetry-deepseek-v3.json

The trainer logs every step, and telemetry reads its counters whenever the trainer logs: the dearest case. It also
waits for the device every step, so that a step's time holds all that telemetry did in it and nothing of the step
before. In every four steps telemetry is on in the inner two or in the outer two, as drawn beforehand: a drift of the
clocks cancels, whatever comes every so many steps hits both alike, and four steps are too short for the slow changes
that an earlier method, blocks of ten steps, took for a cost. Printed is the median of these differences in percent of
a step with its 95% interval (of ranks, no distribution assumed), both with the mean of what its file takes, and the
time that the host spent in telemetry's own code, which is the cost where the host is what a step waits for.

About 100 seconds for the 1B models, half of it steps. Prepares what is missing. The exit code is 0 if the interval
lies below ``--limit`` percent, 1 if it lies above, 3 if the limit is inside it: then more ``--steps`` are needed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from moe_kernels.shapes import FAMILIES
from moe_kernels.telemetry.load import FILE_NAME, read_history
from moe_kernels.tools.common.files import write_json
from moe_kernels.tools.common.machine import environment
from moe_kernels.tools.common.options import ensure_writable
from moe_kernels.tools.compare.command import prepare_missing
from moe_kernels.tools.compare.environment import versions
from moe_kernels.tools.compare.gpu import visible_gpu
from moe_kernels.tools.compare.pair import OPTIMIZED, Options, family_pair
from moe_kernels.tools.compare.runner import FINISHED, Machine, run_training
from moe_kernels.tools.prepare import tiny_overrides

GROUP = 4
SWITCH = "telemetry_switch.TelemetrySwitch"
#: What the switch leaves in the output folder: step_ms, and of the steps with telemetry these parts of them.
TIMES = "telemetry_times.json"
PARTS = ("hooks_ms", "log_ms", "write_ms")
UNDECIDED = 3


def telemetry_is_on(step: int) -> bool:
    """Whether step number ``step`` (from 0) runs with telemetry: the inner or the outer two of each four steps."""
    outer = random.Random(step // GROUP).random() < 0.5
    return (step % GROUP in (1, 2)) is not outer


def costs(step_ms: Sequence[float], warmup: int) -> list[float]:
    """Percent of a step that telemetry cost in each group of four steps.

    ``step_ms[i]`` is the time of step i from 0; groups that begin before step ``warmup`` do not count.
    """
    found = []
    for first in range(-(-warmup // GROUP) * GROUP, len(step_ms) - GROUP + 1, GROUP):
        steps = range(first, first + GROUP)
        on, off = (sum(step_ms[step] for step in steps if telemetry_is_on(step) is which) for which in (True, False))
        found.append(100 * (on / off - 1))
    return found


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Two of ``values`` between which the median of their distribution lies with at least this probability.

    The number of values below the true median is binomial, whatever the distribution.
    """
    ordered, count = sorted(values), len(values)
    below, rank = 2.0**-count, 0
    while 2 * (below + math.comb(count, rank + 1) * 2.0**-count) <= 1 - confidence:
        rank += 1
        below += math.comb(count, rank) * 2.0**-count
    return ordered[rank], ordered[count - 1 - rank]


def summary(times: dict[str, Any], warmup: int) -> dict[str, Any]:
    """What the times that the switch left say about the steps from ``warmup`` on."""
    step_ms = times["step_ms"]
    timed = range(warmup, len(step_ms))
    medians = {
        name: statistics.median(step_ms[step] for step in timed if telemetry_is_on(step) is which)
        for name, which in (("without", False), ("with", True))
    }
    own = {name: statistics.median(times[name][warmup // 2 :]) for name in PARTS}
    # Most steps write nothing, and a median would not see it: what was written is taken out and its mean added.
    own["write_ms"] = statistics.fmean(times["write_ms"][warmup // 2 :])
    unwritten = step_ms.copy()
    for step, milliseconds in zip(times["read_at"], times["write_ms"], strict=True):
        if step <= len(step_ms):  # the last has no time
            unwritten[step - 1] -= milliseconds
    writing = 100 * own["write_ms"] / medians["without"]
    percents = [percent + writing for percent in costs(unwritten, warmup)]
    return {
        "cost_percent": statistics.median(percents),
        "interval_percent": [*median_interval(percents)],
        "group_costs_percent": percents,
        "median_ms": medians,
        "own_host_ms": own,
        "step_ms": step_ms,
        "method": f"groups of {GROUP} steps, telemetry in the inner or the outer two",
    }


def main() -> int:
    """Run the training and print what the telemetry costs."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("family", choices=[*FAMILIES])
    parser.add_argument("--steps", type=int, default=420)
    parser.add_argument("--warmup-steps", type=int, default=20)
    parser.add_argument("--limit", type=float, default=1.0, help="percent of a step")
    parser.add_argument("--json", type=Path)
    wanted = parser.parse_args()
    fewest = wanted.warmup_steps + 10 * GROUP
    if wanted.steps < fewest:
        parser.error(f"--steps {wanted.steps} is too few: at least {fewest}")
    ensure_writable(wanted.json)
    console, device = Console(), visible_gpu()
    size = "1b" if device else "tiny"
    options = Options(size=size, steps=wanted.steps, warmup_steps=wanted.warmup_steps, router=False)
    pair = family_pair(wanted.family, options, tiny_overrides(wanted.family) if size == "tiny" else None)
    prepare_missing(pair, console)
    # The training imports the switch from beside this file.
    here, others = str(Path(__file__).resolve().parent), os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([here, others] if others else [here])
    base = next(run for run in pair.runs if run.role == OPTIMIZED)
    folder = base.folder.with_name("telemetry")
    # Every step of the same size, the last of an epoch too.
    changes = {"moe_router_telemetry": True, "output_dir": str(folder / "output"), "dataloader_drop_last": True}
    plugins = [*base.config["plugins"], SWITCH]
    run = replace(base, config=base.config | changes | {"plugins": plugins}, folder=folder)
    machine = Machine(device=device, versions=versions())
    result = run_training(run, machine, lambda progress: None)
    if result.status != FINISHED:
        console.print(f"{wanted.family} failed: {result.error}", *result.tail, sep="\n", style="red", markup=False)
        return 1
    times = json.loads(Path(run.config["output_dir"], TIMES).read_text())
    on = [step + 1 for step in range(wanted.steps) if telemetry_is_on(step)]  # as the trainer counts
    history = read_history(Path(run.config["output_dir"], FILE_NAME))
    rows = [history.sum(layer).rows for layer in range(len(history.layers))]
    wanted_rows = [len(on) * of_one_step for of_one_step in history.rows[0]]  # the first record is of one step
    if times["read_at"] != on or rows != wanted_rows:
        console.print(f"telemetry read at {times['read_at']} and counted {rows}: the switch failed", style="red")
        return 1
    found = summary(times, wanted.warmup_steps)
    low, high = found["interval_percent"]
    own, without = found["own_host_ms"], found["median_ms"]["without"]
    console.print(
        f"{wanted.family}-{size}: telemetry costs {found['cost_percent']:+.2f}% of a step (95% interval {low:+.2f}% "
        f"to {high:+.2f}%, {len(found['group_costs_percent'])} groups of {GROUP} steps); {without:.2f} ms without, "
        f"{found['median_ms']['with']:.2f} ms with. The host spends {own['hooks_ms']:.2f} ms in its hooks, "
        f"{own['log_ms']:.2f} ms in its log and {own['write_ms']:.2f} ms in its file: "
        f"{100 * sum(own.values()) / without:.2f}%",
        soft_wrap=True,
    )
    if wanted.json:
        command = " ".join(["python", "benchmarks/telemetry_cost.py", *sys.argv[1:]])
        of_what = {"family": wanted.family, "size": size}
        write_json(wanted.json, of_what | found | environment() | {"command": command})
    if low <= wanted.limit < high:
        console.print(f"not decided: {wanted.limit}% is inside the interval, so that it takes more --steps")
        return UNDECIDED
    return int(low > wanted.limit)


if __name__ == "__main__":
    sys.exit(main())
