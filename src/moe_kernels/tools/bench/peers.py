"""The peers: other implementations of the same expert layer, each with the reason where it cannot be measured.

A peer is one entry of :data:`PEERS`. None is ever missing in silence: what cannot run here has a row that says why,
and a peer that fails while it runs is reported with its error, the others measured without it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch

from moe_kernels.install import pip_install
from moe_kernels.shapes import LayerShape
from moe_kernels.tools.bench.layer import Experts, Layer, transformers_experts

#: What other people's code raises when it cannot do its work. A bug of ours must not hide here: not for our own op.
PEER_FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, ImportError, OSError, AssertionError)
#: batched_mm copies the weights of every (token, expert) pair: refused beyond this share of the memory.
COPIES_SHARE = 0.4
CPU_COPIES = 2 * 2**30
_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Peer:
    """One implementation to compare with.

    Attributes:
        name: as ``--peers`` takes it and tables show it.
        what: one line for the documentation.
        why_not: None if it can be measured on this (shape, device, dtype), else one sentence with the cure.
        experts: binds a layer's weights.
    """

    name: str
    what: str
    why_not: Callable[[LayerShape, torch.device, torch.dtype], str | None]
    experts: Callable[[Layer], Experts]


def failure(error: BaseException) -> str:
    """One line of an error."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]


def _stock(name: str) -> Callable[[Layer], Experts]:
    return lambda layer: transformers_experts(layer, name)


def _everywhere(shape: LayerShape, device: torch.device, dtype: torch.dtype) -> str | None:
    return None


def _batched_mm(shape: LayerShape, device: torch.device, dtype: torch.dtype) -> str | None:
    copies = 3 * shape.rows * shape.hidden * shape.intermediate * dtype.itemsize
    limit = CPU_COPIES
    if device.type == "cuda":
        limit = int(COPIES_SHARE * torch.cuda.get_device_properties(device).total_memory)
    if copies > limit:
        return (
            f"batched_mm copies the weights of every routed row, {copies / 2**30:.0f} GiB here; "
            "it is meant for generation. Use fewer --tokens."
        )
    return None


def _no_gpu(device: torch.device, what: str) -> str | None:
    return None if device.type == "cuda" else f"{what} needs an NVIDIA GPU, and this runs on the {device.type}."


def _no_half(what: str, dtype: torch.dtype) -> str | None:
    return None if dtype in _HALF else f"{what} is made for 16 bits: measure it with --dtype bf16 or fp16."


def _not_installed(module: str, package: str) -> str | None:
    """One sentence unless ``module`` can be imported; parents are looked up without importing the module itself."""
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        found = False
    return None if found else f"{package} is not installed. Cure: pip install {package}"


_SCATTERMOE = "axolotl.integrations.kernels.libs.scattermoe_lora"


def _why_not_scattermoe(shape: LayerShape, device: torch.device, dtype: torch.dtype) -> str | None:
    return _no_gpu(device, "scattermoe") or _no_half("scattermoe", dtype) or _not_installed(_SCATTERMOE, "axolotl")


def _scattermoe(layer: Layer) -> Experts:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    experts = importlib.import_module(f"{_SCATTERMOE}.experts")
    ALL_EXPERTS_FUNCTIONS.register("scattermoe", experts.scattermoe_experts_forward)
    return transformers_experts(layer, "scattermoe")


def _why_not_liger(shape: LayerShape, device: torch.device, dtype: torch.dtype) -> str | None:
    return (
        _no_gpu(device, "liger")
        or _no_half("liger", dtype)
        or _not_installed("liger_kernel", "liger-kernel")
        or _not_installed("liger_kernel.ops.fused_moe", "'liger-kernel>=0.8.1'")
    )


def _liger(layer: Layer) -> Experts:
    function = importlib.import_module("liger_kernel.ops.fused_moe").LigerFusedMoEFunction

    def experts(x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        return function.apply(x, layer.gate_up, layer.down, topk_ids.int(), topk_weights)

    return experts


def _why_not_sonicmoe(shape: LayerShape, device: torch.device, dtype: torch.dtype) -> str | None:
    reason = _no_gpu(device, "sonicmoe") or _no_half("sonicmoe", dtype)
    if reason is not None:
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


PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("eager", "transformers' loop over experts", _everywhere, _stock("eager")),
        Peer("grouped_mm", "transformers' default: torch's grouped GEMM", _everywhere, _stock("grouped_mm")),
        Peer("batched_mm", "transformers' path for generation", _batched_mm, _stock("batched_mm")),
        Peer("scattermoe", "Axolotl's ScatterMoE kernels", _why_not_scattermoe, _scattermoe),
        Peer("liger", "Liger's fused MoE", _why_not_liger, _liger),
        Peer("sonicmoe", "SonicMoE from the Hugging Face hub", _why_not_sonicmoe, _stock("sonicmoe")),
    )
}
