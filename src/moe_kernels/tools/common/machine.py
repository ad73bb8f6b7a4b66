"""What a measurement ran on: every result file carries it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import moe_kernels

PACKAGES: tuple[str, ...] = (
    "torch",
    "triton",
    "transformers",
    "axolotl",
    "numpy",
    # the peers
    "liger-kernel",
    "kernels",
    "nvidia-cutlass-dsl",
    "apache-tvm-ffi",
)
#: What decides how an expert layer runs. The tools around it do not.
KERNEL_SOURCES = ("*.py", "backends", "kernels", "integrations", "telemetry")


def installed_version(package: str) -> str | None:
    """Version of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _printed(*command: str) -> str | None:
    """What a command prints, run in the folder of this file; None where it fails or is not there."""
    here = Path(__file__).resolve().parent
    try:
        return subprocess.run(
            command, cwd=here, capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def commit() -> str | None:
    """Git commit of the source tree this package is run from (with ``+changes``), or None outside a clone."""
    head = _printed("git", "rev-parse", "HEAD")
    changes = _printed("git", "status", "--porcelain", "--untracked-files=no")
    return None if head is None or changes is None else head + ("+changes" if changes else "")


def source_hash(patterns: Sequence[str] | None = None) -> str:
    """A short hash of sources; without ``patterns``, of the kernels and of what chooses between them."""
    package = Path(moe_kernels.__file__).resolve().parent
    files = [file for pattern in patterns or KERNEL_SOURCES for file in _files(package, pattern)]
    if patterns is None:
        files += _files(package.parent / "axolotl" / "integrations", "moe_kernels")
    total = hashlib.sha256()
    for file in sorted(set(files)):
        total.update(f"{file.relative_to(package.parent)}\n".encode())
        total.update(file.read_bytes())
    return total.hexdigest()[:12]


def _files(root: Path, pattern: str) -> list[Path]:
    found = [root / pattern] if (root / pattern).is_dir() else list(root.glob(pattern))
    inside = [file for entry in found for file in (entry.rglob("*") if entry.is_dir() else [entry])]
    return [file for file in inside if file.suffix in (".py", ".json")]


def driver_version() -> str | None:
    """Version of the NVIDIA driver, or None where there is none."""
    answer = _printed("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return answer.split()[0] if answer else None


def tuned_tiles() -> str | None:
    """Fingerprint of the tiles that `moe-kernels tune` found on this GPU, or None where the package's are used."""
    import torch

    from moe_kernels.kernels.tiles import tuned

    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    file = tuned.own_file(device)
    return str(tuned.read(file)["digest"])[:12] if file else None


def _program() -> str:
    """The command of this process: one of benchmarks/*.py, or the command line tool."""
    script = Path(sys.argv[0])
    return f"python benchmarks/{script.name}" if script.parent.name == "benchmarks" else "moe-kernels"


def environment() -> dict[str, str | int | None]:
    """The machine and the versions, as plain JSON values. ``gpu`` is None on a machine without CUDA."""
    import torch
    import triton

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    capability = "{}.{}".format(*torch.cuda.get_device_capability()) if gpu else None
    versions = {name: installed_version(name) for name in PACKAGES}
    versions |= {"torch": torch.__version__, "triton": triton.__version__}  # what runs, whatever pip knows of
    return {
        "gpu": gpu,
        "compute_capability": capability,
        "driver": driver_version(),
        "cpu": platform.processor() or platform.machine(),
        "cpu_count": os.cpu_count(),
        "python": platform.python_version(),
        "moe_kernels": moe_kernels.__version__,
        **versions,
        "commit": commit(),
        # The commit says nothing about changed and untracked files.
        "sources": source_hash(),
        "bench_sources": source_hash(("tools/bench",)),
        "tuned_tiles": tuned_tiles(),
        "command": " ".join([_program(), *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
