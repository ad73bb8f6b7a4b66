"""What the report reads: whatever is in the files, there is a report, or a sentence, and never an altered number."""

from __future__ import annotations

import html.parser
import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from budget import fuzz
from hypothesis import given
from hypothesis import strategies as st
from mutate import mutated_bytes, mutated_json

sys.path.insert(0, str(Path(__file__).parents[1] / "compare"))
import builders

from moe_kernels.telemetry import load as router_load
from moe_kernels.telemetry.load import LayerLoad, RouterHistory, read_history
from moe_kernels.tools.common.errors import UsageError
from moe_kernels.tools.common.files import write_json
from moe_kernels.tools.compare import report
from moe_kernels.tools.compare.comparison import Analysis, Comparison, load, save
from moe_kernels.tools.compare.experts_bench import _stored
from moe_kernels.tools.compare.pair import RunSpec
from moe_kernels.tools.compare.runner import (
    RECORD,
    LogReader,
    Machine,
    RunResult,
    _read_record,
    fingerprint,
    finished_result,
)

randoms = st.randoms(use_true_random=False)


def small_comparison() -> Comparison:
    """As in the tests of the report, with less of everything that is only more of the same."""
    comparison = builders.comparison()
    for run in comparison.runs:
        run.rows = run.rows[:14]
        for name, series in vars(run.samples).items():
            if isinstance(series, list):
                setattr(run.samples, name, series[::60])
    comparison.runs[1].router = history(3)
    return comparison


def history(steps: int) -> RouterHistory:
    loads = [[LayerLoad((step, 1), 9 + step), LayerLoad((0, step, 2), 10 + step)] for step in range(1, steps + 1)]
    return RouterHistory(
        ["a", "b"],
        [2, 3],
        [*range(1, steps + 1)],
        [[[*load.tokens] for load in pair] for pair in loads],
        [[load.rows for load in pair] for pair in loads],
    )


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("stored") / "mixtral.json"
    save(small_comparison(), path)
    return json.loads(path.read_bytes())


@fuzz(3)
@given(random=randoms)
def test_reports(
    count: Callable[[], None],
    stored: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
    random: Random,
) -> None:
    count()
    folder = tmp_path_factory.getbasetemp() / "report"
    folder.mkdir(exist_ok=True)
    (folder / "x.json").write_bytes(mutated_json(stored, random))
    try:
        [comparison] = load(folder / "x.json")
    except UsageError as error:
        said = str(error)
    else:
        said = ""
    if said:
        assert "\n" not in said.strip()
        assert len(said) < 600
        return
    # Plots take most of the time.
    with pytest.MonkeyPatch.context() as patch:
        if random.random() < 0.95:
            patch.setattr(report, "plots", lambda analysis: [])
        report.write_report([Analysis(comparison)], folder)
    save(comparison, folder / "again.json")
    # As text: a NaN is not equal to itself.
    assert repr(load(folder / "again.json")) == repr([comparison])


@fuzz(3)
@given(random=randoms)
def test_records(count: Callable[[], None], tmp_path_factory: pytest.TempPathFactory, random: Random) -> None:
    count()
    folder = tmp_path_factory.getbasetemp() / "recorded"
    run = RunSpec("baseline-1", "baseline", Path("a.yml"), {}, {"max_steps": 40}, folder, uses_kernels=False)
    whole = small_comparison().runs[0]
    first = {"experts": "grouped_mm", "frozen": {}, "weights": "", "wandb": {"project": "p", "id": "i", "name": "n"}}
    lines = [json.dumps(entry) + "\n" for entry in (first, *whole.rows)]
    folder.mkdir(exist_ok=True)
    (folder / RECORD).write_bytes(mutated_bytes("".join(lines).encode(), random))
    result = replace(whole, rows=[], wandb={})
    try:
        _read_record(run, result)
    except ValueError:
        assert result.rows == []
        return
    result.check()


@fuzz(2)
@given(
    pieces=st.lists(
        st.text(max_size=40)
        | st.sampled_from(
            ["{'loss': '7.5'}\n", "moe_kernels: backend=x\r", "\x1b["]
        )
    )
)
def test_logs(count: Callable[[], None], pieces: list[str]) -> None:
    count()
    whole, parts = LogReader(), LogReader()
    whole.feed("".join(pieces) + "\n")
    for piece in pieces:
        parts.feed(piece)
    parts.feed("\n")
    whole.trainer_started_at = parts.trainer_started_at = None
    assert whole == parts


@fuzz(2)
@given(random=randoms)
def test_router_histories(
    count: Callable[[], None], tmp_path_factory: pytest.TempPathFactory, random: Random
) -> None:
    count()
    path = tmp_path_factory.getbasetemp() / router_load.FILE_NAME
    known = history(6)
    lines = [router_load.head(known.layers, known.experts, 0)]
    lines += [router_load.record(step, [known.load(step - 1, 0), known.load(step - 1, 1)]) for step in known.steps]
    path.write_bytes(mutated_bytes("".join(lines).encode(), random))
    try:
        found = read_history(path)
    except ValueError:
        return
    found.check()
    for record in range(len(found.steps)):
        imbalance, entropy, _, dropped = found.numbers(record, record + 1)
        assert all(math.isfinite(value) for value in (*imbalance, *entropy, *dropped))


@fuzz(1)
@given(random=randoms)
def test_stored_results(count: Callable[[], None], tmp_path_factory: pytest.TempPathFactory, random: Random) -> None:
    """A run is taken from the store as it was written, or run again."""
    count()
    folder = tmp_path_factory.getbasetemp() / "run"
    run = RunSpec("baseline-1", "baseline", Path("a.yml"), {}, {"max_steps": 40}, folder, uses_kernels=False)
    machine = Machine(device=None, versions={"python": "3"})
    result: RunResult = small_comparison().runs[0]
    result.fingerprint = fingerprint(run, machine)
    write_json(folder / "result.json", asdict(result))
    text = (folder / "result.json").read_bytes()
    changed = mutated_json(json.loads(text), random)
    (folder / "result.json").write_bytes(changed)
    found = finished_result(run, machine)
    if found is not None:
        found.check()
        assert found.fingerprint == result.fingerprint


@fuzz(1)
@given(random=randoms)
def test_stored_layers(count: Callable[[], None], tmp_path_factory: pytest.TempPathFactory, random: Random) -> None:
    count()
    path = tmp_path_factory.getbasetemp() / "answer.json"
    path.write_bytes(mutated_json({**builders.experts(), "fingerprint": "f"}, random))
    answer = _stored(path)
    assert answer is None or "fingerprint" in answer


class Page(html.parser.HTMLParser):
    """Which elements and attributes a page has."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}


def structure(text: str) -> Page:
    page = Page()
    page.feed(text)
    return page


HOSTILE = st.sampled_from(
    ["<script>alert(1)</script>", "<img src=x onerror=alert(1)>", '" onmouseover="alert(1)', "</style><svg onload=1>",
     "{{ 7 * 7 }}", "{% raw %}", "\n````\n<b>", "<!--", "]]>", "&lt;", "javascript:alert(1)", "a|b\nc",
     "\u202e", "$\\frac{1}{0}$"]
)  # fmt: skip


@fuzz(0.3)
@given(words=st.lists(HOSTILE | st.text(max_size=8), min_size=12, max_size=12))
def test_pages_escape_what_they_show(
    count: Callable[[], None], tmp_path_factory: pytest.TempPathFactory, words: list[str]
) -> None:
    count()
    folder = tmp_path_factory.getbasetemp() / "page"
    plain = small_comparison()
    report.write_report([Analysis(plain)], folder)
    before = structure((folder / "report.html").read_text())
    hostile = small_comparison()
    hostile.name, hostile.size, hostile.command, hostile.cpu, hostile.created = words[:5]
    hostile.files, hostile.yaml_diff, hostile.versions = words[5:7], words[7], {"torch": words[8]}
    run = hostile.runs[1]
    run.error, run.plugin_line, run.tail, run.experts = words[9], words[10], [words[11]], words[8]
    run.overrides, run.wandb = {"max_steps": words[11]}, {"project": words[9], "name": words[10]}
    run.status, run.router.layers = "failed", words[:2]
    hostile.experts["error"] = words[3]
    hostile.experts["measurements"][0] |= {"ok": False, "note": words[4], "dtype": words[5]}
    assert hostile.gpu is not None
    hostile.gpu = replace(hostile.gpu, name=words[6])
    report.write_report([Analysis(hostile)], folder)
    after = structure((folder / "report.html").read_text())
    assert after.tags <= before.tags | {"section", "ul", "li", "p", "nav"}
    assert after.attributes <= before.attributes | {"role"}
    assert not [line for line in outside_code((folder / "report.md").read_text()) if "<" in line]


def outside_code(markdown: str) -> list[str]:
    """The lines of a Markdown text that are not in a fenced block."""
    found, fence = [], ""
    for line in markdown.split("\n"):
        ticks = line[: len(line) - len(line.lstrip("`"))]
        if fence:
            fence = "" if line.rstrip() == fence else fence
        elif len(ticks) >= 3:
            fence = ticks
        else:
            found.append(line)
    assert not fence, "a block is not closed"
    return found
