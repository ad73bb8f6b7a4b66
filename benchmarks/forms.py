"""The forms in which people train an expert layer, in one process: the evidence behind docs/lora.md's table of forms.

    python benchmarks/forms.py --out forms.json                        # on a GPU: both layers, every form
    python benchmarks/forms.py --forms frozen,lora-16 --kernels --out forms.json   # with the time of every kernel
    python benchmarks/forms.py --device cpu --out forms.json           # tiny: proves the script, not the speed

"dense" is the same GEMMs by torch.mm with R rows and one expert's weights, without weight gradients for the forms
whose base is frozen. Times are GPU times of forward and backward, launches queued ahead, L2 flushed before each call,
in round-robin calls. Output and gradients are first compared with float64, on an eighth of the tokens.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_kernels import fused_experts
from moe_kernels.backends.gluon import use_every_form
from moe_kernels.packed import whole
from moe_kernels.shapes import LAYERS, LayerShape
from moe_kernels.tools.bench.experts import dense_calls
from moe_kernels.tools.bench.layer import Layer, make_layer
from moe_kernels.tools.bench.timing import MIB, Clock, peak_bytes
from moe_kernels.tools.check.forms import FORMS
from moe_kernels.tools.check.problems import Inputs, call, run, truth
from moe_kernels.tools.common.machine import environment

SHAPES = {
    **LAYERS,
    "gpt-oss-20b": LayerShape("gpt-oss-20b", 16384, 2880, 2880, 32, 4),
    "tiny": LayerShape("tiny", 96, 64, 64, 8, 2),
}


def forward_backward(layer: Layer, backend: str) -> None:
    """One call."""
    call(partial(fused_experts, backend=backend), layer.inputs()).backward(layer.grad_out)


def errors(layer: Layer, backend: str) -> dict[str, float]:
    """Relative L2 error of output and gradients against float64 on dequantised weights and unrounded rows."""
    part = first_tokens(layer.inputs())
    wanted = truth(replace(part, gate_up=whole(part.gate_up), down=whole(part.down)))
    found = run(partial(fused_experts, backend=backend), part)
    if missing := [name for name, value in found.items() if value is None]:
        raise SystemExit(f"gradients of {missing} are missing")
    return relative_errors(found, wanted)


def first_tokens(inputs: Inputs) -> Inputs:
    """An eighth of them."""
    tokens = max(len(inputs.x) // 8, 1)
    first = {name: getattr(inputs, name)[:tokens].detach() for name in ("x", "topk_ids", "topk_weights", "grad")}
    return replace(inputs, **first)


def relative_errors(found: dict[str, Tensor | None], wanted: dict[str, Tensor]) -> dict[str, float]:
    """Relative L2 error of output and gradients, none of which is missing, by the name of what it is of."""
    return {name if name == "out" else name[1:]: _error(found[name], want) for name, want in wanted.items()}


def _error(found: Tensor | None, want: Tensor) -> float:
    assert found is not None
    return float((found.double() - want).norm() / want.norm())


def kernel_times(call: Callable[[], object], calls: int = 5) -> dict[str, list[float]]:
    """Name of a kernel -> microseconds of each of its launches in one call, mean over several calls."""
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = {}
    for event in seen.events():
        found.setdefault(event.name, []).append(event.device_time)
    means = {}
    for name, times in found.items():
        launches = max(len(times) // calls, 1)
        means[name] = [round(sum(times[i::launches]) / calls, 1) for i in range(launches)]
    return dict(sorted(means.items(), key=lambda item: -sum(item[1])))


def main() -> None:
    """Measure every form of every layer and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="qwen3-30b-a3b,gpt-oss-20b", help="comma-separated layers")
    parser.add_argument("--forms", default=",".join(FORMS), help="comma-separated forms")
    parser.add_argument("--backends", default="auto,triton", help="comma-separated backends")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--kernels", action="store_true", help="also time every kernel of the first backend")
    parser.add_argument(
        "--every-form", action="store_true",
        help="on the Hopper kernels also what they are not chosen for: interleaved experts, weights stored by "
        "columns, block-fp8 weights dequantised between load and wgmma",
    )  # fmt: skip
    parser.add_argument(
        "--no-errors", action="store_true", help="no comparison with float64, which takes 8 bytes a weight"
    )
    parser.add_argument("--out", type=Path, default=Path("forms.json"))
    args = parser.parse_args()
    with ExitStack() as everything:
        if args.every_form:
            from moe_kernels.kernels.hopper.dequantizing import use_dequantizing

            everything.enter_context(use_every_form(True))
            everything.enter_context(use_dequantizing(True))
        measure(args)


def measure(args: argparse.Namespace) -> None:
    """Every form that was asked for, each written as it ends."""
    device, shapes, backends = torch.device(args.device), args.shapes.split(","), args.backends.split(",")
    if device.type == "cpu":
        shapes, backends = ["tiny"], ["torch"]
    clock, rows = Clock(device), []
    for shape in (SHAPES[name] for name in shapes):
        for name in args.forms.split(","):
            layer = make_layer(shape, "mild", device, torch.bfloat16, form=name)
            found = {} if args.no_errors else {backend: errors(layer, backend) for backend in backends}
            calls: dict[str, Callable[[], object]] = {
                backend: partial(forward_backward, layer, backend) for backend in backends
            }
            calls["dense"] = dense_calls(layer)[1]
            for warm_up in [*calls.values()] * 2:
                warm_up()
                layer.clear_gradients()
            times = clock.compare(calls, args.repeats, layer.clear_gradients, lambda: None)
            dense = times["dense"].queued or times["dense"].total
            for who, spread in times.items():
                gpu = spread.queued or spread.total
                row: dict[str, Any] = {
                    "shape": shape.name,
                    "form": name,
                    "implementation": who,
                    "gpu_ms": asdict(gpu),
                    "total_ms": asdict(spread.total),
                    "of_dense": dense.median / gpu.median,
                    "rel_error": found.get(who, {}),
                }
                if device.type == "cuda":
                    row["peak_mb"] = peak_bytes(calls[who]) / MIB
                    layer.clear_gradients()
                if args.kernels and who == backends[0]:
                    row["kernels_us"] = kernel_times(calls[who])
                    layer.clear_gradients()
                rows.append(row)
                worst = max(row["rel_error"].values(), default=0.0)
                print(f"{shape.name:14} {name:16} {who:7} {gpu.median:8.3f} ms  {row['of_dense']:.3f} of dense  "
                      f"error {worst:.1e}", flush=True)  # fmt: skip
            args.out.write_text(
                json.dumps({"schema": 1, "kind": "forms", "environment": environment(), "rows": rows}, indent=1)
            )
            del layer, calls


if __name__ == "__main__":
    main()
