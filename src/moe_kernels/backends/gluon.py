"""The Gluon backend, for Hopper: the Triton backend with warp-specialised GEMMs.

Rows of X are gathered inside the up projection, and rows of dO inside the backward where experts are small. The
backward of the activation is the epilogue of a GEMM. Low-rank parts are further k blocks of the GEMMs. Steps that
these kernels do not cover (experts that are apart in memory) or are slower at (weights stored by columns, interleaved
gate and up) run on the Triton backend's kernels, as do the narrow products with LoRA's factors.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from moe_kernels import trial
from moe_kernels.activation import Gate
from moe_kernels.backends.triton import TritonBackend
from moe_kernels.fp8 import Fp8Weight
from moe_kernels.kernels.hopper import gluon_names
from moe_kernels.kernels.operands import by_rows, stored
from moe_kernels.kernels.tiles.config import Override
from moe_kernels.kernels.triton.fp8 import Gemm
from moe_kernels.layer import DownGrads, GemmRows, Matrix, Rows, Weight
from moe_kernels.packed import PackedWeight
from moe_kernels.problem import Problem
from moe_kernels.routing import RoutingPlan, TokenRows

_LACKS = gluon_names.lacks()
if _LACKS is None:  # else `why_not` says so, and nothing below is called
    from moe_kernels.kernels.hopper import down_grad, fp8, gemm, mainloop, wgrad

GROUP_SIZE = 128  # rows per tile
ALIGNMENT = 64  # of hidden and intermediate sizes: the length of a k block, and the columns per store


class GluonBackend(TritonBackend):
    """Steps as Gluon kernels where these fit, else as Triton kernels."""

    name = "gluon"

    def why_not(self, problem: Problem) -> str | None:
        reason = super().why_not(problem)
        if reason is not None:
            return reason
        if problem.capability is None or problem.capability[0] != 9:
            return "it is written for Hopper (H100, H200): use backend='triton'."
        if _LACKS is not None:
            return f"the Gluon of triton {triton.__version__} has no {_LACKS}: use backend='triton', or install " \
                   f"triton {' or '.join(gluon_names.TRIED)}."  # fmt: skip
        if problem.dtype == torch.float32:
            return "it multiplies 16-bit numbers: use backend='triton' for float32."
        if problem.group_size != GROUP_SIZE or not problem.persistent:
            return f"its kernels are persistent, on tiles of {GROUP_SIZE} rows: set moe_group_size: {GROUP_SIZE} " \
                   "and moe_persistent_kernel: true, or use backend='triton'."  # fmt: skip
        if problem.hidden % ALIGNMENT or problem.intermediate % ALIGNMENT:
            return f"hidden size {problem.hidden} or intermediate size {problem.intermediate} is no multiple of " \
                   f"{ALIGNMENT}: use backend='triton'."  # fmt: skip
        if gluon_names.release() not in gluon_names.TRIED:  # last: it takes a minute, once
            refusal = trial.refusal(torch.device("cuda", torch.cuda.current_device()))
            if refusal is not None:
                return f"triton {triton.__version__} is newer than any tried with it, and {refusal}: use " \
                       "backend='triton'."  # fmt: skip
        return None

    def up(self, x: Tensor, weight: Weight, plan: RoutingPlan, gate: Gate, save_z: bool) -> tuple[Tensor, Tensor]:
        apart = gate.gated and not gate.interleaved and not by_rows(weight.matrix)  # two loads beside each other
        if _chosen(gate) and not apart and _fits(x) and _weight_fits(weight):
            copied = copies_x(weight.matrix.shape[1], plan) if _forced.choice is None else not _forced.choice
            rows = self.gather(x, plan) if copied else TokenRows(x, plan.top_k)
            return gemm.up(rows, weight, plan, gate, save_z)
        return super().up(x, weight, plan, gate, save_z)

    def down(self, a: Tensor, weight: Weight, plan: RoutingPlan) -> Tensor:
        if _fits(a) and _weight_fits(weight):
            return gemm.down(a, weight, plan)
        return super().down(a, weight, plan)

    def dgrad(self, rows: GemmRows, weight: Weight, plan: RoutingPlan) -> Tensor:
        if isinstance(rows, Tensor) and _fits(rows) and _weight_fits(weight):
            return gemm.dgrad(rows, weight, plan)
        return super().dgrad(rows, weight, plan)

    def fp8_gemm(self, weight: Weight) -> Gemm:
        assert isinstance(weight.matrix, Fp8Weight)
        here = _fp8.choice is not False and fp8.fits(weight.matrix) and _low_rank_fits(weight)
        return fp8.gemm if here else super().fp8_gemm(weight)

    def dout_rows(self, dout: Tensor, down: Matrix, plan: RoutingPlan, gate: Gate) -> Rows:
        gathered = down.shape[2] <= _GATHERED if _forced.choice is None else _forced.choice
        if gathered and _chosen(gate) and _fits(dout, down):
            return TokenRows(dout, plan.top_k)
        return super().dout_rows(dout, down, plan, gate)

    def x_rows(self, x: Tensor, gate_up: Matrix, plan: RoutingPlan) -> Rows:
        gathered = gathers_x(gate_up.shape[1]) if _forced.choice is None else _forced.choice
        return TokenRows(x, plan.top_k) if gathered and _fits(x) else super().x_rows(x, gate_up, plan)

    def down_grad(
        self,
        dout_rows: Rows,
        weight: Weight,
        z: Tensor,
        topk_weights: Tensor,
        plan: RoutingPlan,
        gate: Gate,
        overwrite_z: bool = False,
        bias_dot: Tensor | None = None,
        needs_wa: bool = True,
    ) -> DownGrads:
        rows_fit = isinstance(dout_rows, TokenRows) or _fits(dout_rows)
        run = down_grad.down_grad if _chosen(gate) and rows_fit and _weight_fits(weight) else super().down_grad
        return run(dout_rows, weight, z, topk_weights, plan, gate, overwrite_z, bias_dot, needs_wa)

    def wgrad(self, left: Rows, right: Rows, plan: RoutingPlan) -> Tensor:
        if _fits(*(rows.tokens if isinstance(rows, TokenRows) else rows for rows in (left, right))):
            return wgrad.wgrad(left, right, plan)
        return super().wgrad(left, right, plan)


def _chosen(gate: Gate) -> bool:
    """Whether gate and up are apart, or interleaved ones are to run here all the same."""
    return not gate.interleaved or _every_form.choice is True


def _fits(*tensors: Matrix) -> bool:
    """Whole matrices, aligned, whose columns (and rows, of weights) are multiples of what the kernels work on.

    Weights may be stored by rows or by columns.
    """
    for t in tensors:
        if isinstance(t, Fp8Weight) or any(n % ALIGNMENT for n in t.shape[1:]):
            return False
        if isinstance(t, PackedWeight):  # its blocks are dequantised into memory of their own
            continue
        if t.dim() == 3:
            t, _ = stored(t)
        if not t.is_contiguous() or t.numel() == 0 or t.data_ptr() % 16:
            return False
    return True


def _weight_fits(weight: Weight) -> bool:
    """The matrix, and the low-rank part."""
    if not _fits(weight.matrix) or (not by_rows(weight.matrix) and _every_form.choice is not True):
        return False
    return _low_rank_fits(weight)


def _low_rank_fits(weight: Weight) -> bool:
    """A low-rank part, if any, is aligned and of a rank that the kernels know: the op pads ranks."""
    if weight.low is None or weight.factor is None:
        return True
    parts = weight.low, weight.factor
    return weight.low.shape[1] in mainloop.RANKS and all(t.is_contiguous() and t.data_ptr() % 16 == 0 for t in parts)


_every_form: Override[bool] = Override()
#: Within ``use_every_form(True)`` interleaved experts and weights stored by columns run on these kernels too: for
#: measuring and for tests. Their epilogue has more instructions than the mainloop hides: of gpt-oss's form with LoRA,
#: layers took 1.02 and 1.05 times the Triton kernels' time (benchmarks/results/h200-log-11-forms-*.json).
use_every_form = _every_form.use

#: Intermediate sizes up to which the kernels gather rows of dO themselves. The copy costs R H, what the kernels lose
#: R H I: benchmarks/results/h*00-log-9-epilogues.json has 256 (faster) and from 704 on (as fast, or slower).
_GATHERED = 512
#: The same for columns of gate_up and rows of X, which dW1 gathers once for every tile of so many columns:
#: benchmarks/results/h200-log-17-gathered-x.json has up to 2048 (5% to none faster), 2816 (2% slower) and 3072.
_GATHERED_X = 2048


def gathers_x(columns: int) -> bool:
    """Whether dW1 gathers rows of X where gate_up has so many columns: few enough, and whole tiles of them."""
    return columns <= _GATHERED_X and columns % wgrad.WIDE == 0


#: From so many columns of gate_up on, up reads rows of X from a copy in expert order. It gains 5% of up, which the
#: copy costs where there are half as many (benchmarks/results/h200-log-18-schedules.json).
_COPIED_X = 4096


def copies_x(columns: int, plan: RoutingPlan) -> bool:
    """Whether up copies rows of X where gate_up has so many columns. An expert's last tile is half empty on average,
    and gathered all the same: a layer with few rows an expert gathers more."""
    return columns * (1 + GROUP_SIZE / 2 / max(plan.rows_per_expert, 1)) >= _COPIED_X


_forced: Override[bool] = Override()
#: Within ``use_gathered(gathered)`` the kernels gather rows of dO and X themselves, or never do: for checks, tests.
use_gathered = _forced.use

_fp8: Override[bool] = Override()
#: Within ``use_fp8(False)`` weights that are multiplied in fp8 run on the Triton kernels: for measuring and tests.
use_fp8 = _fp8.use
