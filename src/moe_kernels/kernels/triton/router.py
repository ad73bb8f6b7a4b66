"""The router: logits to the top-k experts and their weights in one launch, and the gradient in another.

Both kinds of router of :mod:`moe_kernels.router`. A program keeps whole rows of logits in registers, so the experts
of a token are chosen by K reductions over one tile, and every other number (softmax, groups, normalisation) comes
from the same tile. Choices are compared as integers that sort like the floats they stand for: among equals the lowest
index wins, NaN is the largest as in torch.topk, and what is taken or excluded is below every float.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from moe_kernels.kernels.device import cdiv, interpreting
from moe_kernels.kernels.launch.launch import launch

# CUDA's own expf, that torch uses: tl.exp differs in the last bits, and a sigmoid router compares them.
_math = tl if interpreting() else libdevice

_MAX_PROGRAMS = 256  # more tokens than these route at a time are a loop in each of them
_ELEMENTS = 2048  # logits per tile
_LARGEST = tl.constexpr(0x7FFFFFFF)
_TAKEN = tl.constexpr(-0x80000000)


@triton.jit
def _sortable(x):
    """int32 that orders like float32 ``x``: -0 equals 0, NaN is above everything, all are above _TAKEN."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x != x, _LARGEST, bits ^ ((bits >> 31) & _LARGEST))


@triton.jit
def _sorted_value(key):
    """The float32 of a sortable int32."""
    return (key ^ ((key >> 31) & _LARGEST)).to(tl.float32, bitcast=True)


@triton.jit
def _sigmoid(logits, dtype: tl.constexpr):
    """torch's sigmoid of float32 ``logits``, rounded to ``dtype``."""
    return tl.math.div_rn(1.0, 1.0 + _math.exp(-logits)).to(dtype).to(tl.float32)


@triton.jit
def _keep_best_groups(key, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, BLOCK_T: tl.constexpr,
                      BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr):  # fmt: skip
    """``key`` (BLOCK_T, BLOCK_G * BLOCK_S) with all but the groups of the largest sum of two taken out."""
    grouped = key.reshape(BLOCK_T, BLOCK_G, BLOCK_S)
    first, place = tl.max(grouped, axis=2, return_indices=True)
    others = tl.where(tl.arange(0, BLOCK_S)[None, None, :] == place[:, :, None], _TAKEN, grouped)
    second = tl.max(others, axis=2)
    groups = tl.arange(0, BLOCK_G)[None, :]
    score = _sortable(_sorted_value(first) + _sorted_value(second))
    score = tl.where(groups < GROUPS, score, _TAKEN)
    kept = tl.zeros((BLOCK_T, BLOCK_G), tl.int32)
    for _ in range(TOP_GROUPS):
        _, best = tl.max(score, axis=1, return_indices=True)
        hit = groups == best[:, None]
        kept = tl.where(hit, 1, kept)
        score = tl.where(hit, _TAKEN, score)
    return tl.where(kept[:, :, None] == 1, grouped, _TAKEN).reshape(BLOCK_T, BLOCK_G * BLOCK_S)


@triton.jit(do_not_specialize=["T", "tokens_per_program"])
def route_kernel(
    logits_ptr,  # (T, E)
    bias_ptr,  # (E,) float32, or any pointer unless HAS_BIAS
    ids_ptr,  # (T, TOP_K)
    weights_ptr,  # (T, TOP_K)
    T,
    tokens_per_program,
    scale,
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORMALIZE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    column = tl.arange(0, BLOCK_G * BLOCK_S)
    in_group = column % BLOCK_S
    # Padding lies between the groups, so that columns order as experts do.
    expert = column // BLOCK_S * (E // GROUPS) + in_group
    valid = (in_group < E // GROUPS) & (column // BLOCK_S < GROUPS)
    bias = tl.zeros((BLOCK_G * BLOCK_S,), tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + expert, mask=valid, other=0.0).to(tl.float32)
    first = tl.program_id(0) * tokens_per_program
    for t0 in range(first, tl.minimum(first + tokens_per_program, T), BLOCK_T):
        token = t0 + tl.arange(0, BLOCK_T)
        inside = (token < T)[:, None] & valid[None, :]
        offsets = token.to(tl.int64)[:, None] * E + expert[None, :]
        logits = tl.load(logits_ptr + offsets, mask=inside, other=float("-inf")).to(tl.float32)
        if SIGMOID:
            value = _sigmoid(logits, weights_ptr.dtype.element_ty)
            key = _sortable(value + bias[None, :])
        else:
            key = _sortable(logits)
        key = tl.where(valid[None, :], key, _TAKEN)
        if not SIGMOID:
            value = _math.exp(logits - _sorted_value(tl.max(key, axis=1))[:, None])
        if GROUPS > 1:
            key = _keep_best_groups(key, GROUPS, TOP_GROUPS, BLOCK_T, BLOCK_G, BLOCK_S)
        rank = tl.full((BLOCK_T, BLOCK_G * BLOCK_S), -1, tl.int32)
        for k in range(TOP_K):
            _, best = tl.max(key, axis=1, return_indices=True)
            hit = column[None, :] == best[:, None]
            rank = tl.where(hit, k, rank)
            key = tl.where(hit, _TAKEN, key)
        chosen = (rank >= 0) & inside
        weight = value
        if NORMALIZE:
            total = tl.sum(tl.where(chosen, value, 0.0), axis=1)
            weight = value / (total + 1e-20 if SIGMOID else total)[:, None]
        elif not SIGMOID:
            weight = value / tl.sum(value, axis=1)[:, None]
        slot = token.to(tl.int64)[:, None] * TOP_K + rank
        tl.store(ids_ptr + slot, tl.broadcast_to(expert[None, :], slot.shape).to(tl.int64), mask=chosen)
        tl.store(weights_ptr + slot, (weight * scale).to(weights_ptr.dtype.element_ty), mask=chosen)


@triton.jit(do_not_specialize=["T"])
def route_grad_kernel(
    dweights_ptr,  # (T, TOP_K)
    logits_ptr,  # (T, E)
    ids_ptr,  # (T, TOP_K)
    dlogits_ptr,  # (T, E)
    T,
    scale,
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    expert = tl.arange(0, BLOCK_E)[None, :]
    inside = (token < T)[:, None] & (expert < E)
    offsets = token[:, None] * E + expert
    logits = tl.load(logits_ptr + offsets, mask=inside, other=float("-inf")).to(tl.float32)
    grad = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    chosen = tl.zeros((BLOCK_T, BLOCK_E), tl.int32)
    for k in range(TOP_K):
        hit = expert == tl.load(ids_ptr + token * TOP_K + k, mask=token < T, other=-1)[:, None]
        dweight = tl.load(dweights_ptr + token * TOP_K + k, mask=token < T, other=0.0).to(tl.float32)
        grad = tl.where(hit, scale * dweight[:, None], grad)
        chosen = tl.where(hit, 1, chosen)
    if SIGMOID:
        value = _sigmoid(logits, dweights_ptr.dtype.element_ty)
        slope = value * (1.0 - value)
        if NORMALIZE:
            kept = tl.where(chosen == 1, value, 0.0)
            total = (tl.sum(kept, axis=1) + 1e-20)[:, None]
            grad = (grad - tl.sum(grad * kept, axis=1)[:, None] / total) / total
        dlogits = tl.where(chosen == 1, grad * slope, 0.0)
    else:
        value = _math.exp(logits - tl.max(logits, axis=1)[:, None])
        if NORMALIZE:
            value = tl.where(chosen == 1, value, 0.0)
        weight = value / tl.sum(value, axis=1)[:, None]
        dlogits = weight * (grad - tl.sum(grad * weight, axis=1)[:, None])
    tl.store(dlogits_ptr + offsets, dlogits.to(dlogits_ptr.dtype.element_ty), mask=inside)


@functools.cache
def route_blocks(experts: int, groups: int) -> tuple[dict[str, int], int]:
    """(block sizes of ``route_kernel``, warps). Cached: do not mutate the dict."""
    block_g, block_s = triton.next_power_of_2(groups), triton.next_power_of_2(experts // groups)
    block_t = max(1, min(64, _ELEMENTS // (block_g * block_s)))
    return {"BLOCK_T": block_t, "BLOCK_G": block_g, "BLOCK_S": block_s}, 8


@functools.cache
def route_grad_blocks(experts: int) -> tuple[dict[str, int], int]:
    """(block sizes of ``route_grad_kernel``, warps). Cached: do not mutate the dict."""
    block_e = triton.next_power_of_2(experts)
    return {"BLOCK_T": max(1, min(64, 1024 // block_e)), "BLOCK_E": block_e}, 4


def route(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    top_k: int,
    sigmoid: bool,
    normalize: bool,
    groups: int,
    top_groups: int,
    scale: float,
    weights_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits (T, E) contiguous -> weights (T, K), ids (T, K) int64."""
    tokens, experts = logits.shape
    ids = torch.empty((tokens, top_k), dtype=torch.int64, device=logits.device)
    weights = torch.empty((tokens, top_k), dtype=weights_dtype, device=logits.device)
    blocks, num_warps = route_blocks(experts, groups)
    block_t = blocks["BLOCK_T"]
    tokens_per_program = block_t * max(1, cdiv(cdiv(tokens, block_t), _MAX_PROGRAMS))
    launch(
        route_kernel,
        (cdiv(tokens, tokens_per_program),),
        (logits, logits if bias is None else bias, ids, weights, tokens, tokens_per_program, scale),
        {
            "E": experts,
            "TOP_K": top_k,
            "SIGMOID": sigmoid,
            "NORMALIZE": normalize,
            "HAS_BIAS": bias is not None,
            "GROUPS": groups,
            "TOP_GROUPS": top_groups,
            **blocks,
            "num_warps": num_warps,
        },
    )
    return weights, ids


def route_grad(
    dweights: torch.Tensor, logits: torch.Tensor, ids: torch.Tensor, sigmoid: bool, normalize: bool, scale: float
) -> torch.Tensor:
    """dweights (T, K), logits (T, E), ids (T, K), all contiguous -> dlogits (T, E) in the dtype of the logits."""
    tokens, experts = logits.shape
    dlogits = torch.empty_like(logits)
    blocks, num_warps = route_grad_blocks(experts)
    launch(
        route_grad_kernel,
        (cdiv(tokens, blocks["BLOCK_T"]),),
        (dweights, logits, ids, dlogits, tokens, scale),
        {
            "E": experts,
            "TOP_K": ids.shape[1],
            "SIGMOID": sigmoid,
            "NORMALIZE": normalize,
            **blocks,
            "num_warps": num_warps,
        },
    )
    return dlogits
