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
    """What one offline run holds."""

    project: str = ""
    run_id: str = ""
    name: str = ""
    history: list[Row] = field(default_factory=list)  # as logged, full precision; keys as in W&B (train/loss)
    truncated: bool = False  # a record is cut off, as after a kill, or damaged: what came before it was read


def read_run(path: Path) -> WandbRun:
    """Read one ``.wandb`` file.

    Raises:
        NotAWandbRun: the file does not start like a W&B run.
    """
    from google.protobuf.message import DecodeError

    # The classes of this generated module are made on import: a type checker cannot see them.
    messages = importlib.import_module("wandb.proto.wandb_internal_pb2")

    data, run = path.read_bytes(), WandbRun()
    if not data.startswith(MAGIC):
        raise NotAWandbRun(f"{path} is not an offline W&B run (it does not start with {MAGIC.decode()}).")
    try:
        for raw in _records(data):
            record = messages.Record()
            record.ParseFromString(raw)
            kind = record.WhichOneof("record_type")
            if kind == "run":
                run.project, run.run_id, run.name = record.run.project, record.run.run_id, record.run.display_name
            elif kind == "history":
                run.history.append(_row(record.history))
    except (EOFError, DecodeError, ValueError, RecursionError):  # cut off, no such message, or no JSON in it
        run.truncated = True
    return run


def _row(history: Any) -> Row:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in history.item}


def find_run(folder: Path) -> Path | None:
    """The newest ``.wandb`` file anywhere below a folder, or None."""
    return max(folder.rglob("run-*.wandb"), key=lambda file: file.stat().st_mtime, default=None)


def _records(data: bytes) -> Iterator[bytes]:
    """The records of a file; EOFError where one is cut off or damaged."""
    offset = FILE_HEADER
    chain: bytes | None = None
    while offset < len(data):
        left = BLOCK - offset % BLOCK
        if left < FRAGMENT_HEAD.size:
            offset += left
            continue
        if offset + FRAGMENT_HEAD.size > len(data):
            raise EOFError
        checksum, length, kind = FRAGMENT_HEAD.unpack_from(data, offset)
        offset += FRAGMENT_HEAD.size
        fragment = data[offset : offset + length]
        offset += length
        # A file of a killed run may end in a short fragment or in zeros.
        whole = len(fragment) == length and zlib.crc32(bytes([kind]) + fragment) == checksum
        begins = kind in (FULL, FIRST)
        if not whole or kind not in (FULL, FIRST, MIDDLE, LAST) or begins != (chain is None):
            raise EOFError
        chain = (chain or b"") + fragment
        if kind in (FULL, LAST):
            yield chain
            chain = None
    if chain is not None:
        raise EOFError
