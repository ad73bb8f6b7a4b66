"""The Gluon backend, for Hopper: the Triton backend with warp-specialised GEMMs.

Rows of X are gathered inside the up projection, and rows of dO inside the backward where experts are small. The
backward of the activation is the epilogue of a GEMM. Steps that these kernels do not cover (a bias, a low-rank part,
column-major weights, interleaved gate and up, no gate) run on the Triton backend's kernels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import triton

from moe_kernels import trial, triton_backend
from moe_kernels.activation import Gate
from moe_kernels.backends import Problem
from moe_kernels.kernels.hopper import gluon_names
from moe_kernels.kernels.operands import LowRank
from moe_kernels.kernels.tiles import config
from moe_kernels.routing import RoutingPlan, TokenRows
from moe_kernels.triton_backend import combine, combine_grad, expert_sum, gather, make_plan, up_low

_LACKS = gluon_names.lacks()
if _LACKS is None:  # else `why_not` says so, and nothing below is called
    from moe_kernels.kernels.hopper import down_grad as hopper_down_grad
    from moe_kernels.kernels.hopper import gemm
    from moe_kernels.kernels.hopper import wgrad as hopper_wgrad

NAME = "gluon"
COMPILES = True  # before its first launch: its kernels are compiled side by side ahead of that
GROUP_SIZE = 128  # rows per tile
ALIGNMENT = 64  # of hidden and intermediate sizes: the length of a k block, and the columns per store
__all__ = [
    "COMPILES",
    "NAME",
    "combine",
    "combine_grad",
    "dgrad",
    "dout_rows",
    "down",
    "down_grad",
    "expert_sum",
    "gather",
    "make_plan",
    "up",
    "up_low",
    "wgrad",
    "why_not",
]


def why_not(problem: Problem) -> str | None:
    """None if these kernels run ``problem``, else the reason and the cure."""
    reason = triton_backend.why_not(problem)
    if reason is not None:
        return reason
    if problem.capability is None or problem.capability[0] != 9:
        return "it is written for Hopper (H100, H200): use backend='triton'."
    if _LACKS is not None:
        return f"the Gluon of triton {triton.__version__} has no {_LACKS}: use backend='triton', or install triton " \
               f"{' or '.join(gluon_names.TRIED)}."  # fmt: skip
    if problem.dtype == torch.float32:
        return "it multiplies 16-bit numbers: use backend='triton' for float32."
    if problem.group_size != GROUP_SIZE or not problem.persistent:
        return f"its kernels are persistent, on tiles of {GROUP_SIZE} rows: set moe_group_size: {GROUP_SIZE} and " \
               "moe_persistent_kernel: true, or use backend='triton'."  # fmt: skip
    if problem.hidden % ALIGNMENT or problem.intermediate % ALIGNMENT:
        return f"hidden size {problem.hidden} or intermediate size {problem.intermediate} is no multiple of " \
               f"{ALIGNMENT}: use backend='triton'."  # fmt: skip
    if gluon_names.release() not in gluon_names.TRIED:  # last: it takes a minute, once
        refusal = trial.refusal(torch.device("cuda", torch.cuda.current_device()))
        if refusal is not None:
            return f"triton {triton.__version__} is newer than any tried with it, and {refusal}: use " \
                   "backend='triton'."  # fmt: skip
    return None


def _fits(*tensors: torch.Tensor) -> bool:
    """Whole matrices, aligned, whose columns (and rows, of weights) are multiples of what the kernels work on."""
    for t in tensors:
        sizes = t.shape[1:]
        if not t.is_contiguous() or t.numel() == 0 or t.data_ptr() % 16 or any(n % ALIGNMENT for n in sizes):
            return False
    return True


def up(
    x: torch.Tensor,
    weight: torch.Tensor,
    plan: RoutingPlan,
    gate: Gate,
    persistent: bool,
    save_z: bool,
    bias: torch.Tensor | None = None,
    low_rank: LowRank | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`moe_kernels.triton_backend.up`."""
    if bias is None and low_rank is None and gate.gated and not gate.interleaved and _fits(x, weight):
        return gemm.up(x, weight, plan, gate, save_z)
    return triton_backend.up(x, weight, plan, gate, persistent, save_z, bias, low_rank)


def down(
    a: torch.Tensor,
    weight: torch.Tensor,
    plan: RoutingPlan,
    persistent: bool,
    bias: torch.Tensor | None = None,
    low_rank: LowRank | None = None,
) -> torch.Tensor:
    """As :func:`moe_kernels.triton_backend.down`."""
    if bias is None and low_rank is None and _fits(a, weight):
        return gemm.down(a, weight, plan)
    return triton_backend.down(a, weight, plan, persistent, bias, low_rank)


def dgrad(
    rows: torch.Tensor, weight: torch.Tensor, plan: RoutingPlan, persistent: bool, low_rank: LowRank | None = None
) -> torch.Tensor:
    """As :func:`moe_kernels.triton_backend.dgrad`."""
    if low_rank is None and _fits(rows, weight):
        return gemm.dgrad(rows, weight, plan)
    return triton_backend.dgrad(rows, weight, plan, persistent, low_rank)


#: Intermediate sizes up to which the kernels gather rows of dO themselves. The copy costs R H, what the kernels lose
#: R H I: benchmarks/results/h*00-log-9-epilogues.json has 256 (faster) and from 704 on (as fast, or slower).
_GATHERED = 512
_forced: dict[str, bool] = {}


@contextlib.contextmanager
def use_gathered(gathered: bool) -> Iterator[None]:
    """Within this context the kernels gather rows of dO themselves, or never do: for checks and tests."""
    with config.override(_forced, "dout", gathered):
        yield


def dout_rows(
    dout: torch.Tensor, weight: torch.Tensor, plan: RoutingPlan, gate: Gate, plain: bool
) -> torch.Tensor | TokenRows:
    """dO (T, H) for ``down_grad`` and the gradient of W2: in expert order (R, H), or for small experts as it is.

    plain: no bias and no low-rank part, whose gradients need rows in expert order.
    """
    plain = plain and gate.gated and not gate.interleaved
    if plain and _forced.get("dout", weight.shape[2] <= _GATHERED) and _fits(dout, weight):
        return TokenRows(dout, plan.top_k)
    return gather(dout, plan)


def down_grad(
    dout_rows: torch.Tensor | TokenRows,
    weight: torch.Tensor,
    z: torch.Tensor,
    topk_weights: torch.Tensor,
    plan: RoutingPlan,
    gate: Gate,
    persistent: bool,
    overwrite_z: bool = False,
    bias: torch.Tensor | None = None,
    low_rank: LowRank | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As :func:`moe_kernels.triton_backend.down_grad`."""
    plain = bias is None and low_rank is None and gate.gated and not gate.interleaved
    if isinstance(dout_rows, TokenRows) or (plain and _fits(dout_rows, weight)):
        return hopper_down_grad.down_grad(dout_rows, weight, z, topk_weights, plan, gate, overwrite_z)
    return triton_backend.down_grad(
        dout_rows, weight, z, topk_weights, plan, gate, persistent, overwrite_z, bias, low_rank
    )


def wgrad(left: torch.Tensor | TokenRows, right: torch.Tensor, plan: RoutingPlan) -> torch.Tensor:
    """As :func:`moe_kernels.triton_backend.wgrad`; ``left`` may be what :func:`dout_rows` gives."""
    if isinstance(left, TokenRows) or _fits(left, right):
        return hopper_wgrad.wgrad(left, right, plan)
    return triton_backend.wgrad(left, right, plan)
