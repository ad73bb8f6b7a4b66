"""Tiny tiles for every kernel: a few tokens then have many tiles, ragged in each direction, at interpreter speed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

from moe_kernels.kernels.tiles.config import use_config
from moe_kernels.kernels.tiles.table import KERNELS, GemmConfig
from moe_kernels.kernels.triton.fp8 import use_tile
from moe_kernels.kernels.triton.row_pass import PassTile

SMALL = GemmConfig(block_m=16, block_n=32, block_k=32, num_warps=4, num_stages=2, group_m=2)


@contextmanager
def use_small_tiles(config: GemmConfig = SMALL) -> Iterator[None]:
    """Inside the block every group size is ``config.block_m`` and every GEMM uses ``config``."""
    with ExitStack() as stack:
        for kernel in KERNELS:
            stack.enter_context(use_config(kernel, config))
        for gated in (True, False):
            stack.enter_context(use_tile(gated, dataclasses.replace(config, block_k=128)))
        stack.enter_context(mock.patch("moe_kernels.layer.resolve_group_size", return_value=config.block_m))
        passes = PassTile(config.block_m, config.block_n, config.num_warps, config.num_stages)
        stack.enter_context(mock.patch("moe_kernels.kernels.triton.row_pass.pass_tile", return_value=passes))
        stack.enter_context(mock.patch("moe_kernels.routing._MIN_GROUP_SIZE", config.block_m))
        yield
