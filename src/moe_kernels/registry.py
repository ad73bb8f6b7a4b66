"""The names of the backends: the package's own, those of installed packages, and those registered by a call.

An installed package declares a backend by an entry point of the group ``moe_kernels.backends``:
``name = "its.module:Class"``.
"""

from __future__ import annotations

import functools
import importlib.metadata

GROUP = "moe_kernels.backends"
# In the order in which backend="auto" prefers them.
_own: dict[str, str] = {
    "gluon": "moe_kernels.backends.gluon:GluonBackend",
    "triton": "moe_kernels.backends.triton:TritonBackend",
    "torch": "moe_kernels.backends.torch:TorchBackend",
}
#: Those of which all steps do nothing but allocate and launch this package's kernels. Their names cannot be taken.
LAUNCHES_ONLY = ("gluon", "triton")
registered: dict[str, type] = {}


def path_of(backend: type) -> str:
    """``module:Class``."""
    return f"{backend.__module__}:{backend.__qualname__}"


def paths() -> dict[str, str]:
    """``module:Class`` of every backend, by its name."""
    return {**_own, **_declared(), **{name: path_of(backend) for name, backend in registered.items()}}


def names() -> tuple[str, ...]:
    """What ``backend=`` may be: ``"auto"`` and every backend."""
    return ("auto", *paths())


@functools.cache
def _declared() -> dict[str, str]:
    found: dict[str, str] = {}
    for entry in importlib.metadata.entry_points(group=GROUP):
        if {"auto": "", **_own, **found}.get(entry.name, entry.value) != entry.value:
            package = entry.dist.name if entry.dist else entry.value
            raise ValueError(f"{package} declares a backend {entry.name!r}, which there is already: uninstall it.")
        found[entry.name] = entry.value
    return found
