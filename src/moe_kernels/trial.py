"""The check that the Hopper kernels have to pass, once, under a release of triton that nobody has tried them with.

Gluon is experimental: a new release may compile the kernels without an error and yet wrongly. So under such a release
``auto`` takes them only after they compiled on the user's GPU and gave the right output and gradients on a few small
problems. The check runs in a process of its own, because a kernel that hangs or writes where it may not would end
this one. Its verdict is kept in the cache folder, for this GPU, these versions of triton and torch and these kernels.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import re
import subprocess
import sys
import time
from pathlib import Path

import torch
import triton
from filelock import FileLock

from moe_kernels.kernels.tiles import tuned

logger = logging.getLogger("moe_kernels")

#: The process that checks: exit code 0 if all is right, else its last line on stderr is the reason.
CHECK = "moe_kernels.tools.check.trial"
PATIENCE = 600.0  # seconds; compiling on few cores takes most of them
OUT_OF_MEMORY = 3  # its exit code where that says nothing about the kernels
_SOURCES = Path(__file__).parent


@functools.cache
def refusal(device: torch.device) -> str | None:
    """None if the Hopper kernels passed the check on ``device`` under the installed triton, else why not.

    The first call for a GPU, triton, torch and set of kernels takes about a minute; later ones, of other processes
    too, read the verdict.
    """
    try:
        file = _file(device)
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock"):  # the ranks of one host: one checks, the others read
            if file.exists():
                return _read(file)
            why, lasts = _check(device)
            if lasts:
                _keep(file, why)
            return why
    except (OSError, tuned.CacheFolderError) as error:
        logger.warning("no verdict on the Gluon kernels can be kept: %s", error)
    return _check(device)[0]


def _file(device: torch.device) -> Path:
    """Where the verdict is kept: its name says of what."""
    kernels = [*sorted(_SOURCES.glob("kernels/hopper/*.py")), _SOURCES / "activation.py"]
    of = [triton.__version__, torch.__version__, tuned.device_name(device), *(path.read_text() for path in kernels)]
    digest = hashlib.sha256("\0".join(of).encode()).hexdigest()
    slug = re.sub(r"[^a-z0-9.]+", "-", f"{triton.__version__} {tuned.device_name(device)}".lower()).strip("-")
    return tuned.cache_folder() / f"gluon-{slug}-{digest[:12]}.json"


def _keep(file: Path, why: str | None) -> None:
    try:
        file.write_text(json.dumps({"schema": 1, "kind": "trial", "refusal": why}) + "\n")
    except OSError as error:
        logger.warning("the verdict on the Gluon kernels is not kept: %s", error)


def _read(file: Path) -> str | None:
    try:
        report = json.loads(file.read_text())
        why = report["refusal"] if report["schema"] == 1 and report["kind"] == "trial" else "no verdict"
    except (ValueError, LookupError, TypeError) as error:
        return f"{file} cannot be read ({error}): remove it to check again"
    return f"{why} (kept in {file}: remove it to check again)" if why else None


def _check(device: torch.device) -> tuple[str | None, bool]:
    """(why not, or None; whether another check would say the same)."""
    where = f"triton {triton.__version__} on {tuned.device_name(device)}"
    logger.warning("checking the Gluon kernels under %s, once: about a minute", where)
    began = time.monotonic()
    command = [sys.executable, "-m", CHECK, str(device.index or 0)]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        return f"its check did not end in {PATIENCE:.0f} s", True
    if ran.returncode == 0:
        logger.warning("the Gluon kernels are right under %s (%.0f s)", where, time.monotonic() - began)
        return None, True
    last = (ran.stderr.strip().splitlines() or [f"exit code {ran.returncode}"])[-1]
    return f"its check failed: {last}", ran.returncode != OUT_OF_MEMORY
