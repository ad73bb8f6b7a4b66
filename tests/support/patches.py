"""Replace a function wherever the kernels call it."""

from __future__ import annotations

import sys
from typing import Any
from unittest import mock


def patches(name: str, value: Any) -> list[Any]:
    """One ``mock.patch`` for every loaded module of kernels that has ``name``.

    Raises:
        LookupError: none has.
    """
    modules = [m for n, m in sys.modules.items() if n.startswith("moe_kernels.kernels.") and hasattr(m, name)]
    if not modules:
        raise LookupError(f"no module of kernels has {name}")
    return [mock.patch.object(module, name, value) for module in modules]
