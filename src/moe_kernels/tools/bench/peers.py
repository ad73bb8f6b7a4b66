"""The peers: other implementations of the same expert layer, each with the reason where it cannot be measured.

A peer is one entry of :data:`PEERS`. One that cannot run here has a row that says why; one that fails is reported
with its error, and the others are measured without it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch

from moe_kernels.install import pip_install
from moe_kernels.shapes import LayerShape
from moe_kernels.tools.bench.layer import Experts, Layer, transformers_experts
from moe_kernels.tools.check.problems import Case

#: What a peer may raise. Not caught from our own op, whose bugs must not pass for a failed peer.
PEER_FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, ImportError, OSError, AssertionError)
#: batched_mm copies the weights of every (token, expert) pair: refused beyond this share of the memory.
COPIES_SHARE = 0.4
CPU_COPIES = 2 * 2**30
_SCATTERMOE = "axolotl.integrations.kernels.libs.scattermoe_lora"

#: transformers' own, in whose place a form's merged weights can be put.
STOCK = ("eager", "grouped_mm", "batched_mm")

WhyNot = Callable[[LayerShape, torch.device, torch.dtype], str | None]


@dataclass(frozen=True)
class Peer:
    """One implementation to compare with.

    Attributes:
        why_not: None if it can be measured on this (shape, device, dtype), else one sentence with the cure.
        experts: binds a layer's weights.
    """

    why_not: WhyNot
    experts: Callable[[Layer], Experts]


def why_not_form(name: str, case: Case) -> str | None:
    """None if a peer runs layers in the form of ``case``, else why it is not asked."""
    if case == Case(case.tokens, case.top_k, case.experts, case.hidden, case.intermediate, case.dtype):  # plain
        return None
    if name not in STOCK:
        return f"{name} is measured in the plain form alone, and this one is another."
    if case.packed or case.bias or case.transposed or not case.gated:
        return f"{name} is measured on gated experts with 16-bit weights by rows and no biases; this form has others."
    return None


def failure(error: BaseException) -> str:
    """One line of an error."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]


def _stock(name: str) -> Callable[[Layer], Experts]:
    return lambda layer: transformers_experts(layer, name)


def _everywhere(shape: LayerShape, device: torch.device, dtype: torch.dtype) -> str | None:
    return None


def _why_not_batched_mm(shape: LayerShape, device: torch.device, dtype: torch.dtype) -> str | None:
    copies = 3 * shape.rows * shape.hidden * shape.intermediate * dtype.itemsize
    limit = CPU_COPIES
    if device.type == "cuda":
        limit = int(COPIES_SHARE * torch.cuda.get_device_properties(device).total_memory)
    if copies <= limit:
        return None
    return (
        f"batched_mm copies the weights of every routed row, {copies / 2**30:.0f} GiB here; "
        "it is meant for generation. Use fewer --tokens."
    )


def _on_gpu(name: str, modules: dict[str, str] | None = None) -> WhyNot:
    """Of a peer that needs an NVIDIA GPU, 16 bits, and ``modules``: {module: the package that brings it}."""

    def why_not(shape: LayerShape, device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cuda":
            return f"{name} needs an NVIDIA GPU, and this runs on the {device.type}."
        if dtype not in (torch.bfloat16, torch.float16):
            return f"{name} is made for 16 bits: measure it with --dtype bf16 or fp16."
        for module, package in (modules or {}).items():
            if not _is_installed(module):
                return f"{package} is not installed. Cure: pip install {package}"
        return None

    return why_not


def _is_installed(module: str) -> bool:
    """Whether there is a ``module`` to import. Imports its parents."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _scattermoe(layer: Layer) -> Experts:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    experts = importlib.import_module(f"{_SCATTERMOE}.experts")
    ALL_EXPERTS_FUNCTIONS.register("scattermoe", experts.scattermoe_experts_forward)
    return transformers_experts(layer, "scattermoe")


def _liger(layer: Layer) -> Experts:
    function = importlib.import_module("liger_kernel.ops.fused_moe").LigerFusedMoEFunction

    def experts(x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        return function.apply(x, layer.gate_up, layer.down, topk_ids.int(), topk_weights)

    return experts


def _why_not_sonicmoe(shape: LayerShape, device: torch.device, dtype: torch.dtype) -> str | None:
    if reason := _on_gpu("sonicmoe")(shape, device, dtype):
        return reason
    from transformers.integrations import sonicmoe

    try:
        sonicmoe.load_sonicmoe_kernel()
    except PEER_FAILURES as error:
        return (
            f"transformers cannot load it: {failure(error)} Cure: {pip_install('peers')} with Python 3.12 or newer, "
            "and reach the Hugging Face hub once (kernels-community/sonic-moe)."
        )
    return None


_LIGER = {"liger_kernel": "liger-kernel", "liger_kernel.ops.fused_moe": "'liger-kernel>=0.8.1'"}
PEERS: dict[str, Peer] = {
    "eager": Peer(_everywhere, _stock("eager")),  # transformers' loop over experts
    "grouped_mm": Peer(_everywhere, _stock("grouped_mm")),  # transformers' default: torch's grouped GEMM
    "batched_mm": Peer(_why_not_batched_mm, _stock("batched_mm")),  # transformers' path for generation
    "scattermoe": Peer(_on_gpu("scattermoe", {_SCATTERMOE: "axolotl"}), _scattermoe),  # Axolotl's kernels
    "liger": Peer(_on_gpu("liger", _LIGER), _liger),  # Liger's fused MoE
    "sonicmoe": Peer(_why_not_sonicmoe, _stock("sonicmoe")),  # from the Hugging Face hub
}
