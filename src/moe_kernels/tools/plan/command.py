"""``moe-kernels plan``: memory, traffic and tokens per second of known models on 8, 64 and 512 GPUs."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from pydantic import BaseModel, PositiveFloat, PositiveInt, ValidationError
from rich.table import Table

from moe_kernels.tools.common.console import wide_console
from moe_kernels.tools.common.errors import UsageError
from moe_kernels.tools.common.files import read_json
from moe_kernels.tools.common.options import several, shipped
from moe_kernels.tools.plan.estimate import MODELS, Assumptions, Estimate, Rates, estimate

DEFAULT = Assumptions()
MEASURED = Path("benchmarks/results/h100-layers.json")
TOO_LARGE = 1e18
CURE = "name with --measured a file that `moe-kernels bench --json` wrote."
OURS = ("moe_kernels", "moe_kernels[g=128,p=1]")
COLUMNS = (
    "model", "GPUs", "EP", "weights GB", "grads GB", "optimizer GB", "gathered GB", "activations GB", "memory GB",
    "all-to-all GB", "experts ms", "other ms", "all-to-all ms", "FSDP ms", "tokens/s per GPU", "tokens/s",
)  # fmt: skip


class Row(BaseModel):
    """What is read of a layer that `moe-kernels bench` measured, in any version."""

    implementation: str
    device: str
    shape: str
    intermediate: PositiveInt
    dtype: str
    routing: str
    tokens: int
    forward_tflops: PositiveFloat | None
    forward_backward_tflops: PositiveFloat | None


class Bench(BaseModel):
    """What is read of its result file."""

    results: list[Row]


def plan(
    models: Annotated[str, typer.Option(help=f"Comma-separated: {', '.join(MODELS)}.")] = ",".join(MODELS),
    gpus: Annotated[str, typer.Option(help="Comma-separated numbers of GPUs.")] = "8,64,512",
    ep: Annotated[str, typer.Option(help="Comma-separated numbers of GPUs that experts are spread over.")] = "1,8,64",
    measured: Annotated[
        Path | None, typer.Option(help="What `moe-kernels bench --json` wrote.", show_default=str(MEASURED))
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens per GPU and micro-batch.", min=1)] = DEFAULT.tokens,
    sequence: Annotated[
        int | None,
        typer.Option(help="Length of a sequence.", min=1, show_default=f"{DEFAULT.sequence}, or --tokens if fewer"),
    ] = None,
    other_tflops: Annotated[
        float | None,
        typer.Option(
            help="TFLOP/s that everything but routed experts reaches; without it there are no tokens/s.", min=1
        ),
    ] = None,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs joined by the fast link.", min=1)] = DEFAULT.gpus_per_node,
    node_link: Annotated[float, typer.Option(help="GB/s that one GPU sends within a node.", min=0.1)] = (
        DEFAULT.node_link / 1e9
    ),
    network_link: Annotated[float, typer.Option(help="GB/s that one GPU sends to other nodes.", min=0.1)] = (
        DEFAULT.network_link / 1e9
    ),
    weight_bytes: Annotated[int, typer.Option(help="Bytes kept per weight.", min=1)] = DEFAULT.weight_bytes,
    grad_bytes: Annotated[int, typer.Option(help="Bytes kept per gradient.", min=1)] = DEFAULT.grad_bytes,
    optimizer_bytes: Annotated[
        int, typer.Option(help="Bytes of optimizer state per weight.", min=0)
    ] = DEFAULT.optimizer_bytes,
    checkpointing: Annotated[
        bool, typer.Option(help="Compute activations again in the backward pass.")
    ] = DEFAULT.checkpointing,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
) -> None:
    """Estimate a training step on many GPUs: measured kernel rates, and speeds that you state."""
    if sequence is None:
        sequence = min(DEFAULT.sequence, tokens)
    elif sequence > tokens:
        raise UsageError(f"--sequence {sequence} is longer than the {tokens} --tokens of a step: make it no longer.")
    assumptions = Assumptions(
        tokens, sequence, other_tflops and other_tflops * 1e12, gpus_per_node, node_link * 1e9, network_link * 1e9,
        weight_bytes, grad_bytes, optimizer_bytes, checkpointing,
    )  # fmt: skip
    for name, value in asdict(assumptions).items():
        if value is not None and not value < TOO_LARGE:
            option = name.replace("other_flops", "other_tflops").replace("_", "-")
            raise UsageError(f"--{option} is {value}: name a finite number below {TOO_LARGE:.0e} for it.")
    names = several("models", models, tuple(MODELS))
    sizes, groups = numbers("--gpus", gpus), numbers("--ep", ep)
    file = shipped(MEASURED, CURE.rstrip(".")) if measured is None else measured
    rates = {name: measured_rates(file, name) for name in names}
    rows = [
        estimate(name, size, group, rates[name], assumptions)
        for name in names
        for size in sizes
        for group in groups
        if size % group == 0 and MODELS[name].layer.experts % group == 0
    ]
    if not rows:
        raise UsageError(
            f"No --ep of {ep} divides both the GPUs ({gpus}) and the experts of a model "
            f"({', '.join(f'{name}: {MODELS[name].layer.experts}' for name in names)}). --ep 1 always does."
        )
    notes = basis(rates, assumptions, file)
    planned = {(row.model, row.gpus) for row in rows}
    if missing := [f"{name} on {size} GPUs" for name in names for size in sizes if (name, size) not in planned]:
        notes.append(f"Left out, since no --ep of {ep} divides GPUs and experts: {', '.join(missing)}.")
    if as_json:
        estimates = [asdict(row) | {"memory": row.memory, "step_s": row.step_s} for row in rows]
        report = {"assumptions": asdict(assumptions), "notes": notes, "estimates": estimates}
        typer.echo(json.dumps(report, indent=2))
    elif markdown:
        typer.echo(as_markdown(rows, notes, tokens))
    else:
        table = Table(*COLUMNS, title="Estimated, not measured")
        for row in rows:
            table.add_row(*cells(row, tokens))
        console = wide_console(220)
        console.print(table)
        for note in notes:
            console.print(f"- {note}", highlight=False)


def numbers(option: str, text: str) -> list[int]:
    """The numbers of a comma-separated option."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) < 10 and int(part) for part in parts):
        raise UsageError(f"{option} {text!r} is not a list of numbers of GPUs, such as 8,64.")
    return list(dict.fromkeys(map(int, parts)))


def measured_rates(path: Path, name: str) -> Rates:
    """The rates of the model's own layer where the file has it, else of the one nearest in width.

    Raises:
        UsageError: no such file, or it holds no measurement of these kernels on a GPU, or several of one layer.
    """
    if not path.is_file():
        raise UsageError(f"{path} is not there: {CURE}")
    try:
        rows = Bench.model_validate(read_json(path, CURE)).results
    except ValidationError:
        raise UsageError(f"{path} is no result of `moe-kernels bench`: {CURE}") from None
    ours: dict[str, list[Row]] = {}
    for row in rows:
        if row.implementation in OURS and row.device != "cpu" and row.forward_tflops and row.forward_backward_tflops:
            ours.setdefault(row.shape, []).append(row)
    if not ours:
        raise UsageError(
            f"{path} holds no measurement of moe_kernels on a GPU. Run `moe-kernels bench --json` on one."
        )
    width = MODELS[name].layer.intermediate
    shape = name if name in ours else min(ours, key=lambda s: abs(math.log(ours[s][0].intermediate / width)))
    row, *others = ours[shape]
    if others:
        found = [f"{row.dtype}, {row.routing} routing, {row.tokens} tokens" for row in ours[shape]]
        raise UsageError(
            f"{path} holds {shape} {len(found)} times ({'; '.join(found)}), and plan takes one. Cure: name a file of "
            "`moe-kernels bench --json` with one --dtype, --routing and --tokens."
        )
    forward, both = row.forward_tflops or 0.0, row.forward_backward_tflops or 0.0
    dtype = "" if row.dtype == "bfloat16" else f", {row.dtype}"
    source = f"{shape} (I={row.intermediate}{dtype}) on {row.device}: {forward:.0f} and {both:.0f} TFLOP/s"
    return Rates(forward * 1e12, both * 1e12, source)


def basis(rates: dict[str, Rates], a: Assumptions, measured: Path) -> list[str]:
    """What the numbers rest on, one sentence each."""
    other = "Not estimated: the time of everything else, and with it tokens/s. Name --other-tflops for them."
    if a.other_flops is not None:
        other = f"Assumed: everything else runs at {a.other_flops / 1e12:.0f} TFLOP/s (--other-tflops)."
    return [
        *(
            f"Measured ({measured.name}): expert layers of {name} run (forward; forward and backward) as "
            f"{rate.source}."
            for name, rate in rates.items()
        ),
        other,
        f"Assumed: a GPU sends {a.node_link / 1e9:.0f} GB/s within its node of {a.gpus_per_node} (--node-link, "
        f"--gpus-per-node) and {a.network_link / 1e9:.0f} GB/s to other nodes (--network-link), without contention.",
        f"{a.tokens} tokens per GPU and step in sequences of {a.sequence}, routed evenly; activations "
        f"{'checkpointed' if a.checkpointing else 'kept'}.",
        f"Bytes kept per parameter: {a.weight_bytes} + {a.grad_bytes} + {a.optimizer_bytes} (weights + gradients + "
        "optimizer), sharded over all GPUs.",
        "The all-to-all overlaps with nothing; the traffic of FSDP with all the rest.",
        "Left out: latency, the optimizer's step, loading of data, fragmentation of memory. Compare the memory with "
        "that of your GPU.",
    ]


def cells(row: Estimate, tokens: int) -> list[str]:
    """One row of the table, as text."""
    gigabytes = (row.weights, row.grads, row.optimizer, row.gathered, row.activations, row.memory, row.all_to_all)
    times = (row.experts_s, row.other_s, row.all_to_all_s, row.fsdp_s)
    rate = tokens / row.step_s if row.step_s else None
    return [
        row.model,
        str(row.gpus),
        str(row.ep),
        *(f"{value / 1e9:.1f}" for value in gigabytes),
        *("-" if value is None else f"{1e3 * value:.0f}" for value in times),
        *("-" if rate is None else f"{rate * gpus:,.0f}" for gpus in (1, row.gpus)),
    ]


def as_markdown(rows: list[Estimate], notes: list[str], tokens: int) -> str:
    """The table and what it rests on, for the documentation."""
    lines = (COLUMNS, ("---",) * len(COLUMNS), *(cells(row, tokens) for row in rows))
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", *(f"- {note}" for note in notes)])
