"""How to install this project, wherever a message says so: its name on PyPI belongs to another project."""

from __future__ import annotations

SOURCE = "git+https://github.com/moe-kernels/moe-kernels"


def pip_install(extra: str = "") -> str:
    """The command that installs this project, with one of its extras."""
    return f"pip install 'moe-kernels{f'[{extra}]' if extra else ''} @ {SOURCE}'"
