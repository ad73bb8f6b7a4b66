"""Expert layers whose frozen block-fp8 weights are multiplied in fp8, and the same arithmetic in float64."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from moe_kernels import fp8
from moe_kernels.fp8 import Fp8Weight
from moe_kernels.kernels.device import interpreting
from moe_kernels.packed import BlockFp8
from moe_kernels.tools.check.problems import Case, Inputs, make_inputs, truth
from support.packed import block_fp8

#: Relative error of sums of products of codes. Tensor cores sum 128 of them with some 14 bits (Hopper).
CLOSE = 2e-6 if interpreting() else 2e-3


def in_fp8(weight: BlockFp8) -> Fp8Weight:
    return Fp8Weight.of(weight, fp8.transposed(weight.data))


def error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def oracle(inputs: Inputs, gate_up: Fp8Weight, down: Fp8Weight) -> dict[str, Tensor]:
    """Output and gradients in float64, with the roundings to e4m3 of the layer and no other."""
    found = truth(dataclasses.replace(inputs, gate_up=gate_up, down=down))
    return {name if name == "out" else name.removeprefix("d"): value for name, value in found.items()}


def make(case: Case, device: torch.device) -> tuple[Inputs, Fp8Weight, Fp8Weight]:
    inputs = make_inputs(case, device)
    rows = case.intermediate * (2 if case.gated else 1)
    gate_up = block_fp8(case.experts, rows, case.hidden, device, 2 if case.gated else 1, case.dtype)
    down = block_fp8(case.experts, case.hidden, case.intermediate, device, dtype=case.dtype, seed=1)
    if inputs.topk_weights is not None:
        weights = torch.rand(inputs.topk_weights.shape, generator=torch.Generator().manual_seed(2)) + 0.25
        inputs = dataclasses.replace(inputs, topk_weights=weights.to(inputs.topk_weights))
    return inputs, in_fp8(gate_up), in_fp8(down)
