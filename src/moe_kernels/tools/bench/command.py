"""`moe-kernels bench`: arguments in, a table and a JSON file out."""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from moe_kernels.install import pip_install
from moe_kernels.settings import DEFAULT_GROUP_SIZE, GROUP_SIZES
from moe_kernels.shapes import DEFAULT_SHAPES, LAYERS, LayerShape
from moe_kernels.tools.check.forms import FORMS, PLAIN
from moe_kernels.tools.common.console import wide_console
from moe_kernels.tools.common.errors import CHECK_FAILED, MissingDependency, UsageError
from moe_kernels.tools.common.options import DTYPES, MAX_SEED, chosen_forms, one_of, pick_device, several

Row = dict[str, Any]
DEFAULT_PEERS = "eager,grouped_mm"
ROUTINGS = ("balanced", "mild", "heavy")
CPU_SHAPE = LayerShape("cpu-demo", 64, 64, 64, 8, 2)
CPU_WARNING = "On the CPU this shows that the benchmark works, nothing about speed."


def bench(
    shapes: Annotated[
        str | None,
        typer.Option(
            help=f"Comma-separated layers, or all. Known: {', '.join(LAYERS)}.",
            show_default=f"{DEFAULT_SHAPES}; on a CPU one small layer",
        ),
    ] = None,
    peers: Annotated[
        str,
        typer.Option(
            help="What to compare with, comma-separated, all or none: eager, grouped_mm, batched_mm, "
            "scattermoe, liger, sonicmoe."
        ),
    ] = DEFAULT_PEERS,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens per call instead of each layer's own.")] = None,
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    routing: Annotated[
        str, typer.Option(help="How uneven the router is, comma-separated or all: balanced, mild, heavy.")
    ] = "mild",
    form: Annotated[
        str, typer.Option(help=f"How the layer is trained, comma-separated, or all: {', '.join(FORMS)}.")
    ] = PLAIN,
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls of each implementation.")] = 20,
    group_sizes: Annotated[
        str, typer.Option(help=f"Values of moe_group_size to measure: {', '.join(map(str, GROUP_SIZES))}.")
    ] = str(DEFAULT_GROUP_SIZE),
    persistent: Annotated[
        str, typer.Option(help="Values of moe_persistent_kernel to measure: true, false or both.")
    ] = "true",
    recompute: Annotated[
        str, typer.Option(help="Values of moe_recompute to measure: true, false or both.")
    ] = "false",
    device: Annotated[str, typer.Option(help="cuda, cpu, or auto: a GPU if there is one.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the random tensors.", min=0, max=MAX_SEED)] = 0,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", dir_okay=False, help="Write the results to this file, and go on where it ends."),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what the file already holds.")] = False,
    plots: Annotated[
        Path | None, typer.Option(file_okay=False, help="Write bars and a roofline as PNG into this folder.")
    ] = None,
) -> None:
    """Time one expert layer against other implementations, correctness first.

    Every implementation runs in this process on the same tensors, round-robin, and computes every gradient: with
    --form those of the form, LoRA's factors among them, and none of a frozen base, which dense leaves out too. The
    L2 cache is flushed before each call; times are medians. An implementation whose error is more
    than three times that of grouped_mm is called wrong and is not timed; one that cannot run here says why. The
    time of the same GEMMs through dense torch.mm is the ceiling. The file of --json is written after every layer,
    and a call that was interrupted goes on from it. Exit code 1 if an implementation was wrong or failed.
    """
    one_of("dtype", dtype, tuple(DTYPES))
    routings = several("routing", routing, ROUTINGS)
    layers = chosen_layers(DEFAULT_SHAPES if shapes is None else shapes, tokens)
    valid = {str(size): size for size in GROUP_SIZES}
    knobs: dict[str, Any] = {
        "group_sizes": tuple(valid[name] for name in several("group-sizes", group_sizes, tuple(valid))),
        "persistent": _switch("persistent", persistent),
        "recompute": _switch("recompute", recompute),
    }

    if plots is not None and importlib.util.find_spec("matplotlib") is None:
        raise MissingDependency(f"--plots needs matplotlib. Cure: {pip_install('report')}")
    if plots is not None and form != PLAIN:
        raise UsageError("--plots draws layers in the plain form: leave --form out, or --plots.")
    console = Console(stderr=True)
    with console.status("loading torch and transformers"):
        import torch

        from moe_kernels.tools.bench.ceilings import measure_ceilings
        from moe_kernels.tools.bench.experts import OURS, measure
        from moe_kernels.tools.bench.peers import PEERS
        from moe_kernels.tools.bench.store import Store
        from moe_kernels.tools.common.machine import environment
    names = () if peers == "none" else several("peers", peers, tuple(PEERS))
    where = pick_device(device)
    if where.type == "cpu":
        console.print(CPU_WARNING, style="yellow")
        if shapes is None:
            layers = [replace(CPU_SHAPE, tokens=tokens or CPU_SHAPE.tokens)]
    torch_dtype = getattr(torch, DTYPES[dtype])
    forms = chosen_forms(form, torch_dtype, where, lambda reason: console.print(reason, style="yellow"))
    arguments = {"peers": list(names), "dtype": dtype, "repeats": repeats, "device": where.type, "seed": seed}
    arguments |= {name: list(values) for name, values in knobs.items()}
    store = Store(json_file, environment(), arguments, fresh)
    cells = [(shape, routing, name) for shape in layers for routing in routings for name in forms]
    missing = [cell for cell in cells if not store.find(cell[0].name, cell[0].tokens, *cell[1:])]
    if len(missing) < len(cells):
        console.print(
            f"{json_file} holds {len(cells) - len(missing)} of {len(cells)} layers already.", highlight=False
        )
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=len(cells), completed=len(cells) - len(missing))
        if store.report["ceilings"] is None:
            bar.update(task, description="measuring the ceilings of this machine")
            store.report["ceilings"] = measure_ceilings(where, torch_dtype)
        for shape, kind, name in missing:
            found = measure(
                shape,
                implementations=(*names, OURS),
                device=where,
                dtype=torch_dtype,
                repeats=repeats,
                routing=kind,
                seed=seed,
                form=name,
                **knobs,
                progress=lambda message: bar.update(task, description=escape(message)),
            )
            store.add([result.to_json() for result in found])
            bar.advance(task)
    found_cells = [(shape, store.find(shape.name, shape.tokens, *others)) for shape, *others in cells]
    results = [row for _, rows in found_cells for row in rows]
    tables = wide_console()
    for shape, rows in found_cells:
        _show(tables, shape, rows)
    _summarise(tables, results)
    if json_file is not None and missing:
        console.print(f"wrote {json_file}", highlight=False)
    if plots is not None:
        from moe_kernels.tools.bench.plots import write_plots

        for file in write_plots({**store.report, "results": results}, plots):
            console.print(f"wrote {file}", highlight=False)
    if where.type == "cpu":
        console.print(CPU_WARNING, style="yellow")
    if not all(row["ok"] for row in results if row["available"]):
        raise typer.Exit(CHECK_FAILED)


def chosen_layers(names: str, tokens: int | None) -> list[LayerShape]:
    """The layers of ``--shapes``, with ``tokens`` instead of their own where a number is given."""
    layers = [LAYERS[name] for name in several("shapes", names, tuple(LAYERS))]
    return [replace(layer, tokens=tokens or layer.tokens) for layer in layers]


def _switch(option: str, value: str) -> tuple[bool, ...]:
    values = {"true": (True,), "false": (False,), "both": (True, False)}
    return values[one_of(option, value, tuple(values))]


COLUMNS = ("forward ms", "f+b ms", "p20-p80", "f+b GPU", "f+b host", "TFLOP/s", "of dense", "launches",
           "saved", "peak", "err out", "err grad")  # fmt: skip
CAPTION = """ms: from the call to its last kernel. GPU: launches queued ahead. host: until the call returns.
Medians. launches: forward / forward + backward. Memory in MiB.
Errors: relative L2 against float32, of fp32 against float64."""


def _table(title: str, caption: str, columns: Iterable[str]) -> Table:
    """A table without rows, whose first column is the implementation."""
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    table.add_column("implementation", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _show(tables: Console, shape: LayerShape, rows: list[Row]) -> None:
    sizes = f"T={shape.tokens} H={shape.hidden} I={shape.intermediate} E={shape.experts} K={shape.top_k}"
    routing = f"{rows[0]['routing']} routing (busiest expert {rows[0]['imbalance']:.1f}x)"
    table = _table(f"{_called(rows[0])}: {sizes}, {rows[0]['dtype']}, {routing}", CAPTION, COLUMNS)
    for row in rows:
        name = escape(row["implementation"])
        if row["ok"]:
            table.add_row(name, *_cells(row))
        elif row["available"]:
            table.add_row(f"[red]{name}", "[red]wrong" if row["rel_error"] else "[red]failed")
        else:
            table.add_row(f"[dim]{name}", "[dim]-")
    tables.print(table)
    for row in rows:
        if not row["available"]:
            tables.print(f"{row['implementation']} was not measured: {row['note']}", style="yellow", markup=False)
        elif not row["ok"]:
            tables.print(f"{row['implementation']}: {row['note']}", style="red", markup=False)


def _called(row: Row) -> str:
    """The layer, and the form in which it is trained. Files of older versions have none but the plain one."""
    form = row.get("form", PLAIN)
    return row["shape"] if form == PLAIN else f"{row['shape']}, {form}"


def _cells(row: Row) -> list[str]:
    both, launches = row["forward_backward_ms"], row["launches_forward"]
    gradients = [error for name, error in row["rel_error"].items() if name != "out"]
    return [
        _median(row["forward_ms"]),
        _median(both),
        f"{both['p20']:.4g}-{both['p80']:.4g}" if both else "",
        _median(row["forward_backward_queued_ms"]),
        _median(row["forward_backward_host_ms"]),
        _number(row["forward_backward_tflops"], ".3g"),
        _number(row["dense_fraction"], ".2f"),
        "" if launches is None else f"{launches} / {row['launches_forward_backward']}",
        _number(row["saved_mb"], ".4g"),
        _number(row["peak_mb"], ".4g"),
        _number(row["rel_error"].get("out"), ".1e"),
        _number(max(gradients, default=None), ".1e"),
    ]


def fractions_of_dense(results: list[Row]) -> dict[str, dict[str, dict[str, float]]]:
    """{routing: {implementation: {shape: fraction of dense}}}, forward and backward."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in results:
        if row["implementation"] != "dense" and row["dense_fraction"] is not None:
            of_routing = found.setdefault(row["routing"], {})
            of_routing.setdefault(row["implementation"], {})[_called(row)] = row["dense_fraction"]
    return found


def _summarise(tables: Console, results: list[Row]) -> None:
    """Fractions of dense over all layers."""
    for kind, by_name in fractions_of_dense(results).items():
        shapes = list(dict.fromkeys(shape for by_shape in by_name.values() for shape in by_shape))
        table = _table(
            f"Fraction of dense, forward + backward, {kind} routing",
            "mean: geometric, over the layers that the implementation was measured on",
            (*shapes, "mean"),
        )
        for name, by_shape in by_name.items():
            mean = statistics.geometric_mean(by_shape.values())
            table.add_row(escape(name), *(_number(by_shape.get(shape), ".2f") for shape in shapes), f"{mean:.3f}")
        tables.print(table)


def _median(spread: dict[str, float] | None) -> str:
    return "" if spread is None else f"{spread['median']:.3f}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
