"""Tile sizes as data: the tile of each kernel by GPU generation, dtype and group size.

``benchmarks/results`` holds the measurements they come from.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class GemmConfig:
    """One tile configuration.

    Attributes:
        block_m, block_n, block_k: tile sizes; for row-tiled kernels block_m is the group size.
        num_warps, num_stages: options of Triton's compiler.
        group_m: row tiles that are visited together for each block of columns, for L2 reuse of the weights.
        flatten: fuse the loop over tiles with the loop over k blocks, so that the next tile is prefetched.
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


def table(
    capability: tuple[int, int] | None, dtype: torch.dtype, tma: bool
) -> dict[tuple[str, int | None], GemmConfig]:
    """The configurations in use, keyed by (kernel, group size); capability None is the interpreter."""
    if dtype == torch.float32:
        return _FLOAT32
    if not tma:
        return _POINTER
    return _BLACKWELL if capability is not None and capability >= (10, 0) else _HOPPER
