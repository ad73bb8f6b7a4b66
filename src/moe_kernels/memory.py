"""What one expert layer keeps and takes in device memory, and the words for when that is too much.

Letters as in :mod:`moe_kernels.moe`. Weights, their gradients and the inputs are not counted: they are there anyway.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NoReturn, TypeVar

import torch

from moe_kernels.layer import BackwardSpec, BackwardTensors, Spec, Tensors

GIB = 2**30
T = TypeVar("T", Tensors, BackwardTensors)
S = TypeVar("S", Spec, BackwardSpec)
R = TypeVar("R")


def saved_bytes(tokens: int, top_k: int, hidden: int, width: int, size: int, recompute: bool = False) -> int:
    """Kept for the backward pass: X (T, H) and, without recompute, Z (R, width); ``size`` bytes an element.

    width is 2I with a gate and I without. In bfloat16 with a gate that is 2TH + 4TKI bytes.
    """
    return size * tokens * (hidden + (0 if recompute else top_k * width))


def peak_bytes(tokens: int, top_k: int, hidden: int, intermediate: int, width: int, size: int) -> int:
    """Highest of forward and backward, what is kept included: X and Z beside two tensors of R rows.

    Forward Z, A and Y; backward Z, dOs and dA0, then dZ, dXr and the gathered X. The output or dX come on top.
    """
    return size * tokens * (2 * hidden + top_k * (width + hidden + max(intermediate, hidden)))


def explains_out_of_memory(what: str) -> Callable[[Callable[[T, S], R]], Callable[[T, S], R]]:
    """Decorator of the layer's forward or backward: an allocation that fails there names the sizes and a cure."""

    def decorate(run: Callable[[T, S], R]) -> Callable[[T, S], R]:
        @functools.wraps(run)
        def call(tensors: T, spec: S) -> R:
            try:
                return run(tensors, spec)
            except torch.OutOfMemoryError as error:
                # Without its traceback, whose frames would keep the layer's tensors for whoever catches it.
                _explain(what, error.with_traceback(None), tensors, spec)

        return call

    return decorate


def _explain(
    what: str, reason: torch.OutOfMemoryError, t: Tensors | BackwardTensors, spec: Spec | BackwardSpec
) -> NoReturn:
    recompute = (spec if isinstance(spec, Spec) else spec.forward).recompute
    (tokens, top_k), (experts, hidden, intermediate) = t.topk_weights.shape, t.down.shape
    width, size = t.gate_up.shape[1], t.x.element_size()
    kept = saved_bytes(tokens, top_k, hidden, width, size, recompute) / GIB
    less = saved_bytes(tokens, top_k, hidden, width, size, True) / GIB
    peak = peak_bytes(tokens, top_k, hidden, intermediate, width, size) / GIB
    dtype = str(t.x.dtype).removeprefix("torch.")
    cures = "" if recompute else f"set moe_recompute: true (recompute=True), which keeps {less:.2f} GiB a layer, or "
    raise torch.OutOfMemoryError(
        f"the {what} of an expert layer ran out of memory: T={tokens} tokens, K={top_k}, E={experts}, H={hidden}, "
        f"I={intermediate} in {dtype} take about {peak:.2f} GiB while they run, of which {kept:.2f} GiB a layer are "
        f"kept for the backward pass. Lower micro_batch_size or sequence_len, {cures}"
        f"use gradient_checkpointing: true. {reason}"
    ) from reason
