"""`moe-kernels bench`: arguments in, a table and a JSON file out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moe_kernels.cli.errors import CHECK_FAILED, MissingDependency, UsageError
from moe_kernels.settings import GROUP_SIZES, GroupSize
from moe_kernels.shapes import LAYERS, LayerShape

if TYPE_CHECKING:
    from moe_kernels.bench.experts import Measurement
    from moe_kernels.bench.timing import Spread

SCHEMA = 1
TABLE_WIDTH = 150
DEFAULT_SHAPES = "mixtral-1b,qwen2-moe-1b,deepseek-v3-1b"
ROUTINGS = ("balanced", "mild", "hot")
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
CPU_SHAPE = LayerShape("cpu-demo", 64, 64, 48, 8, 2)
CPU_WARNING = "No NVIDIA GPU here: one small layer on the CPU shows that the benchmark works, nothing about speed."


def bench(
    shapes: Annotated[
        str, typer.Option(help=f"Comma-separated layers, or all. Known: {', '.join(LAYERS)}.")
    ] = DEFAULT_SHAPES,
    implementations: Annotated[
        str,
        typer.Option(help="Comma-separated: eager, grouped_mm, batched_mm, moe_kernels."),
    ] = "eager,grouped_mm,moe_kernels",
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens per call instead of each layer's own.")] = None,
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    routing: Annotated[str, typer.Option(help="How uneven the router is: balanced, mild or hot.")] = "mild",
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls of each implementation.")] = 20,
    group_sizes: Annotated[
        str, typer.Option(help="Values of moe_group_size to measure: 64, 128, 256, auto.")
    ] = "128",
    persistent: Annotated[str, typer.Option(help="Knob values of moe_kernels: true, false or both.")] = "true",
    device: Annotated[str, typer.Option(help="cuda, cpu, or auto: a GPU if there is one.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the random tensors.")] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", dir_okay=False, help="Also write the results to this file.")
    ] = None,
) -> None:
    """Time one expert layer against transformers' own implementations, correctness first.

    Every implementation runs in this process on the same tensors, in turn, and computes every gradient. The
    second-level cache is flushed before each call; times are medians. An implementation whose error is more
    than three times that of grouped_mm is called wrong and is not timed. The time of the same GEMMs through
    dense torch.mm is the ceiling. Exit code 1 if an implementation was wrong or could not run.
    """
    chosen_dtype = _one_of("dtype", dtype, tuple(DTYPES))
    _one_of("routing", routing, ROUTINGS)
    wanted = _shapes(shapes, tokens)
    knobs = _group_sizes(group_sizes)
    walks = {"true": (True,), "false": (False,), "both": (True, False)}[
        _one_of("persistent", persistent, ("true", "false", "both"))
    ]
    names = tuple(name.strip() for name in implementations.split(",") if name.strip())

    console = Console(stderr=True)
    with console.status("loading torch and transformers"):
        import torch

        from moe_kernels.bench.environment import environment
        from moe_kernels.bench.experts import OURS, STOCK, measure
    for name in names:
        _one_of("implementations", name, (*STOCK, OURS))
    where = _device(device)
    if where == "cpu":
        console.print(CPU_WARNING, style="yellow")
        if shapes == DEFAULT_SHAPES:
            wanted = [CPU_SHAPE]
    results = []
    for shape in wanted:
        with console.status(shape.name) as status:
            found = measure(
                shape,
                implementations=names,
                device=where,
                dtype=getattr(torch, DTYPES[chosen_dtype]),
                repeats=repeats,
                routing=routing,
                group_sizes=knobs,
                persistent=walks,
                seed=seed,
                progress=lambda message: status.update(escape(message)),
            )
        tables = Console()
        tables.width = max(tables.width, TABLE_WIDTH)
        tables.print(_table(shape, found))
        for result in found:
            if not result.ok:
                tables.print(f"{result.implementation}: {result.note}", style="red", markup=False)
        results.extend(found)
    if json_file is not None:
        report = {
            "schema": SCHEMA,
            "kind": "bench",
            "environment": environment(),
            "results": [result.to_json() for result in results],
        }
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(report, indent=1) + "\n")
        console.print(f"wrote {json_file}", highlight=False)
    if where == "cpu":
        console.print(CPU_WARNING, style="yellow")
    if not all(result.ok for result in results):
        raise typer.Exit(CHECK_FAILED)


def _one_of(option: str, value: str, valid: tuple[str, ...]) -> str:
    if value not in valid:
        raise UsageError(f"--{option} {value}: choose from {', '.join(valid)}")
    return value


def _shapes(names: str, tokens: int | None) -> list[LayerShape]:
    chosen = list(LAYERS) if names == "all" else [name.strip() for name in names.split(",") if name.strip()]
    for name in chosen:
        _one_of("shapes", name, tuple(LAYERS))
    layers = [LAYERS[name] for name in chosen]
    if tokens is None:
        return layers
    return [
        LayerShape(layer.name, tokens, layer.hidden, layer.intermediate, layer.experts, layer.top_k)
        for layer in layers
    ]


def _group_sizes(values: str) -> tuple[GroupSize, ...]:
    valid = {str(size): size for size in GROUP_SIZES}
    return tuple(valid[_one_of("group-sizes", value.strip(), tuple(valid))] for value in values.split(","))


def _device(wanted: str) -> str:
    import torch

    _one_of("device", wanted, ("auto", "cuda", "cpu"))
    if wanted == "cuda" and not torch.cuda.is_available():
        raise MissingDependency("torch sees no NVIDIA GPU. Cure: see `moe-kernels doctor`, or use --device cpu")
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return wanted


COLUMNS = ("forward ms", "f+b ms", "p20-p80", "f+b GPU", "f+b host", "TFLOP/s", "of dense", "launches",
           "saved", "peak", "err out", "err grad")  # fmt: skip
CAPTION = """ms: from the call to its last kernel. GPU: launches queued ahead. host: until the call returns.
Medians. launches: forward / forward + backward. Memory in MiB. Errors: relative L2 against float32."""


def _table(shape: LayerShape, results: list[Measurement]) -> Table:
    first = results[0]
    table = Table(
        title=f"{shape.name}: T={shape.tokens} H={shape.hidden} I={shape.intermediate} E={shape.experts} "
        f"K={shape.top_k}, {first.dtype}, {first.routing} routing (busiest expert {first.imbalance:.1f}x)",
        title_justify="left",
        caption=CAPTION,
        caption_justify="left",
    )
    table.add_column("implementation", no_wrap=True)
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for result in results:
        if result.ok:
            table.add_row(escape(result.implementation), *_cells(result))
        else:
            table.add_row(f"[red]{escape(result.implementation)}", "[red]wrong")
    return table


def _cells(result: Measurement) -> list[str]:
    both, launches = result.forward_backward_ms, result.launches_forward
    gradients = [error for name, error in result.rel_error.items() if name != "out"]
    return [
        _median(result.forward_ms),
        _median(both),
        f"{both.p20:.4g}-{both.p80:.4g}" if both else "",
        _median(result.forward_backward_queued_ms),
        _median(result.forward_backward_host_ms),
        _number(result.forward_backward_tflops, ".3g"),
        _number(result.dense_fraction, ".2f"),
        "" if launches is None else f"{launches} / {result.launches_forward_backward}",
        _number(result.saved_mb, ".4g"),
        _number(result.peak_mb, ".4g"),
        _number(result.rel_error.get("out"), ".1e"),
        _number(max(gradients, default=None), ".1e"),
    ]


def _median(spread: Spread | None) -> str:
    return "" if spread is None else f"{spread.median:.3f}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
