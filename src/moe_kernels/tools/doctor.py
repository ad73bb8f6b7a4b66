"""`moe-kernels doctor`: what will run on this machine, and why not more."""

from __future__ import annotations

import importlib
import importlib.util
import json
import platform
import re
import shutil
from dataclasses import asdict, dataclass
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

import moe_kernels
from moe_kernels.install import pip_install
from moe_kernels.shapes import FAMILIES
from moe_kernels.tools.common.console import wide_console
from moe_kernels.tools.common.errors import CHECK_FAILED
from moe_kernels.tools.common.machine import driver_version, installed_version

OK, NOTE, BROKEN = "ok", "note", "broken"

#: Tested versions, from the first to below the last, as pyproject.toml has them.
TESTED: dict[str, tuple[str, str]] = {
    "torch": ("2.11", "2.16"),
    "triton": ("3.6", "3.10"),
    "transformers": ("5.16.1", "5.25"),
    "axolotl": ("0.19", "0.22"),
}
REQUIRED = ("torch", "triton")
CURES = {
    "torch": f"pip install 'torch<{TESTED['torch'][1]}'",
    "triton": "pip install triton (it comes with torch's CUDA build on Linux)",
    "transformers": pip_install("transformers"),
    "axolotl": f"pip install 'torch<2.15', which Axolotl 0.21 asks for, then {pip_install('axolotl')}",
}
#: Packages of the extra [report], by the module that is imported.
REPORT_MODULES = ("jinja2", "matplotlib", "pynvml", "yaml")
REGISTERED = "moe_kernels.integrations.transformers"
PLUGIN = "axolotl.integrations.moe_kernels.plugin"


@dataclass(frozen=True)
class Finding:
    """One line of the examination: ok, a note (after its cure more would run), or broken."""

    what: str
    status: str
    detail: str
    cure: str = ""


def examine() -> list[Finding]:
    """Everything that decides what runs here, in the order in which to cure it."""
    findings = [
        Finding("moe-kernels", OK, moe_kernels.__version__),
        Finding("python", OK, platform.python_version()),
        *(_version(package) for package in TESTED),
    ]
    if any(finding.status == BROKEN for finding in findings):
        return findings
    reinstall = f"{pip_install()}, with the Python that runs axolotl"
    return [
        *findings,
        _gpu(),
        *_compiler(),
        *_launcher(),
        *_backends(),
        _integration(
            "experts_implementation: moe_kernels",
            "transformers",
            REGISTERED,
            "can be registered",
            CURES["transformers"],
        ),
        _integration("Axolotl plugin", "axolotl", PLUGIN, f"{PLUGIN}.MoeOptimizedPlugin", reinstall),
        _report(),
    ]


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def _version(package: str) -> Finding:
    installed = installed_version(package)
    first, last = TESTED[package]
    if installed is None:
        status = BROKEN if package in REQUIRED else NOTE
        return Finding(package, status, "not installed", CURES[package])
    if _release(first) <= _release(installed) < _release(last):
        return Finding(package, OK, installed)
    cure = f"if something fails, install {package}>={first},<{last}"
    return Finding(package, NOTE, f"{installed} is outside the tested range {first} to below {last}", cure)


def _gpu() -> Finding:
    import torch

    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        detail = f"{torch.cuda.get_device_name()}, sm_{major}{minor}, {memory:.0f} GiB, driver {driver_version()}"
        return Finding("GPU", OK, detail)
    driver = driver_version()
    if driver is None:
        return Finding("GPU", NOTE, "no NVIDIA driver found", "on a CPU everything runs small, slowly and correctly")
    if torch.version.cuda is None:
        return Finding("GPU", NOTE, f"driver {driver}, but torch is a CPU build", "pip install a CUDA build of torch")
    cure = f"update the driver to one for CUDA {torch.version.cuda}, or unset CUDA_VISIBLE_DEVICES"
    return Finding("GPU", NOTE, f"driver {driver} is there, but torch {torch.__version__} sees no GPU", cure)


def _compiler() -> list[Finding]:
    """Triton compiles a small launcher with the system's C compiler at first use on a GPU."""
    import torch

    if not torch.cuda.is_available():
        return []
    if compiler := shutil.which("cc") or shutil.which("gcc") or shutil.which("clang"):
        return [Finding("C compiler", OK, compiler)]
    return [Finding("C compiler", BROKEN, "none found; Triton needs one", "apt install gcc")]


def _launcher() -> list[Finding]:
    """How compiled kernels are launched; without a GPU none is, except in Triton's interpreter."""
    import torch

    from moe_kernels.kernels.device import interpreting
    from moe_kernels.kernels.launch import launch

    if not torch.cuda.is_available() and not interpreting():
        return []
    what = "kernel launches"
    try:
        reason = launch.refusal()
    except ValueError as error:
        return [Finding(what, BROKEN, str(error), f"unset {launch.LAUNCHER_VARIABLE}")]
    if reason is None:
        replayed = "; calls of known sizes are replayed" if launch.launcher() == "replay" else ""
        return [Finding(what, OK, f"direct, from the second launch of a kernel on{replayed}")]
    cure = "nothing, if the GPU is the bottleneck: it costs host time, about a millisecond a layer and step"
    return [Finding(what, NOTE, f"through Triton: {reason}", cure)]


def _backends() -> list[Finding]:
    """For each family's 1B layer in bf16: what ``backend: auto`` chooses, and why the others do not run."""
    import torch

    from moe_kernels import backends

    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    findings = []
    for family in FAMILIES.values():
        size = family.sizes["1b"]
        problem = backends.Problem(
            device_type=device.type,
            capability=backends.device_capability(device),
            dtype=torch.bfloat16,
            experts=size.experts,
            top_k=size.top_k,
            hidden=size.hidden,
            intermediate=size.intermediate,
        )
        reasons = [(name, reason) for name, reason in backends.explain(problem) if reason is not None]
        refusals = [f"{name} does not: {reason.removesuffix('.')}" for name, reason in reasons]
        try:
            chosen, reason = backends.select(problem)
            status, detail = OK, "; ".join([f"{chosen} runs ({reason})", *refusals])
        except backends.UnsupportedProblem as error:
            status, detail = BROKEN, str(error)
        findings.append(Finding(f"experts of {family.name}", status, detail))
    return findings


def _integration(what: str, package: str, module: str, detail: str, cure: str) -> Finding:
    """Whether ``module``, which joins the kernels with ``package``, can be imported."""
    if installed_version(package) is None:
        return Finding(what, NOTE, f"{package} is not installed", CURES[package])
    try:
        importlib.import_module(module)
    except ImportError as error:
        return Finding(what, BROKEN, f"{module}: {error}", cure)
    return Finding(what, OK, detail)


def _report() -> Finding:
    missing = [module for module in REPORT_MODULES if importlib.util.find_spec(module) is None]
    if missing:
        return Finding("compare's report", NOTE, f"missing {', '.join(missing)}", pip_install("report"))
    return Finding("compare's report", OK, "its packages are installed")


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Say what will run on this machine, why not more, and the cure for each missing thing.

    Exit code 1 if something is broken. A missing GPU or a missing extra is a note, not a fault.
    """
    findings = examine()
    if as_json:
        report = {"schema": 1, "kind": "doctor", "findings": [asdict(finding) for finding in findings]}
        typer.echo(json.dumps(report, indent=1))
    else:
        style = {OK: "[green]ok", NOTE: "[yellow]note", BROKEN: "[red]broken"}
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for finding in findings:
            cure = f"\n[bold]cure:[/bold] {escape(finding.cure)}" if finding.cure else ""
            table.add_row(style[finding.status], escape(finding.what), escape(finding.detail) + cure)
        wide_console(80).print(table)
    if any(finding.status == BROKEN for finding in findings):
        raise typer.Exit(CHECK_FAILED)
