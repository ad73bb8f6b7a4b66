"""Compilation ahead of the first launch: of all kernels of a call in parallel, not of each at its own launch."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Any

import torch
import triton

from moe_kernels.kernels.launch.launch import _compilers


@contextlib.contextmanager
def compiling_only(device: torch.device) -> Iterator[list[Any]]:
    """Within this context launches of this thread run nothing; their kernels are compiled in parallel.

    Yields the list of these kernels. When the context ends they are ready for ``device``: compiled or found in
    Triton's cache, loaded, and with the C launcher of their signature built (Triton runs a C compiler for it). A
    nested context adds to the list of the outer one.
    """

    def load(kernel: Any) -> None:
        with torch.cuda.device(device if device.type == "cuda" else -1):
            _ = kernel.run  # a property that loads the kernel and builds its launcher

    thread = threading.get_ident()
    if thread in _compilers:
        yield _compilers[thread]
        return
    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        # Without ignore_errors the mode stays active after an error; from triton 3.9 on it forgets the errors that it
        # has ignored, so that they are raised before it ends.
        with triton.AsyncCompileMode(pool, ignore_errors=True):
            kernels: list[Any] = []
            _compilers[thread] = kernels
            try:
                yield kernels
            finally:
                del _compilers[thread]
            compiled = [k.result() if isinstance(k, triton.FutureKernel) else k for k in kernels]
        list(pool.map(load, compiled))
