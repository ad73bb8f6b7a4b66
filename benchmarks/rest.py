"""What a rest of the GPU before a call does to the time of the call: the evidence behind how ``Clock`` queues calls.

    python benchmarks/rest.py --out rest.json                  # on a GPU: three layers, our kernels and torch.mm
    python benchmarks/rest.py --peers sonicmoe --rests 0,10 --shapes glm-4.5-air --out rest.json
    python benchmarks/rest.py --device cpu --out rest.json     # tiny: proves the script, not the speed

A call is a forward and backward. It runs once, then once more with its launches queued while the GPU idles for so
many milliseconds, which is the time that counts. A rest of 0 is ten calls in a row, as in a training: a tenth of
their time counts, the host's where that is slower. The calls take turns, the L2 cache is flushed before each.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from forms import SHAPES
from moe_kernels import fused_experts
from moe_kernels.tools.bench.experts import dense_calls
from moe_kernels.tools.bench.layer import Experts, Layer, make_layer
from moe_kernels.tools.bench.peers import PEERS
from moe_kernels.tools.bench.timing import Call, Clock, Spread
from moe_kernels.tools.check.problems import call
from moe_kernels.tools.common.files import write_json
from moe_kernels.tools.common.machine import environment

#: Calls in a row after no rest.
IN_A_ROW = 10


def calls_of(layer: Layer, peers: list[str]) -> dict[str, Call]:
    """Forward and backward on our kernels and of ``peers``, and as large products of torch.

    Raises:
        SystemExit: a peer that cannot run here.
    """

    def ours() -> None:
        call(fused_experts, layer.inputs()).backward(layer.grad_out)
        layer.clear_gradients()

    def peers_call(experts: Experts) -> None:
        experts(layer.x, layer.topk_ids, layer.topk_weights).backward(layer.grad_out)
        layer.clear_gradients()

    calls: dict[str, Call] = {"moe_kernels": ours}
    for name in peers:
        if reason := PEERS[name].why_not(layer.shape, layer.x.device, layer.x.dtype):
            raise SystemExit(f"{layer.shape.name}: {reason}")
        calls[name] = partial(peers_call, PEERS[name].experts(layer))
    return calls | {"dense": dense_calls(layer)[1]}


def timed_once(clock: Clock, timed: Call, rest: float) -> tuple[float, float]:
    """(milliseconds of one call, milliseconds in which the host launched it) after a rest."""
    clock.once(timed)
    if rest > 0:
        return clock.once(timed, queue_ms=rest)
    total, host = clock.once(lambda: [timed() for _ in range(IN_A_ROW)])
    return total / IN_A_ROW, host / IN_A_ROW


def measure(
    shape: str, peers: list[str], rests: list[float], repeats: int, device: torch.device
) -> list[dict[str, Any]]:
    """A row for each call and rest of one layer.

    Raises:
        SystemExit: launching takes longer than a rest, so that the GPU would wait for the host.
    """
    layer, clock = make_layer(SHAPES[shape], "mild", device, torch.bfloat16), Clock(device)
    turns = [(name, timed, rest) for name, timed in calls_of(layer, peers).items() for rest in rests]
    times: dict[tuple[str, float], list[float]] = {(name, rest): [] for name, _, rest in turns}
    for turn in range(-2, repeats):  # two rounds compile
        for number in range(len(turns)):
            name, timed, rest = turns[(turn + number) % len(turns)]
            total, host = timed_once(clock, timed, rest)
            if turn < 0:
                continue
            if clock.cuda and host > rest > 0:
                raise SystemExit(f"{shape}: launching {name} took {host:.1f} ms; --rests of {rest:g} is too short")
            times[name, rest].append(total)
    return [
        {"shape": shape, "call": name, "rest_ms": rest, "gpu_ms": asdict(Spread.of(samples))}
        for (name, rest), samples in times.items()
    ]


def milliseconds(text: str) -> list[float]:
    """The numbers between the commas.

    Raises:
        ValueError: one is none, or negative.
    """
    numbers = [float(number) for number in text.split(",")]
    if min(numbers) < 0:
        raise ValueError
    return numbers


def main() -> None:
    """Measure each layer, write the file after each, and print a line for each call and rest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="mixtral-8x7b,qwen2-57b-a14b,mixtral-1b", help="comma-separated layers")
    parser.add_argument("--peers", default="", help=f"comma-separated, of {', '.join(PEERS)}")
    parser.add_argument(
        "--rests", type=milliseconds, default="0,4,8,12,20", help="comma-separated: 0, or more than a call's launches"
    )
    parser.add_argument("--repeats", type=int, default=16, help="rounds")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("rest.json"))
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error(f"--repeats {args.repeats}: at least 1")
    device = torch.device(args.device)
    peers = [name for name in args.peers.split(",") if name]
    if unknown := sorted(set(peers) - PEERS.keys()):
        parser.error(f"--peers {','.join(unknown)}: choose from {', '.join(PEERS)}")
    rows: list[dict[str, Any]] = []
    for shape in ["tiny"] if args.device == "cpu" else args.shapes.split(","):
        if shape not in SHAPES:
            parser.error(f"--shapes {shape}: choose from {', '.join(SHAPES)}")
        here = measure(shape, peers, args.rests, args.repeats, device)
        rows += here
        write_json(args.out, {"schema": 1, "kind": "rest", "environment": environment(), "rows": rows})
        for row in here:
            after = f"after {row['rest_ms']:4.0f} ms" if row["rest_ms"] else "in a row     "
            print(f"{shape:16} {row['call']:12} {after} {row['gpu_ms']['median']:8.3f} ms", flush=True)


if __name__ == "__main__":
    main()
