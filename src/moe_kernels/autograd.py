"""What autograd and torch.compile need of the layer: saved tensors, gradients, and the steps as two custom ops.

The ops, which torch.compile does not look into, are the only place where a call is a flat list of arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_kernels import backends, steps
from moe_kernels.checkpointing import keeps, saves_through_hooks, selective_modes, unseen
from moe_kernels.factors import factor_room, padded_rank
from moe_kernels.kernels.launch.replay import replayed
from moe_kernels.kernels.operands import by_rows
from moe_kernels.layer import BackwardSpec, BackwardTensors, Grads, Needs, SecondHalfTensors, Spec, Tensors
from moe_kernels.memory import explains_out_of_memory
from moe_kernels.ops import custom_ops
from moe_kernels.packed import PackedWeight
from moe_kernels.plain import batched, plain_grads, traced
from moe_kernels.routing import plan_elements

# Steps of known sizes are replayed.
_run_forward = explains_out_of_memory("forward pass")(
    replayed(steps.forward, steps.replays, first=steps.compile_ahead)
)
_run_backward = explains_out_of_memory("backward pass")(replayed(steps.backward, steps.replays))
_run_first_half = replayed(steps.first_half, steps.replays, first=steps.compile_ahead)
_run_second_half = replayed(steps.second_half, steps.replays)


def save(ctx: Any, tensors: Tensors, spec: Spec, made: Sequence[Tensor]) -> None:
    """Keep for the backward what it takes besides dO; ``made`` are Z, x_low, a_low and the packed plan."""
    ctx.spec = spec
    weights = {"gate_up": tensors.gate_up, "down": tensors.down}
    packed = {name: weight for name, weight in weights.items() if isinstance(weight, PackedWeight)}
    ctx.packed = {name: (weight, weight.versions()) for name, weight in packed.items()}
    if ctx.packed:
        tensors = tensors._replace(**dict.fromkeys(ctx.packed))  # type: ignore[arg-type]
    ctx.set_materialize_grads(False)
    _, *saved = tensors.for_backward(tensors.x, *made)  # in the place of dO
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
        t = t._replace(**{name: weight.unwritten(versions) for name, (weight, versions) in ctx.packed.items()})
    x_needed, _, *others = ctx.needs_input_grad[: len(Tensors._fields)]
    spec = BackwardSpec(ctx.spec, Needs(x_needed, *others), overwrite_z)
    if torch.is_grad_enabled() or batched(dout):  # create_graph=True, or several backwards at a time
        dx, *rest = plain_grads(t, spec)
    else:
        dx, *rest = backward(t, spec)
    return dx, None, *rest


# ------------------------------------------------------------------------------------------------ eager Functions
class _Experts(torch.autograd.Function):
    """The layer: a custom op costs some tenths of a millisecond more host time a call (torch 2.11)."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *flat, spec = args
        tensors = Tensors(*flat)
        out, *made = _run_forward(tensors, spec)
        save(ctx, tensors, spec, made)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        return *grads_of_inputs(ctx, dout, _run_backward, not _keeps_graph()), None


def _keeps_graph() -> bool:
    """Whether another backward may follow, else Z dies with the graph; torch's own donated buffers ask like this."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


class _FirstHalf(torch.autograd.Function):
    """All that the backward needs, and the whole backward. ``out`` has shape and gradient alone: one element."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        *flat, spec = args
        tensors = Tensors(*flat)
        a, *made = _run_first_half(tensors, spec)
        save(ctx, tensors, spec, made)
        _, _, a_low, packed_plan = made
        ctx.mark_non_differentiable(a, a_low, packed_plan)
        rows = tensors.x.shape[0] if spec.reduce else tensors.topk_ids.numel()
        return tensors.x.new_empty(()).expand(rows, tensors.x.shape[1]), a, a_low, packed_plan

    backward = staticmethod(_Experts.backward)


class _SecondHalf(torch.autograd.Function):
    """The values of ``out``. Nothing is saved; dO goes to the first half as it is."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, tensors: SecondHalfTensors, spec: Spec) -> Tensor:
        return _run_second_half(tensors, spec).out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None]:
        return dout, None, None


@explains_out_of_memory("forward pass")
def _in_halves(tensors: Tensors, spec: Spec) -> Tensor:
    """out (T, H), or (R, H) by slot, by two Functions, of which the first saves: after it nothing is computed again.

    Checkpointing with ``use_reentrant=False`` stops at the last tensor that a region saves.
    """
    out, a, a_low, packed_plan = _FirstHalf.apply(*tensors, spec)
    values: Tensor = _SecondHalf.apply(out, tensors.for_second_half(a, a_low, packed_plan), spec)
    return values


def eager_experts(tensors: Tensors, spec: Spec) -> Tensor:
    """out (T, H), or (R, H) by slot; by the custom op where selective checkpointing keeps what that returns."""
    modes = selective_modes()
    if not modes:
        return _eager(tensors, spec)
    packed = isinstance(tensors.gate_up, PackedWeight) or isinstance(tensors.down, PackedWeight)
    if spec.needs_grad and not packed and keeps(modes, forward_op, (*tensors, *_flat(spec))):
        return experts_op(tensors, spec)
    with unseen():
        return _eager(tensors, spec)


def _eager(tensors: Tensors, spec: Spec) -> Tensor:
    backends.count_dispatch(backends.backend_of(tensors, spec).name)
    if not spec.needs_grad:
        return _run_forward(tensors, spec).out
    out: Tensor = _in_halves(tensors, spec) if saves_through_hooks() else _Experts.apply(*tensors, spec)
    return out


# ---------------------------------------------------------------------------------------------------- custom ops
_SETTINGS = (
    "str activation, float[] parameters, bool interleaved, bool reduce, bool recompute, int group_size, "
    "bool persistent, str backend, float gate_up_scaling, float down_scaling"
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
    # An op's outputs are its own in every call: replays share what has no elements.
    return steps.Forward(*(out if out.numel() else torch.empty_like(out) for out in _run_forward(tensors, spec)))


def _fake_forward(*flat: Any) -> steps.Forward:
    t, spec = _call(flat)
    rows = t.topk_ids.shape[0] * t.topk_ids.shape[1]
    out = torch.empty_like(t.x) if spec.reduce else t.x.new_empty(rows, t.x.shape[1])
    z = t.x.new_empty(rows, t.gate_up.shape[1]) if spec.needs_grad and not spec.recompute else t.x.new_empty(0)
    x_low, a_low = (
        t.x.new_empty(0) if lora_a is None else t.x.new_empty(rows, padded_rank(lora_a.shape[1]))
        for lora_a in (t.gate_up_lora_a, t.down_lora_a)
    )
    plan = t.topk_ids.new_empty(plan_elements(rows, t.gate_up.shape[0]), dtype=torch.int32)
    return steps.Forward(out, z, x_low, a_low, plan)


def _backward(*flat: Any) -> tuple[Tensor, ...]:
    t, spec = _backward_call(flat)
    grads = _run_backward(t, spec)
    return tuple(t.x.new_empty(0) if grad is None else grad for grad in grads)


def _fake_backward(*flat: Any) -> tuple[Tensor, ...]:
    t, spec = _backward_call(flat)
    needs = spec.needs._asdict().items()
    rooms = {name: factor_room if "_lora_" in name else _room for name, _ in needs}
    return tuple(rooms[name](getattr(t, name)) if needed else t.dout.new_empty(0) for name, needed in needs)


def _room(tensor: Tensor) -> Tensor:
    """Room for the gradient: in the memory order of ``tensor``, without its gaps."""
    if tensor.dim() == 3 and not by_rows(tensor):
        return _room(tensor.mT).mT
    return tensor.new_empty(tensor.shape)


def _backward_op(t: BackwardTensors, spec: BackwardSpec) -> Grads:
    flat = (*t, *_flat(spec.forward)[:-1], list(spec.needs), spec.overwrite_z)
    grads = backward_op(*flat)
    return Grads(*(grad if needed else None for grad, needed in zip(grads, spec.needs, strict=True)))


def _grads(ctx: Any, dout: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    """Z is an output of the op, and not to be overwritten. In eager mode nobody has to see an op."""
    unseen = not torch.compiler.is_compiling() and dout is not None and not traced(dout)
    return *grads_of_inputs(ctx, dout, _run_backward if unseen else _backward_op, False), *[None] * len(Spec._fields)


_forward_op, _backward_def = custom_ops(
    experts_forward=(_forward, _FORWARD), experts_backward=(_backward, _BACKWARD)
)
#: The ops as overloads, which torch.compile takes into its graph.
forward_op, backward_op = _forward_op._opoverload, _backward_def._opoverload
_forward_op.register_fake(_fake_forward)
_backward_def.register_fake(_fake_backward)
_forward_op.register_autograd(
    _grads,
    setup_context=lambda ctx, inputs, output: save(ctx, *_call(inputs), output[1:]),
)
