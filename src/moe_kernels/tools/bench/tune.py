"""`moe-kernels tune`: measure tiles on this GPU, verify the winners, and keep them for every later process."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moe_kernels.settings import DEFAULT_GROUP_SIZE, TILE_ROWS
from moe_kernels.shapes import DEFAULT_SHAPES, LAYERS, LayerShape
from moe_kernels.tools.bench.command import chosen_layers
from moe_kernels.tools.common.console import wide_console
from moe_kernels.tools.common.errors import MissingDependency
from moe_kernels.tools.common.options import ensure_writable, several

if TYPE_CHECKING:
    import torch

    from moe_kernels.tools.bench.tiles import Timing, Tuned


def tune(
    shapes: Annotated[
        str, typer.Option(help=f"Comma-separated layers, or all. Known: {', '.join(LAYERS)}.")
    ] = DEFAULT_SHAPES,
    group_sizes: Annotated[
        str, typer.Option(help=f"Values of moe_group_size to tune: {', '.join(map(str, TILE_ROWS))}.")
    ] = str(DEFAULT_GROUP_SIZE),
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens per call instead of each layer's own.")] = None,
    out: Annotated[
        Path | None, typer.Option(dir_okay=False, help="The table, instead of the one in the user's cache.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", dir_okay=False, help="Also write every measurement to this file.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what the table holds for other layers.")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Processes that compile ahead.")] = min(8, os.cpu_count() or 1),
) -> None:
    """Find the fastest tile of every GEMM kernel for given layers on this GPU.

    A candidate whose result is wrong is not timed. A tile that is at least two per cent faster than the one in use
    must pass the checks of `moe-kernels verify` (output and every gradient against float64, hostile routings,
    poisoned memory, two runs bitwise equal) before it enters the table. Training reads the table once and measures
    nothing. The table has a line for each shape bucket: rows per expert, columns, inner length.
    """
    import torch

    wanted = chosen_layers(shapes, tokens)
    groups = [int(size) for size in several("group-sizes", group_sizes, tuple(map(str, TILE_ROWS)))]
    if not torch.cuda.is_available():
        raise MissingDependency("tune measures on an NVIDIA GPU, and torch sees none. Cure: see `moe-kernels doctor`")
    from moe_kernels.tools.bench.tiles import compile_ahead, time_shape

    ensure_writable(json_file)
    console = Console(stderr=True)
    device = torch.device("cuda", torch.cuda.current_device())
    with console.status("compiling") as status:

        def progress(message: str) -> None:
            status.update(escape(message))

        compile_ahead([shape.name for shape in wanted], groups, jobs)
        timings: list[Timing] = []
        for shape in wanted:
            for group in groups:
                timings += time_shape(shape, group, device, progress)
                torch.cuda.empty_cache()
        results = conclude(timings, wanted, device, out, fresh, progress)
    show(results, timings)
    if json_file is not None:
        _write_measurements(json_file, timings)
        console.print(f"wrote {json_file}", highlight=False)


def conclude(
    timings: list[Timing],
    shapes: list[LayerShape],
    device: torch.device,
    out: Path | None,
    fresh: bool,
    progress: Any = lambda message: None,
) -> list[Tuned]:
    """Verify the winners and write the table: ``out``, or the one that training reads on this GPU.

    Lines for other buckets stay as they are, unless ``fresh`` or they are of another version of Triton.
    """
    import torch

    from moe_kernels.kernels.tiles import config, tuned
    from moe_kernels.tools.bench.tiles import choose
    from moe_kernels.tools.common.machine import environment

    file = out or tuned.cache_file(device)
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    machine = environment()
    header: dict[str, Any] = {"device": tuned.device_name(device), "capability": list(capability)}
    header |= {name: machine[name] for name in ("torch", "moe_kernels", "commit", "date", "triton")}
    entries: dict[tuned.Key, dict[str, Any]] = {}
    if file.exists() and not fresh:
        before = tuned.read(file)
        if (before["device"], before["triton"]) == (header["device"], header["triton"]):
            entries = {tuned.key_of(entry): entry for entry in before["tiles"]}
    results = choose(timings, shapes, device, progress)
    for result in results:
        entries.pop(result.key, None)
        if result.config is not None:
            measured = [
                {"shape": t.shape, "gemm": t.call, "ms": t.ms, "default_ms": t.default_ms}
                for t in timings
                if t.key == result.key and t.config == result.config
            ]
            entries[result.key] = {**result.key._asdict(), **asdict(result.config), "measured": measured}
    write(file, header, list(entries.values()))
    config.forget_tuned_tiles()
    Console(stderr=True).print(f"wrote {file}: {len(entries)} tiles", highlight=False)
    return results


def write(file: Path, header: dict[str, Any], entries: list[dict[str, Any]]) -> None:
    """Write a table of verified tiles, as :func:`moe_kernels.kernels.tiles.tuned.read` takes it."""
    from moe_kernels.kernels.tiles import tuned
    from moe_kernels.tools.common.files import write_text

    report = {"schema": tuned.SCHEMA, "kind": "tiles", **header, "tiles": entries, "digest": tuned.digest(entries)}
    write_text(file, json.dumps(report, indent=1) + "\n")


def show(results: list[Tuned], timings: list[Timing]) -> None:
    """The outcome by bucket, and every wrong tile."""
    from moe_kernels.tools.bench.tiles import describe

    table = Table()
    for column in ("kernel", "group size", "loads", "bucket", "tile", "time over the tile in use"):
        table.add_column(column, no_wrap=True)
    for key, config, ratio, _ in results:
        outcome = ("the one in use", "") if config is None else (describe(config), f"{ratio:.3f}")
        table.add_row(key.kernel, str(key.group_size or ""), key.loads, key.bucket, *outcome)
    output = wide_console()
    output.print(table)
    wrong = [
        f"wrong, not used: {timing.call} {describe(timing.config)} on {timing.shape}: {timing.fault}"
        for timing in timings
        if timing.wrong
    ]
    refused = [
        f"refused, not used: {result.key.kernel} {describe(config)}: {reason}"
        for result in results
        for config, reason in result.refused
    ]
    for sentence in (*wrong, *refused):
        output.print(sentence, style="red", markup=False)


def _write_measurements(file: Path, timings: list[Timing]) -> None:
    from moe_kernels.tools.common.machine import environment

    rows = [{**asdict(timing), "key": timing.key._asdict()} for timing in timings]
    report = {"schema": 1, "kind": "timings", "environment": environment(), "rows": rows}
    file.write_text(json.dumps(report, indent=1))
