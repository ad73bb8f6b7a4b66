"""LoRA on one expert layer, every way there is, in one process on the same tensors: the evidence behind docs/lora.md.

    python benchmarks/lora_cost.py --out lora.json             # on a GPU: the layer of Qwen3-30B-A3B, T=16384, r=16
    python benchmarks/lora_cost.py --variants nf4-float32 --without-scattermoe --out qlora.json   # QLoRA, a minute
    python benchmarks/lora_cost.py --device cpu --out lora.json   # tiny: proves the script, says nothing about speed

The ways: `moe_kernels`, the factors inside the kernels; `peft_grouped_mm`, PEFT's own parametrisation (W + BA is
formed) on transformers' grouped_mm; `scattermoe`, Axolotl's fused LoRA. `peft_eager`, the same parametrisation on
transformers' loop over experts, is not timed: its error is what plain PyTorch makes in this dtype. All are one
module of transformers in one pair of PEFT's wrappers; only `experts_implementation` changes. The base is frozen.

Two kinds of base: `bf16`, and `nf4` (QLoRA), bitsandbytes' 4 bits as Axolotl's quantize_moe_experts makes them. Two
kinds of adapter: `float32` under autocast, as PEFT and Axolotl train them unless told otherwise, and `bfloat16`. On
the 4-bit base `moe_kernels` dequantises a block of experts at a time.
Output and gradients (of x, the routing weights, A and B of both weights) are first compared with float64.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import torch
from torch import Tensor, nn

from moe_kernels import backends
from moe_kernels.integrations.peft import fuse_lora
from moe_kernels.packed import PackedWeight
from moe_kernels.reference import reference_experts
from moe_kernels.shapes import LAYERS, LayerShape
from moe_kernels.tools.bench.accuracy import what_is_wrong
from moe_kernels.tools.bench.layer import Layer, make_layer, our_variants, transformers_experts
from moe_kernels.tools.bench.peers import PEER_FAILURES, PEERS, failure
from moe_kernels.tools.bench.timing import MIB, Call, Clock, Times, peak_bytes, saved_bytes
from moe_kernels.tools.check.tolerances import RMS_FACTOR
from moe_kernels.tools.common.machine import environment, installed_version

OURS, PEFT, AXOLOTL, PLAIN = "moe_kernels", "peft_grouped_mm", "scattermoe", "peft_eager"
VARIANTS = (("bf16", "float32"), ("bf16", "bfloat16"), ("nf4", "float32"))
WEIGHTS = ("gate_up_proj", "down_proj")
#: Multiples of 64, bitsandbytes' block: it dequantises shorter rows wrongly on a CPU.
TINY = LayerShape("tiny", 96, 64, 64, 8, 2)
SPEEDUP = 1.5
#: Time of ours on the 4-bit base over ours on the bf16 base, and MiB above the weights.
NF4_TIME, NF4_PEAK_MB = 1.35, 1.3 * 1024
#: BA is this large beside W, so that an error in it shows and an error in W does too.
DELTA = 0.3
SCATTERMOE = "axolotl.integrations.kernels.libs.scattermoe_lora"


@dataclass
class Row:
    """One way to run one variant. Times in ms, memory in MiB; None where not measured, ``note`` says why."""

    base: str
    adapters: str
    implementation: str
    ok: bool = True
    note: str = ""
    forward: Times | None = None
    forward_backward: Times | None = None
    saved_mb: float | None = None
    peak_mb: float | None = None
    weights_mb: float | None = None
    rel_error: dict[str, float] = field(default_factory=dict)


class Adapted:
    """The experts of a layer in PEFT's wrappers, one for each weight, run by any implementation.

    Attributes:
        wrapper: PEFT's outer wrapper: call it as the experts module.
        experts: transformers' module inside.
        factors: the trained matrices by name: A and B of both weights.
        scaling: what PEFT multiplies ``B A`` by.
    """

    def __init__(self, layer: Layer, rank: int, adapters: torch.dtype, packed: bool) -> None:
        self.layer, self.rank = layer, rank
        holder: Any = nn.Module()
        holder.mlp = nn.Module()
        holder.mlp.experts = transformers_experts(layer, "eager")
        config = peft.LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            target_modules=[],
            target_parameters=[f"experts.{name}" for name in WEIGHTS],
        )
        self.wrapper = peft.get_peft_model(holder, config).base_model.model.mlp.experts
        self.experts = self.wrapper.get_base_layer()
        if packed:
            self.experts = _in_4_bits(self.experts)
            inner = self.wrapper
            while inner.base_layer is not self.wrapper.get_base_layer():
                inner = inner.base_layer
            inner.base_layer = self.experts
        self.factors: dict[str, nn.Parameter] = {}
        wrapper = self.wrapper
        while wrapper is not self.experts:
            self.scaling = wrapper.scaling["default"]
            for letter, module in (("A", wrapper.lora_A), ("B", wrapper.lora_B)):
                self.factors[f"{letter}_{wrapper.parameter_name}"] = module["default"].weight
            wrapper = wrapper.base_layer
        self._draw(adapters)

    def _draw(self, adapters: torch.dtype) -> None:
        """Values that bfloat16 holds in either dtype, so that all variants have one truth."""
        generator = torch.Generator(device=self.layer.x.device).manual_seed(1)
        for name, factor in self.factors.items():
            scale = factor.shape[1] ** -0.5 if name.startswith("A") else DELTA / (self.scaling * self.rank**0.5)
            values = torch.randn(factor.shape, generator=generator, device=factor.device) * scale
            factor.data = values.bfloat16().to(adapters)

    def weight(self, name: str) -> Tensor:
        """All experts' base weight, dequantised where it is packed."""
        self.take_off_proxies()
        return getattr(self.experts, name).detach()

    def call(self, implementation: str, autocast: bool) -> Callable[[], Tensor]:
        """The forward as a function without arguments."""
        layer, device = self.layer, self.layer.x.device.type

        def forward() -> Tensor:
            self.take_off_proxies()
            self.experts.config._experts_implementation = implementation
            with torch.autocast(device, torch.bfloat16, enabled=autocast):
                return self.wrapper(layer.x, layer.topk_ids, layer.topk_weights)

        return forward

    def weights_mb(self) -> float:
        """Of the base, with the scales of 4-bit blocks."""
        tensors: list[Tensor] = list(self.experts.parameters())
        for chain in getattr(self.experts, "parametrizations", {}).values():
            states = [chain[0].quant_state, chain[0].quant_state.state2]
            tensors += [state.absmax for state in states if state is not None]
        return sum(tensor.nbytes for tensor in tensors) / MIB

    def take_off_proxies(self) -> None:
        """PEFT 0.21.0 leaves its factors on a 4-bit weight after a forward, and would add them again in the next."""
        for chain in getattr(self.experts, "parametrizations", {}).values():
            del chain[1:]

    def leaves(self) -> dict[str, Tensor]:
        """What gets a gradient, by the name under which its error is reported."""
        return {"dx": self.layer.x, "dw": self.layer.topk_weights} | {f"d{k}": v for k, v in self.factors.items()}

    def clear_gradients(self) -> None:
        """Drop every gradient, as ``zero_grad(set_to_none=True)`` does."""
        for leaf in self.leaves().values():
            leaf.grad = None


def _in_4_bits(experts: Any) -> Any:
    """A copy whose weights bitsandbytes keeps in 4 bits, as Axolotl's quantize_moe_experts does at load."""
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    experts = copy.deepcopy(experts)
    for name in WEIGHTS:
        replace_parameter_4bit(experts, name, compress_statistics=True, quant_type="nf4")
    return experts


def truth(adapted: Adapted) -> dict[str, Tensor]:
    """Output and gradients in float64, expert by expert: ``W + scaling * B A`` formed, PEFT's packing undone."""
    layer, rank, factors = adapted.layer, adapted.rank, adapted.factors
    experts = layer.shape.experts
    found = {"out": torch.zeros_like(layer.x, dtype=torch.float64)}
    found |= {name: torch.zeros_like(leaf, dtype=torch.float64) for name, leaf in adapted.leaves().items()}
    base = {name: adapted.weight(name) for name in WEIGHTS}
    for expert in range(experts):
        token, slot = torch.where(layer.topk_ids == expert)
        x = layer.x.detach()[token].double().requires_grad_()
        weights = layer.topk_weights.detach()[token, slot, None].double().requires_grad_()
        leaves, merged = {"dx": x, "dw": weights}, []
        for name in WEIGHTS:
            # A: (E*r, in), experts slowest. B: (out, r*E), experts fastest.
            a = factors[f"A_{name}"].detach().view(experts, rank, -1)[expert].double().requires_grad_()
            b = factors[f"B_{name}"].detach().view(-1, rank, experts)[:, :, expert].double().requires_grad_()
            leaves |= {f"dA_{name}": a, f"dB_{name}": b}
            merged.append((base[name][expert].double() + adapted.scaling * (b @ a))[None])
        y = reference_experts(x, torch.zeros_like(slot)[:, None], weights, *merged)
        gradients = dict(zip(leaves, torch.autograd.grad(y, tuple(leaves.values()), layer.grad_out[token].double()),
                             strict=True))  # fmt: skip
        found["out"].index_add_(0, token, y.detach())
        found["dx"].index_add_(0, token, gradients["dx"])
        found["dw"][token, slot] = gradients["dw"][:, 0]
        for name in WEIGHTS:
            found[f"dA_{name}"].view(experts, rank, -1)[expert] = gradients[f"dA_{name}"]
            found[f"dB_{name}"].view(-1, rank, experts)[:, :, expert] = gradients[f"dB_{name}"]
    return found


def relative_errors(adapted: Adapted, forward: Callable[[], Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Relative L2 error of the output and of every gradient."""
    adapted.clear_gradients()
    out = forward()
    out.backward(adapted.layer.grad_out)
    errors = {}
    for name, expected in exact.items():
        ours = out.detach() if name == "out" else adapted.leaves()[name].grad
        if ours is None:
            raise RuntimeError(f"{name}: no gradient")
        errors[name] = float((ours.double() - expected).norm() / expected.norm())
    adapted.clear_gradients()
    return errors


def why_not(implementation: str, base: str, shape: LayerShape, device: torch.device) -> str | None:
    """None if it can be tried here, else the reason."""
    if base == "nf4":
        if installed_version("bitsandbytes") is None:
            return "bitsandbytes is not installed. Cure: pip install bitsandbytes"
        if implementation in (PEFT, PLAIN):
            try:
                patch = importlib.import_module("axolotl.monkeypatch.moe_quant").patch_peft_target_parameters_matching
            except PEER_FAILURES as error:
                return f"without Axolotl's correction one of two nested adapters trains nothing: {failure(error)}"
            patch()
            fuse_lora()
    if implementation == AXOLOTL:
        reason = PEERS["scattermoe"].why_not(shape, device, torch.bfloat16)
        if reason is not None:
            return reason
        try:
            importlib.import_module(f"{SCATTERMOE}.experts").register_scattermoe_experts()
        except PEER_FAILURES as error:
            return f"it cannot be set up: {failure(error)}"
    return None


def _tuners() -> list[Any]:
    """Every kernel of scattermoe that Triton tunes at its first call."""
    from triton.runtime.autotuner import Autotuner

    modules = [importlib.import_module(f"{SCATTERMOE}.kernels.{name}") for name in ("lora_ops", "ops")]
    kernels = [value for module in modules for value in vars(module).values() if isinstance(value, Autotuner)]
    return list({id(kernel): kernel for kernel in kernels}.values())


def compile_share(layer: LayerShape, rank: int, share: int, shares: int) -> None:
    """Run one in ``shares`` of scattermoe's some hundred candidates once, for Triton's cache on disk."""
    device = torch.device("cuda")
    adapted = Adapted(_frozen(make_layer(layer, "mild", device, torch.bfloat16)), rank, torch.bfloat16, False)
    reason = why_not(AXOLOTL, "bf16", layer, device)
    if reason is not None:
        raise SystemExit(reason)

    def once(kernel: Callable[[], object], quantiles: object) -> list[float]:
        kernel()
        return [1.0, 1.0, 1.0]

    for tuner in _tuners():
        tuner.configs = tuner.configs[share::shares] or tuner.configs[:1]
        tuner._do_bench = once
    adapted.call(AXOLOTL, False)().backward(adapted.layer.grad_out)


def _frozen(layer: Layer) -> Layer:
    layer.gate_up.requires_grad_(False)
    layer.down.requires_grad_(False)
    return layer


def _spawn_compilers(args: argparse.Namespace, shape: LayerShape) -> list[subprocess.Popen[bytes]]:
    jobs = max(1, min(args.jobs, os.cpu_count() or 1))
    command = [sys.executable, __file__, "--rank", str(args.rank), "--tokens", "512", "--shape", shape.name]
    return [
        subprocess.Popen([*command, "--compile-share", str(n), str(jobs)], stdout=subprocess.DEVNULL)
        for n in range(jobs)
    ]


class Bench:
    """The whole measurement; ``rows`` grow variant by variant, and ``write`` can be called at any time."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = torch.device(args.device)
        shape = TINY if self.device.type == "cpu" and args.shape is None else LAYERS[args.shape or "qwen3-30b-a3b"]
        tokens = args.tokens or shape.tokens
        self.shape = LayerShape(shape.name, tokens, shape.hidden, shape.intermediate, shape.experts, shape.top_k)
        self.rows: list[Row] = []
        self.began = time.perf_counter()
        backend = "torch" if self.device.type == "cpu" else "auto"
        self.registered = our_variants((128,), (True,), backend)[OURS]
        fuse_lora()

    def say(self, text: str) -> None:
        """A line of progress with the seconds so far."""
        print(f"[{time.perf_counter() - self.began:5.1f} s] {text}", flush=True)

    def run(self, variants: list[tuple[str, str]]) -> None:
        """Every variant without scattermoe, then, if it can run, every one again with it; written after each.

        Its kernels take longer to compile than all the rest: what is measured first is there whatever becomes of it.
        """
        layer = _frozen(make_layer(self.shape, "mild", self.device, torch.bfloat16))
        absent = why_not(AXOLOTL, "bf16", self.shape, self.device)
        if self.args.without:
            absent = "left out by --without-scattermoe"
        for reason in [absent] if absent else ["not yet measured", ""]:
            if not reason:
                self._compile_scattermoe()
            for base, adapters in variants:
                self._variant(layer, base, adapters, reason)
                self.write()
                gc.collect()
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()

    def _variant(self, layer: Layer, base: str, adapters: str, absent: str) -> None:
        names = (OURS, PEFT, AXOLOTL, PLAIN)
        rows = {name: Row(base, adapters, name) for name in names}
        self._measure(layer, rows, base, adapters, absent)
        self.rows = [row for row in self.rows if (row.base, row.adapters) != (base, adapters)] + list(rows.values())

    def _measure(self, layer: Layer, rows: dict[str, Row], base: str, adapters: str, absent: str) -> None:
        for name, row in rows.items():
            row.note = absent if name == AXOLOTL else ""
            row.note = row.note or why_not(name, base, self.shape, self.device) or ""
            row.ok = not row.note
        if not any(row.ok for row in rows.values()):
            return
        self.say(f"{base} base, {adapters} adapters: tensors and truth")
        adapted = Adapted(layer, self.args.rank, getattr(torch, adapters), base == "nf4")
        exact = truth(adapted)
        calls: dict[str, Callable[[], Tensor]] = {}
        for name in (OURS, PLAIN, PEFT, AXOLOTL):
            row = rows[name]
            if not row.ok:
                continue
            row.weights_mb = adapted.weights_mb()
            calls[name] = adapted.call(self._implementation(name), adapters == "float32")
            self.say(f"checking {name}")
            self._check(adapted, row, calls[name], exact)
        yardstick = rows[PLAIN].rel_error
        for row in (row for row in rows.values() if row.ok):
            fault = what_is_wrong(row.rel_error, yardstick, torch.finfo(torch.bfloat16).eps)
            if fault is not None:
                row.ok, row.note = False, fault
        timed = {name: call for name, call in calls.items() if rows[name].ok and name != PLAIN}
        if timed:
            self._time(adapted, timed, rows)

    def _implementation(self, name: str) -> str:
        return {OURS: self.registered, PEFT: "grouped_mm", PLAIN: "eager"}.get(name, name)

    def _check(self, adapted: Adapted, row: Row, forward: Callable[[], Tensor], exact: dict[str, Tensor]) -> None:
        with mock.patch.object(PackedWeight, "like", autospec=True, side_effect=PackedWeight.like) as packed:
            try:
                row.rel_error = relative_errors(adapted, forward, exact)
            except PEER_FAILURES as error:  # out of memory is one of them
                if row.implementation == OURS:
                    raise
                row.ok, row.note = False, f"it failed: {failure(error)}"
                adapted.clear_gradients()
        # A first measurement was of something else: with another parametrization on the weight ours reads it whole.
        if row.ok and row.base == "nf4" and row.implementation == OURS and not packed.called:
            row.ok, row.note = False, "it did not dequantise by itself: the 4-bit weight is parametrised once more"
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _compile_scattermoe(self) -> None:
        """Fill Triton's cache in many processes at once, then let each candidate run 20 ms instead of 100."""
        self.say(f"{self.args.jobs} processes compile scattermoe's candidates")
        for process in _spawn_compilers(self.args, self.shape):
            try:
                if process.wait(timeout=self.args.patience) != 0:
                    self.say(f"a compiler ended with {process.returncode}; what it did not compile is compiled now")
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                self.say("a compiler was too slow; what it did not compile is compiled now")
        self.say("done")
        import triton

        for tuner in _tuners():
            tuner._do_bench = functools.partial(triton.testing.do_bench, warmup=5, rep=20)

    def _time(self, adapted: Adapted, forward: dict[str, Callable[[], Tensor]], rows: dict[str, Row]) -> None:
        grad = adapted.layer.grad_out
        both: dict[str, Call] = {
            name: functools.partial(_forward_backward, call, grad) for name, call in forward.items()
        }
        clock = Clock(self.device)
        for calls, what in ((dict[str, Call](forward), "forward"), (both, "forward_backward")):
            self.say(f"timing {what.replace('_', ' and ')}")
            for call in calls.values():
                call()
                adapted.clear_gradients()
            times = clock.compare(calls, self.args.repeats, adapted.clear_gradients, lambda: None)
            for name, measured in times.items():
                setattr(rows[name], what, measured)
        excluded = (*adapted.experts.parameters(), *adapted.factors.values())
        for name, call in forward.items():
            rows[name].saved_mb = saved_bytes(call, excluded) / MIB
            if self.device.type == "cuda":
                rows[name].peak_mb = peak_bytes(both[name]) / MIB
            adapted.clear_gradients()

    def bars(self) -> list[dict[str, Any]]:
        """The goals of this layer and whether each was reached; ``ok`` None where it was not measured."""
        found = []
        for base, adapters in dict.fromkeys((row.base, row.adapters) for row in self.rows):
            rows = {r.implementation: r for r in self.rows if (r.base, r.adapters) == (base, adapters)}
            ours = rows[OURS]
            for peer, what, goal in (
                (PEFT, "speed", SPEEDUP), (AXOLOTL, "speed", 1.0), (PEFT, "memory", 1.0), (AXOLOTL, "memory", 1.0)
            ):  # fmt: skip
                measured = [_figure(row, what) for row in (rows[peer], ours)]
                theirs, own = measured if self.device.type == "cuda" else (None, None)
                ratio = theirs / own if theirs and own else None
                found.append({
                    "base": base, "adapters": adapters, "what": f"{what}, {peer} over {OURS}", "value": ratio,
                    "goal": goal, "ok": None if ratio is None else ratio >= goal,
                    "note": "" if ratio else (rows[peer].note or ours.note or "a CPU says nothing about it"),
                })  # fmt: skip
            worst = [
                max(errors[name] / rows[PLAIN].rel_error[name] for name in errors)
                for errors in (ours.rel_error,) if errors and rows[PLAIN].rel_error
            ]  # fmt: skip
            found.append({
                "base": base, "adapters": adapters, "what": f"error, {OURS} over {PLAIN}, the worst",
                "value": worst[0] if worst else None, "goal": RMS_FACTOR,
                "ok": worst[0] <= RMS_FACTOR if worst else None,
                "note": "" if worst else rows[PLAIN].note or ours.note,
            })  # fmt: skip
        ours = {row.base: row for row in self.rows if row.implementation == OURS and row.adapters == "float32"}
        if (packed := ours.get("nf4")) is not None:
            plain = ours.get("bf16")
            times = [None if row is None else row.forward_backward for row in (packed, plain)]
            on_gpu = [t.queued.median for t in times if t is not None and t.queued is not None]
            for what, value, goal in (
                ("GPU time over the bf16 base's", on_gpu[0] / on_gpu[1] if len(on_gpu) == 2 else None, NF4_TIME),
                ("MiB above the weights", packed.peak_mb, NF4_PEAK_MB),
            ):
                found.append({
                    "base": "nf4", "adapters": "float32", "what": what, "value": value, "goal": goal,
                    "ok": None if value is None else value <= goal,
                    "note": "" if value else packed.note or "not measured on both bases, or on a CPU",
                })  # fmt: skip
        return found

    def write(self) -> None:
        """Everything measured so far, to --out."""
        machine = environment() | {name: installed_version(name) for name in ("peft", "bitsandbytes")}
        machine["command"] = " ".join(["python", "benchmarks/lora_cost.py", *sys.argv[1:]])
        self.args.out.write_text(
            json.dumps(
                {
                    "schema": 1,
                    "kind": "lora",
                    "environment": machine,
                    "shape": asdict(self.shape),
                    "rank": self.args.rank,
                    "repeats": self.args.repeats,
                    "seconds": time.perf_counter() - self.began,
                    "rows": [asdict(row) for row in self.rows],
                    "bars": self.bars(),
                    "expert_calls": backends.dispatch_counts(),
                },
                indent=1,
            )
        )

    def show(self) -> None:
        """Tables of what was measured, and a line for each goal."""
        s = self.shape
        sizes = f"T={s.tokens} K={s.top_k} E={s.experts} H={s.hidden} I={s.intermediate} r={self.args.rank}"
        print(f"\n{s.name}: {sizes}, {self.args.repeats} repeats; MiB saved for the backward, peak above the weights")
        print(f"{'base':5}{'adapters':10}{'implementation':18}{'forward ms':>34}{'forward+backward ms':>34}"
              f"{'saved':>8}{'peak':>8}{'weights':>9}")  # fmt: skip
        for row in self.rows:
            head = f"{row.base:5}{row.adapters:10}{row.implementation:18}"
            if row.forward is None or row.forward_backward is None:
                print(f"{head}  {row.note or 'not timed'}")
                continue
            spans = [
                f"{t.total.median:.2f} (GPU {t.queued.median:.2f}, host {t.host.median:.2f})" if t.queued else
                f"{t.total.median:.2f}" for t in (row.forward, row.forward_backward)
            ]  # fmt: skip
            memory = [f"{mb:.4g}" if mb is not None else "-" for mb in (row.saved_mb, row.peak_mb, row.weights_mb)]
            print(f"{head}{spans[0]:>34}{spans[1]:>34}{memory[0]:>8}{memory[1]:>8}{memory[2]:>9}")
        print(f"\n{OURS} ran on {backends.dispatch_counts()}: {backends.dispatch_reason()}")
        print("relative L2 error against float64")
        for row in self.rows:
            errors = "  ".join(f"{name} {error:.2e}" for name, error in row.rel_error.items())
            print(f"{row.base:5}{row.adapters:10}{row.implementation:18}{errors or row.note}")
        print()
        for bar in self.bars():
            verdict = {True: "pass", False: "FAIL", None: "not measured"}[bar["ok"]]
            value = bar["note"] if bar["value"] is None else f"{bar['value']:.2f}, goal {bar['goal']:.2f}"
            print(f"{verdict:13}{bar['base']} base, {bar['adapters']} adapters: {bar['what']}: {value}")


def _forward_backward(forward: Callable[[], Tensor], grad: Tensor) -> None:
    forward().backward(grad)


def _figure(row: Row, what: str) -> float | None:
    if what == "memory":
        return row.peak_mb
    return None if row.forward_backward is None else row.forward_backward.total.median


def main() -> int:
    """Measure; exit code 1 if one of our results is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--shape", choices=sorted(LAYERS), help="default: qwen3-30b-a3b, on a CPU a tiny one")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=20)
    names = [f"{base}-{adapters}" for base, adapters in VARIANTS]
    parser.add_argument("--variants", default=",".join(names), help=f"of {', '.join(names)}")
    parser.add_argument("--jobs", type=int, default=12, help="processes that compile scattermoe's candidates ahead")
    parser.add_argument("--without-scattermoe", dest="without", action="store_true", help="it compiles for a minute")
    parser.add_argument("--patience", type=float, default=90.0, help="seconds to wait for them")
    parser.add_argument("--out", type=Path, default=Path("lora.json"))
    parser.add_argument("--compile-share", type=int, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.compile_share:
        shape = LAYERS[args.shape]
        shape = LayerShape(shape.name, args.tokens, shape.hidden, shape.intermediate, shape.experts, shape.top_k)
        compile_share(shape, args.rank, *args.compile_share)
        return 0
    unknown = set(args.variants.split(",")) - set(names)
    if unknown:
        parser.error(f"--variants {', '.join(sorted(unknown))}: choose from {', '.join(names)}")
    bench = Bench(args)
    bench.run([variant for variant in VARIANTS if "-".join(variant) in args.variants.split(",")])
    bench.show()
    wrong = [row for row in bench.rows if row.implementation == OURS and row.rel_error and not row.ok]
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
