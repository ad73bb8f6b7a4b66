"""Step 4: backward of the activation, elementwise over the sorted rows.

A is recomputed from Z instead of saved, and the routing weight's gradient <dA0, A> = <dO[t], Y> needs no Y (with a
bias b2, Y is A W2^T + b2, which adds <dO[t], b2[e]>). One pass reads dA0 and Z and writes dZ and wA: wA over dA0, and
dZ over Z if Z is not needed again. For a GEMM in fp8 it rounds dZ as well. In Triton, the same as the epilogue of a
GEMM was slower, because the epilogue's loads and stores did not overlap the mainloop.
"""

import torch
import triton
import triton.language as tl

from moe_kernels.activation import Gate, value_and_partials
from moe_kernels.kernels.device import cdiv, column_block
from moe_kernels.kernels.launch.launch import launch
from moe_kernels.kernels.triton.round import empty_fp8, store_fp8, to_fp8
from moe_kernels.layer import DownGrads
from moe_kernels.packed import SIDE
from moe_kernels.routing import RoutingPlan


# Under expert parallelism every step brings another number of rows, for which nothing is to be compiled.
@triton.jit(do_not_specialize=["R", "pitch"])
def dact_kernel(
    da_ptr,  # (R, I): dA0 in, wA out if WRITE_WA
    z_ptr,  # (R, Z), Z = 2I with a gate, I without
    topk_weights_ptr,  # (T * K,)
    dz_ptr,  # (R, Z), may be z_ptr
    dw_ptr,  # (T * K,)
    row_slot_ptr,  # (R,)
    expert_start_ptr,  # (E + 1,): rows at or after expert_start[E] belong to dropped slots
    bias_dot_ptr,  # (R,), or any pointer unless HAS_BIAS: <dO[t], b2[e]> of each row
    codes_ptr,  # (R, 2 or 1 pieces * blocks * SIDE): written if QUANTIZE, as are scales
    scales_ptr,  # (pieces * blocks, pitch) float32
    R,
    pitch,
    I,
    E,
    ACTIVATION: tl.constexpr,
    P0: tl.constexpr,
    P1: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WRITE_WA: tl.constexpr,
    QUANTIZE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    slot = tl.load(row_slot_ptr + rows, mask=rows < R, other=0)
    routed = rows < tl.load(expert_start_ptr + E)
    weight = tl.load(topk_weights_ptr + slot, mask=routed, other=0.0).to(tl.float32)[:, None]
    dw = tl.zeros((BLOCK_R,), tl.float32)
    a_rows = rows.to(tl.int64)[:, None] * I
    for i0 in range(0, I, BLOCK_I):
        cols = (i0 + tl.arange(0, BLOCK_I))[None, :]
        mask = routed[:, None] & (cols < I)
        da = tl.load(da_ptr + a_rows + cols, mask=mask, other=0.0).to(tl.float32)
        z_offsets = (2 if GATED else 1) * a_rows + cols
        pair_cols = (2 * i0 + tl.arange(0, 2 * BLOCK_I))[None, :]
        pair_offsets = 2 * a_rows + pair_cols
        pair_mask = routed[:, None] & (pair_cols < 2 * I)
        if INTERLEAVED:
            pairs = tl.load(z_ptr + pair_offsets, mask=pair_mask, other=0.0).to(tl.float32)
            gate, up = tl.split(tl.reshape(pairs, (BLOCK_R, BLOCK_I, 2)))
        elif GATED:
            gate = tl.load(z_ptr + z_offsets, mask=mask, other=0.0).to(tl.float32)
            up = tl.load(z_ptr + z_offsets + I, mask=mask, other=0.0).to(tl.float32)
        else:
            gate = tl.load(z_ptr + z_offsets, mask=mask, other=0.0).to(tl.float32)
            up = 1.0
        a, d_gate, d_up = value_and_partials(gate, up, ACTIVATION, P0, P1)
        dw += tl.sum(tl.where(mask, da * a, 0.0), axis=1)
        da *= weight
        if WRITE_WA:
            tl.store(da_ptr + a_rows + cols, (weight * a).to(da_ptr.dtype.element_ty), mask=mask)
        d_gate = (da * d_gate).to(dz_ptr.dtype.element_ty)
        if INTERLEAVED:
            d_up = (da * d_up).to(dz_ptr.dtype.element_ty)
            d_pairs = tl.reshape(tl.join(d_gate, d_up), (BLOCK_R, 2 * BLOCK_I))
            tl.store(dz_ptr + pair_offsets, d_pairs, mask=pair_mask)
        else:
            tl.store(dz_ptr + z_offsets, d_gate, mask=mask)
            if GATED:
                d_up = (da * d_up).to(dz_ptr.dtype.element_ty)
                tl.store(dz_ptr + z_offsets + I, d_up, mask=mask)
        if QUANTIZE:
            tl.static_assert(not INTERLEAVED)
            PIECES: tl.constexpr = 2 if GATED else 1
            codes, scales = to_fp8(d_gate)
            store_fp8(codes_ptr, scales_ptr, pitch, codes, scales, rows, rows < R, i0, I, 0, PIECES)
            if GATED:
                codes, scales = to_fp8(d_up)
                store_fp8(codes_ptr, scales_ptr, pitch, codes, scales, rows, rows < R, i0, I, 1, PIECES)
    if HAS_BIAS:
        dw += tl.load(bias_dot_ptr + rows, mask=routed, other=0.0)
    tl.store(dw_ptr + slot, dw.to(dw_ptr.dtype.element_ty), mask=rows < R)


def dact(
    da: torch.Tensor,
    z: torch.Tensor,
    topk_weights: torch.Tensor,
    plan: RoutingPlan,
    gate: Gate,
    overwrite_z: bool = False,
    bias_dot: torch.Tensor | None = None,
    needs_wa: bool = True,
    rounds: bool = False,
) -> DownGrads:
    """da (R, I) = dA0, z (R, Z), topk_weights (T, K) -> dZ (R, Z), wA (R, I), empty unless needs_wa, and dw (T, K).

    wA overwrites ``da``, and dZ overwrites ``z`` if overwrite_z. bias_dot (R,), if given, is the bias's part of dw.
    ``rounds``: dZ is to be rounded to fp8 as well.
    """
    dz, dw = z if overwrite_z else torch.empty_like(z), torch.empty_like(topk_weights)
    wa = da if needs_wa else da.new_empty(0)
    intermediate = da.shape[1]
    pieces = 2 if gate.gated else 1  # gate and up begin a block each: where I is a multiple of SIDE that is the same
    rounded = empty_fp8(plan.rows, intermediate, pieces, z.device) if rounds else None
    if plan.rows == 0:
        return DownGrads(dz, wa, dw, rounded)
    block_i = max(column_block(intermediate), SIDE if rounds else 1)
    block_r = max(1, 1024 // block_i)
    launch(
        dact_kernel,
        (cdiv(plan.rows, block_r),),
        (
            da,
            z,
            topk_weights,
            dz,
            dw,
            plan.row_slot,
            plan.expert_start,
            da if bias_dot is None else bias_dot,
            *(rounded or (dz, dz)),
            plan.rows,
            1 if rounded is None else rounded.scales.stride(1),
            intermediate,
            plan.experts,
        ),
        {
            **gate.constants(),
            "HAS_BIAS": bias_dot is not None,
            "WRITE_WA": needs_wa,
            "QUANTIZE": rounds,
            "BLOCK_R": block_r,
            "BLOCK_I": block_i,
            "num_warps": 4,
        },
    )
    return DownGrads(dz, wa, dw, rounded)
