"""LoRA's factors from the caller's memory into the kernels', and the gradients of lora_b back into PEFT's.

PEFT stores lora_b (N, r*E) with experts fastest. No GEMM reads that in place: the elements of one expert are E apart.
So each forward and each backward begins with one launch that casts, scales, pads and transposes whatever of the four
factors needs it, and a backward ends with one that transposes the gradients of lora_b.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.factors import LowRank, is_packed, padded_rank
from moe_kernels.kernels.device import cdiv
from moe_kernels.kernels.launch.launch import launch

# A tile of lora_b is transposed through shared memory; one of lora_a is read and written along its rows.
BLOCKS = {"B_EXPERTS": 64, "B_COLUMNS": 64, "A_EXPERTS": 4, "A_COLUMNS": 1024}


@triton.jit
def _copy(
    source_ptr,
    out_ptr,
    tile,
    E,
    rows,  # of a matrix of the source
    columns,
    WIDTH,  # columns of a matrix of the output; zeros stand in those that the source does not have
    size,  # elements of a matrix of the output
    source_expert,  # strides
    source_row,
    source_column,
    out_expert,
    out_element,
    scaling,
    SCALED: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """A tile of BLOCK_E experts by BLOCK_Q elements of their matrices: cast, and scaled in the source's dtype.

    Nothing where ``tile`` is not one of this source. Returns its number counted from the first one behind them.
    """
    across = tl.cdiv(size, BLOCK_Q)
    tiles = tl.cdiv(E, BLOCK_E) * across
    if (tile >= 0) & (tile < tiles):
        e = (tile // across * BLOCK_E + tl.arange(0, BLOCK_E)).to(tl.int64)
        q = tile % across * BLOCK_Q + tl.arange(0, BLOCK_Q)
        row, column = (q // WIDTH).to(tl.int64), (q % WIDTH).to(tl.int64)
        inside = (e < E)[:, None] & (q < size)[None, :]
        given = inside & ((row < rows) & (column < columns))[None, :]
        source = e[:, None] * source_expert + (row * source_row + column * source_column)[None, :]
        values = tl.load(source_ptr + source, mask=given, other=0.0)
        if SCALED:
            values = (values.to(tl.float32) * scaling).to(source_ptr.dtype.element_ty)
        values = values.to(tl.float32).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + e[:, None] * out_expert + q.to(tl.int64)[None, :] * out_element, values, mask=inside)
    return tile - tiles


@triton.jit
def pack_kernel(
    b0_ptr,  # (E, N0, r0) with strides b0_*: read if HAS_B0
    a0_ptr,  # (E, r0, K0): read if HAS_A0
    b1_ptr,
    a1_ptr,
    b0_out_ptr,  # (E, N0, RANK0): written if HAS_B0
    a0_out_ptr,  # (E, RANK0, K0), scaling0 times a0: written if HAS_A0
    b1_out_ptr,
    a1_out_ptr,
    E,
    N0,
    K0,
    r0,
    b0_expert,
    b0_row,
    b0_column,
    a0_expert,
    a0_row,
    a0_column,
    scaling0,
    N1,
    K1,
    r1,
    b1_expert,
    b1_row,
    b1_column,
    a1_expert,
    a1_row,
    a1_column,
    scaling1,
    HAS_B0: tl.constexpr,
    HAS_A0: tl.constexpr,
    HAS_B1: tl.constexpr,
    HAS_A1: tl.constexpr,
    RANK0: tl.constexpr,
    RANK1: tl.constexpr,
    B_EXPERTS: tl.constexpr,
    B_COLUMNS: tl.constexpr,
    A_EXPERTS: tl.constexpr,
    A_COLUMNS: tl.constexpr,
):
    tile = tl.program_id(0)
    if HAS_B0:
        tile = _copy(b0_ptr, b0_out_ptr, tile, E, N0, r0, RANK0, N0 * RANK0, b0_expert, b0_row, b0_column,
                     N0 * RANK0, 1, 1.0, False, B_EXPERTS, B_COLUMNS)  # fmt: skip
    if HAS_B1:
        tile = _copy(b1_ptr, b1_out_ptr, tile, E, N1, r1, RANK1, N1 * RANK1, b1_expert, b1_row, b1_column,
                     N1 * RANK1, 1, 1.0, False, B_EXPERTS, B_COLUMNS)  # fmt: skip
    if HAS_A0:
        tile = _copy(a0_ptr, a0_out_ptr, tile, E, r0, K0, K0, RANK0 * K0, a0_expert, a0_row, a0_column,
                     RANK0 * K0, 1, scaling0, True, A_EXPERTS, A_COLUMNS)  # fmt: skip
    if HAS_A1:
        tile = _copy(a1_ptr, a1_out_ptr, tile, E, r1, K1, K1, RANK1 * K1, a1_expert, a1_row, a1_column,
                     RANK1 * K1, 1, scaling1, True, A_EXPERTS, A_COLUMNS)  # fmt: skip


@triton.jit
def experts_last_kernel(
    grad0_ptr,  # (E, size0)
    grad1_ptr,  # (E, size1)
    out0_ptr,  # (size0, E)
    out1_ptr,  # (size1, E)
    E,
    size0,
    size1,
    B_EXPERTS: tl.constexpr,
    B_COLUMNS: tl.constexpr,
):
    tile = _copy(grad0_ptr, out0_ptr, tl.program_id(0), E, 1, size0, size0, size0, size0, 0, 1, 1, E, 1.0, False,
                 B_EXPERTS, B_COLUMNS)  # fmt: skip
    _copy(grad1_ptr, out1_ptr, tile, E, 1, size1, size1, size1, size1, 0, 1, 1, E, 1.0, False,
          B_EXPERTS, B_COLUMNS)  # fmt: skip


def pack_factors(parts: Sequence[LowRank], dtype: torch.dtype) -> list[tuple[Tensor | None, Tensor | None]]:
    """(lora_b, lora_a) of one or two weights as the kernels take them; what they can read already is returned."""
    grid, outs, arguments, given = 0, [], [], []
    constants: dict[str, bool | int] = {}
    for number in range(2):
        lora_b, lora_a, scaling = parts[number] if number < len(parts) else LowRank()
        b = None if lora_b is None or is_packed(lora_b, dtype, 2) else lora_b
        a = None if lora_a is None or is_packed(lora_a, dtype, 1, scaling) else lora_a
        rank = next((t.shape[dim] for t, dim in ((b, 2), (a, 1)) if t is not None), 1)
        wide, rows, columns = padded_rank(rank), 0 if b is None else b.shape[1], 0 if a is None else a.shape[2]
        b_out = None if b is None else b.new_empty((len(b), rows, wide), dtype=dtype)
        a_out = None if a is None else a.new_empty((len(a), wide, columns), dtype=dtype)
        if b is not None:
            grid += cdiv(len(b), BLOCKS["B_EXPERTS"]) * cdiv(rows * wide, BLOCKS["B_COLUMNS"])
        if a is not None:
            grid += cdiv(len(a), BLOCKS["A_EXPERTS"]) * cdiv(wide * columns, BLOCKS["A_COLUMNS"])
        given += [b, a]
        outs += [b_out, a_out]
        strides = [stride for t in (b, a) for stride in ((0, 0, 0) if t is None else t.stride())]
        arguments += [rows, columns, rank, *strides, float(scaling)]
        constants |= {f"HAS_B{number}": b is not None, f"HAS_A{number}": a is not None, f"RANK{number}": wide}
    first = next((t for t in given if t is not None), None)
    if first is not None:
        pointers = [first if t is None else t for t in (*given, *outs)]
        launch(
            pack_kernel,
            (grid,),
            (*pointers, len(first), *arguments),
            constants | BLOCKS | {"num_warps": 4, "num_stages": 1},
        )
    made = [was if out is None else out for was, out in zip((t for p in parts for t in p[:2]), outs, strict=False)]
    return list(zip(made[::2], made[1::2], strict=True))


def experts_last(grads: Sequence[Tensor]) -> list[Tensor]:
    """One or two gradients (E, N, r), contiguous, with their elements in the memory order (N, r, E)."""
    outs = [grad.new_empty((*grad.shape[1:], len(grad))) for grad in grads]
    sizes = [grad.shape[1] * grad.shape[2] for grad in grads]
    blocks = {name: BLOCKS[name] for name in ("B_EXPERTS", "B_COLUMNS")}
    across = cdiv(len(grads[0]), blocks["B_EXPERTS"])
    launch(
        experts_last_kernel,
        (sum(across * cdiv(size, blocks["B_COLUMNS"]) for size in sizes),),
        (grads[0], grads[-1], outs[0], outs[-1], len(grads[0]), sizes[0], sizes[-1]),
        blocks | {"num_warps": 4, "num_stages": 1},
    )
    return [out.permute(2, 0, 1) for out in outs]
