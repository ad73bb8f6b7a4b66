"""Tuned tiles: the fastest correct tile of a kernel for a bucket of sizes, measured on one kind of GPU.

`moe-kernels tune` writes them into the user's cache. A process reads them once, at the first launch.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from moe_kernels.kernels.tiles.table import KERNELS, ROW_TILED, GemmConfig
from moe_kernels.settings import TILE_ROWS

logger = logging.getLogger("moe_kernels")

SCHEMA = 1
CACHE_VARIABLE = "MOE_KERNELS_CACHE"
CURE = "Remove the file, or write it again with `moe-kernels tune --fresh`."
_FIELDS = tuple(field.name for field in dataclasses.fields(GemmConfig))
# Least and greatest value of a field.
_POWERS_OF_TWO = {"block_m": (16, 256), "block_n": (16, 512), "block_k": (16, 256), "num_warps": (1, 16)}
_NUMBERS = {"num_stages": (1, 8), "group_m": (1, 64), "programs_per_sm": (1, 4)}


class TunedTilesError(ValueError):
    """A file of tuned tiles cannot be used; the message names the file, what is wrong and the cure."""


class CacheFolderError(TunedTilesError):
    """There is no folder to keep anything in; the message names the cure."""


class Sizes(NamedTuple):
    """What decides which tile is fast, beside the kernel.

    Attributes:
        rows_per_expert: on average.
        width: columns of the result.
        depth: length of the inner products; for a weight gradient its rows.
    """

    rows_per_expert: int
    width: int
    depth: int


class Key(NamedTuple):
    """One line of a table.

    Attributes:
        kernel: up, down, dgrad or wgrad.
        group_size: rows per tile; None for wgrad.
        loads: "tma" or "pointer".
        bucket: see :func:`bucket`.
    """

    kernel: str
    group_size: int | None
    loads: str
    bucket: str


def bucket(sizes: Sizes) -> str:
    """The class of ``sizes``: 27 of them, so that a tile measured on one layer serves its like."""
    rows = "few" if sizes.rows_per_expert < 512 else "some" if sizes.rows_per_expert < 2048 else "many"
    width, depth = ("narrow" if n <= 512 else "medium" if n <= 2048 else "wide" for n in sizes[1:])
    return f"{rows} rows, {width}, {'shallow' if depth == 'narrow' else 'medium' if depth == 'medium' else 'deep'}"


def device_name(device: torch.device) -> str:
    """Name of the GPU, or the device's type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def cache_folder() -> Path:
    """What this package keeps between runs: in ``MOE_KERNELS_CACHE``, or the user's cache folder.

    Raises:
        CacheFolderError: there is neither.
    """
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen)
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if home.startswith("~"):
        raise CacheFolderError(f"this user has no home folder: set {CACHE_VARIABLE} to a folder for the cache.")
    return Path(home, "moe-kernels")


def cache_file(device: torch.device) -> Path:
    """Where `moe-kernels tune` keeps the tiles of this GPU.

    Raises:
        CacheFolderError: there is no cache folder.
    """
    slug = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    return cache_folder() / f"tiles-{slug}.json"


def own_file(device: torch.device) -> Path | None:
    """:func:`cache_file` where there is one; a folder that nobody may look into holds none."""
    try:
        file = cache_file(device)
        return file if file.exists() else None
    except (OSError, TunedTilesError) as error:
        logger.warning("no tuned tiles are used: %s", error)
        return None


@functools.cache
def tiles_of(device: torch.device) -> dict[Key, GemmConfig]:
    """Every tuned tile for ``device``, read once per process.

    Raises:
        TunedTilesError: the file is there and cannot be used.
    """
    file = own_file(device)
    if file is None:
        return {}
    report = read(file)
    if report["triton"] != triton.__version__:
        logger.warning(
            "tuned tiles in %s are not used: verified with triton %s, this is %s. Run `moe-kernels tune`.",
            file, report["triton"], triton.__version__,
        )  # fmt: skip
        return {}
    return {key_of(entry): GemmConfig(**{field: entry[field] for field in _FIELDS}) for entry in report["tiles"]}


def key_of(entry: dict[str, Any]) -> Key:
    """The key of an entry of a report."""
    return Key(*(entry[field] for field in Key._fields))


def read(file: Path) -> dict[str, Any]:
    """The report in ``file``, with every entry checked.

    Raises:
        TunedTilesError: not JSON, another form, changed after it was verified, or a tile that cannot be.
    """
    try:
        report = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:  # brackets without end
        raise TunedTilesError(f"tuned tiles in {file} cannot be read ({error}). {CURE}") from None
    if not isinstance(report, dict) or report.get("kind") != "tiles" or report.get("schema") != SCHEMA:
        raise TunedTilesError(f"{file} holds no tuned tiles of this version. {CURE}")
    missing = {"device", "capability", "triton", "tiles", "digest"} - set(report)
    if missing:
        raise TunedTilesError(f"{file} lacks {', '.join(sorted(missing))}. {CURE}")
    if report["digest"] != digest(report["tiles"]):
        raise TunedTilesError(f"{file} was changed after its tiles were verified. {CURE}")
    for entry in report["tiles"]:
        reason = why_invalid(entry)
        if reason is not None:
            raise TunedTilesError(f"{file}: {reason}. {CURE}")
    return report


def digest(entries: list[dict[str, Any]]) -> str:
    """Fingerprint of the verified entries."""
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def why_invalid(entry: dict[str, Any]) -> str | None:
    """None if an entry of a table is a tile that its kernel could run, else what is wrong with it."""
    lacking = [field for field in (*Key._fields, *_FIELDS) if field not in entry]
    if lacking:
        return f"an entry lacks {', '.join(lacking)}"
    kernel, group_size = entry["kernel"], entry["group_size"]
    name = f"{kernel} g={group_size}, {entry['bucket']}"
    if kernel not in KERNELS:
        return f"{name}: no such kernel"
    if group_size not in (TILE_ROWS if kernel in ROW_TILED else (None,)):
        return f"{name}: no such group size"
    if kernel in ROW_TILED and entry["block_m"] != group_size:
        return f"{name}: block_m={entry['block_m']} is not the group size"
    for field, (low, high) in (_POWERS_OF_TWO | _NUMBERS).items():
        value = entry[field]
        if type(value) is not int or not low <= value <= high or (field in _POWERS_OF_TWO and value & (value - 1)):
            kind = "no power of two" if field in _POWERS_OF_TWO else "not"
            return f"{name}: {field}={value!r} is {kind} from {low} to {high}"
    return None if isinstance(entry["flatten"], bool) else f"{name}: flatten={entry['flatten']!r} is no truth value"
