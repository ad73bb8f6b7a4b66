"""Write the results between the markers of README.md and some pages of docs from benchmarks/results/*.json.

    python benchmarks/make_readme_table.py            rewrite the tables
    python benchmarks/make_readme_table.py --check    exit with 1 if they are out of date

docs/results.md shows the newest comparison of each pair with each Axolotl that `moe-kernels compare` wrote, README.md
the same in short, docs/performance.md and docs/knobs.md what `moe-kernels bench --json` wrote (files with several
settings of the knobs in the latter), docs/versions.md the same layers under each release of triton, docs/lora.md what
benchmarks/forms.py, benchmarks/fp8_peers.py and benchmarks/lora_cost.py, docs/router.md what
benchmarks/router_cost.py and docs/distributed.md what benchmarks/scaling.py wrote. Only results from a GPU appear, as
those from a CPU say nothing about speed, but for docs/numerics.md: what benchmarks/fp8_numerics.py wrote. Every
number is from a file that the table names.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pages
from moe_kernels.tools.compare.judge import smooth
from several_gpus import traffic

RELEASES = "-triton-"  # in the name of a file: the same layers under one release of triton
NOTHING = "No result from a GPU is committed yet."

PAIR_COLUMNS = ("pair", "GPU, Axolotl, triton", "step ms: stock, ours", "tokens/s, times stock's",
                "times the eager loop's", "peak GiB: stock, ours", "losses", "file")  # fmt: skip
SPEED_COLUMNS = ("layer", "forward ms: stock, ours", "times as fast", "forward + backward ms", "times as fast",
                 "launches", "peak MiB")  # fmt: skip
COMPARE_COLUMNS = ("pair", "experts run on", "step ms (p20-p80)", "tokens/s", "peak GiB", "experts' share",
                   "loss curves", "file")  # fmt: skip
LAYER_COLUMNS = ("layer", "implementation", "forward ms", "forward + backward ms", "of it GPU ms", "of dense",
                 "launches", "saved MiB", "peak MiB", "error")  # fmt: skip
# WHO: whom the file has, in this order.
WIDE_COLUMNS = ("layer", "routing", "forward: WHO", "forward and backward: the same", "its wall time: the same",
                "of dense, wall (GPU time)", "saved / peak MiB", "error")  # fmt: skip
WIDE_ROWS = ("moe_kernels", "sonicmoe", "grouped_mm", "dense")
SCALING_COLUMNS = ("family", "engine", "GPUs", "step ms: stock, ours", "tokens/s per GPU: stock, ours",
                   "peak GiB: stock, ours", "faster", "scaling: stock, ours", "losses apart")  # fmt: skip
# Where the trainings were watched: shares of the step, and rows of the busiest rank over the mean.
WATCHED_COLUMNS = ("communication (exposed): stock, ours", "no kernel: stock, ours", "busiest rank")
LORA_COLUMNS = ("base", "adapters", "implementation", "forward ms", "forward + backward ms", "of it GPU ms",
                "saved MiB", "peak MiB", "weights MiB", "error")  # fmt: skip
FORM_COLUMNS = ("layer", "form", "GPU ms (p20-p80)", "of dense", "speed", "peak MiB", "error")
PEER_COLUMNS = ("layer", "experts", "forward, GPU ms", "forward and backward, GPU ms", "as fast as transformers'",
                "of dense", "peak MiB", "error")  # fmt: skip
FP8_COLUMNS = ("data", "mode", "out", "dX", "dw", "LoRA's factors, the largest", "size of out and dX, off by")
CURVE_COLUMNS = ("LoRA over", "first loss", "last 10", "curves apart: mean, largest", "first gradient norm off by",
                 "verdict")  # fmt: skip
ROUTER_COLUMNS = ("router", "E", "H", "autocast", "forward, GPU ms: stock, fused", "forward + backward: the same",
                  "faster", "host ms: the same", "launches: the same")  # fmt: skip
LORA_PACKAGES = ("torch", "triton", "transformers", "peft", "axolotl", "bitsandbytes")

Results = list[tuple[str, dict[str, Any]]]


def load_results(folder: Path) -> Results:
    """(path below ``folder``, content) of every JSON file, sorted by path."""
    files = sorted(folder.rglob("*.json"))
    return [(file.relative_to(folder).as_posix(), json.loads(file.read_text())) for file in files]


def _newest(results: Results) -> Results:
    """The newest comparison on a GPU of each pair with each Axolotl: which one is installed depends on the Python."""
    newest: dict[tuple[str, str], tuple[str, dict[str, Any]]] = {}
    for name, data in results:
        if _is_compare(data) and data["gpu"]:
            pair = data["name"], data["versions"].get("axolotl", "")
            if pair not in newest or newest[pair][1]["created"] < data["created"]:
                newest[pair] = name, data
    return list(newest.values())


def summary(results: Results) -> str:
    """The compared trainings, a line a pair, and the expert layers measured with them, a line each."""
    compares = _newest(results)
    if not compares:
        return NOTHING
    # Whole models first, then adapters, for which no layer alone is measured.
    compares.sort(key=lambda row: ("eager" not in row[1]["judged"]["sides"], row[1]["name"], row[0]))
    layers = [row for _, data in compares if (row := _speed_row(data["experts"]["measurements"]))]
    return "\n\n".join([
        "**Whole training**: `axolotl train` with and without the kernels on one GPU, medians of the steps.",
        _table(PAIR_COLUMNS, [_pair_row(name, data) for name, data in compares]),
        "**One expert layer** of the first pairs, in the same calls: every gradient computed, stock is grouped_mm.",
        _table(SPEED_COLUMNS, layers),
    ])  # fmt: skip


def _pair_row(name: str, data: dict[str, Any]) -> list[str]:
    sides, versions = data["judged"]["sides"], data["versions"]
    both = sides["baseline"], sides["optimized"]
    speeds = {role: side["tokens_per_s"] and side["tokens_per_s"]["median"] for role, side in sides.items()}

    def times(role: str) -> str:
        return f"{speeds['optimized'] / speeds[role]:.2f}" if speeds["optimized"] and speeds.get(role) else ""

    return [
        data["name"].replace("-attn_implementation-", ", "),
        ", ".join([data["gpu"]["name"].removeprefix("NVIDIA "), versions["axolotl"], versions["triton"]]),
        ", ".join(f"{side['step_ms']['median']:.0f}" if side["step_ms"] else "failed" for side in both),
        times("baseline"),
        times("eager"),
        ", ".join(_number(side["peak_allocated_gib"], ".1f") for side in both),
        data["judged"]["loss"]["verdict"],
        f"`{name}`",
    ]


def _speed_row(measurements: list[dict[str, Any]]) -> list[str] | None:
    """grouped_mm and ours side by side; None where one of them was not timed."""
    timed = {row["implementation"]: row for row in measurements if row["forward_backward_ms"]}
    if not {"grouped_mm", "moe_kernels"} <= timed.keys():
        return None
    both = timed["grouped_mm"], timed["moe_kernels"]
    cells = []
    for field in ("forward_ms", "forward_backward_ms"):
        stock, ours = (row[field]["median"] for row in both)
        cells += [f"{stock:.2f}, {ours:.2f}", f"{stock / ours:.2f}"]
    launches, peak = (
        ", ".join(_number(row[field], ".0f") for row in both) for field in ("launches_forward_backward", "peak_mb")
    )
    return [f"{both[1]['shape']}, T={both[1]['tokens']}", *cells, launches, peak]


def trainings(results: Results) -> str:
    """Tables of the compared trainings and of their expert layers, by GPU and versions."""
    by_machine: dict[tuple[str, ...], list[tuple[str, dict[str, Any]]]] = {}
    for name, data in _newest(results):
        versions = (data["versions"].get(package, "") for package in ("axolotl", "transformers", "torch", "triton"))
        by_machine.setdefault((data["gpu"]["name"], *versions), []).append((name, data))
    parts = []
    for compares in by_machine.values():
        pairs = [row for name, data in compares for row in _compare_rows(name, data)]
        layers = [row for _, data in compares for row in _layer_rows(data["experts"]["measurements"])]
        parts += [_compare_caption([data for _, data in compares]), _table(COMPARE_COLUMNS, pairs)]
        if layers:  # none for adapters alone
            measured = "measured in the same call (same files), all gradients computed"
            parts += [f"**One expert layer** of each, {measured}. {LEGEND}", _table(LAYER_COLUMNS, layers)]
    return "\n\n".join(parts) or NOTHING


def _benches(results: Results, knobs: bool) -> list[tuple[str, dict[str, Any]]]:
    """What `moe-kernels bench` measured on a GPU, with one setting of the knobs or several; no earlier kernels."""
    found = []
    for name, data in results:
        old = "-log-" in name or RELEASES in name
        if data.get("kind") == "bench" and data["environment"]["gpu"] and not old:
            settings = {row["implementation"] for row in data["results"] if "[" in row["implementation"]}
            if bool(settings) == knobs:
                found.append((name, data))
    return found


def knobs(results: Results) -> str:
    """Tables of the layers that were measured with several settings, one for each file."""
    parts = []
    for name, data in _benches(results, True):
        parts += [_bench_caption(name, data["environment"]), _table(LAYER_COLUMNS, _layer_rows(data["results"]))]
    return "\n\n".join(parts) or NOTHING


def layers(results: Results) -> str:
    """One line for each layer and routing of each file: ours, the peers and dense side by side."""
    parts = []
    for name, data in _benches(results, False):
        cells: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
        for row in data["results"]:
            cells.setdefault((row["shape"], row["routing"]), {})[row["implementation"]] = row
        who = [name for name in WIDE_ROWS if any(name in by_name for by_name in cells.values())]
        rows = [_side_by_side(shape, routing, by_name, who) for (shape, routing), by_name in cells.items()]
        mean = statistics.geometric_mean([found["moe_kernels"]["dense_fraction"] for found in cells.values()])
        machine = data["environment"]
        names = ", ".join("ours" if name == "moe_kernels" else name for name in who)
        parts += [
            f"`{name}`: `{machine['command']}` on {machine['gpu']}, triton {machine['triton']}, "
            f"{machine['date'][:10]}; geometric mean of ours of dense, wall time: {mean:.2f}."
            f"{_against_sonicmoe(cells)}{' ' + data['note'] if 'note' in data else ''}",
            _table(tuple(column.replace("WHO", names) for column in WIDE_COLUMNS), rows),
        ]
    return "\n\n".join(parts) or NOTHING


def _against_sonicmoe(cells: dict[tuple[str, str], dict[str, dict[str, Any]]]) -> str:
    """A sentence on how many times as fast as SonicMoE ours are, forward and backward, where both were measured."""
    both = [found for found in cells.values() if "sonicmoe" in found]
    if not both:
        return ""
    gpu, wall = (
        [found["sonicmoe"][field]["median"] / found["moe_kernels"][field]["median"] for found in both]
        for field in ("forward_backward_queued_ms", "forward_backward_ms")
    )
    means = [statistics.geometric_mean(ratios) for ratios in (gpu, wall)]
    return (
        f" Geometric mean of sonicmoe's time over ours, forward and backward: {means[0]:.2f} of GPU time "
        f"({min(gpu):.2f} to {max(gpu):.2f}), {means[1]:.2f} of wall time ({min(wall):.2f} to {max(wall):.2f})."
    )


def _side_by_side(shape: str, routing: str, by_name: dict[str, dict[str, Any]], who: list[str]) -> list[str]:
    def each(field: str) -> str:
        found = (by_name.get(name, {}).get(field) for name in who)
        return ", ".join("-" if spread is None else f"{spread['median']:.2f}" for spread in found)

    ours, dense = by_name["moe_kernels"], by_name["dense"]
    queued = [row["forward_backward_queued_ms"] for row in (dense, ours)]
    alone = f" ({queued[0]['median'] / queued[1]['median']:.2f})" if all(queued) else ""
    return [
        shape,
        routing,
        each("forward_queued_ms"),
        each("forward_backward_queued_ms"),
        each("forward_backward_ms"),
        f"{ours['dense_fraction']:.2f}{alone}",
        f"{_number(ours['saved_mb'], '.0f')} / {_number(ours['peak_mb'], '.0f')}",
        f"{max(ours['rel_error'].values()):.1e}",
    ]


def releases(results: Results) -> str:
    """GPU time of each layer, forward and backward, under each release of triton: a column for each file."""
    files = [(name, data) for name, data in results if RELEASES in name and data.get("kind") == "bench"]
    if not files:
        return NOTHING
    columns, cells = ["layer"], {}
    for name, data in files:
        columns.append(f"{data['environment']['triton']} (`{name}`)")
        for row in data["results"]:
            if row["implementation"] == "moe_kernels":
                cells.setdefault(row["shape"], []).append(row["forward_backward_queued_ms"]["median"])
    first = list(cells.values())
    rows = [[shape, *(f"{time:.2f}" for time in times)] for shape, times in cells.items()]
    ratios = (statistics.geometric_mean([times[i] / times[0] for times in first]) for i in range(len(files)))
    return _table(tuple(columns), [*rows, ["mean of the ratios to the first", *(f"{ratio:.3f}" for ratio in ratios)]])


def scaling(results: Results) -> str:
    """A line for each family and engine of the trainings on several GPUs, a table for each file."""
    parts = []
    for name, data in results:
        if data.get("kind") == "scaling" and data["environment"]["gpu"]:
            machine = data["environment"]
            pairs: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
            for row in data["rows"]:
                if row["ok"]:
                    pairs.setdefault((row["family"], row["engine"]), {})[row["experts"]] = row
            lines = {(line["family"], line["engine"]): line for line in data["summary"]}
            watched = any(row.get("traffic") for row in data["rows"])
            parts += [
                f"`{name}`: `{machine['command']}` on {data['setting']['gpus']} GPUs, {machine['gpu']}, torch "
                f"{machine['torch']}, axolotl {machine['axolotl']}, {machine['date'][:10]}. Stock experts are "
                f"grouped_mm.{_releases(data['rows'], machine)} Scaling: tokens/s per GPU over those of one GPU.",
                _table(
                    SCALING_COLUMNS + (WATCHED_COLUMNS if watched else ()),
                    [
                        _scaling_row(pair, lines[key]) + (_watched(pair) if watched else [])
                        for key, pair in sorted(pairs.items())
                    ],
                ),
            ]
    return "\n\n".join(parts) or NOTHING


def _scaling_row(pair: dict[str, dict[str, Any]], line: dict[str, Any]) -> list[str]:
    def each(field: Callable[[dict[str, Any]], str]) -> str:
        return ", ".join(field(pair[name]) if name in pair else "-" for name in ("grouped_mm", "moe_kernels"))

    efficiency = [_number(line[f"efficiency_{name}"], ".2f") for name in ("grouped_mm", "moe_kernels")]
    return [
        line["family"],
        line["engine"],
        str(next(iter(pair.values()))["gpus"]),
        each(lambda row: "{median:.0f} ({p20:.0f}-{p80:.0f})".format(**row["step_ms"])),
        each(lambda row: f"{row['tokens_per_s_per_gpu']:,.0f}"),
        each(lambda row: _number(row["peak_gib"], ".1f")),
        _number(line["speedup"], ".2f"),
        ", ".join(value or "-" for value in efficiency) if any(efficiency) else "",
        _number(line["loss_difference"], ".2%"),
    ]


def _releases(rows: list[dict[str, Any]], machine: dict[str, Any]) -> str:
    """The engines that ran on other releases than the machine's, in a sentence."""
    found: dict[str, str] = {}
    for row in rows:
        versions = row.get("versions") or {}
        other = [f"{name} {versions[name]}" for name in ("axolotl", "transformers")
                 if name in versions and versions[name] != machine.get(name)]  # fmt: skip
        if other:
            found[row["engine"]] = " and ".join(other)
    return "".join(f" On {name}: {', '.join(engine for engine in found if found[engine] == name)}."
                   for name in dict.fromkeys(found.values()))  # fmt: skip


def _watched(pair: dict[str, dict[str, Any]]) -> list[str]:
    """Of both sides communication, and no kernel at all, the mean of the ranks; how our router loads the ranks."""
    seen = [traffic(pair[name]) if name in pair else None for name in ("grouped_mm", "moe_kernels")]
    load = pair.get("moe_kernels", {}).get("imbalance")
    return [
        ", ".join("-" if one is None else f"{one.communication:.0%} ({one.exposed:.0%})" for one in seen),
        ", ".join("-" if one is None else f"{one.idle:.0%}" for one in seen),
        "" if load is None else f"{load['mean']:.2f}",
    ]


def lora(results: Results) -> str:
    """Tables of the benchmarks of one layer: the forms in which it is trained, and LoRA beside the peers'."""
    parts = []
    for name, data in results:
        if data.get("kind") == "forms" and data["environment"]["gpu"] and "-log-" not in name:
            machine = data["environment"]
            parts += [
                f"`benchmarks/results/{name}`: `{machine['command']}` on {machine['gpu']}, torch {machine['torch']}, "
                f"triton {machine['triton']}, {machine['date'][:10]}; medians of calls in turn. Of dense: against "
                "the same GEMMs by torch.mm with one expert's weights for all rows, without weight gradients where "
                "the base is frozen. Speed: LoRA of rank 16 over a 16-bit base is 1, in the same run. Peak: above "
                "weights and inputs. Error: as below.",
                _table(FORM_COLUMNS, _form_rows(data["rows"])),
            ]
        if data.get("kind") == "fp8 peers" and data["environment"]["gpu"]:
            machine = data["environment"]
            parts += [
                f"`benchmarks/results/{name}`: `{machine['command']}` on {machine['gpu']}, torch {machine['torch']}, "
                f"triton {machine['triton']}, transformers {machine['transformers']}, {machine['date'][:10]}; frozen "
                "experts in block-fp8, medians of calls in turn. Error: the largest relative L2 error of output and "
                "gradients against float64 on dequantised weights.",
                _table(PEER_COLUMNS, _peer_rows(data["rows"])),
            ]
        if data.get("kind") == "lora" and data["environment"]["gpu"]:
            parts += [_lora_caption(name, data), _table(LORA_COLUMNS, [_lora_row(row) for row in data["rows"]])]
    return "\n\n".join(parts) or NOTHING


def _form_rows(rows: list[dict[str, Any]]) -> list[list[str]]:
    ours = [row for row in rows if row["implementation"] == "auto"]
    lora = {row["shape"]: row["gpu_ms"]["median"] for row in ours if row["form"] == "lora-16"}
    return [_form_row(row, lora.get(row["shape"])) for row in ours]


def _form_row(row: dict[str, Any], lora_ms: float | None) -> list[str]:
    ms, low_rank = row["gpu_ms"], "lora-" in row["form"]
    return [
        row["shape"],
        row["form"],
        f"{ms['median']:.2f} ({ms['p20']:.2f}-{ms['p80']:.2f})",
        f"{row['of_dense']:.2f}",
        f"{lora_ms / ms['median']:.2f}" if lora_ms and low_rank else "",
        f"{row['peak_mb']:.0f}",
        f"{max(row['rel_error'].values()):.1e}" if row["rel_error"] else "",
    ]


def _peer_rows(rows: list[dict[str, Any]]) -> list[list[str]]:
    medians = {(row["shape"], row["implementation"]): row["forward_backward_gpu_ms"]["median"]
               for row in rows if "forward_backward_gpu_ms" in row}  # fmt: skip
    found = []
    for row in rows:
        both, theirs = (medians.get((row["shape"], who)) for who in (row["implementation"], "transformers"))
        if both is None or row["implementation"] == "dense":
            continue
        found.append([
            row["shape"],
            row["implementation"],
            f"{row['forward_gpu_ms']['median']:.2f}",
            f"{both:.2f}",
            f"{theirs / both:.2f}" if theirs else "it takes multiples of 128 alone",
            f"{medians[row['shape'], 'dense'] / both:.2f}",
            f"{row['peak_mb']:.0f}",
            f"{max(row['rel_error'].values()):.1e}",
        ])  # fmt: skip
    return found


def routers(results: Results) -> str:
    """The model's own routers beside the fused one, a table for each file."""
    parts = []
    for name, data in results:
        if data.get("kind") == "router" and data["environment"]["gpu"]:
            machine = data["environment"]
            parts += [
                f"`benchmarks/results/{name}`: `{machine['command']}` on {machine['gpu']}, torch {machine['torch']}, "
                f"triton {machine['triton']}, transformers {machine['transformers']}, {machine['date'][:10]}; "
                f"T={data['rows'][0]['tokens']}, bfloat16, the linear included; medians of calls in turn. Faster, "
                "host time and launches are of forward and backward.",
                _table(ROUTER_COLUMNS, [_router_row(row) for row in data["rows"]]),
            ]
    return "\n\n".join(parts) or NOTHING


def _router_row(row: dict[str, Any]) -> list[str]:
    def two(what: str, field: str, form: str) -> str:
        return ", ".join(format(row[f"{who}_{what}"][field], form) for who in ("stock", "fused"))

    stock, fused = (row[f"{who}_forward_backward"]["gpu_ms"] for who in ("stock", "fused"))
    return [
        row["router"][1],
        str(row["router"][3]),
        str(row["router"][2]),
        "yes" if row["autocast"] else "no",
        two("forward", "gpu_ms", ".3f"),
        two("forward_backward", "gpu_ms", ".3f"),
        f"{stock / fused:.2f}",
        two("forward_backward", "host_ms", ".2f"),
        two("forward_backward", "launches", "d"),
    ]


def fp8_modes(results: Results) -> str:
    """Tables of the errors and the losses of both modes of block-fp8 weights, from a CPU."""
    parts = []
    for name, data in results:
        if data.get("kind") != "fp8-numerics":
            continue
        machine, shape, training = data["environment"], data["layer"], data["training"]
        baseline, steps = training["runs"]["dequantised"], len(training["runs"]["dequantised"]["losses"])
        parts += [
            f"`benchmarks/results/{name}`: `{machine['command']}`, torch {machine['torch']}, {machine['date'][:10]}, "
            f"on a CPU. A layer of T={shape['tokens']} K={shape['top_k']} E={shape['experts']} H={shape['hidden']} "
            f"I={shape['intermediate']}, r={shape['rank']}, bfloat16: relative L2 errors, and the relative error of "
            "the size of out and dX, which is where a narrow accumulator shows. One sign: nothing is negative. "
            "Outlier channels: every 97th of X and dO is 30 times as large.",
            _table(FP8_COLUMNS, [_fp8_row(row) for row in data["errors"]]),
            f"A Qwen3-MoE of {training['sizes']['num_hidden_layers']} layers, hidden size "
            f"{training['sizes']['hidden_size']} and {training['sizes']['num_experts']} experts, trained for "
            f"{len(training['base_losses'])} steps, then in block-fp8, then LoRA (r=16) for {steps} steps of "
            f"{training['tokens_per_step']} tokens of other text; judged as `moe-kernels compare` judges two curves "
            "in bfloat16, against the dequantised model.",
            _table(CURVE_COLUMNS, [_curve_row(run, training, baseline) for run in training["runs"]]),
        ]
    return "\n\n".join(parts) or "No result is committed yet."


def _fp8_row(row: dict[str, Any]) -> list[str]:
    error, slope = row["rel_error"], row["slope"]
    factors = max(value for name, value in error.items() if "lora" in name)
    sizes = (error["out"], error["dx"], error["dtopk_weights"], factors)
    return [
        row["data"], row["mode"], *(f"{value:.1e}" for value in sizes), f"{slope['out']:+.1e}, {slope['dx']:+.1e}",
    ]  # fmt: skip


def _curve_row(name: str, training: dict[str, Any], baseline: dict[str, Any]) -> list[str]:
    run = training["runs"][name]
    pairs = zip(smooth(run["losses"]), smooth(baseline["losses"]), strict=True)
    apart = [abs(ours - theirs) for ours, theirs in pairs]
    norm = run["grad_norms"][0] / baseline["grad_norms"][0] - 1
    compared = name != "dequantised"
    return [
        f"{name} weights" if name == "dequantised" else f"fp8 weights, {name}",
        f"{run['losses'][0]:.4f}",
        f"{statistics.mean(run['losses'][-10:]):.4f}",
        f"{statistics.mean(apart):.4f}, {max(apart):.4f}" if compared else "",
        f"{norm:+.2%}" if compared else "",
        training["verdicts"][name]["verdict"] if compared else "",
    ]


DOCUMENTS: dict[str, Callable[[Results], str]] = {
    "README.md": summary, "docs/results.md": trainings, "docs/performance.md": layers, "docs/knobs.md": knobs,
    "docs/lora.md": lora, "docs/distributed.md": scaling, "docs/versions.md": releases, "docs/router.md": routers,
    "docs/numerics.md": fp8_modes,
}  # fmt: skip


def _is_compare(data: dict[str, Any]) -> bool:
    return str(data.get("schema", "")).startswith("moe-kernels compare")


def _compare_caption(compares: list[dict[str, Any]]) -> str:
    versions, gpu = compares[0]["versions"], compares[0]["gpu"]["name"]
    dates = " and ".join(sorted({data["created"][:10] for data in compares}))
    return (
        f"**Whole training**, `axolotl train` with and without the kernels on one {gpu}: axolotl "
        f"{versions['axolotl']}, transformers {versions['transformers']}, torch {versions['torch']}, triton "
        f"{versions['triton']}, {dates}. The share is the expert layers' part of the step."
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
    return pages.table(columns, [[cell.replace("|", "\\|") for cell in row] for row in rows])


def documents(root: Path) -> dict[str, str]:
    """What belongs into each page, from the results under ``root``."""
    results = load_results(root / "benchmarks" / "results")
    return {page: tables(results) for page, tables in DOCUMENTS.items()}


if __name__ == "__main__":
    raise SystemExit(pages.main(__doc__, "results", documents))
