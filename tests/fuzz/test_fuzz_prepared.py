"""Model folders that are half written or damaged: used again only where every file is there in full length."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from random import Random

import pytest
from budget import fuzz
from hypothesis import given
from hypothesis import strategies as st
from mutate import mutated_bytes, mutated_json

from moe_kernels.tools.prepare.cache import MANIFEST, file_sizes, made_with, write_manifest

FILES = {"model.safetensors": b"weights" * 100, "config.json": b"{}", "tokenizer.json": b"[]", "sub/part": b"x"}
RECIPE = {"shape": {"hidden": 64, "name": "mixtral-tiny"}, "seed": 0, "context": 4096, "text": "0123"}


@fuzz(2)
@given(random=st.randoms(use_true_random=False))
def test_model_folders(count: Callable[[], None], tmp_path_factory: pytest.TempPathFactory, random: Random) -> None:
    count()
    folder = tmp_path_factory.getbasetemp() / "model"
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    write_manifest(folder / MANIFEST, RECIPE, {"files": file_sizes(folder)})
    assert made_with(folder) == RECIPE
    (folder / "notes.txt").write_text("of the user's own")
    assert made_with(folder) == RECIPE

    name = random.choice([*FILES, MANIFEST])
    path = folder / name
    if name == MANIFEST:
        path.write_bytes(mutated_json(json.loads(path.read_bytes()), random))
    elif random.random() < 0.3:
        path.unlink()
    else:
        path.write_bytes(mutated_bytes(FILES[name], random))
    if made_with(folder) is None:
        return
    listed = json.loads((folder / MANIFEST).read_bytes())["files"]
    assert listed
    assert all((folder / file).stat().st_size == size for file, size in listed.items())
    if name != MANIFEST:
        assert path.stat().st_size == len(FILES[name])
