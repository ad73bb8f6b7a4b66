"""The result file of ``moe-kernels bench``: written after every layer, and continued by the next call."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from moe_kernels.cli.errors import UsageError

SCHEMA = 2
#: What must be the same for two calls to write into one file.
SAME = ("gpu", "cpu", "torch", "triton", "transformers", "moe_kernels", "commit", "tuned_tiles")


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
        if file is None or fresh or not file.exists():
            return
        found = _read(file)
        for what, names in (("environment", SAME), ("arguments", arguments)):
            for name in names:
                if found[what].get(name) != self.report[what].get(name):
                    raise UsageError(
                        f"{file} was measured with {name}={found[what].get(name)!r}, this call has "
                        f"{self.report[what].get(name)!r}: use another --json, or --fresh to start over."
                    )
        self.report = found

    def find(self, shape: str, tokens: int, routing: str) -> list[dict[str, Any]]:
        """The rows of a cell; empty if it is still to be measured."""
        return [
            row
            for row in self.report["results"]
            if (row["shape"], row["tokens"], row["routing"]) == (shape, tokens, routing)
        ]

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Add a measured cell and write the file, so that a killed run loses one cell at most."""
        self.report["results"] += rows
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            part = self.file.with_name(self.file.name + ".part")
            part.write_text(json.dumps(self.report, indent=1) + "\n")
            os.replace(part, self.file)


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise UsageError(f"{file} is not JSON ({error}): remove it, or use --fresh.") from None
    if not isinstance(found, dict) or found.get("kind") != "bench" or found.get("schema") != SCHEMA:
        raise UsageError(
            f"{file} is no result of this version of `moe-kernels bench`: use another --json, or --fresh."
        )
    return found
