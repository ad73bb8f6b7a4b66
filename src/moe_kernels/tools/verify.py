"""`moe-kernels verify`: check every kernel configuration on this machine."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moe_kernels.registry import names
from moe_kernels.shapes import DEFAULT_SHAPES, LAYERS, LayerShape
from moe_kernels.tools.check.forms import FORMS, PLAIN, called, in_form, why_not
from moe_kernels.tools.common.console import wide_console
from moe_kernels.tools.common.errors import CHECK_FAILED, UsageError
from moe_kernels.tools.common.options import DTYPES, chosen_forms, ensure_writable, one_of, pick_device, several

if TYPE_CHECKING:
    import torch

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


class Check(NamedTuple):
    """A problem, what it is called, and the routings to try."""

    case: Case
    name: str
    form: str
    routings: Sequence[str]


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
    form: Annotated[
        str | None,
        typer.Option(
            help=f"How the layers of --shapes are trained, comma-separated, or all: {', '.join(FORMS)}.",
            show_default=PLAIN,
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

    TARGET is a run file (.yml), or a model's folder or config.json: verify its expert layers, in its dtype and as
    they are trained: with LoRA of its rank, over weights in 4 bits, fp8 or mxfp4.

    Errors are against the plain reference in float64, on the dequantised weights. They may be 1.25 times (root mean
    square) and twice (maximum) those of plain PyTorch in the same dtype, without bias. Where activations are rounded
    to fp8, reference and plain PyTorch round them too, at the same places. Routings are hostile (empty experts, one
    expert for all, dropped ids, duplicates), unwritten memory is NaN, and two runs must agree bit by bit. Exit code 1
    if anything fails.
    """
    import torch

    from moe_kernels.tools.check.verification import TORCH_CONFIGURATIONS, TRITON_CONFIGURATIONS, verify_case
    from moe_kernels.tools.common.machine import environment

    console = Console(stderr=True)
    if dtype is not None:
        one_of("dtype", dtype, tuple(DTYPES))
    one_of("backend", backend, names())
    where = pick_device(device)
    if target is None:
        kind = getattr(torch, DTYPES[dtype or "bf16"])
        chosen = PLAIN if form is None else form
        forms = chosen_forms(chosen, kind, where, lambda reason: console.print(reason, style="yellow"))
        which = DEFAULT if shapes is None else shapes
        wanted = [check for name in forms for check in _checks_of_shapes(which, name, kind)]
    elif shapes is not None or form is not None:
        raise UsageError("Name a run file or a model, or --shapes and --form, not both.")
    else:
        wanted = _checks_of_target(target, dtype, where)
    wanted = [_sized(check, where.type == "cuda", tokens) for check in wanted]
    ensure_writable(json_file)
    plain_torch = backend == "torch" or (backend == "auto" and where.type == "cpu")
    if plain_torch and where.type == "cpu":
        console.print("No NVIDIA GPU: this checks the plain-torch backend on the CPU.", style="yellow")

    began, verdicts = time.perf_counter(), []
    with console.status("verifying") as status:
        for check in wanted:
            verdicts += verify_case(
                check.case,
                check.name,
                device=where,
                form=check.form,
                routings=check.routings,
                configurations=TORCH_CONFIGURATIONS if plain_torch else TRITON_CONFIGURATIONS,
                backend=backend,
                progress=lambda message: status.update(escape(message)),
            )
    seconds = time.perf_counter() - began
    reasons = {failure for verdict in verdicts for failure in verdict.failures}
    if len(reasons) == 1 and not any(verdict.routings for verdict in verdicts):
        raise UsageError(f"Nothing of this runs here: {reasons.pop()}")
    output = wide_console()
    output.print(_table(verdicts))
    for verdict in verdicts:
        for failure in verdict.failures:
            where_it_failed = f"group_size={verdict.group_size}, persistent={verdict.persistent}"
            output.print(f"{verdict.shape}, {verdict.form}, {where_it_failed}: {failure}", style="red", markup=False)
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


def _checks_of_shapes(shapes: str, form: str, dtype: torch.dtype) -> list[Check]:
    """Each of the named shapes in a form."""
    from moe_kernels.tools.check.problems import Case
    from moe_kernels.tools.check.routings import ROUTINGS

    chosen = several("shapes", shapes, (SMALL, *LAYERS))
    small = SMALL_SHAPES if SMALL in chosen else ()
    layers = [LAYERS[name] for name in chosen if name != SMALL]
    return [
        Check(in_form(Case.of(shape, dtype), form), shape.name, form, ROUTINGS if shape in small else LAYER_ROUTINGS)
        for shape in (*small, *layers)
    ]


def _checks_of_target(target: Path, dtype: str | None, device: torch.device) -> list[Check]:
    """Each kind of expert layer of a run file or a model, in its dtype unless another is asked for.

    Raises:
        UsageError: the run file trains what cannot be checked here.
    """
    import torch

    from moe_kernels.tools.common.layers import expert_layers, read_target

    found = read_target(target)
    kind = getattr(torch, DTYPES[dtype or found.dtype])
    checks = []
    for name, case in expert_layers(found):
        if reason := why_not(case.packed, kind, device):
            raise UsageError(f"{target}: {name} is {called(case)}, and {reason}")
        checks.append(Check(replace(case, dtype=kind), name, called(case), LAYER_ROUTINGS))
    return checks


def _sized(check: Check, gpu: bool, tokens: int | None) -> Check:
    """The check as this device can do it in time."""
    case, routings = check.case, check.routings
    if routings is LAYER_ROUTINGS:
        most, shrink = (GPU_TOKENS, 1) if gpu else (CPU_TOKENS, CPU_SHRINK)
        case = replace(
            case,
            # Float64 is slow: as many rows as it takes to fill tiles, not as many as a training has.
            tokens=tokens or min(case.tokens, most),
            hidden=max(1, case.hidden // shrink),
            intermediate=max(1, case.intermediate // shrink),
        )
    return check._replace(case=case.fitting(), routings=routings if case.tokens > 1 else ONE_TOKEN_ROUTINGS)


def _table(verdicts: list[Verdict]) -> Table:
    table = Table(
        caption="Errors over those of plain PyTorch in the same dtype, both against float64; the worst of "
        "routings and tensors.",
        caption_justify="left",
    )
    for column in ("shape", "form", "dtype", "backend", "group_size", "persistent"):
        table.add_column(column, no_wrap=True)
    for column in ("routings", "rms", "max", "scale error", "bitwise twice", "verdict"):
        table.add_column(column, justify="right", no_wrap=True)
    for v in verdicts:
        errors = (f"{v.rms_ratio:.2f}", f"{v.max_ratio:.2f}", f"{v.slope_error:.1e}")
        said = ("yes" if v.repeatable else "[red]no", "[green]right" if v.ok else "[red]WRONG")
        knobs = (str(v.group_size), str(v.persistent).lower(), str(v.routings))
        table.add_row(v.shape, v.form, v.dtype, v.backend, *knobs, *errors, *said)
    return table
