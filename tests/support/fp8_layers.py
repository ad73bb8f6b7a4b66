"""Expert layers whose frozen block-fp8 weights are multiplied in fp8, and the same arithmetic in float64."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from moe_kernels import fp8
from moe_kernels.activation import Activation, Gate
from moe_kernels.fp8 import Fp8Weight
from moe_kernels.kernels.device import interpreting
from moe_kernels.packed import BlockFp8
from moe_kernels.tools.check.problems import Case, Inputs, make_inputs
from support.packed import block_fp8

#: Relative error of sums of products of codes. Tensor cores sum 128 of them with some 14 bits (Hopper).
CLOSE = 2e-6 if interpreting() else 2e-3


def in_fp8(weight: BlockFp8) -> Fp8Weight:
    return Fp8Weight.of(weight, fp8.transposed(weight.data))


def error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


class Up(torch.autograd.Function):
    """Rounded rows times the weight; the gradient of the rows from rounded rows too."""

    @staticmethod
    def forward(ctx, x, weight, stacked):
        ctx.weight, ctx.stacked = weight, stacked
        return fp8.rounded(x).double() @ weight.T

    @staticmethod
    def backward(ctx, dz):
        return fp8.rounded(dz, ctx.stacked).double() @ ctx.weight, None, None


class Down(torch.autograd.Function):
    """w times rounded rows times the weight. The gradient of w is <dA before w, A>."""

    @staticmethod
    def forward(ctx, a, weight, w):
        ctx.save_for_backward(a, weight, w)
        return w[:, None] * (fp8.rounded(a).double() @ weight.T)

    @staticmethod
    def backward(ctx, dy):
        a, weight, w = ctx.saved_tensors
        da = fp8.rounded(dy).double() @ weight
        return da * w[:, None], None, (da * a).sum(1)


def oracle(inputs: Inputs, gate_up: Fp8Weight, down: Fp8Weight) -> dict[str, Tensor]:
    """Output and gradients in float64, with the roundings to e4m3 of the layer and no other."""
    own = inputs.to(torch.float64).with_own_leaves()
    extras, options = own.extras, dict(own.options)
    gate = Gate(Activation.of(options.get("activation", "silu")), gate_up.shape[1] != down.shape[2])
    out = torch.zeros_like(own.x)
    for e in range(gate_up.shape[0]):
        w1, w2 = gate_up.to(torch.float64)[e], down.to(torch.float64)[e]
        tokens, slots = (own.topk_ids == e).nonzero(as_tuple=True)
        x, w = own.x[tokens], own.topk_weights[tokens, slots]
        z = Up.apply(x, w1, gate_up.stacked)
        if "gate_up_lora_b" in extras:
            z = z + x @ extras["gate_up_lora_a"][e].T @ extras["gate_up_lora_b"][e].T
        if "gate_up_bias" in extras:
            z = z + extras["gate_up_bias"][e]
        a = gate.value(z)
        y = Down.apply(a, w2, w)
        if "down_lora_b" in extras:
            y = y + w[:, None] * (a @ extras["down_lora_a"][e].T @ extras["down_lora_b"][e].T)
        if "down_bias" in extras:
            y = y + w[:, None] * extras["down_bias"][e]
        out = out.index_add(0, tokens, y)
    out.backward(own.grad)
    return {"out": out.detach()} | {name: t.grad for name, t in own.leaves().items() if t.grad is not None}


def make(case: Case, device: torch.device) -> tuple[Inputs, Fp8Weight, Fp8Weight]:
    inputs = make_inputs(case, device)
    rows = case.intermediate * (2 if case.gated else 1)
    gate_up = block_fp8(case.experts, rows, case.hidden, device, 2 if case.gated else 1, case.dtype)
    down = block_fp8(case.experts, case.hidden, case.intermediate, device, dtype=case.dtype, seed=1)
    weights = torch.rand(inputs.topk_weights.shape, generator=torch.Generator().manual_seed(2)) + 0.25
    return dataclasses.replace(inputs, topk_weights=weights.to(inputs.topk_weights)), in_fp8(gate_up), in_fp8(down)
