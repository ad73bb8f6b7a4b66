"""Files that several processes share: written in one move, read with a cure, locked where two could write."""

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

# A file half written is left over by a killed process once it is so old; a writer may be on another host.
LEFT_OVER_S = 24 * 3600.0
#: What a file system without locks says; some versions of filelock raise NotImplementedError for the second.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        UsageError: the file cannot be read, or is not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, brackets without end
        raise UsageError(f"{path} is not JSON: {error}") from error


def read_object(file: Path, cure: str) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UsageError: it holds something else, with the cure.
    """
    try:
        found = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file} is not JSON ({error}): {cure}") from None
    if not isinstance(found, dict):
        raise UsageError(f"{file} is not a result of this project: {cure}")
    return found


def write_json(path: Path, data: object) -> None:
    """Write JSON in one move, so that a reader sees a whole file or none.

    JSON has no NaN: a number that is not finite becomes the string ``"nan"``, ``"inf"`` or ``"-inf"``, which
    ``float()`` reads back.
    """
    write_text(path, json.dumps(_finite(data), separators=(",", ":"), allow_nan=False))


def write_text(path: Path, text: str) -> None:
    """Write a text in one move, so that a reader sees a whole file or none, or the one before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for old in path.parent.glob(f"{glob.escape(path.name)}.*.part"):
        with suppress(FileNotFoundError):
            if time.time() - old.stat().st_mtime > LEFT_OVER_S:
                old.unlink()
    part = path.with_name(f"{path.name}.{secrets.token_hex(8)}.part")
    try:
        # A report may quote half a character, which no file can hold.
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
    """Hold a lock on ``file``, which ends with this process, killed or not.

    Where another process still has it after ``patience_s``, call ``busy``, which says so or raises, and then wait. A
    file system without locks gets a warning, once, and no lock.
    """
    lock = FileLock(file)
    try:
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
