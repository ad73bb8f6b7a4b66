"""The layer by plain steps of torch, for the derivatives that the kernels do not have.

The kernels give the output and its first gradients. Second derivatives (``create_graph=True``), forward mode and the
transforms of torch.func (``grad``, ``vjp``, ``jvp``, ``vmap`` and what is made of them) take these steps instead,
which torch differentiates as often as it is asked: right, and slow.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack, is_functorch_wrapped_tensor
from torch._subclasses.fake_tensor import is_fake
from torch.autograd import forward_ad

from moe_kernels.activation import Activation, Gate
from moe_kernels.factors import scaled
from moe_kernels.layer import BackwardSpec, BackwardTensors, Grads, Matrix, Needs, Spec, Tensors
from moe_kernels.packed import whole
from moe_kernels.reference import LowRankPair, reference_experts

logger = logging.getLogger("moe_kernels")
_modes = torch._C._len_torch_dispatch_stack
_MODES = torch._C._TorchDispatchModeKey
_BATCHED = torch._C._dispatch_key_parse("Batched")


def transformed(tensors: Sequence[Matrix | None]) -> bool:
    """Whether torch.func transforms the call, or one of ``tensors`` has a tangent of forward mode."""
    if torch._C._are_functorch_transforms_active():
        return True
    if forward_ad._current_level < 0:
        return False
    return any(isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def batched(tensor: Tensor) -> bool:
    """Whether ``tensor`` stands for many: of a vmap, or of the older one in autograd (``is_grads_batched=True``)."""
    return is_functorch_wrapped_tensor(tensor) or torch._C._dispatch_keys(tensor).has(_BATCHED)


def traced(tensor: Tensor) -> bool:
    """Whether ``tensor`` has a shape but no data (meta, FakeTensor), or what is done to it is being recorded."""
    return tensor.is_meta or (type(tensor) is not Tensor and is_fake(tensor)) or (_modes() > 0 and _recorded())


def _recorded() -> bool:
    return any(torch._C._get_dispatch_mode(mode) is not None for mode in (_MODES.FAKE, _MODES.PROXY))


@functools.cache
def _warn(what: str) -> None:
    logger.warning(
        "second derivatives, forward mode and torch.func of %s run by plain steps of torch, not by the kernels: they "
        "are right, but slow",
        what,
    )


@torch.compiler.assume_constant_result
def say_plain(what: str) -> None:
    """Say once that ``what`` takes plain steps. torch.compile does not look into this, but calls it once a graph."""
    _warn(what)


def _vmapped() -> bool:
    return any(level.key() == TransformType.Vmap for level in get_interpreter_stack() or ())


@torch.compiler.assume_constant_result
def _has_autocast(device: str) -> bool:
    """torch.compile of torch 2.11 does not know this question."""
    return torch.amp.is_autocast_available(device)


def without_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    """Inside, autocast of ``device`` (a type) is off; some, such as meta, have none."""
    if not _has_autocast(device):
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)


def plain_experts(t: Tensors, spec: Spec) -> Tensor:
    """out (T, H), or (R, H) without ``reduce``."""
    say_plain("an expert layer")
    # Where ids cannot be read, no expert can take its own tokens alone.
    blind = torch.compiler.is_compiling() or traced(t.topk_ids) or _vmapped()
    experts = _every_expert_on_every_token if blind else reference_experts
    with without_autocast(t.x.device.type):
        out = experts(
            t.x,
            t.topk_ids,
            t.topk_weights if spec.reduce else None,
            whole(t.gate_up),
            whole(t.down),
            Activation(spec.activation, spec.parameters),
            gate_up_bias=t.gate_up_bias,
            down_bias=t.down_bias,
            interleaved=spec.interleaved,
            reduce=spec.reduce,
            gate_up_lora=_pair(t.gate_up_lora_b, t.gate_up_lora_a, spec.gate_up_scaling, t.x.dtype),
            down_lora=_pair(t.down_lora_b, t.down_lora_a, spec.down_scaling, t.x.dtype),
        )
    return out if spec.reduce else out.flatten(0, 1)


def _pair(
    lora_b: Tensor | None, lora_a: Tensor | None, scaling: float, dtype: torch.dtype
) -> LowRankPair | None:
    return None if lora_b is None or lora_a is None else (lora_b.to(dtype), scaled(lora_a, scaling).to(dtype))


def plain_grads(t: BackwardTensors, spec: BackwardSpec) -> Grads:
    """What the backward steps give, as a graph that autograd can differentiate again."""
    plan = spec.forward.plan(t)
    # Experts of the slots, E where a slot was dropped.
    topk_ids = torch.bucketize(plan.slot_row, plan.expert_start[1:], right=True).view(t.topk_weights.shape)
    again = torch.is_grad_enabled()
    with torch.enable_grad(), without_autocast(t.dout.device.type):
        # Views, as one tensor may be made of another (routing weights of x): each is to get its own share alone.
        t = t._replace(gate_up=whole(t.gate_up), down=whole(t.down))
        own = {name: None if (value := getattr(t, name)) is None else value.view_as(value) for name in Needs._fields}
        wanted = [name for name, needed in spec.needs._asdict().items() if needed]
        out = plain_experts(Tensors(topk_ids=topk_ids, **own), spec.forward)  # type: ignore[arg-type]
        inputs = [own[name] for name in wanted]
        found = torch.autograd.grad(
            out, inputs, t.dout, create_graph=again, allow_unused=True, materialize_grads=True  # type: ignore[arg-type]
        )
    return Grads(**dict(zip(wanted, found, strict=True)))


def _every_expert_on_every_token(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor | None,
    gate_up: Tensor,
    down: Tensor,
    activation: Activation,
    *,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    interleaved: bool,
    reduce: bool,
    gate_up_lora: LowRankPair | None,
    down_lora: LowRankPair | None,
) -> Tensor:
    """As reference_experts, with steps whose shapes do not follow from the ids: E / K times the work."""
    if gate_up_lora is not None:
        gate_up = gate_up + gate_up_lora[0] @ gate_up_lora[1]
    if down_lora is not None:
        down = down + down_lora[0] @ down_lora[1]
    gate = Gate(activation, gated=gate_up.shape[1] != down.shape[2], interleaved=interleaved)
    (tokens, hidden), top_k = x.shape, topk_ids.shape[1]
    out = x.new_zeros(tokens, hidden) if reduce else x.new_zeros(tokens, top_k, hidden)
    for expert in range(gate_up.shape[0]):
        slots = topk_ids == expert
        others = ~slots.any(-1, keepdim=True)
        # Of other tokens zeros go in and zeros come out: one that is not this expert's cannot overflow in it.
        z = x.masked_fill(others, 0.0) @ gate_up[expert].T
        if gate_up_bias is not None:
            z = z + gate_up_bias[expert]
        y = gate.value(z) @ down[expert].T
        if down_bias is not None:
            y = y + down_bias[expert]
        if topk_weights is None:
            out = torch.where(slots[..., None], y[:, None], out)
        else:
            weight = topk_weights.masked_fill(~slots, 0.0).sum(-1, keepdim=True)
            out = out + (y * weight).masked_fill(others, 0.0).to(out.dtype)
    return out
