"""What a process may have switched on around a call, and what must not change what is computed or found out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

import torch
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

T = TypeVar("T")


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Tensors made without a dtype get ``dtype``, in the whole process."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _hooks_that_fail() -> AbstractContextManager[object]:
    def fail(_: object) -> torch.Tensor:
        raise AssertionError("a tensor was saved under the caller's hooks")

    return torch.autograd.graph.saved_tensors_hooks(fail, fail)


#: By name, something that makes the context. None holds data of the caller's.
STATES: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "float16 by default": lambda: default_dtype(torch.float16),
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
    "float64 by default": lambda: default_dtype(torch.float64),
    "meta device": lambda: torch.device("meta"),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast to bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast to float16": lambda: torch.autocast("cpu", torch.float16),
    "hooks of saved tensors": _hooks_that_fail,
    "without hooks of saved tensors": lambda: torch.autograd.graph.disable_saved_tensors_hooks("not here"),
    "counted operations": lambda: FlopCounterMode(display=False),
    "fake tensors": FakeTensorMode,
}
AMBIENT = (*STATES, "torch.func.grad")


def inside(state: str, thing: Callable[[], T]) -> T:
    """What ``thing()`` gives in a state, one of ``AMBIENT``."""
    if state in STATES:
        with STATES[state]():
            return thing()
    found = []

    def function(x: torch.Tensor) -> torch.Tensor:
        found.append(thing())
        return x.sum()

    torch.func.grad(function)(torch.zeros(1))
    return found[0]
