"""``moe-kernels prepare``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from moe_kernels.shapes import ALL_FAMILIES, FAMILIES
from moe_kernels.tools.common.errors import UsageError
from moe_kernels.tools.common.network import go_online
from moe_kernels.tools.common.options import MAX_SEED
from moe_kernels.tools.prepare.cache import in_turn
from moe_kernels.tools.prepare.models import prepare_model
from moe_kernels.tools.prepare.text import BUILDERS, prepare_data


def wanted(models: list[str], size: str | None) -> list[tuple[str, str, bool]]:
    """Family, size and whether it is packed, of the models that a user names, each once.

    Args:
        models: ``mixtral-1b``, ``mixtral-tiny``, ``mixtral`` (its size for a GPU) or ``all`` (the three 1b).
        size: takes the place of the sizes in the names, unless it is None.

    Raises:
        UsageError: a name or a size is unknown, or this family has no such size.
    """
    known = {
        family.model(each, packed): [(name, each, packed)]
        for name, family in ALL_FAMILIES.items()
        for each in family.sizes
        for packed in ((False, True) if family.packed else (False,))
    }
    known |= {name: [(name, family.large, False)] for name, family in ALL_FAMILIES.items()}
    known["all"] = [(name, family.large, False) for name, family in FAMILIES.items()]
    if unknown := [model for model in models if model not in known]:
        raise UsageError(f"There is no model {unknown[0]!r}. Name one of {', '.join(known)}.")
    found = [(family, size or each, packed) for model in models for family, each, packed in known[model]]
    for family, each, _ in found:
        if each not in ALL_FAMILIES[family].sizes:
            raise UsageError(f"There is no size {each!r}. Name one of {', '.join(ALL_FAMILIES[family].sizes)}.")
    return [*dict.fromkeys(found)]


def prepare(
    models: list[str],
    size: Annotated[
        str | None,
        typer.Option(
            help="1b (for a GPU, 2 GB each) or tiny (for a CPU, 3 MB each), instead of the names' own.",
            show_default="the names' own",
        ),
    ] = None,
    root: Annotated[Path, typer.Option(help="Folder that gets artifacts/.")] = Path(),
    dataset: Annotated[
        str | None,
        typer.Option(
            help="Train on this instead of the Python standard library: a .jsonl, .json, .txt or .parquet "
            "file, or a Hugging Face data set as NAME or NAME:CONFIGURATION."
        ),
    ] = None,
    text_field: Annotated[str, typer.Option(help="Column of the data set that holds the text.")] = "text",
    seed: Annotated[
        int | None,
        typer.Option(
            help="Seed of the weights; a finished model of another seed is made again.",
            show_default="0",
            min=0,
            max=MAX_SEED,
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Make again what is there already.")] = False,
) -> None:
    """Make the models, the tokenizer and the data that the run files of configs/moe name.

    MODELS are mixtral-1b, qwen2-moe-1b, deepseek-v3-1b, or all; qwen3-30b-a3b and gpt-oss-20b, whose weights are
    drawn when `moe-kernels compare` trains them, and qwen3-30b-a3b-fp8 and gpt-oss-20b-mxfp4, the same in the formats
    that they are published in; -tiny for a CPU.

    Nothing is downloaded unless --dataset names a Hugging Face data set.

    What is finished is kept: a command that was stopped goes on where it was.
    """
    todo = wanted(models, size)
    if dataset is not None and Path(dataset).suffix not in BUILDERS:
        go_online()
    # transformers' progress bars would break ours. It reads this when it is imported, further down.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    console = Console()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task("starting", total=len(todo) + 1)

        def report(message: str) -> None:
            progress.update(task, description=message)
            console.print(message, highlight=False, soft_wrap=True)

        with in_turn(root / "artifacts", report):
            data = prepare_data(root, dataset, text_field=text_field, force=force, report=report)
            progress.advance(task)
            for family, model_size, packed in todo:
                prepare_model(family, model_size, root, seed, packed=packed, force=force, report=report)
                progress.advance(task)
    if dataset is not None:
        console.print(f"To train on it, set in the run file, under datasets: path: {data}", soft_wrap=True)
