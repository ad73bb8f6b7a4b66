"""Time every step of an expert layer on this GPU, backend by backend: the evidence behind docs/performance.md.

    python benchmarks/step_times.py --shapes mixtral-1b,qwen2-moe-1b --out steps.json
    python benchmarks/step_times.py --table steps.json bench.json

Each step runs on the same tensors, in round-robin calls, launches queued ahead, the L2 cache flushed before each;
"dense" is torch.mm on as many rows. Backends that do not run the layer are left out.

``--table`` measures nothing: it prints what was measured beside what each step must at least move and compute, and
how much of its time that takes at the speeds of copy and matrix product that `moe-kernels bench --json bench.json`
measured on the same GPU.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import torch

from moe_kernels import backends
from moe_kernels.backends import Problem
from moe_kernels.shapes import LAYERS, LayerShape
from moe_kernels.tools.bench.tiles import layer_tensors
from moe_kernels.tools.bench.timing import Clock
from moe_kernels.tools.common.machine import environment

BACKENDS = ("triton", "gluon")
#: GEMM flop of a step over 2 R H I.
GEMMS = {"up": 2, "down": 1, "down_grad": 1, "wgrad (dW2)": 1, "dgrad (dXr)": 2, "wgrad (dW1)": 2}
Call = Callable[[], object]


def least_bytes(step: str, shape: LayerShape) -> float:
    """16-bit numbers that ``step`` reads or writes at least once, in bytes; integers of the plan are left out."""
    tokens, rows = shape.tokens * shape.hidden, shape.rows * shape.hidden  # of X, O and their gradients
    a = shape.rows * shape.intermediate  # A; Z has twice as many
    w = shape.experts * shape.hidden * shape.intermediate  # W2; W1 has twice as many
    numbers = {
        "up": tokens + 2 * w + 3 * a,
        "down": a + w + rows,
        "combine": rows + tokens,
        "gather (dO)": tokens + rows,
        "down_grad": rows + w + 5 * a,
        "wgrad (dW2)": rows + a + w,
        "dgrad (dXr)": 2 * a + 2 * w + rows,
        "combine_grad": rows + tokens,
        "gather (X)": tokens + rows,
        "wgrad (dW1)": 2 * a + rows + 2 * w,
    }
    return 2.0 * numbers.get(step, 0)


def table(measured: Path, bench: Path) -> str:
    """Markdown: milliseconds of every step and layer, bytes and flop, and how much of the time these must take."""
    rows = [row for row in json.loads(measured.read_text())["rows"] if row["backend"] == "gluon"]
    speeds = json.loads(bench.read_text())["ceilings"]
    steps: dict[str, list[str]] = {}
    for row in rows:
        moved, ms = least_bytes(row["step"], LAYERS[row["shape"]]), row["ms"]["median"]
        floor = max(moved / speeds["copy_tbs"], row["flop"] / speeds["matmul_tflops"]) * 1e-9
        work = f"; {moved / 1e9:.2f} GB, {row['flop'] / 1e12:.2f} TFLOP; {floor / ms:.2f}" if moved else ""
        steps.setdefault(row["step"], []).append(f"{ms:.3f}{work}")
    head = ["step", *dict.fromkeys(row["shape"] for row in rows)]
    lines = [head, ["---"] * len(head), *([step, *cells] for step, cells in steps.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def calls_of(backend: str, t: SimpleNamespace) -> dict[str, Call]:
    """Name of a step -> one call of it."""
    steps, plan, gate = backends.load(backend), t.plan, t.gate
    y = steps.down(t.a, t.down, plan)
    return {
        "make_plan": lambda: steps.make_plan(t.ids, t.experts, 128),
        "up": lambda: steps.up(t.x, t.gate_up, plan, gate, True),
        "down": lambda: steps.down(t.a, t.down, plan),
        "combine": lambda: steps.combine(y, t.weights, plan),
        "gather (dO)": lambda: steps.gather(t.dout, plan),
        "down_grad": lambda: steps.down_grad(t.dout_rows, t.down, t.z, t.weights, plan, gate),
        "wgrad (dW2)": lambda: steps.wgrad(t.dout_rows, t.wa, plan),
        "dgrad (dXr)": lambda: steps.dgrad(t.dz, t.gate_up, plan),
        "combine_grad": lambda: steps.combine_grad(y, plan),
        "gather (X)": lambda: steps.gather(t.x, plan),
        "wgrad (dW1)": lambda: steps.wgrad(t.dz, t.x_rows, plan),
    }


def dense_calls(t: SimpleNamespace) -> dict[str, Call]:
    """The six GEMMs with one expert's weights for all rows, through torch.mm."""
    gate_up, down = t.gate_up.matrix[0], t.down.matrix[0]
    return {
        "up": lambda: t.x_rows @ gate_up.T,
        "down": lambda: t.a @ down.T,
        "down_grad": lambda: t.dout_rows @ down,
        "wgrad (dW2)": lambda: t.dout_rows.T @ t.wa,
        "dgrad (dXr)": lambda: t.dz @ gate_up,
        "wgrad (dW1)": lambda: t.dz.T @ t.x_rows,
    }


def main() -> None:
    """Measure every step of every layer and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="mixtral-1b,qwen2-moe-1b,deepseek-v3-1b", help="comma-separated layers")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("steps.json"))
    parser.add_argument("--table", type=Path, nargs=2, metavar=("STEPS", "BENCH"), help="print a table instead")
    args = parser.parse_args()
    if args.table:
        print(table(*args.table))
        return
    device = torch.device("cuda")
    clock, rows = Clock(device), []
    for name in args.shapes.split(","):
        shape = LAYERS[name]
        t = layer_tensors(shape, 128, device)
        problem = Problem.of(t.down.matrix, shape.top_k)
        who = {b: calls_of(b, t) for b in BACKENDS if backends.why_not(b, problem) is None}
        who["dense"] = dense_calls(t)
        sums = dict.fromkeys(who, 0.0)
        for step in calls_of("triton", t):
            calls = {backend: steps[step] for backend, steps in who.items() if step in steps}
            for call in calls.values():
                call()
            line = f"{name:16} {step:13}"
            for backend, times in clock.compare(calls, args.repeats, lambda: None, lambda: None).items():
                spread = times.queued or times.total
                flop = GEMMS.get(step, 0) * 2.0 * shape.rows * shape.hidden * shape.intermediate
                rows.append({"shape": name, "step": step, "backend": backend, "ms": asdict(spread), "flop": flop})
                sums[backend] += spread.median
                rate = f" {flop / spread.median / 1e9:4.0f} TFLOP/s" if flop else ""
                line += f"  {backend} {spread.median:.3f} ms{rate}"
            print(line, flush=True)
        print(
            f"{name:16} sum          ",
            "  ".join(f"{backend} {ms:.3f} ms" for backend, ms in sums.items()),
            flush=True,
        )
        args.out.write_text(
            json.dumps({"schema": 1, "kind": "steps", "environment": environment(), "rows": rows}, indent=1)
        )


if __name__ == "__main__":
    main()
