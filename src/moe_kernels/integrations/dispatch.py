"""Which experts modules dispatch through transformers' experts interface, and where a call of one leads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.integrations.moe import ExpertsInterface

# What register() put under each name, to tell later whether a name still leads here.
registered: dict[str, Callable[..., torch.Tensor]] = {}
# Implementations that hand the rows on to another one, which the function names.
_wrappers: dict[str, Callable[[], str]] = {}


def register_wrapper(name: str, inner: Callable[[], str]) -> None:
    """Say that ``experts_implementation=name`` runs the implementation that ``inner()`` names on rows it chooses, as
    Axolotl's expert parallelism does with those that arrive from other ranks."""
    _wrappers[name] = inner


def is_served(module: Any) -> bool:
    """Whether a call of ``module`` leads to these kernels."""
    return _leads_here(type(module), runs_on(module))


def runs_on(module: Any) -> str:
    """The implementation that a dispatching ``module`` runs, of a wrapper the inner one."""
    name = str(getattr(getattr(module, "config", None), "_experts_implementation", None))
    return _wrappers[name]() if name in _wrappers else name


# torch.compile would look into the cells of a closure, and then not understand the function they belong to.
@torch.compiler.assume_constant_result
def _leads_here(cls: type, implementation: str) -> bool:
    interface, function = dispatches(cls), registered.get(implementation)
    return interface is not None and function is not None and interface.get(implementation) is function


def experts_modules(model: torch.nn.Module) -> list[tuple[str, Any]]:
    """``(name, module)`` of every module that dispatches through transformers' experts interface, but for those that
    PEFT keeps beside the copy it trains (``modules_to_save``)."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if dispatches(type(module)) is not None and "original_module" not in name.split(".")
    ]


def dispatches(cls: type) -> ExpertsInterface | None:
    """Where ``cls.forward``, maybe wrapped again, looks for its implementation; FP8 experts have an interface of
    their own. None where transformers' ``use_experts_implementation`` did not make it."""
    forward = getattr(cls, "forward", None)
    while forward is not None:
        for cell in getattr(forward, "__closure__", None) or ():
            if isinstance(cell.cell_contents, ExpertsInterface):
                return cell.cell_contents
        forward = getattr(forward, "__wrapped__", None)
    return None
