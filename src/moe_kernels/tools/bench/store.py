"""The result file of ``moe-kernels bench``: written after every layer, and continued by the next call."""

from __future__ import annotations

import json
import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

from moe_kernels.tools.common.errors import UsageError
from moe_kernels.tools.common.files import locked, read_object, write_text
from moe_kernels.tools.common.machine import PACKAGES

logger = logging.getLogger("moe_kernels")

SCHEMA = 2
#: What must be the same for two calls to write into one file.
SAME = ("gpu", "cpu", *PACKAGES, "moe_kernels", "commit", "sources", "bench_sources", "tuned_tiles")
#: Wait so long for another call without a word.
PATIENCE_S = 5.0


class Store:
    """Results by cell: one (shape, tokens, routing), with the arguments that were used.

    Attributes:
        report: what the file holds.
    """

    def __init__(
        self, file: Path | None, environment: dict[str, Any], arguments: dict[str, Any], fresh: bool
    ) -> None:
        """Open ``file`` or start empty; without a file results are kept for this call alone.

        Raises:
            UsageError: the file is not such a report, or was measured elsewhere or with other arguments.
        """
        self.file = file
        self.report: dict[str, Any] = {
            "schema": SCHEMA,
            "kind": "bench",
            "environment": environment,
            "arguments": arguments,
            "ceilings": None,
            "results": [],
        }
        self._fresh = fresh
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
        with self._locked():  # before anything is measured
            self._read()

    def find(self, shape: str, tokens: int, routing: str) -> list[dict[str, Any]]:
        """The rows of a cell; empty if it is still to be measured."""
        return [row for row in self.report["results"] if _cell(row) == (shape, tokens, routing)]

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Add a measured cell and write the file, so that a killed run loses one cell at most.

        Another call may write to the same file: what it has added stays, and of one cell the newer rows.
        """
        if self.file is None:
            self.report["results"] += rows
            return
        with self._locked():
            self._read()
            cells = {_cell(row) for row in rows}
            self.report["results"] = [row for row in self.report["results"] if _cell(row) not in cells] + rows
            write_text(self.file, json.dumps(self.report, indent=1) + "\n")
        self._fresh = False

    def _locked(self) -> AbstractContextManager[None]:
        """Keep other calls from the file; one holds it for as long as it takes to write."""
        if self.file is None:
            return nullcontext()
        said = f"waiting for another `moe-kernels bench` that writes to {self.file}"
        return locked(self.file.with_name(f".{self.file.name}.lock"), lambda: logger.warning(said), PATIENCE_S)

    def _read(self) -> None:
        """Take over what the file holds, unless it is to be replaced."""
        if self.file is None or self._fresh or not self.file.exists():
            return
        found = _report(self.file)
        for what, names in (("environment", SAME), ("arguments", self.report["arguments"])):
            for name in names:
                if found[what].get(name) != self.report[what].get(name):
                    raise UsageError(
                        f"{self.file} was measured with {name}={found[what].get(name)!r}, this call has "
                        f"{self.report[what].get(name)!r}: use another --json, or --fresh to start over."
                    )
        self.report = {**found, "ceilings": found["ceilings"] or self.report["ceilings"]}


def _cell(row: dict[str, Any]) -> tuple[str, int, str]:
    return row["shape"], row["tokens"], row["routing"]


def _report(file: Path) -> dict[str, Any]:
    """The content of a result file, if it is whole."""
    from moe_kernels.tools.bench.experts import Measurement

    cure = "use another --json, or --fresh."
    found = read_object(file, cure)
    columns = {field.name for field in fields(Measurement)}
    parts: dict[str, Any] = {"environment": dict, "arguments": dict, "ceilings": (dict, type(None)), "results": list}
    if (
        (found.get("kind"), found.get("schema")) != ("bench", SCHEMA)
        or not all(isinstance(found.get(name, ""), kind) for name, kind in parts.items())
        or not all(isinstance(row, dict) and columns <= row.keys() for row in found["results"])
    ):
        raise UsageError(f"{file} is no result of this version of `moe-kernels bench`: {cure}")
    return found
