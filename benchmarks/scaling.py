"""Several GPUs of one host: what each way to use them costs, and what the kernels buy under it.

    python benchmarks/scaling.py --json benchmarks/results/h200-scaling.json      # all GPUs that are visible
    python benchmarks/scaling.py --tiny --json scaling.json       # a CPU: proves the script, not the speed

Stock experts (grouped_mm) are trained against moe_kernels: all weights of the three 1B models, Qwen3-30B-A3B with
LoRA (``qwen3-moe``) and with all weights (``qwen3-moe-full``, in as many sequences a step as fit; random weights,
drawn where a training starts). Engines, of which each family has some:

one GPU          ``axolotl train`` of the run files in configs/moe, stock on the first GPU and ours on the second, at
                 the same time.
ddp              the same on all GPUs (LoRA alone).
fsdp2            the same, sharded as in configs/moe/multi-gpu.
axolotl-ep       that, and Axolotl's expert parallelism over all GPUs. It needs Axolotl 0.20 or later, which
                 ``--newest-axolotl FOLDER`` puts in front of the path.
trainer one GPU  transformers' Trainer with the run file's batch, optimizer and steps, on one GPU.
trainer          the same, on a model that transformers shards (``DistributedConfig(fsdp_size=N)``). Like ep it needs
                 transformers 5.19 or later (5.23 to train right under ep), which ``--newest FOLDER`` puts in front of
                 the path.
ep               that, and the experts spread too (``ep_size=N``). trainer and ep differ in this alone.

Every GPU trains as many tokens a step as a single one (weak scaling): efficiency is tokens/s per GPU over those of
one GPU with the same trainer. The last two steps are profiled and not timed: NCCL's kernels, and what of their time
no other kernel hides. The router's rows are counted in the last step of warm-up: what the busiest rank would have
over the mean, were each layer's experts spread over the ranks.

The JSON is written after every run; what it holds is not run again, unless it failed or ``--fresh``. Exit code 1 if a
run failed. The ranks' code is in benchmarks/several_gpus.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path

import torch
from rich.console import Console

from moe_kernels.tools.common.errors import UsageError
from several_gpus import axolotl_runs, trainer_runs
from several_gpus.report import Store, show
from several_gpus.setting import (
    AXOLOTL_EP,
    BY_AXOLOTL,
    CELLS,
    ENGINES,
    EP,
    FSDP2,
    ONE,
    TRAINER,
    TRAINER_ONE,
    Row,
    Setting,
    cuda,
)
from several_gpus.watch import PROFILED


def run_family(
    family: str, engines: Sequence[str], setting: Setting, store: Store, console: Console, side_by_side: bool = True
) -> None:
    """What of a family the file lacks. Trainer's engines next to each other share the start of their ranks."""
    wanted = [engine for engine in engines if engine in CELLS[family] and not store.holds(family, engine)]
    for (by_axolotl, _), group in groupby(wanted, lambda engine: (engine in BY_AXOLOTL, setting.ranks(engine))):
        began = time.monotonic()
        for row in _rows(family, list(group), by_axolotl, setting, side_by_side):
            store.add(row)
            _say(console, row, began)


def _rows(
    family: str, engines: list[str], by_axolotl: bool, setting: Setting, side_by_side: bool
) -> Iterator[Row]:
    if not by_axolotl:
        yield from trainer_runs.rows(family, engines, setting)
        return
    for engine in engines:
        yield from axolotl_runs.rows(family, engine, setting, side_by_side)


def _say(console: Console, row: Row, began: float) -> None:
    outcome = f"{row['step_ms']['median']:.1f} ms a step" if row["ok"] else f"[red]failed[/red]: {row['error']}"
    console.print(f"{row['family']}, {row['engine']}, {row['experts']}: {outcome} ({time.monotonic() - began:.0f} s)")
    if not row["ok"]:
        console.print("\n".join(row["tail"][-25:]), markup=False, highlight=False)


def runnable(setting: Setting) -> list[str]:
    """The engines that this machine has what is needed for."""
    from transformers.distributed import DistributedConfig

    has_ep_size = "ep_size" in {field.name for field in dataclasses.fields(DistributedConfig)}
    missing = set()
    if not (has_ep_size or setting.newest):
        missing |= {TRAINER, EP, TRAINER_ONE}  # without the other two nobody asks for the third
    if not (has_expert_parallelism() or setting.newest_axolotl):
        missing.add(AXOLOTL_EP)
    if not cuda():
        missing |= {FSDP2, AXOLOTL_EP}  # Axolotl shards on GPUs alone
    return [engine for engine in ENGINES if engine not in missing]


def has_expert_parallelism() -> bool:
    """Whether the Axolotl that is installed has one of its own that takes any experts function."""
    try:
        return tuple(map(int, version("axolotl").split(".")[:2])) >= (0, 20)
    except PackageNotFoundError:
        return False


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default=",".join(CELLS), help="comma-separated")
    parser.add_argument("--engines", help="comma-separated, in this order; default: all that this machine can run")
    parser.add_argument(
        "--side-by-side",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="the one-GPU runs at the same time, on a GPU each",
    )
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count() or 2)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--warmup", type=int, default=10, help="steps that give no times")
    parser.add_argument("--timeout", type=float, default=300, help="seconds after which a training is stopped")
    parser.add_argument("--newest", help="folder of a transformers of 5.23 or later")
    parser.add_argument("--newest-axolotl", help="folders, as in PYTHONPATH, of an Axolotl of 0.20 or later")
    parser.add_argument("--liger", action="store_true", help="Liger on both sides; engines of Axolotl alone")
    parser.add_argument("--tiny", action="store_true", help="tiny models, on the CPU too")
    parser.add_argument("--json", type=Path, default=Path("scaling.json"))
    parser.add_argument("--fresh", action="store_true", help="run again what the file holds")
    args = parser.parse_args(arguments)
    setting = Setting(
        args.gpus, args.steps, args.warmup, args.tiny, args.timeout, args.newest, args.newest_axolotl, args.liger
    )
    families = args.families.split(",")
    for option, names, known in (
        ("--families", families, CELLS), ("--engines", (args.engines or ONE).split(","), ENGINES),
    ):  # fmt: skip
        if unknown := [name for name in names if name not in known]:
            parser.error(f"{option} {unknown[0]}: choose from {', '.join(known)}")
    if not cuda() and not args.tiny:
        parser.error("these models need NVIDIA GPUs and none is visible: --tiny runs tiny ones here")
    if args.gpus < 1 or (cuda() and args.gpus > torch.cuda.device_count()):
        parser.error(f"--gpus {args.gpus}: name at least one, and no more than are visible")
    if args.steps < args.warmup + 3 + PROFILED:
        parser.error(f"--steps {args.steps}: {PROFILED} are profiled and three are to time after {args.warmup}")
    can = [engine for engine in runnable(setting) if engine in BY_AXOLOTL or not args.liger]
    engines = args.engines.split(",") if args.engines else can
    if lacking := [engine for engine in engines if engine not in can]:
        cure = "this machine lacks what it needs (--help), or it is Trainer's, of which --liger says nothing"
        parser.error(f"--engines {lacking[0]}: {cure}")
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 170)  # else tables are cut to 80
    try:
        store = Store(args.json, setting, args.fresh)
        for family in families:
            if (reason := axolotl_runs.left_out(family, setting)) is not None:
                console.print(f"{family} is left out: {reason}")
                continue
            run_family(family, engines, setting, store, console, args.side_by_side)
    except UsageError as error:
        parser.error(str(error))
    show(store.rows, console)
    console.print(f"wrote {args.json}")
    return 0 if all(row["ok"] for row in store.rows) else 1


if __name__ == "__main__":
    sys.exit(main())
