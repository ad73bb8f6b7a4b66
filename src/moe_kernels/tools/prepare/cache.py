"""What is finished is kept: a manifest, written last, says how it was made."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from moe_kernels.tools.common.errors import MissingDependency, UsageError
from moe_kernels.tools.common.files import locked

MANIFEST = "moe_kernels.json"
Report = Callable[[str], None]


def digest(text: str) -> str:
    """A short hash of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Manifest(BaseModel, strict=True):
    """What is read of a manifest: how a thing was made, and how large a text or the files of a folder are."""

    recipe: dict[str, Any]
    bytes: int | None = None
    files: dict[str, int] = {}


def read_manifest(path: Path) -> Manifest | None:
    """What :func:`write_manifest` wrote; None where it is missing or damaged."""
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def made_with(folder: Path) -> dict[str, Any] | None:
    """The recipe of a folder in which each file of the manifest is there in full length, else None.

    Other files in it do not matter.
    """
    manifest = read_manifest(folder / MANIFEST)
    complete = manifest is not None and manifest.files and manifest.files.items() <= file_sizes(folder).items()
    return manifest.recipe if manifest is not None and complete else None


def file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file of a folder, but for its manifest and what begins with a dot."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files if path.name != MANIFEST}


def write_manifest(manifest: Path, recipe: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Mark a thing as finished. A thing with another ``recipe`` is made again; ``facts`` are for people to read."""
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
    """Finish or undo a replacement that was killed, and refuse to replace a folder that ``prepare`` did not make.

    Raises:
        UsageError: the folder has content and no manifest.
    """
    recover(folder)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
        raise UsageError(f"{folder} was not made by `moe-kernels prepare`. Move it away, or replace it with --force.")


def check_space(path: Path, needed: int) -> None:
    """Raises MissingDependency unless the disk under ``path`` has ``needed`` bytes free."""
    free = shutil.disk_usage(path).free
    if free < needed:
        raise MissingDependency(
            f"{path.resolve()} has {free / 1e6:,.0f} MB free and {needed / 1e6:,.0f} MB are needed. "
            "Free some, or name another folder with --root."
        )


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """An empty folder to fill, which replaces ``folder`` when the block ends without an error."""
    partial, before = _partial(folder), _before(folder)
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(before, ignore_errors=True)
    partial.mkdir(parents=True)
    with ExitStack() as undo:
        # Above all on a full disk: what cannot be finished must not keep it full.
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
    """Wait until no other process makes anything in this folder: their partial files would have the same names."""
    folder.mkdir(parents=True, exist_ok=True)
    said = f"waiting for another `moe-kernels` command that makes something in {folder}"
    with locked(folder / ".prepare.lock", lambda: report(said)):
        yield


def forget_tokens(artifacts: Path) -> None:
    """Remove Axolotl's tokenised data: it is found by path alone, whatever the text is now."""
    shutil.rmtree(artifacts / "prepared", ignore_errors=True)
