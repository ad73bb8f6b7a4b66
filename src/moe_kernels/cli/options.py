"""What options of several commands share: comma-separated names, and the range of a seed."""

from __future__ import annotations

from collections.abc import Sequence

from moe_kernels.cli.errors import UsageError

#: torch takes seeds of 64 bits, some of what it passes them on to one bit less.
MAX_SEED = 2**63 - 1


def one_of(option: str, value: str, valid: Sequence[str]) -> str:
    """``value``, if it is one of ``valid``.

    Raises:
        UsageError: it is not.
    """
    if value not in valid:
        raise UsageError(f"--{option} {value}: choose from {', '.join(valid)}")
    return value


def several(option: str, values: str, valid: Sequence[str]) -> tuple[str, ...]:
    """Comma-separated values, each once, or all of them.

    Raises:
        UsageError: one is not of ``valid``, or none is named.
    """
    names = valid if values == "all" else [value.strip() for value in values.split(",") if value.strip()]
    if not names:
        raise UsageError(f"--{option} {values!r} names nothing: choose from {', '.join(valid)}")
    return tuple(one_of(option, name, valid) for name in dict.fromkeys(names))
