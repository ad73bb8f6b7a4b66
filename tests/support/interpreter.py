"""Triton's interpreter made strict enough to verify kernels on a CPU.

Triton's own interpreter (3.6 to 3.9) multiplies the bit patterns of bfloat16 and fp8, truncates where hardware
rounds, gives zeros for masked lanes that Triton leaves undefined, and reads out of bounds without a word.
:func:`install` makes numerics exact; :func:`sanitize`, :func:`shuffled` and :func:`overflow_asserts` look for what a
friendly run hides.

``TRITON_INTERPRET=1`` must be in the environment before the first kernel is decorated (tests/conftest.py).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter as interp
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle
from triton.tools.tensor_descriptor import TensorDescriptor


class Finding(AssertionError):
    """A sanitiser's report."""


# --------------------------------------------------------------------------------------------- exact numerics
# torch dtype and the numpy dtype in which the interpreter stores it
_FLOATS = {
    tl.float8e4nv: (torch.float8_e4m3fn, np.uint8),
    tl.bfloat16: (torch.bfloat16, np.uint16),
    tl.float16: (torch.float16, np.float16),
    tl.float32: (torch.float32, np.float32),
    tl.float64: (torch.float64, np.float64),
}


def _convert(data: np.ndarray, source: Any, target: Any, rounding_mode: Any = None) -> np.ndarray:
    """Round to nearest even, as the hardware does, in place of the interpreter's truncation."""
    if source not in _FLOATS or target not in _FLOATS:
        return _stock_convert(data, source, target, rounding_mode)
    torch_source, torch_target = _FLOATS[source][0], _FLOATS[target][0]
    values = torch.from_numpy(np.array(data, order="C", copy=True)).reshape(-1)
    values = (values if values.dtype == torch_source else values.view(torch_source)).to(torch_target)
    bits = {torch.bfloat16: torch.int16, torch.float8_e4m3fn: torch.uint8}.get(torch_target)
    values = values if bits is None else values.view(bits)
    return values.numpy().view(_FLOATS[target][1]).reshape(np.shape(data))


def _widen(handle: TensorHandle) -> np.ndarray:
    return _convert(handle.data, handle.dtype.scalar, tl.float32)


def _is_bf16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_imprecise: Any) -> TensorHandle:
    left, right = (_widen(t) if t.dtype.scalar in (tl.bfloat16, tl.float8e4nv) else t.data for t in (a, b))
    # In float32 also for float16 operands: numpy would multiply and add those one by one, and slowly. And by einsum:
    # matmul's libraries round a row by where it stands in its block, on some processors, and no GPU does.
    dtype = d.data.dtype
    product = np.einsum("...mk,...kn->...mn", left.astype(dtype), right.astype(dtype))
    return TensorHandle(product + d.data, d.dtype.scalar)


def _cast(self: Any, source: Any, target: Any) -> TensorHandle:
    s, t = source.dtype.scalar, target.scalar
    if s in _FLOATS and t in _FLOATS:
        return TensorHandle(_convert(source.data, s, t), t)
    if tl.bfloat16 in (s, t):  # to or from integers
        data = _widen(source) if s == tl.bfloat16 else source.data.astype(np.float32)
        return TensorHandle(
            _convert(data, tl.float32, t) if t == tl.bfloat16 else data.astype(interp._get_np_dtype(t)), t
        )
    return _stock["cast_impl"](self, source, target)


_RAW_BITS = {np.bitwise_and, np.bitwise_or, np.bitwise_xor}
_COMPARISONS = {np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal}


def _binary(self: Any, left: Any, right: Any, op: Any) -> TensorHandle:
    if not _is_bf16(left) or op in _RAW_BITS:
        return _stock["binary_op"](self, left, right, op)
    result = op(_widen(left), _widen(right))
    return TensorHandle(result if op in _COMPARISONS else _convert(result, tl.float32, tl.bfloat16), tl.bfloat16)


def _unary(self: Any, arg: Any, op: Any) -> TensorHandle:
    if not _is_bf16(arg):
        return _stock["unary_op"](self, arg, op)
    return TensorHandle(_convert(op(_widen(arg)), tl.float32, tl.bfloat16), tl.bfloat16)


def _reduce(self: Any, inputs: Any) -> Any:
    handles = inputs if isinstance(inputs, tuple) else (inputs,)
    if any(h.dtype.scalar == tl.bfloat16 for h in handles):
        raise Finding("a reduction or scan in bfloat16: cast to float32 first (the hardware would lose bits too)")
    return _stock_reduce(self, inputs)


def _skip_copy_back(self: Any, args_dev: Any, args_hst: Any, kwargs: Any, kwargs_hst: Any) -> None:
    """CPU arguments alias what the kernel wrote; only other devices need the copy."""
    if any(torch.is_tensor(a) and a.device.type != "cpu" for a in (*args_dev, *kwargs.values())):
        _stock_copy_back(self, args_dev, args_hst, kwargs, kwargs_hst)


# ------------------------------------------------------------------------------------------------ fast device calls
_patched_modules: set[int] = set()


def _device_call(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a device function without patching triton.language again for each call (a millisecond every time)."""
    if self is tl.sort:  # by numpy, as the interpreter's own scans: it takes a minute to exchange element by element
        (unsorted,) = args
        return tl.core.tensor(TensorHandle(np.sort(unsorted.handle.data), unsorted.dtype), unsorted.type)
    modules = {id(v) for v in self.fn.__globals__.values() if v is tl or v is tl.core}
    if not modules <= _patched_modules:
        interp._patch_lang(self.fn)
        _patched_modules.update(modules)
    return self.rewrite()(*args, **kwargs)


# --------------------------------------------------------------------------------------------------- sanitisers
@dataclass
class _Span:
    """The bytes one tensor argument spans, with the last program that stored to and loaded from each."""

    low: int
    high: int
    name: str
    writer: np.ndarray | None = None
    reader: np.ndarray | None = None

    def shadows(self) -> tuple[np.ndarray, np.ndarray]:
        if self.writer is None or self.reader is None:
            self.writer = np.full(self.high - self.low, -1, np.int64)
            self.reader = np.full(self.high - self.low, -1, np.int64)
        return self.writer, self.reader


@dataclass
class _State:
    poison: bool = False
    memcheck: bool = False
    races: bool = False
    other_given: bool = False
    spans: dict[int, _Span] = field(default_factory=dict)
    launches: list[str] = field(default_factory=list)


_state = _State()
_MANY_READERS = -2
_ORIGIN = "moe_kernels.origin"  # attribute of a pointer handle: the low address of the argument it came from


def _tensors(args: Any, names: Any) -> Iterator[tuple[str, torch.Tensor]]:
    for name, arg in zip(names, args, strict=False):
        arg = arg.base if isinstance(arg, TensorDescriptor) else arg
        if torch.is_tensor(arg):
            yield name, arg
        elif isinstance(arg, tuple):
            yield from _tensors(arg, [f"{name}[{i}]" for i in range(len(arg))])


def _launch(self: Any, *args: Any, **kwargs: Any) -> None:
    names = list(inspect.signature(self.fn).parameters)
    _state.spans = {}
    _state.launches.append(self.fn.__name__)
    known = {n: v for n, v in kwargs.items() if n in names}
    for name, t in _tensors((*args, *known.values()), (*names[: len(args)], *known)):
        bytes_ = (sum((s - 1) * st for s, st in zip(t.shape, t.stride(), strict=True)) + 1) * t.element_size()
        low = t.data_ptr()
        span = _Span(low, low + (bytes_ if t.numel() else 0), name)
        if low not in _state.spans or _state.spans[low].high < span.high:
            _state.spans[low] = span
    _patched_modules.clear()
    _patched_modules.update(id(v) for v in self.fn.__globals__.values() if v is tl or v is tl.core)
    try:
        _stock_launch(self, *args, **kwargs)
    finally:
        _patched_modules.clear()


def _implicit_convert(arg: Any) -> Any:
    value = _stock_implicit_convert(arg)
    if hasattr(arg, "data_ptr"):
        value.handle.set_attr(_ORIGIN, arg.data_ptr())
    return value


def _keeping_origin(method: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> TensorHandle:
        result = method(self, *args, **kwargs)
        for arg in args:
            if isinstance(arg, TensorHandle) and _ORIGIN in arg.attr:
                result.attr[_ORIGIN] = arg.attr[_ORIGIN]
        return result

    return wrapped


def _descriptor_pointers(self: Any, offsets: Any) -> Any:
    pointers, masks = _stock_descriptor_pointers(self, offsets)
    pointers.attr.update({k: v for k, v in self.base.attr.items() if k == _ORIGIN})
    return pointers, masks


def _active(pointers: TensorHandle, mask: TensorHandle) -> np.ndarray:
    keep = np.broadcast_to(mask.data, pointers.data.shape)
    return pointers.data[keep].astype(np.int64).ravel()


def _span_of(pointers: TensorHandle, addresses: np.ndarray) -> _Span | None:
    if _ORIGIN in pointers.attr:
        return _state.spans[pointers.attr[_ORIGIN]]
    return next((s for s in _state.spans.values() if s.low <= addresses[0] < s.high), None)


def _memcheck(pointers: TensorHandle, addresses: np.ndarray, size: int, kind: str) -> None:
    span = _span_of(pointers, addresses)
    if span is None:
        raise Finding(
            f"{kind} through a pointer that belongs to no argument, program {interp.interpreter_builder.grid_idx}"
        )
    outside = (addresses < span.low) | (addresses + size > span.high)
    if outside.any():
        raise Finding(
            f"out-of-bounds {kind}: {int(outside.sum())} lanes, first {int(addresses[outside][0]) - span.low:+d} "
            f"bytes from the start of {span.name!r} ({span.high - span.low} bytes), "
            f"program {interp.interpreter_builder.grid_idx}"
        )


def _program(builder: Any) -> int:
    x, y, z = builder.grid_idx
    return (x * builder.grid_dim[1] + y) * builder.grid_dim[2] + z


def _race_on_load(builder: Any, span: _Span, at: np.ndarray) -> None:
    writer, reader = span.shadows()
    program = _program(builder)
    other = (writer[at] != -1) & (writer[at] != program)
    if other.any():
        raise Finding(
            f"race: program {program} loads {span.name!r}+{at[other][0]}, which program {writer[at[other][0]]} stored"
        )
    seen = reader[at]
    reader[at] = np.where((seen == -1) | (seen == program), program, _MANY_READERS)


def _race_on_store(builder: Any, span: _Span, at: np.ndarray, values: np.ndarray) -> None:
    writer, reader = span.shadows()
    program = _program(builder)
    for what, last in (("stored", writer), ("loaded", reader)):
        other = (last[at] != -1) & (last[at] != program)
        if other.any():
            raise Finding(
                f"race: program {program} stores {span.name!r}+{at[other][0]}, "
                f"which program {last[at[other][0]]} {what}"
            )
    order = np.argsort(at, kind="stable")
    twice = np.flatnonzero(np.diff(at[order]) == 0)
    if twice.size and (values[order[twice]] != values[order[twice + 1]]).any():
        raise Finding(
            f"race: two lanes of program {program} store different values to {span.name!r}+{at[order[twice[0]]]}"
        )
    writer[at] = program


def _poison_like(like: np.ndarray, ty: Any) -> TensorHandle:
    dtype = interp._get_np_dtype(ty)
    if ty in (tl.bfloat16, tl.float8e4nv):
        value: Any = 0x7FC0 if ty == tl.bfloat16 else 0x7F
    elif ty.is_floating() and ty in _FLOATS:
        value = np.nan
    elif dtype == np.bool_:
        value = True
    else:
        value = np.iinfo(dtype).max // 2
    return TensorHandle(np.full(like.shape, value, dtype=dtype), ty)


def _boolean(mask: TensorHandle) -> TensorHandle:
    """A comparison has the type of what it compares, which 3.9 refuses as a mask where a scalar takes part."""
    return TensorHandle(np.asarray(mask.data).astype(np.bool_), tl.int1)


def _load(self: Any, pointers: Any, mask: Any, other: Any, *args: Any, **kwargs: Any) -> TensorHandle:
    ty = pointers.get_element_ty()
    mask = _boolean(mask)
    if _state.memcheck or _state.races:
        addresses = _active(pointers, mask)
        if addresses.size and _state.memcheck:
            _memcheck(pointers, addresses, max(1, ty.primitive_bitwidth // 8), "load")
        if addresses.size and _state.races and (span := _span_of(pointers, addresses)):
            _race_on_load(self, span, addresses - span.low)
    if _state.poison and other is None and not _state.other_given and not mask.data.all():
        other = _poison_like(pointers.data, ty)
    return _stock["create_masked_load"](self, pointers, mask, other, *args, **kwargs)


def _load_semantic(self: Any, pointer: Any, mask: Any, other: Any, *args: Any) -> Any:
    """Triton asks ``if other:``, which the interpreter answers with the value: a scalar ``other=0.0`` is lost."""
    _state.other_given = other is not None
    try:
        return _stock_load_semantic(self, pointer, mask, other, *args)
    finally:
        _state.other_given = False


def _store(self: Any, pointers: Any, value: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
    size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    mask = _boolean(mask)
    if _state.memcheck or _state.races:
        addresses = _active(pointers, mask)
        if addresses.size and _state.memcheck:
            _memcheck(pointers, addresses, size, "store")
        if addresses.size and _state.races and (span := _span_of(pointers, addresses)):
            keep = np.broadcast_to(mask.data, pointers.data.shape)
            stored = np.broadcast_to(value.data, pointers.data.shape)[keep].ravel()
            _race_on_store(self, span, addresses - span.low, stored)
    return _stock["create_masked_store"](self, pointers, value, mask, *args, **kwargs)


def _atomic(self: Any, op: Any, pointers: Any, value: Any, mask: Any, *args: Any) -> TensorHandle:
    mask = _boolean(mask)
    addresses = _active(pointers, mask)
    if addresses.size and _state.memcheck:
        _memcheck(pointers, addresses, max(1, pointers.get_element_ty().primitive_bitwidth // 8), "atomic")
    return _stock["create_atomic_rmw"](self, op, pointers, value, mask, *args)


# ------------------------------------------------------------------------------------------------- public switches
_stock_convert = interp._convert_float
_stock_reduce = interp.ReduceScanOpInterface.apply
_stock_copy_back = GridExecutor._restore_args_dev
_stock_load_semantic = TritonSemantic.load
_stock_launch = GridExecutor.__call__
_stock_implicit_convert = interp._implicit_cvt
_stock_descriptor_pointers = interp.TensorDescHandle.materialize_pointers
_stock: dict[str, Callable[..., Any]] = {
    name: getattr(InterpreterBuilder, name)
    for name in (
        "cast_impl",
        "binary_op",
        "unary_op",
        "create_masked_load",
        "create_masked_store",
        "create_atomic_rmw",
    )
}
_POINTER_METHODS = ("create_addptr", "create_splat", "create_broadcast", "create_expand_dims", "create_reshape",
                    "create_trans", "create_select", "create_bitcast")  # fmt: skip
_installed = False


def install() -> None:
    """Exact numerics and the hooks of the sanitisers, for the rest of the process. A second call does nothing."""
    global _installed
    if _installed:
        return
    _installed = True
    interp._convert_float = _convert
    interp._implicit_cvt = _implicit_convert
    interp.ReduceScanOpInterface.apply = _reduce
    interp.TensorDescHandle.materialize_pointers = _descriptor_pointers
    interp.InterpretedFunction.__call__ = _device_call
    TritonSemantic.load = _load_semantic
    GridExecutor._restore_args_dev = _skip_copy_back
    GridExecutor.__call__ = _launch
    InterpreterBuilder.create_dot = _dot
    InterpreterBuilder.cast_impl = _cast
    InterpreterBuilder.binary_op = _binary
    InterpreterBuilder.unary_op = _unary
    InterpreterBuilder.create_masked_load = _load
    InterpreterBuilder.create_masked_store = _store
    InterpreterBuilder.create_atomic_rmw = _atomic
    for name in _POINTER_METHODS:
        setattr(InterpreterBuilder, name, _keeping_origin(getattr(InterpreterBuilder, name)))


@contextmanager
def sanitize(poison: bool = True, memcheck: bool = True, races: bool = True) -> Iterator[None]:
    """Masked lanes without ``other=`` read NaN or huge integers; every access stays inside the tensor its pointer
    came from; no two programs of a launch meet at one address unless both only load or use atomics.

    Raises:
        Finding: (wrapped by triton in an InterpreterError) with tensor name, byte offset and program id.
    """
    before = (_state.poison, _state.memcheck, _state.races)
    _state.poison, _state.memcheck, _state.races = poison, memcheck, races
    try:
        yield
    finally:
        _state.poison, _state.memcheck, _state.races = before


@contextmanager
def overflow_asserts() -> Iterator[None]:
    """Triton's own int32 overflow assertions, which the interpreter leaves off."""
    options = interp.InterpreterOptions(debug=True, sanitize_overflow=True)
    with mock.patch.object(interp.interpreter_builder, "options", options):
        yield


@contextmanager
def shuffled(seed: int) -> Iterator[None]:
    """Run the programs of every launch in a random order. Deterministic kernels do not notice."""
    rng = np.random.default_rng(seed)
    stock = InterpreterBuilder.set_grid_idx
    order: list[int] = []

    def set_grid_idx(self: Any, x: int, y: int, z: int) -> None:
        _, ny, nz = self.grid_dim
        linear = (x * ny + y) * nz + z
        if linear == 0:
            order[:] = rng.permutation(int(np.prod(self.grid_dim))).tolist()
        rest, z = divmod(order[linear], nz)
        stock(self, *divmod(rest, ny), z)

    with mock.patch.object(InterpreterBuilder, "set_grid_idx", set_grid_idx):
        yield


@contextmanager
def recorded_launches() -> Iterator[list[str]]:
    """The names of the kernels launched inside the block, in order."""
    _state.launches.clear()
    yield _state.launches
