"""Trainings by ``axolotl train``: a run file of the repository, on one GPU or on ranks that torchrun starts."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from moe_kernels.shapes import FAMILIES
from moe_kernels.tools.common.options import shipped
from moe_kernels.tools.common.runfile import load_yaml
from moe_kernels.tools.common.runfile import tokens_per_micro_batch as tokens_of
from moe_kernels.tools.compare.command import prepare_missing
from moe_kernels.tools.compare.environment import versions
from moe_kernels.tools.compare.metrics import run_metrics
from moe_kernels.tools.compare.pair import CONFIG_FOLDER, Options, RunSpec, family_pair
from moe_kernels.tools.compare.runner import FINISHED, Machine, run_training
from moe_kernels.tools.prepare import tiny_overrides
from several_gpus.report import cell, times
from several_gpus.setting import (
    AXOLOTL_EP,
    DDP,
    DECODER_LAYERS,
    FULL,
    ONE,
    OURS,
    STOCK,
    Row,
    Setting,
    cuda,
    full_micro_batch,
    model_of,
    python_path,
)
from several_gpus.watch import PROFILED, seen

RANK = Path(__file__).with_name("axolotl_rank.py")


def one_gpu_specs(family: str, setting: Setting) -> dict[str, RunSpec]:
    """The two run files of configs/moe, as ``moe-kernels compare`` would run them, in folders of their own."""
    name, size = model_of(family), setting.size(family)
    options = Options(
        size=size, steps=setting.steps, warmup_steps=setting.warmup, noise=False, router=False, liger=setting.liger
    )
    pair = family_pair(name, options, tiny_overrides(name) if setting.tiny else None)
    prepare_missing(pair, Console(stderr=True))
    specs = {}
    for experts, run in zip((STOCK, OURS), pair.runs, strict=True):
        specs[experts] = changed(run, setting.folder(family, "one", experts), {})
    return specs


def changed(run: RunSpec, folder: Path, keys: Row) -> RunSpec:
    """``run`` with other keys, in another folder; a key of None leaves the file."""
    keys = {**keys, "output_dir": str(folder / "output")}
    config = {name: value for name, value in (run.config | keys).items() if value is not None}
    return replace(run, folder=folder, overrides=run.overrides | keys, config=config)


def specs_of(family: str, engine: str, setting: Setting) -> dict[str, RunSpec]:
    """The two trainings of a family under an engine."""
    specs = one_gpu_specs(family, setting)  # makes the model and its data too
    if engine == ONE:
        return specs
    keys: Row = {}
    if engine != DDP:
        keys |= sharding(DECODER_LAYERS[family])
    if engine == AXOLOTL_EP:
        keys |= {"expert_parallel_size": setting.gpus, "expert_parallel_backend": "torch"}
    if family == FULL:
        keys |= all_weights(specs[STOCK].config, setting)
    found = {}
    for experts, run in specs.items():
        ours = multi_gpu_file(family, experts)
        if ours is not None and not setting.tiny:
            run = replace(run, source=ours)
        found[experts] = changed(run, setting.folder(family, engine, experts), keys)
    return found


def multi_gpu_file(family: str, experts: str) -> Path | None:
    """The run file that is the one-GPU file and FSDP2, where there is one."""
    if family not in FAMILIES:
        return None
    return shipped(CONFIG_FOLDER / "multi-gpu" / f"{family}-1b-fsdp2{'-baseline' if experts == STOCK else ''}.yml")


def sharding(decoder_layer: str) -> Row:
    """The keys of FSDP2 in configs/moe/multi-gpu."""
    source = load_yaml(shipped(CONFIG_FOLDER / "multi-gpu" / "mixtral-1b-fsdp2.yml"))
    layers = {"transformer_layer_cls_to_wrap": decoder_layer}
    return {"fsdp_version": source["fsdp_version"], "fsdp_config": source["fsdp_config"] | layers}


def all_weights(config: Row, setting: Setting) -> Row:
    """The keys that make the run file of an adapter train all weights, in as many sequences a step as fit."""
    keys = {name: None for name in config if name == "adapter" or name.startswith("lora_")} | {"merge_method": None}
    if setting.tiny:
        return keys
    sequences = full_micro_batch(setting.gpus, gpu_memory())
    assert sequences is not None, "left_out() was to be asked first"
    return keys | {"micro_batch_size": sequences}


def left_out(family: str, setting: Setting) -> str | None:
    """Why a family is not trained here; None if it is."""
    if family != FULL or setting.tiny:
        return None
    if full_micro_batch(setting.gpus, gpu_memory()) is not None:
        return None
    return (
        f"all weights of Qwen3-30B-A3B, their gradients and states do not fit on {setting.gpus} GPUs of "
        f"{gpu_memory() / 1e9:.0f} GB, as `moe-kernels plan` has it"
    )


def gpu_memory() -> float:
    """Bytes of one GPU."""
    return float(torch.cuda.get_device_properties(0).total_memory)


def rows(family: str, engine: str, setting: Setting, side_by_side: bool) -> Iterator[Row]:
    """Train both sides; on one GPU each at the same time, where there are two."""
    specs = specs_of(family, engine, setting)
    machine: Row = {"versions": versions(), "timeout_s": setting.timeout_s}
    if engine != ONE:
        for experts, spec in specs.items():
            ranks = launch(engine, spec, setting)
            yield row_of(family, engine, experts, spec, Machine(None, **machine, **ranks), setting)
        return
    together = side_by_side and cuda() and torch.cuda.device_count() > 1

    def run(number: int, experts: str, spec: RunSpec) -> Row:
        device = str(number % torch.cuda.device_count()) if cuda() else None
        row = row_of(family, engine, experts, spec, Machine(device, **machine), setting)
        return {**row, "side_by_side": together}

    # A pool, not bare threads: result() raises what a run raised.
    with ThreadPoolExecutor(2 if together else 1) as pool:
        for ended in [pool.submit(run, number, *item) for number, item in enumerate(specs.items())]:
            yield ended.result()


def launch(engine: str, spec: RunSpec, setting: Setting) -> Row:
    """How the runner starts the ranks: Axolotl in each of them, with what ``axolotl_rank.py`` adds."""
    path = setting.newest_axolotl if engine == AXOLOTL_EP else None
    torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={setting.gpus}")
    rank = (os.path.relpath(RANK), str(spec.folder), str(setting.steps), str(setting.warmup), "train")
    command = ("env", f"PYTHONPATH={python_path(path)}", sys.executable, *torchrun, *rank)
    return {"trainer": command, "launcher": ("--launcher", "python")}


def row_of(family: str, engine: str, experts: str, spec: RunSpec, machine: Machine, setting: Setting) -> Row:
    """Train one run file and keep its numbers."""
    result = run_training(spec, machine, lambda progress: None)
    numbers = run_metrics(result, setting.warmup)
    profiled = PROFILED if engine != ONE else 0
    return {
        **cell(family, engine, experts, setting.ranks(engine)),
        "ok": result.status == FINISHED,
        "error": result.error,
        "tail": result.tail,
        "command": [part for part in result.command if part != "env" and not part.startswith("PYTHONPATH=")],
        "source": os.path.relpath(spec.source),
        "overrides": spec.overrides,
        **times(numbers.step_ms[: len(numbers.step_ms) - profiled], tokens_of(spec.config)),
        "peak_gib": numbers.peak_allocated_gib,
        "startup_s": numbers.startup_s,
        "first_step_s": numbers.first_step_s,
        "losses": numbers.losses,
        "weights": result.weights,
        "ran": result.plugin_line or "stock experts",
        **seen(spec.folder),
    }
