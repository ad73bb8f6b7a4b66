"""Several states of these sources in one process, in turns: the evidence for or against a change to the kernels.

    python benchmarks/revisions.py before=HEAD~1 after=. --shapes mixtral-1b,deepseek-v3 --out revisions.json
    python benchmarks/revisions.py now=. tried=../tried --forms plain,fp8-activations-lora-16 --kernels 8
    python benchmarks/revisions.py before=HEAD~1 after=. --device cpu    # tiny: proves the script, not the speed

Each is NAME=REVISION of git or NAME=FOLDER of a checkout. Its package is copied under a name of its own, so that all
are loaded at once and share tensors, the GPU's temperature and its clock. Output and gradients of each are compared
with those of the first, to the bit. Times are GPU times of forward and backward, launches queued ahead, L2 flushed
before each call, in round-robin calls; ``--kernels`` adds the time of every kernel, profiled in turns as well.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import io
import re
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from forms import SHAPES, kernel_times
from moe_kernels.tools.bench.layer import Layer
from moe_kernels.tools.bench.timing import Clock
from moe_kernels.tools.check.forms import FORMS
from moe_kernels.tools.common.files import write_json
from moe_kernels.tools.common.machine import environment
from pages import ROOT

PACKAGE = "src/moe_kernels"


def copied(name: str, what: str, folder: Path) -> str:
    """Copy the package of a revision or checkout into ``folder``, under a name of its own, which is the result.

    Raises:
        SystemExit: ``what`` is neither.
    """
    package = f"moe_kernels_{name}"
    checkout = Path(what)
    if not (checkout / PACKAGE).is_dir():
        checkout = folder / f"{name}-checkout"
        _extract(what, checkout)
    shutil.copytree(checkout / PACKAGE, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    for file in (folder / package).rglob("*.py"):
        file.write_text(re.sub(r"\bmoe_kernels\b", package, file.read_text()))
    return package


def _extract(revision: str, into: Path) -> None:
    try:
        archive = _git("archive", revision, PACKAGE)
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode().strip()
        raise SystemExit(f"{revision} is no folder with {PACKAGE}, and no revision of git: {said}") from error
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(into, filter="data")


def _git(*arguments: str) -> bytes:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, check=True).stdout


def identity(what: str) -> str:
    """The commit of a revision, or a hash of the sources of a folder."""
    package = Path(what) / PACKAGE
    if not package.is_dir():
        return _git("rev-parse", f"{what}^{{commit}}").decode().strip()
    files = sorted(package.rglob("*.py"))
    return f"sources {hashlib.sha256(b''.join(file.read_bytes() for file in files)).hexdigest()[:12]}"


def layer_of(package: str, first: Layer | None, **arguments: Any) -> Layer:
    """The layer of ``first`` for another package, whose classes for packed weights are its own."""
    module = importlib.import_module(f"{package}.tools.bench.layer")
    if first is None or first.case.packed:
        return module.make_layer(**arguments)
    return module.Layer(**{field.name: getattr(first, field.name) for field in fields(first)})


def forward_backward(package: str, layer: Layer) -> Tensor:
    """One call of this package's op; the result is the output."""
    call = importlib.import_module(f"{package}.tools.check.problems").call
    out: Tensor = call(importlib.import_module(package).fused_experts, layer.inputs())
    out.backward(layer.grad_out)
    return out.detach()


def results(package: str, layer: Layer) -> dict[str, Tensor]:
    """Output and gradients of one call, which leaves no gradient behind."""
    found = {"out": forward_backward(package, layer)}
    found |= {name: leaf.grad for name, leaf in layer.leaves().items() if leaf.grad is not None}
    layer.clear_gradients()
    return found


def differences(found: dict[str, Tensor], first: dict[str, Tensor]) -> dict[str, float]:
    """Relative L2 difference of what is not equal to the bit, by name; infinite where one of the two is missing."""
    apart = {}
    for name in found.keys() | first.keys():
        one, other = found.get(name), first.get(name)
        if one is None or other is None:
            apart[name] = float("inf")
        elif not torch.equal(one, other):
            apart[name] = float((one.float() - other.float()).norm() / other.float().norm())
    return apart


def measure(packages: dict[str, str], args: argparse.Namespace, shape: str, form: str) -> list[dict[str, Any]]:
    """A row for each package, of one layer in one form."""
    device = torch.device(args.device)
    arguments = {"shape": SHAPES[shape], "routing": args.routing, "device": device, "dtype": torch.bfloat16}
    layers: dict[str, Layer] = {}
    apart, first = {}, None
    for name, package in packages.items():
        layers[name] = layer_of(package, next(iter(layers.values()), None), **arguments, form=form)
        results(package, layers[name])  # compiles
        found = results(package, layers[name])
        first = found if first is None else first
        apart[name] = differences(found, first)
    del found, first
    calls = {name: partial(forward_backward, package, layers[name]) for name, package in packages.items()}

    def cleanup() -> None:
        for layer in layers.values():
            layer.clear_gradients()

    times = Clock(device).compare(calls, args.repeats, cleanup, lambda: None)
    kernels: dict[str, list[dict[str, list[float]]]] = {name: [] for name in packages}
    for _ in range(args.kernels):
        for name, call in calls.items():
            kernels[name].append(kernel_times(call, 1))
            cleanup()
    rows = []
    for name, spread in times.items():
        row = {"shape": shape, "form": form, "tree": name, "gpu_ms": asdict(spread.queued or spread.total),
               "total_ms": asdict(spread.total), "differs": apart[name]}  # fmt: skip
        if turns := kernels[name]:
            row["kernels_us"] = medians(turns)
        rows.append(row)
    return rows


def medians(turns: list[dict[str, list[float]]]) -> dict[str, list[float]]:
    """Median time of each launch of each kernel. Calls of which the profiler lost launches do not count."""
    counts = [{kernel: len(times) for kernel, times in turn.items()} for turn in turns]
    most = max(counts, key=lambda count: sum(count.values()))
    whole = [turn for turn, count in zip(turns, counts, strict=True) if count == most]
    return {
        kernel: [statistics.median(times) for times in zip(*(turn[kernel] for turn in whole), strict=True)]
        for kernel in most
    }


def main() -> None:
    """Measure each layer and form, write the file after each, and print a line for each state of the sources."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", nargs="+", metavar="NAME=REVISION", help="or NAME=FOLDER; the first is compared to")
    parser.add_argument("--shapes", default="mixtral-1b,qwen2-moe-1b,deepseek-v3-1b", help="comma-separated layers")
    parser.add_argument("--forms", default="plain", help="comma-separated forms: see docs/checks.md")
    parser.add_argument("--routing", default="mild", choices=("balanced", "mild", "heavy"))
    parser.add_argument("--repeats", type=int, default=24, help="rounds")
    parser.add_argument("--kernels", type=int, default=0, metavar="ROUNDS", help="profile every kernel so often")
    parser.add_argument("--limit-s", type=float, default=float("inf"), help="begin no layer after so many seconds")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("revisions.json"))
    args = parser.parse_args()
    trees = dict(tree.partition("=")[::2] for tree in args.trees)
    if len(trees) < len(args.trees) or not all(re.fullmatch(r"\w+", name) and what for name, what in trees.items()):
        parser.error("each state is NAME=REVISION or NAME=FOLDER, the names different and of letters, digits and _")
    if args.device == "cpu" and args.kernels:
        parser.error("--kernels needs a GPU, as there are none on a CPU")
    shapes, forms = ["tiny"] if args.device == "cpu" else args.shapes.split(","), args.forms.split(",")
    for wanted, known, what in ((shapes, SHAPES, "--shapes"), (forms, FORMS, "--forms")):
        if unknown := [name for name in wanted if name not in known]:
            parser.error(f"{what} {','.join(unknown)}: choose from {', '.join(known)}")
    begun, rows = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder:
        sys.path.insert(0, folder)
        packages = {name: copied(name, what, Path(folder)) for name, what in trees.items()}
        identities = {name: identity(what) for name, what in trees.items()}
        for shape in shapes:
            for form in forms:
                if time.monotonic() - begun > args.limit_s:
                    print(f"left out for want of time: {shape}, {form}", flush=True)
                    continue
                here = measure(packages, args, shape, form)
                rows += here
                write_json(args.out, {"schema": 1, "kind": "revisions", "environment": environment(),
                                      "trees": identities, "rows": rows})  # fmt: skip
                for row in here:
                    ratio = here[0]["gpu_ms"]["median"] / row["gpu_ms"]["median"]
                    apart = ", ".join(f"{name} {size:.1e}" for name, size in sorted(row["differs"].items()))
                    result = f"differs: {apart}" if apart else "equal to the bit"
                    print(f"{shape:16} {form:16} {row['tree']:12} {row['gpu_ms']['median']:8.3f} ms  {ratio:.3f} "
                          f"times as fast  {result}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
