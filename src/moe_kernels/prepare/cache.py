"""What was made before is kept: a manifest, written last, says that it is finished and how it was made."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moe_kernels.cli.errors import MISSING, CommandError, UsageError

MANIFEST = "moe_kernels.json"

Report = Callable[[str], None]


class NotEnoughSpace(CommandError):
    """The disk is too full for what is to be written."""

    exit_code = MISSING


def silent(message: str) -> None:
    """Report nothing."""


def digest(text: str) -> str:
    """A short hash of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def made_with(manifest: Path) -> dict[str, Any] | None:
    """The recipe that a finished thing was made with; None where there is no manifest."""
    return json.loads(manifest.read_text(encoding="utf-8"))["recipe"] if manifest.is_file() else None


def write_manifest(manifest: Path, recipe: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Mark a thing as finished: ``recipe`` decides whether it is used again, ``facts`` are for the reader."""
    content = {"recipe": recipe, "hash": digest(json.dumps(recipe, sort_keys=True)), **facts}
    partial = manifest.with_name(f".{manifest.name}.partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, manifest)


def check_ours(folder: Path) -> None:
    """Refuse to replace a folder that ``prepare`` did not make.

    Raises:
        UsageError: the folder has content and no manifest.
    """
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
        raise UsageError(f"{folder} was not made by `moe-kernels prepare`. Move it away, or replace it with --force.")


def check_space(path: Path, needed: int) -> None:
    """Raises NotEnoughSpace unless the disk under ``path`` has ``needed`` bytes free."""
    free = shutil.disk_usage(path).free
    if free < needed:
        raise NotEnoughSpace(
            f"{path.resolve()} has {free / 1e9:.1f} GB free and {needed / 1e9:.1f} GB are needed. "
            "Free some, or name another folder with --root."
        )


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """An empty folder to fill; it takes the place of ``folder`` when the block ends well, and not before."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(partial, folder)


def forget_tokens(artifacts: Path) -> None:
    """Remove Axolotl's tokenised data: it is found by path alone, whatever the text is now."""
    shutil.rmtree(artifacts / "prepared", ignore_errors=True)
