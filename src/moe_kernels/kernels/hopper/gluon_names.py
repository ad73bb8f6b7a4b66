"""Names that differ between releases of Gluon, Triton's lower-level language, and the releases that were tried.

Gluon is experimental and renames functions between releases of triton. The kernels import the renamed functions from
here, so that one source compiles with every release. :func:`lacks` says what the installed release is missing.
"""

from __future__ import annotations

import pkgutil
from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

#: Releases of triton with which these kernels were verified and measured on an H200 (benchmarks/results). With any
#: other release they are first checked on the user's GPU: see ``trial.py``.
TRIED: tuple[str, ...] = ("3.6", "3.7", "3.8")
_HOPPER = "triton.experimental.gluon.language.nvidia.hopper"
_TMA, _MBARRIER = f"{_HOPPER}.tma", f"{_HOPPER}.mbarrier"
_ASYNC_COPY = "triton.experimental.gluon.language.nvidia.ampere.async_copy"
# 3.8 renamed the copies and kept the old names as well; in 3.9 the old ones raise when they are called.
_CORE = "triton.language.core"
_LOAD, _STORE = ("async_load", "async_copy_global_to_shared"), ("async_store", "async_copy_shared_to_global")
_AGGREGATE = ("_aggregate",)  # from 3.8 on also triton.aggregate
_LANGUAGE = "triton.experimental.gluon.language"
_VIEW = ("shared_memory_descriptor.reinterpret", "shared_memory_descriptor._reinterpret")  # the former from 3.9 on
#: What the kernels use, by module, each with all the names it has had.
_USED: dict[str, tuple[tuple[str, ...], ...]] = {
    _CORE: (_AGGREGATE,),
    "triton.experimental.gluon": (("jit",), ("constexpr_function",)),
    _LANGUAGE: (
        ("NVMMADistributedLayout",),
        ("NVMMASharedLayout",),
        ("allocate_shared_memory",),
        _VIEW,
        ("warp_specialize",),
    ),
    "triton.experimental.gluon.nvidia.hopper": (("TensorDescriptor",),),
    _HOPPER: (("fence_async_shared",), ("warpgroup_mma",), ("warpgroup_mma_wait",)),
    _MBARRIER: (("MBarrierLayout",), ("arrive",), ("expect",), ("init",), ("wait",)),
    _TMA: (_LOAD, _STORE, ("store_wait",)),
    _ASYNC_COPY: (_LOAD, ("mbarrier_arrive",)),
}


def release() -> str:
    """Major and minor number of the installed triton, such as "3.8"."""
    return ".".join(triton.__version__.split(".")[:2])


def _find(module: str, names: tuple[str, ...]) -> Any:
    """The attribute of ``module`` under the first of ``names`` that exists; None if none does, or no such module."""
    for name in names:
        try:
            return pkgutil.resolve_name(f"{module}:{name}")
        except (ImportError, AttributeError):
            continue
    return None


def lacks() -> str | None:
    """The first thing that the kernels use and the installed Gluon lacks; None if it has everything."""
    missing = (f"{module}.{names[0]}" for module, used in _USED.items() for names in used if not _find(module, names))
    return next(missing, None)


tma_load, tma_store, cp_async = _find(_TMA, _LOAD), _find(_TMA, _STORE), _find(_ASYNC_COPY, _LOAD)
#: reinterpret(buffer, dtype, shape, layout): the memory of a buffer as another one.
reinterpret = _find(_LANGUAGE, _VIEW)
_aggregate = _find(_CORE, _AGGREGATE)


def _constructed(cls: type) -> Any:
    """Gluon's aggregate: a value of named fields, with methods. Its constructor takes each field by name.

    Releases before 3.8 make no constructor, and none turns the constants that triton makes of literals, and of
    arguments that are 1, into the tensors that a field is declared to be.
    """
    kinds = cls.__annotations__

    def construct(self: Any, _semantic: Any = None, **values: Any) -> None:
        if values.keys() != kinds.keys():
            raise TypeError(f"{cls.__name__} takes {', '.join(kinds)}, not {', '.join(values)}")
        for name, value in values.items():
            if kinds[name] is tl.constexpr:
                value = tl.constexpr(value)
            elif kinds[name] is tl.tensor:
                value = _semantic.to_tensor(value)
            setattr(self, name, value)

    construct.__triton_builtin__ = True  # type: ignore[attr-defined]  # it is no source of a kernel
    cls.__init__ = construct  # type: ignore[misc]
    return _aggregate(cls)


if TYPE_CHECKING:
    from dataclasses import dataclass as aggregate  # whose constructor mypy knows
else:
    aggregate = _constructed
