"""Expected failures: the command prints the message, without a traceback, and exits with the code."""

from __future__ import annotations

import errno

from moe_kernels.install import pip_install

CHECK_FAILED = 1
WRONG_USAGE = 2
MISSING = 3

# The extra that installs a module.
EXTRAS: dict[str, str] = {
    "transformers": "transformers",
    "axolotl": "axolotl",
    "peft": "axolotl",
    "jinja2": "report",
    "matplotlib": "report",
    "pynvml": "report",
    "yaml": "report",
}


class CommandError(Exception):
    """A failure that the user can cure; the message says what is wrong and the cure."""

    exit_code = CHECK_FAILED


class UsageError(CommandError, ValueError):
    """An argument or a configuration value that cannot be used."""

    exit_code = WRONG_USAGE


class MissingDependency(CommandError, ImportError):
    """Something this machine lacks."""

    exit_code = MISSING


#: Errors of a full disk, a quota and a file size limit.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
#: Errors of a wrong path, each with its cure.
WRONG_PATH = {
    errno.EEXIST: "name a folder, or move away the file that is there",
    errno.ENOTDIR: "name a folder, or move away the file that is there",
    errno.EISDIR: "name a file, or move away the folder that is there",
    errno.ENAMETOOLONG: "use a shorter name",
    errno.ENOENT: "name one that is there",
    errno.EIO: "try another disk",
}


def failed_io(error: OSError) -> CommandError | None:
    """The failure to report where a disk is full or read-only or a path is wrong; None for other errors."""
    if error.errno in FULL:
        return MissingDependency(
            f"The disk is full: {error}. What was finished is kept. Cure: free some space, and run this again."
        )
    if error.errno in FORBIDDEN:
        return MissingDependency(f"{error}. Cure: run this in a folder that you may write to.")
    if error.filename is not None and error.errno in WRONG_PATH:
        return UsageError(f"{error}. Cure: {WRONG_PATH[error.errno]}.")
    return None


def missing_module(error: ModuleNotFoundError) -> MissingDependency | None:
    """The failure to report for a missing optional package, or None where no extra installs it."""
    package = (error.name or "").partition(".")[0]
    extra = EXTRAS.get(package)
    if extra is None:
        return None
    return MissingDependency(f"{package} is not installed. Cure: {pip_install(extra)}")
