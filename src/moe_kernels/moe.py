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

Saved for backward: X, Z, the plan and w (and the weights themselves). Y, A and gathered X are not saved, because
dw = <dO W2, A> does not need Y (SonicMoE, arXiv 2512.14080). All saved shapes depend on (T, K, E, H, I) alone.
"""

from __future__ import annotations

from typing import Any

import torch

from moe_kernels import backends
from moe_kernels.routing import AUTO_GROUP_SIZE, RoutingPlan, plan_elements, resolve_group_size
from moe_kernels.settings import GroupSize, check_settings


def fused_experts(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    *,
    activation: str = "silu",
    group_size: GroupSize = 128,
    persistent: bool = True,
    backend: str = "auto",
) -> torch.Tensor:
    """``out[t] = sum_k w[t,k] * W2[e] (act(W1_gate[e] x[t]) * (W1_up[e] x[t]))`` with ``e = topk_ids[t,k]``.

    Differentiable in x, topk_weights, gate_up and down; works under autocast, ``torch.compile(fullgraph=True)``,
    activation checkpointing and no_grad. Deterministic: equal inputs give bitwise equal outputs and gradients.

    Args:
        x: (T, H) tokens; float32, bfloat16, float16 (float64 on the torch backend). Cast to the weights' dtype.
        topk_ids: (T, K) int64 or int32. Ids outside [0, E) are dropped: exact zeros, no work.
        topk_weights: (T, K) routing weights in any of those dtypes; used in float32.
        gate_up: (E, 2I, H) contiguous, rows ``[gate; up]``, the layout of transformers' ``gate_up_proj``.
        down: (E, H, I) contiguous, the layout of transformers' ``down_proj``.
        activation: key of :data:`moe_kernels.activation.ACTIVATIONS`.
        group_size: rows per tile, 64, 128, 256 or "auto".
        persistent: one program per multiprocessor walks all tiles, instead of one program per tile.
        backend: "auto", "triton" or "torch".

    Returns:
        (T, H) in ``x.dtype``.

    Raises:
        ValueError: shapes, dtypes or layouts do not fit together, or a setting is invalid.
        UnsupportedProblem: the backend cannot run it; the message names the cure.
    """
    check_settings(activation, group_size, persistent, backend)
    _check_inputs(x, topk_ids, topk_weights, gate_up, down)
    dtype = gate_up.dtype
    if torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
    needs_grad = torch.is_grad_enabled() and (
        x.requires_grad or topk_weights.requires_grad or gate_up.requires_grad or down.requires_grad
    )
    args: tuple[Any, ...] = (
        x.to(dtype).contiguous(),
        topk_ids.contiguous(),
        topk_weights.contiguous(),
        gate_up.to(dtype),
        down.to(dtype),
        activation,
        AUTO_GROUP_SIZE if group_size == "auto" else group_size,
        persistent,
        backend,
        needs_grad,
    )
    if torch.compiler.is_compiling():
        out = torch.ops.moe_kernels.experts_forward(*args)[0]
    elif needs_grad:
        out = _Experts.apply(*args)
    else:
        out = _forward_steps(*args)[0]
    return out.to(x.dtype)


def _check_inputs(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
) -> None:
    if x.dim() != 2 or gate_up.dim() != 3 or down.dim() != 3 or gate_up.shape[1] % 2:
        raise ValueError(
            "fused_experts wants x (T, H), gate_up (E, 2I, H), down (E, H, I); "
            f"got {tuple(x.shape)}, {tuple(gate_up.shape)}, {tuple(down.shape)}"
        )
    experts, two_i, hidden = gate_up.shape
    if x.shape[1] != hidden or tuple(down.shape) != (experts, hidden, two_i // 2):
        raise ValueError(
            f"sizes disagree: x {tuple(x.shape)}, gate_up {tuple(gate_up.shape)}, down {tuple(down.shape)}; "
            "want (T, H), (E, 2I, H), (E, H, I)"
        )
    if topk_ids.dim() != 2 or topk_ids.shape != topk_weights.shape or topk_ids.shape[0] != x.shape[0]:
        raise ValueError(
            f"topk_ids {tuple(topk_ids.shape)} and topk_weights {tuple(topk_weights.shape)} must both be "
            f"(T, K) with T={x.shape[0]}"
        )
    if topk_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"topk_ids must be int64 or int32, not {topk_ids.dtype}")
    if gate_up.dtype != down.dtype:
        raise ValueError(f"gate_up is {gate_up.dtype} but down is {down.dtype}: cast one of them")
    for name, tensor in (("x", x), ("topk_weights", topk_weights), ("gate_up", gate_up)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be a floating dtype, not {tensor.dtype}")
    for name, tensor in (("gate_up", gate_up), ("down", down)):
        if not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous in transformers' layout, got strides {tuple(tensor.stride())}: "
                "store it contiguous once, before training"
            )


def _forward_steps(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    activation: str,
    group_size: int,
    persistent: bool,
    backend: str,
    save_z: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Steps 0 to 3: out (T, H), Z (R, 2I) or empty, and the packed plan."""
    (tokens, top_k), experts = topk_ids.shape, gate_up.shape[0]
    group_size = resolve_group_size(group_size, tokens * top_k, experts)
    steps = _steps(gate_up, top_k, activation, group_size, persistent, backend)
    backends.count_dispatch(steps.NAME)

    plan = steps.make_plan(topk_ids, experts, group_size)
    z, a = steps.up(x, gate_up, plan, activation, persistent, save_z)
    y = steps.down(a, down, plan, persistent)
    out = steps.combine(y, topk_weights, plan)
    return out, z, plan.packed


def _forward_fake(
    x: torch.Tensor, topk_ids: torch.Tensor, _: torch.Tensor, gate_up: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    save_z = rest[-1]
    rows = topk_ids.shape[0] * topk_ids.shape[1]
    z = x.new_empty(rows, gate_up.shape[1]) if save_z else x.new_empty(0)
    plan = topk_ids.new_empty(plan_elements(rows, gate_up.shape[0]), dtype=torch.int32)
    return torch.empty_like(x), z, plan


def _backward_steps(
    dout: torch.Tensor,
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    z: torch.Tensor,
    packed_plan: torch.Tensor,
    activation: str,
    group_size: int,
    persistent: bool,
    backend: str,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Steps 4 to 8: (dx, dtopk_weights, dgate_up, ddown); those not in ``needs`` are empty and cost nothing."""
    need_x, need_weights, need_gate_up, need_down = needs
    (tokens, top_k), experts = topk_weights.shape, gate_up.shape[0]
    group_size = resolve_group_size(group_size, tokens * top_k, experts)
    steps = _steps(gate_up, top_k, activation, group_size, persistent, backend)
    plan = RoutingPlan.from_packed(packed_plan, tokens, top_k, experts, group_size)
    dout = dout.contiguous()

    dx, dgate_up, ddown = (x.new_empty(0) for _ in range(3))
    dout_rows = steps.gather(dout, plan)
    da = steps.dgrad(dout_rows, down, plan, persistent)
    dz, wa, dw = steps.dact(da, z, topk_weights, plan, activation)
    if need_down:
        ddown = steps.wgrad(dout_rows, wa, plan)
    del dout_rows, da, wa  # their memory serves dXr and the gathered X
    if need_x:
        dx = steps.combine_grad(steps.dgrad(dz, gate_up, plan, persistent), plan)
    if need_gate_up:
        dgate_up = steps.wgrad(dz, steps.gather(x, plan), plan)
    return dx, dw if need_weights else x.new_empty(0), dgate_up, ddown


def _backward_fake(
    _: torch.Tensor,
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    *rest: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    needs = rest[-1]

    def like(tensor: torch.Tensor, needed: bool) -> torch.Tensor:
        return torch.empty_like(tensor) if needed else x.new_empty(0)

    return like(x, needs[0]), like(topk_weights, needs[1]), like(gate_up, needs[2]), like(down, needs[3])


def _save(ctx: Any, inputs: tuple[Any, ...], z: torch.Tensor, packed_plan: torch.Tensor) -> None:
    x, _, topk_weights, gate_up, down, *ctx.settings, _save_z = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, topk_weights, gate_up, down, z, packed_plan)


def _grads(ctx: Any, dout: torch.Tensor | None, steps: Any) -> tuple[torch.Tensor | None, ...]:
    """Gradients of the inputs; ``steps`` is the backward, as a function or as an op."""
    if dout is None:
        return (None,) * 10
    x_needed, _, *rest = ctx.needs_input_grad[:5]
    needs = [x_needed, *rest]
    grads = steps(dout, *ctx.saved_tensors, *ctx.settings, needs)
    dx, dw, dgate_up, ddown = (grad if needed else None for grad, needed in zip(grads, needs, strict=True))
    return dx, None, dw, dgate_up, ddown, None, None, None, None, None


class _Experts(torch.autograd.Function):
    """The eager path: a custom op costs some tenths of a millisecond more host time a call (torch 2.11)."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> torch.Tensor:
        out, z, packed_plan = _forward_steps(*inputs)
        _save(ctx, inputs, z, packed_plan)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        return _grads(ctx, dout, _backward_steps)


# The compiled path: the same steps as two ops that torch.compile need not look into.
experts_forward = torch.library.custom_op("moe_kernels::experts_forward", _forward_steps, mutates_args=())
experts_forward.register_fake(_forward_fake)
experts_backward = torch.library.custom_op("moe_kernels::experts_backward", _backward_steps, mutates_args=())
experts_backward.register_fake(_backward_fake)
experts_forward.register_autograd(
    lambda ctx, dout, *_: _grads(ctx, dout, torch.ops.moe_kernels.experts_backward),
    setup_context=lambda ctx, inputs, output: _save(ctx, inputs, *output[1:]),
)


def _steps(
    gate_up: torch.Tensor, top_k: int, activation: str, group_size: int, persistent: bool, backend: str
) -> Any:
    """The module that implements the nine steps for this problem."""
    problem = backends.Problem.of(gate_up, top_k, activation, group_size, persistent)
    return backends.load(backends.select(problem, backend)[0])
