"""Record and replay of launches, for input signatures that repeat.

What a forward or a backward of the op allocates and launches depends only on the shapes, strides and dtypes of its
tensors and on its settings, never on the values. So the second call of a signature is recorded. From the third call
on, the recording is replayed: the same allocations and the same launches, without the Python that chose tiles and
built descriptors, constants and views. Only addresses differ from call to call. Unlike a CUDA graph, a replay copies
nothing, keeps no memory between calls, and works on any stream, under capture and on any thread.
"""

from __future__ import annotations

import functools
import logging
import operator
import threading
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moe_kernels.kernels.device import dot_precision
from moe_kernels.kernels.launch import launch as launches
from moe_kernels.kernels.operands import Descriptor
from moe_kernels.kernels.tiles import config

logger = logging.getLogger("moe_kernels")

_aten = torch.ops.aten
_ALLOCATIONS = {
    _aten.empty.memory_format,
    _aten.empty_like.default,
    _aten.empty_strided.default,
    _aten.new_empty.default,
}
_VIEWS = {
    _aten.alias.default,
    _aten.as_strided.default,
    _aten.detach.default,
    _aten.slice.Tensor,
    _aten.split_with_sizes.default,
    _aten.permute.default,
    _aten.transpose.int,
    _aten.view.default,
    _aten.view.dtype,
}
T = TypeVar("T", bound=tuple[Any, ...])
S = TypeVar("S", bound=Hashable)
R = TypeVar("R", bound=tuple[Tensor | None, ...])
_on_gpu = operator.attrgetter("is_cuda")  # of a tensor
_SIGNATURES = 512  # limit of the cache; more signatures than this mean that the sizes do not repeat
_TRIES = 4  # calls of a signature after which it is never recorded


class _Place(NamedTuple):
    """An address: the number of an input or an allocation, and the offset into it in bytes."""

    memory: int
    offset: int


class _Launch(NamedTuple):
    """One launch: the C launcher, its leading arguments, the kernel's known arguments, and how to fill in the others.

    ``pointers`` holds (index, place). ``tensor_maps`` holds (index, encode, place, shape, strides), last index first,
    because each replaces one argument by several. ``new`` are the allocations made before this launch, ``dead`` those
    freed after it.
    """

    call: Callable[..., None]
    grid: tuple[int, int, int]
    head: tuple[Any, ...]
    values: list[Any]
    pointers: list[tuple[int, _Place]]
    tensor_maps: list[tuple[int, Callable[..., tuple[Any, ...]], _Place, tuple[int, ...], tuple[int, ...]]]
    new: list[int]
    dead: list[int]


class _Memory(NamedTuple):
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


def _span(tensor: Tensor, first: int = 0) -> int:
    """Bytes from the first element to the end of the last, over the dimensions from ``first`` on."""
    if not tensor.numel():
        return 0
    sizes = zip(tensor.shape[first:], tensor.stride()[first:], strict=True)
    return (1 + sum((size - 1) * stride for size, stride in sizes)) * tensor.element_size()


def _holds(tensor: Tensor, address: int) -> bool:
    """Whether ``address`` lies in ``tensor`` itself; another input may lie in the gaps between its experts."""
    offset = address - tensor.data_ptr()
    if not 0 <= offset < _span(tensor):
        return False
    step = tensor.stride(0) * tensor.element_size() if tensor.dim() == 3 else 0
    return not step or offset % step < _span(tensor, 1)


class _Recorder(TorchDispatchMode):
    """Records what steps allocate and launch while they run.

    Attributes:
        obstacle: why the recording cannot be replayed; empty if it can.
        transient: the next call will not meet the obstacle: Triton launched a kernel for the first time.
    """

    def __init__(self, inputs: list[Any]) -> None:
        super().__init__()
        self.inputs = inputs
        self.allocated: list[_Memory] = []
        self.launched: list[_Launch] = []
        self.directs: list[Any] = []
        self.obstacle, self.transient = "", False
        self.memory: dict[int, int] = {}  # number of each storage allocated while recording

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _ALLOCATIONS and func not in _VIEWS:
            # In a custom op, below autograd, operators made of others arrive whole: mT, reshape.
            with self:
                out = func.decompose(*args, **(kwargs or {}))
            if out is not NotImplemented:
                return out
        out = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS:
            self.memory[out.untyped_storage()._cdata] = len(self.inputs) + len(self.allocated)
            self.allocated.append(_Memory(tuple(out.shape), out.stride(), out.dtype))
        elif func not in _VIEWS:
            self.obstacle = str(func)
        return out

    def place(self, tensor: Tensor) -> _Place:
        """Where ``tensor`` begins."""
        storage, address = tensor.untyped_storage(), tensor.data_ptr()
        if storage._cdata in self.memory:
            return _Place(self.memory[storage._cdata], address - storage.data_ptr())
        places = [
            _Place(number, address - given.data_ptr())
            for number, given in enumerate(self.inputs)
            if isinstance(given, Tensor) and _holds(given, address)
        ]
        if len(places) != 1:
            self.obstacle = "an address of none of the inputs, or of several"
            return _Place(0, 0)
        return places[0]

    def launch(self, direct: Any, grid: tuple[int, int, int], args: tuple[Any, ...]) -> None:
        """Record one launch that was just made."""
        if direct is None:
            self.obstacle, self.transient = "a launch through Triton", True
            return
        pointers, tensor_maps = [], []
        maps = iter(direct.tensor_maps[::-1])
        for index, arg in enumerate(args):
            if isinstance(arg, Descriptor):
                tensor = arg.tensor
                tensor_maps.append((index, next(maps), self.place(tensor), tuple(tensor.shape), tensor.stride()))
            elif isinstance(arg, Tensor):
                pointers.append((index, self.place(arg)))
        values = [None if isinstance(arg, Tensor | Descriptor) else arg for arg in args]
        self.directs.append(direct)
        self.launched.append(
            _Launch(direct.call, grid, direct.head, [*values, *direct.constants], pointers, tensor_maps[::-1], [], [])
        )


class _Program:
    """A recording, which can be replayed on other tensors of the same signature."""

    def __init__(self, recorder: _Recorder, outputs: Any) -> None:
        self.named = getattr(type(outputs), "_make", tuple)
        self.inputs = len(recorder.inputs)
        self.allocated, self.launches = recorder.allocated, recorder.launched
        self.directs = recorder.directs  # keeps the compiled kernels alive
        # An output is an allocation or a view of one. None, and what has no elements, is the same in all calls (-1).
        self.outputs: list[tuple[int, tuple[Any, ...] | None, Tensor | None]] = []
        for out in outputs:
            if out is None or not out.numel():
                self.outputs.append((-1, None, out))
                continue
            number = recorder.place(out).memory - self.inputs
            if number < 0:
                recorder.obstacle = "an output that is an input"
            else:
                whole = self.allocated[number] == (tuple(out.shape), out.stride(), out.dtype)
                view = (tuple(out.shape), out.stride(), out.storage_offset())
                self.outputs.append((number, None if whole and not out.storage_offset() else view, None))
        kept = {number for number, _, _ in self.outputs if number >= 0}
        used: dict[int, list[int]] = {}
        for step, launch in enumerate(self.launches):
            for place in (*(p for _, p in launch.pointers), *(p for _, _, p, _, _ in launch.tensor_maps)):
                if place.memory >= self.inputs:
                    used.setdefault(place.memory - self.inputs, []).append(step)
        if kept - set(used):
            recorder.obstacle = "an output that no kernel writes"
        for number, uses in used.items():
            self.launches[uses[0]].new.append(number)
            if number not in kept:
                self.launches[uses[-1]].dead.append(number)

    def __call__(self, addresses: list[int], device: torch.device) -> Any:
        """Replay on inputs at these addresses, and return the outputs."""
        stream = self.directs[0].stream(launches._current_device())
        inputs = self.inputs
        addresses += [0] * len(self.allocated)
        live: list[Any] = [None] * len(self.allocated)
        for call, grid, head, known, pointers, tensor_maps, new, dead in self.launches:
            for number in new:
                shape, strides, dtype = self.allocated[number]
                live[number] = torch.empty_strided(shape, strides, dtype=dtype, device=device)
                addresses[inputs + number] = live[number].data_ptr()
            values = known.copy()
            for index, (start, offset) in pointers:
                values[index] = addresses[start] + offset
            for index, tensor_map, (start, offset), shape, strides in tensor_maps:
                values[index : index + 1] = tensor_map(addresses[start] + offset, shape, strides)
            if launches._ONE_BY_ONE:
                call(*grid, stream, *head, *values)
            else:
                call(*grid, stream, *head, values)
            for number in dead:
                live[number] = None
        launches._counts["replay"] += len(self.launches)
        return self.named(
            [
                same if number < 0 else live[number] if view is None else live[number].as_strided(*view)
                for number, view, same in self.outputs
            ]
        )


# By signature: its program, or the number of calls so far without one.
_programs: dict[tuple[Any, ...], _Program | int] = {}
config.on_change.append(_programs.clear)


def replayed(
    steps: Callable[[T, S], R],
    allowed: Callable[[T, S], bool] = lambda tensors, settings: True,
    first: Callable[[T, S], None] | None = None,
) -> Callable[[T, S], R]:
    """``steps``, replayed from the third call of a signature on.

    Args:
        steps: takes a named tuple of tensors, packed weights and None, the first a tensor, and hashable settings;
            returns a tuple, named or not, of None and tensors that it allocated. Its allocations and launches may
            depend only on shapes, strides, dtypes, settings and ``tiles.config``.
        allowed: whether steps do nothing else; where it is False, they are not recorded.
        first: called before the first call of a signature.
    """

    @functools.wraps(steps)
    def call(tensors: T, settings: S) -> R:
        first_tensor: Any = tensors[0]
        if (
            not _on_gpu(first_tensor)
            or launches.launcher() != "replay"
            or launches.refusal() is not None
            or launches._watched()
        ):
            return steps(tensors, settings)
        device = first_tensor.device
        key: list[Any] = [steps, settings, device, dot_precision(first_tensor.dtype)]
        addresses: list[int] = []
        bits = 0
        flat = _flat(tensors)
        for tensor in flat:
            if not isinstance(tensor, Tensor):
                addresses.append(0)
                key.append(tensor)
            else:
                address = tensor.data_ptr()
                addresses.append(address)
                bits |= address
                key += tensor.shape, tensor.stride(), tensor.dtype
        if bits & 15 or first_tensor.get_device() != launches._current_device():
            return steps(tensors, settings)
        signature = tuple(key)
        program = _programs.get(signature, 0)
        if isinstance(program, _Program):
            return program(addresses, device)
        if len(_programs) >= _SIGNATURES:
            _programs.clear()
        _programs[signature] = program + 1
        if program >= _TRIES or not allowed(tensors, settings):
            return steps(tensors, settings)
        if program == 0:
            if first is not None:
                first(tensors, settings)
            return steps(tensors, settings)
        return _record(signature, steps, tensors, flat, settings)

    return call


def _flat(tensors: tuple[Any, ...]) -> list[Any]:
    """Tensors and what else tells a call from another: a packed weight in its parts."""
    flat: list[Any] = []
    for given in tensors:
        if given is None or isinstance(given, Tensor):  # asked first: PackedWeight is abstract, which is slow to ask
            flat.append(given)
        else:
            flat += given.parts()
    return flat


def _record(
    signature: tuple[Any, ...], steps: Callable[[T, S], R], tensors: T, flat: list[Any], settings: S
) -> R:
    """Run and record ``steps``; return its outputs, and keep the program if it can be replayed."""
    recorder = _Recorder(flat)
    thread = threading.get_ident()
    launches._recorders[thread] = recorder.launch
    try:
        with recorder:
            outputs = steps(tensors, settings)
    finally:
        del launches._recorders[thread]
    program = _Program(recorder, outputs)
    if not recorder.obstacle:
        _programs[signature] = program
    elif not recorder.transient:
        _programs[signature] = _TRIES
    logger.debug("%s: %s", steps.__name__, recorder.obstacle or f"{len(program.launches)} launches to replay")
    return outputs
