"""Writes what the comparisons found: an HTML page, Markdown and the terminal's tables, from the same rows."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from moe_kernels.tools.bench.timing import Spread
from moe_kernels.tools.common.files import write_text
from moe_kernels.tools.common.runfile import dump_yaml
from moe_kernels.tools.compare.comparison import Analysis, Comparison, slug
from moe_kernels.tools.compare.figures import WORDS, plain, plots, routed
from moe_kernels.tools.compare.judge import CONFIRMED, NOT_CONFIRMED, NOT_JUDGED
from moe_kernels.tools.compare.metrics import COUNTERS, OURS
from moe_kernels.tools.compare.pair import BASELINE, EAGER, FOLDERS, OPTIMIZED
from moe_kernels.tools.compare.runner import FINISHED

NONE = "–"
LOSS_WORDS = {CONFIRMED: "agree", NOT_CONFIRMED: "DIFFER", NOT_JUDGED: "not judged"}
VERDICT_STYLE = {CONFIRMED: "green", NOT_CONFIRMED: "red"}


class Table(NamedTuple):
    """Rows of text; the first column names the row."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


class Card(NamedTuple):
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
    if error := comparison.experts.get("error"):
        console.print(Text(f"{comparison.label}: the expert layer was not measured: {error}", style="red"))


def _values(analyses: Sequence[Analysis]) -> dict[str, Any]:
    days = sorted(analysis.comparison.created[:10] for analysis in analyses)
    return {
        "title": "Axolotl training with and without moe-kernels",
        "machine": "; ".join(dict.fromkeys(_machine(analysis.comparison) for analysis in analyses)),
        "created": " to ".join(dict.fromkeys((days[0], days[-1]))),
        "banner": banner(analyses),
        "problems": [problem for analysis in analyses for problem in problems(analysis)],
        "summary": summary_table(analyses),
        "analyses": analyses,
        "cards": cards,
        "claims": claims_table,
        "tables": lambda analysis: [table for make in TABLES if (table := make(analysis)).rows],
        "runs": runs_table,
        "overrides": _overrides,
        "slug": slug,
        "versions": versions_table(analyses),
        "commands": list(dict.fromkeys(analysis.comparison.command for analysis in analyses)),
    }


def banner(analyses: Sequence[Analysis]) -> str | None:
    """A note on comparisons that ran on a CPU, or None."""
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
    return f"{gpu.name}, driver {gpu.driver}" if gpu else comparison.cpu


def problems(analysis: Analysis) -> list[str]:
    """What a reader must know before any number."""
    name = analysis.comparison.label
    found = [f"{name} {run.run_id} failed: {run.error} (log: {run.log})" for run in analysis.failed]
    found += [f"{name} {run_id} was not run" for run_id in analysis.missing]
    found += [f"{name}: {fault}" for fault in analysis.faults]
    found += [f"{name}: {analysis.other_baseline}"] if analysis.other_baseline else []
    if analysis.loss.verdict != CONFIRMED:
        what = "do not agree" if analysis.loss.verdict == NOT_CONFIRMED else "cannot be judged"
        found.append(f"{name}: the losses {what}: {analysis.loss.words}")
    return found


def cards(analysis: Analysis) -> list[Card]:
    """The numbers at the head of a comparison; no ratio of times without a GPU: it would be read as a result."""
    before, after, loss = analysis.sides[BASELINE], analysis.sides[OPTIMIZED], analysis.loss
    found = []
    if not analysis.on_gpu:
        finished = f"{len(analysis.runs) - len(analysis.failed)} of {len(analysis.comparison.planned)}"
        found.append(Card(finished, "trainings finished", "real axolotl train runs"))
        calls = f"{after.expert_calls or 0:,}"
        found.append(Card(calls, "expert calls that moe-kernels took", "in the optimised run"))
    elif analysis.speedup:
        steps = _arrow(_ms, before.step_ms, after.step_ms)
        found.append(Card(_times(analysis.speedup), "training step", steps))
    for stock in ("grouped_mm", "eager") if analysis.on_gpu else ():
        ratio, both = (analysis.ratio(stock, key) for key in ("forward_ms", "forward_backward_ms"))
        if ratio and both:
            found.append(
                Card(_times(ratio), f"expert forward, against {stock}", f"{_times(both)} forward and backward")
            )
    one, two = before.peak_allocated_gib, after.peak_allocated_gib
    if one and two:
        found.append(Card(f"{two / one - 1:+.1%}", "peak memory", f"{one:.2f} → {two:.2f} GiB"))
    if loss.mean is not None:
        detail = f"mean difference {loss.mean:.2g}, tolerance {loss.tolerance:.2g}"
        found.append(Card(LOSS_WORDS[loss.verdict].lower(), "loss curves", detail))
    return found


def summary_table(analyses: Sequence[Analysis]) -> Table:
    """One column a comparison: baseline, then moe-kernels."""
    names = tuple(analysis.comparison.label for analysis in analyses)
    columns = [_summary(analysis) for analysis in analyses]
    rows = [(what, *(column[what] for column in columns)) for what in columns[0]]
    return Table("Summary", ("what", *names), tuple(row for row in rows if set(row[1:]) != {NONE}))


def _summary(analysis: Analysis) -> dict[str, str]:
    before, after = analysis.sides[BASELINE], analysis.sides[OPTIMIZED]
    shares = [found.fraction if (found := analysis.shares.get(role)) else None for role in (BASELINE, OPTIMIZED)]
    launches = [analysis.layer.get(name, {}).get("launches_forward_backward") for name in ("grouped_mm", OURS)]
    # Tensor cores busy where the GPU counts that, else any kernel running.
    busy = before.tensor_active, after.tensor_active
    if None in busy:
        busy = before.gpu_busy, after.gpu_busy
    eager = analysis.sides[EAGER].step_ms if EAGER in analysis.sides else None
    against_eager = eager.median / after.step_ms.median if eager and after.step_ms and analysis.speedup else None
    return {
        "training step, faster by": _times(analysis.speedup),
        "training step, against eager": _times(against_eager),
        "training step": _arrow(_ms, before.step_ms, after.step_ms),
        "tokens/s": _arrow("{:,.0f}".format, before.tokens_per_s, after.tokens_per_s),
        "most that any expert kernel could bring": _times(
            analysis.shares[BASELINE].limit if BASELINE in analysis.shares else None
        ),
        "experts' share of the step": _arrow("{:.0%}".format, *shares),
        **{
            f"{words}, against {stock}": _times(analysis.ratio(stock, key))
            for words, key in (("expert forward", "forward_ms"), ("forward + backward", "forward_backward_ms"))
            for stock in ("grouped_mm", "eager")
        },
        "peak memory, GiB": _arrow("{:.2f}".format, before.peak_allocated_gib, after.peak_allocated_gib),
        "frozen experts at rest, GiB": _arrow(plain, before.frozen_gib, after.frozen_gib),
        "launches a layer, grouped_mm → ours": _arrow("{:.0f}".format, *launches),
        "tensor cores (else GPU) busy": _arrow(_percent, *busy),
        "loss curves": LOSS_WORDS[analysis.loss.verdict],
        "runs finished": f"{len(analysis.runs) - len(analysis.failed)} of {len(analysis.comparison.planned)}",
    }


def claims_table(analysis: Analysis) -> Table:
    """Each claim, its verdict and the numbers behind it."""
    rows = tuple((claim.title, claim.verdict, claim.evidence) for claim in analysis.claims)
    return Table("What holds here", ("claim", "verdict", "measured"), rows)


def _rows(forms: Iterable[Form], columns: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, ...]]:
    """By key, the row of each form that has a value in any column."""
    known = [form for form in forms if any(column.get(form[1]) is not None for column in columns)]
    return {key: (words, *(_cell(column.get(key), form) for column in columns)) for words, key, form in known}


def training_table(analysis: Analysis) -> Table:
    """The trainings side by side."""
    roles, sides = list(analysis.sides), [vars(side) for side in analysis.sides.values()]
    rows = [("experts run on", *(analysis.implementation[role] for role in roles), "")]
    if any(analysis.frozen.values()):
        rows.append(("frozen experts are in", *(analysis.frozen[role] or NONE for role in roles), ""))
    for key, row in _rows(TRAINING, sides).items():
        rows.append((*row, _change(sides[0][key], sides[1][key]) if key in AGAINST_BASELINE else ""))
    notes = {run.role: run.samples.note for run in analysis.comparison.runs if run.samples.note}
    if analysis.on_gpu and notes:
        rows.append(("note of the GPU sampling", *(notes.get(role, NONE) for role in roles), ""))
    return Table("Training", ("what", *(WORDS[role] for role in roles), "against baseline"), tuple(rows))


def layer_table(analysis: Analysis) -> Table:
    """One expert layer, each implementation on the same tensors in one process; or why it was not measured."""
    layers, experts = analysis.layer, analysis.comparison.experts
    if not layers and experts.get("note"):
        return Table("One expert layer", ("what", "why"), (("not measured", experts["note"]),))
    rows = list(_rows(LAYER, list(layers.values())).values())
    for words, key in (("forward", "forward_ms"), ("forward + backward", "forward_backward_ms")) if rows else ():
        ratios = ("" if name in (OURS, "dense") else _times(analysis.ratio(name, key)) for name in layers)
        rows.append((f"moe-kernels is faster, {words}", *ratios))
    for name, row in layers.items():
        if not row["ok"]:
            rows.append((f"{name}: not timed", row["note"], *[""] * (len(layers) - 1)))
    shape = ""
    if layers and (layer := experts.get("layer")):
        shape = (
            f"{layer['tokens']:,} tokens, H {layer['hidden']}, I {layer['intermediate']}, E {layer['experts']}, "
            f"K {layer['top_k']}, {next(iter(layers.values()))['dtype']}"
        )
    return Table(f"One expert layer ({shape})", ("what", *layers), tuple(rows))


def share_table(analysis: Analysis) -> Table:
    """The experts' part of the step, and the most that faster experts could gain."""
    rows = [
        (
            WORDS[role],
            found.implementation,
            f"{_ms(found.experts_ms)} of {_ms(found.step_ms)}",
            f"{found.fraction:.0%}",
            _times(found.limit),
        )
        for role, found in analysis.shares.items()
    ]
    if (expected := analysis.expected_step_ms) is not None:
        measured = f"measured {_ms(analysis.shares[OPTIMIZED].step_ms)}"
        rows.append(("check", "", f"the layer's gain predicts a step of {_ms(expected)}", measured, ""))
    head = ("side", "experts run on", "experts' part of a step", "share", "step if experts took no time, faster by")
    return Table("The experts' share of a step", head, tuple(rows))


def loss_table(analysis: Analysis) -> Table:
    """The measure of agreement, number by number."""
    loss, number, percent = analysis.loss, "{:.3g}".format, "{:.3%}".format
    if loss.mean is None:
        return Table("Loss agreement", (), ())
    rows = (
        ("first step", number, loss.first, loss.noise_first, loss.first_tolerance),
        ("mean |difference|, smoothed", number, loss.mean, loss.noise_mean, loss.tolerance),
        ("largest |difference|, smoothed", number, loss.largest, loss.noise_largest, loss.largest_tolerance),
        ("last step, smoothed", number, loss.last, None, None),
        ("first gradient norm, relative", percent, loss.first_gradient, None, loss.first_gradient_tolerance),
    )
    return Table(
        f"Loss agreement: {loss.verdict}",
        ("what", "moe-kernels − baseline", "baseline again − baseline", "tolerance"),
        tuple((what, *(_cell(value, form) for value in values)) for what, form, *values in rows),
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
    first, last = history.numbers(0, early), history.numbers(late)
    rows = tuple(
        (
            name,
            f"{first.imbalance[layer]:.2f}× → {last.imbalance[layer]:.2f}×",
            f"{first.entropy[layer]:.3f} → {last.entropy[layer]:.3f}",
            f"{last.dead[layer]} of {history.experts[layer]}",
        )
        for layer, name in enumerate(history.layers)
    )
    return Table("Load of the experts", head, rows)


def runs_table(analysis: Analysis) -> Table:
    """Every training: what it was and where it is."""
    rows = tuple(
        (
            run.run_id,
            run.status,
            f"{metrics.steps}",
            _ms(Spread.of(metrics.step_ms)) if metrics.step_ms else NONE,
            f"{metrics.losses[-1]:.4f}" if metrics.losses else NONE,
            f"{run.wandb.get('project', NONE)} / {run.wandb.get('name', NONE)}",
            run.plugin_line or NONE,
            shlex.join(run.command),
        )
        for run, metrics in zip(analysis.comparison.runs, analysis.runs, strict=True)
    )
    head = ("run", "status", "steps", "step", "last loss", "W&B project / run", "the plugin said", "command")
    return Table("Runs", head, rows)


def versions_table(analyses: Sequence[Analysis]) -> Table:
    """Versions and machine of each comparison."""
    names = list(dict.fromkeys(name for analysis in analyses for name in analysis.comparison.versions))
    rows = [(name, *(analysis.comparison.versions.get(name, NONE) for analysis in analyses)) for name in names]
    gpus = [analysis.comparison.gpu for analysis in analyses]
    rows += [
        ("GPU", *(gpu.name if gpu else "none" for gpu in gpus)),
        ("driver", *(gpu.driver if gpu else NONE for gpu in gpus)),
        ("processor", *(analysis.comparison.cpu for analysis in analyses)),
        ("measured (UTC)", *(analysis.comparison.created for analysis in analyses)),
    ]
    return Table("Machine and versions", ("what", *(analysis.comparison.label for analysis in analyses)), tuple(rows))


def _overrides(analysis: Analysis) -> str:
    """What this comparison changes in the user's files, except folders, by role."""
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


def _median(value: Spread | float) -> float:
    return value.median if isinstance(value, Spread) else value


def _cell(value: Any, form: Callable[[Any], str]) -> str:
    return NONE if value is None else form(value)


def _ms(value: Spread | float) -> str:
    return f"{plain(_median(value))} ms"


def _percent(value: float) -> str:
    return f"{value:.0f}%"


def _spread_ms(spread: Spread) -> str:
    return f"{_ms(spread)} ({spread.p20:.4g} to {spread.p80:.4g})"


def _spread_rate(spread: Spread) -> str:
    return f"{spread.median:,.0f} ({spread.p20:,.0f} to {spread.p80:,.0f})"


def _times(value: float | None) -> str:
    return _cell(value, "{:.2f}×".format)


def _arrow(form: Callable[[Any], str], *values: Spread | float | None) -> str:
    if values == (None, None):
        return NONE
    return " → ".join(NONE if value is None else form(_median(value)) for value in values)


def _change(before: Spread | float | None, after: Spread | float | None) -> str:
    return f"{_median(after) / _median(before) - 1:+.1%}" if before and after is not None and _median(before) else ""


TABLES = (training_table, layer_table, share_table, loss_table, router_table)
#: Words of a row, the key of its value in each column, and how the value is written.
Form = tuple[str, str, Callable[[Any], str]]
TRAINING: tuple[Form, ...] = (
    ("step time", "step_ms", _spread_ms),
    ("tokens/s", "tokens_per_s", _spread_rate),
    ("peak memory allocated, GiB", "peak_allocated_gib", "{:.2f}".format),
    ("peak memory active, GiB", "peak_active_gib", "{:.2f}".format),
    ("frozen experts at rest, GiB", "frozen_gib", plain),
    *((words, key, _percent) for key, words in COUNTERS.items()),
    ("power, W", "power_w", "{:.0f}".format),
    ("energy a step, J", "energy_j_per_step", "{:.1f}".format),
    ("start-up until the trainer runs, s", "startup_s", "{:.1f}".format),
    ("then to the end of the first step, s", "first_step_s", "{:.1f}".format),
    ("expert calls that moe-kernels took", "expert_calls", "{:,}".format),
    ("runs", "runs", str),
)
AGAINST_BASELINE = (
    "step_ms", "tokens_per_s", "peak_allocated_gib", "peak_active_gib", "frozen_gib", "power_w", "energy_j_per_step"
)  # fmt: skip
LAYER: tuple[Form, ...] = (
    ("forward, ms", "forward_ms", plain),
    ("forward + backward, ms", "forward_backward_ms", plain),
    ("forward + backward, GPU time alone, ms", "forward_backward_queued_ms", plain),
    ("forward + backward, host time, ms", "forward_backward_host_ms", plain),
    ("forward, TFLOP/s", "forward_tflops", plain),
    ("forward + backward, TFLOP/s", "forward_backward_tflops", plain),
    ("of the dense GEMMs' speed", "dense_fraction", "{:.0%}".format),
    ("kernel launches, forward", "launches_forward", str),
    ("kernel launches, forward + backward", "launches_forward_backward", str),
    ("saved for backward, MiB", "saved_mb", plain),
    ("peak, MiB", "peak_mb", plain),
    ("largest relative error of output and gradients", "largest_error", "{:.1e}".format),
)
