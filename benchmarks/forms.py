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
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_kernels import fused_experts
from moe_kernels.activation import Activation
from moe_kernels.backends.gluon import use_every_form
from moe_kernels.fp8 import Fp8Weight, transposed
from moe_kernels.packed import FourBit, PackedWeight, Scales, whole
from moe_kernels.reference import reference_experts
from moe_kernels.shapes import LAYERS, LayerShape
from moe_kernels.tools.bench.timing import MIB, Clock, peak_bytes
from moe_kernels.tools.common.machine import environment
from moe_kernels.tools.common.packing import in_fp8, in_mxfp4

SHAPES = {
    "qwen3-30b-a3b": LAYERS["qwen3-30b-a3b"],
    "gpt-oss-20b": LayerShape("gpt-oss-20b", 16384, 2880, 2880, 32, 4),
    "tiny": LayerShape("tiny", 96, 64, 64, 8, 2),
}
GPT_OSS = Activation("clamped_glu", (1.702, 7.0))
#: BA is this large beside W, so that an error in it shows and an error in W does too.
DELTA = 0.3


@dataclass(frozen=True)
class Form:
    """How a layer is trained.

    Attributes:
        frozen: the base gets no gradient.
        rank: of the LoRA factors of both weights; 0 without.
        packed: the base is kept in "4 bits", with nested scales, in block "fp8" or in "mxfp4"; empty: in 16 bits.
            "fp8 activations" is block fp8 that is multiplied in fp8, which GPUs of compute capability 8.9 do.
        gpt_oss: weights stored by columns, gate and up interleaved, clamped activation.
    """

    frozen: bool = False
    rank: int = 0
    packed: str = ""
    biases: bool = False
    gpt_oss: bool = False
    gated: bool = True
    activation: str | Activation = "silu"


FORMS = {
    "plain": Form(),
    "frozen": Form(frozen=True),
    "lora-16": Form(frozen=True, rank=16),
    "lora-64": Form(frozen=True, rank=64),
    "qlora-16": Form(frozen=True, rank=16, packed="4 bits"),
    "fp8-lora-16": Form(frozen=True, rank=16, packed="fp8"),
    "fp8-activations-lora-16": Form(frozen=True, rank=16, packed="fp8 activations"),
    "biases": Form(biases=True),
    "gpt-oss": Form(biases=True, gpt_oss=True, activation=GPT_OSS),
    "gpt-oss-lora-16": Form(frozen=True, rank=16, biases=True, gpt_oss=True, activation=GPT_OSS),
    "mxfp4-lora-16": Form(frozen=True, rank=16, packed="mxfp4", biases=True, gpt_oss=True, activation=GPT_OSS),
    "no-gate": Form(gated=False, activation="relu2"),
}


@dataclass(frozen=True)
class Layer:
    """The tensors of one form of one layer.

    Attributes:
        arguments: of ``fused_experts`` by name.
        trained: those of them that get a gradient, and the factors, by name.
        dout: (T, H), the gradient of the output.
    """

    form: Form
    arguments: dict[str, Any]
    trained: dict[str, Tensor]
    dout: Tensor

    def part(self, tokens: int) -> Layer:
        """The same layer for its first tokens, with its own leaves."""
        arguments = dict(self.arguments)
        for name in ("x", "topk_ids", "topk_weights"):
            arguments[name] = arguments[name][:tokens].detach()
        return _with_leaves(self.form, arguments, self.dout[:tokens])

    def double(self) -> Layer:
        """The same layer in float64."""
        return _with_leaves(self.form, _mapped(self.arguments, _doubled), self.dout.double())


def _doubled(tensor: Tensor | PackedWeight) -> Tensor:
    tensor = whole(tensor).detach()
    return tensor.double() if tensor.is_floating_point() else tensor


def _mapped(arguments: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    found = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor | PackedWeight):
            value = change(value)
        elif isinstance(value, tuple):
            value = tuple(change(factor) for factor in value)
        found[name] = value
    return found


def _with_leaves(form: Form, arguments: dict[str, Any], dout: Tensor) -> Layer:
    arguments = _mapped(arguments, lambda tensor: tensor.detach() if isinstance(tensor, Tensor) else tensor)
    base = () if form.frozen else ("gate_up", "down", *(("gate_up_bias", "down_bias") if form.biases else ()))
    trained = {name: arguments[name].requires_grad_() for name in ("x", "topk_weights", *base)}
    for name in ("gate_up_lora", "down_lora"):
        for letter, factor in zip("ba", arguments.get(name, ()), strict=False):
            trained[f"{name}_{letter}"] = factor.requires_grad_()
    return Layer(form, arguments, trained, dout)


def multiplied_in_fp8(weight: Tensor, stacked: int = 1) -> Fp8Weight:
    """The same, to be multiplied in fp8."""
    found = in_fp8(weight, stacked)
    return Fp8Weight.of(found, transposed(found.data))


def in_4_bits(weight: Tensor, stacked: int = 1) -> FourBit:
    """``weight`` (E, N, K) in a format like nf4: another table, the same sizes and the same steps to read it."""
    values = weight.float().view(-1, 64)
    scales = values.abs().amax(1)
    table, scales_table = (torch.linspace(-1, 1, n, device=weight.device) for n in (16, 256))
    places = torch.bucketize(values / scales[:, None], (table[1:] + table[:-1]) / 2).to(torch.uint8).view(-1, 2)
    offset = scales.mean()
    outer = (scales - offset).view(-1, 256).abs().amax(1)
    near = (scales_table[1:] + scales_table[:-1]) / 2
    inner = torch.bucketize((scales - offset) / outer.repeat_interleave(256), near).to(torch.uint8)
    nested = Scales(inner, 64, scales_table, outer, 256, offset)
    data = places[:, 0] << 4 | places[:, 1]
    sizes: Any = tuple(weight.shape)
    return FourBit(sizes, weight.dtype, data.view(-1), table, nested, weight.dtype)


PACK: dict[str, Callable[[Tensor, int], PackedWeight]] = {
    "4 bits": in_4_bits,
    "fp8": in_fp8,
    "fp8 activations": multiplied_in_fp8,
    "mxfp4": lambda weight, stacked: in_mxfp4(weight),
}


def make_layer(shape: LayerShape, form: Form, device: torch.device) -> Layer:
    """Random tensors, mild routing, the same for the same shape and form."""
    generator = torch.Generator(device=device).manual_seed(0)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=torch.bfloat16).mul_(scale)

    logits = torch.randn(shape.tokens, shape.experts, generator=generator, device=device)
    logits += 0.3 * torch.randn(shape.experts, generator=generator, device=device)
    weights, ids = logits.topk(shape.top_k, dim=-1)
    experts, hidden, width = shape.experts, shape.hidden, shape.intermediate
    rows = (2 if form.gated else 1) * width
    sizes = {"gate_up": (rows, hidden), "down": (hidden, width)}
    arguments: dict[str, Any] = {
        "x": normal(shape.tokens, hidden),
        "topk_ids": ids,
        "topk_weights": weights.softmax(-1).bfloat16(),
        "activation": form.activation,
        "interleaved": form.gpt_oss,
    }
    for name, (n, k) in sizes.items():
        weight = normal(experts, k, n, scale=k**-0.5).mT if form.gpt_oss else normal(experts, n, k, scale=k**-0.5)
        stacked = 2 if name == "gate_up" and form.gated else 1
        arguments[name] = PACK[form.packed](weight, stacked) if form.packed else weight
        if form.biases:
            arguments[f"{name}_bias"] = normal(experts, n, scale=0.1)
        if form.rank:
            lora_b = normal(experts, n, form.rank, scale=DELTA * form.rank**-0.5)
            arguments[f"{name}_lora"] = lora_b, normal(experts, form.rank, k, scale=k**-0.5)
    return _with_leaves(form, arguments, normal(shape.tokens, hidden))


def run(layer: Layer, backend: str) -> Tensor:
    """Forward and backward."""
    out = fused_experts(**layer.arguments, backend=backend)
    out.backward(layer.dout)
    return out


def clear_gradients(layer: Layer) -> None:
    """Drop every gradient."""
    for leaf in layer.trained.values():
        leaf.grad = None


def errors(layer: Layer, backend: str) -> dict[str, float]:
    """Relative L2 error of output and gradients against float64."""
    part = layer.part(max(layer.dout.shape[0] // 8, 1))
    truth = part.double()
    wanted = {"out": reference_experts(**truth.arguments)}
    wanted["out"].backward(truth.dout)
    wanted["out"] = wanted["out"].detach()
    found = {"out": run(part, backend).detach()}
    found |= {name: leaf.grad for name, leaf in part.trained.items() if leaf.grad is not None}
    wanted |= {name: leaf.grad for name, leaf in truth.trained.items() if leaf.grad is not None}
    if found.keys() != wanted.keys():
        raise SystemExit(f"gradients of {sorted(found.keys() ^ wanted.keys())} are missing")
    return {name: float((found[name].double() - want).norm() / want.norm()) for name, want in wanted.items()}


def dense_call(shape: LayerShape, form: Form, device: torch.device) -> Callable[[], None]:
    """The GEMMs of the layer with R rows and one expert's weights."""
    like: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    wide = (2 if form.gated else 1) * shape.intermediate
    rows, narrow, z = (torch.randn(shape.rows, n, **like) for n in (shape.hidden, shape.intermediate, wide))
    first = torch.randn(wide, shape.hidden, **like)
    second = torch.randn(shape.hidden, shape.intermediate, **like)

    def call() -> None:
        torch.mm(rows, first.T)
        torch.mm(narrow, second.T)
        torch.mm(rows, second)
        torch.mm(z, first)
        if not form.frozen:
            torch.mm(rows.T, narrow)
            torch.mm(z.T, rows)

    return call


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
        help="interleaved experts and weights stored by columns on the Hopper kernels too, which are not chosen",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("forms.json"))
    args = parser.parse_args()
    with use_every_form(True) if args.every_form else nullcontext():
        measure(args)


def measure(args: argparse.Namespace) -> None:
    """Every form that was asked for, each written as it ends."""
    device, shapes, backends = torch.device(args.device), args.shapes.split(","), args.backends.split(",")
    if device.type == "cpu":
        shapes, backends = ["tiny"], ["torch"]
    clock, rows = Clock(device), []
    for shape in (SHAPES[name] for name in shapes):
        for name in args.forms.split(","):
            layer = make_layer(shape, FORMS[name], device)
            found = {backend: errors(layer, backend) for backend in backends}
            calls: dict[str, Callable[[], object]] = {
                backend: lambda layer=layer, backend=backend: run(layer, backend)  # type: ignore[misc]
                for backend in backends
            }
            calls["dense"] = dense_call(shape, FORMS[name], device)
            for call in [*calls.values()] * 2:
                call()
                clear_gradients(layer)
            times = clock.compare(calls, args.repeats, lambda layer=layer: clear_gradients(layer), lambda: None)  # type: ignore[misc]
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
                    clear_gradients(layer)
                if args.kernels and who == backends[0]:
                    row["kernels_us"] = kernel_times(calls[who])
                    clear_gradients(layer)
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
