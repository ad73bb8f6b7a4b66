"""Block-fp8 experts beside transformers' own, which train since 5.23: the same weights, routing and gradients.

    python benchmarks/fp8_peers.py --out fp8-peers.json                 # on a GPU, with transformers >= 5.23, kernels
    python benchmarks/fp8_peers.py --shapes qwen3-30b-a3b --kernels     # with the time of every kernel
    python benchmarks/fp8_peers.py --device cpu --out fp8-peers.json    # tiny: proves the script, not the speed

The base is frozen, as under an adapter: gradients are those of x and of the routing weights. `exact` and `fp8
activations` are our two modes. `transformers` is FP8Experts with grouped_mm, its default: the forward rounds rows to
e4m3 and multiplies in fp8; the backward dequantises the weights to 16 bits, at most a GiB at a time, for torch's
grouped GEMM. Its kernel is Triton's, from the Hugging Face hub: a CPU measures ours alone. "dense" is the same GEMMs
by torch.mm in 16 bits with R rows and one expert's weights.
Times are GPU times, launches queued ahead, L2 flushed before each call, in round-robin calls; a forward keeps what
its backward needs. Output and gradients are first compared with float64 on dequantised weights, on an eighth of the
tokens.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.integrations import finegrained_fp8
from transformers.integrations.moe import use_experts_implementation

from forms import first_tokens, kernel_times, relative_errors
from moe_kernels import fused_experts
from moe_kernels.fp8 import Fp8Weight, transposed
from moe_kernels.packed import SIDE, BlockFp8
from moe_kernels.shapes import LAYERS, LayerShape
from moe_kernels.tools.bench.experts import dense_calls
from moe_kernels.tools.bench.layer import Layer, make_layer
from moe_kernels.tools.bench.peers import PEER_FAILURES, failure
from moe_kernels.tools.bench.timing import MIB, Call, Clock, peak_bytes, saved_bytes
from moe_kernels.tools.check.problems import Experts, Inputs, call, run, truth
from moe_kernels.tools.common.machine import environment

EXACT, IN_FP8, THEIRS, DENSE = "exact", "fp8 activations", "transformers", "dense"
TINY = LayerShape("tiny", 96, 256, 128, 8, 2)
SHAPES = "qwen3-30b-a3b,mixtral-8x7b,deepseek-v3,qwen2-57b-a14b,gpt-oss-like"
#: Experts whose float64 weights are held at a time: all of DeepSeek-V3's are 90 GB.
BLOCK = 32

#: An implementation, and the tensors that it is called with.
Way = tuple[Experts, Inputs]


def why_not_theirs(shape: LayerShape) -> str | None:
    """Why transformers' experts cannot train a layer here, with the cure; None if they can be tried."""
    if not hasattr(finegrained_fp8, "FP8GroupedMatmulFunction"):
        return "this transformers has no backward of its fp8 experts: pip install 'transformers>=5.23'"
    if shape.hidden % SIDE or shape.intermediate % SIDE:
        return f"its kernel takes sizes that are multiples of {SIDE} alone: H={shape.hidden}, I={shape.intermediate}"
    try:
        finegrained_fp8.load_finegrained_fp8_kernel()
    except PEER_FAILURES as error:
        return (
            "its kernel cannot be loaded. Cure: install the version of kernels that transformers asks for, and reach "
            f"the Hugging Face hub once (kernels-community/finegrained-fp8). {failure(error)}"
        )
    return None


def their_experts(layer: Layer) -> Experts:
    """transformers' FP8Experts as its quantizer makes them for a checkpoint, on the layer's own codes and scales."""
    shape = layer.shape
    config = Qwen3MoeConfig(
        hidden_size=shape.hidden,
        moe_intermediate_size=shape.intermediate,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        hidden_act="silu",
    )
    config._experts_implementation = "grouped_mm"
    cls = use_experts_implementation(
        experts_class=type("Experts", (finegrained_fp8.FP8Experts,), {}),
        experts_interface=finegrained_fp8.ALL_FP8_EXPERTS_FUNCTIONS,
    )
    with torch.device("meta"):
        module = cls(config, block_size=(SIDE, SIDE))
    for name in ("gate_up", "down"):
        weight: BlockFp8 = getattr(layer, name)
        setattr(module, f"{name}_proj", nn.Parameter(weight.data, requires_grad=False))
        setattr(module, f"{name}_proj_scale_inv", nn.Parameter(weight.scales, requires_grad=False))

    def experts(x: Tensor, topk_ids: Tensor, topk_weights: Tensor, gate_up: object, down: object) -> Tensor:
        out: Tensor = module(x, topk_ids, topk_weights)
        return out

    return experts


def ways(layer: Layer) -> tuple[dict[str, Way], str | None]:
    """({name: how it is called}, why theirs is not among them)."""
    inputs, ours = layer.inputs(), partial(fused_experts, backend="auto" if layer.x.is_cuda else "torch")
    gate_up, down = (Fp8Weight.of(weight, transposed(weight.data)) for weight in (layer.gate_up, layer.down))
    found: dict[str, Way] = {EXACT: (ours, inputs), IN_FP8: (ours, replace(inputs, gate_up=gate_up, down=down))}
    absent = why_not_theirs(layer.shape)
    if absent is None:
        found[THEIRS] = their_experts(layer), inputs
    return found, absent


def exactly(inputs: Inputs, block: int = BLOCK) -> dict[str, Tensor]:
    """Output and gradients in float64 on dequantised weights: a sum over blocks, each without the others' slots."""
    total: dict[str, Tensor] = {}
    for first in range(0, inputs.gate_up.shape[0], block):
        last = min(first + block, inputs.gate_up.shape[0])
        weights = {name: getattr(inputs, name).experts(first, last) for name in ("gate_up", "down")}
        for name, value in truth(replace(inputs, topk_ids=inputs.topk_ids - first, **weights)).items():
            total[name] = total[name] + value if name in total else value
    return total


def errors(way: Way, wanted: dict[str, Tensor]) -> dict[str, float]:
    """Relative L2 error of output and gradients, by name."""
    found = run(way[0], first_tokens(way[1]))
    missing = [name for name in wanted if found[name] is None]
    if missing:
        raise RuntimeError(f"gradients of {missing} are missing")
    return relative_errors(found, wanted)


def _forward_backward(way: Way) -> None:
    call(*way).backward(way[1].grad)


def measure(layer: Layer, clock: Clock, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each implementation, the dense GEMMs last."""
    found, absent = ways(layer)
    rows: dict[str, dict[str, Any]] = {}
    for name in (EXACT, IN_FP8, THEIRS, DENSE):
        rows[name] = {"shape": layer.shape.name, "implementation": name, "note": ""}
    wanted = {} if args.no_errors else exactly(first_tokens(layer.inputs()))
    for name in list(found):
        try:
            rows[name]["rel_error"] = errors(found[name], wanted)
            _forward_backward(found[name])
        except PEER_FAILURES as error:
            if name != THEIRS:
                raise
            absent = f"it failed: {failure(error)}"
            del found[name]
        layer.clear_gradients()
    rows[THEIRS]["note"] = absent or ""
    forward: dict[str, Call] = {name: partial(call, *way) for name, way in found.items()}
    both: dict[str, Call] = {name: partial(_forward_backward, way) for name, way in found.items()}
    forward[DENSE], both[DENSE] = dense_calls(layer)
    for what, calls in (("forward", forward), ("forward_backward", both)):
        for warm_up in calls.values():
            warm_up()
            layer.clear_gradients()
        for name, times in clock.compare(calls, args.repeats, layer.clear_gradients, lambda: None).items():
            rows[name] |= {f"{what}_gpu_ms": asdict(times.queued or times.total), f"{what}_ms": asdict(times.total)}
    for name, (_, inputs) in found.items():
        weights = [part for w in (inputs.gate_up, inputs.down) for part in w.parts() if isinstance(part, Tensor)]
        rows[name]["saved_mb"] = saved_bytes(forward[name], weights) / MIB
        if layer.x.is_cuda:
            rows[name]["peak_mb"] = peak_bytes(both[name]) / MIB
            if args.kernels:
                rows[name]["kernels_us"] = kernel_times(both[name])
        layer.clear_gradients()
    return list(rows.values())


def show(row: dict[str, Any]) -> None:
    """One line."""
    head = f"{row['shape']:15} {row['implementation']:15}"
    if "forward_gpu_ms" not in row:
        print(f"{head} {row['note']}", flush=True)
        return
    times = " ".join(f"{row[f'{what}_gpu_ms']['median']:8.3f}" for what in ("forward", "forward_backward"))
    wrong = "  ".join(f"{name} {error:.1e}" for name, error in row.get("rel_error", {}).items())
    print(f"{head} {times} ms forward, and with backward  {wrong}", flush=True)


def main() -> None:
    """Measure every layer; the file is written after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=SHAPES, help="comma-separated layers; on a CPU a tiny one")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--kernels", action="store_true", help="also the time of every kernel")
    parser.add_argument("--no-errors", action="store_true", help="no comparison with float64")
    parser.add_argument("--out", type=Path, default=Path("fp8-peers.json"))
    args = parser.parse_args()
    device = torch.device(args.device)
    shapes = [TINY] if device.type == "cpu" else [LAYERS[name] for name in args.shapes.split(",")]
    clock, rows = Clock(device), list[dict[str, Any]]()
    for shape in shapes:
        layer = make_layer(shape, "mild", device, torch.bfloat16, form="fp8-frozen")
        rows += measure(layer, clock, args)
        for row in rows[-4:]:
            show(row)
        report = {"schema": 1, "kind": "fp8 peers", "environment": environment(), "rows": rows}
        args.out.write_text(json.dumps(report, indent=1))
        del layer


if __name__ == "__main__":
    main()
