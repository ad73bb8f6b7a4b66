"""Reads an offline W&B run without a network and without an account.

``run-<id>.wandb`` is a log in LevelDB's format: after a 7-byte file header, blocks of 32 KiB hold fragments,
each with a 7-byte head (checksum, length, kind). A record is one fragment or a chain first, middle, last, and
is a protocol-buffer message of wandb's own schema, which the wandb package ships. (Its reader went in 0.27.)
"""

from __future__ import annotations

import importlib
import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_kernels.tools.common.errors import CommandError

MAGIC = b":W&B"
FILE_HEADER = 7
FRAGMENT_HEAD = struct.Struct("<IHB")
BLOCK = 32768
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4

Row = dict[str, Any]


class NotAWandbRun(CommandError):
    """The file is not an offline W&B run."""


@dataclass
class WandbRun:
    """What one offline run holds.

    Attributes:
        path: the ``.wandb`` file.
        project: W&B project.
        run_id: W&B run id.
        name: display name.
        history: rows as logged, in order, full precision; keys as in W&B (``train/loss``, ``_timestamp``).
        truncated: a record is cut off, as after a kill, or damaged; everything before it was read, nothing after.
    """

    path: Path
    project: str = ""
    run_id: str = ""
    name: str = ""
    history: list[Row] = field(default_factory=list)
    truncated: bool = False


def read_run(path: Path) -> WandbRun:
    """Read one ``.wandb`` file.

    Raises:
        NotAWandbRun: the file does not start like a W&B run.
    """
    from google.protobuf.message import DecodeError

    # The generated module makes its classes when it is imported, where a type checker cannot see them.
    messages = importlib.import_module("wandb.proto.wandb_internal_pb2")

    run = WandbRun(path)
    for raw in _records(path.read_bytes(), run):
        record = messages.Record()
        try:
            record.ParseFromString(raw)
            kind = record.WhichOneof("record_type")
            if kind == "run":
                run.project, run.run_id, run.name = record.run.project, record.run.run_id, record.run.display_name
            elif kind == "history":
                run.history.append(_row(record.history))
        except (DecodeError, ValueError, RecursionError):  # no such message, or a value that is no JSON
            run.truncated = True
            break
    return run


def _row(history: Any) -> Row:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in history.item}


def find_run(folder: Path) -> Path | None:
    """The newest ``.wandb`` file anywhere below a folder, or None."""
    files = sorted(folder.rglob("run-*.wandb"), key=lambda file: file.stat().st_mtime)
    return files[-1] if files else None


def _records(data: bytes, run: WandbRun) -> Iterator[bytes]:
    if data[: len(MAGIC)] != MAGIC:
        raise NotAWandbRun(f"{run.path} is not an offline W&B run (it does not start with {MAGIC.decode()}).")
    offset = FILE_HEADER
    chain: bytes | None = None
    while offset < len(data):
        left = BLOCK - offset % BLOCK
        if left < FRAGMENT_HEAD.size:
            offset += left
            continue
        if offset + FRAGMENT_HEAD.size > len(data):
            run.truncated = True
            return
        checksum, length, kind = FRAGMENT_HEAD.unpack_from(data, offset)
        offset += FRAGMENT_HEAD.size
        fragment = data[offset : offset + length]
        offset += length
        # A file that was being written ends in a short fragment, or in zeros that were never filled in.
        whole = len(fragment) == length and zlib.crc32(bytes([kind]) + fragment) == checksum
        begins = kind in (FULL, FIRST)
        if not whole or kind not in (FULL, FIRST, MIDDLE, LAST) or begins != (chain is None):
            run.truncated = True
            return
        chain = (chain or b"") + fragment
        if kind in (FULL, LAST):
            yield chain
            chain = None
    run.truncated = run.truncated or chain is not None
