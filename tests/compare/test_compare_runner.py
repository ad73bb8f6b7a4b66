"""Trainings as subprocesses, with a fake trainer in Axolotl's place."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import yaml

from moe_kernels.shapes import FAMILIES
from moe_kernels.tools.common.errors import MissingDependency, UsageError
from moe_kernels.tools.common.files import write_text
from moe_kernels.tools.common.options import shipped
from moe_kernels.tools.common.runfile import load_yaml, precision
from moe_kernels.tools.compare.environment import LAUNCHER, SOURCES, TILES
from moe_kernels.tools.compare.gpu import Gpu
from moe_kernels.tools.compare.pair import Options, Pair, family_pair, files_pair
from moe_kernels.tools.compare.runner import (
    LogReader,
    Machine,
    RunResult,
    _drop_half_tokenised,
    claimed,
    drop_old_tokens,
    environment,
    fingerprint,
    finished_result,
    last_error,
    run_training,
    tokens_folder,
)

CACHED = "hub/models--some--model/snapshots/0123abc/tokenizer.json"
FAKE = (sys.executable, str(Path(__file__).parent / "fake_trainer.py"))
BASE: dict[str, Any] = {
    "base_model": "model",
    "micro_batch_size": 2,
    "sequence_len": 256,
    "max_steps": 6,
    "bf16": False,
    "wandb_project": "moe-baseline",
    "wandb_name": "one",
    "output_dir": "somewhere",
}


@pytest.fixture(autouse=True)
def _inside_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "/kept")


def make_pair(fake: str = "train", options: Options | None = None, base: dict[str, Any] | None = None) -> Pair:
    config = BASE | (base or {})
    Path("a.yml").write_text(yaml.safe_dump(config))
    ours = {"moe_kernels": True, "wandb_project": "moe-kernels", "fake": fake}
    Path("b.yml").write_text(yaml.safe_dump(config | ours))
    return files_pair(Path("a.yml"), Path("b.yml"), options or Options(warmup_steps=2))


def machine(**changes: Any) -> Machine:
    return Machine(**{"device": None, "versions": {"torch": "2", SOURCES: "s"}, "trainer": FAKE, **changes})


def train(pair: Pair, index: int = 1, shown: list[LogReader] | None = None, **changes: Any) -> RunResult:
    def show(log: LogReader) -> None:
        if shown is not None:
            shown.append(replace(log))

    return run_training(pair.runs[index], machine(**changes), show)


def test_a_finished_training() -> None:
    pair, shown = make_pair(), []
    result = train(pair, shown=shown)
    assert (result.status, result.error, result.exit_code) == ("finished", "", 0)
    assert [row["train/loss"] for row in result.rows] == [7.0 - 0.1 * step for step in range(1, 7)]
    assert (result.wandb["project"], result.wandb["name"]) == ("moe-kernels", "one")
    assert result.plugin_line.startswith("moe_kernels: backend=torch (no GPU), 2 expert calls")
    assert result.experts == "moe_kernels"
    assert result.trainer_started_at is not None
    assert shown[-1].step == 6
    assert shown[-1].loss == "6.4"
    assert result.command[0] == "python"
    folder = pair.runs[1].folder
    assert sorted(path.name for path in folder.iterdir()) == [
        "derived.yml",
        "output",
        "record.jsonl",
        "result.json",
        "train.log",
    ]
    assert list(folder.rglob("*.safetensors")) == []


def test_weights_are_kept_on_request() -> None:
    pair = make_pair()
    train(pair, keep_weights=True)
    assert len(list(pair.runs[1].folder.rglob("*.safetensors"))) == 1


def test_a_failing_trainer_leaves_its_log_and_the_reason() -> None:
    pair = make_pair("fail")
    result = train(pair)
    assert (result.status, result.exit_code) == ("failed", 3)
    assert result.error == "RuntimeError: the fake GPU melted"
    assert "the fake GPU melted" in Path(result.log).read_text()
    assert result.tail[-1] == "RuntimeError: the fake GPU melted"
    assert not (pair.runs[1].folder / "result.json").exists()
    assert finished_result(pair.runs[1], machine()) is None


def test_a_trainer_that_logs_too_few_steps_has_not_finished() -> None:
    result = train(make_pair("short"))
    assert result.status == "failed"
    assert result.error.startswith("the trainer logged 2 of 6 steps")


def test_a_damaged_record_gives_no_numbers() -> None:
    result = train(make_pair("damaged"))
    assert (result.status, result.rows) == ("failed", [])
    assert "record.jsonl is damaged: optimized-1: rows[1]._timestamp should be a number" in result.error


def test_the_time_limit_ends_the_trainer() -> None:
    pair = make_pair("hang")
    result = train(pair, timeout_s=3.0)
    assert result.exit_code is None
    assert "time limit of 3 s" in result.error
    with pytest.raises(ProcessLookupError):
        os.kill(int((pair.runs[1].folder / "pid").read_text()), 0)


def test_ctrl_c_ends_the_trainer_and_keeps_finished_runs() -> None:
    pair = make_pair("hang")
    train(pair, index=0)

    def interrupt(log: LogReader) -> None:
        if (pair.runs[1].folder / "pid").is_file():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_training(pair.runs[1], machine(), interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(int((pair.runs[1].folder / "pid").read_text()), 0)
    assert finished_result(pair.runs[0], machine()) is not None


def test_a_finished_run_is_served_from_its_folder_until_something_changes() -> None:
    pair = make_pair()
    before = train(pair)
    assert finished_result(pair.runs[1], machine()) == before
    # Another kernel, another torch, another setting: run again.
    assert finished_result(pair.runs[1], machine(versions={"torch": "2", SOURCES: "new"})) is None
    assert finished_result(pair.runs[1], machine(versions={"torch": "3", SOURCES: "s"})) is None
    longer = make_pair(options=Options(warmup_steps=2, steps=7))
    assert finished_result(longer.runs[1], machine()) is None


def test_a_changed_kernel_leaves_the_baseline_alone() -> None:
    pair = make_pair()
    train(pair, index=0)
    assert finished_result(pair.runs[0], machine(versions={"torch": "2", SOURCES: "new"})) is not None


H100, H200 = Gpu("NVIDIA H100", "580", 80.0), Gpu("NVIDIA H200", "580", 140.0)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"device": "0", "gpu": H100}, {"device": "0", "gpu": H200}),
        ({"device": "0", "gpu": H100}, {"device": "0", "gpu": replace(H100, driver="590")}),
        ({"cpu": "one processor"}, {"cpu": "another processor"}),
    ],
)
def test_a_run_of_another_machine_is_not_taken_for_one_of_this(one: dict[str, Any], other: dict[str, Any]) -> None:
    run = make_pair().runs[0]
    assert fingerprint(run, machine(**one)) == fingerprint(run, machine(**one))
    assert fingerprint(run, machine(**one)) != fingerprint(run, machine(**other))


@pytest.mark.parametrize(
    "name", ["model/config.json", "model/tokenizer.json", "text.jsonl", "texts/a/b.jsonl", CACHED]
)
def test_a_changed_file_of_model_or_data_runs_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(Path("hub").absolute()))
    named = [{"path": "text.jsonl"}, {"path": "json", "data_files": ["texts"]}, {"path": "x" * 5000}]
    pair = make_pair(base={"datasets": named, "tokenizer_config": "some/model"})
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text("one")
    before = [fingerprint(run, machine()) for run in pair.runs]
    assert before == [fingerprint(run, machine()) for run in pair.runs]
    Path(name).write_text("another")
    assert not set(before) & {fingerprint(run, machine()) for run in pair.runs}


@pytest.mark.parametrize("name", [TILES, LAUNCHER])
def test_what_our_kernels_run_with_counts_for_our_runs_alone(name: str) -> None:
    stock, ours = make_pair().runs[:2]
    one, other = (machine(versions={"torch": "2", name: value}) for value in ("a", "b"))
    assert fingerprint(stock, one) == fingerprint(stock, other)
    assert fingerprint(ours, one) != fingerprint(ours, other)


def tokenised(folder: Path) -> Path:
    for path in (arrow := folder / "hash" / "data-00000-of-00001.arrow", arrow.with_name("dataset_info.json")):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    return arrow


@pytest.mark.parametrize("named", ["mine", None])
def test_a_training_has_tokens_of_its_own_and_leaves_the_users(named: str | None) -> None:
    Path("text.jsonl").write_text("{}")
    Path("model").mkdir()
    Path("model/tokenizer.json").write_text("{}")
    base = {"datasets": [{"path": "text.jsonl"}], **({"dataset_prepared_path": named} if named else {})}
    arrow = tokenised(Path(named or "last_run_prepared"))
    arrow.with_name("dataset_info.json").unlink()
    os.utime(arrow, (1, 1))
    pair = make_pair(base=base)
    before = fingerprint(pair.runs[0], machine())
    result = train(pair, index=0)
    assert arrow.is_file()
    folder = Path(result.config["dataset_prepared_path"])
    assert folder.parent == pair.folder / "prepared"
    assert load_yaml(pair.runs[0].folder / "derived.yml") == result.config
    assert result.overrides["dataset_prepared_path"] == str(folder)
    assert before == result.fingerprint == fingerprint(pair.runs[0], machine())
    assert "dataset_prepared_path" not in pair.yaml_diff


@pytest.mark.parametrize("name", FAMILIES)
def test_all_runs_of_a_pair_tokenise_once(name: str) -> None:
    runs = family_pair(name, Options(with_eager=True, lora=8)).runs
    assert len({tokens_folder(run, machine()) for run in runs}) == 1


@pytest.mark.parametrize(
    ("file", "again"),
    [
        ("text.jsonl", True),
        ("model/tokenizer.json", True),
        ("model/model.safetensors", False),
        ("adapter/adapter_config.json", False),
    ],
)
def test_tokens_are_made_again_of_another_text_tokenizer_or_setting(file: str, again: bool) -> None:
    base = {"datasets": [{"path": "text.jsonl"}], "lora_model_dir": "adapter"}
    pair = make_pair(base=base)
    for name in ("text.jsonl", "model/tokenizer.json", "model/model.safetensors", "adapter/adapter_config.json"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("one")
    before = [tokens_folder(run, machine()) for run in pair.runs]
    assert (
        len({*before, tokens_folder(make_pair(base={**base, "dataset_prepared_path": "x"}).runs[0], machine())}) == 1
    )
    assert tokens_folder(make_pair(base={**base, "sequence_len": 8}).runs[0], machine()) != before[0]
    assert tokens_folder(pair.runs[0], machine(versions={"axolotl": "new"})) != before[0]
    arrow = tokenised(before[0])
    Path(file).write_text("another")
    drop_old_tokens(pair, machine())
    assert arrow.is_file() != again


def test_half_tokenised_data_is_removed() -> None:
    half, whole = tokenised(Path("half")), tokenised(Path("whole"))
    half.with_name("dataset_info.json").unlink()
    for folder in ("half", "whole", "nothing"):
        _drop_half_tokenised(Path(folder))
    assert (half.exists(), whole.exists()) == (False, True)


def test_two_comparisons_do_not_share_a_folder() -> None:
    pair = make_pair()
    code = f"""
        from pathlib import Path
        from moe_kernels.tools.compare.runner import claimed
        with claimed(Path({str(pair.folder)!r})):
            print("mine", flush=True)
            input()
    """
    env = {**os.environ, "PYTHONPATH": ""}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "mine\n"
        with (
            pytest.raises(UsageError, match=r"Another `moe-kernels compare` is at work in .*a-vs-b-own"),
            claimed(pair.folder),
        ):
            raise AssertionError("both are at work")
        other.kill()
    with claimed(pair.folder):
        pass


def test_writers_on_other_hosts_keep_their_parts_and_old_ones_go() -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    live, old = Path(f"x.html.{dead.pid}.part"), Path(f"x.html.{dead.pid + 1}.part")
    for part in (live, old):
        part.write_text("half")
    os.utime(old, (1, 1))
    write_text(Path("x.html"), "half a letter: \ud800")
    assert sorted(Path().iterdir()) == [Path("x.html"), live]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, "fp32"),
        ({"bf16": True}, "bf16"),
        ({"bf16": "auto"}, "bf16"),
        ({"bf16": "auto", "fp16": True}, "fp16"),
        ({"bf16": False, "bfloat16": True}, "bf16"),
        ({"float16": True}, "fp16"),
        ({"bf16": False, "fp16": True}, "fp16"),
        ({"load_in_8bit": True}, "fp16"),
    ],
)
def test_every_spelling_of_a_precision(config: dict[str, Any], expected: str) -> None:
    assert precision(config) == expected


def test_the_environment_is_offline_and_keeps_the_callers_path() -> None:
    run = make_pair().runs[0]
    env = environment(run, machine(device="1"))
    assert env["PYTHONPATH"] == "/kept"
    assert (env["HF_HUB_OFFLINE"], env["WANDB_MODE"], env["AXOLOTL_DO_NOT_TRACK"]) == ("1", "offline", "1")
    assert env["CUDA_VISIBLE_DEVICES"] == "1"
    assert Path(env["WANDB_DIR"]) == run.folder.resolve()
    assert environment(run, machine(wandb="online"))["WANDB_MODE"] == "online"


def test_the_derived_file_changes_what_is_shown_and_nothing_else() -> None:
    pair = make_pair(options=Options(warmup_steps=2, steps=9, with_eager=True))
    ids = [run.run_id for run in pair.runs]
    assert ids == ["baseline-1", "optimized-1", "baseline-2", "eager-1"]
    first, second, _, eager = pair.runs
    assert first.overrides == {"output_dir": str(first.folder / "output"), "wandb_mode": "offline", "max_steps": 9}
    assert first.config == {**BASE, **first.overrides}
    assert eager.overrides["experts_implementation"] == "eager"
    assert [run.uses_kernels for run in pair.runs] == [False, True, False, False]
    assert {line for line in pair.yaml_diff.splitlines() if line[0] in "+-" and line[1] not in "+-"} == {
        "+fake: train",
        "+moe_kernels: true",
        "-wandb_project: moe-baseline",
        "+wandb_project: moe-kernels",
    }
    assert second.source == Path("b.yml")


def test_repeats_are_interleaved() -> None:
    pair = make_pair(options=Options(warmup_steps=2, repeats=2))
    assert [run.run_id for run in pair.runs] == ["baseline-1", "optimized-1", "baseline-2", "optimized-2"]
    assert len(make_pair(options=Options(warmup_steps=2, noise=False)).runs) == 2


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_a_pair(name: str) -> None:
    pair = family_pair(name, Options())
    assert (pair.family, pair.size) == (name, "1b")
    assert pair.runs[1].uses_kernels
    assert not pair.runs[0].uses_kernels


def test_wrong_files_are_named() -> None:
    with pytest.raises(UsageError, match=r"There is no file nothing\.yml"):
        load_yaml(Path("nothing.yml"))
    Path("bad.yml").write_text("a: [")
    with pytest.raises(UsageError, match=r"bad\.yml is not valid YAML"):
        load_yaml(Path("bad.yml"))
    Path("list.yml").write_text("- a")
    with pytest.raises(UsageError, match=r"list\.yml holds no settings"):
        load_yaml(Path("list.yml"))
    with pytest.raises(MissingDependency, match="run this in a clone"):
        shipped(Path("no-such.yml"))
    with pytest.raises(UsageError, match="leave less than the three to time after 10 warm-up steps"):
        make_pair(options=Options(warmup_steps=10))
    Path("c.yml").write_text(yaml.safe_dump({key: value for key, value in BASE.items() if key != "max_steps"}))
    with pytest.raises(UsageError, match="sets no max_steps"):
        files_pair(Path("c.yml"), Path("b.yml"), Options())
    with pytest.raises(UsageError, match=r"b\.yml already trains with moe-kernels"):
        files_pair(Path("b.yml"), Path("a.yml"), Options())
    with pytest.raises(UsageError, match=r"a\.yml does not use moe-kernels"):
        files_pair(Path("a.yml"), Path("a.yml"), Options())
    Path("c.yml").write_text("moe_kernels: true\nmax_steps: 20")
    with pytest.raises(UsageError, match=r"c\.yml names no base_model"):
        files_pair(Path("a.yml"), Path("c.yml"), Options())
    for text in ("wandb_name: 2026-01-05", "special_tokens: {1: a, b: c}", "a: &x [*x]", "a: !!binary aGVsbG8="):
        Path("c.yml").write_text(text)
        with pytest.raises(UsageError, match=r"c\.yml: \w+ is .*Cure: put what is text"):
            load_yaml(Path("c.yml"))
    for name, words in (("x" * 200, "is too long for the name"), ("x\ny", "is no plain name")):
        Path(f"{name}.yml").write_text(Path("b.yml").read_text())
        with pytest.raises(UsageError, match=words):
            files_pair(Path("a.yml"), Path(f"{name}.yml"), Options(warmup_steps=2))


def test_the_log_is_followed_in_pieces() -> None:
    reader = LogReader()
    text = "\x1b[32m[INFO] Starting trainer...\x1b[0m\n 5%|#| 1/20\r 5%|#| 1/20  {'loss': '7.6', 'grad_norm': '1'}\nx"
    for letter in text:
        reader.feed(letter)
    assert reader.trainer_started_at is not None
    assert (reader.step, reader.loss, reader.phase) == (1, "7.6", "training")
    reader.feed("{'train_loss': '7.1'}\n{'loss': 'nan'}\n")
    assert (reader.step, reader.loss) == (2, "nan")


def test_watching_a_training_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, moe_kernels.tools.compare.runner; print({'torch', 'transformers'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("tail", "expected"),
    [
        (["Traceback", "ValueError: no", "wandb: syncing"], "ValueError: no"),
        (
            ["torch.OutOfMemoryError: CUDA out of memory. Tried", "x"],
            "torch.OutOfMemoryError: CUDA out of memory. Tried",
        ),
        (["all is well"], ""),
    ],
)
def test_the_last_line_that_says_why(tail: list[str], expected: str) -> None:
    assert last_error(tail) == expected


def test_a_terminated_command_leaves_no_trainer_behind(tmp_path: Path) -> None:
    pair = make_pair("hang")
    pid = pair.runs[1].folder / "pid"
    script = f"""
        import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
        from functools import partial
        from moe_kernels.tools.compare import command
        command.Machine = partial(command.Machine, trainer={FAKE!r})
        command.compare(targets=["a.yml", "b.yml"], warmup_steps=2, out=None)
    """
    env = {**os.environ, "PYTHONPATH": ""}
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], env=env, stdout=subprocess.DEVNULL)
    for _ in range(600):
        if pid.is_file() and pid.read_text():
            break
        time.sleep(0.1)
    child.send_signal(signal.SIGTERM)
    child.wait(30)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
