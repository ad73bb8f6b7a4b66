"""How to install this project, wherever a message says so.

Its distribution is called ``moe-training-kernels``: ``moe-kernels`` on PyPI belongs to another project.
"""

from __future__ import annotations


def pip_install(extra: str = "") -> str:
    """How to install this project with one of its extras: from a clone, the one place that is surely its own."""
    return f"pip install -e '.{f'[{extra}]' if extra else ''}' in a clone of this project"
