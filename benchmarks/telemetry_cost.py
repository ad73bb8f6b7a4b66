"""What router telemetry costs a training step: one training in which it goes off and on every five steps.

    python benchmarks/telemetry_cost.py mixtral --json benchmarks/results/telemetry-mixtral.json

The trainer logs every step, and telemetry reads its counters whenever the trainer logs: the dearest case. Each block
of five steps with telemetry is compared with the blocks without on either side of it, so that a drift of the clocks
cancels; the first step of a block is left out. Printed are the median of these differences in percent of a
step, their quartiles, and both medians. Prepares what is missing. Exit code 1 if the telemetry costs more than
``--limit`` percent of a step.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from moe_kernels.bench.environment import environment
from moe_kernels.compare.command import prepare_missing
from moe_kernels.compare.environment import versions
from moe_kernels.compare.gpu import visible_gpu
from moe_kernels.compare.plan import OPTIMIZED, Options, plan_family
from moe_kernels.compare.runner import FINISHED, Machine, run_training, write_json
from moe_kernels.prepare import tiny_overrides
from moe_kernels.router_load import FILE_NAME, read_history
from moe_kernels.shapes import FAMILIES

BLOCK = 5
SETTLING = 1
SWITCH = "telemetry_switch.TelemetrySwitch"


def telemetry_is_on(step: int) -> bool:
    """Whether step number ``step`` (from 0) belongs to a block with telemetry."""
    return step // BLOCK % 2 == 1


def costs(step_ms: Sequence[float], warmup: int) -> list[float]:
    """Percent of a step that telemetry cost in each block with it that lies between two without.

    ``step_ms[i]`` is the time of step i from 0; blocks that begin before step ``warmup`` do not count.
    """
    medians = {
        number: statistics.median(step_ms[number * BLOCK + SETTLING : (number + 1) * BLOCK])
        for number in range(-(-warmup // BLOCK), len(step_ms) // BLOCK)
    }
    return [
        100 * (2 * medians[number] / (medians[number - 1] + medians[number + 1]) - 1)
        for number in medians
        if telemetry_is_on(number * BLOCK) and number - 1 in medians and number + 1 in medians
    ]


def main() -> int:
    """Run the training and print what the telemetry costs."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("family", choices=[*FAMILIES])
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--warmup-steps", type=int, default=20)
    parser.add_argument("--limit", type=float, default=1.0, help="percent of a step")
    parser.add_argument("--json", type=Path)
    wanted = parser.parse_args()
    if wanted.steps < wanted.warmup_steps + 5 * BLOCK:
        parser.error(f"--steps {wanted.steps} is too few: at least {wanted.warmup_steps + 5 * BLOCK}")
    console, device = Console(), visible_gpu()
    size = "1b" if device else "tiny"
    options = Options(size=size, steps=wanted.steps, warmup_steps=wanted.warmup_steps, router=False)
    plan = plan_family(wanted.family, options, tiny_overrides(wanted.family) if size == "tiny" else None)
    prepare_missing(plan, console)
    # The training imports the switch from beside this file.
    here, others = str(Path(__file__).resolve().parent), os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([here, others] if others else [here])
    base = next(run for run in plan.runs if run.role == OPTIMIZED)
    folder = base.folder.with_name("telemetry")
    changes = {"moe_router_telemetry": True, "output_dir": str(folder / "output")}
    plugins = [*base.config["plugins"], SWITCH]
    run = replace(base, config=base.config | changes | {"plugins": plugins}, folder=folder)
    machine = Machine(device=device, versions=versions())
    result = run_training(run, machine, lambda progress: None)
    if result.status != FINISHED:
        console.print(f"{wanted.family} failed: {result.error}", *result.tail, sep="\n", style="red", markup=False)
        return 1
    counted = [step - 1 for step in read_history(Path(run.config["output_dir"], FILE_NAME)).steps]
    if counted != [step for step in range(wanted.steps) if telemetry_is_on(step)]:
        console.print(f"telemetry counted steps {counted}: the switch did not work", style="red")
        return 1
    stamps = [float(row["_timestamp"]) for row in result.rows]
    # The first step's time is not known, and no block that counts begins there.
    step_ms = [0.0, *(1000 * (after - before) for before, after in itertools.pairwise(stamps))]
    percents = costs(step_ms, wanted.warmup_steps)
    cost = statistics.median(percents)
    low, _, high = statistics.quantiles(percents, n=4)
    timed = [step for step in range(wanted.warmup_steps, wanted.steps) if step % BLOCK >= SETTLING]
    medians = {
        name: statistics.median(step_ms[step] for step in timed if telemetry_is_on(step) is on)
        for name, on in (("without", False), ("with", True))
    }
    console.print(
        f"{wanted.family}-{size}: telemetry costs {cost:+.2f}% of a step (quartiles of {len(percents)} blocks "
        f"{low:+.2f}% to {high:+.2f}%); {medians['without']:.2f} ms without, {medians['with']:.2f} ms with",
        soft_wrap=True,
    )
    if wanted.json:
        report = {
            "family": wanted.family,
            "size": size,
            "cost_percent": cost,
            "block_costs_percent": percents,
            "median_ms": medians,
            "step_ms": step_ms,
            "method": f"blocks of {BLOCK} steps, the first {SETTLING} of each left out",
        }
        command = " ".join(["python", "benchmarks/telemetry_cost.py", *sys.argv[1:]])
        write_json(wanted.json, report | environment() | {"command": command})
    return int(cost > wanted.limit)


if __name__ == "__main__":
    sys.exit(main())
