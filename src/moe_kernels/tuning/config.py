"""Tile sizes as data: which tile each kernel uses, by GPU generation, dtype and group size.

Nothing is searched or timed while a model trains: the choice is what ``tuning/tuned.py`` finds for the sizes at hand,
or else the tables below. ``benchmarks/results`` holds the measurements they come from.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch

from moe_kernels.backends import device_capability
from moe_kernels.tuning import tuned


@dataclass(frozen=True)
class GemmConfig:
    """One tile configuration.

    Attributes:
        block_m, block_n, block_k: tile sizes; for row-tiled kernels block_m is the group size.
        num_warps, num_stages: Triton's launch options.
        group_m: row tiles that walk all columns together, for L2 reuse of the weights.
        flatten: fuse the loop over tiles and the K loop, so that loads of the next tile start early.
        programs_per_sm: size of the persistent grid, in programs per multiprocessor.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8
    flatten: bool = False
    programs_per_sm: int = 1


ROW_TILED = ("up", "down", "dgrad")
KERNELS = (*ROW_TILED, "wgrad")

# Measured on an H200 with torch 2.11 and triton 3.6, 2026-11-23: benchmarks/results/h200-tiles.json.
_HOPPER = {
    ("up", 64): GemmConfig(64, 128, 64, 8, 4),
    ("up", 128): GemmConfig(128, 128, 64, 8, 3),
    ("up", 256): GemmConfig(256, 64, 64, 8, 3),
    ("down", 64): GemmConfig(64, 256, 64, 8, 4, flatten=True),
    ("down", 128): GemmConfig(128, 256, 64, 8, 4, flatten=True),
    ("down", 256): GemmConfig(256, 128, 64, 8, 4, flatten=True),
    ("dgrad", 64): GemmConfig(64, 256, 64, 8, 4),
    ("dgrad", 128): GemmConfig(128, 256, 64, 8, 4, flatten=True),
    ("dgrad", 256): GemmConfig(256, 128, 64, 8, 3, flatten=True),
    ("wgrad", None): GemmConfig(128, 128, 64, 4, 3),
}
# Pointer loads: GPUs without TMA or with less shared memory (99 KiB a thread block on Ada and on Blackwell of
# capability 12), and on every GPU sizes that are not multiples of 16.
_POINTER = {
    ("up", 64): GemmConfig(64, 64, 32, 4, 3),
    ("up", 128): GemmConfig(128, 64, 32, 8, 3),
    ("up", 256): GemmConfig(256, 32, 32, 8, 3),
    ("down", 64): GemmConfig(64, 128, 32, 4, 3),
    ("down", 128): GemmConfig(128, 128, 32, 8, 3),
    ("down", 256): GemmConfig(256, 64, 32, 8, 3),
    ("dgrad", 64): GemmConfig(64, 128, 32, 4, 3),
    ("dgrad", 128): GemmConfig(128, 128, 32, 8, 3),
    ("dgrad", 256): GemmConfig(256, 64, 32, 8, 3),
    ("wgrad", None): GemmConfig(128, 128, 32, 8, 3),
}
# float32 in IEEE precision runs on the CUDA cores: small tiles, on every GPU.
_FLOAT32 = {key: GemmConfig(key[1] or 64, 32, 32, 4 if (key[1] or 64) == 64 else 8, 2) for key in _HOPPER} | {
    ("up", 256): GemmConfig(256, 16, 32, 8, 2),  # 32 columns spill registers on sm_80 with triton 3.8
}
# Not measured. Fewer stages' worth of registers, and no fused loops: the compiler of triton 3.6 fails on them for
# sm_100 where a GEMM has a low-rank part.
_BLACKWELL = {key: dataclasses.replace(config, flatten=False) for key, config in _HOPPER.items()} | {
    ("up", 64): GemmConfig(64, 128, 32, 8, 4),
    ("up", 128): GemmConfig(128, 128, 32, 8, 3),
    ("up", 256): GemmConfig(256, 64, 32, 8, 3),
}


def loads_by_tma(capability: tuple[int, int] | None) -> bool:
    """Whether 16-bit GEMMs load by TMA; capability None is the interpreter."""
    return capability is None or (9, 0) <= capability < (12, 0)


def table(
    capability: tuple[int, int] | None, dtype: torch.dtype, tma: bool
) -> dict[tuple[str, int | None], GemmConfig]:
    """The configurations in use, keyed by (kernel, group size); capability None is the interpreter."""
    if dtype == torch.float32:
        return _FLOAT32
    if not tma:
        return _POINTER
    return _BLACKWELL if capability is not None and capability >= (10, 0) else _HOPPER


_overrides: dict[str, GemmConfig] = {}
Choice = TypeVar("Choice")
# Called when the same sizes may get other tiles than before.
on_change: list[Callable[[], None]] = []


def changed() -> None:
    """Tell everyone who remembers what was chosen."""
    for forget in on_change:
        forget()


@contextlib.contextmanager
def override(choices: dict[str, Choice], kernel: str, choice: Choice) -> Iterator[None]:
    """Within this context ``choices`` has ``choice`` for ``kernel``."""
    previous = dict(choices)
    choices[kernel] = choice
    changed()
    try:
        yield
    finally:
        choices.clear()
        choices.update(previous)
        changed()


@contextlib.contextmanager
def use_config(kernel: str, config: GemmConfig) -> Iterator[None]:
    """Within this context ``kernel`` uses ``config``: for measuring candidates and for tests, not for training."""
    with override(_overrides, kernel, config):
        yield


def select_config(
    kernel: str,
    device: torch.device,
    dtype: torch.dtype,
    group_size: int | None,
    tma: bool,
    sizes: tuple[int, int, int] | None,
) -> GemmConfig:
    """The tile that ``kernel``, one of :data:`KERNELS`, uses.

    Args:
        kernel: name of the kernel.
        device, dtype: of the weights.
        group_size: rows per tile; None for wgrad.
        tma: loads by TMA.
        sizes: rows per expert, columns of the result, length of the inner products: see ``tuned.Sizes``. None for a
            kernel with a bias, a low-rank part or weights stored by columns: tiles are tuned without, and what fits
            a multiprocessor without need not fit with.

    Raises:
        TunedTilesError: there is a file of tuned tiles for this GPU that cannot be used.
    """
    if kernel in _overrides:
        return _overrides[kernel]
    return _choose(kernel, device, dtype, group_size, tma, sizes)


@functools.lru_cache(maxsize=4096)
def _choose(
    kernel: str,
    device: torch.device,
    dtype: torch.dtype,
    group_size: int | None,
    tma: bool,
    sizes: tuple[int, int, int] | None,
) -> GemmConfig:
    if sizes is not None and dtype != torch.float32:  # tiles are tuned in 16 bits
        found = tuned.find(kernel, device, group_size, tma, tuned.Sizes(*sizes))
        if found is not None:
            return GemmConfig(**found)
    return table(device_capability(device), dtype, tma)[kernel, group_size]


def forget_tuned_tiles() -> None:
    """Read the files of tuned tiles again at the next launch."""
    tuned.tiles_of.cache_clear()
    _choose.cache_clear()
    changed()
