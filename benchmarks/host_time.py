"""Time the host's share of the op on this GPU, with the direct launcher and with Triton's own.

    python benchmarks/host_time.py --out host-time.json

Host time is what a call takes until it returns, nothing awaited, from an idle GPU: with few tokens the GPU never
holds it up. Inputs are bfloat16, every weight is trained. The calls take turns, so that a drift of the machine's
clocks meets all alike. ``--profile`` adds where the direct launcher's call spends its time, by function.
"""

from __future__ import annotations

import argparse
import cProfile
import io
import json
import os
import pstats
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import moe_kernels
from moe_kernels.bench.environment import environment
from moe_kernels.bench.timing import Spread
from moe_kernels.kernels.triton.launch import LAUNCHER_VARIABLE, LAUNCHERS, launch_counts, refusal
from moe_kernels.shapes import FAMILIES, LayerShape

Step = Callable[[], None]


def choose(launcher: str) -> None:
    """Every launch from now on goes this way."""
    os.environ[LAUNCHER_VARIABLE] = launcher
    refusal.cache_clear()


def steps(shape: LayerShape, backend: str) -> dict[str, tuple[Step, Step]]:
    """(call, what to clear after it) of a forward under no_grad, and of a forward with its backward."""
    g = torch.Generator(device="cuda").manual_seed(0)

    def normal(*sizes: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*sizes, device="cuda", generator=g) * scale).bfloat16().requires_grad_()

    x = normal(shape.tokens, shape.hidden)
    ids = torch.rand(shape.tokens, shape.experts, device="cuda", generator=g).topk(shape.top_k).indices
    weights = torch.rand(shape.tokens, shape.top_k, device="cuda", generator=g).requires_grad_()
    gate_up = normal(shape.experts, 2 * shape.intermediate, shape.hidden, scale=shape.hidden**-0.5)
    down = normal(shape.experts, shape.hidden, shape.intermediate, scale=shape.intermediate**-0.5)
    dout = torch.randn_like(x)

    def forward() -> None:
        with torch.no_grad():
            moe_kernels.fused_experts(x, ids, weights, gate_up, down, backend=backend)

    def both() -> None:
        moe_kernels.fused_experts(x, ids, weights, gate_up, down, backend=backend).backward(dout)

    def clear() -> None:
        x.grad = weights.grad = gate_up.grad = down.grad = None

    return {"forward": (forward, lambda: None), "forward_backward": (both, clear)}


def host_us(call: Step, clear: Step) -> float:
    """Microseconds until ``call`` returns, from an idle GPU."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    elapsed = 1e6 * (time.perf_counter() - begin)
    clear()
    return elapsed


def measure(shape: LayerShape, backend: str, repeats: int) -> dict[str, Any]:
    """Host time and launches of one layer, by step and launcher."""
    calls = steps(shape, backend)
    times: dict[tuple[str, str], list[float]] = {}
    launches: dict[tuple[str, str], dict[str, int]] = {}
    for turn in range(-3, repeats):  # three to compile and to fill the caches
        for launcher in LAUNCHERS:
            choose(launcher)
            for step, (call, clear) in calls.items():
                before = launch_counts()
                elapsed = host_us(call, clear)
                if turn >= 0:
                    times.setdefault((step, launcher), []).append(elapsed)
                    launches[step, launcher] = {
                        way: n - before.get(way, 0) for way, n in launch_counts().items() if n > before.get(way, 0)
                    }
    row: dict[str, Any] = {"layer": shape.name, "tokens": shape.tokens, "backend": backend}
    for (step, launcher), samples in times.items():
        spread = Spread.of(samples)
        row[f"{step}_{launcher}"] = {
            "host_us": {"median": spread.median, "p20": spread.p20, "p80": spread.p80},
            "launches": launches[step, launcher],
        }
    return row


def profile(shape: LayerShape, backend: str, repeats: int) -> str:
    """Where a forward and backward with direct launches spends its time, by function."""
    choose("direct")
    call, clear = steps(shape, backend)["forward_backward"]
    recorder = cProfile.Profile()
    with torch.autograd.set_multithreading_enabled(False):  # the profiler sees one thread
        for turn in range(-3, repeats):
            torch.cuda.synchronize()
            if turn >= 0:
                recorder.enable()
            call()
            recorder.disable()
            clear()
    text = io.StringIO()
    pstats.Stats(recorder, stream=text).sort_stats("tottime").print_stats(40)
    return text.getvalue()


def main() -> None:
    """Measure the three 1B layers and print a line for each step and launcher."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("host-time.json"))
    args = parser.parse_args()
    rows = []
    for family in FAMILIES.values():
        shape = family.sizes["1b"].layer(args.tokens)
        rows.append(measure(shape, args.backend, args.repeats))
        for step in ("forward", "forward_backward"):
            for launcher in LAUNCHERS:
                cost = rows[-1][f"{step}_{launcher}"]
                spread = cost["host_us"]
                times = f"{spread['median']:7.1f} us ({spread['p20']:.1f} to {spread['p80']:.1f})"
                print(f"{shape.name:16} {step:16} {launcher:6} {times}, launches {cost['launches']}", flush=True)
        report = {"schema": 1, "kind": "host_time", "environment": environment(), "rows": rows}
        args.out.write_text(json.dumps(report, indent=1))
    if args.profile:
        print(profile(FAMILIES["deepseek-v3"].sizes["1b"].layer(args.tokens), args.backend, args.repeats))


if __name__ == "__main__":
    main()
