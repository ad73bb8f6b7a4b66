"""Which experts modules of transformers these kernels compute exactly, and why not the others."""

from __future__ import annotations

from typing import Any

import torch
from transformers.activations import ACT2FN
from transformers.integrations.moe import _default_apply_gate

from moe_kernels.activation import ACTIVATIONS

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_ACTIVATIONS = {torch.nn.SiLU: "silu"} | {type(ACT2FN[name]): name for name in ACTIVATIONS if name in ACT2FN}
# Attributes that transformers' decorator sets (5.16.1 not yet the last), and the value that is refused.
_REFUSED = {
    "has_gate": (False, "its experts have no gate (up_proj instead of gate_up_proj)."),
    "is_transposed": (True, "its weights are stored transposed, (E, H, 2I)."),
    "is_concatenated": (False, "its gate and up rows are interleaved."),
    "has_bias": (True, "its experts have biases."),
    "has_post_expert_norm": (True, "it normalises the output of each expert."),
}


class UnsupportedExperts(ValueError):
    """These kernels cannot run an experts module; the message names the module, the reason and the cure."""

    @classmethod
    def of(cls, module: Any, reason: str, name: str = "") -> UnsupportedExperts:
        where = f"{name} ({type(module).__name__})" if name else type(module).__name__
        return cls(f"{where}: {reason} Train it with experts_implementation: grouped_mm and without moe_kernels.")


def why_not_module(module: Any) -> str | None:
    """None if these kernels compute what ``module``, an experts module, computes; else the reason."""
    reason = structure_problem(module)
    if reason:
        return reason
    # The type may lie (a patched forward): compare values, far past any clamp.
    activation, device = activation_of(module), module.down_proj.device
    gate = torch.linspace(-60, 60, 241, device="cpu" if device.type == "meta" else device)
    up = gate.flip(0) + 0.25
    with torch.no_grad():
        theirs = module._apply_gate(torch.cat([gate, up])[None])[0]
    if not torch.allclose(ACTIVATIONS[activation].value(gate) * up, theirs, rtol=1e-4, atol=1e-4):
        return f"its gate does not compute {activation}(gate) * up: act_fn was changed."
    return None


def structure_problem(module: Any) -> str | None:
    """What the attributes of an experts module say against it; cheap, and torch.compile traces it."""
    for attribute, (refused, reason) in _REFUSED.items():
        if getattr(module, attribute, not refused) == refused:
            return reason
    if getattr(type(module), "_apply_gate", None) is not _default_apply_gate:
        return "it has a gate of its own (_apply_gate: a clamp or a scale)."
    if type(module.act_fn) not in _ACTIVATIONS:
        return f"its activation {type(module.act_fn).__name__} is none of {', '.join(sorted(ACTIVATIONS))}."
    return None


def activation_of(module: Any) -> str:
    """Key of :data:`moe_kernels.activation.ACTIVATIONS` for a module without a structure problem."""
    return _ACTIVATIONS[type(module.act_fn)]


def plain_weight(module: Any, weight: Any) -> torch.Tensor:
    """``weight`` of ``module`` as the plain tensor of all its experts that the op takes.

    Raises:
        UnsupportedExperts: sharded, quantised, or of another number of experts than the module routes to.
    """
    if hasattr(weight, "placements"):  # a DTensor; plain FSDP2 hands whole parameters to forward
        if not all(placement.is_replicate() for placement in weight.placements):
            raise UnsupportedExperts.of(module, f"its weights are sharded in forward ({weight.placements}).")
        weight = weight.to_local()
    if weight.dtype not in _DTYPES:
        raise UnsupportedExperts.of(module, f"its weights are stored as {weight.dtype}.")
    if weight.shape[0] != module.num_experts:
        raise UnsupportedExperts.of(
            module,
            f"it says num_experts={module.num_experts} but holds weights of {weight.shape[0]} experts.",
        )
    return weight
