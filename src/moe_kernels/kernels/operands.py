"""The operands of a kernel: memory layout, TMA descriptors and low-rank factors."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from moe_kernels.kernels.device import loads_by_tma
from moe_kernels.layer import Matrix, Weight
from moe_kernels.packed import PackedWeight
from moe_kernels.problem import device_capability


def tma_fits(*tensors: torch.Tensor) -> bool:
    """True if a GEMM over these row-major operands loads by TMA.

    Needs Hopper or data-centre Blackwell, 16-bit elements, rows of a multiple of 16 elements, and aligned bases. With
    other sizes the epilogue would store element by element, and the large tiles of this path leave no registers for
    that. float32 stays on pointer loads: its exact products run on the CUDA cores, not on the tensor cores.
    """
    if not loads_by_tma(device_capability(tensors[0].device)):
        return False
    for t in tensors:  # a generator would cost another microsecond
        if t.element_size() != 2 or t.shape[-1] % 16 or t.data_ptr() % 16 or t.numel() == 0:
            return False
        # There may be gaps between experts, of whole rows; experts must not overlap.
        if not t.is_contiguous() and (t.stride(0) < t.shape[-2] * t.shape[-1] or t.stride(0) % t.shape[-1]):
            return False
    return True


class Descriptor(NamedTuple):
    """A kernel argument that is loaded or stored by TMA in blocks. Loads give zeros outside the tensor.

    Attributes:
        tensor: its last stride is 1; base and rows are aligned to 16 bytes.
        block: shape of a block in elements.
        layout: Gluon's NVMMASharedLayout of the block in shared memory; None for ``triton.jit`` kernels.
    """

    tensor: torch.Tensor
    block: tuple[int, ...]
    layout: Any = None


def descriptor(tensor: torch.Tensor, *block: int) -> Descriptor:
    """Descriptor of a tensor that :func:`tma_fits`, in blocks of shape ``block``."""
    # With a single expert or row the outer stride is arbitrary, and TMA may refuse it. A view has a valid one.
    return Descriptor(tensor.view(tensor.shape) if len(tensor) == 1 else tensor, block)


def by_rows(weight: Matrix) -> bool:
    """Whether each expert's matrix of ``weight`` (E, rows, columns) is row-major; experts may be apart in memory."""
    if isinstance(weight, PackedWeight):
        return not weight.by_columns
    if weight.is_contiguous():
        return True
    (_, rows, columns), (_, row, column) = weight.shape, weight.stride()
    return (columns == 1 or column == 1) and (rows == 1 or row == columns)


def stored(weight: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """(``weight`` with row-major matrices, whether that took a transpose): the op takes column-major weights too."""
    return (weight, False) if by_rows(weight) else (weight.mT, True)


def low_rank_arguments(weight: Weight, unused: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(low, factor, RANK) of a kernel; without a low-rank part any pointers and RANK 0."""
    if weight.low is None or weight.factor is None:
        return unused, unused, 0
    return weight.low, weight.factor, weight.low.shape[1]
