"""Pages with a part that a script writes, between two comments: rewritten, or checked with ``--check``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table. A ``|`` in a cell must be escaped already."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (columns, ["---"] * len(columns), *rows))


def updated(page: str, text: str, part: str, new: str) -> str:
    """``text`` with what stands between the markers of ``part`` replaced by ``new``.

    Raises:
        SystemExit: the page has no such markers.
    """
    begin, end = f"<!-- {part}:begin -->", f"<!-- {part}:end -->"
    before, first, rest = text.partition(begin)
    _, last, after = rest.partition(end)
    if not (first and last):
        raise SystemExit(f"{page} lacks the markers {begin} and {end}, in this order")
    return f"{before}{begin}\n{new}\n{end}{after}"


def main(description: str, part: str, pages: Callable[[Path], Mapping[str, str]]) -> int:
    """The command line of a script: rewrite its pages, or with ``--check`` say which are out of date.

    Args:
        description: the script's docstring.
        part: name of the markers.
        pages: the root of the repository -> {path of a page: what belongs between its markers}.

    Returns:
        The exit code: 1 if ``--check`` found a page out of date.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if out of date")
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository")
    args = parser.parse_args()
    stale = 0
    for name, new in pages(args.root).items():
        page = args.root / name
        before = page.read_text()
        after = updated(name, before, part, new)
        if args.check and before != after:
            print(f"{name} is out of date. Cure: python benchmarks/{Path(sys.argv[0]).name}", file=sys.stderr)
            stale = 1
        elif before != after:
            page.write_text(after)
    return stale
