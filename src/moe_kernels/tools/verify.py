"""`moe-kernels verify`: is every kernel configuration right on this very machine?"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moe_kernels.registry import names
from moe_kernels.shapes import LAYERS, LayerShape
from moe_kernels.tools.common.errors import CHECK_FAILED, MissingDependency, UsageError
from moe_kernels.tools.common.options import ensure_writable, one_of, several

if TYPE_CHECKING:
    import torch

    from moe_kernels.tools.check.problems import Case
    from moe_kernels.tools.check.verification import Verdict

SCHEMA = 1
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
SMALL = "small"
#: No multiple of any tile, one token, more experts than rows, one expert for everything.
SMALL_SHAPES: tuple[LayerShape, ...] = (
    LayerShape("odd", 97, 72, 40, 5, 2),
    LayerShape("ragged", 257, 136, 88, 16, 4),
    LayerShape("one-token", 1, 64, 64, 8, 4),
    LayerShape("many-experts", 33, 64, 32, 64, 8),
    LayerShape("one-expert", 130, 64, 48, 1, 1),
)
DEFAULT_SHAPES = f"{SMALL},mixtral-1b,qwen2-moe-1b,deepseek-v3-1b"
#: A real layer keeps its sizes on a GPU and shrinks on a CPU.
GPU_TOKENS, CPU_TOKENS, CPU_SHRINK = 1024, 48, 8
#: Where all slots of the only token meet one expert, every error is one number: nothing to judge it by.
ONE_TOKEN_ROUTINGS = ("random", "sentinels", "all_sentinels")
LAYER_ROUTINGS = ("random", "zipf", "one_hot_expert", "sentinels")
TABLE_WIDTH = 150


def verify(
    target: Annotated[
        Path | None,
        typer.Argument(
            help="A run file (.yml), or a model's folder or config.json: verify its expert layers, in its dtype.",
            show_default="the shapes of --shapes",
        ),
    ] = None,
    shapes: Annotated[
        str | None,
        typer.Option(
            help=f"Comma-separated, or all: small (the hostile sizes), and of {', '.join(LAYERS)}.",
            show_default=DEFAULT_SHAPES,
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="bf16, fp16 or fp32.", show_default="the run file's, else bf16")
    ] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of the real layers.")] = None,
    backend: Annotated[str, typer.Option(help="auto, triton, gluon or torch.")] = "auto",
    device: Annotated[str, typer.Option(help="cuda, cpu, or auto: a GPU if there is one.")] = "auto",
    json_file: Annotated[
        Path | None, typer.Option("--json", dir_okay=False, help="Also write the verdicts to this file.")
    ] = None,
) -> None:
    """Check output and every gradient of every kernel configuration on this machine.

    The truth is the plain reference in float64; the yardstick is plain PyTorch in the same dtype: an error
    may be 1.25 times its root mean square and twice its maximum, without bias. Routings are hostile (empty
    experts, one expert for all, dropped ids, duplicates), unwritten memory is NaN, and every case runs twice
    and must agree bit by bit. Exit code 1 if anything fails.
    """
    import torch

    from moe_kernels.tools.check.verification import TORCH_CONFIGURATIONS, TRITON_CONFIGURATIONS, verify_case

    console = Console(stderr=True)
    if dtype is not None:
        one_of("dtype", dtype, tuple(DTYPES))
    one_of("backend", backend, names())
    where = _device(device)
    if target is not None and shapes is not None:
        raise UsageError("Name a run file or a model, or --shapes, not both.")
    if target is not None:
        wanted = _target(target, where.type, tokens, dtype)
    else:
        kind = getattr(torch, DTYPES[dtype or "bf16"])
        wanted = [
            (_case(shape, kind), shape.name, routings)
            for shape, routings in _shapes(DEFAULT_SHAPES if shapes is None else shapes, where.type, tokens)
        ]
    ensure_writable(json_file)
    if where.type == "cpu":
        console.print("No NVIDIA GPU: this checks the plain-torch backend on the CPU.", style="yellow")

    plain_torch = backend == "torch" or (backend == "auto" and where.type == "cpu")
    began, verdicts = time.perf_counter(), []
    with console.status("verifying") as status:
        for case, name, routings in wanted:
            verdicts += verify_case(
                case,
                name,
                device=where,
                routings=routings,
                configurations=TORCH_CONFIGURATIONS if plain_torch else TRITON_CONFIGURATIONS,
                backend=backend,
                progress=lambda message: status.update(escape(message)),
            )
    seconds = time.perf_counter() - began
    output = Console()
    output.width = max(output.width, TABLE_WIDTH)
    output.print(_table(verdicts))
    for verdict in verdicts:
        for failure in verdict.failures:
            where_it_failed = f"group_size={verdict.group_size}, persistent={verdict.persistent}"
            output.print(f"{verdict.shape}, {where_it_failed}: {failure}", style="red", markup=False)
    if json_file is not None:
        _write(json_file, verdicts, seconds)
    bad = sum(not verdict.ok for verdict in verdicts)
    where_name = torch.cuda.get_device_name(where) if where.type == "cuda" else "the CPU"
    output.print(
        f"{len(verdicts) - bad} of {len(verdicts)} configurations right on {where_name} ({seconds:.0f} s)",
        style="red" if bad else "green",
        highlight=False,
    )
    if bad:
        raise typer.Exit(CHECK_FAILED)


def _device(wanted: str) -> torch.device:
    import torch

    one_of("device", wanted, ("auto", "cuda", "cpu"))
    if wanted == "cuda" and not torch.cuda.is_available():
        raise MissingDependency("torch sees no NVIDIA GPU. Cure: `moe-kernels doctor`, or --device cpu")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def _shapes(names: str, device_type: str, tokens: int | None) -> list[tuple[LayerShape, Sequence[str]]]:
    """The named shapes, each with its routings."""
    from moe_kernels.tools.check.routings import ROUTINGS

    chosen: list[tuple[LayerShape, Sequence[str]]] = []
    for name in several("shapes", names, (SMALL, *LAYERS)):
        if name == SMALL:
            chosen += [(s, tuple(ROUTINGS) if s.tokens > 1 else ONE_TOKEN_ROUTINGS) for s in SMALL_SHAPES]
            continue
        layer = LAYERS[name]
        if device_type == "cuda":
            layer = replace(layer, tokens=tokens or GPU_TOKENS)
        else:
            layer = replace(
                layer,
                tokens=tokens or CPU_TOKENS,
                hidden=layer.hidden // CPU_SHRINK,
                intermediate=layer.intermediate // CPU_SHRINK,
            )
        chosen.append((layer, LAYER_ROUTINGS))
    return chosen


def _case(shape: LayerShape, dtype: torch.dtype) -> Case:
    from moe_kernels.tools.check.problems import Case

    return Case(shape.tokens, shape.top_k, shape.experts, shape.hidden, shape.intermediate, dtype)


def _target(
    path: Path, device_type: str, tokens: int | None, dtype: str | None
) -> list[tuple[Case, str, Sequence[str]]]:
    """The expert layers of a run file's model, or of a model, each kind once, with its routings."""
    import torch

    from moe_kernels.tools.common.layers import expert_layers, read_target

    found = read_target(path)
    kind = getattr(torch, DTYPES[dtype or found.dtype])
    gpu = device_type == "cuda"
    cases: list[tuple[Case, str, Sequence[str]]] = []
    for name, case in expert_layers(found):
        case = replace(
            case,
            dtype=kind,
            # Float64 is slow: as many rows as it takes to fill tiles, not as many as a training has.
            tokens=tokens or min(found.tokens, GPU_TOKENS if gpu else CPU_TOKENS),
            hidden=case.hidden if gpu else max(1, case.hidden // CPU_SHRINK),
            intermediate=case.intermediate if gpu else max(1, case.intermediate // CPU_SHRINK),
        )
        cases.append((case, name, LAYER_ROUTINGS if case.tokens > 1 else ONE_TOKEN_ROUTINGS))
    return cases


def _table(verdicts: list[Verdict]) -> Table:
    table = Table(
        caption="Errors over those of plain PyTorch in the same dtype, both against float64; the worst of "
        "routings and tensors.",
        caption_justify="left",
    )
    for column in ("shape", "dtype", "backend", "group_size", "persistent"):
        table.add_column(column, no_wrap=True)
    for column in ("routings", "rms", "max", "scale error", "bitwise twice", "verdict"):
        table.add_column(column, justify="right", no_wrap=True)
    for verdict in verdicts:
        table.add_row(
            verdict.shape,
            verdict.dtype,
            verdict.backend,
            str(verdict.group_size),
            str(verdict.persistent).lower(),
            str(verdict.routings),
            f"{verdict.rms_ratio:.2f}",
            f"{verdict.max_ratio:.2f}",
            f"{verdict.slope_error:.1e}",
            "yes" if verdict.repeatable else "[red]no",
            "[green]right" if verdict.ok else "[red]WRONG",
        )
    return table


def _write(file: Path, verdicts: list[Verdict], seconds: float) -> None:
    from moe_kernels.tools.common.machine import environment

    report = {
        "schema": SCHEMA,
        "kind": "verify",
        "environment": environment(),
        "seconds": round(seconds, 1),
        "results": [{**asdict(verdict), "ok": verdict.ok} for verdict in verdicts],
    }
    file.write_text(json.dumps(report, indent=1) + "\n")
