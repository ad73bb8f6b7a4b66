"""The op: a routed expert layer, forward and backward.

Letters: T tokens, K experts per token, E experts, H hidden, I intermediate, R = T*K routed rows sorted by expert.
Row r belongs to expert e(r), token t(r), slot s(r) and has routing weight w(r).

Forward                                                Backward, given dO (T, H)
0. make_plan  counting sort of topk_ids (routing.py)   4. gather, dgrad, dact  dOs = dO[t], dA0 = dOs W2[e]; from Z:
1. up         Z = X[t] W1[e]^T, A = act(Z_gate) * Z_up      A again, dw = <dA0, A>, dZ = w dA0 (act' Z_up | act), wA
2. down       Y = A W2[e]^T                             5. wgrad         dW2[e] = dOs[rows of e]^T wA[rows of e]
3. combine    O[t] = sum_k w Y[slot_row(t,k)]           6. dgrad         dXr = dZ W1[e]
                                                        7. combine_grad  dX[t] = sum_k dXr[slot_row(t,k)]
                                                        8. gather, wgrad dW1[e] = dZ[rows of e]^T X[t]

Biases are added in steps 1 and 2; their gradients are sums over each expert's rows, and dw gains <dO, b2[e]>.
A low-rank pair (LoRA) adds ``left[e] right[e]`` to a weight without forming it: every GEMM with that weight gets r
more columns of its inner dimension, and both factors' gradients are GEMMs of width r.

Saved for backward: X, Z, the plan and w (and the weights themselves). Y, A and gathered X are not saved, because
dw = <dO W2, A> does not need Y (SonicMoE, arXiv 2512.14080). All saved shapes depend on (T, K, E, H, I) alone. The
backward writes dZ over Z, unless the graph is kept for another backward.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_kernels import backends, registry
from moe_kernels.activation import Activation, Gate
from moe_kernels.kernels.launch.compile import compiling_only
from moe_kernels.kernels.launch.replay import replayed
from moe_kernels.kernels.operands import by_rows
from moe_kernels.kernels.tiles import config
from moe_kernels.memory import explains_out_of_memory
from moe_kernels.plain import batched, plain_experts, traced, transformed, without_autocast
from moe_kernels.reference import LowRankPair
from moe_kernels.routing import AUTO_GROUP_SIZE, RoutingPlan, plan_elements, resolve_group_size
from moe_kernels.settings import DEFAULT_GROUP_SIZE, GroupSize, check_settings

logger = logging.getLogger("moe_kernels")

# torch.compile would look into the files of the installed packages.
_backend_names = torch.compiler.assume_constant_result(registry.names)


def fused_experts(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor | None,
    gate_up: Tensor,
    down: Tensor,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str | Activation = "silu",
    interleaved: bool = False,
    reduce: bool = True,
    gate_up_lora: LowRankPair | None = None,
    down_lora: LowRankPair | None = None,
    recompute: bool = False,
    reload: Callable[[], tuple[Tensor, Tensor]] | None = None,
    group_size: GroupSize = DEFAULT_GROUP_SIZE,
    persistent: bool = True,
    backend: str = "auto",
) -> Tensor:
    """``out[t] = sum_k w[t,k] * (W2[e] f(W1[e] x[t] + b1[e]) + b2[e])`` with ``e = topk_ids[t,k]``.

    ``f(gate, up) = act(gate) * up`` for most models; ``f(z) = act(z)`` for experts without a gate.
    Differentiable in every floating tensor; works under autocast, ``torch.compile(fullgraph=True)``, activation
    checkpointing and no_grad, and on tensors without data. Deterministic: equal inputs give bitwise equal outputs and
    gradients. Second derivatives, forward mode and torch.func take plain steps of torch: see plain.py.

    Args:
        x: (T, H) tokens; float32, bfloat16, float16 (float64 on the torch backend). Cast to the weights' dtype.
        topk_ids: (T, K) int64 or int32. Ids outside [0, E) are dropped: exact zeros, no work.
        topk_weights: (T, K) routing weights in any of those dtypes, used in float32; None with ``reduce=False``.
        gate_up: (E, 2I, H), rows ``[gate; up]``, or (E, I, H) for experts without a gate. Every expert's matrix is
            contiguous, by rows as transformers stores it or by columns: pass weights stored (E, H, 2I) as
            ``weight.mT``. Any number of elements may lie between two experts. They are read in place, and the
            gradient has their memory order, without gaps.
        down: (E, H, I), stored by rows or by columns too; in the dtype of gate_up, or of any other than float64
            under autocast, which casts both. Gradients have the dtype of their tensor.
        gate_up_bias: (E, 2I) or (E, I).
        down_bias: (E, H).
        activation: key of :data:`moe_kernels.activation.ACTIVATIONS`, or an ``Activation`` with parameters.
        interleaved: rows of gate_up (and of its bias) are ``[g0, u0, g1, u1, ...]`` instead of ``[gate; up]``.
        reduce: False returns the output of each expert, unweighted and not summed.
        gate_up_lora: (left (E, 2I, r), right (E, r, H)): adds ``left[e] @ right[e]`` to gate_up, never formed.
        down_lora: (left (E, H, r), right (E, r, I)).
        recompute: save X but not Z, and compute Z again in the backward: less memory, one more up projection.
        reload: makes gate_up and down again, equal in all but their memory. They are then not kept for the backward,
            and must not require grad. ``torch.compile`` keeps them all the same.
        group_size: rows per tile, 64, 128, 256 or "auto".
        persistent: one program per multiprocessor walks all tiles, instead of one program per tile.
        backend: "auto", "triton", "gluon" or "torch".

    Returns:
        (T, H) in ``x.dtype``; (T, K, H) with ``reduce=False``, zeros in dropped slots.

    Raises:
        ValueError: shapes, dtypes or layouts do not fit together, or a setting is invalid.
        UnsupportedProblem: the backend cannot run it; the message names the cure.
    """
    chosen = Activation.of(activation)
    check_settings(group_size, persistent, backend, recompute, _backend_names())
    _check_inputs(x, topk_ids, topk_weights, gate_up, down, reduce)
    _check_experts(gate_up, down, gate_up_bias, down_bias, chosen, interleaved)
    _check_low_rank("gate_up", gate_up, gate_up_lora)
    _check_low_rank("down", down, down_lora)
    dtype = _compute_dtype(x, gate_up, down)
    if topk_weights is None:
        topk_weights = topk_ids.new_ones(topk_ids.shape, dtype=torch.float32)
    tensors: tuple[Any, ...] = (
        x.to(dtype).contiguous(),
        topk_ids.contiguous(),
        topk_weights.contiguous(),
        gate_up.to(dtype),
        down.to(dtype),
        *(None if bias is None else bias.to(dtype).contiguous() for bias in (gate_up_bias, down_bias)),
        *_padded(gate_up_lora, dtype),
        *_padded(down_lora, dtype),
    )
    _check_devices(tensors)
    plain = transformed(tensors)
    if not plain:
        _check_layouts(gate_up, down)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    args: tuple[Any, ...] = (
        *tensors,
        chosen.name,
        list(chosen.parameters),
        interleaved,
        reduce,
        recompute,
        AUTO_GROUP_SIZE if group_size == "auto" else group_size,
        persistent,
        backend,
        needs_grad,
    )
    if plain:
        backends.count_dispatch("torch", why="torch.func or forward mode asked for derivatives that no kernel has")
        out = plain_experts(*args)
    elif torch.compiler.is_compiling() or traced(tensors[0]):
        out = torch.ops.moe_kernels.experts_forward(*args)[0]
    elif needs_grad:
        out = _Experts.apply(*args, reload)
    else:
        out = _forward(*args)[0]
    return (out if reduce else out.view(*topk_ids.shape, down.shape[1])).to(x.dtype)


def _compute_dtype(x: Tensor, gate_up: Tensor, down: Tensor) -> torch.dtype:
    """What the layer runs in: the weights' dtype, or autocast's. Autocast leaves float64 alone, and meta tensors."""
    device, dtype = x.device.type, gate_up.dtype
    if device != "meta" and torch.is_autocast_enabled(device) and torch.float64 not in (dtype, down.dtype):
        return torch.get_autocast_dtype(device)
    if dtype != down.dtype:
        raise ValueError(f"gate_up is {dtype} but down is {down.dtype}: cast one of them, or use torch.autocast")
    return dtype


def check_weights(
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: Activation,
    interleaved: bool,
    device: torch.device,
) -> None:
    """Raise what :func:`fused_experts` would on ``device`` of these weights, whatever the tokens are.

    The weights can be on ``meta``: their data is not looked at.
    """
    x = torch.empty(0, gate_up.shape[-1], dtype=torch.float32, device=device)
    _check_inputs(x, torch.empty(0, 1, dtype=torch.int64, device=device), None, gate_up, down, reduce=False)
    _check_experts(gate_up, down, gate_up_bias, down_bias, activation, interleaved)
    _check_layouts(gate_up, down)
    _compute_dtype(x, gate_up, down)


def _padded(pair: LowRankPair | None, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """The low-rank pair in ``dtype``, its rank padded with zeros to a power of two of at least 16 (a tile's)."""
    if pair is None:
        return None, None
    left, right = pair
    missing = max(16, 1 << (left.shape[2] - 1).bit_length()) - left.shape[2]
    left, right = left.to(dtype), right.to(dtype)
    if missing:
        left = torch.nn.functional.pad(left, (0, missing))
        right = torch.nn.functional.pad(right, (0, 0, 0, missing))
    return left.contiguous(), right.contiguous()


def _check_inputs(
    x: Tensor, topk_ids: Tensor, topk_weights: Tensor | None, gate_up: Tensor, down: Tensor, reduce: bool
) -> None:
    if x.dim() != 2 or gate_up.dim() != 3 or down.dim() != 3:
        raise ValueError(
            "fused_experts wants x (T, H), gate_up (E, 2I, H) or (E, I, H), down (E, H, I); "
            f"got {tuple(x.shape)}, {tuple(gate_up.shape)}, {tuple(down.shape)}"
        )
    experts, rows, hidden = gate_up.shape
    intermediate = down.shape[2]
    if x.shape[1] != hidden or down.shape[:2] != (experts, hidden) or rows not in (intermediate, 2 * intermediate):
        raise ValueError(
            f"sizes disagree: x {tuple(x.shape)}, gate_up {tuple(gate_up.shape)}, down {tuple(down.shape)}; "
            "want (T, H), (E, 2I, H) or (E, I, H), (E, H, I)"
        )
    if reduce != (topk_weights is not None):
        raise ValueError("topk_weights belong to the sum: pass them with reduce=True, and None with reduce=False")
    if topk_ids.dim() != 2 or topk_ids.shape[0] != x.shape[0]:
        raise ValueError(f"topk_ids {tuple(topk_ids.shape)} must be (T, K) with T={x.shape[0]}")
    if experts == 0 or topk_ids.shape[1] == 0:
        raise ValueError(f"there is nothing to route to: {experts} experts, topk_ids {tuple(topk_ids.shape)}")
    if topk_weights is not None and topk_ids.shape != topk_weights.shape:
        raise ValueError(
            f"topk_ids {tuple(topk_ids.shape)} and topk_weights {tuple(topk_weights.shape)} must both be "
            f"(T, K) with T={x.shape[0]}"
        )
    if topk_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"topk_ids must be int64 or int32, not {topk_ids.dtype}")
    for name, tensor in (("x", x), ("topk_weights", topk_weights), ("gate_up", gate_up), ("down", down)):
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name} must be a floating dtype, not {tensor.dtype}")


def _check_devices(tensors: tuple[Tensor | None, ...]) -> None:
    device = tensors[3].device  # type: ignore[union-attr]
    for tensor in tensors:
        if tensor is not None and tensor.device != device:
            raise ValueError(f"the expert weights are on {device}, another tensor on {tensor.device}: move it there")


def _check_experts(
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: Activation,
    interleaved: bool,
) -> None:
    for name, bias, wanted in (
        ("gate_up_bias", gate_up_bias, gate_up.shape[:2]),
        ("down_bias", down_bias, down.shape[:2]),
    ):
        if bias is not None and bias.shape != wanted:
            raise ValueError(f"{name} is {tuple(bias.shape)}, want {tuple(wanted)}")
    if gate_up.shape[1] == down.shape[2] and (interleaved or activation.parameters):
        raise ValueError(
            f"experts without a gate (gate_up {tuple(gate_up.shape)}, down {tuple(down.shape)}) take "
            f"interleaved=False and a plain activation, not {activation.name!r}"
        )


def _check_layouts(gate_up: Tensor, down: Tensor) -> None:
    for name, tensor in (("gate_up", gate_up), ("down", down)):
        if not (by_rows(tensor) or by_rows(tensor.mT)):
            raise ValueError(
                f"each expert's matrix of {name} must be contiguous, by rows or by columns, got strides "
                f"{tuple(tensor.stride())}: store it contiguous once, before training"
            )


def _check_low_rank(name: str, weight: Tensor, pair: LowRankPair | None) -> None:
    if pair is None:
        return
    (experts, rows, cols), (left, right) = weight.shape, pair
    rank = left.shape[-1] if left.dim() == 3 else 0
    if left.shape != (experts, rows, rank) or right.shape != (experts, rank, cols) or not 1 <= rank <= 128:
        raise ValueError(
            f"{name}_lora is {tuple(left.shape)}, {tuple(right.shape)}; want ({experts}, {rows}, r), "
            f"({experts}, r, {cols}) with r from 1 to 128"
        )


@explains_out_of_memory("forward pass")
def _forward_steps(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    gate_up_left: Tensor | None,
    gate_up_right: Tensor | None,
    down_left: Tensor | None,
    down_right: Tensor | None,
    activation: str,
    parameters: list[float],
    interleaved: bool,
    reduce: bool,
    recompute: bool,
    group_size: int,
    persistent: bool,
    backend: str,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Steps 0 to 3: out (T, H) or (R, H), Z (R, 2I) or empty, X right^T (R, r) or empty, and the packed plan."""
    (tokens, top_k), experts = topk_ids.shape, gate_up.shape[0]
    group_size = resolve_group_size(group_size, tokens * top_k, experts)
    steps = _steps(down, top_k, activation, group_size, persistent, backend)
    backends.count_dispatch(steps.NAME)
    gate = _gate(gate_up, down, activation, parameters, interleaved)

    plan = steps.make_plan(topk_ids, experts, group_size)
    x_low, a_low = x.new_empty(0), None
    if gate_up_right is not None:
        x_low = steps.up_low(x, gate_up_right, plan, persistent)
    save_z = needs_grad and not recompute
    z, a = steps.up(x, gate_up, plan, gate, persistent, save_z, gate_up_bias, _pair(x_low, gate_up_left))
    if down_right is not None:
        a_low = steps.down(a, down_right, plan, persistent)
    y = steps.down(a, down, plan, persistent, down_bias, _pair(a_low, down_left))
    del a
    out = steps.combine(y, *_summed(topk_weights, plan, reduce))
    return out, z, x_low, plan.packed


def _gate(gate_up: Tensor, down: Tensor, activation: str, parameters: list[float], interleaved: bool) -> Gate:
    return Gate(Activation(activation, tuple(parameters)), gate_up.shape[1] != down.shape[2], interleaved)


def _pair(low: Tensor | None, factor: Tensor | None) -> LowRankPair | None:
    return None if low is None or factor is None else (low, factor)


def _summed(topk_weights: Tensor, plan: RoutingPlan, reduce: bool) -> tuple[Tensor, RoutingPlan]:
    """Routing weights and plan of the output side: without the sum every slot is a token of its own, K = 1."""
    return (topk_weights, plan) if reduce else (topk_weights.view(-1, 1), dataclasses.replace(plan, top_k=1))


def _forward_fake(
    x: Tensor, topk_ids: Tensor, topk_weights: Tensor, gate_up: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gate_up_right, reduce, recompute, needs_grad = rest[4], rest[10], rest[11], rest[-1]
    rows = topk_ids.shape[0] * topk_ids.shape[1]
    out = torch.empty_like(x) if reduce else x.new_empty(rows, x.shape[1])
    z = x.new_empty(rows, gate_up.shape[1]) if needs_grad and not recompute else x.new_empty(0)
    x_low = x.new_empty(0) if gate_up_right is None else x.new_empty(rows, gate_up_right.shape[1])
    plan = topk_ids.new_empty(plan_elements(rows, gate_up.shape[0]), dtype=torch.int32)
    return out, z, x_low, plan


@explains_out_of_memory("backward pass")
def _backward_steps(
    dout: Tensor,
    x: Tensor,
    topk_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    gate_up_left: Tensor | None,
    gate_up_right: Tensor | None,
    down_left: Tensor | None,
    down_right: Tensor | None,
    z: Tensor,
    x_low: Tensor,
    packed_plan: Tensor,
    activation: str,
    parameters: list[float],
    interleaved: bool,
    reduce: bool,
    recompute: bool,
    group_size: int,
    persistent: bool,
    backend: str,
    needs: list[bool],
    overwrite_z: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Steps 4 to 8: gradients of the ten floating inputs; those not in ``needs`` are empty and cost nothing."""
    (tokens, top_k), experts = topk_weights.shape, gate_up.shape[0]
    group_size = resolve_group_size(group_size, tokens * top_k, experts)
    steps = _steps(down, top_k, activation, group_size, persistent, backend)
    plan = RoutingPlan.from_packed(packed_plan, tokens, top_k, experts, group_size)
    gate = _gate(gate_up, down, activation, parameters, interleaved)
    need = dict(zip(_DIFFERENTIABLE, needs, strict=True))
    grads = {name: x.new_empty(0) for name, needed in need.items() if not needed}

    if recompute:
        z, _ = steps.up(x, gate_up, plan, gate, persistent, True, gate_up_bias, _pair(x_low, gate_up_left))
    plain = down_bias is None and down_left is None
    dout_rows = steps.dout_rows(dout.contiguous(), down, _summed(topk_weights, plan, reduce)[1], gate, plain)
    dout_low = None if down_left is None else steps.dgrad(dout_rows, down_left, plan, persistent)
    overwrite_z = overwrite_z or recompute
    dz, wa, dw = steps.down_grad(
        dout_rows, down, z, topk_weights, plan, gate, persistent, overwrite_z, down_bias, _pair(dout_low, down_right)
    )
    if need["topk_weights"]:
        grads["topk_weights"] = dw
    if need["down"]:
        grads["down"] = _weight_grad(steps, down, dout_rows, wa, plan)
    if need["down_bias"]:
        grads["down_bias"] = steps.expert_sum(dout_rows, plan, topk_weights)
    if need["down_left"]:
        grads["down_left"] = steps.wgrad(dout_rows, steps.down(wa, down_right, plan, persistent), plan)
    if need["down_right"]:
        grads["down_right"] = steps.wgrad(dout_low, wa, plan)
    del dout_rows, wa  # their memory serves dXr and the gathered X

    dz_low = None if gate_up_left is None else steps.dgrad(dz, gate_up_left, plan, persistent)
    if need["x"]:
        dxr = steps.dgrad(dz, gate_up, plan, persistent, _pair(dz_low, gate_up_right))
        grads["x"] = steps.combine_grad(dxr, plan)
        del dxr
    if need["gate_up_bias"]:
        grads["gate_up_bias"] = steps.expert_sum(dz, plan)
    if need["gate_up_left"]:
        grads["gate_up_left"] = steps.wgrad(dz, x_low, plan)
    if need["gate_up"] or need["gate_up_right"]:
        x_rows = steps.gather(x, plan)
        if need["gate_up"]:
            grads["gate_up"] = _weight_grad(steps, gate_up, dz, x_rows, plan)
        if need["gate_up_right"]:
            grads["gate_up_right"] = steps.wgrad(dz_low, x_rows, plan)
    dx, d_weights, *others = (grads[name] for name in _DIFFERENTIABLE)
    return (dx, d_weights, *others)  # type: ignore[return-value]


# The floating inputs, in the order of the arguments.
_DIFFERENTIABLE = (
    "x",
    "topk_weights",
    "gate_up",
    "down",
    "gate_up_bias",
    "down_bias",
    "gate_up_left",
    "gate_up_right",
    "down_left",
    "down_right",
)


def _weight_grad(steps: Any, weight: Tensor, left: Tensor, right: Tensor, plan: RoutingPlan) -> Tensor:
    """left[rows of e]^T right[rows of e], in the memory order of ``weight``."""
    if by_rows(weight):
        return steps.wgrad(left, right, plan)
    return steps.wgrad(right, left, plan).mT


def _backward_fake(dout: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    pairs = zip(rest[:10], rest[-2], strict=True)
    return tuple(_grad_of(tensor) if needed else dout.new_empty(0) for tensor, needed in pairs)


def _grad_of(tensor: Tensor) -> Tensor:
    """Room for the gradient: in the memory order of ``tensor``, without its gaps."""
    if tensor.dim() == 3 and not by_rows(tensor):
        return _grad_of(tensor.mT).mT
    return tensor.new_empty(tensor.shape)


def _save(ctx: Any, inputs: Sequence[Any], z: Tensor, x_low: Tensor, packed_plan: Tensor) -> None:
    x, _, *tensors = inputs[:11]
    *ctx.settings, _needs_grad = inputs[11:]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, *tensors, z, x_low, packed_plan)


def _grads(
    ctx: Any, dout: Tensor | None, steps: Any, overwrite_z: bool, reload: Callable[[], tuple[Tensor, Tensor]] | None
) -> tuple[Tensor | None, ...]:
    """Gradients of the inputs; ``steps`` is the backward, as a function or as an op."""
    if dout is None:
        return (None,) * 20
    saved = ctx.saved_tensors
    if reload is not None:
        saved = (*saved[:2], *(weight.to(saved[0].dtype) for weight in reload()), *saved[4:])
    x_needed, _, *rest = ctx.needs_input_grad[:11]
    needs = [x_needed, *rest]
    if torch.is_grad_enabled() or batched(dout):  # create_graph=True, or several backwards at a time
        grads = _plain_grads(dout, *saved, *ctx.settings, needs)
    else:
        grads = steps(dout, *saved, *ctx.settings, needs, overwrite_z)
    dx, *others = (grad if needed else None for grad, needed in zip(grads, needs, strict=True))
    return (dx, None, *others, *(None,) * 9)


def _plain_grads(dout: Tensor, *arguments: Any) -> list[Any]:
    """What the backward steps give, as a graph that autograd can differentiate again."""
    tensors, (_, _, packed_plan), (*settings, needs) = arguments[:10], arguments[10:13], arguments[13:]
    topk_ids = _topk_ids(packed_plan, tensors[1], tensors[2], settings[5])
    again = torch.is_grad_enabled()
    with torch.enable_grad(), without_autocast(dout.device.type):
        # Views, as one tensor may be made of another (routing weights of x): each is to get its own share alone.
        own: list[Any] = [None if t is None else t.view_as(t) for t in tensors]
        wanted = [tensor for tensor, needed in zip(own, needs, strict=True) if needed]
        out = plain_experts(own[0], topk_ids, *own[1:], *settings)
        found = torch.autograd.grad(out, wanted, dout, create_graph=again, allow_unused=True, materialize_grads=True)
    remaining = iter(found)
    return [next(remaining) if needed else None for needed in needs]


def _topk_ids(packed_plan: Tensor, topk_weights: Tensor, gate_up: Tensor, group_size: int) -> Tensor:
    """(T, K) experts of the slots of a plan, E where a slot was dropped."""
    (tokens, top_k), experts = topk_weights.shape, gate_up.shape[0]
    group_size = resolve_group_size(group_size, tokens * top_k, experts)
    plan = RoutingPlan.from_packed(packed_plan, tokens, top_k, experts, group_size)
    return torch.bucketize(plan.slot_row, plan.expert_start[1:], right=True).view(tokens, top_k)


def _counter(x: Tensor, topk_ids: Tensor, *rest: Any) -> Callable[[], None]:
    """What a replayed forward must do besides its launches: count the dispatch."""
    return functools.partial(backends.count_dispatch, _backend(topk_ids, *rest))


def _backend(topk_ids: Tensor, *rest: Any) -> str:
    """The backend of a forward with these arguments."""
    down, (activation, *_), (group_size, persistent, backend, _) = rest[2], rest[9:], rest[-4:]
    group_size = resolve_group_size(group_size, topk_ids.numel(), down.shape[0])
    name: str = _steps(down, topk_ids.shape[1], activation, group_size, persistent, backend).NAME
    return name


_compiled: set[tuple[Any, ...]] = set()
config.on_change.append(_compiled.clear)


def _compile(*inputs: Any) -> None:
    """Compile the kernels of a layer, side by side, before its first forward: those of the backward too.

    One after the other, each where it is first launched, they take several seconds of a training's first step.
    """
    tensors, settings = inputs[:11], inputs[11:]
    needs = [tensor is not None and tensor.requires_grad for tensor in (tensors[0], *tensors[2:])]
    # What tells kernels apart, but for the number of tokens: one is as good as another.
    layouts = [None if t is None else (t.dtype, t.stride(), t.shape[1:]) for t in tensors]
    plain = (tuple(value) if isinstance(value, list) else value for value in settings)
    key = (tensors[3].shape, *layouts, *needs, *plain)
    if key in _compiled or not backends.load(backend := _backend(*inputs[1:])).COMPILES:
        return
    _compiled.add(key)
    began = time.perf_counter()
    with compiling_only(tensors[0].device) as kernels:
        out, *saved = inspect.unwrap(_forward_steps)(*inputs)
        if settings[-1]:
            x, _, *others = tensors
            inspect.unwrap(_backward_steps)(out, x, *others, *saved, *settings[:-1], needs, False)
    backends.count_dispatch(backend, -1)  # nothing ran
    sizes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in (("gate_up", tensors[3]), ("down", tensors[4])))
    logger.info("compiled %d kernels for %s in %.1f s", len(kernels), sizes, time.perf_counter() - began)


# The eager path replays steps of known sizes.
_forward = explains_out_of_memory("forward pass")(replayed(inspect.unwrap(_forward_steps), _counter, _compile))
_backward = explains_out_of_memory("backward pass")(replayed(inspect.unwrap(_backward_steps)))


class _Experts(torch.autograd.Function):
    """The eager path: a custom op costs some tenths of a millisecond more host time a call (torch 2.11)."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *inputs, ctx.reload = args
        out, z, x_low, packed_plan = _forward(*inputs)
        if ctx.reload is not None:
            inputs[3:5] = None, None
        _save(ctx, inputs, z, x_low, packed_plan)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None) -> tuple[Tensor | None, ...]:
        # Z dies with the graph. torch's own donated buffers ask the same question in the same way.
        keep_graph = torch._C._autograd._get_current_graph_task_keep_graph()
        return *_grads(ctx, dout, _backward, not keep_graph, ctx.reload), None


# The compiled path: the same steps as two ops that torch.compile need not look into.
experts_forward = torch.library.custom_op("moe_kernels::experts_forward", _forward_steps, mutates_args=())
experts_forward.register_fake(_forward_fake)
experts_backward = torch.library.custom_op("moe_kernels::experts_backward", _backward_steps, mutates_args=())
experts_backward.register_fake(_backward_fake)
experts_forward.register_autograd(
    lambda ctx, dout, *_: _grads(ctx, dout, torch.ops.moe_kernels.experts_backward, False, None),
    setup_context=lambda ctx, inputs, output: _save(ctx, inputs, *output[1:]),
)


def _steps(down: Tensor, top_k: int, activation: str, group_size: int, persistent: bool, backend: str) -> Any:
    """The module that implements the steps for this problem."""
    problem = backends.Problem.of(down, top_k, activation, group_size, persistent)
    return backends.load(backends.select(problem, backend)[0])
