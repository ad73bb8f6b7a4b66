"""What autograd and torch.compile need of the layer: saved tensors, gradients, and the steps as two custom ops.

The ops, which torch.compile does not look into, are the only place where a call is a flat list of arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_kernels import backends, steps
from moe_kernels.kernels.operands import by_rows
from moe_kernels.layer import BackwardSpec, BackwardTensors, Grads, Needs, Spec, Tensors
from moe_kernels.memory import explains_out_of_memory
from moe_kernels.ops import custom_ops
from moe_kernels.packed import PackedWeight
from moe_kernels.plain import batched, plain_grads
from moe_kernels.routing import plan_elements


def save(ctx: Any, tensors: Tensors, spec: Spec, out: steps.Forward) -> None:
    """Keep for the backward what it takes besides dO."""
    ctx.spec = spec
    weights = {"gate_up": tensors.gate_up, "down": tensors.down}
    ctx.packed = {name: weight for name, weight in weights.items() if isinstance(weight, PackedWeight)}
    if ctx.packed:
        tensors = tensors._replace(**dict.fromkeys(ctx.packed))  # type: ignore[arg-type]
    ctx.set_materialize_grads(False)
    _, *saved = tensors.for_backward(*out)
    ctx.save_for_backward(*saved)


def grads_of_inputs(
    ctx: Any,
    dout: Tensor | None,
    backward: Callable[[BackwardTensors, BackwardSpec], Grads],
    overwrite_z: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of a call's tensors, in their order."""
    if dout is None:
        return (None,) * len(Tensors._fields)
    t = BackwardTensors(dout, *ctx.saved_tensors)
    if ctx.packed:
        t = t._replace(**ctx.packed)
    x_needed, _, *others = ctx.needs_input_grad[: len(Tensors._fields)]
    spec = BackwardSpec(ctx.spec, Needs(x_needed, *others), overwrite_z)
    if torch.is_grad_enabled() or batched(dout):  # create_graph=True, or several backwards at a time
        dx, *rest = plain_grads(t, spec)
    else:
        dx, *rest = backward(t, spec)
    return dx, None, *rest


# ---------------------------------------------------------------------------------------------------- custom ops
_SETTINGS = (
    "str activation, float[] parameters, bool interleaved, bool reduce, bool recompute, int group_size, "
    "bool persistent, str backend"
)


_OPTIONAL = [name for name in Grads._fields if name.endswith(("_bias", "_lora_a", "_lora_b"))]


def _arguments(names: tuple[str, ...]) -> str:
    return ", ".join(f"Tensor{'?' if name in _OPTIONAL else ''} {name}" for name in names)


def _tensors(results: type[steps.Forward] | type[Grads]) -> str:
    return ", ".join("Tensor" for _ in results._fields)


_FORWARD = f"({_arguments(Tensors._fields)}, {_SETTINGS}, bool needs_grad) -> ({_tensors(steps.Forward)})"
_BACKWARD = (
    f"({_arguments(BackwardTensors._fields)}, {_SETTINGS}, bool[] needs, bool overwrite_z) -> ({_tensors(Grads)})"
)


def experts_op(tensors: Tensors, spec: Spec) -> Tensor:
    """out (T, H), or (R, H) by slot, by the custom op."""
    out: Tensor = forward_op(*tensors, *_flat(spec))[0]
    return out


def _flat(spec: Spec) -> tuple[Any, ...]:
    return spec.activation, list(spec.parameters), *spec[2:]


def _call(flat: tuple[Any, ...]) -> tuple[Tensors, Spec]:
    tensors, (activation, parameters, *others) = flat[: len(Tensors._fields)], flat[len(Tensors._fields) :]
    return Tensors(*tensors), Spec(activation, tuple(parameters), *others)


def _backward_call(flat: tuple[Any, ...]) -> tuple[BackwardTensors, BackwardSpec]:
    count = len(BackwardTensors._fields)
    tensors, (activation, parameters, *others, needs, overwrite_z) = flat[:count], flat[count:]
    spec = Spec(activation, tuple(parameters), *(*others, True))
    return BackwardTensors(*tensors), BackwardSpec(spec, Needs(*needs), overwrite_z)


def _forward(*flat: Any) -> steps.Forward:
    tensors, spec = _call(flat)
    backends.count_dispatch(backends.backend_of(tensors, spec).name)
    return explains_out_of_memory("forward pass")(steps.forward)(tensors, spec)


def _fake_forward(*flat: Any) -> steps.Forward:
    t, spec = _call(flat)
    rows = t.topk_ids.shape[0] * t.topk_ids.shape[1]
    out = torch.empty_like(t.x) if spec.reduce else t.x.new_empty(rows, t.x.shape[1])
    z = t.x.new_empty(rows, t.gate_up.shape[1]) if spec.needs_grad and not spec.recompute else t.x.new_empty(0)
    x_low, a_low = (
        t.x.new_empty(0) if lora_a is None else t.x.new_empty(rows, lora_a.shape[1])
        for lora_a in (t.gate_up_lora_a, t.down_lora_a)
    )
    plan = t.topk_ids.new_empty(plan_elements(rows, t.gate_up.shape[0]), dtype=torch.int32)
    return steps.Forward(out, z, x_low, a_low, plan)


def _backward(*flat: Any) -> tuple[Tensor, ...]:
    t, spec = _backward_call(flat)
    grads = explains_out_of_memory("backward pass")(steps.backward)(t, spec)
    return tuple(t.x.new_empty(0) if grad is None else grad for grad in grads)


def _fake_backward(*flat: Any) -> tuple[Tensor, ...]:
    t, spec = _backward_call(flat)
    needs = spec.needs._asdict().items()
    return tuple(_room(getattr(t, name)) if needed else t.dout.new_empty(0) for name, needed in needs)


def _room(tensor: Tensor) -> Tensor:
    """Room for the gradient: in the memory order of ``tensor``, without its gaps."""
    if tensor.dim() == 3 and not by_rows(tensor):
        return _room(tensor.mT).mT
    return tensor.new_empty(tensor.shape)


def _backward_op(t: BackwardTensors, spec: BackwardSpec) -> Grads:
    flat = (*t, *_flat(spec.forward)[:-1], list(spec.needs), spec.overwrite_z)
    grads = backward_op(*flat)
    return Grads(*(grad if needed else None for grad, needed in zip(grads, spec.needs, strict=True)))


_forward_op, _backward_def = custom_ops(
    experts_forward=(_forward, _FORWARD), experts_backward=(_backward, _BACKWARD)
)
#: The ops as overloads, which torch.compile takes into its graph.
forward_op, backward_op = _forward_op._opoverload, _backward_def._opoverload
_forward_op.register_fake(_fake_forward)
_backward_def.register_fake(_fake_backward)
_forward_op.register_autograd(
    lambda ctx, dout, *_: (*grads_of_inputs(ctx, dout, _backward_op, False), *[None] * len(Spec._fields)),
    setup_context=lambda ctx, inputs, output: save(ctx, *_call(inputs), steps.Forward(*output)),
)
