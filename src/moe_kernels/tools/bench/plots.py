"""Plots of a benchmark: bars of the fraction of dense, and a roofline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_kernels.tools.bench.layer import OURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = dict[str, Any]
COLOURS = {OURS: "#d1495b", "eager": "#9aa5b1", "grouped_mm": "#30638e", "batched_mm": "#c3cbd4",
           "scattermoe": "#66a182", "liger": "#edae49", "sonicmoe": "#7d4e9e"}  # fmt: skip
DPI = 150


def bytes_moved(row: Row) -> int:
    """Fewest bytes that forward and backward move in 16 bits, each tensor once per pass that needs it.

    Forward: X, both weights, Z and the output. Backward: dO, X, Z, both weights, dX and both gradients.
    """
    rows = row["tokens"] * row["top_k"]
    tokens = row["tokens"] * row["hidden"]
    weights = 3 * row["experts"] * row["hidden"] * row["intermediate"]
    z = 2 * rows * row["intermediate"]
    return 2 * ((2 * tokens + weights + z) + (3 * tokens + z + 2 * weights))


def write_plots(report: dict[str, Any], folder: Path) -> list[Path]:
    """``bars-ROUTING.png`` and ``roofline-ROUTING.png`` of every routing in ``report``; returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for routing in dict.fromkeys(row["routing"] for row in report["results"]):
        rows = [row for row in report["results"] if row["routing"] == routing and row["forward_backward_ms"]]
        for name, draw in (("bars", _bars), ("roofline", _roofline)):
            figure, axes = pyplot.subplots(figsize=(11, 5), layout="constrained")
            draw(axes, rows, report["ceilings"])
            axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
            machine = report["environment"]
            title = f"{machine['gpu'] or machine['cpu']}, {report['arguments']['dtype']}, {routing} routing"
            versions = f"torch {machine['torch']}, transformers {machine['transformers']}, {machine['date'][:10]}"
            figure.suptitle(f"{title}, {versions}", fontsize=9)
            file = folder / f"{name}-{routing}.png"
            figure.savefig(file, dpi=DPI)
            pyplot.close(figure)
            written.append(file)
    return written


def _names(rows: list[Row]) -> list[str]:
    """Implementations in the order measured, without the ceiling."""
    return [name for name in dict.fromkeys(row["implementation"] for row in rows) if name != "dense"]


def _bars(axes: Axes, rows: list[Row], ceilings: dict[str, float]) -> None:
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    names = _names(rows)
    width = 0.8 / max(len(names), 1)
    for n, name in enumerate(names):
        own = {row["shape"]: row["dense_fraction"] for row in rows if row["implementation"] == name}
        places = [s + (n - (len(names) - 1) / 2) * width for s, shape in enumerate(shapes) if shape in own]
        axes.bar(places, [own[shape] for shape in shapes if shape in own], width, label=name, color=COLOURS.get(name))
    axes.axhline(1.0, color="black", linewidth=0.8, linestyle="--")
    axes.set_xticks(range(len(shapes)), shapes, rotation=20, ha="right")
    axes.set_ylabel("fraction of dense torch.mm, forward + backward")


def _roofline(axes: Axes, rows: list[Row], ceilings: dict[str, float]) -> None:
    intensities = [row["tokens"] * row["top_k"] * 18 * row["hidden"] * row["intermediate"] / bytes_moved(row)
                   for row in rows]  # fmt: skip
    knee = ceilings["matmul_tflops"] / ceilings["copy_tbs"]
    points = [min([knee / 4, *(x / 2 for x in intensities)]), knee, max([knee * 4, *(2 * x for x in intensities)])]
    roof = [min(ceilings["matmul_tflops"], ceilings["copy_tbs"] * point) for point in points]
    axes.plot(points, roof, color="black", label="matrix product and copy of this run")
    for name in [*_names(rows), "dense"]:
        own = [(x, row["forward_backward_tflops"]) for x, row in zip(intensities, rows, strict=True)
               if row["implementation"] == name]  # fmt: skip
        colour = COLOURS.get(name, "black" if name == "dense" else None)
        marker = "x" if name == "dense" else "o"
        axes.scatter([x for x, _ in own], [y for _, y in own], label=name, color=colour, marker=marker, s=28)
    for x, row in zip(intensities, rows, strict=True):
        if row["implementation"] == "dense":
            axes.annotate(row["shape"], (x, 0), xycoords=("data", "axes fraction"), fontsize=7, rotation=90,
                          xytext=(0, 5), textcoords="offset points", ha="center", va="bottom")  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations per byte that must move, forward + backward")
    axes.set_ylabel("TFLOP/s")
