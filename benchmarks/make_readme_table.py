"""Write the results between the markers of README.md from the JSON files in benchmarks/results/.

    python benchmarks/make_readme_table.py            rewrite the tables
    python benchmarks/make_readme_table.py --check    exit with 1 if they are out of date

Reads what `moe-kernels compare` and `moe-kernels bench --json` write. Only results from a GPU appear: those from a
CPU say nothing about speed. Every number in the tables is from a file that the table names.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
NOTHING = "No result from a GPU is committed yet."

COMPARE_COLUMNS = ("pair", "experts run on", "step ms (p20-p80)", "tokens/s", "peak GiB", "experts' share",
                   "loss curves", "file")  # fmt: skip
BENCH_COLUMNS = ("layer", "implementation", "forward ms", "forward + backward ms", "of it GPU ms", "of dense",
                 "launches", "saved MiB", "peak MiB", "error", "file")  # fmt: skip


def load_results(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """(path below ``folder``, content) of every JSON file, sorted by path."""
    files = sorted(folder.rglob("*.json"))
    return [(file.relative_to(folder).as_posix(), json.loads(file.read_text())) for file in files]


def render(results: list[tuple[str, dict[str, Any]]]) -> str:
    """The Markdown between the markers."""
    compares = [(name, data) for name, data in results if _is_compare(data) and data["gpu"]]
    benches = [(name, data) for name, data in results if data.get("kind") == "bench" and data["environment"]["gpu"]]
    parts = []
    if compares:
        rows = [row for name, data in compares for row in _compare_rows(name, data)]
        parts += [_compare_caption(compares[-1][1]), _table(COMPARE_COLUMNS, rows)]
    if benches:
        rows = [row for name, data in benches for row in _bench_rows(name, data)]
        parts += [_bench_caption(benches[-1][1]), _table(BENCH_COLUMNS, rows)]
    return "\n\n".join(parts) or NOTHING


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
            f"{100 * share['experts_ms'] / share['step_ms']:.0f}%" if share else "",
            judged["loss"]["verdict"] if role == "optimized" else "",
            f"`{name}`",
        ])  # fmt: skip
    return rows


def _bench_caption(data: dict[str, Any]) -> str:
    machine = data["environment"]
    return (
        f"**One expert layer**, every gradient computed, {machine['gpu']}, torch {machine['torch']}, triton "
        f"{machine['triton']}, transformers {machine['transformers']}, {machine['date'][:10]}. dense: the same GEMMs "
        "through torch.mm, the ceiling. Error: the largest relative L2 error of output and gradients against float32."
    )


def _bench_rows(name: str, data: dict[str, Any]) -> list[list[str]]:
    rows = []
    for result in data["results"]:
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
            f"`{name}`",
        ])  # fmt: skip
    return rows


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _table(columns: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows])


def updated(readme: str, results: Path) -> str:
    """The README with its tables rewritten."""
    before, _, rest = readme.partition(BEGIN)
    _, marker, after = rest.partition(END)
    if not marker:
        raise SystemExit(f"README.md needs the markers {BEGIN} and {END}, in this order")
    return f"{before}{BEGIN}\n{render(load_results(results))}\n{END}{after}"


def main() -> int:
    """Rewrite the README, or with ``--check`` say whether it is up to date."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if out of date")
    parser.add_argument("--readme", type=Path, default=README)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    old = args.readme.read_text()
    new = updated(old, args.results)
    if args.check:
        if old != new:
            print("README.md is out of date. Cure: python benchmarks/make_readme_table.py", file=sys.stderr)
        return int(old != new)
    args.readme.write_text(new)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
