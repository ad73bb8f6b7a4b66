"""Host side of a launch: grids, tensor maps, and the launch itself.

Triton 3.6 needs about 0.1 ms of Python for a launch: it binds and specialises some thirty arguments, builds a cache
key as a string, and encodes every tensor map again. One call of the op launches a dozen kernels, so on small layers
the GPU would wait for the host. :func:`launch` leaves the first launch of a specialisation to Triton, keeps the
compiled kernel, and calls its C launcher directly from then on.

Triton launches every time, with the same result, where :func:`refusal` names a reason, while a profiler's hook,
debugging or instrumentation is on, and for kernels that need more than the C launcher (scratch memory).
"""

from __future__ import annotations

import collections
import functools
import inspect
import logging
import os
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.backends.nvidia import driver as nvidia
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_kernels.kernels.device import interpreting, multiprocessors
from moe_kernels.kernels.operands import Descriptor
from moe_kernels.kernels.tiles.table import GemmConfig

logger = logging.getLogger("moe_kernels")

LAUNCHER_VARIABLE = "MOE_KERNELS_LAUNCHER"
LAUNCHERS = ("replay", "direct", "triton")
DEFAULT_LAUNCHER = "replay"
# How Triton's C launcher takes a kernel's arguments: one by one after thirteen of its own (triton 3.6), or as one
# sequence after fifteen of its own (3.7 to 3.9). The thirteen: grid (3), stream, function, cooperative grid, PDL,
# scratch buffers (2), metadata of kernel and of launch, hooks (2). The other two describe the sequence. A release
# whose launcher was not read launches through Triton: a wrong layout is undefined behaviour in C, not an error.
_ONE_BY_ONE = getattr(nvidia, "_BASE_ARGS_FORMAT", None) == "iiiKKppOOOOOO"
_IN_ONE = triton.__version__.startswith(("3.7.", "3.8.", "3.9.")) and hasattr(nvidia, "make_kernel_signature")
# From 3.8 on, the function that encodes a tensor map also takes the launcher's own arguments, which it does not read.
_MAP_ARGUMENTS = (None,) * (len(inspect.signature(nvidia.make_tensordesc_arg).parameters) - 2)
_TENSOR_MAPS = 1024  # kept per argument of a compiled kernel; a map is 128 bytes and some Python


def launch_grid(
    kernel: Any,
    config: GemmConfig,
    max_tiles: int,
    persistent: bool,
    tensors: tuple[Any, ...],
    sizes: tuple[int, ...],
    constants: dict[str, Any],
) -> None:
    """Launch ``kernel`` over at most ``max_tiles`` tiles, by ``programs_per_sm`` programs an SM or one a tile."""
    if max_tiles == 0:
        return
    programs = max_tiles
    if persistent:
        programs = min(max_tiles, multiprocessors(_tensor(tensors[0]).device) * config.programs_per_sm)
    constants["BLOCK_M"] = config.block_m
    constants["BLOCK_N"] = config.block_n
    constants["BLOCK_K"] = config.block_k
    constants["GROUP_M"] = config.group_m
    constants["num_warps"] = config.num_warps
    constants["num_stages"] = config.num_stages
    launch(kernel, (programs,), tensors + sizes, constants)


class _Direct(NamedTuple):
    """The fixed part of a direct launch of one specialisation: all but grid, stream and arguments.

    Attributes:
        call: the C launcher.
        stream: device -> handle of its current stream.
        head: the C launcher's own arguments, from the function handle on.
        tensor_maps: for each descriptor, (pointer, shape, strides) -> the arguments that the C launcher takes for it.
        constants: placeholders for the compile-time arguments, which the C launcher skips.
        compiled: the kernel, kept alive because it owns the function handle.
    """

    call: Callable[..., None]
    stream: Callable[[int], int]
    head: tuple[Any, ...]
    tensor_maps: tuple[Callable[..., tuple[Any, ...]], ...]
    constants: tuple[None, ...]
    compiled: Any


_plain = torch.Tensor
# torch.cuda.current_device without its checks; CPU tensors are on device -1.
_current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", lambda: -1)
_known: dict[tuple[Any, ...], _Direct | None] = {}
_counts: collections.Counter[str] = collections.Counter()
# The recorder of each thread that records (replay.py). Called with the direct launch (None if Triton launched), grid
# and arguments.
_recorders: dict[int, Callable[..., None]] = {}
# Threads that only compile (``compiling_only``), and the kernels they asked for.
_compilers: dict[int, list[Any]] = {}


def launch_counts() -> dict[str, int]:
    """Launches since the start, by how they were made: "replay", "direct" or "triton"."""
    return dict(_counts)


def launch(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    """``kernel[grid](*args, **keywords)`` on the device of its tensors, with a fraction of the host time.

    The cache key has all that Triton specialises on: keywords, device, dtype and 16-byte alignment of pointers,
    whether an integer is 1, a multiple of 16 or wider than 32 bits, and dtype, block and layout of descriptors. So a
    kernel never runs on arguments that it was not compiled for.

    Args:
        kernel: a ``triton.jit`` or ``gluon.jit`` function whose compile-time arguments come last.
        grid: one to three numbers of programs.
        args: the run-time arguments by position: tensors, :class:`Descriptor`, numbers, None. The first is a tensor
            or a descriptor, and all are on its device: what calls the op checks that.
        keywords: the compile-time arguments, and options such as num_warps.
    """
    if _compilers and (kernels := _compilers.get(threading.get_ident())) is not None:
        return _compile(kernels, kernel, grid, args, keywords)
    if refusal() is not None or _watched(kernel):
        return _through_triton(kernel, grid, args, keywords)
    first = args[0]
    device = (first.tensor if type(first) is Descriptor else first).get_device()
    if device != _current_device():
        return _launch_elsewhere(device, kernel, grid, args, keywords)
    key = [kernel.fn, device, *keywords, *keywords.values()]
    values: list[Any] = []
    descriptors: list[tuple[int, Descriptor]] = []
    for arg in args:
        kind = type(arg)
        if kind is _plain or (kind is not int and isinstance(arg, torch.Tensor)):
            pointer = arg.data_ptr()
            values.append(pointer)
            key.append((arg.dtype,) if pointer & 15 else arg.dtype)
        elif kind is int:
            values.append(arg)
            key.append(1 if arg == 1 else 16 if arg & 15 == 0 else 0)
            if not -0x80000000 <= arg < 0x80000000:
                key.append("i64" if -(2**63) <= arg < 2**63 else "u64")
        elif kind is Descriptor:
            descriptors.append((len(values), arg))
            values.append(None)
            key.append((arg.tensor.dtype, arg.block, arg.layout))
        elif kind is float or kind is bool or arg is None:
            values.append(arg)
            key.append(kind)
        else:
            raise TypeError(f"{kernel.fn.__name__} got a {kind.__name__}: pass tensors, descriptors or plain numbers")
    direct = _known.get(tuple(key))
    if direct is None:
        return _launch_unknown(tuple(key), kernel, grid, args, keywords)
    for (place, which), tensor_map in zip(reversed(descriptors), direct.tensor_maps, strict=True):
        tensor = which.tensor
        values[place : place + 1] = tensor_map(tensor.data_ptr(), tensor.shape, tensor.stride())
    x, y, z = (*grid, 1, 1)[:3]
    if _ONE_BY_ONE:
        direct.call(x, y, z, direct.stream(device), *direct.head, *values, *direct.constants)
    else:
        direct.call(x, y, z, direct.stream(device), *direct.head, (*values, *direct.constants))
    _counts["direct"] += 1
    if _recorders and (record := _recorders.get(threading.get_ident())) is not None:
        record(direct, (x, y, z), args)
    return None


def _compile(
    kernels: list[Any], kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], keywords: dict[str, Any]
) -> None:
    """Instead of a launch: add the kernel, which is compiled meanwhile, to ``kernels``."""
    with torch.cuda.device_of(_tensor(args[0])):
        compiled = kernel.warmup(*_bound(args), grid=grid, **keywords)
    if compiled not in kernels:
        kernels.append(compiled)


def _launch_elsewhere(
    device: int, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], keywords: dict[str, Any]
) -> None:
    """A launch on a device that is not the current one."""
    if device < 0:  # Triton says what is wrong with a tensor of the CPU
        _through_triton(kernel, grid, args, keywords)
        return
    with torch.cuda.device(device):
        launch(kernel, grid, args, keywords)


def _launch_unknown(
    specialised: tuple[Any, ...],
    kernel: Any,
    grid: tuple[int, ...],
    args: tuple[Any, ...],
    keywords: dict[str, Any],
) -> None:
    """A launch through Triton, after which the kernel is known as ``specialised``."""
    compiled = _through_triton(kernel, grid, args, keywords)
    if compiled is not None and specialised not in _known:
        descriptors = [arg for arg in args if type(arg) is Descriptor]
        _known[specialised] = _direct(kernel, compiled, len(args), descriptors)


@functools.cache
def launcher() -> str:
    """The launcher asked for: "triton", "direct", or "replay" (direct launches that are recorded, see replay.py).

    Raises:
        ValueError: MOE_KERNELS_LAUNCHER is none of these.
    """
    asked = os.environ.get(LAUNCHER_VARIABLE, DEFAULT_LAUNCHER)
    if asked not in LAUNCHERS:
        raise ValueError(f"{LAUNCHER_VARIABLE}={asked!r} is not one of {', '.join(LAUNCHERS)}")
    return asked


@functools.cache
def refusal() -> str | None:
    """Why this process launches no kernel directly; None if it does, from the second launch of a kernel on."""
    asked, reason = launcher(), None
    if asked == "triton":
        reason = f"{LAUNCHER_VARIABLE}=triton"
    elif interpreting():
        reason = "Triton's interpreter runs the kernels"
    elif not _ONE_BY_ONE and not _IN_ONE:
        reason = f"the launcher of triton {triton.__version__} takes its arguments in a form that is not known here"
    elif triton.runtime.driver.active.get_current_target().backend != "cuda":
        reason = "this is no NVIDIA GPU"
    logger.info("kernels are launched %s", "directly" if reason is None else f"through Triton: {reason}")
    return reason


def _watched(kernel: Any = None) -> bool:
    """True while Triton must launch itself: for a profiler's hooks, debugging or instrumentation."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(
        getattr(enter, "calls", enter)
        or getattr(leave, "calls", leave)
        or runtime.debug
        or runtime.add_stages_inspection_hook
        or knobs.compilation.instrumentation_mode
        or (kernel is not None and kernel.pre_run_hooks)
    )


def _tensor(arg: Any) -> torch.Tensor:
    return arg.tensor if isinstance(arg, Descriptor) else arg


def _through_triton(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """Triton's own launch; returns the compiled kernel."""
    _counts["triton"] += 1
    if _recorders and (record := _recorders.get(threading.get_ident())) is not None:
        record(None, grid, args)
    with torch.cuda.device_of(_tensor(args[0])):
        return kernel[grid](*_bound(args), **keywords)


def _bound(args: tuple[Any, ...]) -> list[Any]:
    """``args`` with Triton's own descriptors."""
    return [
        _host_descriptor(arg.tensor, arg.tensor.shape, arg.tensor.stride(), arg.block, arg.layout)
        if isinstance(arg, Descriptor)
        else arg
        for arg in args
    ]


def _host_descriptor(
    base: Any, shape: tuple[int, ...], strides: tuple[int, ...], block: tuple[int, ...], layout: Any
) -> Any:
    """Triton's descriptor, or with a layout Gluon's."""
    if torch.cuda.is_initialized():
        # Encoding needs a CUDA context. An autograd thread that has not called CUDA yet has none; setting the device
        # makes one, even if it is the current device already.
        torch.cuda.set_device(torch.cuda.current_device())
    if layout is None:
        return TensorDescriptor(base, list(shape), list(strides), list(block))
    # Imported here because the Triton kernels must also run where Gluon is missing or has other names.
    from triton.experimental.gluon.nvidia import hopper as gluon

    return gluon.TensorDescriptor(base, list(shape), list(strides), list(block), layout)


def _tensor_map(
    dtype: torch.dtype,
    block: tuple[int, ...],
    layout: Any,
    meta: dict[str, Any],
    pointer: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
) -> tuple[Any, ...]:
    """The arguments that the C launcher takes for a descriptor: encoded tensor map, shape, strides.

    They depend on address and layout only, so they may be cached and used for any tensor at that address.
    """
    # In place of the tensor, whose memory the descriptor would keep alive.
    address = SimpleNamespace(data_ptr=lambda: pointer, dtype=dtype)
    host = _host_descriptor(address, shape, strides, block, layout)
    return tuple(nvidia.make_tensordesc_arg(host, meta, *_MAP_ARGUMENTS))


def _direct(kernel: Any, compiled: Any, arguments: int, descriptors: list[Descriptor]) -> _Direct | None:
    """The direct launch of a compiled kernel; None, with a warning in the log, if only Triton can launch it.

    Args:
        kernel, compiled: a kernel and one of its specialisations.
        arguments: number of run-time arguments.
        descriptors: those of them that are descriptors.
    """
    constants = len(kernel.params) - arguments
    launcher = compiled.run
    metas = compiled.metadata.tensordesc_meta or []
    reason = None
    if [param.is_constexpr for param in kernel.params] != [False] * arguments + [True] * constants:
        reason = "its compile-time arguments do not come last"
    elif launcher.global_scratch_size or launcher.profile_scratch_size:
        reason = "it needs scratch memory"
    elif len(metas) != len(descriptors) or None in metas:
        reason = "its descriptors are no tensor maps"
    if reason is not None:
        logger.warning("kernel %s is launched through Triton: %s", kernel.fn.__name__, reason)
        return None
    call = launcher.launch
    if descriptors:  # then Triton wraps its C launcher in a function that encodes the tensor maps
        call = inspect.getclosurevars(call).nonlocals["launcher"]
    head: tuple[Any, ...] = (compiled.function, launcher.launch_cooperative_grid, launcher.launch_pdl)
    no_scratch, metadata, no_hooks = (None, None), (compiled.packed_metadata, None), (None, None)
    if _ONE_BY_ONE:
        head += (*no_scratch, *metadata, *no_hooks)
    else:
        head += (*metadata, *no_hooks, *no_scratch, launcher.arg_annotations, launcher.kernel_signature)
    tensor_maps = (
        functools.lru_cache(_TENSOR_MAPS)(
            functools.partial(_tensor_map, which.tensor.dtype, which.block, which.layout, meta)
        )
        for which, meta in zip(descriptors, metas, strict=True)
    )
    stream = triton.runtime.driver.active.get_current_stream
    return _Direct(call, stream, head, tuple(tensor_maps)[::-1], (None,) * constants, compiled)
