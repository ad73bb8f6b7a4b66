"""The page, the Markdown and the JSON, from synthetic comparisons."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from builders import STEPS, comparison, losses, run

from moe_kernels.telemetry.load import RouterHistory
from moe_kernels.tools.common.errors import UsageError
from moe_kernels.tools.compare import figures
from moe_kernels.tools.compare.comparison import Analysis, Comparison, load, save
from moe_kernels.tools.compare.report import banner, router_table, write_report

EVIL = "<script>alert('x')</script>"
VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Collects what a browser would load, and checks that every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1:] == [tag], f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()


def evil_comparison() -> Comparison:
    found = comparison(
        name=f"evil {EVIL}", cpu=EVIL, yaml_diff=f"+wandb_name: {EVIL}", files=[EVIL, "b.yml"], command=EVIL
    )
    found.runs[0].wandb["name"] = EVIL
    found.runs[0].plugin_line = EVIL
    found.versions["torch"] = EVIL
    return found


def failed_comparison() -> Comparison:
    failed = run("optimized-1", 150.0, losses=[], status="failed", error=f"boom {EVIL}", tail=[EVIL])
    return comparison(
        name="qwen2-moe", runs=[run("baseline-1", 187.0), failed], experts={"error": "crashed", "measurements": []}
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report")
    write_report([Analysis(found) for found in (comparison(), evil_comparison(), failed_comparison())], path)
    return path


def test_the_page_is_whole_and_loads_nothing(folder: Path) -> None:
    page = Page((folder / "report.html").read_text())
    assert page.open == []
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "use-external"}
    for tag, attributes in page.tags:
        for key in ("src", "href", "xlink:href", "srcset", "data", "poster"):
            value = attributes.get(key)
            assert value is None or value.startswith("#"), (tag, key, value)
    text = (folder / "report.html").read_text()
    assert not re.search(r"url\((?!#)", text)
    assert "@import" not in text


def test_names_are_escaped(folder: Path) -> None:
    text = (folder / "report.html").read_text()
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "<script" not in re.sub(r"```.*?```", "", (folder / "report.md").read_text(), flags=re.S)


def test_ids_are_unique_so_that_plots_do_not_mix(folder: Path) -> None:
    ids = [
        attributes["id"] for _, attributes in Page((folder / "report.html").read_text()).tags if "id" in attributes
    ]
    assert len(ids) > 20
    assert len(ids) == len(set(ids))


def test_plots_have_words_and_tables_have_headers(folder: Path) -> None:
    page = Page((folder / "report.html").read_text())
    images = [attributes for _, attributes in page.tags if attributes.get("role") == "img"]
    assert len(images) >= 14
    assert all(len(attributes["aria-label"] or "") > 20 for attributes in images)
    tables = sum(tag == "table" for tag, _ in page.tags)
    assert sum(tag == "thead" for tag, _ in page.tags) == tables
    assert all(attributes.get("scope") for tag, attributes in page.tags if tag == "th")


def test_the_numbers_are_on_the_page(folder: Path) -> None:
    text = (folder / "report.html").read_text()
    for expected in ("1.25×", "187 ms → 150 ms", "2.14×", "20.00 → 18.00", "60 → 12", "41% → 26%", "NVIDIA H200"):
        assert expected in text, expected
    markdown = (folder / "report.md").read_text()
    for expected in ("1.25×", "187 ms → 150 ms", "| claim | verdict | measured |", "+moe_kernels: true"):
        assert expected in markdown, expected


def test_a_failed_run_is_said_first(folder: Path) -> None:
    text = (folder / "report.html").read_text()
    assert text.index("Read this first") < text.index("Summary")
    for page in (text, (folder / "report.md").read_text()):
        assert "optimized-1 failed: boom" in page
    assert "the expert layer was not measured: crashed" in text


def test_a_cpu_report_says_what_it_proves_and_shows_no_speed_on_a_card(tmp_path: Path) -> None:
    text = write_report([Analysis(comparison(gpu=None))], tmp_path).read_text()
    assert "Pipeline check, not a benchmark" in text
    cards = re.search(r'<ul class="cards">.*?</ul>', text, re.S)
    assert cards is not None
    assert "×" not in cards.group()
    assert "3 of 3" in cards.group()
    assert "Pipeline check" not in write_report([Analysis(comparison())], tmp_path).read_text()


def test_the_json_is_valid_and_read_back(tmp_path: Path) -> None:
    values = losses()
    values[3] = float("nan")
    before = comparison(runs=[run("baseline-1", 187.0), run("optimized-1", 150.0, calls=10, losses=values)])
    save(before, tmp_path / "mixtral.json")

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    data = json.loads((tmp_path / "mixtral.json").read_text(), parse_constant=refuse)
    assert data["judged"]["speedup"] == pytest.approx(187 / 150, abs=1e-4)
    (after,) = load(tmp_path)
    assert "is nan at step 4" in Analysis(after).loss.words
    before.runs[1].rows[3]["train/loss"] = after.runs[1].rows[3]["train/loss"] = 0.0
    assert after == before


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not JSON"), ("[]", "is not a report"), ('{"schema": "other"}', "is not a report")],
)
def test_another_json_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UsageError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"planned": [], "runs": []}, "no run of the baseline, or none with moe-kernels"),
        ({"planned": ["baseline-1"]}, "no run of the baseline, or none with moe-kernels"),
        ({"planned": ["baseline-1", "optimized-1"]}, "'baseline-2' of role 'baseline' was not planned"),
        ({"runs.1.rows": []}, "optimized-1 finished without a step"),
        ({"runs.2.rows": []}, "baseline-2 finished without a step"),
        ({"runs.2.rows.3.train/loss": None}, r"baseline-2: rows\[3\].train/loss should be a number"),
        ({"name": "../../evil"}, "is no plain name"),
        ({"name": ".."}, "is no plain name"),
        ({"name": "a\0b"}, "is no plain name"),
        ({"name": "a" * 300}, "too long"),
        ({"size": "/tmp"}, "is no plain name"),
        ({"experts.measurements.0.forward_ms": None}, "has one of forward_ms and forward_backward_ms alone"),
    ],
)
def test_a_report_that_lacks_something_or_names_another_place_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    save(comparison(), tmp_path / "a.json")
    data = json.loads((tmp_path / "a.json").read_text())
    for where, value in change.items():
        *parts, last = where.split(".")
        place = data
        for part in parts:
            place = place[int(part) if part.isdecimal() else part]
        place[last] = value
    (tmp_path / "a.json").write_text(json.dumps(data))
    with pytest.raises(UsageError, match=message):
        load(tmp_path)


def test_a_dollar_sign_is_no_formula(tmp_path: Path) -> None:
    found = comparison()
    found.experts["measurements"][0]["implementation"] = "a$^{$b"
    assert "a$^{$b" in write_report([Analysis(found)], tmp_path).read_text()


def test_the_first_time_belongs_to_the_second_step(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.plot", lambda axes, x, y, **line: drawn.append(list(x)))
    for warmup, first in ((0, 2), (1, 2), (10, 11)):
        drawn.clear()
        figures._step_times(Analysis(comparison(warmup_steps=warmup)))
        assert {(steps[0], steps[-1]) for steps in drawn} == {(first, STEPS)}


def test_a_merged_report_says_which_part_has_no_gpu(tmp_path: Path) -> None:
    both = [comparison(), comparison(name="mine", gpu=None)]
    assert banner([Analysis(both[0])]) is None
    assert "tiny" not in (banner([Analysis(both[1])]) or "tiny")
    text = write_report([Analysis(found) for found in both], tmp_path).read_text()
    assert "No GPU for mine: trained on the CPU" in text
    assert "NVIDIA H200, driver 580; a processor" in text


def test_pairs_of_several_days_name_both_ends(tmp_path: Path) -> None:
    days = ("2026-01-03", "2026-01-01", "2026-01-02")
    pairs = [Analysis(comparison(name=day, created=f"{day}T00:00:00+00:00")) for day in days]
    assert "2026-01-01 to 2026-01-03" in write_report(pairs, tmp_path).read_text()
    assert "2026-01-03" in (alone := write_report(pairs[:1], tmp_path).read_text())
    assert "2026-01-03 to" not in alone


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="There is no report JSON"):
        load(tmp_path)


def test_a_wrong_implementation_is_shown_with_its_nan(tmp_path: Path) -> None:
    """JSON has no NaN: what the layer's measurement left is the word, in a report as in its own file."""
    found = comparison()
    for number, (out, dx) in enumerate((("nan", 4e-3), (3e-3, "nan"), (3e-3, float("nan")))):
        row = found.experts["measurements"][number]
        row["rel_error"] = {"out": out, "dx": dx}
        row["dense_fraction"] = "inf" if number else 0.5
    folder = tmp_path / "report"
    write_report([Analysis(found)], folder)
    save(found, folder / "x.json")
    [again] = load(folder / "x.json")
    write_report([Analysis(again)], folder)
    line = next(line for line in (folder / "report.md").read_text().splitlines() if "largest relative error" in line)
    assert line.count("nan") == 3
    assert "4.0e-03" in line  # that of the fourth implementation


def test_the_router_is_told_by_steps_where_records_become_rare() -> None:
    """A long training has most of its records at its begin."""
    found = comparison()
    steps = [*range(1, 101), *range(110, 1001, 10)]
    tokens = [[[30, 10] if step <= 100 else [20, 20] if step <= 900 else [40, 0]] for step in steps]
    found.runs[1].router = RouterHistory(["layers.0"], [2], steps, tokens, [[40] for _ in steps])
    analysis = Analysis(found)
    [[name, imbalance, _, unused]] = router_table(analysis).rows
    assert (name, imbalance, unused) == ("layers.0", "1.50× → 2.00×", "1 of 2")
    [heat_map] = [plot for plot in figures.plots(analysis) if plot.title == "Load of every expert over time"]
    assert "from step 1 to 1000" in heat_map.alt


@pytest.mark.parametrize("steps", [[0], [7], [0, 3], [5, 6], [2**62, 2**63 - 1]])
def test_few_records_are_drawn(steps: list[int]) -> None:
    found = comparison()
    records = [[[1, 2]] for _ in steps]
    found.runs[1].router = RouterHistory(["layers.0"], [2], steps, records, [[3] for _ in steps])
    titles = [plot.title for plot in figures.plots(Analysis(found))]
    assert "Load of every expert over time" in titles
    assert len(router_table(Analysis(found)).rows) == 1
