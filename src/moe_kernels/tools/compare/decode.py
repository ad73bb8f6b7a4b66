"""JSON values into the dataclasses that were written, checked by pydantic: what does not fit is refused."""

from __future__ import annotations

import functools
import json
from typing import Annotated, Any

from pydantic import ConfigDict, PlainValidator, TypeAdapter, ValidationError

#: How JSON, which has no such numbers, writes them here (``tools.common.files.write_json``).
NOT_FINITE = ("nan", "inf", "-inf")
LARGEST = 1e300
#: Words for those of pydantic's errors that do not say what a value should be.
MESSAGES = {"missing": "is missing", "unexpected_keyword_argument": "is an unknown key"}


class Misfit(ValueError):
    """A value is not of the type that belongs there; the message says where."""


def _number(value: Any) -> float:
    if isinstance(value, str) and value in NOT_FINITE:
        return float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError("should be a number")
    if not abs(value) <= LARGEST:
        raise ValueError("should be a number within range")
    return float(value)


#: A float of a JSON file: an int, ``"nan"`` and the infinities are floats too, a bool is not.
Number = Annotated[float, PlainValidator(_number)]


# Cached, for making one takes milliseconds.
@functools.cache
def _adapter(kind: Any) -> TypeAdapter[list[Any]]:
    """For a list of one: pydantic takes a configuration for no dataclass, and those inside a list inherit it."""
    return TypeAdapter(list[kind], config=ConfigDict(extra="forbid"))


def decode(kind: Any, value: Any, where: str = "") -> Any:
    """A value from JSON as a ``kind``: a dataclass, a container, a union, or a plain type.

    Raises:
        Misfit: names the place, as in ``runs[2].rows[0]``.
    """
    # pydantic takes no lone surrogates, which the text of a command line may hold: they become "?".
    text = json.dumps(value, ensure_ascii=False).encode(errors="replace")
    try:
        return _adapter(kind).validate_json(b"[" + text + b"]", strict=True)[0]
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = where + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"][1:])
        place = "".join(letter for letter in place.lstrip(".")[:200] if letter.isprintable())
        says = first["msg"].removeprefix("Input ").removeprefix("Value error, ")
        says = f"{says[:1].lower()}{says[1:]} and is {first['input']!r:.60}"
        raise Misfit(f"{place or 'it'} {MESSAGES.get(first['type'], says)}") from None
