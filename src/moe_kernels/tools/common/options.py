"""Shared by the options of several commands: comma-separated names, the range of a seed, files of the project."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import moe_kernels
from moe_kernels.tools.check.forms import FORMS, why_not
from moe_kernels.tools.common.errors import MissingDependency, UsageError

if TYPE_CHECKING:
    import torch

#: torch takes seeds of 64 bits, some of what it passes them on to one bit less.
MAX_SEED = 2**63 - 1
#: What ``--dtype`` may be, and torch's name for it.
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


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


def chosen_forms(
    values: str, dtype: torch.dtype, device: torch.device, say: Callable[[str], object]
) -> list[str]:
    """The forms of ``--form``. Of all of them, ``say`` is told which cannot be checked here, and why.

    Raises:
        UsageError: there is no such form, or it is named and cannot be checked in this dtype or on this device.
    """
    chosen = []
    for name in several("form", values, tuple(FORMS)):
        reason = why_not(FORMS[name].get("packed", ""), dtype, device)
        if reason is None:
            chosen.append(name)
        elif values == "all":
            say(f"{name} is left out: {reason}")
        else:
            raise UsageError(f"--form {name}: {reason}")
    return chosen


def shipped(name: Path, otherwise: str = "") -> Path:
    """A file of the project: below the current directory, or in the source checkout that this package runs from.

    Raises:
        MissingDependency: it is in neither; ``otherwise`` says what else would do.
    """
    checkout = Path(moe_kernels.__file__).resolve().parents[2]
    for root in (Path(), checkout):
        if (root / name).is_file():
            return root / name
    cure = f"run this in a clone of the project{f', or {otherwise}' if otherwise else ''}"
    raise MissingDependency(f"{name} is neither here nor in {checkout}. Cure: {cure}.")


def ensure_writable(file: Path | None) -> None:
    """Make the folder of ``file`` and check that it can be written, before minutes of work are spent on it.

    Raises:
        OSError: it cannot be written.
    """
    if file is None:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))


def pick_device(wanted: str) -> torch.device:
    """The device of ``--device auto``, ``cuda`` or ``cpu``.

    Raises:
        MissingDependency: a GPU is asked for, and torch sees none.
    """
    import torch

    one_of("device", wanted, ("auto", "cuda", "cpu"))
    if wanted == "cuda" and not torch.cuda.is_available():
        raise MissingDependency("torch sees no NVIDIA GPU. Cure: see `moe-kernels doctor`, or use --device cpu")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")
