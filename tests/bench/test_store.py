"""The lock of a result file."""

from __future__ import annotations

import errno
import json
import threading
from pathlib import Path
from unittest.mock import Mock

import pytest

from moe_kernels.tools.bench import store
from moe_kernels.tools.common import files
from moe_kernels.tools.compare import comparison


def opened(file: Path) -> store.Store:
    return store.Store(file, {"gpu": None}, {"repeats": 1}, fresh=False)


def test_a_lock_is_tried_before_anything_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.FileLock, "acquire", Mock(side_effect=PermissionError(errno.EACCES, "no")))
    with pytest.raises(PermissionError):
        opened(tmp_path / "bench.json")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="this system has no /proc")
def test_where_no_file_can_be_made() -> None:
    with pytest.raises(FileNotFoundError):
        opened(Path("/proc/bench.json"))


def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(files.FileLock, "acquire", Mock(side_effect=OSError(errno.ENOLCK, "No locks available")))
    mine = opened(tmp_path / "bench.json")
    assert [record.message for record in caplog.records] == [
        f"{tmp_path} is on a file system without locks: run one moe-kernels command at a time in it."
    ]
    mine.add([])
    assert (tmp_path / "bench.json").is_file()
    assert len(caplog.records) == 1


def test_a_call_says_what_it_waits_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[str] = []
    monkeypatch.setattr(store, "PATIENCE_S", 0.0)
    file, said = tmp_path / "bench.json", threading.Event()
    monkeypatch.setattr(store.logger, "warning", lambda message: (messages.append(message), said.set()))
    waiting = threading.Thread(target=opened, args=(file,))
    with opened(file)._locked():
        waiting.start()
        assert said.wait(10)
    waiting.join(10)
    assert not waiting.is_alive()
    assert messages == [f"waiting for another `moe-kernels bench` that writes to {file}"]


COMMITTED = sorted((Path(__file__).parents[2] / "benchmarks" / "results").rglob("*.json"))


@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_results_of_earlier_versions_are_read(file: Path) -> None:
    content = json.loads(file.read_text())
    if content.get("kind") == "bench" and content["schema"] == 2:
        rows = store.Report.model_validate(content).model_dump(by_alias=True)["results"]
        assert [{name: row[name] for name in found} for row, found in zip(rows, content["results"], strict=True)]
    elif file.parent.name.startswith("compare-"):
        (found,) = comparison.load(file)
        assert found.name == content["name"]
