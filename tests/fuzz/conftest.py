"""Counts the inputs that were tried."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from budget import tried


@pytest.fixture
def count(request: pytest.FixtureRequest) -> Callable[[], None]:
    """Called once an input, so that the number at the end is one that was counted."""
    name = request.node.name
    return lambda: tried.update([name])


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if tried:
        terminalreporter.write_line(f"{tried.total():,} fuzzed inputs: {dict(tried)}")
