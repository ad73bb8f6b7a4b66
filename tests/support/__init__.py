"""What only the tests stand on: interpreter, compiler, a driver that only remembers, delays, every experts class."""

import os
from pathlib import Path


def environment() -> dict[str, str]:
    """``os.environ`` for a process of its own, in which this package is found too."""
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
