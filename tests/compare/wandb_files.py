"""Writes offline W&B files as the reader expects them, so that tests need neither wandb's service nor seconds."""

from __future__ import annotations

import importlib
import json
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

BLOCK, HEAD = 32768, 7


def frame(records: Iterable[bytes]) -> bytes:
    """LevelDB's log format: fragments that never cross a block, seven-byte heads, zeros at a block's end."""
    data = bytearray(b":W&B\x00\x00\x00")
    for record in records:
        first = True
        while True:
            left = BLOCK - len(data) % BLOCK
            if left < HEAD:
                data += bytes(left)
                continue
            part, record = record[: left - HEAD], record[left - HEAD :]
            kind = (1 if first else 4) if not record else (2 if first else 3)
            data += struct.pack("<IHB", zlib.crc32(bytes([kind]) + part), len(part), kind) + part
            first = False
            if not record:
                break
    return bytes(data)


def run_file(project: str, name: str, rows: Iterable[dict[str, Any]]) -> bytes:
    """The bytes of a run with these history rows."""
    messages = importlib.import_module("wandb.proto.wandb_internal_pb2")
    head = messages.Record()
    head.run.project, head.run.run_id, head.run.display_name = project, "abc123", name
    records = [head.SerializeToString()]
    for row in rows:
        record = messages.Record()
        for key, value in row.items():
            record.history.item.add(nested_key=[key], value_json=json.dumps(value))
        records.append(record.SerializeToString())
    return frame(records)


def write_run(folder: Path, project: str, name: str, rows: Iterable[dict[str, Any]]) -> Path:
    """Write a run where wandb would put it below WANDB_DIR."""
    path = folder / "wandb" / "offline-run-20260101_000000-abc123" / "run-abc123.wandb"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(run_file(project, name, rows))
    return path
