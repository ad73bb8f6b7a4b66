"""The report's plots, as inline SVG that follows the page's colours in light and in dark mode."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from moe_kernels.telemetry.load import LayerLoad, Loads, RouterHistory
from moe_kernels.tools.compare.judge import smooth
from moe_kernels.tools.compare.metrics import OURS, RunMetrics
from moe_kernels.tools.compare.plan import BASELINE, EAGER, OPTIMIZED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from moe_kernels.tools.compare.comparison import Analysis

# Mid-tones: readable on white and on near-black. The styles tell the lines apart without colours.
COLOURS = {BASELINE: "#8294ab", OPTIMIZED: "#e8590c", EAGER: "#9775d8", "dense": "#2f9e62"}
LAYER_COLOURS = {
    "grouped_mm": COLOURS[BASELINE],
    OURS: COLOURS[OPTIMIZED],
    "eager": COLOURS[EAGER],
    "dense": COLOURS["dense"],
}
STYLES = {BASELINE: "-", OPTIMIZED: "-", EAGER: ":"}
WORDS = {BASELINE: "baseline", OPTIMIZED: "moe-kernels", EAGER: "eager"}
# Stands for the page's text colour; replaced by currentColor in the SVG.
INK = "#010203"
WIDTH = 5.4
# The heat map's colours for experts with too little and too much, as RGB, and where its scale ends, in powers of two.
STARVED, BUSY = (0.12, 0.47, 0.85), (0.91, 0.35, 0.05)
LIMIT = 3.0


@dataclass(frozen=True)
class Plot:
    """One plot: its SVG, a title, and in words what it shows; ``wide`` takes the place of two."""

    title: str
    svg: str
    alt: str
    wide: bool = False


def plain(value: float) -> str:
    """Three digits, and never an exponent for a large number."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def plots(analysis: Analysis) -> list[Plot]:
    """Every plot that this comparison has the numbers for."""
    import matplotlib

    makers = [_loss, _loss_difference, _step_times, _experts, _shares, _memory, _utilisation]
    makers += [_router_layers, _router_experts]
    # Text stays text, so that it is sharp and can be searched; and a dollar sign is one.
    with matplotlib.rc_context({"svg.fonttype": "none", "text.parse_math": False, "font.family": "sans-serif"}):
        return [plot for maker in makers if (plot := maker(analysis)) is not None]


def _loss(analysis: Analysis) -> Plot | None:
    runs = [run for run in analysis.runs if run.losses]
    if not runs:
        return None
    figure, axes = _axes(2.9)
    for run in runs:
        axes.plot(range(1, len(run.losses) + 1), run.losses, label=_label(run), **_line(run))
    axes.set(xlabel="step", ylabel="training loss")
    _legend_above(axes)
    ends = ", ".join(f"{_label(run)} {run.losses[0]:.3f} to {run.losses[-1]:.3f}" for run in runs)
    return _plot(analysis, figure, "Loss", f"Training loss at each step: {ends}.")


def _loss_difference(analysis: Analysis) -> Plot | None:
    loss = analysis.loss
    if not loss.differences or loss.largest_tolerance is None:
        return None
    figure, axes = _axes(2.9)
    steps = range(1, len(loss.differences) + 1)
    axes.axhspan(
        -loss.largest_tolerance,
        loss.largest_tolerance,
        color=INK,
        alpha=0.07,
        lw=0,
        label=f"tolerance ±{plain(loss.largest_tolerance)}",
    )
    axes.axhline(0, color=INK, lw=0.6, alpha=0.5)
    if loss.noise:
        axes.plot(steps, smooth(loss.noise), color=COLOURS[BASELINE], ls="--", lw=1.4, label="baseline again")
    axes.plot(steps, smooth(loss.differences), color=COLOURS[OPTIMIZED], lw=1.8, label="moe-kernels")
    furthest = max(abs(value) for value in (*smooth(loss.differences), *smooth(loss.noise)))
    # A curve far inside the tolerance is shown at its own scale, else the line would be flat.
    limit = 1.15 * (loss.largest_tolerance if furthest > 0.1 * loss.largest_tolerance else furthest or 1.0)
    axes.set(xlabel="step", ylabel="loss minus baseline's", ylim=(-max(limit, furthest), max(limit, furthest)))
    _legend_above(axes)
    alt = f"Difference of the smoothed losses from the baseline's at each step: {loss.words}."
    return _plot(analysis, figure, "Loss difference", alt)


def _step_times(analysis: Analysis) -> Plot | None:
    runs = [run for run in analysis.runs if run.step_ms]
    if not runs:
        return None
    figure, axes = _axes(2.9)
    for run in runs:
        # The first step has no time: there is no log before it.
        start = max(analysis.comparison.warmup_steps, 1) + 1
        axes.plot(range(start, start + len(run.step_ms)), run.step_ms, label=_label(run), **_line(run))
    axes.set(xlabel="step", ylabel="milliseconds a step")
    axes.set_ylim(bottom=0)
    _legend_above(axes)
    medians = ", ".join(
        f"{WORDS[role]} {side.step_ms.median:.4g} ms" for role, side in analysis.sides.items() if side.step_ms
    )
    return _plot(analysis, figure, "Step time", f"Time of each step after warm-up; medians: {medians}.")


def _experts(analysis: Analysis) -> Plot | None:
    rows = [(name, row) for name, row in analysis.layer.items() if row.get("forward_backward_ms")]
    if not rows:
        return None
    figure, both = _axes(0.9 + 0.34 * len(rows), columns=2)
    for axes, key, title in (
        (both[0], "forward_ms", "forward"),
        (both[1], "forward_backward_ms", "forward and backward"),
    ):
        _bars(
            axes,
            [(name, float(row[key]["median"]), LAYER_COLOURS.get(name, COLOURS[EAGER])) for name, row in rows],
        )
        axes.set_title(f"{title}, ms", fontsize=9, color=INK)
    both[1].set_yticklabels([])
    values = ", ".join(
        f"{name} {row['forward_ms']['median']:.3g} and {row['forward_backward_ms']['median']:.3g}"
        for name, row in rows
    )
    return _plot(
        analysis,
        figure,
        "One expert layer",
        f"Milliseconds of one expert layer, forward, and forward and backward: {values}.",
    )


def _shares(analysis: Analysis) -> Plot | None:
    rows = [(WORDS[role], found) for role, found in analysis.shares.items() if found.fraction < 1]
    if not rows:
        return None
    figure, axes = _axes(1.0 + 0.4 * len(rows))
    names = [name for name, _ in rows][::-1]
    experts = [found.experts_ms for _, found in rows][::-1]
    rest = [found.step_ms - found.experts_ms for _, found in rows][::-1]
    axes.barh(names, experts, color=COLOURS[OPTIMIZED], height=0.6, label="experts")
    axes.barh(names, rest, left=experts, color=COLOURS[BASELINE], alpha=0.45, height=0.6, label="everything else")
    for y, (_, found) in enumerate(rows[::-1]):
        axes.text(
            found.experts_ms / 2,
            y,
            f"{found.fraction:.0%}",
            ha="center",
            va="center",
            fontsize=9,
            color="#fff",
        )
    axes.set_xlabel("milliseconds a step")
    _legend_above(axes)
    values = ", ".join(
        f"{name} {plain(found.experts_ms)} of {plain(found.step_ms)} ms ({found.fraction:.0%})"
        for name, found in rows
    )
    return _plot(analysis, figure, "What the experts take of a step", f"Experts' part of a training step: {values}.")


def _memory(analysis: Analysis) -> Plot | None:
    sides = [(WORDS[role], side.peak_allocated_gib, COLOURS[role]) for role, side in analysis.sides.items()]
    training = [(name, peak, colour) for name, peak, colour in sides if peak is not None]
    saved = [
        (name, row.get("saved_mb"), LAYER_COLOURS.get(name, COLOURS[EAGER])) for name, row in analysis.layer.items()
    ]
    layer = [(name, float(mb), colour) for name, mb, colour in saved if mb]
    named = ((training, "training, peak, GiB"), (layer, "saved by a layer, MiB"))
    groups = [(rows, title) for rows, title in named if rows]
    if not groups:
        return None
    figure, parts = _axes(0.9 + 0.36 * max(len(rows) for rows, _ in groups), columns=len(groups))
    for axes, (rows, title) in zip(parts if len(groups) > 1 else [parts], groups, strict=True):
        _bars(axes, rows)
        axes.set_title(title, fontsize=9, color=INK)
    values = "; ".join(
        f"{title}: " + ", ".join(f"{name} {plain(value)}" for name, value, _ in rows) for rows, title in groups
    )
    return _plot(analysis, figure, "Memory", f"{values}.")


def _utilisation(analysis: Analysis) -> Plot | None:
    names = {
        "tensor_active": "tensor cores busy",
        "sm_active": "multiprocessors busy",
        "dram_active": "memory bandwidth",
        "gpu_busy": "any kernel running",
    }
    present = {
        name: words for name, words in names.items()
        if any(getattr(side, name) is not None for side in analysis.sides.values())
    }  # fmt: skip
    if not present:
        return None
    sides = [(role, side) for role, side in analysis.sides.items() if side.runs]
    figure, axes = _axes(0.9 + 0.22 * len(present) * len(sides))
    height = 0.8 / len(sides)
    for i, (role, side) in enumerate(sides):
        values = [getattr(side, name) or 0.0 for name in present]
        places = [y + height * i for y in range(len(present))]
        axes.barh(places, values, height=0.9 * height, color=COLOURS[role], label=WORDS[role])
        for place, value in zip(places, values, strict=True):
            axes.text(value + 1, place, f"{value:.0f}", va="center", fontsize=8.5, color=INK)
    axes.set_yticks([y + height * (len(sides) - 1) / 2 for y in range(len(present))], list(present.values()))
    axes.set(xlim=(0, 112), xlabel="percent of the timed steps, mean")
    axes.invert_yaxis()
    _legend_above(axes)
    values_said = "; ".join(
        f"{WORDS[role]}: " + ", ".join(f"{words} {getattr(side, name) or 0:.0f}%" for name, words in present.items())
        for role, side in sides
    )
    return _plot(analysis, figure, "GPU utilisation", f"{values_said}.")


def routed(analysis: Analysis) -> RouterHistory | None:
    """The router of the first run that recorded it."""
    return next((run.router for run in analysis.comparison.runs if run.router.steps and run.router.layers), None)


def _router_layers(analysis: Analysis) -> Plot | None:
    history = routed(analysis)
    if history is None:
        return None
    figure, axes = _axes(2.9)
    records = range(len(history.steps))
    values = [
        Loads.of([history.load(record, layer) for record in records]).numbers().imbalance
        for layer in range(len(history.layers))
    ]
    for layer, line in enumerate(values):
        # From the first layer to the last: faint to strong.
        alpha = 0.3 + 0.7 * (layer + 1) / len(values)
        axes.plot(history.steps, line, color=COLOURS[OPTIMIZED], alpha=alpha, lw=1.3)
    axes.axhline(1, color=INK, lw=0.6, alpha=0.5)
    axes.set(xlabel="step", ylabel="busiest expert over the mean")
    axes.set_ylim(bottom=0)
    worst = max(range(len(values)), key=lambda layer: values[layer][-1])
    alt = (
        f"Load of the busiest expert over the mean in each of {len(values)} layers, at each step; 1 is even. At the "
        f"end the most uneven is {history.layers[worst]} with {values[worst][-1]:.2f}."
    )
    return _plot(analysis, figure, "Balance of each layer, first faint to last strong", alt)


def _router_experts(analysis: Analysis) -> Plot | None:
    from matplotlib.colors import LinearSegmentedColormap

    history = routed(analysis)
    if history is None:
        return None
    # Layers one above the other, an expert a row. Clear at the mean, so that the page shows through, dark or light.
    scale = LinearSegmentedColormap.from_list("load", [(*STARVED, 1.0), (*STARVED, 0.0), (*BUSY, 0.0), (*BUSY, 1.0)])
    shares: list[list[float]] = []
    for layer, experts in enumerate(history.experts):
        columns = [history.load(record, layer) for record in range(len(history.steps))]
        for expert in range(experts):
            shares.append([_log_share(load, expert) for load in columns])
    rows = len(shares)
    figure, axes = _axes(min(7.0, 1.3 + max(1.6, 0.012 * rows)), width=2 * WIDTH)
    # A record is as wide as the steps that it covers, of the first one as the next.
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
    bar.ax.set_yticklabels(["≤ ⅛×", "½×", "mean", "2×", "≥ 8×"], fontsize=8.5, color=INK)
    bar.outline.set(edgecolor=INK, alpha=0.4)
    ends = [history.sum(layer, len(history.steps) - 1) for layer in range(len(history.layers))]
    unused = sum(load.dead for load in ends)
    alt = (
        f"Heat map of the load of {rows} experts in {len(history.layers)} layers from step {history.steps[0]} to "
        f"{history.steps[-1]}, over the mean of their layer. Experts unused at the end: {unused}; the busiest "
        f"has {max(load.imbalance for load in ends):.2f} times the mean."
    )
    return replace(_plot(analysis, figure, "Load of every expert over time", alt), wide=True)


def _log_share(load: LayerLoad, expert: int) -> float:
    """log2 of an expert's rows over the mean of its layer, within the scale of the heat map."""
    total = sum(load.tokens)
    if not load.tokens[expert]:
        return -LIMIT if total else 0.0
    return max(-LIMIT, min(LIMIT, math.log2(load.tokens[expert] * len(load.tokens) / total)))


def _bars(axes: Axes, rows: Sequence[tuple[str, float, str]]) -> None:
    names = [name for name, _, _ in rows]
    values = [value for _, value, _ in rows]
    axes.barh(names, values, color=[colour for _, _, colour in rows], height=0.62)
    axes.invert_yaxis()
    axes.set_xlim(0, max(values) * 1.25)
    axes.xaxis.set_visible(False)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    for y, value in enumerate(values):
        axes.text(value + max(values) * 0.02, y, plain(value), va="center", fontsize=9, color=INK)


def _line(run: RunMetrics) -> dict[str, Any]:
    again = not run.run_id.endswith("-1")
    return {
        "color": COLOURS[run.role],
        "ls": "--" if again else STYLES[run.role],
        "lw": 1.8 if run.role == OPTIMIZED else 1.5,
        "alpha": 0.8 if again else 1.0,
        "zorder": 3 if run.role == OPTIMIZED else 2,
    }


def _label(run: RunMetrics) -> str:
    number = run.run_id.rpartition("-")[2]
    return (
        WORDS[run.role]
        if number == "1"
        else f"{WORDS[run.role]} again"
        if number == "2"
        else f"{WORDS[run.role]} {number}"
    )


def _axes(height: float, columns: int = 1, width: float = WIDTH) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(width, height), layout="constrained")
    parts = figure.subplots(1, columns)
    for axes in parts if columns > 1 else [parts]:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.patch.set_alpha(0)
        axes.spines[["top", "right"]].set_visible(False)
        for spine in axes.spines.values():
            spine.set(color=INK, alpha=0.4)
        axes.tick_params(colors=INK, labelsize=9)
        axes.xaxis.label.set(color=INK, fontsize=9)
        axes.yaxis.label.set(color=INK, fontsize=9)
    return figure, parts


def _legend_above(axes: Axes) -> None:
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, handlelength=1.6)


def _plot(analysis: Analysis, figure: Figure, title: str, alt: str) -> Plot:
    import matplotlib

    for axes in figure.axes:
        legend = axes.get_legend()
        for text in legend.get_texts() if legend else ():
            text.set(color=INK, fontsize=9)
    buffer = io.StringIO()
    # The salt keeps the ids of several plots apart.
    with matplotlib.rc_context({"svg.hashsalt": f"{analysis.comparison.label} {title}"}):
        figure.savefig(
            buffer,
            format="svg",
            dpi=200,
            transparent=True,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    # The size comes from the page; the viewBox keeps the proportions.
    head, _, body = svg.partition(">")
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    # Matplotlib names every group; only what is referred to may keep its id, for ids are unique in a page.
    used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', body))
    body = re.sub(r' id="([^"]*)"', lambda match: match.group() if match.group(1) in used else "", body)
    return Plot(title, f'{head} aria-hidden="true">{body}', alt)
