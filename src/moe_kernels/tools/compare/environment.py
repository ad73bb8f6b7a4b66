"""What a measurement depends on: versions, the code of the kernels, and the files that a training reads."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path
from typing import Any

import moe_kernels
from moe_kernels.tools.common.machine import commit, installed_version, source_hash

PACKAGES = ("torch", "triton", "transformers", "accelerate", "axolotl", "wandb", "numpy")
COMMIT, SOURCES, BENCH = "moe-kernels commit", "moe-kernels sources", "moe-kernels bench sources"
TILES, LAUNCHER = "moe-kernels tuned tiles", "moe-kernels launcher"
NO_COMMIT = "not a git checkout"
BENCH_SOURCES = ("tools/bench", "tools/compare/experts_bench.py")
# What the layer's measurement, a training with our kernels and one with stock kernels do not depend on. The commit
# never counts: a commit that does not change the kernels must not invalidate runs.
NOT_FOR_LAYER = ("moe-kernels", COMMIT)
NOT_FOR_OURS = (*NOT_FOR_LAYER, BENCH)
NOT_FOR_STOCK = (*NOT_FOR_OURS, SOURCES, TILES, LAUNCHER)
# Keys of a run file that name a model's folder, and lists of data sets.
MODELS = ("base_model", "base_model_config", "tokenizer_config", "lora_model_dir")
DATA = ("datasets", "test_datasets", "pretraining_dataset")
# Keys that decide which tokens are made contain one of these; files that hold only weights end in one of those.
TOKENS = ("token", "dataset", "template", "sequence", "sample", "length", "message", "train_on", "split", "seed")
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


def versions() -> dict[str, str]:
    """Versions of Python and packages, ``"not installed"`` where one is missing, and what our kernels run with."""
    from moe_kernels.kernels.launch.launch import DEFAULT_LAUNCHER, LAUNCHER_VARIABLE

    return {
        "python": platform.python_version(),
        **{package: installed_version(package) or "not installed" for package in PACKAGES},
        "moe-kernels": moe_kernels.__version__,
        COMMIT: commit() or NO_COMMIT,
        SOURCES: source_hash(),
        BENCH: source_hash(BENCH_SOURCES),
        TILES: _tuned_tiles(),
        LAUNCHER: os.environ.get(LAUNCHER_VARIABLE, DEFAULT_LAUNCHER),
    }


def inputs(config: dict[str, Any]) -> list[tuple[str, int, int]]:
    """Name, size and modification time of each file of the models and data sets that a run file names.

    Names that are no path are looked up in the local Hugging Face cache.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    models = [config.get(key) for key in MODELS]
    listed = [entry for key in DATA for entry in _listed(config.get(key))]
    entries = [entry if isinstance(entry, dict) else {"path": entry} for entry in listed]
    data = [name for entry in entries for key in ("path", "data_files") for name in _listed(entry.get(key))]
    files: list[Path] = []
    for kind, pattern, names in (("models", "*", models), ("datasets", "**/*", data)):
        for name in (name for name in names if isinstance(name, str) and name):
            cached = os.path.join(HF_HUB_CACHE, f"{kind}--{name.replace('/', '--')}", "snapshots")
            files += [Path(name)] if os.path.isfile(name) else []
            files += Path(name).glob(pattern) if os.path.isdir(name) else []
            files += Path(cached).glob(f"*/{pattern}") if os.path.isdir(cached) else []
    found = [(str(file), file.stat()) for file in sorted({file for file in files if file.is_file()})]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]


def token_inputs(config: dict[str, Any]) -> list[Any]:
    """What a run's tokens depend on: its data settings, and the files of data and tokenizer as in `inputs`."""
    files = inputs({key: value for key, value in config.items() if key != "lora_model_dir"})
    settings = {key: value for key, value in config.items() if any(part in key for part in TOKENS)}
    settings.pop("dataset_prepared_path", None)
    return [settings, [file for file in files if not file[0].endswith(WEIGHTS)]]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _tuned_tiles() -> str:
    """A short hash of the tiles that `moe-kernels tune` left for any GPU, read without a look at the GPU."""
    import torch

    from moe_kernels.kernels.tiles import tuned

    try:
        files = sorted(tuned.cache_file(torch.device("cpu")).parent.glob("tiles-*.json"))
    except tuned.TunedTilesError:  # this user has no home folder
        return "none"
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12] if files else "none"


def with_commit(measured: dict[str, str]) -> dict[str, str]:
    """The versions, with this checkout's commit where none was recorded and the sources are the same."""
    here = commit()
    if measured.get(COMMIT) != NO_COMMIT or measured.get(SOURCES) != source_hash() or here is None:
        return measured
    return {**measured, COMMIT: f"{here} (by the hash of the sources)"}


def cpu_name() -> str:
    """The processor's name, from the operating system."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor() or platform.machine()
