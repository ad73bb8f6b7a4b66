"""Files that several processes share: written atomically, read with a cure, locked where two could write."""

from __future__ import annotations

import errno
import functools
import glob
import json
import logging
import math
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from moe_kernels.tools.common.errors import UsageError

logger = logging.getLogger("moe_kernels")

# A half-written file of this age is left over from a killed process; a younger one may have a writer on another host.
LEFT_OVER_S = 24 * 3600.0
#: Errors of a file system without locks; some versions of filelock raise NotImplementedError for the second.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def read_json(path: Path, cure: str = "") -> Any:
    """What a JSON file holds.

    Raises:
        UsageError: the file cannot be read, or is not JSON; with the cure.
    """
    ending = f": {cure}" if cure else ""
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error}){ending}") from error
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, brackets without end
        raise UsageError(f"{path} is not JSON ({error}){ending}") from error


def write_json(path: Path, data: object) -> None:
    """Write JSON atomically. A number that is not finite becomes ``"nan"``, ``"inf"`` or ``"-inf"``."""
    write_text(path, json.dumps(_finite(data), separators=(",", ":"), allow_nan=False))


def write_text(path: Path, text: str) -> None:
    """Write a text atomically: a reader sees the whole file, or what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for old in path.parent.glob(f"{glob.escape(path.name)}.*.part"):
        with suppress(FileNotFoundError):
            if time.time() - old.stat().st_mtime > LEFT_OVER_S:
                old.unlink()
    part = path.with_name(f"{path.name}.{secrets.token_hex(8)}.part")
    try:
        # A report may quote a lone surrogate, which UTF-8 cannot encode.
        part.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError:
        part.unlink(missing_ok=True)
        raise
    part.replace(path)


def _finite(data: Any) -> Any:
    if isinstance(data, float) and not math.isfinite(data):
        return str(data)
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return data


@contextmanager
def locked(file: Path, busy: Callable[[], object], patience_s: float = 0.0) -> Iterator[None]:
    """Hold a lock on ``file``; it ends with this process, even where that is killed.

    Where another process still holds it after ``patience_s``, call ``busy``, which says so or raises, then wait. On a
    file system without locks there is none, and a warning, once.
    """
    lock = FileLock(file)
    try:
        with file.open("a"):  # where no file can be made, such as in /proc, filelock would wait for ever
            pass
        try:
            lock.acquire(timeout=patience_s)
        except Timeout:
            busy()
            lock.acquire()
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise
        _warn_of_no_locks(file.parent.resolve())
    try:
        yield
    finally:
        lock.release()


@functools.cache
def _warn_of_no_locks(folder: Path) -> None:
    logger.warning("%s is on a file system without locks: run one moe-kernels command at a time in it.", folder)
