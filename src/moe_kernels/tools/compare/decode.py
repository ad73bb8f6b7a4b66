"""Plain JSON values into the dataclasses that were written, checked: what does not fit is refused, never guessed."""

from __future__ import annotations

import math
import types
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

#: How JSON, which has no such numbers, writes them here (``tools.common.files.write_json``).
NOT_FINITE = ("nan", "inf", "-inf")
LARGEST = 1e300


class Misfit(ValueError):
    """A value is not of the type that belongs there; the message says where."""


def decode(kind: Any, value: Any, where: str = "") -> Any:
    """``value`` as a ``kind``: a dataclass, list, tuple, dict, union, or a plain type.

    An int is a float too, ``"nan"`` and the infinities are floats, a bool is no number. A dataclass takes no unknown
    key and needs every key without a default.

    Raises:
        Misfit: names the place, as in ``runs[2].rows[0]``.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        return _union(arguments, value, where)
    if origin in (list, tuple):
        if not isinstance(value, list):
            raise _misfit(where, "a list", value)
        items = [decode(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value)]
        return tuple(items) if origin is tuple else items
    if origin is dict:
        if not isinstance(value, dict):
            raise _misfit(where, "a mapping", value)
        return {key: decode(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if is_dataclass(kind):
        return _dataclass(kind, value, where)
    if kind is float:
        return _float(value, where)
    if kind is types.NoneType:
        kind = type(None)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise _misfit(where, kind.__name__, value)
    return value


def _union(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and types.NoneType in kinds:
        return None
    [kind] = [kind for kind in kinds if kind is not types.NoneType]
    return decode(kind, value, where)


def _dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise _misfit(where, "a mapping", value)
    known = {field.name: field for field in fields(kind)}
    if unknown := [key for key in value if key not in known]:
        raise Misfit(f"{where or 'it'} has an unknown key {unknown[0]!r:.60}")
    needed = [n for n, field in known.items() if field.default is MISSING and field.default_factory is MISSING]
    if missing := [name for name in needed if name not in value]:
        raise Misfit(f"{where or 'it'} lacks {missing[0]!r}")
    hints = get_type_hints(kind)
    return kind(**{name: decode(hints[name], item, f"{where}.{name}".lstrip(".")) for name, item in value.items()})


def _float(value: Any, where: str) -> float:
    if isinstance(value, str) and value in NOT_FINITE:
        return float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _misfit(where, "a number", value)
    if not math.isfinite(value) or abs(value) > LARGEST:
        raise Misfit(f"{where} is out of range")
    return float(value)


def _misfit(where: str, wanted: str, value: Any) -> Misfit:
    return Misfit(f"{where or 'it'} should be {wanted} and is {value!r:.60}")
