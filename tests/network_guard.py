"""Processes that may not reach beyond this machine, and what they asked for nevertheless."""

from __future__ import annotations

import os
from pathlib import Path

SRC = Path(__file__).parents[1] / "src"
GUARD = """
import os, sys
LOCAL = ("127.", "::1", "localhost", "0.0.0.0")
def audit(event, arguments):
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        host = str(arguments[1][0])
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = str(arguments[0])
    else:
        return
    if not host.startswith(LOCAL) and host != "None":
        with open(os.environ["ASKED"], "a") as file:
            file.write(f"{event} {host} {sys.argv}\\n")
        raise ConnectionError(f"the test allows no network: {host}")
sys.addaudithook(audit)
"""


def guarded_environment(folder: Path) -> dict[str, str]:
    """The environment of such a process; the guard and its log lie in ``folder``."""
    (folder / "guard").mkdir()
    (folder / "guard" / "sitecustomize.py").write_text(GUARD)
    paths = [str(folder / "guard"), str(SRC), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    log = {"ASKED": str(folder / "asked"), "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    # No help from the switches that continuous integration sets.
    kept = {key: value for key, value in os.environ.items() if not key.endswith("_OFFLINE")}
    return kept | log | {"HF_HOME": str(folder / "hf"), "HF_TOKEN": ""}


def asked(environment: dict[str, str]) -> str:
    """What processes with this environment asked of the network, a line each."""
    path = Path(environment["ASKED"])
    return path.read_text() if path.exists() else ""
