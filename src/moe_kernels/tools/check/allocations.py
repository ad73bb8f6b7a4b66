"""Uninitialised memory that cannot be mistaken for zeros."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._device import _device_constructors

_PLACES = ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty"))


def poison_(t: Tensor) -> Tensor:
    """Fill with NaN, or with a huge integer. Returns ``t``."""
    if t.dtype == torch.bool:
        return t.fill_(True)
    if t.is_floating_point() or t.is_complex():
        return t.fill_(float("nan"))
    return t.fill_(torch.iinfo(t.dtype).max // 2)


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """``torch.empty`` and its kin, called from moe_kernels, return NaN or huge integers.

    Fresh pages are zero more often than not, so that code which forgets to write an element passes its tests and
    fails in a long run. Only the package's own calls are touched.
    """

    def poisoned(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate(*args: Any, **kwargs: Any) -> Tensor:
            t = original(*args, **kwargs)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            return poison_(t) if caller.startswith("moe_kernels.") else t

        return allocate

    # At its first use `with torch.device(...)` keeps the functions that it redirects: they must be torch's own.
    _device_constructors()
    with ExitStack() as stack:
        for owner, name in _PLACES:
            stack.enter_context(mock.patch.object(owner, name, poisoned(getattr(owner, name))))
        yield
