"""A layer's forward and backward as the steps of its backend. Numbers and letters as in :mod:`moe_kernels.moe`."""

from __future__ import annotations

import dataclasses
import logging
import time
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from moe_kernels.activation import Gate
from moe_kernels.backends import Backend, backend_of, launches_only
from moe_kernels.factors import LowRank, has_experts_last
from moe_kernels.fp8 import Fp8Rows, Fp8Weight
from moe_kernels.kernels.launch.compile import compiling_only
from moe_kernels.kernels.operands import by_rows
from moe_kernels.kernels.tiles import config
from moe_kernels.layer import (
    AddedGrads,
    AnyTensors,
    BackwardSpec,
    BackwardTensors,
    DownGrads,
    Grads,
    Matrix,
    Needs,
    Rows,
    SecondHalfTensors,
    Spec,
    Tensors,
    Weight,
)
from moe_kernels.routing import RoutingPlan, TokenRows

logger = logging.getLogger("moe_kernels")
T = TypeVar("T", Tensors, SecondHalfTensors, BackwardTensors)


class Forward(NamedTuple):
    """Attributes:
    out: (T, H), or (R, H) by slot without the sum.
    z, x_low, a_low, packed_plan: see :class:`moe_kernels.layer.BackwardTensors`.
    """

    out: Tensor
    z: Tensor
    x_low: Tensor
    a_low: Tensor
    packed_plan: Tensor


class FirstHalf(NamedTuple):
    """Attributes:
    a: (R, I).
    z, x_low, a_low, packed_plan: see :class:`moe_kernels.layer.BackwardTensors`.
    """

    a: Tensor
    z: Tensor
    x_low: Tensor
    a_low: Tensor
    packed_plan: Tensor


class SecondHalf(NamedTuple):
    """Attributes:
    out: (T, H), or (R, H) by slot without the sum.
    """

    out: Tensor


def forward(t: Tensors, spec: Spec) -> Forward:
    """Steps 0 to 3."""
    t = _packed(t, spec)
    half = _first_half(t, spec)
    return Forward(*_second_half(t.for_second_half(half.a, half.a_low, half.packed_plan), spec), *half[1:])


def first_half(t: Tensors, spec: Spec) -> FirstHalf:
    """Steps 0 and 1, and A lora_a^T of step 2: all that the backward needs is there when they are done."""
    return _first_half(_packed(t._replace(down_lora_b=None), spec), spec)


def second_half(t: SecondHalfTensors, spec: Spec) -> SecondHalf:
    """Steps 2 and 3."""
    return _second_half(_packed(t, spec), spec)


def _packed(t: T, spec: Spec) -> T:
    """``t`` with LoRA's factors as the kernels take them."""
    parts = {
        name: LowRank(getattr(t, f"{name}_lora_b", None), getattr(t, f"{name}_lora_a", None), scaling)
        for name, scaling in (("gate_up", spec.gate_up_scaling), ("down", spec.down_scaling))
    }
    if all(part.lora_b is None and part.lora_a is None for part in parts.values()):
        return t
    made = backend_of(t, spec).pack_factors(list(parts.values()), t.down.dtype)
    factors: dict[str, Tensor | None] = {}
    for name, (lora_b, lora_a) in zip(parts, made, strict=True):
        factors |= {f"{name}_lora_b": lora_b, f"{name}_lora_a": lora_a}
    present: dict[str, Any] = {name: factor for name, factor in factors.items() if name in t._fields}
    return t._replace(**present)


def _first_half(t: Tensors, spec: Spec) -> FirstHalf:
    backend, gate = backend_of(t, spec), spec.gate(t)
    experts = t.gate_up.shape[0]
    plan = backend.make_plan(t.topk_ids, experts, spec.rows_per_tile(t.topk_ids.numel(), experts), spec.persistent)
    x_low, a_low = t.x.new_empty(0), t.x.new_empty(0)  # two: an op must not return one tensor twice
    if t.gate_up_lora_a is not None:
        x_low = backend.low(TokenRows(t.x, plan.top_k), t.gate_up_lora_a, plan)
    gate_up = Weight(t.gate_up, t.gate_up_bias, x_low, t.gate_up_lora_b)
    z, a = backend.up(t.x, gate_up, plan, gate, spec.needs_grad and not spec.recompute)
    if t.down_lora_a is not None:
        a_low = backend.low(a, t.down_lora_a, plan)
    return FirstHalf(a, z, x_low, a_low, plan.packed)


def _second_half(t: SecondHalfTensors, spec: Spec) -> SecondHalf:
    backend, plan = backend_of(t, spec), spec.plan(t)
    y = backend.down(t.a, Weight(t.down, t.down_bias, t.a_low, t.down_lora_b), plan)
    if spec.reduce:
        return SecondHalf(backend.combine(y, t.topk_weights, plan))
    return SecondHalf(backend.combine(y, t.topk_weights.view(-1, 1), _by_slot(plan)))


def _by_slot(plan: RoutingPlan) -> RoutingPlan:
    """The plan of an output that is not summed: every slot is a token of its own, K = 1."""
    return dataclasses.replace(plan, top_k=1)


def backward(t: BackwardTensors, spec: BackwardSpec) -> Grads:
    """Steps 4 to 8."""
    settings = spec.forward
    given, t = t, _packed(t, settings)
    backend, plan, gate = backend_of(t, settings), settings.plan(t), settings.gate(t)
    z, overwrite_z = t.z, spec.overwrite_z
    if settings.recompute:
        gate_up = Weight(t.gate_up, t.gate_up_bias, t.x_low, t.gate_up_lora_b)
        (z, _), overwrite_z = backend.up(t.x, gate_up, plan, gate, True), True
    dz, rounded_dz, grads = _down_grads(t, given, spec, z, overwrite_z, plan, gate, backend)
    grads |= _gate_up_grads(t, given, spec, dz, rounded_dz, plan, backend)
    transposed = {
        name: grad
        for name in ("gate_up_lora_b", "down_lora_b")
        if (grad := grads.get(name)) is not None and has_experts_last(getattr(given, name))
    }
    if transposed:
        grads |= zip(transposed, backend.experts_last(list(transposed.values())), strict=True)
    return Grads(**grads)


def _down_grads(
    t: BackwardTensors,
    given: BackwardTensors,
    spec: BackwardSpec,
    z: Tensor,
    overwrite_z: bool,
    plan: RoutingPlan,
    gate: Gate,
    backend: Backend,
) -> tuple[Tensor, Fp8Rows | None, dict[str, Tensor | None]]:
    """Steps 4 and 5: dZ (R, Z), rounded too where the backend did that, and the gradients that dO in expert order
    and wA serve. Both die here.

    ``given`` has LoRA's factors as the caller has them, ``t`` packed.
    """
    needs, dout = spec.needs, t.dout.contiguous()
    plan_of_dout = plan if spec.forward.reduce else _by_slot(plan)
    added: AddedGrads | None = None
    if t.down_bias is None and t.down_lora_b is None:
        dout_rows = backend.dout_rows(dout, t.down, plan_of_dout, gate)
    else:
        tokens = TokenRows(dout, plan_of_dout.top_k)
        down = Weight(t.down, t.down_bias, t.a_low, t.down_lora_b)
        lora_b = given.down_lora_b if needs.down_lora_b else None
        added = backend.added_grads(tokens, down, plan, lora_b, needs.down_bias, t.topk_weights)
        dout_rows = added.rows
    low, bias_dot = (None, None) if added is None else (added.low, added.bias_dot)
    down = Weight(t.down, None, low, t.down_lora_a)
    needs_wa = needs.down or needs.down_lora_a
    made = backend.down_grad(dout_rows, down, z, t.topk_weights, plan, gate, overwrite_z, bias_dot, needs_wa)
    done = DownGrads(*made)  # of a backend that was added it may be a plain tuple of the first three
    grads: dict[str, Tensor | None] = {"topk_weights": done.dw if needs.topk_weights else None}
    if needs.down:
        grads["down"] = _weight_grad(backend, t.down, dout_rows, done.wa, plan)
    if added is not None:
        grads |= {"down_bias": added.bias, "down_lora_b": added.factor}
    if needs.down_lora_a and low is not None and given.down_lora_a is not None:
        grads["down_lora_a"] = backend.lora_a_grad(low, done.wa, plan, given.down_lora_a, spec.forward.down_scaling)
    return done.dz, done.rounded_dz, grads


def _gate_up_grads(
    t: BackwardTensors,
    given: BackwardTensors,
    spec: BackwardSpec,
    dz: Tensor,
    rounded_dz: Fp8Rows | None,
    plan: RoutingPlan,
    backend: Backend,
) -> dict[str, Tensor | None]:
    """Steps 6 to 8, from dZ (R, Z)."""
    needs = spec.needs
    grads: dict[str, Tensor | None] = {}
    low = None
    if t.gate_up_lora_b is not None or needs.gate_up_bias:
        gate_up = Weight(t.gate_up, t.gate_up_bias, t.x_low, t.gate_up_lora_b)
        lora_b = given.gate_up_lora_b if needs.gate_up_lora_b else None
        added = backend.added_grads(dz, gate_up, plan, lora_b, needs.gate_up_bias)
        low, grads["gate_up_lora_b"], grads["gate_up_bias"] = added.low, added.factor, added.bias
    if needs.x:
        rows = rounded_dz if rounded_dz is not None and isinstance(t.gate_up, Fp8Weight) else dz
        dxr = backend.dgrad(rows, Weight(t.gate_up, None, low, t.gate_up_lora_a), plan)
        grads["x"] = backend.combine_grad(dxr, plan)
        del dxr
    x_rows: Rows = TokenRows(t.x, plan.top_k)
    if needs.gate_up:
        x_rows = backend.x_rows(t.x, t.gate_up, plan)
        grads["gate_up"] = _weight_grad(backend, t.gate_up, dz, x_rows, plan)
    if needs.gate_up_lora_a and low is not None and given.gate_up_lora_a is not None:
        scaling = spec.forward.gate_up_scaling
        grads["gate_up_lora_a"] = backend.lora_a_grad(low, x_rows, plan, given.gate_up_lora_a, scaling)
    return grads


def _weight_grad(backend: Backend, weight: Matrix, left: Rows, right: Rows, plan: RoutingPlan) -> Tensor:
    """left[rows of e]^T right[rows of e], in the memory order of ``weight``."""
    if isinstance(weight, Tensor) and not by_rows(weight):
        return backend.wgrad(right, left, plan).mT
    return backend.wgrad(left, right, plan)


def replays(t: AnyTensors, spec: Spec | BackwardSpec) -> bool:
    """Whether what these steps allocate and launch is all that they do."""
    return launches_only(backend_of(t, spec if isinstance(spec, Spec) else spec.forward))


def _layout(tensor: Matrix | None) -> Any:
    """What tells kernels apart, but for the number of tokens: one is as good as another."""
    if isinstance(tensor, Tensor):
        return tensor.dtype, tensor.stride(), tensor.shape[1:]
    return None if tensor is None else tuple(part for part in tensor.parts() if not isinstance(part, Tensor))


_ahead: set[tuple[Any, ...]] = set()
config.on_change.append(_ahead.clear)


def compile_ahead(t: Tensors, spec: Spec) -> None:
    """Compile the kernels of a layer, side by side, before its first forward: those of the backward too.

    One after the other, each where it is first launched, they take several seconds of a training's first step.
    """
    needs = Needs(*(tensor is not None and tensor.requires_grad for tensor in t[:1] + t[2:]))
    layouts = [_layout(tensor) for tensor in t]
    key = (t.gate_up.shape, *layouts, needs, spec)
    if key in _ahead:
        return
    _ahead.add(key)
    began = time.perf_counter()
    with compiling_only(t.x.device) as kernels:
        out = forward(t, spec)
        if spec.needs_grad:
            backward(t.for_backward(*out), BackwardSpec(spec, needs, False))
    sizes = f"gate_up {tuple(t.gate_up.shape)}, down {tuple(t.down.shape)}"
    logger.info("compiled %d kernels for %s in %.1f s", len(kernels), sizes, time.perf_counter() - began)
