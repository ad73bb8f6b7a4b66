"""What router telemetry costs a training step: two trainings of one family, alike but for the key, in turn.

    python benchmarks/telemetry_cost.py mixtral --steps 60 --json benchmarks/results/telemetry-mixtral.json

Prints the median step of each and the difference in percent, with its spread. Prepares what is missing. Exit code 1
if the telemetry costs more than ``--limit`` percent of a step.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from moe_kernels.compare.command import prepare_missing
from moe_kernels.compare.environment import versions
from moe_kernels.compare.gpu import visible_gpu
from moe_kernels.compare.metrics import run_metrics
from moe_kernels.compare.plan import OPTIMIZED, Options, plan_family
from moe_kernels.compare.runner import FINISHED, Machine, run_training, write_json
from moe_kernels.prepare import tiny_overrides
from moe_kernels.shapes import FAMILIES

OFF, ON = "without", "with"


def main() -> int:
    """Run the trainings A B A B ... and print what the key costs."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("family", choices=[*FAMILIES])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--warmup-steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--limit", type=float, default=1.0, help="percent of a step")
    parser.add_argument("--json", type=Path)
    wanted = parser.parse_args()
    console, device = Console(), visible_gpu()
    size = "1b" if device else "tiny"
    options = Options(size=size, steps=wanted.steps, warmup_steps=wanted.warmup_steps, router=False)
    plan = plan_family(wanted.family, options, tiny_overrides(wanted.family) if size == "tiny" else None)
    prepare_missing(plan, console)
    machine = Machine(device=device, versions=versions())
    base = next(run for run in plan.runs if run.role == OPTIMIZED)
    step_ms: dict[str, list[float]] = {OFF: [], ON: []}
    for number in range(1, wanted.repeats + 1):
        for name, key in ((OFF, False), (ON, True)):
            folder = base.folder.with_name(f"telemetry-{name}-{number}")
            changes = {"moe_router_telemetry": key, "output_dir": str(folder / "output")}
            run = replace(base, run_id=f"{name}-{number}", config=base.config | changes, folder=folder)
            result = run_training(run, machine, lambda progress: None)
            if result.status != FINISHED:
                console.print(f"{run.run_id} failed: {result.error}", style="red")
                return 1
            times = run_metrics(result, wanted.warmup_steps).step_ms
            console.print(f"{wanted.family} {run.run_id}: {statistics.median(times):.2f} ms")
            step_ms[name] += times
    medians = {name: statistics.median(times) for name, times in step_ms.items()}
    quartiles = {name: statistics.quantiles(times, n=4) for name, times in step_ms.items()}
    cost = 100 * (medians[ON] / medians[OFF] - 1)
    console.print(
        f"{wanted.family}-{size}: {medians[OFF]:.2f} ms a step without, {medians[ON]:.2f} ms with telemetry: "
        f"{cost:+.2f}% (quartiles {quartiles[OFF][0]:.2f} to {quartiles[OFF][2]:.2f}, "
        f"{quartiles[ON][0]:.2f} to {quartiles[ON][2]:.2f})"
    )
    if wanted.json:
        report = {
            "family": wanted.family,
            "size": size,
            "cost_percent": cost,
            "median_ms": medians,
            "step_ms": step_ms,
        }
        write_json(wanted.json, report | {"versions": machine.versions, "device": device})
    return int(cost > wanted.limit)


if __name__ == "__main__":
    sys.exit(main())
