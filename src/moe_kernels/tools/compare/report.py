"""Writes what the comparisons found: an HTML page, Markdown and the terminal's tables, from the same rows."""

from __future__ import annotations

import math
import platform
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from moe_kernels.tools.bench.timing import Spread
from moe_kernels.tools.common.files import write_text
from moe_kernels.tools.common.runfile import dump_yaml
from moe_kernels.tools.compare.comparison import Analysis, Comparison, slug
from moe_kernels.tools.compare.figures import plain, plots, routed
from moe_kernels.tools.compare.judge import CONFIRMED, NOT_CONFIRMED, NOT_JUDGED
from moe_kernels.tools.compare.metrics import OURS, SideMetrics
from moe_kernels.tools.compare.plan import BASELINE, EAGER, FOLDERS, OPTIMIZED
from moe_kernels.tools.compare.runner import FINISHED

NONE = "–"
COLUMNS = {BASELINE: "baseline", OPTIMIZED: "moe-kernels", EAGER: "eager"}
LOSS_WORDS = {CONFIRMED: "agree", NOT_CONFIRMED: "DIFFER", NOT_JUDGED: "not judged"}
VERDICT_STYLE = {CONFIRMED: "green", NOT_CONFIRMED: "red"}


@dataclass(frozen=True)
class Table:
    """Rows of text; the first column names the row."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Card:
    """One number to remember, and what it is."""

    value: str
    label: str
    detail: str


def write_report(analyses: Sequence[Analysis], folder: Path) -> Path:
    """Write ``report.html`` and ``report.md`` into a folder and return the page's path."""
    import jinja2

    folder.mkdir(parents=True, exist_ok=True)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("moe_kernels.tools.compare", "."),
        autoescape=jinja2.select_autoescape(["html.j2"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"cell": _markdown_cell, "fenced": _markdown_block}
    page = folder / "report.html"
    values = _values(analyses)
    write_text(page, environment.get_template("report.html.j2").render(values, plots=plots))
    write_text(folder / "report.md", environment.get_template("report.md.j2").render(values))
    return page


def show_comparison(analysis: Analysis, console: Console) -> None:
    """Print the main tables of one comparison."""
    for warning in (banner([analysis]), analysis.other_baseline):
        if warning is not None:
            console.print(Text(warning, style="yellow"), soft_wrap=True)
    for table in (training_table(analysis), layer_table(analysis)):
        if table.rows:
            console.print(_rich(table))
    for claim in analysis.claims:
        style = VERDICT_STYLE.get(claim.verdict, "yellow")
        console.print(Text.assemble((f"{claim.verdict:>21}  ", style), claim.title, (f": {claim.evidence}", "dim")))


def show_failures(comparison: Comparison, console: Console) -> None:
    """Print what went wrong in each failed run, and where its log is."""
    for run in comparison.runs:
        if run.status != FINISHED:
            console.print(Text(f"{comparison.label} {run.run_id} failed: {run.error}", style="red"), soft_wrap=True)
            for line in run.tail[-12:]:
                console.print(Text(f"  {line}", style="dim"), soft_wrap=True)
            console.print(f"  The whole log: {run.log}", soft_wrap=True)
    if comparison.experts.get("error"):
        console.print(
            Text(
                f"{comparison.label}: the expert layer was not measured: {comparison.experts['error']}",
                style="red",
            )
        )


def _values(analyses: Sequence[Analysis]) -> dict[str, Any]:
    return {
        "title": "Axolotl training with and without moe-kernels",
        "machine": "; ".join(dict.fromkeys(_machine(analysis.comparison) for analysis in analyses)),
        "created": analyses[0].comparison.created[:10],
        "banner": banner(analyses),
        "problems": [problem for analysis in analyses for problem in problems(analysis)],
        "summary": summary_table(analyses),
        "analyses": analyses,
        "cards": cards,
        "claims": claims_table,
        "tables": lambda analysis: [
            table
            for table in (
                training_table(analysis),
                layer_table(analysis),
                share_table(analysis),
                loss_table(analysis),
                router_table(analysis),
            )
            if table.rows
        ],
        "runs": runs_table,
        "overrides": _overrides,
        "slug": slug,
        "versions": versions_table(analyses),
        "commands": list(dict.fromkeys(analysis.comparison.command for analysis in analyses)),
        "system": f"{platform.system()} {platform.machine()}",
    }


def banner(analyses: Sequence[Analysis]) -> str | None:
    """What to know of comparisons that ran on a CPU; None where none did."""
    on_cpu = [analysis.comparison.label for analysis in analyses if not analysis.on_gpu]
    if not on_cpu:
        return None
    which = "No GPU here: the models were" if len(on_cpu) == len(analyses) else f"No GPU for {', '.join(on_cpu)}:"
    return (
        f"{which} trained on the CPU through the plain-torch backend. This proves that the whole pipeline works on "
        "your machine. It says nothing about speed."
    )


def _machine(comparison: Comparison) -> str:
    gpu = comparison.gpu
    return f"{gpu['name']}, driver {gpu['driver']}" if gpu else comparison.cpu


def problems(analysis: Analysis) -> list[str]:
    """What a reader must know before any number."""
    name = analysis.comparison.label
    found = [f"{name} {run.run_id} failed: {run.error} (log: {run.log})" for run in analysis.failed]
    found += [f"{name} {run_id} was not run" for run_id in analysis.missing]
    found += [f"{name}: {fault}" for fault in analysis.faults]
    found += [f"{name}: {analysis.other_baseline}"] if analysis.other_baseline else []
    if analysis.loss.verdict == NOT_CONFIRMED:
        found.append(f"{name}: the losses do not agree: {analysis.loss.words}")
    elif analysis.loss.verdict != CONFIRMED:
        found.append(f"{name}: the losses cannot be judged: {analysis.loss.words}")
    return found


def cards(analysis: Analysis) -> list[Card]:
    """The numbers at the head of a comparison."""
    before, after = analysis.sides[BASELINE], analysis.sides[OPTIMIZED]
    found = [] if analysis.on_gpu else _pipeline_cards(analysis)
    if analysis.on_gpu and analysis.speedup and before.step_ms and after.step_ms:
        found.append(
            Card(
                f"{analysis.speedup:.2f}×",
                "training step",
                f"{_ms(before.step_ms.median)} → {_ms(after.step_ms.median)}",
            )
        )
    for stock in ("grouped_mm", "eager") if analysis.on_gpu else ():
        ratio = analysis.ratio(stock, "forward_ms")
        both = analysis.ratio(stock, "forward_backward_ms")
        if ratio and both:
            found.append(
                Card(f"{ratio:.2f}×", f"expert forward, against {stock}", f"{both:.2f}× forward and backward")
            )
    if before.peak_allocated_gib and after.peak_allocated_gib:
        change = after.peak_allocated_gib / before.peak_allocated_gib - 1
        found.append(
            Card(
                f"{change:+.1%}",
                "peak memory",
                f"{before.peak_allocated_gib:.2f} → {after.peak_allocated_gib:.2f} GiB",
            )
        )
    if analysis.loss.mean is not None:
        found.append(
            Card(
                LOSS_WORDS[analysis.loss.verdict].lower(),
                "loss curves",
                f"mean difference {analysis.loss.mean:.2g}, tolerance {analysis.loss.tolerance:.2g}",
            )
        )
    return found


def _pipeline_cards(analysis: Analysis) -> list[Card]:
    """Without a GPU a ratio of times would be read as a result: say what was proven instead."""
    finished = len(analysis.runs) - len(analysis.failed)
    calls = analysis.sides[OPTIMIZED].expert_calls
    return [
        Card(
            f"{finished} of {len(analysis.comparison.planned)}",
            "trainings finished",
            "real axolotl train runs",
        ),
        Card(f"{calls or 0:,}", "expert calls that moe-kernels took", "in the optimised run"),
    ]


def summary_table(analyses: Sequence[Analysis]) -> Table:
    """One column a comparison: baseline, then moe-kernels."""
    names = tuple(analysis.comparison.label for analysis in analyses)
    columns = [_summary(analysis) for analysis in analyses]
    rows = [(what, *(column[what] for column in columns)) for what in columns[0]]
    return Table("Summary", ("what", *names), tuple(row for row in rows if set(row[1:]) != {NONE}))


def _summary(analysis: Analysis) -> dict[str, str]:
    before, after = analysis.sides[BASELINE], analysis.sides[OPTIMIZED]
    launches = [(analysis.layer.get(name) or {}).get("launches_forward_backward") for name in ("grouped_mm", OURS)]
    shares = [found.fraction if (found := analysis.shares.get(role)) else None for role in (BASELINE, OPTIMIZED)]
    utilisation = _utilisation(before, after)
    limit = analysis.shares[BASELINE].limit if BASELINE in analysis.shares else None
    eager = _median(analysis.sides[EAGER].step_ms) if EAGER in analysis.sides else None
    ours = _median(after.step_ms) if analysis.speedup else None
    return {
        "training step, faster by": _times(analysis.speedup),
        "training step, against eager": _times(eager / ours if eager and ours else None),
        "training step": _arrow(_median(before.step_ms), _median(after.step_ms), _ms),
        "tokens/s": _arrow(_median(before.tokens_per_s), _median(after.tokens_per_s), "{:,.0f}".format),
        "most that any expert kernel could bring": _times(limit),
        "experts' share of the step": _arrow(shares[0], shares[1], "{:.0%}".format),
        "expert forward, against grouped_mm": _times(analysis.ratio("grouped_mm", "forward_ms")),
        "expert forward, against eager": _times(analysis.ratio("eager", "forward_ms")),
        "forward + backward, against grouped_mm": _times(analysis.ratio("grouped_mm", "forward_backward_ms")),
        "forward + backward, against eager": _times(analysis.ratio("eager", "forward_backward_ms")),
        "peak memory, GiB": _arrow(before.peak_allocated_gib, after.peak_allocated_gib, "{:.2f}".format),
        "launches a layer, grouped_mm → ours": _arrow(launches[0], launches[1], "{:.0f}".format),
        "tensor cores (else GPU) busy": _arrow(utilisation[0], utilisation[1], _percent),
        "loss curves": LOSS_WORDS[analysis.loss.verdict],
        "runs finished": f"{len(analysis.runs) - len(analysis.failed)} of {len(analysis.comparison.planned)}",
    }


def _utilisation(before: SideMetrics, after: SideMetrics) -> tuple[float | None, float | None]:
    """Tensor cores busy where the GPU counts that, else any kernel running."""
    if before.tensor_active is not None and after.tensor_active is not None:
        return before.tensor_active, after.tensor_active
    return before.gpu_busy, after.gpu_busy


def claims_table(analysis: Analysis) -> Table:
    """Each claim, its verdict and the numbers behind it."""
    rows = tuple((claim.title, claim.verdict, claim.evidence) for claim in analysis.claims)
    return Table("What holds here", ("claim", "verdict", "measured"), rows)


def training_table(analysis: Analysis) -> Table:
    """The trainings side by side."""
    roles = list(analysis.sides)
    getters: list[tuple[str, Callable[[SideMetrics], Any], Callable[[Any], str], bool]] = [
        ("step time", lambda side: side.step_ms, _spread_ms, True),
        ("tokens/s", lambda side: side.tokens_per_s, _spread_rate, True),
        ("peak memory allocated, GiB", lambda side: side.peak_allocated_gib, "{:.2f}".format, True),
        ("peak memory active, GiB", lambda side: side.peak_active_gib, "{:.2f}".format, True),
        ("tensor cores busy", lambda side: side.tensor_active, _percent, False),
        ("multiprocessors busy", lambda side: side.sm_active, _percent, False),
        ("memory bandwidth in use", lambda side: side.dram_active, _percent, False),
        ("any kernel running", lambda side: side.gpu_busy, _percent, False),
        ("power, W", lambda side: side.power_w, "{:.0f}".format, True),
        ("energy a step, J", lambda side: side.energy_j_per_step, "{:.1f}".format, True),
        ("start-up until the trainer runs, s", lambda side: side.startup_s, "{:.1f}".format, False),
        ("then to the end of the first step, s", lambda side: side.first_step_s, "{:.1f}".format, False),
        ("expert calls that moe-kernels took", lambda side: side.expert_calls, "{:,}".format, False),
        ("runs", lambda side: side.runs, str, False),
    ]
    rows: list[tuple[str, ...]] = [
        ("experts run on", *(analysis.implementation[role] for role in roles), ""),
    ]
    for name, get, form, change in getters:
        values = [get(analysis.sides[role]) for role in roles]
        if all(value is None for value in values):
            continue
        cells = [NONE if value is None else form(value) for value in values]
        rows.append((name, *cells, _change(values[0], values[1]) if change else ""))
    notes = {run.role: run.samples.note for run in analysis.comparison.runs if run.samples.note}
    if analysis.on_gpu and notes:
        rows.append(("note of the GPU sampling", *(notes.get(role, NONE) for role in roles), ""))
    return Table("Training", ("what", *(COLUMNS[role] for role in roles), "against baseline"), tuple(rows))


def layer_table(analysis: Analysis) -> Table:
    """One expert layer, each implementation on the same tensors in one process; or why it was not measured."""
    names = list(analysis.layer)
    note = analysis.comparison.experts.get("note")
    if note and not names:
        return Table("One expert layer", ("what", "why"), (("not measured", note),))
    forms: list[tuple[str, Callable[[dict[str, Any]], Any], Callable[[Any], str]]] = [
        ("forward, ms", lambda row: _at(row, "forward_ms"), plain),
        ("forward + backward, ms", lambda row: _at(row, "forward_backward_ms"), plain),
        (
            "forward + backward, GPU time alone, ms",
            lambda row: _at(row, "forward_backward_queued_ms"),
            plain,
        ),
        ("forward + backward, host time, ms", lambda row: _at(row, "forward_backward_host_ms"), plain),
        ("forward, TFLOP/s", lambda row: row.get("forward_tflops"), plain),
        ("forward + backward, TFLOP/s", lambda row: row.get("forward_backward_tflops"), plain),
        ("of the dense GEMMs' speed", lambda row: row.get("dense_fraction"), "{:.0%}".format),
        ("kernel launches, forward", lambda row: row.get("launches_forward"), str),
        ("kernel launches, forward + backward", lambda row: row.get("launches_forward_backward"), str),
        ("saved for backward, MiB", lambda row: row.get("saved_mb"), plain),
        ("peak, MiB", lambda row: row.get("peak_mb"), plain),
        (
            "largest relative error of output and gradients",
            lambda row: max(row["rel_error"].values(), key=lambda error: (math.isnan(error), error), default=None),
            "{:.1e}".format,
        ),
    ]
    rows = [
        (
            label,
            *(NONE if (value := get(analysis.layer[name])) is None else form(value) for name in names),
        )
        for label, get, form in forms
        if any(get(analysis.layer[name]) is not None for name in names)
    ]
    for label, key in (
        ("moe-kernels is faster, forward", "forward_ms"),
        ("moe-kernels is faster, forward + backward", "forward_backward_ms"),
    ):
        if rows:
            rows.append(
                (
                    label,
                    *(_times(analysis.ratio(name, key)) if name not in (OURS, "dense") else "" for name in names),
                )
            )
    notes = [(f"{name}: not timed", analysis.layer[name]["note"]) for name in names if not analysis.layer[name]["ok"]]
    rows += [(label, note, *[""] * (len(names) - 1)) for label, note in notes]
    layer = analysis.comparison.experts.get("layer")
    shape = (
        f"{layer['tokens']:,} tokens, H {layer['hidden']}, I {layer['intermediate']}, E {layer['experts']}, "
        f"K {layer['top_k']}, {next(iter(analysis.layer.values()))['dtype']}"
        if layer and names
        else ""
    )
    return Table(f"One expert layer ({shape})", ("what", *names), tuple(rows))


def share_table(analysis: Analysis) -> Table:
    """What part of the step the experts take, and what could be won at most."""
    rows = [
        (
            COLUMNS[role],
            found.implementation,
            f"{_ms(found.experts_ms)} of {_ms(found.step_ms)}",
            f"{found.fraction:.0%}",
            f"{found.limit:.2f}×" if found.limit else NONE,
        )
        for role, found in analysis.shares.items()
    ]
    if analysis.expected_step_ms is not None and OPTIMIZED in analysis.shares:
        rows.append((
            "check", "", f"the layer's gain predicts a step of {_ms(analysis.expected_step_ms)}",
            f"measured {_ms(analysis.shares[OPTIMIZED].step_ms)}", "",
        ))  # fmt: skip
    head = (
        "side",
        "experts run on",
        "experts' part of a step",
        "share",
        "step if experts took no time, faster by",
    )
    return Table("The experts' share of a step", head, tuple(rows))


def loss_table(analysis: Analysis) -> Table:
    """The measure of agreement, number by number."""
    loss = analysis.loss
    if loss.mean is None:
        return Table("Loss agreement", (), ())

    def row(
        what: str, found: float | None, noise: float | None, tolerance: float | None, form: str = "{:.3g}"
    ) -> tuple[str, ...]:
        return (what, *(NONE if value is None else form.format(value) for value in (found, noise, tolerance)))

    return Table(
        f"Loss agreement: {loss.verdict}",
        ("what", "moe-kernels − baseline", "baseline again − baseline", "tolerance"),
        (
            row("first step", loss.first, loss.noise_first, loss.first_tolerance),
            row("mean |difference|, smoothed", loss.mean, loss.noise_mean, loss.tolerance),
            row("largest |difference|, smoothed", loss.largest, loss.noise_largest, loss.largest_tolerance),
            row("last step, smoothed", loss.last, None, None),
            row(
                "first gradient norm, relative",
                loss.first_gradient,
                None,
                loss.first_gradient_tolerance,
                "{:.3%}",
            ),
        ),
    )


def router_table(analysis: Analysis) -> Table:
    """How evenly the router of each layer loaded its experts, at the start and at the end of the training."""
    head = ("layer", "busiest expert over the mean: first, last tenth", "entropy", "experts unused")
    history = routed(analysis)
    if history is None:
        return Table("Router", (), ())
    tenth = history.steps[-1] / 10
    early = max(1, sum(step <= tenth for step in history.steps))
    late = min(len(history.steps) - 1, sum(step <= 9 * tenth for step in history.steps))
    rows = []
    for index, name in enumerate(history.layers):
        first, last = history.sum(index, 0, early), history.sum(index, late)
        rows.append((
            name,
            f"{first.imbalance:.2f}× → {last.imbalance:.2f}×",
            f"{first.entropy:.3f} → {last.entropy:.3f}",
            f"{last.dead} of {history.experts[index]}",
        ))  # fmt: skip
    return Table("Load of the experts", head, tuple(rows))


def runs_table(analysis: Analysis) -> Table:
    """Every training: what it was and where it is."""
    rows = []
    for run, metrics in zip(analysis.comparison.runs, analysis.runs, strict=True):
        median = Spread.of(metrics.step_ms).median if metrics.step_ms else None
        rows.append((
            run.run_id,
            run.status,
            f"{metrics.steps}",
            NONE if median is None else _ms(median),
            f"{metrics.losses[-1]:.4f}" if metrics.losses else NONE,
            f"{run.wandb.get('project', NONE)} / {run.wandb.get('name', NONE)}",
            run.plugin_line or NONE,
            shlex.join(run.command),
        ))  # fmt: skip
    head = ("run", "status", "steps", "step", "last loss", "W&B project / run", "the plugin said", "command")
    return Table("Runs", head, tuple(rows))


def versions_table(analyses: Sequence[Analysis]) -> Table:
    """Versions and machine of each comparison."""
    names = list(dict.fromkeys(name for analysis in analyses for name in analysis.comparison.versions))
    rows = [(name, *(analysis.comparison.versions.get(name, NONE) for analysis in analyses)) for name in names]
    gpus = [analysis.comparison.gpu for analysis in analyses]
    rows += [
        ("GPU", *(gpu["name"] if gpu else "none" for gpu in gpus)),
        ("driver", *(gpu["driver"] if gpu else NONE for gpu in gpus)),
        ("processor", *(analysis.comparison.cpu for analysis in analyses)),
        ("measured (UTC)", *(analysis.comparison.created for analysis in analyses)),
    ]
    return Table("Machine and versions", ("what", *(analysis.comparison.label for analysis in analyses)), tuple(rows))


def _overrides(analysis: Analysis) -> str:
    """What this comparison changes in the user's files, folders aside, by role."""
    changes: dict[str, dict[str, Any]] = {}
    for run in analysis.comparison.runs:
        changes.setdefault(run.role, {key: run.overrides[key] for key in run.overrides if key not in FOLDERS})
    shown = {role: keys for role, keys in changes.items() if keys}
    return dump_yaml(shown) if shown else ""


def _rich(table: Table) -> RichTable:
    shown = RichTable(title=table.title, title_justify="left", header_style="bold")
    for i, name in enumerate(table.head):
        shown.add_column(name, justify="left" if i == 0 else "right")
    for row in table.rows:
        shown.add_row(*(Text(cell) for cell in row))
    return shown


def _markdown_cell(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("\n", " ")


def _markdown_block(text: str, language: str) -> str:
    """A code block; its fence is longer than any row of backticks in the text."""
    fence = "`" * (1 + max((len(ticks) for ticks in re.findall("`+", text)), default=2))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _at(row: dict[str, Any], key: str) -> float | None:
    return None if not row.get(key) else float(row[key]["median"])


def _median(spread: Spread | None) -> float | None:
    return None if spread is None else spread.median


def _ms(value: float) -> str:
    return f"{plain(value)} ms"


def _percent(value: float) -> str:
    return f"{value:.0f}%"


def _spread_ms(spread: Spread) -> str:
    return f"{_ms(spread.median)} ({spread.p20:.4g} to {spread.p80:.4g})"


def _spread_rate(spread: Spread) -> str:
    return f"{spread.median:,.0f} ({spread.p20:,.0f} to {spread.p80:,.0f})"


def _times(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}×"


def _arrow(before: float | None, after: float | None, form: Callable[[float], str]) -> str:
    if before is None and after is None:
        return NONE
    return " → ".join(NONE if value is None else form(value) for value in (before, after))


def _change(before: Any, after: Any) -> str:
    if before is None or after is None:
        return ""
    one, two = (value.median if isinstance(value, Spread) else float(value) for value in (before, after))
    return f"{two / one - 1:+.1%}" if one else ""
