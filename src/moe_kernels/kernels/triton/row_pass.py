"""One pass over rows in expert order, for everything narrow that they take part in.

LoRA factors and biases need products of a tall matrix (R, N), such as dO, dZ or X, with something a few columns wide.
Each such product alone would read the whole matrix once more, at the speed of memory. Here every block of it is read
once and multiplied on both sides. Rows of tokens are gathered, and if wanted written in expert order as well, or
rounded to fp8 for the GEMM that follows.

A program takes one expert's rows and a block of columns. Sums over rows stay in registers. Sums over columns are
written for each block of columns, and a second launch adds them in a fixed order: no atomics.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from moe_kernels.fp8 import Fp8Rows, Fp8Weight
from moe_kernels.kernels.device import cdiv, dot_precision
from moe_kernels.kernels.launch.launch import launch
from moe_kernels.kernels.triton.fp8 import ROUNDING, to_fp8
from moe_kernels.kernels.triton.grouped_gemm import dgrad
from moe_kernels.kernels.triton.tile import multiply_add
from moe_kernels.layer import AddedGrads, Rows, Weight
from moe_kernels.packed import SIDE
from moe_kernels.routing import RoutingPlan, TokenRows


# Under expert parallelism every step brings another number of rows, for which nothing is to be compiled.
@triton.jit(do_not_specialize=["R"])
def row_pass_kernel(
    rows_ptr,  # (R, N), or with TOP_K the tokens (R / TOP_K, N)
    factor_ptr,  # (E, N, RANK): read if LOW
    inner_ptr,  # (R, RANK): read if GRAD
    bias_ptr,  # (E, N): read if BIAS_DOT
    topk_weights_ptr,  # (T * K,): read if WEIGHTED
    row_slot_ptr,
    expert_start_ptr,
    expert_order_ptr,
    sorted_ptr,  # (R, N): written if COPY
    codes_ptr,  # (R, sides * SIDE) float8e4nv: written if QUANTIZE, as are row_scales
    row_scales_ptr,  # (R, sides) float32
    low_ptr,  # (blocks, R, RANK) float32, rows factor[expert] by block of columns: written if LOW
    grad_ptr,  # (E, N, rank), or (E, rank, N) if TRANSPOSED, scaling (w rows)^T inner: written if GRAD
    bias_grad_ptr,  # (E, N), the sum of w rows: written if BIAS_GRAD
    bias_dot_ptr,  # (blocks, R) float32, <rows, bias[expert]> by block of columns: written if BIAS_DOT
    R,
    N,
    blocks,
    rank,  # of the factor as its owner has it; its columns from there to RANK are padding
    scaling,
    TOP_K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    COPY: tl.constexpr,
    QUANTIZE: tl.constexpr,
    SIDE: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
    LOW: tl.constexpr,
    GRAD: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BIAS_GRAD: tl.constexpr,
    BIAS_DOT: tl.constexpr,
    RANK: tl.constexpr,
    EVEN_N: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    block = tl.program_id(0) % blocks
    expert = tl.load(expert_order_ptr + tl.program_id(0) // blocks).to(tl.int64)
    start = tl.load(expert_start_ptr + expert)
    end = tl.load(expert_start_ptr + expert + 1)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    in_width = n < N
    r = tl.arange(0, RANK)
    if LOW:
        factor_ptrs = factor_ptr + (expert * N + n)[:, None] * RANK + r[None, :]
        factor = tl.load(factor_ptrs, mask=in_width[:, None], other=0.0)
    if GRAD:
        grad = tl.zeros((BLOCK_N, RANK), tl.float32)
    if BIAS_GRAD:
        bias_grad = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    if BIAS_DOT:
        bias = tl.load(bias_ptr + expert * N + n, mask=in_width, other=0.0).to(tl.float32)
    for r0 in tl.range(start, end, BLOCK_R):
        rows = r0 + tl.arange(0, BLOCK_R)
        own = rows < end
        source = rows.to(tl.int64)
        if TOP_K > 0 or WEIGHTED:
            slot = tl.load(row_slot_ptr + rows, mask=own, other=0)
        if TOP_K > 0:
            source = (slot // TOP_K).to(tl.int64)
        mask = own[:, None]
        if not EVEN_N:
            mask = mask & in_width[None, :]
        values = tl.load(rows_ptr + source[:, None] * N + n[None, :], mask=mask, other=0.0)
        if COPY:
            tl.store(sorted_ptr + rows.to(tl.int64)[:, None] * N + n[None, :], values, mask=mask)
        if QUANTIZE:
            SIDES: tl.constexpr = BLOCK_N // SIDE
            codes, scales = to_fp8(tl.reshape(values.to(tl.float32), (BLOCK_R, SIDES, SIDE)), LARGEST, SMALLEST)
            sides = block * SIDES + tl.arange(0, SIDES)
            places = rows.to(tl.int64)[:, None] * tl.cdiv(N, SIDE) + sides[None, :]
            kept = own[:, None] & (sides < tl.cdiv(N, SIDE))[None, :]
            code_ptrs = codes_ptr + (places * SIDE)[:, :, None] + tl.arange(0, SIDE)[None, None, :]
            tl.store(code_ptrs, codes, mask=kept[:, :, None])
            tl.store(row_scales_ptr + places, scales, mask=kept)
        if WEIGHTED:
            weight = tl.load(topk_weights_ptr + slot, mask=own, other=0.0).to(tl.float32)[:, None]
        narrow = rows.to(tl.int64)[:, None] * RANK + r[None, :]
        if LOW:
            low = multiply_add(values, factor, tl.zeros((BLOCK_R, RANK), tl.float32), PRECISION)
            tl.store(low_ptr + block.to(tl.int64) * R * RANK + narrow, low, mask=own[:, None])
        if GRAD:
            inner = tl.load(inner_ptr + narrow, mask=own[:, None], other=0.0)
            if WEIGHTED:
                inner = (weight * inner.to(tl.float32)).to(inner.dtype)
            grad = multiply_add(values.T, inner, grad, PRECISION)
        if BIAS_GRAD:
            if WEIGHTED:
                bias_grad += weight * values.to(tl.float32)
            else:
                bias_grad += values.to(tl.float32)
        if BIAS_DOT:
            dot = tl.sum(values.to(tl.float32) * bias[None, :], axis=1)
            tl.store(bias_dot_ptr + block.to(tl.int64) * R + rows, dot, mask=own)
    if GRAD:
        grad = (grad * scaling).to(grad_ptr.dtype.element_ty)
        mask = in_width[:, None] & (r < rank)[None, :]
        if TRANSPOSED:
            tl.store(grad_ptr + (expert * rank + r)[None, :] * N + n[:, None], grad, mask=mask)
        else:
            tl.store(grad_ptr + (expert * N + n)[:, None] * rank + r[None, :], grad, mask=mask)
    if BIAS_GRAD:
        total = tl.sum(bias_grad, axis=0).to(bias_grad_ptr.dtype.element_ty)
        tl.store(bias_grad_ptr + expert * N + n, total, mask=in_width)


@triton.jit(do_not_specialize=["R"])
def sum_blocks_kernel(
    parts_ptr,  # (blocks, R * width) float32
    routed_ptr,  # expert_start[E]: rows at or after it belong to dropped slots
    out_ptr,  # (R * width,)
    R,
    width,  # a multiple of 16 keeps loads of the parts wide, whatever R
    blocks,
    BLOCK: tl.constexpr,
):
    size = R.to(tl.int64) * width
    cols = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < tl.load(routed_ptr).to(tl.int64) * width
    total = tl.zeros((BLOCK,), tl.float32)
    part_ptrs = parts_ptr + cols
    for _ in range(blocks):
        total += tl.load(part_ptrs, mask=mask, other=0.0)
        part_ptrs += size
    tl.store(out_ptr + cols, total.to(out_ptr.dtype.element_ty), mask=mask)


class PassTile(NamedTuple):
    """Block sizes and options of the compiler."""

    block_r: int
    block_n: int
    num_warps: int
    num_stages: int


@functools.cache
def pass_tile(dtype: torch.dtype, width: int, rank: int) -> PassTile:
    """Blocks whose sums over rows, (block_n, rank), leave registers for what is being read; rank 0: biases alone."""
    if dtype == torch.float32:  # exact products run on the CUDA cores
        return PassTile(32, min(64, max(16, triton.next_power_of_2(width))), 8, 1)
    columns, warps, stages = (128, 4, 1) if rank == 0 else (256, 8, 3) if rank <= 32 else (128, 8, 2)
    return PassTile(64, min(columns, max(16, triton.next_power_of_2(width))), warps, stages)


class _Pass(NamedTuple):
    """Results of a pass; None where it was not asked for."""

    rows: torch.Tensor | None
    codes: torch.Tensor | None
    row_scales: torch.Tensor | None
    low: torch.Tensor | None
    grad: torch.Tensor | None
    bias_grad: torch.Tensor | None
    bias_dot: torch.Tensor | None


def _row_pass(
    rows: Rows,
    plan: RoutingPlan,
    *,
    factor: torch.Tensor | None = None,
    inner: torch.Tensor | None = None,
    owner: torch.Tensor | None = None,  # the factor that grad belongs to, in its shape and dtype
    transposed: bool = False,
    scaling: float = 1.0,
    topk_weights: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    copy: bool = False,
    quantize: bool = False,
    bias_grad: bool = False,
) -> _Pass:
    """``factor`` gives low, ``inner`` gives grad, ``bias`` gives bias_dot; topk_weights weight grad and bias_grad."""
    source, top_k = rows if isinstance(rows, TokenRows) else (rows, 0)
    width, count, experts = source.shape[1], plan.rows, plan.experts
    narrow = inner if factor is None else factor
    rank = 0 if narrow is None else narrow.shape[-1]
    own = rank if owner is None else owner.shape[1 if transposed else 2]
    tile = pass_tile(source.dtype, width, rank)
    if quantize:  # a block of columns has whole scales
        tile = tile._replace(block_n=max(tile.block_n, SIDE))
    blocks = cdiv(width, tile.block_n)
    empty, wide = source.new_empty, torch.float32
    out = _Pass(
        empty(count, width) if copy else None,
        empty(count, cdiv(width, SIDE) * SIDE, dtype=torch.float8_e4m3fn) if quantize else None,
        empty(count, cdiv(width, SIDE), dtype=wide) if quantize else None,
        None if factor is None else empty(blocks, count, rank, dtype=wide),
        None if inner is None or owner is None else empty(owner.shape, dtype=owner.dtype),
        empty(experts, width) if bias_grad else None,
        None if bias is None else empty(blocks, count, dtype=wide),
    )
    if all(tensor is None for tensor in out):
        return out
    inputs = source, factor, inner, bias, topk_weights, plan.row_slot, plan.expert_start, plan.expert_order
    launch(
        row_pass_kernel,
        (experts * blocks,),
        (*(source if tensor is None else tensor for tensor in (*inputs, *out)), count, width, blocks, own, scaling),
        {
            "TOP_K": top_k,
            "WEIGHTED": topk_weights is not None,
            "COPY": copy,
            "QUANTIZE": quantize,
            **ROUNDING,
            "LOW": factor is not None,
            "GRAD": inner is not None,
            "TRANSPOSED": transposed,
            "BIAS_GRAD": bias_grad,
            "BIAS_DOT": bias is not None,
            "RANK": rank or 16,
            "EVEN_N": width % tile.block_n == 0,
            "PRECISION": dot_precision(source.dtype),
            "BLOCK_R": tile.block_r,
            "BLOCK_N": tile.block_n,
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
        },
    )
    low = None if out.low is None else _sum_blocks(out.low, empty(count, rank), plan)
    bias_dot = None if out.bias_dot is None else _sum_blocks(out.bias_dot, empty(count, dtype=wide), plan)
    return out._replace(low=low, bias_dot=bias_dot)


def _sum_blocks(parts: torch.Tensor, out: torch.Tensor, plan: RoutingPlan) -> torch.Tensor:
    """parts (blocks, R, ...) -> ``out`` (R, ...), the sum over blocks."""
    size = out.numel()
    if size == 0:
        return out
    arguments = parts, plan.expert_start[plan.experts :], out, plan.rows, size // max(plan.rows, 1), parts.shape[0]
    launch(sum_blocks_kernel, (cdiv(size, 1024),), arguments, {"BLOCK": 1024, "num_warps": 4})
    return out


#: Above this rank the partial sums over blocks of columns cost more than reading the rows once more.
MAX_RANK = 32


def added_grads(
    dy: Rows,
    weight: Weight,
    plan: RoutingPlan,
    lora_b: torch.Tensor | None,
    needs_bias: bool,
    topk_weights: torch.Tensor | None = None,
) -> AddedGrads:
    """The gradients of what ``weight`` (E, N, K) adds to its matrix, from dY (R, N).

    ``lora_b`` is the factor as its owner has it, if its gradient is needed.
    """
    factor = weight.factor
    small = factor is not None and factor.shape[2] <= MAX_RANK
    quantize = isinstance(weight.matrix, Fp8Weight) and _has_whole_blocks(weight.matrix)
    copy = isinstance(dy, TokenRows) and not (quantize and (factor is None or small))
    done = _row_pass(
        dy,
        plan,
        factor=factor if small else None,
        inner=None if lora_b is None else weight.low,
        owner=lora_b,
        topk_weights=topk_weights,
        bias=None if topk_weights is None else weight.bias,
        copy=copy,
        quantize=quantize,
        bias_grad=needs_bias,
    )
    rows, low = dy if done.rows is None else done.rows, done.low
    if factor is not None and not small:
        assert isinstance(rows, torch.Tensor)
        low = dgrad(rows, Weight(factor), plan)
    if done.codes is not None and done.row_scales is not None:
        return AddedGrads(Fp8Rows(done.codes, done.row_scales), low, done.grad, done.bias_grad, done.bias_dot)
    return AddedGrads(rows, low, done.grad, done.bias_grad, done.bias_dot)


def _has_whole_blocks(matrix: Fp8Weight) -> bool:
    """Whether the matrices above each other begin at a multiple of SIDE rows, so that dY's blocks do as well."""
    return matrix.sizes[1] // matrix.stacked % SIDE == 0 or matrix.stacked == 1


def lora_a_grad(
    low: torch.Tensor, rows: Rows, plan: RoutingPlan, lora_a: torch.Tensor, scaling: float = 1.0
) -> torch.Tensor:
    """scaling low[rows of e]^T rows[rows of e]: low (R, RANK), rows (R, K) or their tokens -> as lora_a (E, r, K)."""
    grad = _row_pass(rows, plan, inner=low, owner=lora_a, transposed=True, scaling=scaling).grad
    assert grad is not None
    return grad
