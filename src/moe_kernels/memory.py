"""What one expert layer keeps and takes in device memory, and the words for when that is too much.

Letters as in :mod:`moe_kernels.moe`. Weights, their gradients and the inputs are not counted: they are there anyway.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor  # torch.library reads the decorated functions' annotations by the names of this module

GIB = 2**30
Steps = TypeVar("Steps", bound=Callable[..., Any])


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


def explains_out_of_memory(what: str) -> Callable[[Steps], Steps]:
    """Decorator of the op's forward or backward: an allocation that fails there names the layer's sizes and a cure.

    The decorated function takes x, topk_weights, gate_up, down and recompute under these names.
    """

    def decorate(steps: Steps) -> Steps:
        @functools.wraps(steps)
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return steps(*args, **kwargs)
            except torch.OutOfMemoryError as error:
                # Without its traceback, whose frames would keep the layer's tensors for whoever catches it.
                reason = error.with_traceback(None)
                arguments = inspect.signature(steps).bind(*args, **kwargs).arguments
                explain(what, reason, **{name: arguments[name] for name in _NAMES})

        return call  # type: ignore[return-value]

    return decorate


_NAMES = ("x", "topk_weights", "gate_up", "down", "recompute")


def explain(
    what: str,
    reason: torch.OutOfMemoryError,
    x: Tensor,
    topk_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    recompute: bool,
) -> None:
    """Raise torch.OutOfMemoryError: the sizes of the layer whose ``what`` failed, what helps, and ``reason``."""
    (tokens, top_k), (experts, hidden, intermediate) = topk_weights.shape, down.shape
    width, size = gate_up.shape[1], x.element_size()
    kept = saved_bytes(tokens, top_k, hidden, width, size, recompute) / GIB
    less = saved_bytes(tokens, top_k, hidden, width, size, True) / GIB
    peak = peak_bytes(tokens, top_k, hidden, intermediate, width, size) / GIB
    dtype = str(x.dtype).removeprefix("torch.")
    cures = "" if recompute else f"set moe_recompute: true (recompute=True), which keeps {less:.2f} GiB a layer, or "
    raise torch.OutOfMemoryError(
        f"the {what} of an expert layer ran out of memory: T={tokens} tokens, K={top_k}, E={experts}, H={hidden}, "
        f"I={intermediate} in {dtype} take about {peak:.2f} GiB while they run, of which {kept:.2f} GiB a layer are "
        f"kept for the backward pass. Lower micro_batch_size or sequence_len, {cures}"
        f"use gradient_checkpointing: true. {reason}"
    ) from reason
