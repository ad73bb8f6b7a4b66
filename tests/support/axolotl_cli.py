"""The ``axolotl`` command in processes that are forked from one which has imported it.

The import is half of a tiny training's time.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from unittest import mock


def axolotl(
    arguments: Sequence[str], folder: Path, environment: Mapping[str, str], timeout: float = 600.0
) -> subprocess.CompletedProcess[str]:
    """Run ``axolotl ARGUMENTS`` in ``folder``; output and errors are both in ``stdout``.

    The libraries are imported once, in the environment of the first call with an HF_HOME of their own.
    """
    with tempfile.NamedTemporaryFile("r", suffix=".log") as log:
        process = _context(environment).Process(
            target=_axolotl, args=(list(arguments), folder, dict(environment), log.name)
        )
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(list(arguments), timeout, log.read())
        return subprocess.CompletedProcess(list(arguments), process.exitcode, log.read(), "")


def _axolotl(arguments: list[str], folder: Path, environment: dict[str, str], log: str) -> None:
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path.insert(0, "")  # as of `python -m`
    sys.argv = ["axolotl", *arguments]
    from axolotl.cli.main import main

    try:
        main()
    finally:
        atexit._run_exitfuncs()  # W&B writes its last rows there; multiprocessing leaves them out


_starting = threading.Lock()
_started: list[ForkServerContext] = []


def _context(environment: Mapping[str, str]) -> ForkServerContext:
    with _starting:
        if not _started:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["axolotl.train", "axolotl.cli.main"])
            own = {**environment, "HF_HOME": tempfile.mkdtemp(prefix="axolotl-hf-")}
            with mock.patch.dict(os.environ, own, clear=True):
                forkserver.ensure_running()
            _started.append(context)
        return _started[0]
