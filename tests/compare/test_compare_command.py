"""The command: exit codes, reports and messages, with a fake trainer in Axolotl's place."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import builders
import pytest
import yaml
from test_compare_runner import BASE, FAKE
from typer.testing import CliRunner, Result

from moe_kernels.shapes import ALL_FAMILIES, FAMILIES
from moe_kernels.tools.app import app
from moe_kernels.tools.compare import command
from moe_kernels.tools.compare.gpu import Gpu
from moe_kernels.tools.compare.pair import Options, digest, family_pair, files_pair
from moe_kernels.tools.compare.runner import Machine


@pytest.fixture(autouse=True)
def _no_axolotl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "Machine", partial(Machine, trainer=FAKE))
    monkeypatch.setattr(command, "versions", lambda: {"torch": "2"})
    monkeypatch.setattr(command, "visible_gpu", lambda: None)
    monkeypatch.setattr(command, "measure_experts", lambda *_: builders.experts())


def compare(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["compare", *arguments])


def pair(fake: str = "train", **changes: Any) -> tuple[str, ...]:
    Path("a.yml").write_text(yaml.safe_dump({**BASE, **changes}))
    optimized = {**BASE, "moe_kernels": True, "wandb_project": "moe-kernels", "fake": fake, **changes}
    Path("b.yml").write_text(yaml.safe_dump(optimized))
    return "a.yml", "b.yml", "--warmup-steps", "2", "--out", "out"


def test_a_pair_is_trained_and_reported() -> None:
    result = compare(*pair())
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in Path("out").iterdir()) == ["a-vs-b.json", "report.html", "report.md"]
    data = json.loads(Path("out/a-vs-b.json").read_text())
    assert data["judged"]["sound"] is True
    assert data["judged"]["sides"]["baseline"]["runs"] == 2
    assert "says nothing about speed" in " ".join(result.output.split())


def test_a_second_call_trains_nothing_again_unless_fresh() -> None:
    compare(*pair())
    logs = sorted(Path("artifacts").rglob("train.log"))
    assert len(logs) == 3
    before = [log.stat().st_mtime_ns for log in logs]
    assert compare(*pair()).exit_code == 0
    assert [log.stat().st_mtime_ns for log in logs] == before
    assert compare(*pair(), "--fresh").exit_code == 0
    assert all(new.stat().st_mtime_ns > old for new, old in zip(logs, before, strict=True))


def test_a_failed_training_is_named_the_others_report_and_the_exit_code_is_1() -> None:
    result = compare(*pair("fail"))
    assert result.exit_code == 1
    said = " ".join(result.output.split())
    assert "optimized-1 failed: RuntimeError: the fake GPU melted" in said
    assert "The whole log: artifacts/runs/compare/a-vs-b-own/optimized-1/train.log" in said
    page = Path("out/report.html").read_text()
    assert "the fake GPU melted" in page
    assert json.loads(Path("out/a-vs-b.json").read_text())["judged"]["sides"]["baseline"]["step_ms"] is not None


def test_an_optimised_run_without_a_dispatch_fails() -> None:
    result = compare(*pair("no-dispatch"))
    assert result.exit_code == 1
    assert "optimized-1 did not use the kernels" in " ".join(result.output.split())


def test_strict_fails_on_a_claim_that_does_not_hold(tmp_path: Path) -> None:
    slow = builders.comparison()
    slow.experts["measurements"][2] = builders.layer_row("moe_kernels", 2.9, 7.0, 12, 481.0)
    command.save(slow, tmp_path / "in" / "mixtral.json")
    assert compare("--report-only", "in", "--out", "out").exit_code == 0
    assert compare("--report-only", "in", "--out", "out", "--strict").exit_code == 1


def test_reports_of_several_calls_are_merged() -> None:
    for name in ("mixtral", "qwen2-moe"):
        command.save(builders.comparison(name=name), Path(name) / f"{name}.json")
    result = compare("--report-only", "mixtral", "qwen2-moe/qwen2-moe.json", "--out", "merged")
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in Path("merged").iterdir()) == [
        "mixtral.json",
        "qwen2-moe.json",
        "report.html",
        "report.md",
    ]
    page = Path("merged/report.html").read_text()
    assert 'id="mixtral"' in page
    assert 'id="qwen2-moe"' in page


def test_reports_of_one_name_are_numbered_and_of_another_size_are_named_so() -> None:
    found = [{}, {}, {"size": "tiny", "gpu": None}, {"name": "Mixtral"}, {"name": "how"}]
    for number, changes in enumerate(found):
        command.save(builders.comparison(**changes), Path("in") / f"{number}.json")
    result = compare("--report-only", "in", "--out", "out")
    assert result.exit_code == 0, result.output
    names = ("mixtral", "mixtral-2", "mixtral-tiny", "Mixtral-3", "how-2")
    assert {path.stem for path in Path("out").glob("*.json")} == set(names)
    page = Path("out/report.html").read_text()
    assert all(page.count(f'id="{name.lower()}"') == 1 for name in (*names, "how"))


@pytest.mark.parametrize(
    ("arguments", "folder"),
    [
        (("mixtral",), "mixtral-tiny"),
        (("all",), "all-tiny"),
        (("qwen2-moe", "mixtral", "deepseek-v3"), "all-tiny"),
        (("mixtral", "qwen2-moe"), "mixtral-qwen2-moe-tiny"),
        (("qwen3-moe", "gpt-oss"), "qwen3-moe-gpt-oss-tiny"),
        (("all", "gpt-oss"), "mixtral-qwen2-moe-deepseek-v3-gpt-oss-tiny"),
        (("all", "--lora", "8"), "all-lora8-tiny"),
    ],
    ids=str,
)
def test_the_report_folder_tells_what_was_compared(
    arguments: tuple[str, ...], folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "run_pair", lambda pair, *_: builders.comparison(name=pair.name, size=pair.size))
    result = compare(*arguments, "--size", "tiny")
    assert result.exit_code == 0, result.output
    assert [path.name for path in Path("artifacts/compare").iterdir()] == [folder]
    asked = {name for name in arguments if name in ALL_FAMILIES} | (FAMILIES.keys() if "all" in arguments else set())
    page = Path("artifacts/compare", folder, "report.html").read_text()
    assert all(f'id="{family}' in page for family in asked)
    assert len([*Path("artifacts/compare", folder).glob("*.json")]) == len(asked)


def test_liger_on_a_pair_of_the_users_own_is_a_comparison_of_its_own() -> None:
    pair()
    files = Path("a.yml"), Path("b.yml")
    plain, liger = (files_pair(*files, Options(warmup_steps=2, liger=on)) for on in (False, True))
    assert (plain.label, liger.label) == ("a-vs-b", "a-vs-b-liger")
    assert plain.folder != liger.folder


def test_keys_of_both_runs() -> None:
    files = pair()[:2]
    given = "sequence_len=64", "gradient_checkpointing_kwargs.use_reentrant=true", "special.a.b=[1, two]"
    for names in (files, ("mixtral", "--size", "tiny")):
        settings = [part for text in given for part in ("--set", text)]
        shown = compare(*names, *settings, "--warmup-steps", "2", "--dry-run")
        assert shown.exit_code == 0, shown.output
    for made in (
        files_pair(*map(Path, files), Options(warmup_steps=2, settings=given)),
        family_pair("mixtral", Options(settings=given)),
    ):
        assert made.name.endswith(f"-set-{digest(given)}")
        for run in made.runs:
            assert run.config["sequence_len"] == 64
            assert run.config["gradient_checkpointing_kwargs"] == {"use_reentrant": True}
            assert run.config["special"] == {"a": {"b": [1, "two"]}}
    names = {family_pair("mixtral", Options(settings=(f"seed={n}",))).name for n in ("1", "-1", "1.0", "[1]", "(1)")}
    assert len(names) == 5, "one folder each"
    assert family_pair("mixtral", Options(settings=("attn_implementation=eager",))).name.endswith(
        "-attn_implementation-eager"
    )


def test_keys_of_the_kernels_go_to_the_runs_with_the_kernels() -> None:
    """In the others our plugin, which Axolotl 0.21 loads for every run, refuses them."""
    baseline, optimized, again = family_pair(
        "mixtral", Options(settings=("moe_group_size=64", "moe_fused_router=true", "seed=7"))
    ).runs
    for run in (baseline, again):
        assert run.config["seed"] == 7
        assert not [key for key in run.config if key.startswith("moe_")]
    assert [optimized.config[key] for key in ("moe_group_size", "moe_fused_router", "seed")] == [64, True, 7]


def test_a_mapping_keeps_its_other_keys() -> None:
    one, both = (
        family_pair("qwen3-moe", Options(settings=("gradient_checkpointing_kwargs.x=1", *more))).runs[0].config
        for more in ((), ("gradient_checkpointing_kwargs.use_reentrant=true",))
    )
    assert one["gradient_checkpointing_kwargs"] == {"use_reentrant": False, "x": 1}
    assert both["gradient_checkpointing_kwargs"] == {"use_reentrant": True, "x": 1}


def test_a_finished_run_of_another_gpu_is_not_reported_as_this_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "visible_gpu", lambda: "0")
    logs, before = [], []
    for name in ("H100", "H200", "H200"):
        monkeypatch.setattr(command, "describe", lambda device, name=name: Gpu(f"NVIDIA {name}", "580", 80.0))
        assert compare(*pair()).exit_code == 0
        before, logs = logs, [log.stat().st_mtime_ns for log in sorted(Path("artifacts").rglob("train.log"))]
        if name == "H100":
            first = logs
    assert before == logs != first


def test_another_comparison_at_work_is_named() -> None:
    arguments = pair()
    with command.claimed(Path("artifacts/runs/compare/a-vs-b-own")):
        result = compare(*arguments)
    assert result.exit_code == 2
    assert "Another `moe-kernels compare` is at work in artifacts/runs/compare/a-vs-b-own." in result.output


def test_nothing_is_trained_where_one_of_all_is_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[str] = []
    monkeypatch.setattr(command, "run_pair", lambda pair, *_: trained.append(pair.name))
    with command.claimed(Path("artifacts/runs/compare/qwen2-moe-tiny")):
        result = compare("mixtral", "qwen2-moe", "--size", "tiny")
    assert (result.exit_code, trained) == (2, [])
    assert "from another current directory" in " ".join(result.output.split())


def test_a_dry_run_shows_the_plan_and_writes_nothing() -> None:
    result = compare(*pair(), "--dry-run")
    assert result.exit_code == 0
    assert "+moe_kernels: true" in result.output
    assert "baseline-2" in result.output
    assert not Path("artifacts").exists()
    assert not Path("out").exists()


def test_a_limit_that_is_no_number() -> None:
    result = compare(*pair(), "--timeout", "nan")
    assert result.exit_code == 2, result.output
    assert "--timeout is nan: name a number of minutes" in result.output
    assert not Path("artifacts").exists()


def test_a_family_has_its_own_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "visible_gpu", lambda: "0")
    result = compare("gpt-oss", "--size", "30b", "--dry-run")
    assert result.exit_code == 2, result.output
    assert "gpt-oss has no size 30b: choose from 20b, tiny." in " ".join(result.output.split())
    shown = compare("qwen3-moe", "gpt-oss", "mixtral", "--dry-run")
    assert [line.split(",")[0] for line in shown.output.splitlines() if "warm-up steps" in line] == [
        "qwen3-moe (30b)", "gpt-oss (20b)", "mixtral (1b)",
    ]  # fmt: skip


def test_liger_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "visible_gpu", lambda: "0")
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    result = compare("qwen3-moe", "--liger", "--dry-run")
    assert result.exit_code == 3, result.output
    assert "pip install liger-kernel" in result.output


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("llama",), 2, "There is nothing called llama to compare"),
        (("a.yml", "nothing.yml", "--steps", "20"), 2, "There is no file"),
        (("mixtral", "--size", "7b"), 2, "--size 7b: choose from auto, 1b, tiny"),
        (("mixtral", "--size", "1b"), 3, "need an NVIDIA GPU"),
        (("qwen3-moe", "--size", "30b"), 3, "The 30b models need an NVIDIA GPU"),
        (("qwen3-moe", "--liger"), 3, "--liger needs an NVIDIA GPU"),
        (("mixtral", "--set", "seed"), 2, "--set 'seed' is no KEY=VALUE"),
        (("mixtral", "--set", "a..b=1"), 2, "is no KEY=VALUE"),
        (("mixtral", "--set", "seed=[1"), 2, "is not valid YAML"),
        (("mixtral", "--set", "a=2026-13-45"), 2, "'2026-13-45' is not valid YAML: month must be in 1..12"),
        (("mixtral", "--set", f"a={'[' * 3000}"), 2, "is not valid YAML"),
        (("mixtral", "--set", "a=2026-11-30"), 2, "--set: a is datetime.date(2026, 11, 30), and a run file"),
        (("mixtral", "--set", "a={1: 2, b: 3}"), 2, "--set: a is {1: 2, 'b': 3}, and a run file holds text"),
        (("mixtral", "--set", "sequence_len=4k"), 2, "--set: sequence_len should be a number from 1 on and is '4k'"),
        (("mixtral", "--set", "use_scattermoe=true"), 2, "--set cannot change use_scattermoe, which compare sets"),
        (("mixtral", "--set", "max_steps=9"), 2, "--set cannot change max_steps, which compare sets itself"),
        (("mixtral", "--set", "seed.x=9"), 2, "--set seed.x: seed is no mapping of that depth"),
        (("mixtral", "--wandb", "on"), 2, "--wandb on: choose from offline, online"),
        (("mixtral", "--steps", "5", "--dry-run"), 2, "leave less than the three to time"),
        (("all", "llama", "--dry-run"), 2, "There is nothing called llama to compare"),
        (
            ("a.yml", "b.yml", "--out", "file/x", "--warmup-steps", "2"),
            2,
            "file/x cannot be the report's folder: a file is in its place",
        ),
        (("a.yml", "b.yml", "--out", "file", "--warmup-steps", "2"), 2, "file cannot be the report's folder"),
        (("--report-only", "nowhere"), 2, "There is no report JSON at nowhere"),
    ],
)
def test_wrong_usage_says_what_and_the_cure(arguments: tuple[str, ...], code: int, message: str) -> None:
    Path("file").touch()
    pair()
    result = compare(*arguments)
    assert result.exit_code == code, result.output
    assert not Path("artifacts").exists()
    assert message in " ".join(result.output.split())
