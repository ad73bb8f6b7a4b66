"""Reads an offline W&B run, to see what a training logs there; wandb's own reader went in 0.27.

``run-<id>.wandb`` is a log in LevelDB's format: after a 7-byte file header, blocks of 32 KiB hold fragments,
each with a 7-byte head (checksum, length, kind). A record is one fragment or a chain first, middle, last, and
is a protocol-buffer message of wandb's own schema, which the wandb package ships.
"""

from __future__ import annotations

import importlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HEAD = struct.Struct("<IHB")
BLOCK = 32768
FULL, LAST = 1, 4


def read_run(folder: Path) -> tuple[str, list[dict[str, Any]]]:
    """Project and history, keys as in W&B (train/loss), of the one run below a folder; nothing without one."""
    # The classes of this generated module are made on import: a type checker cannot see them.
    messages = importlib.import_module("wandb.proto.wandb_internal_pb2")
    project, history = "", []
    for raw in _records(next(folder.rglob("run-*.wandb"), None)):
        record = messages.Record()
        record.ParseFromString(raw)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            project = record.run.project
        elif kind == "history":
            items = record.history.item
            history.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
    return project, history


def _records(path: Path | None) -> Iterator[bytes]:
    data = path.read_bytes() if path else b""
    offset, record = 7, b""
    while offset < len(data):
        left = BLOCK - offset % BLOCK
        if left < HEAD.size:
            offset += left
            continue
        _, length, kind = HEAD.unpack_from(data, offset)
        offset += HEAD.size + length
        record += data[offset - length : offset]
        if kind in (FULL, LAST):
            yield record
            record = b""
