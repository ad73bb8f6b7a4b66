"""Write the results between the markers of README.md, docs/knobs.md and docs/lora.md from benchmarks/results/*.json.

    python benchmarks/make_readme_table.py            rewrite the tables
    python benchmarks/make_readme_table.py --check    exit with 1 if they are out of date

README.md shows what `moe-kernels compare` wrote, docs/knobs.md what `moe-kernels bench --json` wrote and docs/lora.md
what benchmarks/lora_cost.py wrote. Only results from a GPU appear: those from a CPU say nothing about speed. Every
number is from a file that the table names.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
NOTHING = "No result from a GPU is committed yet."

COMPARE_COLUMNS = ("pair", "experts run on", "step ms (p20-p80)", "tokens/s", "peak GiB", "experts' share",
                   "loss curves", "file")  # fmt: skip
LAYER_COLUMNS = ("layer", "implementation", "forward ms", "forward + backward ms", "of it GPU ms", "of dense",
                 "launches", "saved MiB", "peak MiB", "error")  # fmt: skip
LORA_COLUMNS = ("base", "adapters", "implementation", "forward ms", "forward + backward ms", "of it GPU ms",
                "saved MiB", "peak MiB", "weights MiB", "error")  # fmt: skip
LORA_PACKAGES = ("torch", "triton", "transformers", "peft", "axolotl", "bitsandbytes")

Results = list[tuple[str, dict[str, Any]]]


def load_results(folder: Path) -> Results:
    """(path below ``folder``, content) of every JSON file, sorted by path."""
    files = sorted(folder.rglob("*.json"))
    return [(file.relative_to(folder).as_posix(), json.loads(file.read_text())) for file in files]


def trainings(results: Results) -> str:
    """Tables of the compared trainings and of their expert layers."""
    compares = [(name, data) for name, data in results if _is_compare(data) and data["gpu"]]
    if not compares:
        return NOTHING
    pairs = [row for name, data in compares for row in _compare_rows(name, data)]
    layers = [row for _, data in compares for row in _layer_rows(data["experts"]["measurements"])]
    caption = "**One expert layer** of each, measured in the same call (same files), all gradients computed."
    return "\n\n".join([
        _compare_caption(compares[-1][1]), _table(COMPARE_COLUMNS, pairs),
        f"{caption} {LEGEND}", _table(LAYER_COLUMNS, layers),
    ])  # fmt: skip


def layers(results: Results) -> str:
    """Tables of the benchmarks of one layer, one for each file."""
    parts = []
    for name, data in results:
        if data.get("kind") == "bench" and data["environment"]["gpu"] and "-log-" not in name:  # logs: old kernels
            parts += [_bench_caption(name, data["environment"]), _table(LAYER_COLUMNS, _layer_rows(data["results"]))]
    return "\n\n".join(parts) or NOTHING


def lora(results: Results) -> str:
    """Tables of the benchmarks of one layer with LoRA, one for each file."""
    parts = []
    for name, data in results:
        if data.get("kind") == "lora" and data["environment"]["gpu"]:
            parts += [_lora_caption(name, data), _table(LORA_COLUMNS, [_lora_row(row) for row in data["rows"]])]
    return "\n\n".join(parts) or NOTHING


DOCUMENTS: dict[str, Callable[[Results], str]] = {
    "README.md": trainings, "docs/knobs.md": layers, "docs/lora.md": lora,
}  # fmt: skip


def _is_compare(data: dict[str, Any]) -> bool:
    return str(data.get("schema", "")).startswith("moe-kernels compare")


def _compare_caption(data: dict[str, Any]) -> str:
    versions = data["versions"]
    return (
        f"**Whole training**, `axolotl train` with and without the kernels on one {data['gpu']['name']}: axolotl "
        f"{versions['axolotl']}, transformers {versions['transformers']}, torch {versions['torch']}, triton "
        f"{versions['triton']}, {data['created'][:10]}. The share is the expert layers' part of the step."
    )


def _compare_rows(name: str, data: dict[str, Any]) -> list[list[str]]:
    judged = data["judged"]
    rows = []
    for role, side in judged["sides"].items():
        share = judged["shares"].get(role)
        step = side["step_ms"]
        rows.append([
            f"{data['name']}, {role}",
            judged["implementation"][role],
            f"{step['median']:.1f} ({step['p20']:.1f}-{step['p80']:.1f})" if step else "failed",
            f"{side['tokens_per_s']['median']:,.0f}" if side["tokens_per_s"] else "",
            _number(side["peak_allocated_gib"], ".1f"),
            # The eager loop's time alone and inside a step differ too much to divide one by the other.
            f"{100 * share['experts_ms'] / share['step_ms']:.0f}%" if share and role != "eager" else "",
            judged["loss"]["verdict"] if role == "optimized" else "",
            f"`{name}`",
        ])  # fmt: skip
    return rows


LEGEND = (
    "dense: the same GEMMs through torch.mm, the ceiling. launches: forward / forward and backward. Error: the "
    "largest relative L2 error of output and gradients against float32."
)


def _bench_caption(name: str, machine: dict[str, Any]) -> str:
    return (
        f"`benchmarks/results/{name}`: `{machine['command']}` on {machine['gpu']}, torch {machine['torch']}, triton "
        f"{machine['triton']}, transformers {machine['transformers']}, {machine['date'][:10]}; g is the group size, "
        "p=1 persistent. "
        f"{LEGEND}"
    )


def _layer_rows(measurements: list[dict[str, Any]]) -> list[list[str]]:
    rows = []
    for result in measurements:
        both = result["forward_backward_ms"]
        launches = result["launches_forward_backward"]
        rows.append([
            f"{result['shape']}, T={result['tokens']}",
            result["implementation"],
            _number(result["forward_ms"] and result["forward_ms"]["median"], ".2f"),
            f"{both['median']:.2f}" if both else result["note"],
            _number(result["forward_backward_queued_ms"] and result["forward_backward_queued_ms"]["median"], ".2f"),
            _number(result["dense_fraction"], ".2f"),
            "" if launches is None else f"{result['launches_forward']} / {launches}",
            _number(result["saved_mb"], ".0f"),
            _number(result["peak_mb"], ".0f"),
            _number(max(result["rel_error"].values(), default=None), ".1e"),
        ])  # fmt: skip
    return rows


def _lora_caption(name: str, data: dict[str, Any]) -> str:
    machine, shape = data["environment"], data["shape"]
    versions = ", ".join(f"{package} {machine[package]}" for package in LORA_PACKAGES if machine[package])
    return (
        f"`benchmarks/results/{name}`: {machine['gpu']}, {versions}, {machine['date'][:10]}. One layer of "
        f"{shape['name']}: T={shape['tokens']} K={shape['top_k']} E={shape['experts']} H={shape['hidden']} "
        f"I={shape['intermediate']}, r={data['rank']}; medians of {data['repeats']}. float32 adapters run under "
        "autocast, as PEFT and Axolotl train them unless told otherwise. Peak: above the weights. Error: the largest "
        "relative L2 error of output and gradients against float64."
    )


def _lora_row(row: dict[str, Any]) -> list[str]:
    forward, both = row["forward"], row["forward_backward"]
    return [
        row["base"],
        row["adapters"],
        row["implementation"],
        _number(forward and forward["total"]["median"], ".2f"),
        f"{both['total']['median']:.2f}" if both else row["note"] or "not timed",
        _number(both and both["queued"] and both["queued"]["median"], ".2f"),
        _number(row["saved_mb"], ".0f"),
        _number(row["peak_mb"], ".0f"),
        _number(row["weights_mb"], ".0f"),
        _number(max(row["rel_error"].values(), default=None), ".1e"),
    ]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _table(columns: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows])


def updated(text: str, tables: str) -> str:
    """``text`` with what stands between its markers replaced by ``tables``."""
    before, _, rest = text.partition(BEGIN)
    _, marker, after = rest.partition(END)
    if not marker:
        raise SystemExit(f"the markers {BEGIN} and {END} are missing, or not in this order")
    return f"{before}{BEGIN}\n{tables}\n{END}{after}"


def main() -> int:
    """Rewrite the documents, or with ``--check`` say which are out of date."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if out of date")
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository")
    args = parser.parse_args()
    results = load_results(args.root / "benchmarks" / "results")
    stale = 0
    for name, tables in DOCUMENTS.items():
        document = args.root / name
        old = document.read_text()
        new = updated(old, tables(results))
        if args.check and old != new:
            print(f"{name} is out of date. Cure: python benchmarks/make_readme_table.py", file=sys.stderr)
            stale = 1
        elif old != new:
            document.write_text(new)
    return stale


if __name__ == "__main__":
    raise SystemExit(main())
