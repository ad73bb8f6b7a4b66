"""``moe-kernels compare``: train each pair, measure the layer, judge, and write the report."""

from __future__ import annotations

import importlib.util
import math
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime, timezone
from pathlib import Path
from textwrap import indent
from typing import Annotated

import typer
from packaging.version import Version
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Display

from moe_kernels.shapes import ALL_FAMILIES, FAMILIES
from moe_kernels.tools.common.errors import CHECK_FAILED, CommandError, MissingDependency, UsageError
from moe_kernels.tools.common.machine import installed_version
from moe_kernels.tools.common.options import one_of
from moe_kernels.tools.common.runfile import dump_yaml
from moe_kernels.tools.compare.comparison import Analysis, Comparison, load, number_names, save
from moe_kernels.tools.compare.environment import versions, with_commit
from moe_kernels.tools.compare.experts_bench import measure_experts
from moe_kernels.tools.compare.gpu import compute_capability, describe, visible_gpu
from moe_kernels.tools.compare.keys import check_settings
from moe_kernels.tools.compare.pair import (
    FOLDERS,
    LONGEST_NAME,
    Options,
    Pair,
    RunSpec,
    family_pair,
    files_pair,
    report_name,
)
from moe_kernels.tools.compare.report import show_comparison, show_failures, write_report
from moe_kernels.tools.compare.runner import (
    LogReader,
    Machine,
    RunResult,
    claimed,
    drop_old_tokens,
    finished_result,
    run_training,
)

REPORT_FOLDER = Path("artifacts") / "compare"
# Compute capability that transformers keeps block-fp8 for.
LEAST = (8, 9)


def compare(
    targets: Annotated[list[str] | None, typer.Argument(show_default="all")] = None,
    size: Annotated[
        str,
        typer.Option(help="1b, tiny, or auto: 1b (qwen3-moe 30b, gpt-oss 20b) with a GPU, tiny without."),
    ] = "auto",
    steps: Annotated[
        int | None, typer.Option(help="Optimizer steps of each run; the run file's own if left out.")
    ] = None,
    warmup_steps: Annotated[int, typer.Option(min=0, help="Steps at the start that give no times.")] = 10,
    repeats: Annotated[int, typer.Option(min=1, help="Run the pair this often, in turn: A B A B ...")] = 1,
    noise: Annotated[
        bool, typer.Option(help="Run the baseline once more, to know how far two equal runs differ.")
    ] = True,
    with_eager: Annotated[
        bool, typer.Option("--with-eager", help="Also run the baseline with the eager loop over experts.")
    ] = False,
    router: Annotated[
        bool, typer.Option(help="Record the load of every expert in the runs with moe-kernels, for the heat map.")
    ] = True,
    lora: Annotated[
        int,
        typer.Option(
            min=0,
            max=128,
            help="Train adapters of this rank on attention and experts, the rest frozen.",
            show_default="as the run files: 16 of qwen3-moe and gpt-oss, none of the others",
        ),
    ] = 0,
    qlora: Annotated[
        bool,
        typer.Option(
            "--qlora",
            help="With an adapter (--lora, qwen3-moe, gpt-oss): keep the frozen weights in 4 bits. Needs a GPU, "
            "bitsandbytes.",
        ),
    ] = False,
    fp8: Annotated[
        bool,
        typer.Option(
            "--fp8",
            help="With qwen3-moe: LoRA over its checkpoint in block-fp8, which our side trains as it is and the "
            "baseline dequantised by transformers.",
        ),
    ] = False,
    fp8_activations: Annotated[
        bool,
        typer.Option("--fp8-activations", help="--fp8, and our side multiplies in fp8 (moe_fp8_activations)."),
    ] = False,
    mxfp4: Annotated[
        bool, typer.Option("--mxfp4", help="With gpt-oss: the same over its checkpoint in mxfp4.")
    ] = False,
    liger: Annotated[
        bool,
        typer.Option("--liger", help="Liger's RMSNorm, RoPE and fused loss in every run. Needs a GPU, liger-kernel."),
    ] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A key of every run, such as sequence_len=4096. Repeatable."),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Run again what is finished already.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the report.", show_default="artifacts/compare/NAME")
    ] = None,
    wandb: Annotated[str, typer.Option(help="offline, or online for those with an account.")] = "offline",
    timeout: Annotated[
        float, typer.Option(min=0.1, help="Minutes after which one training, or the layer's measurement, is stopped.")
    ] = 30.0,
    keep_weights: Annotated[
        bool, typer.Option("--keep-weights", help="Keep the trained weights (2 GB a run).")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Also exit with 1 where a speed or memory claim does not hold here.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be run, and run nothing.")] = False,
    report_only: Annotated[
        bool,
        typer.Option(
            "--report-only",
            help="Train nothing: merge finished reports. The targets are their folders or JSON files.",
        ),
    ] = False,
) -> None:
    """Train each model pair with and without the kernels, and write the side-by-side report.

    TARGETS are mixtral, qwen2-moe, deepseek-v3 (all weights of 1B models) or all, which is these three; qwen3-moe and
    gpt-oss (LoRA at real size); or two Axolotl run files of your own: BASELINE.yml OPTIMIZED.yml.

    Each run is a real `axolotl train` in a process of its own. What is missing (models, tokenizer, data) is
    made first, offline. A finished run is not repeated unless its settings, a version or the kernels changed.

    Exit codes: 0 the trainings ran, with the kernels, and the losses agree; 1 one of these does not hold;
    2 wrong usage; 3 something is missing here.
    """
    console = Console(highlight=False)
    names = targets or ["all"]
    if report_only:
        comparisons = [found for target in names for found in load(Path(target))]
        number_names(comparisons)
        folder = out or REPORT_FOLDER / "-".join(found.label for found in comparisons)[:LONGEST_NAME]
        _make_folder(folder)
        for comparison in comparisons:
            comparison.versions = with_commit(comparison.versions)
            save(comparison, folder / f"{comparison.label}.json")
        raise typer.Exit(_finish(comparisons, folder, strict, console))
    if math.isnan(timeout):  # which no range of typer's refuses, and which would stop each training as it starts
        raise UsageError("--timeout is nan: name a number of minutes, or inf for no limit.")
    one_of("wandb", wandb, ("offline", "online"))
    one_of("size", size, ("auto", *dict.fromkeys(each for family in ALL_FAMILIES.values() for each in family.sizes)))
    device = visible_gpu()
    options = Options(
        size="tiny" if size == "auto" and device is None else size,
        steps=steps,
        warmup_steps=warmup_steps,
        repeats=repeats,
        noise=noise,
        with_eager=with_eager,
        wandb=wandb,
        router=router,
        lora=lora,
        qlora=qlora,
        packed=_packed(fp8 or fp8_activations, mxfp4, qlora),
        fp8_activations=fp8_activations,
        liger=liger,
        settings=tuple(settings or ()),
    )
    _check_installed(options, device)
    pairs = make_pairs(names, options)
    if size not in ("auto", "tiny") and device is None:
        raise MissingDependency(f"The {size} models need an NVIDIA GPU and none is visible. Cure: --size tiny.")
    folder = out or REPORT_FOLDER / report_name(pairs, options)
    for pair in pairs:
        _show_pair(pair, dry_run, console)
    if dry_run:
        return
    check_settings(pairs, options.settings)
    _make_folder(folder)
    machine = Machine(
        device=device,
        gpu=describe(device),
        versions=versions(),
        wandb=wandb,
        timeout_s=60 * timeout,
        keep_weights=keep_weights,
    )
    comparisons = []
    with _sigterm_as_interrupt(), ExitStack() as claims:
        for pair in pairs:  # all of them before anything is trained
            claims.enter_context(claimed(pair.folder))
        for pair in pairs:
            comparison = run_pair(pair, machine, fresh, console)
            save(comparison, folder / f"{pair.label}.json")
            comparisons.append(comparison)
            show_comparison(Analysis(comparison), console)
    raise typer.Exit(_finish(comparisons, folder, strict, console))


def _packed(fp8: bool, mxfp4: bool, qlora: bool) -> str:
    """The format of the base that the options ask for; "" for 16 bits, or 4 of QLoRA."""
    if fp8 + mxfp4 + qlora > 1:
        raise UsageError("--fp8, --mxfp4 and --qlora are three ways to keep the frozen weights. Cure: name one.")
    return "fp8" if fp8 else "mxfp4" if mxfp4 else ""


def _check_installed(options: Options, device: str | None) -> None:
    """Raise MissingDependency where an option asks for what this machine does not have."""
    if options.packed == "fp8" and Version(installed_version("transformers") or "0") < Version("5.20"):
        raise MissingDependency(
            "--fp8 needs transformers 5.20 or later: 5.16, which axolotl 0.19 pins, cannot load such a checkpoint "
            "without moe-kernels, so that there is no baseline. Cure: Python 3.12 with axolotl 0.21."
        )
    if options.qlora and device is None:
        raise MissingDependency(
            "--qlora needs an NVIDIA GPU and none is visible: Axolotl loads a 4-bit model onto one, and puts expert "
            "weights into 4 bits there alone. Cure: leave --qlora out here."
        )
    if options.fp8_activations and device is None:
        raise MissingDependency(
            "--fp8-activations needs an NVIDIA GPU and none is visible: a CPU trains in 32 bits, whose "
            "tolerances are no wider than what rounding to fp8 costs. Cure: --fp8, which rounds no activation."
        )
    if options.packed == "fp8" and device is not None and (found := compute_capability(device) or LEAST) < LEAST:
        raise MissingDependency(
            f"--fp8 needs a GPU of compute capability 8.9 or later, and this one has {'.'.join(map(str, found))}: "
            "there transformers dequantises such a checkpoint for our side too. Cure: leave --fp8 out here."
        )
    if options.qlora and importlib.util.find_spec("bitsandbytes") is None:
        raise MissingDependency("--qlora needs the package bitsandbytes: pip install bitsandbytes.")
    if options.liger and (device is None or importlib.util.find_spec("liger_kernel") is None):
        raise MissingDependency("--liger needs an NVIDIA GPU and the package liger-kernel: pip install liger-kernel.")


def make_pairs(names: list[str], options: Options) -> list[Pair]:
    """What the targets of the command line ask for.

    Raises:
        UsageError: neither families nor two files.
    """
    from moe_kernels.tools.prepare import tiny_overrides

    if len(names) == 2 and all(name.endswith((".yml", ".yaml")) for name in names):
        return [files_pair(Path(names[0]), Path(names[1]), options)]
    unknown = [name for name in names if name not in (*ALL_FAMILIES, "all")]
    if unknown:
        raise UsageError(
            f"There is nothing called {', '.join(unknown)} to compare. "
            f"Name {', '.join(ALL_FAMILIES)} or all, or a baseline and an optimised .yml file."
        )
    families = dict.fromkeys(each for name in names for each in (FAMILIES if name == "all" else [name]))
    return [family_pair(name, options, tiny_overrides(name) if options.size == "tiny" else None) for name in families]


def run_pair(pair: Pair, machine: Machine, fresh: bool, console: Console) -> Comparison:
    """Make what is missing, run every training that is not finished, measure the layer."""
    prepare_missing(pair, console)
    drop_old_tokens(pair, machine)
    comparison = Comparison(
        name=pair.name,
        size=pair.size,
        warmup_steps=pair.warmup_steps,
        yaml_diff=pair.yaml_diff,
        files=[str(pair.runs[0].source), str(pair.runs[1].source)],
        planned=[run.run_id for run in pair.runs],
        command=shlex.join(["moe-kernels", *sys.argv[1:]]),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        versions=machine.versions,
        gpu=machine.gpu,
        cpu=machine.cpu,
    )
    what, note = TextColumn("{task.description}"), TextColumn("{task.fields[note]}")
    columns = (SpinnerColumn(), what, BarColumn(), MofNCompleteColumn(), note, TimeElapsedColumn())
    with Display(*columns, console=console) as display:
        for run in pair.runs:
            comparison.runs.append(_run(pair, run, machine, fresh, display))
            if not console.is_terminal:
                # Nobody sees the live display in a log file.
                done = comparison.runs[-1]
                console.print(f"{pair.name} {run.run_id}: {done.status}, {done.ended_at - done.started_at:.0f} s")
        task = display.add_task(f"{pair.name} expert layer", total=1, note="starting")
        comparison.experts = measure_experts(pair, machine, fresh, lambda line: display.update(task, note=line[:60]))
        said = comparison.experts["error"] or comparison.experts.get("note") or "measured"
        display.update(task, completed=1, note=said)
    show_failures(comparison, console)
    return comparison


def _run(pair: Pair, run: RunSpec, machine: Machine, fresh: bool, display: Display) -> RunResult:
    task = display.add_task(f"{pair.name} {run.run_id}", total=run.steps, note="starting")
    stored = None if fresh else finished_result(run, machine)
    if stored is not None:
        display.update(task, completed=run.steps, note="finished before")
        return stored

    def show(log: LogReader) -> None:
        note = f"{log.phase}, loss {log.loss}" if log.loss else log.phase
        display.update(task, completed=log.step, note=note)

    result = run_training(run, machine, show)
    display.update(task, note="finished" if not result.error else f"[red]failed[/red], see {result.log}")
    return result


def prepare_missing(pair: Pair, console: Console) -> None:
    """Make a missing model or data set, in a process of its own so that the GPU is free afterwards."""
    if pair.family is None:
        return
    config = pair.runs[0].config
    data = [Path(dataset["path"]) for dataset in config["datasets"]]
    if (Path(config["base_model"]) / "config.json").is_file() and all(path.exists() for path in data):
        return
    console.print(f"Making {config['base_model']} and its data")
    command = [sys.executable, "-m", "moe_kernels", "prepare", Path(config["base_model"]).name]
    if subprocess.run(command, check=False).returncode != 0:
        raise CommandError(f"{shlex.join(command)} failed, see above.")


def _make_folder(folder: Path) -> None:
    """Make the report's folder before anything is trained for it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UsageError(f"{folder} cannot be the report's folder: a file is in its place. Cure: --out.") from None


def _finish(comparisons: list[Comparison], folder: Path, strict: bool, console: Console) -> int:
    analyses = [Analysis(comparison) for comparison in comparisons]
    page = write_report(analyses, folder)
    console.print(f"\nReport: {page} (also .md beside it; one .json for each comparison)", soft_wrap=True)
    sound = all(analysis.sound for analysis in analyses)
    contradicted = any(analysis.unconfirmed for analysis in analyses)
    return 0 if sound and not (strict and contradicted) else CHECK_FAILED


def _show_pair(pair: Pair, details: bool, console: Console) -> None:
    console.print(f"[bold]{pair.name}[/bold] ({pair.size}), {pair.warmup_steps} warm-up steps, in this order:")
    for run in pair.runs:
        console.print(f"  {run.run_id}: {run.source}, {run.steps} steps", soft_wrap=True)
    if not details:
        return
    console.print("  what differs between the two files:")
    console.print(indent(pair.yaml_diff, "    "), markup=False, soft_wrap=True)
    console.print("  what is changed in them for this comparison:")
    for run in pair.runs[:2]:
        shown = {key: value for key, value in run.overrides.items() if key not in FOLDERS}
        text = dump_yaml({run.role: shown} if shown else {run.role: f"nothing but {' and '.join(FOLDERS)}"})
        console.print(indent(text, "    ").rstrip(), markup=False, soft_wrap=True)


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """`kill` and `timeout` end the running child like Ctrl-C does, instead of leaving it on the GPU."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
