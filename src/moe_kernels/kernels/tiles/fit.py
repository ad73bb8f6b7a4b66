"""Tiles that are reduced for a narrow output or a low-rank part."""

from __future__ import annotations

import dataclasses
import functools

import torch
import triton

from moe_kernels.kernels.device import shared_memory
from moe_kernels.kernels.tiles.table import GemmConfig
from moe_kernels.problem import UnsupportedProblem


def fit_columns(config: GemmConfig, width: int) -> GemmConfig:
    """``config`` with a smaller ``block_n`` for a narrow output, such as the r columns of a low-rank factor."""
    if width > config.block_n // 2:
        return config
    return _narrowed(config, width)


def fit_rank(config: GemmConfig, rank: int, device: torch.device, element_size: int) -> GemmConfig:
    """``config`` with fewer stages where the factors of a low-rank part need the shared memory.

    Raises:
        UnsupportedProblem: the factors alone do not fit, such as float32 of a rank above 64 on tiles of 256 rows
            where a thread block has 99 KiB.
    """
    limit = shared_memory(device) if rank else None
    if limit is not None and (config.block_m + config.block_n) * rank * element_size > limit:
        raise UnsupportedProblem(
            f"low-rank factors of rank {rank} do not fit beside tiles of {config.block_m} rows on this GPU: set "
            "moe_group_size: 128."
        )
    return config if config.num_stages <= 4 - rank // 64 else _shortened(config, rank)


@functools.cache
def _shortened(config: GemmConfig, rank: int) -> GemmConfig:
    return dataclasses.replace(config, num_stages=4 - rank // 64)


@functools.cache
def _narrowed(config: GemmConfig, width: int) -> GemmConfig:
    # Bound by reading the rows: small programs, several per SM, keep more loads in flight. Measured for ranks 16 and
    # 64 on an H200 (benchmarks/results/h200-log-11-narrow.json).
    return dataclasses.replace(
        config,
        block_n=max(16, triton.next_power_of_2(width)),
        num_warps=4,
        num_stages=min(3, config.num_stages),
        flatten=False,
        programs_per_sm=3,
    )
