"""The backends by name: the package's own, those of installed packages, and what :func:`register_backend` adds.

A package declares a backend by an entry point of the group ``moe_kernels.backends``: ``name = "its.module"``.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from types import ModuleType

GROUP = "moe_kernels.backends"
#: What a backend's module must have; docs/add-a-backend.md says what each is.
PARTS = ("NAME", "COMPILES", "why_not", "make_plan", "up", "up_low", "down", "combine", "gather", "dout_rows",
         "dgrad", "down_grad", "wgrad", "combine_grad", "expert_sum")  # fmt: skip

# In the order in which backend="auto" prefers them.
_own: dict[str, str] = {
    "gluon": "moe_kernels.gluon_backend",
    "triton": "moe_kernels.triton_backend",
    "torch": "moe_kernels.torch_backend",
}
_registered: dict[str, str] = {}


def register_backend(name: str, module: str) -> None:
    """Make ``backend=name`` run the steps of ``module``, a module's full name. Again with the same module: no change.

    Raises:
        ValueError: the name is another backend's.
    """
    taken = {"auto": "", **modules()}
    if taken.get(name, module) != module:
        raise ValueError(f"backend {name!r} is {taken[name] or 'what chooses one'} already: take another name.")
    _registered[name] = module


def modules() -> dict[str, str]:
    """Every backend's module, by the backend's name."""
    return {**_own, **_declared(), **_registered}


def names() -> tuple[str, ...]:
    """What ``backend=`` may be: ``"auto"`` and every backend."""
    return ("auto", *modules())


@functools.cache
def load(name: str) -> ModuleType:
    """Import the backend ``name``.

    Raises:
        ValueError: its module lacks something that a backend has, or goes by another name.
    """
    module = importlib.import_module(modules()[name])
    lacking = [part for part in PARTS if not hasattr(module, part)]
    if lacking:
        raise ValueError(f"backend {name!r}: {module.__name__} has no {', '.join(lacking)}.")
    if name != module.NAME:
        raise ValueError(f"backend {name!r}: {module.__name__} has NAME = {module.NAME!r}; they must be the same.")
    return module


@functools.cache
def _declared() -> dict[str, str]:
    found: dict[str, str] = {}
    for entry in importlib.metadata.entry_points(group=GROUP):
        if {"auto": "", **_own, **found}.get(entry.name, entry.value) != entry.value:
            package = entry.dist.name if entry.dist else entry.value
            raise ValueError(f"{package} declares a backend {entry.name!r}, which there is already: uninstall it.")
        found[entry.name] = entry.value
    return found
