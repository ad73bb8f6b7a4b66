"""What a measurement is stamped with."""

from __future__ import annotations

from pathlib import Path

import pytest

import moe_kernels
from moe_kernels.tools.compare import environment
from moe_kernels.tools.compare.environment import (
    BENCH,
    COMMIT,
    LAUNCHER,
    NO_COMMIT,
    SOURCES,
    TILES,
    source_hash,
    versions,
    with_commit,
)


def test_versions_name_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "PACKAGES", ("torch", "no-such-package"))
    found = versions()
    assert found["no-such-package"] == "not installed"
    assert found["torch"] != "not installed"
    assert found[SOURCES] == source_hash()


def test_versions_tell_how_our_kernels_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setenv("MOE_KERNELS_LAUNCHER", "triton")
    before = versions()
    assert (before[TILES], before[LAUNCHER]) == ("none", "triton")
    (tmp_path / "tiles-nvidia-h200.json").write_text("{}")
    after = versions()
    assert len(after[TILES]) == 12
    assert {name for name in before if before[name] != after[name]} == {TILES}
    monkeypatch.setattr(environment, "BENCH_SOURCES", ("tools/compare",))
    assert versions()[BENCH] != before[BENCH]
    for variable in ("MOE_KERNELS_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    assert versions()[TILES] == "none", "a user without a home"


@pytest.mark.parametrize(
    ("name", "counts"),
    [("moe.py", True), ("kernels/triton/new.py", True), ("kernels/new.json", True), ("tools/compare/new.py", False)],
)
def test_the_hash_is_of_the_kernels_not_of_the_tools(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, counts: bool
) -> None:
    package = tmp_path / "moe_kernels"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(moe_kernels, "__file__", str(package / "__init__.py"))
    before = source_hash()
    file = package / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("1")
    assert (source_hash() != before) is counts


def test_a_commit_is_filled_in_only_for_the_same_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "commit", lambda: "abc")
    same = {COMMIT: NO_COMMIT, SOURCES: source_hash()}
    assert with_commit(same)[COMMIT] == "abc (by the hash of the sources)"
    other = {COMMIT: NO_COMMIT, SOURCES: "different"}
    assert with_commit(other) == other
    known = {COMMIT: "def", SOURCES: source_hash()}
    assert with_commit(known) == known
