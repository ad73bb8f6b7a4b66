"""Facts of the GPU and of how this process uses it. The compute capability is in ``backends.py``."""

from __future__ import annotations

import functools
import os
import subprocess
from typing import Any

import torch
import triton

# Number of programs of a persistent grid where there is no GPU, that is, under Triton's interpreter.
_INTERPRETER_PROGRAMS = 3


def interpreting() -> bool:
    """True if Triton runs kernels in its CPU interpreter (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def passes_by_the_gpu() -> bool:
    """True if the interpreter runs kernels although there is a GPU: somebody forgot to unset a variable. Triton's own
    interpreter (3.6 to 3.9) multiplies the bit patterns of bfloat16 and says nothing."""
    return interpreting() and torch.cuda.is_available()


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of ``device``: the size of a persistent grid."""
    if device.type != "cuda":
        return _INTERPRETER_PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def shared_memory(device: torch.device) -> int | None:
    """Bytes of shared memory that a thread block may use on ``device``; None in the interpreter."""
    if device.type != "cuda":
        return None
    properties: Any = torch.cuda.get_device_properties(device)  # torch's stubs do not know this one
    return int(properties.shared_memory_per_block_optin)


def loads_by_tma(capability: tuple[int, int] | None) -> bool:
    """Whether 16-bit GEMMs load by TMA; capability None is the interpreter."""
    return capability is None or (9, 0) <= capability < (12, 0)


def dot_precision(dtype: torch.dtype) -> str:
    """float32 products are exact (IEEE) unless torch's own switch allows TF32; 16-bit types ignore this."""
    # allow_tf32, the older switch, cannot be read once the newer one was set; the newer one reflects both.
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


@functools.cache
def driver_fault() -> str | None:
    """Why triton cannot launch on the GPU that torch sees, or None. Triton says so only at the first launch."""
    if not torch.cuda.is_available() or interpreting():
        return None
    try:
        triton.runtime.driver.active.get_current_target()  # compiles a little C, the first time on a machine
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        return f"triton {triton.__version__} cannot launch on the GPU that torch sees ({error})"
    return None


def cdiv(a: int, b: int) -> int:
    """a / b rounded up: triton.cdiv without the two microseconds its wrapper takes."""
    return -(-a // b)


@functools.cache
def column_block(width: int) -> int:
    """Columns that an elementwise pass over rows of ``width`` takes at a time: a power of two, 1024 at most, of which
    the last block leaves least unused."""
    if width < 256:
        return triton.next_power_of_2(width)
    return min((1024, 512, 256), key=lambda block: (-width % block, -block))
