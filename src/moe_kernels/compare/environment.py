"""What a measurement depends on: versions, the device, and the very code of the kernels."""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path

import moe_kernels
from moe_kernels.bench.environment import commit, installed_version

PACKAGES = ("torch", "triton", "transformers", "accelerate", "axolotl", "wandb", "numpy")
COMMIT, SOURCES = "moe-kernels commit", "moe-kernels sources"
NO_COMMIT = "not a git checkout"
# What decides how an expert layer runs. The tools around it (this one too) do not.
KERNEL_SOURCES = ("*.py", "kernels", "tuning", "integrations")


def versions() -> dict[str, str]:
    """Python's and the packages' versions; ``"not installed"`` where one is missing."""
    return {
        "python": platform.python_version(),
        **{package: installed_version(package) or "not installed" for package in PACKAGES},
        "moe-kernels": moe_kernels.__version__,
        COMMIT: commit() or NO_COMMIT,
        SOURCES: source_hash(),
    }


def with_commit(measured: dict[str, str]) -> dict[str, str]:
    """Versions measured outside a git checkout, with this checkout's commit where the sources are the very same."""
    here = commit()
    if measured.get(COMMIT) != NO_COMMIT or measured.get(SOURCES) != source_hash() or here is None:
        return measured
    return {**measured, COMMIT: f"{here} (by the hash of the sources)"}


def source_hash() -> str:
    """A short hash of the kernels and of all that decides which of them runs."""
    package = Path(moe_kernels.__file__).resolve().parent
    files = [file for pattern in KERNEL_SOURCES for file in _files(package, pattern)]
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


def cpu_name() -> str:
    """The processor's name, as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor() or platform.machine()
