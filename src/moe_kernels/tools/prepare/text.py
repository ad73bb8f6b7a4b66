"""Text to train on: the Python standard library's sources, or a data set of the user's choice."""

from __future__ import annotations

import json
import os
import platform
import re
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import moe_kernels.tools.prepare.cache as cache
from moe_kernels.install import pip_install
from moe_kernels.tools.common.errors import MissingDependency, UsageError
from moe_kernels.tools.prepare.cache import Report, digest

PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"

# Axolotl cuts each row into sequences and pads the last one: a long row wastes little on padding.
ROW_CHARACTERS = 500_000
# Of a data set, which may be larger than any disk, about as much is taken as the standard library has.
MAX_CHARACTERS = 12_000_000

# Not on every machine.
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
# Of the readable part of a file name; 255 are allowed in all.
NAME_BYTES = 120
BUILDERS = {".jsonl": "json", ".json": "json", ".txt": "text", ".parquet": "parquet"}


def stdlib_sources() -> list[str]:
    """The running interpreter's standard library, one text a module, in the order of their paths.

    Raises:
        MissingDependency: this Python was installed without sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    kept = [path for path in paths if not SKIPPED.intersection(path.split("/"))]
    texts = [(root / path).read_text(encoding="utf-8", errors="replace") for path in kept]
    if sum(map(len, texts)) < 4_000_000:
        raise MissingDependency(
            f"{root} holds too few sources to train on: this Python came without them. "
            "Use a Python that has its library as files, such as python.org's or your distribution's."
        )
    return texts


def rows(texts: Iterable[str], length: int = ROW_CHARACTERS, limit: int = MAX_CHARACTERS) -> Iterator[str]:
    """Documents joined, each ended by the end-of-text token, into rows of about ``length`` characters.

    No row ends inside that token. A document longer than a row fills several. After ``limit`` characters in all the
    rest is left out.
    """
    row, total = "", 0
    for text in texts:
        row += text + EOS
        while len(row) >= length:
            token = row.find(EOS, max(length - len(EOS) + 1, 0), length + len(EOS) - 1)
            cut = length if token < 0 else token + len(EOS)
            yield row[:cut]
            total += cut
            row = row[cut:]
            if total >= limit:
                return
    if row:
        yield row


def prepare_data(
    root: Path = Path(),
    dataset: str | None = None,
    *,
    text_field: str = "text",
    force: bool = False,
    report: Report = lambda message: None,
) -> Path:
    """Write the training text as lines of ``{"text": ...}`` into ``root/artifacts/data``, unless it is there.

    Args:
        dataset: a local .jsonl, .json, .txt or .parquet file, or a Hugging Face data set as ``NAME`` or
            ``NAME:CONFIGURATION`` (its ``train`` split). None is the Python standard library.
        text_field: column of ``dataset`` that holds the text; a .txt file is one text.

    Returns:
        ``stdlib.jsonl``, or a ``<name>-<hash>.jsonl`` of this ``dataset`` alone.

    Raises:
        UsageError: no such data set, it has no such column or no text, or the result's place is taken.
        MissingDependency: a package, the network, the library's sources or space on the disk is missing.
    """
    if dataset is not None and not dataset.strip():
        raise UsageError("--dataset names nothing. Name a file or a Hugging Face data set, or leave it out.")
    artifacts = root / "artifacts"
    path = artifacts / "data" / f"{'stdlib' if dataset is None else _name(dataset)}.jsonl"
    texts: Iterable[str]
    recipe: dict[str, Any]
    if dataset is None:
        texts = stdlib_sources()
        recipe = {"source": "stdlib", "python": platform.python_version(), "text": digest(EOS.join(texts))}
    else:
        texts = dataset_texts(dataset, text_field)
        recipe = {"source": dataset, "text_field": text_field, **_file_facts(dataset)}
    recipe["row_characters"] = ROW_CHARACTERS
    manifest = path.with_suffix(".manifest.json")
    if not force and _is_made(path, manifest, recipe):
        report(f"{path} is there already")
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    cache.check_space(path.parent, 2 * MAX_CHARACTERS)
    report(f"writing {path}")
    partial = path.with_name(f".{path.name}.partial")
    characters = 0
    with ExitStack() as undo:
        undo.callback(partial.unlink, missing_ok=True)
        with partial.open("w", encoding="utf-8") as file:
            for row in rows(texts):
                file.write(json.dumps({"text": row}) + "\n")
                characters += len(row)
        undo.pop_all()
    if not characters:
        raise UsageError(f"{dataset} holds no text in {text_field!r}. Name another column with --text-field.")
    cache.forget_tokens(artifacts)
    # In this order a kill never leaves a text beside the manifest of another.
    path.unlink(missing_ok=True)
    cache.write_manifest(manifest, recipe, {"characters": characters, "bytes": partial.stat().st_size})
    os.replace(partial, path)
    report(f"{path}: {characters / 1e6:.1f} million characters")
    return path


def _is_made(path: Path, manifest: Path, recipe: dict[str, Any]) -> bool:
    """Whether the text is there, whole and of this recipe; UsageError where the file is not ours to replace."""
    if not path.exists():
        return False
    if not manifest.is_file():
        raise UsageError(f"{path} was not made by `moe-kernels prepare`. Move it away, or replace it with --force.")
    made = cache.read_manifest(manifest)
    return made is not None and made.recipe == recipe and made.bytes == path.stat().st_size


def dataset_texts(dataset: str, text_field: str) -> Iterator[str]:
    """The texts of a local file or of a Hugging Face data set, one by one, without loading it whole."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise MissingDependency(f"datasets is not installed. Cure: {pip_install('axolotl')}") from error

    builder = BUILDERS.get(Path(dataset).suffix)
    if builder is None:
        name, _, configuration = dataset.partition(":")
        arguments: dict[str, Any] = {"path": name, "name": configuration or None}
    elif not Path(dataset).is_file() or not Path(dataset).stat().st_size:
        raise UsageError(f"There is no file {dataset}, or it is empty.")
    else:
        arguments = {"path": builder, "data_files": dataset}
    if builder == "text":
        text_field = "text"
        arguments["sample_by"] = "document"

    try:
        for row in datasets.load_dataset(**arguments, split="train", streaming=True):
            if text_field not in row:
                break
            if row[text_field] is not None:
                yield str(row[text_field])
        else:
            return
    # huggingface_hub's client fails with a RuntimeError when it tries again after a failed connection.
    except (ConnectionError, RuntimeError) as error:
        raise MissingDependency(
            f"The data set {dataset} cannot be reached on huggingface.co ({error}). "
            "Go online, or name a .jsonl, .json, .txt or .parquet file."
        ) from error
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise UsageError(
            f"{dataset} cannot be read ({error}). "
            "Name a .jsonl, .json, .txt or .parquet file, or a Hugging Face data set with a train split."
        ) from error
    raise UsageError(f"{dataset} has no column {text_field!r} but {', '.join(row)}. Name one with --text-field.")


def _name(dataset: str) -> str:
    """A file name for the text of a data set, with a hash: files of one name lie in many folders."""
    local = Path(dataset).suffix in BUILDERS
    readable = re.sub(r"[^\w.-]+", "-", Path(dataset).stem if local else dataset).strip("-.")
    short = readable.encode()[:NAME_BYTES].decode(errors="ignore")
    return f"{short}-{digest(str(Path(dataset).resolve()) if local else dataset)[:8]}".lstrip("-")


def _file_facts(dataset: str) -> dict[str, int]:
    """What changes when a local file does."""
    if not Path(dataset).is_file():
        return {}
    stat = Path(dataset).stat()
    return {"bytes": stat.st_size, "modified": stat.st_mtime_ns}
