"""Host side of a launch: grids, tensor-memory descriptors, and the precision of tl.dot."""

from __future__ import annotations

import dataclasses
import functools
import os
from typing import Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_kernels.backends import device_capability
from moe_kernels.routing import RoutingPlan
from moe_kernels.tuning.config import GemmConfig

# What a low-rank part adds to a GEMM: low (R, r), and the factor of each expert.
LowRank = tuple[torch.Tensor, torch.Tensor]

# Number of programs of a persistent grid where there is no GPU, that is, under Triton's interpreter.
_INTERPRETER_PROGRAMS = 3


def interpreting() -> bool:
    """True if Triton runs kernels in its CPU interpreter (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of ``device``: the size of a persistent grid."""
    if device.type != "cuda":
        return _INTERPRETER_PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count


def tma_fits(*tensors: torch.Tensor) -> bool:
    """True if a GEMM over these row-major operands loads by tensor-memory copies.

    Hopper or later, 16-bit, rows of a multiple of 16 elements, aligned bases. Other sizes would store element by
    element, for which the large tiles of this path have no registers left. float32 stays on pointer loads: its exact
    products run on the ordinary cores, which such copies cannot feed.
    """
    capability = device_capability(tensors[0].device)
    if capability is not None and capability < (9, 0):
        return False
    return all(
        t.element_size() == 2 and t.numel() > 0 and t.shape[-1] % 16 == 0 and t.data_ptr() % 16 == 0 for t in tensors
    )


def descriptor(tensor: torch.Tensor, *block: int) -> TensorDescriptor:
    """Descriptor that loads blocks of ``block`` elements of a contiguous tensor, zero outside it."""
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(block))


def stored(weight: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """(weight as it lies in memory, whether that is transposed): the op takes matrices stored by columns too."""
    return (weight, False) if weight.is_contiguous() else (weight.mT, True)


def low_rank_arguments(low_rank: LowRank | None, unused: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(low, factor, RANK) of a kernel; without a low-rank part any pointers and RANK 0."""
    if low_rank is None:
        return unused, unused, 0
    return *low_rank, low_rank[0].shape[1]


def fit_columns(config: GemmConfig, width: int) -> GemmConfig:
    """``config`` with columns for a narrow output (the r columns of a low-rank factor) instead of its own."""
    if width > config.block_n // 2:
        return config
    return dataclasses.replace(config, block_n=max(16, triton.next_power_of_2(width)))


def dot_precision(dtype: torch.dtype) -> str:
    """float32 products are exact (IEEE) unless torch's own switch allows TF32; 16-bit types ignore this."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def launch_grid(
    kernel: Any,
    config: GemmConfig,
    max_tiles: int,
    persistent: bool,
    tensors: tuple[Any, ...],
    sizes: tuple[int, ...],
    **constants: Any,
) -> None:
    """Launch ``kernel`` over at most ``max_tiles`` tiles: one program per multiprocessor, or one per tile."""
    if max_tiles == 0:
        return
    device = next(t.device for t in tensors if isinstance(t, torch.Tensor))
    programs = min(max_tiles, multiprocessors(device) * config.programs_per_sm) if persistent else max_tiles
    kernel[(programs,)](
        *tensors,
        *sizes,
        **constants,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def launch_tiles(
    kernel: Any,
    config: GemmConfig,
    plan: RoutingPlan,
    width: int,
    persistent: bool,
    tensors: tuple[Any, ...],
    sizes: tuple[int, ...],
    **constants: Any,
) -> None:
    """Launch a kernel over the plan's row tiles times the column blocks of an output ``width`` wide."""
    column_blocks = -(-width // config.block_n)
    launch_grid(kernel, config, plan.max_tiles * column_blocks, persistent, tensors, sizes, **constants)
