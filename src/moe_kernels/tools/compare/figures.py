"""The report's plots, as inline SVG that follows the page's colours in light and in dark mode."""

from __future__ import annotations

import io
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe_kernels.telemetry.load import LayerLoad, Loads, RouterHistory
from moe_kernels.tools.compare.judge import smooth
from moe_kernels.tools.compare.metrics import COUNTERS, OURS, RunMetrics
from moe_kernels.tools.compare.pair import BASELINE, EAGER, OPTIMIZED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from moe_kernels.tools.compare.comparison import Analysis

    #: A figure, its title and its words.
    Drawn = tuple[Figure, str, str]

# Mid-tones: readable on white and on near-black.
COLOURS = {BASELINE: "#8294ab", OPTIMIZED: "#e8590c", EAGER: "#9775d8"}
WORDS = {BASELINE: "baseline", OPTIMIZED: "moe-kernels", EAGER: "eager"}
# By name of a side or an implementation.
BARS = {WORDS[role]: colour for role, colour in COLOURS.items()}
BARS |= {"grouped_mm": COLOURS[BASELINE], OURS: COLOURS[OPTIMIZED], "dense": "#2f9e62"}
# Stands for the page's text colour; replaced by currentColor in the SVG.
INK = "#010203"
WIDTH = 5.4
STYLE: Any = {
    # Text stays text, so that it is sharp and can be searched; a dollar sign starts no formula.
    **{"svg.fonttype": "none", "text.parse_math": False, "font.family": "sans-serif", "font.size": 9},
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    **{"axes.edgecolor": f"{INK}66", "axes.facecolor": "none", "axes.titlesize": "medium"},
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
}
# The heat map's colours for experts with too little and too much, as RGB, and where its scale ends, in powers of two.
STARVED, BUSY = (0.12, 0.47, 0.85), (0.91, 0.35, 0.05)
LIMIT = 3.0


@dataclass(frozen=True)
class Plot:
    """One plot: its SVG, a title, and in words what it shows; ``wide`` takes the place of two."""

    title: str
    svg: str
    alt: str
    wide: bool


def plain(value: float) -> str:
    """Three digits; large numbers without an exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def plots(analysis: Analysis) -> list[Plot]:
    """Every plot that this comparison has the numbers for."""
    import matplotlib

    makers = [_loss, _loss_difference, _step_times, _experts, _shares, _memory, _utilisation]
    makers += [_router_layers, _router_experts]
    with matplotlib.rc_context(STYLE):
        drawn = [found for maker in makers if (found := maker(analysis)) is not None]
        return [_plot(figure, title, alt, analysis.comparison.label) for figure, title, alt in drawn]


def _loss(analysis: Analysis) -> Drawn | None:
    curves = [(run, 1, run.losses) for run in analysis.runs if run.losses]
    ends = ", ".join(f"{_label(run)} {losses[0]:.3f} to {losses[-1]:.3f}" for run, _, losses in curves)
    return _curves("Loss", "training loss", curves, f"Training loss at each step: {ends}.")


def _step_times(analysis: Analysis) -> Drawn | None:
    # The first step has no time: there is no log before it.
    start = max(analysis.comparison.warmup_steps, 1) + 1
    curves = [(run, start, run.step_ms) for run in analysis.runs if run.step_ms]
    medians = ", ".join(
        f"{WORDS[role]} {side.step_ms.median:.4g} ms" for role, side in analysis.sides.items() if side.step_ms
    )
    alt = f"Time of each step after warm-up; medians: {medians}."
    return _curves("Step time", "milliseconds a step", curves, alt, ylim=(0, None))


def _curves(
    title: str, ylabel: str, curves: list[tuple[RunMetrics, int, list[float]]], alt: str, **axis: Any
) -> Drawn | None:
    """A line for each run: its values from a first step on."""
    if not curves:
        return None
    figure, [axes] = _axes(2.9)
    for run, first, values in curves:
        again = not run.run_id.endswith("-1")
        axes.plot(
            range(first, first + len(values)),
            values,
            label=_label(run),
            color=COLOURS[run.role],
            ls="--" if again else ":" if run.role == EAGER else "-",
            lw=1.8 if run.role == OPTIMIZED else 1.5,
            alpha=0.8 if again else 1.0,
            zorder=3 if run.role == OPTIMIZED else 2,
        )
    axes.set(xlabel="step", ylabel=ylabel, **axis)
    _legend_above(axes)
    return figure, title, alt


def _label(run: RunMetrics) -> str:
    number = run.run_id.rpartition("-")[2]
    return " ".join(filter(None, (WORDS[run.role], {"1": "", "2": "again"}.get(number, number))))


def _loss_difference(analysis: Analysis) -> Drawn | None:
    loss = analysis.loss
    if not loss.differences or loss.largest_tolerance is None:
        return None
    figure, [axes] = _axes(2.9)
    steps, tolerance = range(1, len(loss.differences) + 1), loss.largest_tolerance
    axes.axhspan(-tolerance, tolerance, color=INK, alpha=0.07, lw=0, label=f"tolerance ±{plain(tolerance)}")
    axes.axhline(0, color=INK, lw=0.6, alpha=0.5)
    if loss.noise:
        axes.plot(steps, smooth(loss.noise), color=COLOURS[BASELINE], ls="--", lw=1.4, label="baseline again")
    axes.plot(steps, smooth(loss.differences), color=COLOURS[OPTIMIZED], lw=1.8, label="moe-kernels")
    furthest = max(abs(value) for value in (*smooth(loss.differences), *smooth(loss.noise)))
    # A curve far inside the tolerance gets a scale of its own: on that of the tolerance it would be flat.
    limit = max(furthest, 1.15 * (tolerance if furthest > 0.1 * tolerance else furthest or 1.0))
    axes.set(xlabel="step", ylabel="loss minus baseline's", ylim=(-limit, limit))
    _legend_above(axes)
    alt = f"Difference of the smoothed losses from the baseline's at each step: {loss.words}."
    return figure, "Loss difference", alt


def _experts(analysis: Analysis) -> Drawn | None:
    rows = {name: row for name, row in analysis.layer.items() if row.get("forward_backward_ms")}
    if not rows:
        return None
    groups = {
        title: {name: row[key] for name, row in rows.items()}
        for title, key in (("forward, ms", "forward_ms"), ("forward and backward, ms", "forward_backward_ms"))
    }
    values = ", ".join(
        f"{name} {row['forward_ms']:.3g} and {row['forward_backward_ms']:.3g}" for name, row in rows.items()
    )
    alt = f"Milliseconds of one expert layer, forward, and forward and backward: {values}."
    return _bars("One expert layer", groups, 0.34, alt)


def _shares(analysis: Analysis) -> Drawn | None:
    shares = {WORDS[role]: found for role, found in reversed(analysis.shares.items()) if found.fraction < 1}
    if not shares:
        return None
    figure, [axes] = _axes(1.0 + 0.4 * len(shares))
    experts = [found.experts_ms for found in shares.values()]
    rest = [found.step_ms - found.experts_ms for found in shares.values()]
    axes.barh([*shares], experts, color=COLOURS[OPTIMIZED], height=0.6, label="experts")
    axes.barh([*shares], rest, left=experts, color=COLOURS[BASELINE], alpha=0.45, height=0.6, label="everything else")
    for y, found in enumerate(shares.values()):
        share = f"{found.fraction:.0%}"
        axes.text(found.experts_ms / 2, y, share, ha="center", va="center", color="#fff")
    axes.set_xlabel("milliseconds a step")
    _legend_above(axes)
    values = ", ".join(
        f"{name} {plain(found.experts_ms)} of {plain(found.step_ms)} ms ({found.fraction:.0%})"
        for name, found in reversed(shares.items())
    )
    return figure, "What the experts take of a step", f"Experts' part of a training step: {values}."


def _memory(analysis: Analysis) -> Drawn | None:
    peaks = {WORDS[role]: side.peak_allocated_gib for role, side in analysis.sides.items()}
    saved = {name: row.get("saved_mb") for name, row in analysis.layer.items()}
    groups = {}
    for title, rows in (("training, peak, GiB", peaks), ("saved by a layer, MiB", saved)):
        if known := {name: float(value) for name, value in rows.items() if value}:
            groups[title] = known
    if not groups:
        return None
    values = "; ".join(
        f"{title}: " + ", ".join(f"{name} {plain(value)}" for name, value in rows.items())
        for title, rows in groups.items()
    )
    return _bars("Memory", groups, 0.36, f"{values}.")


def _bars(title: str, groups: dict[str, dict[str, float]], row_height: float, alt: str) -> Drawn:
    """Groups of bars side by side, each with its title; names that are the same in all stand once."""
    figure, parts = _axes(0.9 + row_height * max(map(len, groups.values())), columns=len(groups))
    before: list[str] = []
    for axes, (words, rows) in zip(parts, groups.items(), strict=True):
        names, widest = list(rows), max(rows.values())
        colours = [BARS.get(name, COLOURS[EAGER]) for name in names]
        axes.barh(names, list(rows.values()), color=colours, height=0.62)
        axes.invert_yaxis()
        axes.set_xlim(0, widest * 1.25)
        axes.xaxis.set_visible(False)
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        for y, value in enumerate(rows.values()):
            axes.text(value + widest * 0.02, y, plain(value), va="center")
        axes.set_title(words)
        if names == before:
            axes.set_yticklabels([])
        before = names
    return figure, title, alt


def _utilisation(analysis: Analysis) -> Drawn | None:
    names = COUNTERS | {"dram_active": "memory bandwidth"}
    known = {name for side in analysis.sides.values() for name in names if getattr(side, name) is not None}
    present = {name: words for name, words in names.items() if name in known}
    if not present:
        return None
    sides = [(role, side) for role, side in analysis.sides.items() if side.runs]
    figure, [axes] = _axes(0.9 + 0.22 * len(present) * len(sides))
    height = 0.8 / len(sides)
    for i, (role, side) in enumerate(sides):
        values = [getattr(side, name) or 0.0 for name in present]
        places = [y + height * i for y in range(len(present))]
        axes.barh(places, values, height=0.9 * height, color=COLOURS[role], label=WORDS[role])
        for place, value in zip(places, values, strict=True):
            axes.text(value + 1, place, f"{value:.0f}", va="center", fontsize=8.5)
    axes.set_yticks([y + height * (len(sides) - 1) / 2 for y in range(len(present))], list(present.values()))
    axes.set(xlim=(0, 112), xlabel="percent of the timed steps, mean")
    axes.invert_yaxis()
    _legend_above(axes)
    values_said = "; ".join(
        f"{WORDS[role]}: " + ", ".join(f"{words} {getattr(side, name) or 0:.0f}%" for name, words in present.items())
        for role, side in sides
    )
    return figure, "GPU utilisation", f"{values_said}."


def routed(analysis: Analysis) -> RouterHistory | None:
    """The router of the first run that recorded it."""
    return next((run.router for run in analysis.comparison.runs if run.router.steps and run.router.layers), None)


def _router_layers(analysis: Analysis) -> Drawn | None:
    history = routed(analysis)
    if history is None:
        return None
    figure, [axes] = _axes(2.9)
    values = [Loads.of(history.of_layer(layer)).numbers().imbalance for layer in range(len(history.layers))]
    for layer, line in enumerate(values):
        # From the first layer to the last: faint to strong.
        alpha = 0.3 + 0.7 * (layer + 1) / len(values)
        axes.plot(history.steps, line, color=COLOURS[OPTIMIZED], alpha=alpha, lw=1.3)
    axes.axhline(1, color=INK, lw=0.6, alpha=0.5)
    axes.set(xlabel="step", ylabel="busiest expert over the mean", ylim=(0, None))
    worst = max(range(len(values)), key=lambda layer: values[layer][-1])
    alt = (
        f"Load of the busiest expert over the mean in each of {len(values)} layers, at each step; 1 is even. At the "
        f"end the most uneven is {history.layers[worst]} with {values[worst][-1]:.2f}."
    )
    return figure, "Balance of each layer, first faint to last strong", alt


def _router_experts(analysis: Analysis) -> Drawn | None:
    from matplotlib.colors import LinearSegmentedColormap

    history = routed(analysis)
    if history is None:
        return None
    # One row for each expert, layer after layer. Transparent at the mean, so that the page shows, dark or light.
    scale = LinearSegmentedColormap.from_list("load", [(*STARVED, 1.0), (*STARVED, 0.0), (*BUSY, 0.0), (*BUSY, 1.0)])
    shares = [
        [_log_share(load, expert) for load in history.of_layer(layer)]
        for layer, experts in enumerate(history.experts)
        for expert in range(experts)
    ]
    rows = len(shares)
    figure, [axes] = _axes(min(7.0, 1.3 + max(1.6, 0.012 * rows)), width=2 * WIDTH)
    # A record is as wide as the steps that it covers; the first as wide as the second.
    steps = history.steps
    begin = min(max(0, 2 * steps[0] - steps[1]) if len(steps) > 1 else 0, steps[0] - 1)
    image = axes.pcolorfast([begin, *steps], range(rows + 1), shares, cmap=scale, vmin=-LIMIT, vmax=LIMIT)
    axes.invert_yaxis()
    edges = [sum(history.experts[:layer]) for layer in range(len(history.layers) + 1)]
    for edge in edges[1:-1]:
        axes.axhline(edge, color=INK, lw=0.5, alpha=0.4)
    every = -(-len(history.layers) // 12)
    middles = [(edges[layer] + edges[layer + 1]) / 2 for layer in range(0, len(history.layers), every)]
    axes.set_yticks(middles, [str(layer + 1) for layer in range(0, len(history.layers), every)])
    axes.set(xlabel="step", ylabel="expert layer, one row an expert")
    bar = figure.colorbar(image, ax=axes, ticks=[-LIMIT, -1, 0, 1, LIMIT], aspect=40, pad=0.01)
    bar.ax.set_yticklabels(["≤ ⅛×", "½×", "mean", "2×", "≥ 8×"], fontsize=8.5)
    end = history.numbers(len(history.steps) - 1)
    alt = (
        f"Heat map of the load of {rows} experts in {len(history.layers)} layers from step {history.steps[0]} to "
        f"{history.steps[-1]}, over the mean of their layer. Experts unused at the end: {sum(end.dead)}; the "
        f"busiest has {max(end.imbalance):.2f} times the mean."
    )
    return figure, "Load of every expert over time", alt


def _log_share(load: LayerLoad, expert: int) -> float:
    """log2 of an expert's rows over the mean of its layer, within the scale of the heat map."""
    total = sum(load.tokens)
    if not load.tokens[expert]:
        return -LIMIT if total else 0.0
    return max(-LIMIT, min(LIMIT, math.log2(load.tokens[expert] * len(load.tokens) / total)))


def _axes(height: float, columns: int = 1, width: float = WIDTH) -> tuple[Figure, list[Any]]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(width, height), layout="constrained")
    parts = list(figure.subplots(1, columns, squeeze=False)[0])
    for axes in parts:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    return figure, parts


def _legend_above(axes: Axes) -> None:
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, handlelength=1.6)


def _plot(figure: Figure, title: str, alt: str, label: str) -> Plot:
    import matplotlib

    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    # The salt keeps the ids of several plots apart.
    with matplotlib.rc_context({"svg.hashsalt": f"{label} {title}"}):
        figure.savefig(buffer, format="svg", dpi=200, transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    # The size comes from the page; the viewBox keeps the proportions.
    head, _, body = svg.partition(">")
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    # Ids are unique in a page, and matplotlib gives every group one: only those that are referred to stay.
    used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', body))
    body = re.sub(r' id="([^"]*)"', lambda match: match.group() if match.group(1) in used else "", body)
    return Plot(title, f'{head} aria-hidden="true">{body}', alt, wide=figure.get_figwidth() > WIDTH)
