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
LoRA adds ``lora_b[e] lora_a[e]`` to a weight without forming it: every GEMM with that weight gets r more elements of
its inner dimension, and both factors' gradients are GEMMs of width r.

Saved for backward: X, Z, the plan and w (and the weights themselves). Y, A and gathered X are not saved, because
dw = <dO W2, A> does not need Y (SonicMoE, arXiv 2512.14080). All saved shapes depend on (T, K, E, H, I) alone. The
backward writes dZ over Z, unless the graph is kept for another backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_kernels import backends, registry
from moe_kernels.activation import Activation
from moe_kernels.autograd import eager_experts, experts_op
from moe_kernels.checks import (
    check_devices,
    check_experts,
    check_inputs,
    check_layouts,
    check_low_rank,
    check_tensors,
    compute_dtype,
)
from moe_kernels.factors import LowRank
from moe_kernels.fp8 import check_fp8
from moe_kernels.layer import Spec, Tensors
from moe_kernels.packed import PackedWeight, whole
from moe_kernels.plain import plain_experts, traced, transformed
from moe_kernels.reference import LowRankPair
from moe_kernels.routing import AUTO_GROUP_SIZE
from moe_kernels.settings import DEFAULT_GROUP_SIZE, GroupSize, check_settings

# torch.compile would look into the files of the installed packages.
_backend_names = torch.compiler.assume_constant_result(registry.names)


def fused_experts(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor | None,
    gate_up: Tensor | PackedWeight,
    down: Tensor | PackedWeight,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str | Activation = "silu",
    interleaved: bool = False,
    reduce: bool = True,
    gate_up_lora: LowRank | LowRankPair | None = None,
    down_lora: LowRank | LowRankPair | None = None,
    recompute: bool = False,
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
            gradient has their memory order, without gaps. Or a frozen :class:`moe_kernels.packed.PackedWeight`, which
            is dequantised a block of experts at a time, ahead of each GEMM that reads it, or if it is a
            :class:`moe_kernels.fp8.Fp8Weight` multiplied in fp8, with the rows rounded to e4m3.
        down: (E, H, I), stored by rows or by columns too; in the dtype of gate_up, or of any other than float64
            under autocast, which casts both. Gradients have the dtype of their tensor.
        gate_up_bias: (E, 2I) or (E, I).
        down_bias: (E, H).
        activation: key of :data:`moe_kernels.activation.ACTIVATIONS`, or an ``Activation`` with parameters.
        interleaved: rows of gate_up (and of its bias) are ``[g0, u0, g1, u1, ...]`` instead of ``[gate; up]``.
        reduce: False returns the output of each expert, unweighted and not summed.
        gate_up_lora: (lora_b (E, 2I, r), lora_a (E, r, H)), or with a scaling as third a
            :class:`moe_kernels.factors.LowRank`: adds ``scaling * lora_b[e] @ lora_a[e]`` to gate_up, never formed.
            Of any floating dtype and any strides; the products are in the dtype of the layer, gradients in that of
            the factor, rounded once.
        down_lora: (lora_b (E, H, r), lora_a (E, r, I)), the same.
        recompute: save X but not Z, and compute Z again in the backward: less memory, one more up projection.
        group_size: rows per tile, 64, 128, 256 or "auto".
        persistent: one program per multiprocessor loops over all tiles, instead of one program per tile.
        backend: "auto", "triton", "gluon" or "torch".

    Returns:
        (T, H) in ``x.dtype``; (T, K, H) with ``reduce=False``, zeros in dropped slots.

    Raises:
        ValueError: an argument is no tensor, shapes, dtypes or layouts do not fit together, or a setting is invalid.
        UnsupportedProblem: the backend cannot run it; the message names the cure.
    """
    chosen = Activation.of(activation)
    check_settings(
        group_size, backend, _backend_names(),
        persistent=persistent, recompute=recompute, interleaved=interleaved, reduce=reduce,
    )  # fmt: skip
    try:  # costs nothing, as asking each argument for its type would
        like = _like(gate_up), _like(down)
        check_inputs(x, topk_ids, topk_weights, *like, reduce)
        check_experts(*like, gate_up_bias, down_bias, chosen, interleaved)
    except AttributeError:
        given: dict[str, object] = {"x": x, "topk_ids": topk_ids, "gate_up": gate_up, "down": down}
        check_tensors(given, topk_weights=topk_weights, gate_up_bias=gate_up_bias, down_bias=down_bias)
        raise
    check_low_rank("gate_up", like[0], gate_up_lora)
    check_low_rank("down", like[1], down_lora)
    gate_up_lora, down_lora = _low_rank(gate_up_lora), _low_rank(down_lora)
    dtype = compute_dtype(x, *like)
    if topk_weights is None:
        topk_weights = topk_ids.new_ones(topk_ids.shape, dtype=torch.float32)
    tensors = Tensors(
        x.to(dtype).contiguous(),
        topk_ids.contiguous(),
        topk_weights.contiguous(),
        gate_up.to(dtype),
        down.to(dtype),
        None if gate_up_bias is None else gate_up_bias.to(dtype).contiguous(),
        None if down_bias is None else down_bias.to(dtype).contiguous(),
        gate_up_lora.lora_b,
        gate_up_lora.lora_a,
        down_lora.lora_b,
        down_lora.lora_a,
    )
    check_devices(tensors)
    spec = Spec(
        chosen.name,
        chosen.parameters,
        interleaved,
        reduce,
        recompute,
        AUTO_GROUP_SIZE if group_size == "auto" else int(group_size),
        persistent,
        backend,
        gate_up_lora.scaling,
        down_lora.scaling,
        torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors),
    )
    if transformed(tensors):
        backends.count_dispatch("torch", why="torch.func or forward mode asked for derivatives that no kernel has")
        out = plain_experts(tensors, spec)
    else:
        check_layouts(*like)
        check_fp8(gate_up, gate_up.shape[1] != down.shape[2], interleaved, x.device)
        check_fp8(down, False, False, x.device)
        if torch.compiler.is_compiling() or traced(tensors.x):
            out = experts_op(tensors._replace(gate_up=whole(tensors.gate_up), down=whole(tensors.down)), spec)
        else:
            out = eager_experts(tensors, spec)
    return (out if reduce else out.view(*topk_ids.shape, down.shape[1])).to(x.dtype)


def _like(weight: Tensor | PackedWeight) -> Tensor:
    """What the checks look at."""
    return weight if isinstance(weight, Tensor) else weight.like()


def _low_rank(pair: LowRank | LowRankPair | None) -> LowRank:
    # The scaling is written out: torch.compile(dynamic=True) would take a default for a number that may change.
    if pair is None:
        return LowRank(None, None, 1.0)
    lora_b, lora_a, *scaling = pair
    return LowRank(lora_b, lora_a, *(scaling or (1.0,)))
