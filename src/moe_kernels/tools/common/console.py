"""The console that tables are printed on."""

from __future__ import annotations

from rich.console import Console


def wide_console(width: int = 150) -> Console:
    """A console on stdout of at least ``width`` columns: in a narrower terminal lines wrap and no cell is cut."""
    console = Console()
    console.width = max(console.width, width)
    return console
