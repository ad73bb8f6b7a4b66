"""Which backend runs an expert layer, why, and proof that it ran.

A backend is a :class:`Backend` of :mod:`moe_kernels.registry`. Nothing falls back in silence: :func:`select` returns
the reason for its choice, and every expert call is counted.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import inspect
import logging
import pkgutil
from collections.abc import Iterator

import torch

from moe_kernels import registry
from moe_kernels.backends.protocol import Backend
from moe_kernels.layer import AnyTensors, Spec
from moe_kernels.problem import Problem, UnsupportedProblem, device_capability

logger = logging.getLogger("moe_kernels")
__all__ = ["Backend", "Problem", "UnsupportedProblem", "device_capability"]


def register_backend(backend: type[Backend]) -> None:
    """Make ``backend=`` accept the name of this class. Again, with the class or its successor: takes its place.

    Raises:
        ValueError: it is no whole backend, or its name is another backend's.
    """
    path = registry.path_of(backend) if isinstance(backend, type) else repr(backend)
    name = _whole(backend, path).name
    taken = {"auto": "what chooses one", **registry.paths()}
    if taken.get(name, path) != path:
        raise ValueError(f"backend {name!r} is {taken[name]} already: take another name.")
    registry.registered[name] = backend
    for cache in (load, select, _backend_of):
        cache.cache_clear()


@functools.cache
def load(name: str) -> Backend:
    """The backend ``name``, imported at its first use.

    Raises:
        ValueError: its class lacks something that a backend has, or goes by another name.
    """
    path = registry.paths()[name]
    backend = _whole(registry.registered.get(name) or pkgutil.resolve_name(path), path)
    if name != backend.name:
        raise ValueError(f"backend {name!r}: {path} has the name {backend.name!r}; they must be the same.")
    return backend


def _whole(backend: type[Backend], path: str) -> Backend:
    """An instance of ``backend``, which stands at ``path``, if it has all that a backend has."""
    if not isinstance(backend, type):
        raise ValueError(f"{path} is no class: a backend is a subclass of moe_kernels.backends.Backend.")
    name = getattr(backend, "name", None)
    if not isinstance(name, str) or not name:
        raise ValueError(f'{path} has no name: write name = "..." in the class.')
    parts = sorted(part for part in vars(Backend) if not part.startswith("_"))
    lacking = [part for part in parts if getattr(getattr(backend, part, None), "__isabstractmethod__", False)]
    lacking += [part for part in parts if not callable(getattr(backend, part, None))]
    if lacking:
        raise ValueError(f"{path} has no {', '.join(lacking)}: write them, or subclass a backend that has them.")
    try:
        inspect.signature(backend).bind()
    except TypeError as error:
        raise ValueError(f"{path} is made without arguments, and {error}: give its __init__ defaults.") from error
    return backend()


def launches_only(backend: Backend) -> bool:
    """Whether all that the steps do is allocate and launch kernels by this package's launcher.

    Only then can the kernels be compiled ahead of a launch, and launches be recorded: what a backend of somebody else
    does besides would be lost in a replay.
    """
    return backend.name in registry.LAUNCHES_ONLY


def why_not(name: str, problem: Problem) -> str | None:
    """None if backend ``name`` runs ``problem``, else the reason and the cure in one sentence."""
    return load(name).why_not(problem) or None


def explain(problem: Problem) -> list[tuple[str, str | None]]:
    """``why_not`` of every backend: the package's own in order of preference, then those that were added."""
    return [(name, why_not(name, problem)) for name in registry.paths()]


@functools.lru_cache(maxsize=256)
def select(problem: Problem, name: str = "auto") -> tuple[str, str]:
    """The backend that runs ``problem`` and the reason, logged once per problem.

    On a GPU ``auto`` takes gluon where it runs and triton elsewhere; torch only off CUDA: on a GPU it would be a
    silent slowdown, so it must be asked for by name.

    Raises:
        UnsupportedProblem: the backend asked for, or on CUDA the Triton backend, cannot run the problem.
    """
    if name != "auto":
        reason = why_not(name, problem)
        if reason is not None:
            raise UnsupportedProblem(f"backend {name!r} cannot run this: {reason}")
        chosen, why = name, "asked for by name"
    elif problem.device_type == "cuda":
        reason = why_not("triton", problem)
        if reason is not None:
            raise UnsupportedProblem(
                f"the Triton kernels cannot run this: {reason} backend='torch' runs it slowly; "
                "experts_implementation='grouped_mm' runs it without these kernels."
            )
        slower = why_not("gluon", problem)
        gpu = f"CUDA compute capability {problem.capability}"
        chosen, why = ("gluon", gpu) if slower is None else ("triton", f"{gpu}; not gluon: {slower}")
    else:
        chosen, why = "torch", f"tensors are on {problem.device_type}, Triton kernels need an NVIDIA GPU"
    logger.info("expert layers run on backend %s (%s)", chosen, why)
    _reasons[chosen] = why
    return chosen, why


def backend_of(tensors: AnyTensors, spec: Spec) -> Backend:
    """The backend that runs a call."""
    return _backend_of(spec, tensors.down.device, tensors.down.dtype, tensors.down.shape, tensors.topk_weights.shape)


@functools.lru_cache(maxsize=1024)
def _backend_of(
    spec: Spec, device: torch.device, dtype: torch.dtype, down: torch.Size, topk: torch.Size
) -> Backend:
    (experts, hidden, intermediate), (tokens, top_k) = down, topk
    problem = Problem(
        device.type,
        device_capability(device),
        dtype,
        experts,
        top_k,
        hidden,
        intermediate,
        spec.activation,
        spec.rows_per_tile(tokens * top_k, experts),
        spec.persistent,
    )
    return load(select(problem, spec.backend)[0])


_counts: collections.Counter[str] = collections.Counter()
_reasons: dict[str, str] = {}


def count_dispatch(name: str, why: str = "") -> None:
    """Called once by every forward of the op that runs. ``why``: where :func:`select` did not choose."""
    _counts[name] += 1
    if why:
        _reasons.setdefault(name, why)


def dispatch_counts() -> dict[str, int]:
    """Expert forward calls that ran since the start or the last reset, by backend."""
    return dict(_counts)


def dispatch_reason() -> str:
    """Why the backends in :func:`dispatch_counts` were chosen."""
    return "; ".join(_reasons[name] for name in sorted(_counts))


@contextlib.contextmanager
def uncounted() -> Iterator[None]:
    """Within this context forwards are not counted: nothing runs, or it is no part of what is proved."""
    before = _counts.copy()
    try:
        yield
    finally:
        _counts.clear()
        _counts.update(before)


def reset_dispatch_counts() -> None:
    """Forget the counts."""
    _counts.clear()
