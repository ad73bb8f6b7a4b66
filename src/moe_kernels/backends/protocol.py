"""What a backend is: the steps of :mod:`moe_kernels.steps`, and when it can run them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from moe_kernels.activation import Gate
from moe_kernels.factors import LowRank, packed
from moe_kernels.layer import AddedGrads, DownGrads, GemmRows, Matrix, Rows, Weight, in_expert_order
from moe_kernels.problem import Problem
from moe_kernels.routing import RoutingPlan


@runtime_checkable
class Backend(Protocol):
    """The steps of one layer. Subclass it: mypy then checks them, and Python that none is missing.

    Sorted rows are rows in expert order. Rows from ``plan.expert_start[-1]`` on belong to no expert: what a step
    writes there is never read.

    Attributes:
        name: what ``backend=`` calls it.
    """

    name: str

    @abstractmethod
    def why_not(self, problem: Problem) -> str | None:
        """None, or one sentence with the reason and the cure. Everything it accepts must run."""

    @abstractmethod
    def make_plan(self, topk_ids: Tensor, experts: int, group_size: int, persistent: bool = True) -> RoutingPlan:
        """Step 0: stable sort of the slots (T, K) by expert, and the tiles of the sorted rows."""

    @abstractmethod
    def up(self, x: Tensor, weight: Weight, plan: RoutingPlan, gate: Gate, save_z: bool) -> tuple[Tensor, Tensor]:
        """Step 1, of x (T, H): Z = X[row_token] W1[e]^T (R, Z), empty unless save_z, and A = f(Z) (R, I)."""

    @abstractmethod
    def low(self, rows: Rows, lora_a: Tensor, plan: RoutingPlan) -> Tensor:
        """rows lora_a[e]^T, the inner product of a low-rank part: (R, K), lora_a (E, r, K) -> (R, r)."""

    @abstractmethod
    def down(self, a: Tensor, weight: Weight, plan: RoutingPlan) -> Tensor:
        """Step 2: Y = A W2[e]^T: a (R, I), weight (E, H, I) -> (R, H)."""

    @abstractmethod
    def combine(self, y: Tensor, topk_weights: Tensor, plan: RoutingPlan) -> Tensor:
        """Step 3: O[t] = sum_k w(t,k) Y[slot_row(t,k)] (T, H); dropped slots add nothing."""

    @abstractmethod
    def gather(self, x: Tensor, plan: RoutingPlan) -> Tensor:
        """Xs[r] = X[row_token]: (T, H) -> (R, H)."""

    def dout_rows(self, dout: Tensor, down: Matrix, plan: RoutingPlan, gate: Gate) -> Rows:
        """dO (T, H) as ``down_grad`` and ``wgrad`` take it: sorted, or TokenRows that they gather themselves.

        Called where W2 ``down`` (E, H, I) has neither bias nor low-rank part, whose gradients need sorted rows.
        """
        return self.gather(dout, plan)

    def x_rows(self, x: Tensor, gate_up: Matrix, plan: RoutingPlan) -> Rows:
        """X (T, H) as ``wgrad`` takes it for the gradient of W1 ``gate_up`` (E, Z, H): as in ``dout_rows``."""
        return self.gather(x, plan)

    @abstractmethod
    def dgrad(self, rows: GemmRows, weight: Weight, plan: RoutingPlan) -> Tensor:
        """rows W[e]: dA0 from dOs (R, H) and W2 (E, H, I), or dXr from dZ (R, Z) and W1 (E, Z, H).

        ``rows`` are in expert order, or what ``down_grad`` rounded of them.
        """

    @abstractmethod
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
        """Step 4, from dO, W2 and Z: dZ, written over Z if overwrite_z; wA, empty unless needs_wa; and dw.

        ``bias_dot`` (R,) of :class:`AddedGrads` is added to dw.
        """

    @abstractmethod
    def wgrad(self, left: Rows, right: Rows, plan: RoutingPlan) -> Tensor:
        """Steps 5 and 8, (R, M), (R, N) -> (E, M, N): left[rows of e]^T right[rows of e]; zeros without rows.

        One of the two may be what ``dout_rows`` or ``x_rows`` returned.
        """

    @abstractmethod
    def combine_grad(self, dxr: Tensor, plan: RoutingPlan) -> Tensor:
        """Step 7: dX[t] = sum_k dXr[slot_row(t,k)] (T, H)."""

    @abstractmethod
    def added_grads(
        self,
        dy: Rows,
        weight: Weight,
        plan: RoutingPlan,
        lora_b: Tensor | None,
        needs_bias: bool,
        topk_weights: Tensor | None = None,
    ) -> AddedGrads:
        """The gradients of what ``weight`` (E, N, K) of the forward adds to its matrix, from dY (R, N).

        ``lora_b`` (E, N, r) is the factor as the caller has it, if its gradient is needed. With topk_weights (T, K),
        dY is dO: not weighted yet.
        """

    def lora_a_grad(self, low: Tensor, rows: Rows, plan: RoutingPlan, lora_a: Tensor, scaling: float = 1.0) -> Tensor:
        """scaling low[rows of e]^T rows[rows of e]: low (R, RANK), rows (R, K) -> (E, r, K), contiguous, in the rank
        and dtype of ``lora_a``, the factor as the caller has it; zeros without rows. RANK is r, padded.

        By ``wgrad``, which rounds to the dtype of the rows first, unless a backend says otherwise.
        """
        grad = self.wgrad(low, in_expert_order(rows, plan, self.gather), plan)
        return (grad[:, : lora_a.shape[1]] * scaling).to(lora_a.dtype).contiguous()

    def pack_factors(
        self, parts: Sequence[LowRank], dtype: torch.dtype
    ) -> list[tuple[Tensor | None, Tensor | None]]:
        """LoRA's factors of one or two weights as the other steps take them: lora_b (E, N, RANK) and the scaled
        lora_a (E, RANK, K), contiguous, in ``dtype``, with zeros up to the padded rank."""
        return [
            (None if b is None else packed(b, dtype, 2), None if a is None else packed(a, dtype, 1, scaling))
            for b, a, scaling in parts
        ]

    def experts_last(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """One or two gradients of lora_b (E, N, r), contiguous, in the memory order (N, r, E) of PEFT's factors."""
        return [grad.permute(1, 2, 0).contiguous().permute(2, 0, 1) for grad in grads]
