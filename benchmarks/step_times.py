"""Time every step of an expert layer on this GPU, backend by backend: the evidence behind docs/performance.md.

    python benchmarks/step_times.py --shapes mixtral-1b,qwen2-moe-1b --out steps.json

Each step runs on the same tensors, calls in turn, launches queued ahead, the second-level cache flushed before each;
"dense" is torch.mm on as many rows. Backends that do not run the layer are left out.
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
from moe_kernels.bench.environment import environment
from moe_kernels.bench.tiles import layer_tensors
from moe_kernels.bench.timing import Clock
from moe_kernels.shapes import LAYERS

BACKENDS = ("triton", "gluon")
#: GEMM flop of a step over 2 R H I.
GEMMS = {"up": 2, "down": 1, "down_grad": 1, "wgrad (dW2)": 1, "dgrad (dXr)": 2, "wgrad (dW1)": 2}
Call = Callable[[], object]


def calls_of(backend: str, t: SimpleNamespace) -> dict[str, Call]:
    """Name of a step -> one call of it."""
    steps, plan, gate = backends.load(backend), t.plan, t.gate
    y = steps.down(t.a, t.down, plan, True)
    return {
        "make_plan": lambda: steps.make_plan(t.ids, t.experts, 128),
        "up": lambda: steps.up(t.x, t.gate_up, plan, gate, True, True),
        "down": lambda: steps.down(t.a, t.down, plan, True),
        "combine": lambda: steps.combine(y, t.weights, plan),
        "gather (dO)": lambda: steps.gather(t.dout, plan),
        "down_grad": lambda: steps.down_grad(t.dout_rows, t.down, t.z, t.weights, plan, gate, True),
        "wgrad (dW2)": lambda: steps.wgrad(t.dout_rows, t.wa, plan),
        "dgrad (dXr)": lambda: steps.dgrad(t.dz, t.gate_up, plan, True),
        "combine_grad": lambda: steps.combine_grad(y, plan),
        "gather (X)": lambda: steps.gather(t.x, plan),
        "wgrad (dW1)": lambda: steps.wgrad(t.dz, t.x_rows, plan),
    }


def dense_calls(t: SimpleNamespace) -> dict[str, Call]:
    """The six GEMMs with one expert's weights for all rows, through torch.mm."""
    gate_up, down = t.gate_up[0], t.down[0]
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
    args = parser.parse_args()
    device = torch.device("cuda")
    clock, rows = Clock(device), []
    for name in args.shapes.split(","):
        shape = LAYERS[name]
        t = layer_tensors(shape, 128, device)
        who = {b: calls_of(b, t) for b in BACKENDS if backends.why_not(b, Problem.of(t.down, shape.top_k)) is None}
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
