"""The result file of ``moe-kernels bench``: written after every layer, and continued by the next call."""

from __future__ import annotations

import json
import logging
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError

from moe_kernels.tools.bench.experts import Measurement
from moe_kernels.tools.check.forms import PLAIN
from moe_kernels.tools.common.errors import UsageError
from moe_kernels.tools.common.files import locked, read_json, write_text
from moe_kernels.tools.common.machine import PACKAGES

logger = logging.getLogger("moe_kernels")

#: Two calls may write into one file where these are the same.
SAME = ("gpu", "cpu", *PACKAGES, "moe_kernels", "commit", "sources", "bench_sources", "tuned_tiles")
#: Another call may take so long to write before this one says that it waits.
PATIENCE_S = 5.0


class Report(BaseModel):
    """What the file holds."""

    version: Literal[2] = Field(alias="schema")
    kind: Literal["bench"]
    environment: dict[str, Any]
    arguments: dict[str, Any]
    ceilings: dict[str, float] | None
    results: list[Measurement]


class Store:
    """Results by cell: one (shape, tokens, routing, form), with the arguments that were used.

    Attributes:
        report: what the file holds.
    """

    def __init__(
        self, file: Path | None, environment: dict[str, Any], arguments: dict[str, Any], fresh: bool
    ) -> None:
        """Open ``file`` or start empty; without a file results are kept for this call alone.

        Raises:
            UsageError: the file is no such report, or its environment or arguments are not those of this call.
        """
        self.file = file
        self.report: dict[str, Any] = {"schema": 2, "kind": "bench", "environment": environment}
        self.report |= {"arguments": arguments, "ceilings": None, "results": []}
        self._fresh = fresh
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
        with self._locked():  # before anything is measured
            self._read()

    def find(self, shape: str, tokens: int, routing: str, form: str = PLAIN) -> list[dict[str, Any]]:
        """The rows of a cell; empty if it is still to be measured."""
        return [row for row in self.report["results"] if _cell(row) == (shape, tokens, routing, form)]

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
        """Keep other calls from the file while this one reads or writes it."""
        if self.file is None:
            return nullcontext()
        said = f"waiting for another `moe-kernels bench` that writes to {self.file}"
        return locked(self.file.with_name(f".{self.file.name}.lock"), lambda: logger.warning(said), PATIENCE_S)

    def _read(self) -> None:
        """Take over what the file holds, unless it is to be replaced."""
        if self.file is None or self._fresh or not self.file.exists():
            return
        cure = "use another --json, or --fresh"
        try:
            found = Report.model_validate(read_json(self.file, f"{cure}.")).model_dump(by_alias=True)
        except ValidationError:
            raise UsageError(f"{self.file} is no result of this version of `moe-kernels bench`: {cure}.") from None
        for what, names in (("environment", SAME), ("arguments", self.report["arguments"])):
            for name in names:
                if found[what].get(name) != self.report[what].get(name):
                    raise UsageError(
                        f"{self.file} was measured with {name}={found[what].get(name)!r}, this call has "
                        f"{self.report[what].get(name)!r}: {cure} to start over."
                    )
        self.report = {**found, "ceilings": found["ceilings"] or self.report["ceilings"]}


def _cell(row: dict[str, Any]) -> tuple[str, int, str, str]:
    return row["shape"], row["tokens"], row["routing"], row["form"]
