"""The fused router: logits to the chosen experts and their weights in one launch, and the exact gradient in another.

Two kinds of routing, as transformers' models do them. T tokens, E experts, K experts per token::

    softmax   p = softmax(logits); the K largest; weights p / sum of the K (normalize) or p itself
              (Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE)
    sigmoid   s = sigmoid(logits); the K largest of s + correction_bias among the experts of the top_groups groups
              whose two largest sum to most; weights s / (sum of the K + 1e-20) or s itself, times scale
              (DeepSeek-V3, GLM-4-MoE)

The linear that makes the logits stays with the model, and so do the logits, which its auxiliary loss reads.

Order and ties: experts come by falling choice, and among equals the lowest index first. torch.topk promises nothing
about equals, and with ``sorted=False`` (DeepSeek-V3) no order at all; where nothing ties the chosen set is the same.
A softmax router compares the logits, whose order survives where two probabilities round to one float32.

NaN counts as the largest value, as in torch.topk, and makes the weights NaN: in a softmax router all of a token's,
in a sigmoid router all of them if they are normalised, else its own.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch

from moe_kernels.ops import custom_ops
from moe_kernels.plain import batched, say_plain, traced, transformed, without_autocast
from moe_kernels.problem import UnsupportedProblem, device_capability

Scoring = Literal["softmax", "sigmoid"]
MAX_EXPERTS = 512


class Settings(NamedTuple):
    """How a router chooses; see :func:`route` for each."""

    top_k: int
    sigmoid: bool
    normalize: bool
    groups: int
    top_groups: int
    scale: float
    weights_dtype: torch.dtype


def route(
    logits: torch.Tensor,
    top_k: int,
    *,
    scoring: Scoring = "softmax",
    normalize: bool = True,
    correction_bias: torch.Tensor | None = None,
    groups: int = 1,
    top_groups: int = 1,
    scale: float = 1.0,
    weights_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose ``top_k`` experts for every token.

    Args:
        logits: (T, E) bf16, fp16 or fp32; E at most 512 in the Triton kernel. Computed with in float32.
        top_k: K.
        scoring: "softmax" or "sigmoid". Sigmoids are rounded to the dtype of the weights before they are compared,
            as a model's own are: under autocast a DeepSeek router compares scores in bfloat16.
        normalize: divide the weights by their sum over the K chosen.
        correction_bias: (E,), added to the sigmoid for the choice alone; no gradient.
        groups, top_groups: split the experts into ``groups`` equal groups and choose from the best ``top_groups``
            of them (sigmoid only).
        scale: factor of the weights.
        weights_dtype: dtype of the weights; default that of the logits.
        backend: "auto", "triton" or "torch"; auto is triton on a GPU and torch elsewhere.

    Returns:
        ``topk_weights`` (T, K), differentiable with respect to the logits, and ``topk_ids`` (T, K) int64.

    Raises:
        ValueError: sizes that do not fit each other; names them.
        UnsupportedProblem: the backend asked for, or on a GPU Triton's, cannot run this.
    """
    if correction_bias is not None:
        correction_bias = correction_bias.contiguous()
    if not isinstance(scale, (int, float)):
        raise ValueError(f"scale is a {type(scale).__name__}, and a number of the host, which gets no gradient, is "
                         "wanted: multiply the weights with what is trained")  # fmt: skip
    settings = Settings(top_k, scoring == "sigmoid", normalize, groups, top_groups, float(scale),
                        weights_dtype or logits.dtype)  # fmt: skip
    _check(logits, correction_bias, settings, scoring)
    if _backend(logits, backend) == "torch":
        return reference_route(logits, correction_bias, settings)
    if transformed([logits]):
        say_plain("a fused router")
        return reference_route(logits, correction_bias, settings)
    compiled = torch.compiler.is_compiling() or traced(logits)
    run = route_forward if compiled else _Route.apply
    weights, ids = run(logits.contiguous(), correction_bias, *settings)
    return weights, ids


def reference_route(
    logits: torch.Tensor, correction_bias: torch.Tensor | None, settings: Settings
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, in plain differentiable torch: float32 inside, float64 for float64 logits."""
    with without_autocast(logits.device.type):
        scores = _scores(logits, settings)
        if settings.sigmoid:
            choice = scores.detach() if correction_bias is None else scores.detach() + correction_bias
        else:
            choice = logits.detach()
        order = _falling(choice)
        if settings.groups > 1:
            outside = _outside(choice, settings.groups, settings.top_groups).gather(-1, order)
            order = order.gather(-1, torch.sort(outside, dim=-1, stable=True).indices)
        ids = order[..., : settings.top_k]
        return _weights(scores, ids, settings), ids


def _scores(logits: torch.Tensor, settings: Settings) -> torch.Tensor:
    wide = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    return wide.sigmoid().to(settings.weights_dtype).to(wide.dtype) if settings.sigmoid else wide.softmax(-1)


def _weights(scores: torch.Tensor, ids: torch.Tensor, settings: Settings) -> torch.Tensor:
    weights = scores.gather(-1, ids)
    if settings.normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + (1e-20 if settings.sigmoid else 0.0))
    return (weights * settings.scale).to(settings.weights_dtype)


def _falling(values: torch.Tensor) -> torch.Tensor:
    """Indices of each row by falling value, the lowest first among equals."""
    return torch.sort(values, dim=-1, descending=True, stable=True).indices


def _outside(choice: torch.Tensor, groups: int, top_groups: int) -> torch.Tensor:
    """(T, E), true outside the groups whose two largest of ``choice`` (T, E) sum to most."""
    grouped = choice.unflatten(-1, (groups, -1))
    best = _falling(grouped.topk(2, dim=-1).values.sum(-1))[..., :top_groups]
    outside = grouped.new_ones(grouped.shape[:2], dtype=torch.bool).scatter(-1, best, False)
    return outside[..., None].expand_as(grouped).flatten(-2)


def _check(logits: torch.Tensor, bias: torch.Tensor | None, settings: Settings, scoring: str) -> None:
    if scoring not in ("softmax", "sigmoid"):
        raise ValueError(f"scoring={scoring!r} is neither softmax nor sigmoid")
    if logits.dim() != 2 or not logits.is_floating_point():
        raise ValueError(f"logits must be (T, E) of a floating dtype, got {tuple(logits.shape)} {logits.dtype}")
    if not settings.weights_dtype.is_floating_point:
        raise ValueError(f"weights_dtype={settings.weights_dtype} is no floating dtype")
    experts = logits.shape[1]
    if not 1 <= settings.top_k <= experts:
        raise ValueError(f"top_k={settings.top_k} does not fit {experts} experts: 1 to {experts}")
    if bias is not None and bias.shape != (experts,):
        raise ValueError(f"correction_bias is {tuple(bias.shape)}, want ({experts},)")
    if bias is not None and bias.device != logits.device:
        raise ValueError(f"logits are on {logits.device}, correction_bias is on {bias.device}: move it there")
    if not settings.sigmoid and (bias is not None or settings.groups != 1):
        raise ValueError("correction_bias and groups belong to scoring='sigmoid'")
    groups, top_groups = settings.groups, settings.top_groups
    if groups < 1:
        raise ValueError(f"groups={groups} must be at least 1")
    if groups > 1 and (experts % groups or experts // groups < 2):
        raise ValueError(f"groups={groups} must divide {experts} experts into groups of two at least")
    if not 1 <= top_groups <= groups or settings.top_k > top_groups * (experts // groups):
        raise ValueError(f"top_groups={top_groups} of {groups} groups of {experts // groups} cannot give "
                         f"{settings.top_k} experts")  # fmt: skip


def _backend(logits: torch.Tensor, backend: str) -> str:
    if backend not in ("auto", "triton", "torch"):
        raise ValueError(f"backend={backend!r} is not one of auto, triton, torch")
    return backend if backend != "auto" else "triton" if logits.is_cuda else "torch"


def _check_triton(logits: torch.Tensor) -> None:
    """Raise UnsupportedProblem with the cure where the kernel cannot run; in the op, so that nothing traces it."""
    from moe_kernels.kernels.device import interpreting

    capability, reason = device_capability(logits.device), None
    if logits.device.type != "cuda" and not interpreting():
        reason = f"logits are on {logits.device.type}: move them to an NVIDIA GPU, or use backend='torch'."
    elif capability is not None and capability < (8, 0):
        reason = f"compute capability {capability} is below (8, 0): use an A100 or newer, or backend='torch'."
    elif logits.shape[1] > MAX_EXPERTS:
        reason = f"{logits.shape[1]} experts are more than {MAX_EXPERTS}: use backend='torch'."
    elif logits.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        reason = f"logits are {logits.dtype}: cast them to float32, or use backend='torch'."
    if reason is not None:
        raise UnsupportedProblem(f"the fused router cannot run this: {reason}")


def _forward(
    logits: torch.Tensor,
    correction_bias: torch.Tensor | None,
    top_k: int,
    sigmoid: bool,
    normalize: bool,
    groups: int,
    top_groups: int,
    scale: float,
    weights_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    from moe_kernels.kernels.triton import router as kernels

    _check_triton(logits)
    return kernels.route(
        logits, correction_bias, top_k, sigmoid, normalize, groups, top_groups, scale, weights_dtype
    )


def _backward(
    dweights: torch.Tensor, logits: torch.Tensor, ids: torch.Tensor, sigmoid: bool, normalize: bool, scale: float
) -> torch.Tensor:
    from moe_kernels.kernels.triton import router as kernels

    return kernels.route_grad(dweights.contiguous(), logits, ids, sigmoid, normalize, scale)


def _save(ctx: Any, inputs: tuple[Any, ...], ids: torch.Tensor) -> None:
    logits, _, *settings = inputs
    ctx.save_for_backward(logits, ids)
    ctx.settings = Settings(*settings)


def _grads(ctx: Any, dweights: torch.Tensor | None, step: Any) -> tuple[torch.Tensor | None, ...]:
    dlogits = None
    if dweights is not None and ctx.needs_input_grad[0]:
        (logits, ids), s = ctx.saved_tensors, ctx.settings
        if torch.is_grad_enabled() or batched(dweights):  # create_graph=True, or several backwards at a time
            dlogits = _plain_grad(dweights, logits, ids, s)
        else:
            dlogits = step(dweights, logits, ids, s.sigmoid, s.normalize, s.scale)
    return dlogits, *((None,) * (1 + len(Settings._fields)))


def _plain_grad(
    dweights: torch.Tensor, logits: torch.Tensor, ids: torch.Tensor, settings: Settings
) -> torch.Tensor:
    """What the backward gives, as a graph that autograd can differentiate again."""
    say_plain("a fused router")
    again = torch.is_grad_enabled()
    with torch.enable_grad(), without_autocast(logits.device.type):
        own = logits.view_as(logits)
        weights = _weights(_scores(own, settings), ids, settings)
        return torch.autograd.grad(weights, own, dweights, create_graph=again)[0]


class _Route(torch.autograd.Function):
    """The eager path; torch.compile takes the custom ops below."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = _forward(*inputs)
        _save(ctx, inputs, ids)
        ctx.set_materialize_grads(False)
        return weights, ids

    @staticmethod
    def backward(ctx: Any, dweights: torch.Tensor | None, _: None) -> tuple[torch.Tensor | None, ...]:
        return _grads(ctx, dweights, _backward)


def _forward_fake(
    logits: torch.Tensor, _: torch.Tensor | None, top_k: int, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=rest[-1]), logits.new_empty(shape, dtype=torch.int64)


_forward_op, _backward_op = custom_ops(
    route_forward=(_forward, torch.library.infer_schema(_forward, mutates_args=())),
    route_backward=(_backward, torch.library.infer_schema(_backward, mutates_args=())),
)
#: The ops as overloads, which torch.compile takes into its graph.
route_forward, route_backward = _forward_op._opoverload, _backward_op._opoverload
_forward_op.register_fake(_forward_fake)
_backward_op.register_fake(lambda dweights, logits, *_: torch.empty_like(logits))
_forward_op.register_autograd(
    lambda ctx, dweights, _: _grads(ctx, dweights, route_backward),
    setup_context=lambda ctx, inputs, output: _save(ctx, inputs, output[1]),
)
