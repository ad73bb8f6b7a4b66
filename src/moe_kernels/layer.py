"""One call of the op by name: its tensors, its settings, and a weight as the GEMMs take it.

Letters as in :mod:`moe_kernels.moe`; Z is 2I with a gate and I without. LoRA adds ``lora_b[e] lora_a[e]`` (PEFT's
``lora_B`` and ``lora_A``) to a weight; the product is never formed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from moe_kernels.activation import Activation, Gate
from moe_kernels.fp8 import Fp8Rows
from moe_kernels.packed import PackedWeight
from moe_kernels.routing import RoutingPlan, TokenRows, resolve_group_size

#: Rows in expert order (R, N), or the tokens to take them from.
Rows = Tensor | TokenRows
#: What a GEMM multiplies: one in fp8 takes rows that are rounded already, too.
GemmRows = Rows | Fp8Rows
#: A weight (E, N, K), or a frozen one in few bits.
Matrix = Tensor | PackedWeight


def in_expert_order(rows: Rows, plan: RoutingPlan, gather: Callable[[Tensor, RoutingPlan], Tensor]) -> Tensor:
    """Rows in expert order (R, N), by the backend's ``gather`` where they are tokens."""
    if isinstance(rows, Tensor):
        return rows
    return gather(rows.tokens, dataclasses.replace(plan, top_k=rows.top_k))


class Weight(NamedTuple):
    """What a grouped GEMM multiplies rows with: ``rows W[e]^T + low factor[e]^T + bias[e]``, in dgrad untransposed.

    Attributes:
        matrix: (E, N, K), each expert's matrix stored by rows or by columns.
        bias: (E, N).
        low: (R, r), the rows times the inner factor of the low-rank part; read only if there is a ``factor``.
        factor: the outer factor, packed (factors.py): lora_b (E, N, r), and in ``dgrad`` lora_a (E, r, K).
    """

    matrix: Matrix
    bias: Tensor | None = None
    low: Tensor | None = None
    factor: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether it is the matrix alone."""
        return self.bias is None and self.factor is None

    def of(self, first: int, last: int, matrix: Tensor) -> Weight:
        """The weight of experts ``first`` to ``last`` (exclusive), whose ``matrix`` this is."""
        bias, factor = (None if t is None else t[first:last] for t in (self.bias, self.factor))
        return Weight(matrix, bias, self.low, factor)


class AddedGrads(NamedTuple):
    """From dY (R, N), with ``Y = rows W[e]^T + low factor[e]^T + bias[e]``: the gradients of what is added.

    Attributes:
        rows: dY in expert order; as it was given where no step needs it in order.
        low: dY factor[e], (R, r); None without a factor.
        factor: (w dY)^T low of each expert, (E, N, r), contiguous, of the rank and dtype of lora_b as the caller has
            it; None where it is not needed. w = 1 without routing weights.
        bias: the sum of w dY over each expert's rows, (E, N); None where it is not needed.
        bias_dot: <dY, bias[e]> of each row, (R,) float32, which belongs to the gradient of the routing weight; None
            without a bias or without routing weights.
    """

    rows: Rows
    low: Tensor | None = None
    factor: Tensor | None = None
    bias: Tensor | None = None
    bias_dot: Tensor | None = None


class DownGrads(NamedTuple):
    """From dO, W2 and Z, the gradients on the way to the first half.

    Attributes:
        dz: (R, Z).
        wa: w A (R, I); without elements where it is not needed.
        dw: (T, K), of the routing weights.
        rounded_dz: dZ for a ``dgrad`` in fp8; None where that rounds dZ itself.
    """

    dz: Tensor
    wa: Tensor
    dw: Tensor
    rounded_dz: Fp8Rows | None = None


class Tensors(NamedTuple):
    """The tensors of a call. Shapes and dtypes as in :func:`moe_kernels.fused_experts`, already checked and cast, but
    for LoRA's factors: the op takes them as they are stored, and its steps pack them (factors.py)."""

    x: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    gate_up: Matrix
    down: Matrix
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    gate_up_lora_b: Tensor | None = None
    gate_up_lora_a: Tensor | None = None
    down_lora_b: Tensor | None = None
    down_lora_a: Tensor | None = None

    def for_second_half(self, a: Tensor, a_low: Tensor, packed_plan: Tensor) -> SecondHalfTensors:
        """What the second half of the forward takes of these tensors, with what the first half made."""
        return SecondHalfTensors(
            a, self.topk_weights, self.down, self.down_bias, self.down_lora_b, a_low, packed_plan
        )

    def for_backward(
        self, dout: Tensor, z: Tensor, x_low: Tensor, a_low: Tensor, packed_plan: Tensor
    ) -> BackwardTensors:
        """These tensors but for the ids, with dO and what the forward made."""
        lora = self.gate_up_lora_b, self.gate_up_lora_a, self.down_lora_b, self.down_lora_a
        tensors = self.x, self.topk_weights, self.gate_up, self.down, self.gate_up_bias, self.down_bias, *lora
        return BackwardTensors(dout, *tensors, z, x_low, a_low, packed_plan)


class BackwardTensors(NamedTuple):
    """What the backward takes: dO, and what the forward saved, whose shapes depend on (T, K, E, H, I) alone.

    Attributes:
        dout: (T, H), or (R, H) by slot without the sum.
        z: (R, Z); without elements if it is to be computed again.
        x_low, a_low: (R, r), X lora_a^T of gate_up and A lora_a^T of down, r padded; without elements if there is no
            LoRA.
        packed_plan: of :class:`moe_kernels.routing.RoutingPlan`.
    """

    dout: Tensor
    x: Tensor
    topk_weights: Tensor
    gate_up: Matrix
    down: Matrix
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    gate_up_lora_b: Tensor | None
    gate_up_lora_a: Tensor | None
    down_lora_b: Tensor | None
    down_lora_a: Tensor | None
    z: Tensor
    x_low: Tensor
    a_low: Tensor
    packed_plan: Tensor


class SecondHalfTensors(NamedTuple):
    """What the down projection and the sum over a token's experts take.

    Attributes:
        a: (R, I).
        a_low, packed_plan: as in :class:`BackwardTensors`.
    """

    a: Tensor
    topk_weights: Tensor
    down: Matrix
    down_bias: Tensor | None
    down_lora_b: Tensor | None
    a_low: Tensor
    packed_plan: Tensor


AnyTensors = Tensors | SecondHalfTensors | BackwardTensors


class Needs(NamedTuple):
    """Which of the floating tensors need a gradient, in their order."""

    x: bool
    topk_weights: bool
    gate_up: bool
    down: bool
    gate_up_bias: bool
    down_bias: bool
    gate_up_lora_b: bool
    gate_up_lora_a: bool
    down_lora_b: bool
    down_lora_a: bool


class Grads(NamedTuple):
    """The gradients of the floating tensors, None where none is needed."""

    x: Tensor | None = None
    topk_weights: Tensor | None = None
    gate_up: Tensor | None = None
    down: Tensor | None = None
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    gate_up_lora_b: Tensor | None = None
    gate_up_lora_a: Tensor | None = None
    down_lora_b: Tensor | None = None
    down_lora_a: Tensor | None = None


class Spec(NamedTuple):
    """The settings of a call: hashable, and with the shapes all that decides what is allocated and launched.

    Attributes:
        activation, parameters: of :class:`moe_kernels.activation.Activation`.
        group_size: rows per tile, or AUTO_GROUP_SIZE.
        gate_up_scaling, down_scaling: of :class:`moe_kernels.factors.LowRank`.
        needs_grad: a backward may follow.
    """

    activation: str
    parameters: tuple[float, ...]
    interleaved: bool
    reduce: bool
    recompute: bool
    group_size: int
    persistent: bool
    backend: str
    gate_up_scaling: float
    down_scaling: float
    needs_grad: bool

    def gate(self, tensors: Tensors | BackwardTensors) -> Gate:
        """How Z becomes A in the layer of these tensors."""
        gated = tensors.gate_up.shape[1] != tensors.down.shape[2]
        return Gate(Activation(self.activation, self.parameters), gated, self.interleaved)

    def rows_per_tile(self, rows: int, experts: int) -> int:
        """``group_size``, with "auto" resolved for R rows and E experts."""
        return resolve_group_size(self.group_size, rows, experts)

    def plan(self, t: SecondHalfTensors | BackwardTensors) -> RoutingPlan:
        """The plan of the forward's first half, unpacked."""
        (tokens, top_k), experts = t.topk_weights.shape, t.down.shape[0]
        group_size = self.rows_per_tile(tokens * top_k, experts)
        return RoutingPlan.from_packed(t.packed_plan, tokens, top_k, experts, group_size, self.persistent)


class BackwardSpec(NamedTuple):
    """Attributes:
    forward: the settings of the call.
    needs: which gradients are wanted; others cost nothing.
    overwrite_z: dZ may be written over Z.
    """

    forward: Spec
    needs: Needs
    overwrite_z: bool
