"""Where modules are tried on numbers: the same place whatever the caller has switched on or off.

Models are checked while they load, under a meta device or ``no_grad``, in a first forward under autocast or
``torch.func``, and by memory estimators without data. None of that may change what a probe finds.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes


def probe_device(module: torch.nn.Module) -> torch.device:
    """Where ``module`` can be tried: where its parameters are; the CPU if those have no data."""
    parameter = next(module.parameters())  # by no name: reading a weight may dequantise it
    return torch.device("cpu") if parameter.is_meta or isinstance(parameter, FakeTensor) else parameter.device


@contextmanager
def probe_context(device: torch.device) -> Iterator[None]:
    """Inside, operations run as in a fresh process, and tensors without a device are made on ``device``.

    The default dtype stays, which is of all threads: whoever makes a tensor here says its dtype.
    """
    with ExitStack() as stack:
        stack.enter_context(temporarily_clear_interpreter_stack())  # torch.func
        stack.enter_context(_disable_current_modes())  # fake tensors, selective checkpoints, counters of operations
        stack.enter_context(torch.device(device))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        # A checkpoint around must not count what is saved here. Inside torch.func there are no such hooks.
        if torch._C._autograd._saved_tensors_hooks_is_enabled():
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t))
        yield
