"""What ``moe-kernels prepare`` makes: models of the right size, the same each time, that train."""

from __future__ import annotations

import errno
import json
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from typer.testing import CliRunner

from moe_kernels.shapes import FAMILIES, REAL_FAMILIES
from moe_kernels.tools.app import app
from moe_kernels.tools.common import files
from moe_kernels.tools.common.errors import MISSING, WRONG_USAGE, MissingDependency, UsageError
from moe_kernels.tools.prepare import cache, prepare_data, prepare_model, text, tiny_overrides
from moe_kernels.tools.prepare.cache import MANIFEST
from moe_kernels.tools.prepare.command import wanted
from moe_kernels.tools.prepare.models import build_model, model_config
from moe_kernels.tools.prepare.text import EOS, rows

each_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the text and the three tiny models, made once. Tests that change it copy it."""
    root = tmp_path_factory.mktemp("prepared")
    prepare_data(root)
    for family in FAMILIES:
        prepare_model(family, "tiny", root)
    return root


@pytest.fixture
def copied(prepared: Path, tmp_path: Path) -> Path:
    """A copy to break: the mixtral model, the tokenizer and the text."""
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    return tmp_path


def stamp(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


@each_family
def test_one_billion_parameters(family: str) -> None:
    exact = {"mixtral": 972_657_664, "qwen2-moe": 1_025_414_144, "deepseek-v3": 1_020_228_096}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config(family, "1b"))
    assert model.num_parameters() == exact[family] == pytest.approx(1e9, rel=0.05)


@pytest.mark.parametrize("family", REAL_FAMILIES)
def test_models_of_real_size(family: str) -> None:
    """The figures of the checkpoints on the Hub."""
    exact = {"qwen3-moe": 30_532_122_624, "gpt-oss": 20_914_757_184}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config(family, REAL_FAMILIES[family].large))
    assert model.num_parameters() == exact[family]


@each_family
@pytest.mark.parametrize("size", ["1b", "tiny"])
def test_layers_are_those_of_the_table(family: str, size: str) -> None:
    shape = FAMILIES[family].sizes[size]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config(family, size))
    experts = [module for module in model.modules() if hasattr(module, "gate_up_proj")]
    gate_up = (shape.experts, 2 * shape.intermediate, shape.hidden)
    assert [tuple(module.gate_up_proj.shape) for module in experts if module.gate_up_proj.ndim == 3] == (
        [gate_up] * shape.moe_layers
    )
    assert model.config.num_hidden_layers == shape.layers
    assert model.config.num_experts_per_tok == shape.top_k


def test_deepseek_keeps_its_own_routing() -> None:
    config = model_config("deepseek-v3", "1b")
    assert (config.n_group, config.topk_group, config.first_k_dense_replace) == (8, 4, 1)
    assert (config.n_shared_experts, config.norm_topk_prob, config.routed_scaling_factor) == (1, True, 2.5)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum("e_score_correction_bias" in name for name, _ in model.named_buffers()) == 9


@each_family
def test_tiny_model_loads_with_its_tokenizer(prepared: Path, family: str) -> None:
    folder = prepared / tiny_overrides(family)["base_model"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["parameters"] == model.num_parameters() < 1_000_000
    assert model.dtype == torch.float32
    assert len(tokenizer) == model.config.vocab_size == FAMILIES[family].sizes["tiny"].vocab
    for token in ("pad", "bos", "eos"):
        assert getattr(tokenizer, f"{token}_token_id") == getattr(model.config, f"{token}_token_id") is not None
    source = "def f(x):\n    return x  # ünïcode, 日本\n"
    ids = tokenizer(source + EOS)["input_ids"]
    assert ids.count(tokenizer.eos_token_id) == 1
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[:-1]) == source


@each_family
def test_tiny_model_learns(prepared: Path, family: str) -> None:
    folder = prepared / tiny_overrides(family)["base_model"]
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sample = (prepared / "artifacts/data/stdlib.jsonl").read_text()[:4000]
    batch = torch.tensor([tokenizer(sample)["input_ids"][:256]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(6):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(torch.tensor(2048.0).log().item(), abs=0.3)
    assert losses[-1] < losses[0] - 0.5


@each_family
def test_same_seed_same_weights(family: str) -> None:
    before = torch.random.get_rng_state()
    one, again, other = (build_model(family, "tiny", seed, "cpu").state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_a_second_make_is_the_same_to_the_byte(prepared: Path, tmp_path: Path) -> None:
    """Tokenizer included: nothing depends on the time, on hashing or on threads."""
    first = prepared / "artifacts/models/mixtral-tiny"
    second = prepare_model("mixtral", "tiny", tmp_path)
    for name in ("model.safetensors", "tokenizer.json", "config.json", MANIFEST):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    assert prepare_data(tmp_path).read_bytes() == (prepared / "artifacts/data/stdlib.jsonl").read_bytes()


def test_what_is_finished_is_kept(prepared: Path) -> None:
    model, data = prepared / "artifacts/models/mixtral-tiny", prepared / "artifacts/data"
    before, messages = (stamp(model), stamp(data)), list[str]()
    assert prepare_model("mixtral", "tiny", prepared, report=messages.append) == model
    assert prepare_model("mixtral", "tiny", prepared, seed=0, report=messages.append) == model
    assert prepare_data(prepared, report=messages.append) == data / "stdlib.jsonl"
    assert (stamp(model), stamp(data)) == before
    assert all(message.endswith("is there already") for message in messages)


def test_another_seed_and_force_make_it_again(copied: Path) -> None:
    folder = copied / "artifacts/models/mixtral-tiny"
    first = (folder / "model.safetensors").read_bytes()
    prepare_model("mixtral", "tiny", copied, seed=5)
    other = (folder / "model.safetensors").read_bytes()
    assert other != first
    kept = stamp(folder)
    prepare_model("mixtral", "tiny", copied)  # no seed named: any finished model will do
    assert stamp(folder) == kept
    prepare_model("mixtral", "tiny", copied, seed=0, force=True)
    assert (folder / "model.safetensors").read_bytes() == first


def test_an_interrupted_make_leaves_the_old_one_and_is_redone(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copied / "artifacts/models/mixtral-tiny"
    before = stamp(folder)
    save = PreTrainedModel.save_pretrained

    def stop_half_way(self: PreTrainedModel, target: Path, **rest: Any) -> None:
        save(self, target, **rest)
        raise KeyboardInterrupt

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", stop_half_way)
    with pytest.raises(KeyboardInterrupt):
        prepare_model("mixtral", "tiny", copied, seed=7)
    monkeypatch.undo()
    assert stamp(folder) == before
    prepare_model("mixtral", "tiny", copied, seed=7)
    assert json.loads((folder / MANIFEST).read_text())["recipe"]["seed"] == 7
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".")] == []


def test_a_folder_of_the_users_own_is_never_replaced(copied: Path) -> None:
    folder = copied / "artifacts/models/mixtral-tiny"
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "config.json").write_text("mine")
    with pytest.raises(UsageError, match=r"was not made by `moe-kernels prepare`.*--force"):
        prepare_model("mixtral", "tiny", copied)
    assert (folder / "config.json").read_text() == "mine"
    prepare_model("mixtral", "tiny", copied, force=True)
    assert (folder / MANIFEST).is_file()


def test_a_file_of_the_users_own_is_never_replaced(tmp_path: Path) -> None:
    mine = tmp_path / "artifacts/data/stdlib.jsonl"
    mine.parent.mkdir(parents=True)
    mine.write_text('{"text": "one"}\n')
    with pytest.raises(UsageError, match=r"was not made by `moe-kernels prepare`.*--force"):
        prepare_data(tmp_path)
    assert mine.read_text() == '{"text": "one"}\n'


def test_text_that_was_cut_short_is_written_again(copied: Path) -> None:
    path = copied / "artifacts/data/stdlib.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:1000])
    assert prepare_data(copied).read_bytes() == whole


@pytest.mark.parametrize(
    "make",
    [
        lambda root: prepare_model("mixtral", "tiny", root, force=True),
        lambda root: prepare_data(root, force=True),
    ],
    ids=["model", "data"],
)
def test_stale_tokens_are_removed(copied: Path, make: Callable[[Path], Path]) -> None:
    """Axolotl finds them by path and settings, not by content: it would train on the old text."""
    stale = copied / "artifacts/prepared/591c55/dataset.arrow"
    stale.parent.mkdir(parents=True)
    stale.write_text("old")
    make(copied)
    assert not stale.exists()


@pytest.mark.parametrize(
    ("make", "needed"), [(lambda root: prepare_model("mixtral", "1b", root), r"\d,\d{3}"), (prepare_data, r"\d\d")]
)
def test_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], Path], needed: str
) -> None:
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000_000))
    with pytest.raises(MissingDependency, match=rf" 10 MB free and {needed} MB are needed. Free some, or .* --root"):
        make(tmp_path)


def test_a_python_without_its_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(MissingDependency, match=r"came without them\. Use a Python"):
        prepare_data(tmp_path)


def test_text_is_the_library_and_suffices_for_sixty_steps(prepared: Path) -> None:
    lines = (prepared / "artifacts/data/stdlib.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    joined = "".join(texts)
    assert joined.startswith(text.stdlib_sources()[0])
    assert joined.count(EOS) > 400
    # The tokenizer of 32000 entries takes 4.1 characters a token.
    assert len(joined) > 2 * 4.1 * 60 * 16384
    assert all(0 <= len(line) - text.ROW_CHARACTERS < len(EOS) for line in texts[:-1])
    assert sum(line.count(EOS) for line in texts) == joined.count(EOS)


def test_rows_lose_nothing() -> None:
    documents = ["ab", "c" * 25, "", "de"]
    made = [*rows(documents, length=10)]
    assert "".join(made) == "".join(document + EOS for document in documents)
    assert [len(row) for row in made[:-1]] == [10, 10, 10, 11], "the token stays whole"
    assert "".join(rows(documents, length=10, limit=20)) == "".join(made)[:20]
    assert [*rows([])] == []


@pytest.mark.parametrize("length", range(1, 30))
def test_no_row_ends_inside_the_end_of_a_text(length: int) -> None:
    made = [*rows(["ab", "", "c" * 11, EOS], length=length)]
    assert sum(row.count(EOS) for row in made) == 5
    assert all(length <= len(row) < length + len(EOS) for row in made[:-1])


@pytest.mark.parametrize(
    ("name", "content", "field"),
    [
        ("a.jsonl", '{"text": "one"}\n{"text": null}\n{"text": "two"}\n', "text"),
        ("a.json", '[{"body": "one"}, {"body": "two"}]', "body"),
        ("a.txt", f"one{EOS}two", "text"),
    ],
)
def test_own_data(tmp_path: Path, name: str, content: str, field: str) -> None:
    pytest.importorskip("datasets", reason="needs the extra [axolotl]")
    source = tmp_path / name
    source.write_text(content)
    made = prepare_data(tmp_path, str(source), text_field=field)
    assert made.parent == tmp_path / "artifacts/data"
    assert re.fullmatch(r"a-[0-9a-f]{8}\.jsonl", made.name)
    assert [json.loads(line) for line in made.read_text().splitlines()] == [{"text": f"one{EOS}two{EOS}"}]
    before = stamp(made.parent)
    assert prepare_data(tmp_path, str(source), text_field=field) == made
    assert stamp(made.parent) == before
    source.write_text(content.replace("two", "three"))
    assert "three" in prepare_data(tmp_path, str(source), text_field=field).read_text()


def test_no_two_data_sets_share_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets", reason="needs the extra [axolotl]")
    monkeypatch.chdir(tmp_path)
    names = ("日本.jsonl", "中国.jsonl", "d1/train.jsonl", "d2/train.jsonl", "stdlib.jsonl", "x" * 240 + ".jsonl")
    made = {}
    for name in names:
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(json.dumps({"text": name}))
        made[name] = prepare_data(tmp_path, name)
    for name in names:
        assert json.loads(made[name].read_text()) == {"text": name + EOS}
    assert made["日本.jsonl"].name.startswith("日本-")
    assert tmp_path / "artifacts/data/stdlib.jsonl" not in made.values()
    assert prepare_data(tmp_path, str(tmp_path / "d1" / "train.jsonl")) == made["d1/train.jsonl"]


def test_own_parquet(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the extra [axolotl]")
    datasets.Dataset.from_dict({"text": ["one"]}).to_parquet(tmp_path / "a.parquet")
    assert json.loads(prepare_data(tmp_path, str(tmp_path / "a.parquet")).read_text()) == {"text": f"one{EOS}"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"body": "one"}\n', "has no column 'text' but body. Name one with --text-field"),
        ('{"text": null}\n', "holds no text in 'text'. Name another column with --text-field"),
        ('{"text": "one"}\n{"text": ', "cannot be read"),
        ("", "There is no file .*, or it is empty"),
    ],
)
def test_bad_data(tmp_path: Path, content: str, message: str) -> None:
    pytest.importorskip("datasets", reason="needs the extra [axolotl]")
    source = tmp_path / "a.jsonl"
    source.write_text(content)
    with pytest.raises(UsageError, match=message):
        prepare_data(tmp_path, str(source))
    assert not [*tmp_path.glob("artifacts/data/*.jsonl")]


def test_a_data_set_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the extra [axolotl]")

    def unreachable(**arguments: Any) -> None:
        assert (arguments["path"], arguments["name"], arguments["split"]) == ("some/set", "config", "train")
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(MissingDependency, match=r"cannot be reached on huggingface\.co") as error:
        prepare_data(tmp_path, "some/set:config")
    assert error.value.exit_code == MISSING


def test_names() -> None:
    assert wanted(["mixtral-1b"], None) == [("mixtral", "1b", False)]
    assert wanted(["mixtral-1b", "qwen2-moe-tiny", "mixtral"], None) == [
        ("mixtral", "1b", False),
        ("qwen2-moe", "tiny", False),
    ]
    assert wanted(["all"], "tiny") == [(family, "tiny", False) for family in FAMILIES]
    assert wanted(["qwen3-30b-a3b", "gpt-oss", "gpt-oss-20b", "qwen3-moe-tiny"], None) == [
        ("qwen3-moe", "30b", False), ("gpt-oss", "20b", False), ("qwen3-moe", "tiny", False),
    ]  # fmt: skip
    assert wanted(["qwen3-30b-a3b-fp8", "gpt-oss-tiny-mxfp4"], None) == [
        ("qwen3-moe", "30b", True),
        ("gpt-oss", "tiny", True),
    ]
    assert wanted(["deepseek-v3-1b"], "tiny") == [("deepseek-v3", "tiny", False)]


def test_command(copied: Path) -> None:
    done = CliRunner().invoke(app, ["prepare", "mixtral-1b", "--size", "tiny", "--root", str(copied), "--force"])
    assert done.exit_code == 0, done.output
    assert "686,952 parameters in" in done.output


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nope"], WRONG_USAGE, "There is no model 'nope'. Name one of mixtral-1b, "),
        (["all", "--size", "7b"], WRONG_USAGE, "There is no size '7b'. Name one of 1b, tiny."),
        (["gpt-oss", "--size", "1b"], WRONG_USAGE, "There is no size '1b'. Name one of 20b, tiny."),
        ([], WRONG_USAGE, "Missing argument"),
        (["mixtral-tiny", "--seed", "99999999999999999999"], WRONG_USAGE, "'--seed'"),
    ],
)
def test_wrong_usage(tmp_path: Path, arguments: list[str], code: int, message: str) -> None:
    done = CliRunner().invoke(app, ["prepare", *arguments, *(["--root", str(tmp_path)] if arguments else [])])
    assert done.exit_code == code
    assert message in done.output
    assert not any(tmp_path.iterdir())


def test_no_data_set_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--dataset names nothing"):
        prepare_data(tmp_path, "")


@pytest.mark.parametrize(
    ("root", "dataset", "message"),
    [
        ("afile", None, "Cure: name a folder, or move away the file that is there."),
        ("afile/inside", None, "Cure: name a folder, or move away the file that is there."),
        (".", "x" * 300 + ".jsonl", "Cure: use a shorter name."),
    ],
)
def test_a_path_that_cannot_be_used_is_a_sentence(
    tmp_path: Path, root: str, dataset: str | None, message: str
) -> None:
    (tmp_path / "afile").write_text("")
    arguments = ["prepare", "mixtral-tiny", "--root", str(tmp_path / root)]
    done = CliRunner().invoke(app, [*arguments, *(["--dataset", dataset] if dataset else [])])
    assert done.exit_code == WRONG_USAGE
    assert message in done.output


def test_two_at_once_take_turns(tmp_path: Path) -> None:
    """Three commands started together once deleted each other's half-made text."""
    order: list[str] = []
    waiting = threading.Event()

    def second() -> None:
        with cache.in_turn(tmp_path / "artifacts", lambda message: (order.append(message), waiting.set())):
            order.append("second")

    other = threading.Thread(target=second)
    with cache.in_turn(tmp_path / "artifacts", order.append):
        other.start()
        assert waiting.wait(10)
        order.append("first is done")
    other.join(10)
    assert order[0] == f"waiting for another `moe-kernels` command that makes something in {tmp_path / 'artifacts'}"
    assert order[1:] == ["first is done", "second"]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOLCK, "No locks available"), OSError(errno.ENOSYS, "none"), NotImplementedError("none")]
)
def test_a_file_system_without_locks_is_warned_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    monkeypatch.setattr(files.FileLock, "acquire", Mock(side_effect=error))
    done = []
    for number in range(2):
        with cache.in_turn(tmp_path, done.append):
            done.append(number)
    assert done == [0, 1]
    assert [record.message for record in caplog.records] == [
        f"{tmp_path} is on a file system without locks: run one moe-kernels command at a time in it."
    ]


def test_another_error_of_a_lock_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.FileLock, "acquire", Mock(side_effect=PermissionError(errno.EACCES, "no")))
    with pytest.raises(PermissionError), cache.in_turn(tmp_path, print):
        raise AssertionError("it was not locked")
