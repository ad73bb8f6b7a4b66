"""Several GPUs of one host: what FSDP2 and expert parallelism cost there, and what the kernels buy under them.

    python benchmarks/scaling.py --json benchmarks/results/scaling.json       # two GPUs
    python benchmarks/scaling.py --tiny --json scaling.json       # a CPU: proves the script, not the speed

Each family's 1B pair is trained three ways, stock experts (grouped_mm) against moe_kernels:

one GPU    ``axolotl train`` of the run files in configs/moe, stock on the first GPU and ours on the second, at the
           same time. A single GPU shards nothing: run files without FSDP are what scaling is measured against.
fsdp2      ``axolotl train --launcher torchrun`` of those in configs/moe/multi-gpu on all GPUs.
ep         transformers' Trainer on a model that transformers spread over the GPUs, experts and all
           (``DistributedConfig(fsdp_size=N, ep_size=N)``), with the run file's batch, optimizer and steps. Axolotl
           0.19 pins a transformers whose expert parallelism trains wrong; this part needs 5.19 or later, which
           ``--newest FOLDER`` puts in front of the path.
trainer    the control of ep: the same Trainer, transformers and data, the experts sharded like all other weights
           (``fsdp_size=N`` alone). fsdp2 and ep differ in all of these, so only this one prices expert parallelism.
           It needs no GPU either: Axolotl 0.19 starts several processes on GPUs alone.

Every GPU trains as many tokens a step as a single one (weak scaling): efficiency is tokens/s per GPU over those of
one GPU. The JSON is written after every run; what it holds is not run again, unless it failed or ``--fresh``. Exit
code 1 if a run failed.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.table import Table

from moe_kernels.shapes import FAMILIES
from moe_kernels.tools.bench.timing import Spread
from moe_kernels.tools.common.errors import UsageError
from moe_kernels.tools.common.files import read_json, write_json
from moe_kernels.tools.common.machine import environment
from moe_kernels.tools.common.options import shipped
from moe_kernels.tools.common.runfile import load_yaml
from moe_kernels.tools.common.runfile import tokens_per_micro_batch as tokens_of
from moe_kernels.tools.compare.command import prepare_missing
from moe_kernels.tools.compare.environment import versions
from moe_kernels.tools.compare.judge import smooth
from moe_kernels.tools.compare.metrics import run_metrics
from moe_kernels.tools.compare.pair import CONFIG_FOLDER, Options, RunSpec, family_pair
from moe_kernels.tools.compare.runner import FINISHED, OFFLINE, Machine, run_training
from moe_kernels.tools.prepare import tiny_overrides

STOCK, OURS = "grouped_mm", "moe_kernels"
ENGINES = ONE, FSDP2, EP, TRAINER = "one GPU", "fsdp2", "ep", "trainer"
EP_FAMILIES = ("qwen2-moe", "deepseek-v3")  # eight experts of Mixtral on two GPUs are data parallelism in disguise
RUNS = Path("artifacts") / "runs" / "scaling"
# What must be the same in one file. Not the commit: unlike the kernels it changes between the parts of a measurement.
MACHINE = ("gpu", "python", "torch", "triton", "transformers", "axolotl", "sources")
# torchrun gives its ranks 30 s before it kills them.
STOP_S = 40.0
Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """What all runs share."""

    gpus: int
    steps: int
    warmup: int
    size: str
    timeout_s: float
    newest: str | None


def one_gpu_specs(family: str, setting: Setting) -> dict[str, RunSpec]:
    """The two run files of configs/moe, as `moe-kernels compare` would run them, in folders of their own."""
    options = Options(size=setting.size, steps=setting.steps, warmup_steps=setting.warmup, noise=False, router=False)
    overrides = tiny_overrides(family) if setting.size == "tiny" else None
    pair = family_pair(family, options, overrides)
    prepare_missing(pair, Console(stderr=True))
    specs = {}
    for experts, run in zip((STOCK, OURS), pair.runs, strict=True):
        folder = RUNS / f"{family}-{setting.size}-one-{experts}"
        output = {"output_dir": str(folder / "output")}
        specs[experts] = replace(run, folder=folder, overrides=run.overrides | output, config=run.config | output)
    return specs


def fsdp2_specs(family: str, setting: Setting) -> dict[str, RunSpec]:
    """The two run files of configs/moe/multi-gpu."""
    specs = {}
    for experts, suffix in ((STOCK, "-baseline"), (OURS, "")):
        source = shipped(CONFIG_FOLDER / "multi-gpu" / f"{family}-1b-fsdp2{suffix}.yml")
        folder = RUNS / f"{family}-{FSDP2}-{experts}"
        overrides = {"max_steps": setting.steps, "output_dir": str(folder / "output")}
        specs[experts] = RunSpec(
            f"{FSDP2}-{experts}", "baseline" if experts == STOCK else "optimized", source, overrides,
            {**load_yaml(source), **overrides}, folder, experts == OURS,
        )  # fmt: skip
    return specs


def axolotl_row(family: str, engine: str, experts: str, spec: RunSpec, machine: Machine, setting: Setting) -> Row:
    """Train one run file and keep its numbers."""
    result = run_training(spec, machine, lambda progress: None)
    numbers = run_metrics(result, setting.warmup)
    return {
        **_cell(family, engine, experts, 1 if engine == ONE else setting.gpus),
        "ok": result.status == FINISHED,
        "error": result.error,
        "tail": result.tail,
        "command": result.command,
        "source": os.path.relpath(spec.source),
        "overrides": spec.overrides,
        **_times(numbers.step_ms, tokens_of(spec.config)),
        "peak_gib": numbers.peak_allocated_gib,
        "startup_s": numbers.startup_s,
        "first_step_s": numbers.first_step_s,
        "losses": numbers.losses,
        "ran": result.plugin_line or "stock experts",
    }


def _cell(family: str, engine: str, experts: str, gpus: int) -> Row:
    return {"family": family, "engine": engine, "experts": experts, "gpus": gpus}


def _times(step_ms: Sequence[float], tokens: int) -> Row:
    if not step_ms:
        return {"step_ms": None, "tokens_per_s_per_gpu": None}
    spread = Spread.of(list(step_ms))
    return {"step_ms": asdict(spread), "tokens_per_s_per_gpu": 1000 * tokens / spread.median}


# --------------------------------------------------------------------------------------- transformers' own engine
def trainer_rows(family: str, engine: str, setting: Setting, spec: RunSpec) -> Iterator[Row]:
    """Both kinds of experts in one start of the ranks, on a model that transformers spread over them."""
    config, folder = spec.config, RUNS / f"{family}-{engine}"
    folder.mkdir(parents=True, exist_ok=True)
    request, answer, log = folder / "request.json", folder / "answer.json", folder / "train.log"
    answer.unlink(missing_ok=True)
    layout = {"fsdp_size": setting.gpus, **({"ep_size": setting.gpus} if engine == EP else {})}
    write_json(request, {"config": config, "steps": setting.steps, "layout": layout, "answer": str(answer),
                         "started_at": time.time()})  # fmt: skip
    paths = [path for path in (setting.newest, os.environ.get("PYTHONPATH")) if path]
    env = {**os.environ, **OFFLINE, "PYTHONPATH": os.pathsep.join(paths)}
    if not _cuda():
        env["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={setting.gpus}",
               __file__, "--worker", str(request)]  # fmt: skip
    with log.open("wb") as sink:
        problem = _torchrun(command, env, sink, 2 * setting.timeout_s)
    done = read_json(answer) if answer.is_file() else {}
    tail = log.read_text(errors="replace").splitlines()[-60:]
    for experts in (STOCK, OURS):
        row = {**_cell(family, engine, experts, setting.gpus), "source": os.path.relpath(spec.source)}
        shown = ["torchrun", *command[3:5], "benchmarks/scaling.py", "--worker", str(request)]
        if experts not in done:
            yield {**row, "ok": False, "error": problem or "no answer", "tail": tail, "command": shown}
            continue
        found = done[experts]
        yield {
            **row,
            "ok": True,
            "error": "",
            "command": shown,
            **_times(found["step_ms"][setting.warmup :], tokens_of(config)),
            **{key: found[key] for key in ("peak_gib", "startup_s", "losses", "ran", "versions", "settings", "held")},
        }


def _torchrun(command: Sequence[str], env: dict[str, str], sink: IO[bytes], timeout_s: float) -> str:
    """Run the ranks; what went wrong, or nothing.

    Killing torchrun leaves its ranks on the GPUs, each being a session of its own, and they would slow what is
    measured next: it is asked to end, and ends them.
    """
    child = subprocess.Popen(command, env=env, stdout=sink, stderr=subprocess.STDOUT)
    try:
        code = child.wait(timeout_s)
        return f"exit code {code}" if code else ""
    except subprocess.TimeoutExpired:
        return f"stopped after {timeout_s:.0f} s"
    finally:
        if child.poll() is None:
            child.terminate()
            try:
                child.wait(STOP_S)
            except subprocess.TimeoutExpired:
                child.kill()


def work(request: Row) -> None:
    """One rank: train with either kind of experts, and let rank 0 write what was seen after each."""
    import torch
    import torch.distributed as dist
    import transformers
    from transformers.distributed import DistributedConfig

    import moe_kernels.integrations.transformers as mk
    from moe_kernels import backends

    cuda, ranks = torch.cuda.is_available(), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    mk.register(backend="auto" if cuda else "torch")
    config, steps = request["config"], request["steps"]
    data = token_blocks(config, steps * ranks * int(config["micro_batch_size"]))
    layout = request["layout"]
    answer: Row = {}

    class Watch(transformers.TrainerCallback):
        def __init__(self) -> None:
            self.at: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if cuda:
                torch.cuda.synchronize()
            self.at.append(time.perf_counter())

    for experts in (STOCK, OURS):
        backends.reset_dispatch_counts()
        model = transformers.AutoModelForCausalLM.from_pretrained(
            config["base_model"],
            local_files_only=True,
            experts_implementation=experts,
            dtype=torch.bfloat16 if config.get("bf16") else torch.float32,
            attn_implementation=config.get("attn_implementation", "sdpa"),
            distributed_config=DistributedConfig(**layout),
        )
        if experts == OURS:
            mk.check_model(model)
        # Asked inside a forward pass: at rest FSDP alone has spread the experts just the same.
        held: set[int] = set()

        def look(module: Any, _: Any, held: set[int] = held) -> None:
            weight = module.gate_up_proj
            held.add(int((weight.to_local() if hasattr(weight, "to_local") else weight).shape[0]))

        _, first = next(iter(mk.experts_modules(model)))
        first.register_forward_pre_hook(look)
        watch = Watch()
        arguments = transformers.TrainingArguments(
            output_dir=str(Path(request["answer"]).parent / "output"),
            use_cpu=not cuda,
            bf16=bool(config.get("bf16")),
            per_device_train_batch_size=int(config["micro_batch_size"]),
            gradient_accumulation_steps=int(config.get("gradient_accumulation_steps") or 1),
            max_steps=steps,
            learning_rate=float(config["learning_rate"]),
            lr_scheduler_type=config["lr_scheduler"],
            warmup_steps=int(config.get("warmup_steps") or 0),
            weight_decay=float(config["weight_decay"]),
            max_grad_norm=float(config["max_grad_norm"]),
            optim=config["optimizer"],
            seed=int(config["seed"]),
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        # The second kind of experts starts in ranks that are already there: no start-up to compare.
        startup = time.time() - request["started_at"] if experts == STOCK else None
        trainer = transformers.Trainer(model, arguments, train_dataset=data, callbacks=[watch])
        trainer.train()
        peak = torch.tensor(float(torch.cuda.max_memory_allocated()) if cuda else 0.0)
        dist.all_reduce(peak, dist.ReduceOp.MAX)
        answer[experts] = {
            # The distance to the step before; the first has none.
            "step_ms": [1000 * (b - a) for a, b in zip(watch.at[:-1], watch.at[1:], strict=True)],
            "peak_gib": float(peak) / 2**30 or None,
            "startup_s": startup,
            "losses": [float(row["loss"]) for row in trainer.state.log_history if "loss" in row],
            "ran": f"{backends.dispatch_counts()}" if experts == OURS else "stock experts",
            "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
            "settings": {"DistributedConfig": layout, "Trainer": "bf16" if config.get("bf16") else "float32"},
            "held": f"{', '.join(map(str, sorted(held)))} of {config_experts(model)} experts in a forward pass",
        }
        if dist.get_rank() == 0:
            write_json(Path(request["answer"]), answer)
        del trainer, model, first
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
        dist.barrier()
    dist.destroy_process_group()


def config_experts(model: Any) -> int:
    """E, whatever the family calls it."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    return int(next(getattr(model.config, name) for name in names if getattr(model.config, name, None)))


def token_blocks(config: Row, count: int) -> list[Row]:
    """``count`` sequences of the run file's length, cut from its text end to end."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(config["base_model"], local_files_only=True)
    length, ids = int(config["sequence_len"]), []
    with Path(config["datasets"][0]["path"]).open(encoding="utf-8") as lines:
        for line in lines:
            ids += tokenizer(json.loads(line)["text"])["input_ids"]
            if len(ids) >= count * length:
                break
    while len(ids) < count * length:
        ids += ids
    blocks = torch.tensor(ids[: count * length]).view(count, length)
    return [{"input_ids": block, "labels": block} for block in blocks]


# ------------------------------------------------------------------------------------------------------ the report
def summary(rows: Sequence[Row]) -> list[Row]:
    """For each family and engine: ours over stock, scaling from one GPU, and how far the losses are apart."""
    by = {(row["family"], row["engine"], row["experts"]): row for row in rows if row["ok"]}
    found = []
    for family, engine in dict.fromkeys((row["family"], row["engine"]) for row in rows):
        stock, ours = by.get((family, engine, STOCK)), by.get((family, engine, OURS))
        line: Row = {"family": family, "engine": engine, "speedup": None, "loss_difference": None}
        if stock and ours:
            line["speedup"] = ours["tokens_per_s_per_gpu"] / stock["tokens_per_s_per_gpu"]
            line["loss_difference"] = loss_difference(stock["losses"], ours["losses"])
        for name, row in ((STOCK, stock), (OURS, ours)):
            alone = by.get((family, ONE, name))
            line[f"efficiency_{name}"] = (
                row["tokens_per_s_per_gpu"] / alone["tokens_per_s_per_gpu"]
                if row and alone and engine != ONE
                else None
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
    for column in ("family", "engine", "GPUs", "experts", "step ms (p20-p80)", "tokens/s per GPU", "peak GiB", "ran"):
        table.add_column(column)
    for row in rows:
        head = (row["family"], row["engine"], str(row["gpus"]), row["experts"])
        if not row["ok"]:
            table.add_row(*head, "[red]failed", "", "", row["error"][:80])
            continue
        ms = row["step_ms"]
        spread = f"{ms['median']:.1f} ({ms['p20']:.1f}-{ms['p80']:.1f})"
        peak = "" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}"
        table.add_row(*head, spread, f"{row['tokens_per_s_per_gpu']:,.0f}", peak, row["ran"][:60])
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
        # Where the newest transformers lies, and how long a run may take, say nothing about what was run.
        said = {key: value for key, value in asdict(setting).items() if key not in ("newest", "timeout_s")}
        cure = "use another --json, or --fresh to measure all of it again."
        old = read_json(path, cure) if path.is_file() and not fresh else None
        here = environment()
        if old is not None:
            if not isinstance(old, dict) or old.get("kind") != "scaling":
                raise UsageError(f"{path} is no result of this program: {cure}")
            then = {**{key: old["setting"].get(key) for key in said}, **_machine(old["environment"])}
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
        key = [row[name] for name in ("family", "engine", "experts")]
        self.rows = [r for r in self.rows if [r[name] for name in ("family", "engine", "experts")] != key]
        self.rows.append({**row, "environment": environment()})
        write_json(self.path, {**self.report, "rows": self.rows, "summary": summary(self.rows)})


def _machine(found: Row) -> Row:
    return {key: found.get(key) for key in MACHINE}


def run_pair(
    family: str, engine: str, setting: Setting, store: Store, console: Console, side_by_side: bool = True
) -> None:
    """Both runs of one family under one engine."""
    began = time.monotonic()
    if engine in (EP, TRAINER):
        for row in trainer_rows(family, engine, setting, one_gpu_specs(family, setting)[STOCK]):
            store.add(row)
            _say(console, row, began)
        return
    machine = {"versions": versions(), "timeout_s": setting.timeout_s}
    if engine == FSDP2:
        one_gpu_specs(family, setting)  # makes the model and its data
        ranks = ("--launcher", "torchrun", "--", "--nproc-per-node", str(setting.gpus))
        for experts, spec in fsdp2_specs(family, setting).items():
            row = axolotl_row(family, engine, experts, spec, Machine(None, launcher=ranks, **machine), setting)
            store.add(row)
            _say(console, row, began)
        return
    together = side_by_side and setting.gpus > 1 and _cuda()

    def run(number: int, experts: str, spec: RunSpec) -> Row:
        device = str(number % setting.gpus) if _cuda() else None
        row = axolotl_row(family, engine, experts, spec, Machine(device, **machine), setting)
        return {**row, "side_by_side": together}

    # A pool, not bare threads: result() raises what a run raised.
    with ThreadPoolExecutor(2 if together else 1) as pool:
        specs = one_gpu_specs(family, setting).items()
        for ended in [pool.submit(run, number, *item) for number, item in enumerate(specs)]:
            row = ended.result()
            store.add(row)
            _say(console, row, began)


def _say(console: Console, row: Row, began: float) -> None:
    outcome = f"{row['step_ms']['median']:.1f} ms a step" if row["ok"] else f"[red]failed[/red]: {row['error']}"
    console.print(f"{row['family']}, {row['engine']}, {row['experts']}: {outcome} ({time.monotonic() - began:.0f} s)")
    if not row["ok"]:
        console.print("\n".join(row["tail"][-25:]), markup=False, highlight=False)


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default=",".join(FAMILIES), help="comma-separated")
    parser.add_argument("--engines", help="comma-separated, in this order; default: fsdp2,ep,one GPU (CPU: trainer)")
    parser.add_argument(
        "--side-by-side",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="the one-GPU runs at the same time, on a GPU each",
    )
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--warmup", type=int, default=10, help="steps that give no times")
    parser.add_argument("--timeout", type=float, default=300, help="seconds after which a training is stopped")
    parser.add_argument("--newest", help="folder of a transformers of 5.19 or later, for expert parallelism")
    parser.add_argument("--tiny", action="store_true", help="tiny models, on the CPU too")
    parser.add_argument("--json", type=Path, default=Path("scaling.json"))
    parser.add_argument("--fresh", action="store_true", help="run again what the file holds")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.worker is not None:
        work(read_json(args.worker))
        return 0
    size = "tiny" if args.tiny else "1b"
    setting = Setting(args.gpus, args.steps, args.warmup, size, args.timeout, args.newest)
    engines = args.engines.split(",") if args.engines else [FSDP2, EP, ONE] if _cuda() else [TRAINER]
    if unknown := [engine for engine in engines if engine not in ENGINES]:
        parser.error(f"--engines {unknown[0]}: choose from {', '.join(ENGINES)}")
    if unknown := [family for family in args.families.split(",") if family not in FAMILIES]:
        parser.error(f"--families {unknown[0]}: choose from {', '.join(FAMILIES)}")
    if not _cuda():
        if not args.tiny:
            parser.error("the 1B models need NVIDIA GPUs and none is visible: --tiny runs tiny ones here")
        if FSDP2 in engines:
            parser.error("Axolotl 0.19 starts several processes on GPUs alone: leave fsdp2 out of --engines")
    console = Console(highlight=False)
    try:
        store = Store(args.json, setting, args.fresh)
    except UsageError as error:
        parser.error(str(error))
    for family in args.families.split(","):
        for engine in engines:
            if (engine != EP or family in EP_FAMILIES) and not store.holds(family, engine):
                run_pair(family, engine, setting, store, console, args.side_by_side)
    show(store.rows, console)
    console.print(f"wrote {args.json}")
    return 0 if all(row["ok"] for row in store.rows) else 1


if __name__ == "__main__":
    sys.exit(main())
