"""Would the tests notice a bug? Plants bugs in the kernels, one at a time, in a copy, and runs the quick kernel tests.

Run by hand: ``python tests/core/mutations.py --json benchmarks/results/mutants.json`` (about a minute a core per four
mutants). Exit code 1 if one survives, or if a planted text is not in the source any more.
"""

# ruff: noqa: E501
from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from moe_kernels.bench.environment import environment

ROOT = Path(__file__).parents[2]
KERNELS = "src/moe_kernels/kernels/triton"
TESTS = ["tests/core/test_kernels.py", "tests/core/test_sanitized.py"]
ROUTER_TESTS = ["tests/router/test_router.py"]
QUICK = "not shipped_tiles and not scheduling and not sanitisers"

# what the bug is, file, text, replacement
MUTANTS = [
    ("row mask lets one row too many in", "tile.py", "return expert, row0, rows, rows < row_end", "return expert, row0, rows, rows <= row_end"),
    ("tile takes the wrong expert's end", "tile.py", "expert_start_ptr + expert + 1)", "expert_start_ptr + expert)"),
    ("column mask off by one", "tile.py", "(n < col_limit)[None, :])", "(n <= col_limit)[None, :])"),
    ("K tail of the weights is not masked", "tile.py", "mask=(r < ROWS)[:, None] & (c < COLS)[None, :], other=0.0", "mask=(r < ROWS)[:, None] & (c < COLS + 1)[None, :], other=0.0"),
    ("missing other= in the row loads", "tile.py", "block = tl.load(pointers, mask=(k < K)[None, :], other=0.0)", "block = tl.load(pointers, mask=(k < K)[None, :])"),
    ("wrong gathered token", "tile.py", "(slot // TOP_K).to(tl.int64)", "(slot // TOP_K * 0 + slot % TOP_K).to(tl.int64)"),
    ("expert offset in 32 bits", "tile.py", "base = w + expert.to(tl.int64) * ROWS * COLS", "base = w + expert * ROWS * COLS"),
    ("gate and up swapped in the epilogue", "up.py", "a = value(gate, up, ACTIVATION, P0, P1)", "a = value(up, gate, ACTIVATION, P0, P1)"),
    ("up columns read from the gate half", "up.py", "expert, I + n0, k0,", "expert, n0, k0,"),
    ("last K block lost", "up.py", "for k0 in tl.range(0, H, BLOCK_K)", "for k0 in tl.range(0, H - BLOCK_K + 1, BLOCK_K)"),
    ("combine forgets the routing weight", "combine.py", "total += weight * values", "total += values"),
    ("combine adds dropped slots", "combine.py", "mask=col_mask & kept, other=0.0", "mask=col_mask, other=0.0"),
    ("combine loses the last slot", "combine.py", "tl.static_range(TOP_K)", "tl.static_range(TOP_K - 1)"),
    ("sign of the activation's derivative", "dact.py", "d_gate = (da * d_gate)", "d_gate = (-da * d_gate)"),
    ("derivative without its second term", "../../activation.py", "derivative = s + value * (1.0 - s)", "derivative = s"),
    ("dZ without the routing weight", "dact.py", "        da *= weight\n", ""),
    ("wA without the routing weight", "dact.py", "(weight * a).to(", "(a).to("),
    ("dw of dropped slots not written", "dact.py", "dw.to(dw_ptr.dtype.element_ty), mask=rows < R)", "dw.to(dw_ptr.dtype.element_ty), mask=routed)"),
    ("wgrad takes a row of the next expert", "wgrad.py", "rows < end, m0, M, BLOCK_M, EVEN_M, True)", "rows <= end, m0, M, BLOCK_M, EVEN_M, True)"),
    ("wgrad loses the partial block", "wgrad.py", "if whole_end < end:", "if whole_end > end:"),
    ("wgrad skips experts without rows", "wgrad.py", "mask=(cols_m < M)[:, None] & (cols_n < N)[None, :])", "mask=(end > start) & (cols_m < M)[:, None] & (cols_n < N)[None, :])"),
    ("plan is not stable", "plan.py", "tl.sort(experts * BLOCK_S + place)\n        expert = key // BLOCK_S\n        slot = first_slot + key % BLOCK_S", "tl.sort(experts * BLOCK_S + BLOCK_S - 1 - place)\n        expert = key // BLOCK_S\n        slot = first_slot + BLOCK_S - 1 - key % BLOCK_S"),
    ("plan counts negative ids", "plan.py", "tl.where((ids >= 0) & (ids < E), ids, E)", "tl.where(ids < E, ids, E)"),
    ("plan cuts ids to 32 bits before it judges them", "plan.py", "    experts = tl.where((ids", "    ids = ids.to(tl.int32)\n    experts = tl.where((ids"),
    ("plan stores what lies behind the last slot", "plan.py", "return tl.where(in_range, experts, E + 1)", "return experts"),
    ("plan loses the earlier blocks of a chunk", "plan.py", "        next_row += counts\n", ""),
    ("dropped slots lose the earlier blocks of a chunk", "plan.py", "        routed_before += in_block\n", ""),
    ("plan counts the first block of a chunk for all", "plan.py", "        experts = following\n    tl.store(counts_ptr", "    tl.store(counts_ptr"),
    ("plan sorts the first block of a chunk for all", "plan.py", "        first_slot += BLOCK_S\n        experts = following\n", "        first_slot += BLOCK_S\n"),
    ("place in the sorted block not less its expert's first", "plan.py", "tl.gather(next_row - first,", "tl.gather(next_row,"),
    ("plan reads the first histograms alone", "plan.py", "for c0 in range(0, num_chunks, BLOCK_C):", "for c0 in range(0, BLOCK_C, BLOCK_C):"),
    ("tile of the next expert", "plan.py", "tile_end[None, :] <= t[:, None]", "tile_end[None, :] < t[:, None]"),
    ("tile's row without the tiles before its expert", "plan.py", "start - (tile_end - tiles) * GROUP_SIZE", "start"),
    ("a program describes its first tiles alone", "plan.py", "tile_count, num_chunks * BLOCK_T):", "tile_count, num_chunks * BLOCK_T + tile_count):"),
    ("one tile too few", "plan.py", "(total + GROUP_SIZE - 1) // GROUP_SIZE", "(total + GROUP_SIZE - 2) // GROUP_SIZE"),
    ("bias of the first expert for all", "tile.py", "bias_ptr + expert.to(tl.int64) * N + n", "bias_ptr + n"),
    ("low-rank part lost", "tile.py", "return tl.dot(low, factor, total, input_precision=PRECISION)", "return total"),
    ("low-rank factor of the first expert for all", "tile.py", "load_weight(factor_ptr, expert, n0,", "load_weight(factor_ptr, expert * 0, n0,"),
    ("low-rank up columns read from the gate half", "up.py", "row_mask, I + n0, 2 * I, RANK", "row_mask, n0, 2 * I, RANK"),
    ("bias of up read from the gate half", "up.py", "bias_ptr, expert, I + n0,", "bias_ptr, expert, n0,"),
    ("last column of interleaved Z lost", "up.py", "BLOCK_Z, PER_COLUMN * I - z0)", "BLOCK_Z, PER_COLUMN * I - z0 - 1)"),
    ("interleaved dZ in the wrong order", "dact.py", "tl.join(d_gate, d_up)", "tl.join(d_up, d_gate)"),
    ("dw without the bias's share", "dact.py", "dw += tl.sum(dout.to(tl.float32)", "dw += 0.0 * tl.sum(dout.to(tl.float32)"),
    ("expert of a row off at the border", "dact.py", "ends[None, :] <= rows[:, None]", "ends[None, :] < rows[:, None]"),
    ("clamp passes gradient outside", "../../activation.py", "(z >= low) & (z <= high)", "z >= low"),
    ("bias gradient takes a row of the next expert", "expert_sum.py", "(rows < end)[:, None] & (cols < N)", "(rows <= end)[:, None] & (cols < N)"),
    ("bias gradient without the routing weight", "expert_sum.py", "if WEIGHTED:", "if WEIGHTED and N < 0:"),
    ("last tile of a group walked twice", "tile.py", "size_m = tl.minimum(num_m - first_m, GROUP_M)", "size_m = GROUP_M"),
    ("gather loses a slot", "combine.py", "row = tl.load(slot_row_ptr + token * TOP_K + k)\n        tl.store", "row = tl.load(slot_row_ptr + token * TOP_K + TOP_K - 1 - k * 0)\n        tl.store"),
    ("gather loses the last column", "combine.py", "values, mask=(cols < H) & (row < routed))", "values, mask=(cols < H - 1) & (row < routed))"),
    ("counts of another chunk", "plan.py", "tl.where((c < chunk)[:, None], counts, 0)", "tl.where((c <= chunk)[:, None], counts, 0)"),
    ("router forgets the correction bias", "router.py", "key = _sortable(value + bias[None, :])", "key = _sortable(value)"),
    ("router weights with the correction bias", "router.py", "            value = _sigmoid(logits, weights_ptr.dtype.element_ty)\n", "            value = _sigmoid(logits, weights_ptr.dtype.element_ty) + bias[None, :]\n"),
    ("router takes one group too many", "router.py", "for _ in range(TOP_GROUPS):", "for _ in range(TOP_GROUPS + 1):"),
    ("router's groups by their largest alone", "router.py", "_sorted_value(first) + _sorted_value(second)", "_sorted_value(first)"),
    ("router forgets the scale", "router.py", "(weight * scale).to(", "weight.to("),
    ("router's weights not normalised", "router.py", "weight = value / (total + 1e-20 if SIGMOID else total)[:, None]", "weight = value"),
    ("router chooses the same expert twice", "router.py", "            key = tl.where(hit, _TAKEN, key)\n", ""),
    ("gradient of a router without the softmax's sum", "router.py", "weight * (grad - tl.sum(grad * weight, axis=1)[:, None])", "weight * grad"),
    ("gradient of a sigmoid router without its slope", "router.py", "tl.where(chosen == 1, grad * slope, 0.0)", "tl.where(chosen == 1, grad, 0.0)"),
    ("gradient of a router for experts not chosen", "router.py", "tl.where(chosen == 1, grad * slope, 0.0)", "grad * slope + value"),
]  # fmt: skip


def run_tests(folder: Path, tests: list[str]) -> int:
    """Exit code of pytest on the copy in ``folder``; a mutant that hangs counts as a failed test."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(folder / "src")}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", QUICK, *tests]
    try:
        return subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, timeout=600, check=False
        ).returncode
    except subprocess.TimeoutExpired:
        return 1


def survives(folder: Path, file: str, text: str, replacement: str) -> str | None:
    """None if a test fails on the mutant, else what went wrong."""
    path = (folder / KERNELS / file).resolve()
    source = path.read_text()
    if text not in source:
        return "the text to replace is gone: update the mutant"
    path.write_text(source.replace(text, replacement))
    code = run_tests(folder, ROUTER_TESTS if file == "router.py" else TESTS)
    path.write_text(source)
    # A negative code is a crash of the interpreter, which no run would overlook either.
    return None if code == 1 or code < 0 else f"survived (pytest exit code {code})"


def main() -> int:
    """Run every mutant; print one line each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write what became of each mutant, after each")
    wanted = parser.parse_args()
    results: list[dict[str, object]] = []
    machine = environment() | {"command": " ".join(["python", "tests/core/mutations.py", *sys.argv[1:]])}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("src", "tests", "pyproject.toml"):
            source = ROOT / part
            (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / part)
        if run_tests(folder, TESTS + ROUTER_TESTS) != 0:
            print("the tests fail without any mutant: nothing can be said")
            return 1
        for title, file, text, replacement in MUTANTS:
            began = time.monotonic()
            problem = survives(folder, file, text, replacement)
            results.append({"mutant": title, "file": file, "killed": problem is None, "note": problem or "",
                            "seconds": round(time.monotonic() - began, 1)})  # fmt: skip
            print(f"{'ALIVE' if problem else 'dead '}  {title}{': ' + problem if problem else ''}", flush=True)
            if wanted.json:
                report = {"mutants": len(MUTANTS), "environment": machine, "results": results}
                wanted.json.write_text(json.dumps(report, indent=1) + "\n")
    killed = sum(bool(result["killed"]) for result in results)
    print(f"{killed} of {len(MUTANTS)} mutants killed")
    return int(killed < len(MUTANTS))


if __name__ == "__main__":
    sys.exit(main())
