"""`moe-kernels verify`: check every kernel configuration on this machine."""

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
from moe_kernels.shapes import DEFAULT_SHAPES, LAYERS, LayerShape
from moe_kernels.tools.common.console import wide_console
from moe_kernels.tools.common.errors import CHECK_FAILED, UsageError
from moe_kernels.tools.common.options import DTYPES, ensure_writable, one_of, pick_device, several

if TYPE_CHECKING:
    from moe_kernels.tools.check.problems import Case
    from moe_kernels.tools.check.verification import Verdict

SMALL = "small"
#: No multiple of any tile, one token, more experts than rows, one expert for everything.
SMALL_SHAPES: tuple[LayerShape, ...] = (
    LayerShape("odd", 97, 72, 40, 5, 2),
    LayerShape("ragged", 257, 136, 88, 16, 4),
    LayerShape("one-token", 1, 64, 64, 8, 4),
    LayerShape("many-experts", 33, 64, 32, 64, 8),
    LayerShape("one-expert", 130, 64, 48, 1, 1),
)
DEFAULT = f"{SMALL},{DEFAULT_SHAPES}"
#: A real layer keeps its sizes on a GPU and shrinks on a CPU.
GPU_TOKENS, CPU_TOKENS, CPU_SHRINK = 1024, 48, 8
#: With all slots of one token on one expert, an error is a single number, which has no spread to be judged by.
ONE_TOKEN_ROUTINGS = ("random", "sentinels", "all_sentinels")
LAYER_ROUTINGS = ("random", "zipf", "one_hot_expert", "sentinels")


def verify(
    target: Annotated[
        Path | None,
        typer.Argument(show_default="the shapes of --shapes"),
    ] = None,
    shapes: Annotated[
        str | None,
        typer.Option(
            help=f"Comma-separated, or all: small (the hostile sizes), and of {', '.join(LAYERS)}.",
            show_default=DEFAULT,
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="bf16, fp16 or fp32.", show_default="the run file's, else bf16")
    ] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of the real layers.")] = None,
    backend: Annotated[str, typer.Option(help=f"{', '.join(names())}.")] = "auto",
    device: Annotated[str, typer.Option(help="cuda, cpu, or auto: a GPU if there is one.")] = "auto",
    json_file: Annotated[
        Path | None, typer.Option("--json", dir_okay=False, help="Also write the verdicts to this file.")
    ] = None,
) -> None:
    """Check output and every gradient of every kernel configuration on this machine.

    TARGET is a run file (.yml), or a model's folder or config.json: verify its expert layers, in its dtype.

    Errors are against the plain reference in float64. They may be 1.25 times (root mean square) and twice (maximum)
    those of plain PyTorch in the same dtype, without bias. Routings are hostile (empty experts, one expert for all,
    dropped ids, duplicates), unwritten memory is NaN, and two runs must agree bit by bit. Exit code 1 if anything
    fails.
    """
    import torch

    from moe_kernels.tools.check.verification import TORCH_CONFIGURATIONS, TRITON_CONFIGURATIONS, verify_case
    from moe_kernels.tools.common.machine import environment

    console = Console(stderr=True)
    if dtype is not None:
        one_of("dtype", dtype, tuple(DTYPES))
    one_of("backend", backend, names())
    where = pick_device(device)
    if target is not None and shapes is not None:
        raise UsageError("Name a run file or a model, or --shapes, not both.")
    wanted = _problems(target, DEFAULT if shapes is None else shapes, where.type == "cuda", tokens, dtype)
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
    output = wide_console()
    output.print(_table(verdicts))
    for verdict in verdicts:
        for failure in verdict.failures:
            where_it_failed = f"group_size={verdict.group_size}, persistent={verdict.persistent}"
            output.print(f"{verdict.shape}, {where_it_failed}: {failure}", style="red", markup=False)
    if json_file is not None:
        report = {
            "schema": 1,
            "kind": "verify",
            "environment": environment(),
            "seconds": round(seconds, 1),
            "results": [{**asdict(verdict), "ok": verdict.ok} for verdict in verdicts],
        }
        json_file.write_text(json.dumps(report, indent=1) + "\n")
    bad = sum(not verdict.ok for verdict in verdicts)
    where_name = torch.cuda.get_device_name(where) if where.type == "cuda" else "the CPU"
    output.print(
        f"{len(verdicts) - bad} of {len(verdicts)} configurations right on {where_name} ({seconds:.0f} s)",
        style="red" if bad else "green",
        highlight=False,
    )
    if bad:
        raise typer.Exit(CHECK_FAILED)


def _problems(
    target: Path | None, shapes: str, gpu: bool, tokens: int | None, dtype: str | None
) -> list[tuple[Case, str, Sequence[str]]]:
    """(problem, name, routings) of each kind of expert layer of ``target``, or of the named shapes."""
    import torch

    from moe_kernels.tools.check.problems import Case
    from moe_kernels.tools.check.routings import ROUTINGS
    from moe_kernels.tools.common.layers import expert_layers, read_target

    found = None if target is None else read_target(target)
    kind = getattr(torch, DTYPES[dtype or (found.dtype if found else "bf16")])
    cases: list[tuple[Case, str, Sequence[str]]] = []
    if found is not None:
        layers = expert_layers(found)
    else:
        chosen = several("shapes", shapes, (SMALL, *LAYERS))
        layers = [(name, Case.of(LAYERS[name], kind)) for name in chosen if name != SMALL]
        for shape in SMALL_SHAPES if SMALL in chosen else ():
            cases.append((Case.of(shape, kind), shape.name, ROUTINGS if shape.tokens > 1 else ONE_TOKEN_ROUTINGS))
    most, shrink = (GPU_TOKENS, 1) if gpu else (CPU_TOKENS, CPU_SHRINK)
    for name, case in layers:
        case = replace(
            case,
            dtype=kind,
            # Float64 is slow: as many rows as it takes to fill tiles, not as many as a training has.
            tokens=tokens or min(case.tokens, most),
            hidden=max(1, case.hidden // shrink),
            intermediate=max(1, case.intermediate // shrink),
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
    for v in verdicts:
        errors = (f"{v.rms_ratio:.2f}", f"{v.max_ratio:.2f}", f"{v.slope_error:.1e}")
        said = ("yes" if v.repeatable else "[red]no", "[green]right" if v.ok else "[red]WRONG")
        knobs = (str(v.group_size), str(v.persistent).lower(), str(v.routings))
        table.add_row(v.shape, v.dtype, v.backend, *knobs, *errors, *said)
    return table
