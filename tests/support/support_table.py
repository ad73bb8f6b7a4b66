"""docs/support.md, generated from a run of the conformance suite over the installed transformers.

    PYTHONPATH=tests python -m support.support_table    # run and print, on the GPU if there is one
    PYTHONPATH=tests python -m support.support_table --write docs/support.md  # replace this version's column too

Each version of transformers has a column of its own; a run replaces its own and leaves the others.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch
import transformers

from moe_kernels.integrations.support import UnsupportedExperts, recipe_of
from moe_kernels.integrations.transformers import register
from support import conformance

#: (model, class, weights, activation): what identifies a row.
Row = tuple[str, str, str, str]
PASSED, ABSENT = "passed", "-"

_HEAD = """# Supported models

Every class of transformers that dispatches its experts (`use_experts_implementation`), run through moe-kernels and
compared with its own eager forward: output and every gradient, float32 and bfloat16, three routings. Where there is
no GPU, as for the columns below, the plain-torch backend runs them, which proves layout, activation, biases and
gradients; the kernels themselves ran all classes of 5.17.0 on an H100 (`benchmarks/results/h100-conformance.json`).
"passed" means that no error exceeds what transformers' own implementations make in the same dtype. A dash: this
version of transformers has no such class. A class that is not listed here is found out in the same way when a model
is loaded: `check_model` probes its activation, and refuses what it cannot reproduce before training starts.

`PYTHONPATH=tests python -m support.support_table --write docs/support.md` writes the column of the installed version.
"""


def verdict(found: conformance.ExpertsClass, device: str = "cpu", implementation: str = "moe_kernels") -> str:
    """``PASSED``, or the reason why the class is refused.

    Raises:
        AssertionError: it is neither: the kernels accept the class and compute something else.
    """
    experts = conformance.build(found.cls)
    try:
        recipe_of(experts)
    except UnsupportedExperts as error:
        return f"refused: {error}"
    conformance.check_all(experts, device, implementation)
    return PASSED


def row_of(found: conformance.ExpertsClass) -> Row:
    """The class with its layout and activation in words; both are "?" where it is refused."""
    experts = conformance.build(found.cls)
    try:
        weights, activation = conformance.words(experts).split(" | ")
    except UnsupportedExperts:
        weights = activation = "?"
    return found.model, str(found), weights, activation


def parse(text: str) -> dict[str, dict[Row, str]]:
    """The verdicts of a written table, by version of transformers."""
    lines = [line.strip("| \n") for line in text.splitlines() if line.startswith("|")]
    head, _, *body = [[cell.strip(" `") for cell in line.split("|")] for line in lines] or [[], []]
    columns: dict[str, dict[Row, str]] = {version: {} for version in head[4:]}
    for model, cls, weights, activation, *results in body:
        for version, result in zip(columns, results, strict=True):
            if result != ABSENT:
                columns[version][model, cls, weights, activation] = result
    return columns


def render(columns: dict[str, dict[Row, str]]) -> str:
    """The page for the verdicts by version."""
    versions = sorted(columns, key=lambda version: [int(part) for part in re.findall(r"\d+", version)])
    rows = sorted({row for column in columns.values() for row in column})
    counts = [
        f"* transformers {version}: {len(columns[version])} classes, "
        f"{sum(result == PASSED for result in columns[version].values())} passed, "
        f"{sum(result != PASSED for result in columns[version].values())} refused"
        for version in versions
    ]
    table = [
        "| " + " | ".join(["model", "class", "weights", "activation", *versions]) + " |",
        "|" + "---|" * (4 + len(versions)),
        *(
            "| "
            + " | ".join([row[0], f"`{row[1]}`", *row[2:], *(columns[v].get(row, ABSENT) for v in versions)])
            + " |"
            for row in rows
        ),
    ]
    return "\n".join([_HEAD, *counts, "", *table, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE")
    path = parser.parse_args().write
    register()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    column = {}
    for found in conformance.experts_classes():
        row = row_of(found)
        column[row] = verdict(found, device)
        print(*row, column[row], sep=" | ", flush=True)
    columns = (parse(path.read_text()) if path and path.exists() else {}) | {transformers.__version__: column}
    if path:
        path.write_text(render(columns))


if __name__ == "__main__":
    main()
