"""Expected failures: the command prints the sentence and exits with the code; nobody sees a traceback."""

from __future__ import annotations

CHECK_FAILED = 1
WRONG_USAGE = 2
MISSING = 3

# Which extra brings a module that a command may find missing.
EXTRAS: dict[str, str] = {
    "transformers": "transformers",
    "axolotl": "axolotl",
    "jinja2": "report",
    "matplotlib": "report",
    "pynvml": "report",
    "yaml": "report",
    "psutil": "report",
    "wandb": "report",
}


class CommandError(Exception):
    """A failure that the user can understand and cure. The message says what is wrong and the cure."""

    exit_code = CHECK_FAILED


class UsageError(CommandError, ValueError):
    """An argument or a configuration value that cannot be used."""

    exit_code = WRONG_USAGE


class MissingDependency(CommandError, ImportError):
    """Something this machine lacks."""

    exit_code = MISSING


def missing_module(error: ModuleNotFoundError) -> MissingDependency | None:
    """The sentence for a missing optional package, or None where the package is none of an extra's."""
    package = (error.name or "").partition(".")[0]
    extra = EXTRAS.get(package)
    if extra is None:
        return None
    return MissingDependency(f"{package} is not installed. Cure: pip install 'moe-kernels[{extra}]'")
