"""What was made before is kept: a manifest, written last, says that it is finished and how it was made."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from moe_kernels.tools.common.errors import MISSING, CommandError, UsageError
from moe_kernels.tools.common.files import locked

logger = logging.getLogger("moe_kernels")

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


def read_manifest(path: Path) -> dict[str, Any] | None:
    """What :func:`write_manifest` wrote, or None: a manifest that is damaged vouches for nothing."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) and isinstance(content.get("recipe"), dict) else None


def made_with(folder: Path) -> dict[str, Any] | None:
    """The recipe that a folder was made with; None where it is not whole: each file must be there in full length.

    What else was put there does not matter.
    """
    content = read_manifest(folder / MANIFEST)
    if content is None or not isinstance(content.get("files"), dict):
        return None
    there = file_sizes(folder)
    whole = all(name in there and there[name] == size for name, size in content["files"].items())
    return content["recipe"] if whole and content["files"] else None


def file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file of a folder, but for its manifest and what begins with a dot."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files if path.name != MANIFEST}


def write_manifest(manifest: Path, recipe: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Mark a thing as finished: ``recipe`` decides whether it is used again, ``facts`` are for the reader."""
    content = {"recipe": recipe, "hash": digest(json.dumps(recipe, sort_keys=True)), **facts}
    partial = manifest.with_name(f".{manifest.name}.partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, manifest)


def recover(folder: Path) -> None:
    """Finish or undo a replacement of ``folder`` that was killed between its last two renames."""
    partial, before = _partial(folder), _before(folder)
    if not folder.exists():
        if made_with(partial) is not None:
            os.replace(partial, folder)
        elif before.exists():
            os.replace(before, folder)
    shutil.rmtree(before, ignore_errors=True)


def check_ours(folder: Path) -> None:
    """Refuse to replace a folder that ``prepare`` did not make, and finish what a kill left half replaced.

    Raises:
        UsageError: the folder has content and no manifest.
    """
    recover(folder)
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
    partial, before = _partial(folder), _before(folder)
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(before, ignore_errors=True)
    partial.mkdir(parents=True)
    with ExitStack() as undo:
        # A full disk above all: what cannot be finished must not keep it full.
        undo.callback(shutil.rmtree, partial, ignore_errors=True)
        yield partial
        undo.pop_all()
    if folder.exists():
        os.replace(folder, before)
    os.replace(partial, folder)
    shutil.rmtree(before, ignore_errors=True)


def _partial(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial")


def _before(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.before")


@contextmanager
def in_turn(folder: Path, report: Report) -> Iterator[None]:
    """Wait until no other process makes anything in this folder: what is half made has one name."""
    folder.mkdir(parents=True, exist_ok=True)
    said = f"waiting for another `moe-kernels` command that makes something in {folder}"
    with locked(folder / ".prepare.lock", lambda: report(said)):
        yield


def forget_tokens(artifacts: Path) -> None:
    """Remove Axolotl's tokenised data: it is found by path alone, whatever the text is now."""
    shutil.rmtree(artifacts / "prepared", ignore_errors=True)
