"""SIGKILL at every step that touches a file, and a disk that is full: nothing that was made is lost, nothing half
made is taken for whole, and the same command again goes on."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "compare"))
import builders

from moe_kernels.tools.common.errors import UsageError
from moe_kernels.tools.common.files import write_text
from moe_kernels.tools.compare import report
from moe_kernels.tools.compare.comparison import Analysis, load, save
from moe_kernels.tools.prepare import models, prepare_data, prepare_model, text
from moe_kernels.tools.prepare.cache import made_with, recover

FILE_EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"}
FAKE = (sys.executable, str(Path(__file__).parents[1] / "compare" / "fake_trainer.py"))


def in_child(work: Callable[[], object], before: Callable[[], object] = lambda: None) -> int:
    """Run ``work`` in a forked process; its exit code, or minus the signal that ended it."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            before()
            work()
            code = 0
        except OSError as error:
            code = error.errno or 1
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_before(number: int, root: Path) -> None:
    """Have this process killed just before its ``number``-th access to a file under ``root``."""
    seen = 0

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in FILE_EVENTS and str(arguments[0]).startswith(str(root)):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)


def every_kill(work: Callable[[], object], root: Path, start: Path, check: Callable[[], object]) -> int:
    """Kill ``work`` before each access in turn, always from a copy of ``start``; how often it was killed."""
    for number in range(1, 500):
        shutil.rmtree(root, ignore_errors=True)
        if start.exists():
            shutil.copytree(start, root, symlinks=True)
        code = in_child(work, lambda number=number: kill_before(number, root))
        check()
        if code == 0:
            return number - 1
        assert code == -signal.SIGKILL, code
    raise AssertionError("it never finished")


class FakeModel:
    """Writes what a model would, in several files."""

    device = torch.device("cpu")

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def save_pretrained(self, folder: Path) -> None:
        with (folder / "model.safetensors").open("w") as file:
            file.write(f"weights {self.seed}" * 1000)
            file.flush()
            (folder / "config.json").write_text("{}")
            file.write("the end")


@pytest.fixture
def quick_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Models and texts that take no time, made by the code that makes real ones."""
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(models, "build_model", lambda family, size, seed, device: FakeModel(seed))
    monkeypatch.setattr(models, "prepare_tokenizer", lambda *args, **kwargs: tokenizer)
    for module in (models, text):
        monkeypatch.setattr(module, "stdlib_sources", lambda: ["one", "two" * 50_000])


def seed_of(folder: Path) -> int | None:
    recipe = made_with(folder)
    if recipe is None:
        return None
    assert (folder / "model.safetensors").read_text() == f"weights {recipe['seed']}" * 1000 + "the end"
    assert (folder / "tokenizer.json").is_file()
    return recipe["seed"]


@pytest.mark.usefixtures("quick_models")
def test_prepare_killed_while_it_makes_its_first_model(tmp_path: Path) -> None:
    root = tmp_path / "root"
    folder = root / "artifacts" / "models" / "mixtral-tiny"

    def check() -> None:
        recover(folder)
        assert seed_of(folder) in (None, 2)
        prepare_model("mixtral", "tiny", root, 2)
        assert seed_of(folder) == 2
        assert [path.name for path in folder.parent.iterdir()] == ["mixtral-tiny"]

    assert every_kill(lambda: prepare_model("mixtral", "tiny", root, 2), root, tmp_path / "nothing", check) > 8


@pytest.mark.usefixtures("quick_models")
def test_prepare_killed_while_it_replaces_a_model(tmp_path: Path) -> None:
    root, start = tmp_path / "root", tmp_path / "start"
    folder = root / "artifacts" / "models" / "mixtral-tiny"
    prepare_model("mixtral", "tiny", start, 1)
    found = set()

    def check() -> None:
        recover(folder)
        found.add(seed_of(folder))
        prepare_model("mixtral", "tiny", root, 2)
        assert seed_of(folder) == 2
        assert [path.name for path in folder.parent.iterdir()] == ["mixtral-tiny"]

    assert every_kill(lambda: prepare_model("mixtral", "tiny", root, 2), root, start, check) > 10
    assert found == {1, 2}, "the old model or the new one, whole, and never neither"


@pytest.mark.usefixtures("quick_models")
@pytest.mark.parametrize("again", [False, True])
def test_prepare_killed_while_it_writes_text(tmp_path: Path, again: bool) -> None:
    root, start = tmp_path / "root", tmp_path / "start"
    if again:
        old = prepare_data(start)
        old.with_suffix(".manifest.json").write_text("{")
    path = root / "artifacts" / "data" / "stdlib.jsonl"
    whole = prepare_data(tmp_path / "whole").read_bytes()

    def check() -> None:
        prepare_data(root)
        assert path.read_bytes() == whole
        assert sorted(file.name for file in path.parent.iterdir()) == ["stdlib.jsonl", "stdlib.manifest.json"]

    assert every_kill(lambda: prepare_data(root), root, start, check) > 4


def test_report_killed_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "plots", lambda analysis: [])
    root, start = tmp_path / "root", tmp_path / "start"
    comparison = builders.comparison()
    other = builders.comparison(name="other")

    def write(target: Path, one: Any) -> None:
        save(one, target / "mixtral.json")
        report.write_report([Analysis(one)], target)

    write(start, other)
    write(tmp_path / "whole", comparison)
    names = ("mixtral.json", "report.html", "report.md")
    allowed = {name: {(folder / name).read_bytes() for folder in (start, tmp_path / "whole")} for name in names}

    def check() -> None:
        for name in names:
            assert (root / name).read_bytes() in allowed[name]
        load(root)
        for part in root.glob("*.part"):  # a younger one may be another process's
            os.utime(part, (0, 0))
        write(root, comparison)
        assert sorted(path.name for path in root.iterdir()) == sorted(names)

    # The template and the packages are read under other folders.
    assert every_kill(lambda: write(root, comparison), root, start, check) >= 6


# A full disk


def full_after(size: int) -> Callable[[], None]:
    """No file of this process may grow beyond ``size`` bytes: writing fails as on a full disk, half way."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


@pytest.mark.usefixtures("quick_models")
@pytest.mark.parametrize("size", [0, 5, 200, 9_000])
def test_a_full_disk_while_a_model_is_replaced(tmp_path: Path, size: int) -> None:
    folder = prepare_model("mixtral", "tiny", tmp_path, 1)
    assert in_child(lambda: prepare_model("mixtral", "tiny", tmp_path, 2), full_after(size)) != 0
    assert seed_of(folder) == 1
    assert [path.name for path in folder.parent.iterdir()] == ["mixtral-tiny"], "nothing half made fills the disk"
    prepare_model("mixtral", "tiny", tmp_path, 2)
    assert seed_of(folder) == 2


@pytest.mark.usefixtures("quick_models")
def test_a_full_disk_while_text_is_written(tmp_path: Path) -> None:
    assert in_child(lambda: prepare_data(tmp_path), full_after(1000)) != 0
    assert list((tmp_path / "artifacts" / "data").iterdir()) == []
    prepare_data(tmp_path)


def test_a_full_disk_while_a_report_is_written(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_text(path, "old")
    assert in_child(lambda: write_text(path, "new" * 1000), full_after(100)) != 0
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.slow
def test_the_command_line_says_that_the_disk_is_full(tmp_path: Path) -> None:
    def run(size: int) -> subprocess.CompletedProcess[str]:
        code = (
            f"import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
            f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size})); "
            "from moe_kernels.tools.app import main; main()"
        )
        command = [sys.executable, "-B", "-c", code, "prepare", "mixtral-tiny"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    # The text has 12 MB, the weights 3 MB.
    for size, folder in ((1_000_000, "data"), (13_000_000, None), (2_000_000, "models")):
        if folder == "models":
            shutil.rmtree(tmp_path / "artifacts" / "models")
        done = run(size)
        if folder is None:
            assert done.returncode == 0, done.stderr
            continue
        assert done.returncode == 3, done.stderr
        assert "Traceback" not in done.stderr
        assert "Cure:" in done.stderr
        assert not list((tmp_path / "artifacts" / folder).iterdir())


# A comparison


PAIR = {"max_steps": 6, "micro_batch_size": 2, "sequence_len": 64, "wandb_project": "p", "wandb_name": "n"}


def write_pair(folder: Path, second: str) -> None:
    one = PAIR | {"base_model": "nothing"}
    two = one | {"moe_kernels": True, "fake": second}
    for name, config in (("a.yml", one), ("b.yml", two)):
        (folder / name).write_text("\n".join(f"{key}: {json.dumps(value)}" for key, value in config.items()))


def compare_script() -> list[str]:
    script = f"""
        import sys; sys.path.insert(0, {str(Path(__file__).parents[1] / "compare")!r})
        from functools import partial
        from moe_kernels.tools.compare import command
        command.Machine = partial(command.Machine, trainer={FAKE!r})
        command.measure_experts = lambda *args: {{"measurements": [], "error": ""}}
        from moe_kernels.tools.app import main
        sys.argv = ["moe-kernels", "compare", "a.yml", "b.yml", "--warmup-steps", "2", "--no-noise"]
        main()
    """
    return [sys.executable, "-c", textwrap.dedent(script)]


def test_compare_killed_in_a_training_goes_on(tmp_path: Path) -> None:
    write_pair(tmp_path, "hang")
    runs = tmp_path / "artifacts" / "runs" / "compare" / "a-vs-b-own"
    pid = runs / "optimized-1" / "pid"
    child = subprocess.Popen(compare_script(), cwd=tmp_path, stdout=subprocess.DEVNULL)
    for _ in range(900):
        if pid.is_file() and pid.read_text():
            break
        time.sleep(0.1)
    trainer = int(pid.read_text())
    child.kill()
    child.wait()
    for _ in range(50):
        if (
            not Path(f"/proc/{trainer}").exists()
            or "Z" in Path(f"/proc/{trainer}/stat").read_text().split(")")[1][:3]
        ):
            break
        time.sleep(0.1)
    else:
        raise AssertionError("the training goes on unseen")
    first = (runs / "baseline-1" / "result.json").stat().st_mtime_ns
    write_pair(tmp_path, "train")
    done = subprocess.run(compare_script(), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (runs / "baseline-1" / "result.json").stat().st_mtime_ns == first, "what was finished is not run again"
    [comparison] = load(tmp_path / "artifacts" / "compare" / "a-vs-b")
    assert [run.status for run in comparison.runs] == ["finished", "finished"]


def test_a_training_that_is_killed_is_named_and_run_again(tmp_path: Path) -> None:
    write_pair(tmp_path, "killed")
    done = subprocess.run(compare_script(), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "optimized-1 failed: the trainer was ended by SIGKILL" in " ".join(done.stdout.split())
    assert "Traceback" not in done.stderr
    [comparison] = load(tmp_path / "artifacts" / "compare" / "a-vs-b")
    assert [run.status for run in comparison.runs] == ["finished", "failed"]
    assert not (tmp_path / "artifacts/runs/compare/a-vs-b-own/optimized-1/result.json").exists()


def test_half_tokenised_data_is_removed_before_a_training(tmp_path: Path) -> None:
    from moe_kernels.tools.compare.runner import _drop_half_tokenised

    for name, whole in (("half", False), ("whole", True)):
        folder = tmp_path / "prepared" / name
        folder.mkdir(parents=True)
        (folder / "data-00000-of-00001.arrow").write_bytes(b"x")
        if whole:
            (folder / "dataset_info.json").write_text("{}")
    (tmp_path / "prepared" / "mine.txt").write_text("mine")
    _drop_half_tokenised(tmp_path / "prepared")
    assert sorted(path.name for path in (tmp_path / "prepared").iterdir()) == ["mine.txt", "whole"]
    _drop_half_tokenised(tmp_path / "nothing")


def test_a_report_that_was_cut_off_is_refused(tmp_path: Path) -> None:
    save(builders.comparison(), tmp_path / "x.json")
    whole = (tmp_path / "x.json").read_bytes()
    for end in range(0, len(whole), len(whole) // 50):
        (tmp_path / "x.json").write_bytes(whole[:end])
        with pytest.raises(UsageError, match="is not JSON"):
            load(tmp_path)
