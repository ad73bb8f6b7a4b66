"""Time the host's share of the op on this GPU, by way of launching: replayed, direct, and through Triton.

    python benchmarks/host_time.py --out host-time.json

Host time is what a call takes until it returns, nothing awaited, from an idle GPU: with few tokens the GPU never
holds it up. ``forward`` (without gradients) and ``forward_backward`` are single calls, so that the second wakes
autograd's thread; ``layer_in_stack`` is a forward and backward through a stack of layers, divided by their number, as
in a training. Inputs are bfloat16, every weight is trained. The ways take turns, so that a drift of the machine's
clocks meets all alike. ``--new-sizes`` gives every call a number of tokens that did not come before, as expert
parallelism does: none is replayed. ``--profile`` adds where replayed calls spend their time, by function.
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
from moe_kernels.kernels.launch.launch import LAUNCHER_VARIABLE, LAUNCHERS, launch_counts, launcher, refusal
from moe_kernels.shapes import FAMILIES, LayerShape
from moe_kernels.tools.bench.timing import Spread
from moe_kernels.tools.common.machine import environment

Step = Callable[[], None]


def choose(way: str) -> None:
    """Every launch from now on goes this way."""
    os.environ[LAUNCHER_VARIABLE] = way
    launcher.cache_clear()
    refusal.cache_clear()
    refusal()  # found out here, not in the call that is measured


class Stack:
    """Expert layers of one shape, one after the other; the routing is that of random ids."""

    def __init__(self, shape: LayerShape, layers: int, backend: str, new_sizes: bool = False) -> None:
        self.backend, self.tokens, self.new_sizes, self.calls = backend, shape.tokens, new_sizes, 0
        g = torch.Generator(device="cuda").manual_seed(0)

        def normal(*sizes: int, scale: float = 1.0) -> torch.Tensor:
            return (torch.randn(*sizes, device="cuda", generator=g) * scale).bfloat16().requires_grad_()

        experts, hidden, intermediate = shape.experts, shape.hidden, shape.intermediate
        most = 2 * shape.tokens
        self.most = (
            normal(most, hidden).detach(),
            normal(most, hidden).detach(),
            torch.rand(most, experts, device="cuda", generator=g).topk(shape.top_k).indices,
            torch.rand(most, shape.top_k, device="cuda", generator=g),
        )
        self.layers = [
            (
                normal(experts, 2 * intermediate, hidden, scale=hidden**-0.5),
                normal(experts, hidden, intermediate, scale=intermediate**-0.5),
            )
            for _ in range(layers)
        ]
        self.clear()

    def forward(self) -> torch.Tensor:
        out = self.x
        for gate_up, down in self.layers:
            out = moe_kernels.fused_experts(out, self.ids, self.weights, gate_up, down, backend=self.backend)
        return out

    @torch.no_grad()
    def forward_alone(self) -> None:
        self.forward()

    def forward_backward(self) -> None:
        self.forward().backward(self.dout)

    def clear(self) -> None:
        """Forget the gradients, and make the inputs of the next call."""
        for weight in (weight for layer in self.layers for weight in layer):
            weight.grad = None
        tokens = self.tokens + (self.calls % self.tokens if self.new_sizes else 0)
        self.calls += 1
        x, self.dout, self.ids, weights = (tensor[:tokens] for tensor in self.most)
        self.x, self.weights = x.detach().requires_grad_(), weights.detach().requires_grad_()


def host_us(call: Step, clear: Step) -> float:
    """Microseconds until ``call`` returns, from an idle GPU."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    elapsed = 1e6 * (time.perf_counter() - begin)
    clear()
    return elapsed


def measure(shape: LayerShape, backend: str, repeats: int, layers: int, new_sizes: bool) -> dict[str, Any]:
    """Host time and launches of one layer, by step and way."""
    one, stack = Stack(shape, 1, backend, new_sizes), Stack(shape, layers, backend, new_sizes)
    steps: dict[str, tuple[Step, Step, int]] = {
        "forward": (one.forward_alone, one.clear, 1),
        "forward_backward": (one.forward_backward, one.clear, 1),
        "layer_in_stack": (stack.forward_backward, stack.clear, layers),
    }
    row: dict[str, Any] = {"layer": shape.name, "tokens": shape.tokens, "backend": backend, "layers": layers,
                           "new_sizes": new_sizes}  # fmt: skip
    times: dict[str, list[float]] = {}
    for turn in range(-4, repeats):  # four to compile, to be followed and to fill the caches
        for way in LAUNCHERS:
            choose(way)
            for step, (call, clear, calls) in steps.items():
                name, before = f"{step}_{way}", launch_counts()
                elapsed = host_us(call, clear)
                if turn >= 0:
                    times.setdefault(name, []).append(elapsed / calls)
                    made = {made: n - before.get(made, 0) for made, n in launch_counts().items()}
                    row[name] = {"launches": {made: n // calls for made, n in made.items() if n}}
    for name, samples in times.items():
        spread = Spread.of(samples)
        row[name]["host_us"] = {"median": spread.median, "p20": spread.p20, "p80": spread.p80}
    return row


def profile(shape: LayerShape, backend: str, repeats: int) -> str:
    """Where a forward and backward that is replayed spends its time, by function."""
    choose("replay")
    one, recorder = Stack(shape, 1, backend), cProfile.Profile()
    with torch.autograd.set_multithreading_enabled(False):  # the profiler sees one thread
        for turn in range(-4, repeats):
            torch.cuda.synchronize()
            if turn >= 0:
                recorder.enable()
            one.forward_backward()
            recorder.disable()
            one.clear()
    text = io.StringIO()
    pstats.Stats(recorder, stream=text).sort_stats("tottime").print_stats(40)
    return text.getvalue()


def main() -> None:
    """Measure the three 1B layers and print a line for each step and way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--layers", type=int, default=8, help="of the stack")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--new-sizes", action="store_true", help="another number of tokens in every call")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("host-time.json"))
    args = parser.parse_args()
    rows = []
    for family in FAMILIES.values():
        shape = family.sizes["1b"].layer(args.tokens)
        rows.append(measure(shape, args.backend, args.repeats, args.layers, args.new_sizes))
        for step in ("forward", "forward_backward", "layer_in_stack"):
            for way in LAUNCHERS:
                cost = rows[-1][f"{step}_{way}"]
                spread = cost["host_us"]
                times = f"{spread['median']:7.1f} us ({spread['p20']:.1f} to {spread['p80']:.1f})"
                print(f"{shape.name:16} {step:16} {way:6} {times}, launches {cost['launches']}", flush=True)
        report = {"schema": 1, "kind": "host_time", "environment": environment(), "rows": rows}
        args.out.write_text(json.dumps(report, indent=1))
    if args.profile:
        print(profile(FAMILIES["deepseek-v3"].sizes["1b"].layer(args.tokens), args.backend, args.repeats))


if __name__ == "__main__":
    main()
