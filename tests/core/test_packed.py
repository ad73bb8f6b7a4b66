"""Experts in 4 bits against the same experts dequantised at once, and the kernels that read them."""

import dataclasses

import pytest
import torch

from moe_kernels import fused_experts
from moe_kernels import packed as packed_weights
from moe_kernels.kernels.triton.dequantize import dequantize
from moe_kernels.kernels.triton.plan import make_plan, part_of
from moe_kernels.tools.check.problems import Case, make_inputs
from moe_kernels.tools.check.routings import ROUTINGS, make_routing
from support.packed import packed
from support.tiles import use_small_tiles

BACKENDS = ["torch", "triton"]


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16], ids=str)
def test_the_kernels_values_are_bitwise_torchs(device, nested, stored):
    weight = dataclasses.replace(packed(5, 48, 96, device, nested), stored=stored)
    whole = weight.experts(0, 5)
    assert whole.unique().numel() > 100
    for first, last in ((0, 5), (0, 2), (2, 5), (4, 5)):
        assert torch.equal(dequantize(weight, first, last), whole[first:last])
        assert torch.equal(dequantize(weight.mT, first, last), whole[first:last].mT)


@pytest.mark.parametrize("name", ROUTINGS)
def test_the_tiles_of_a_part(device, name):
    experts, group_size = 7, 64
    ids, _ = make_routing(name, 389, 2, experts)
    plan = make_plan(ids.to(device), experts, group_size)
    count = int(plan.tile_count)
    tiles = list(zip(plan.tile_expert[:count].tolist(), plan.tile_row[:count].tolist(), strict=True))
    for first, last in ((0, 7), (0, 3), (3, 4), (4, 7)):
        part = part_of(plan, first, last)
        count = int(part.tile_count)
        found = zip(part.tile_expert[:count].tolist(), part.tile_row[:count].tolist(), strict=True)
        assert list(found) == [(expert - first, row) for expert, row in tiles if first <= expert < last]
        assert part.expert_start.tolist() == plan.expert_start[first : last + 1].tolist()
        assert (part.rows_per_expert, part.rows) == (plan.rows_per_expert, plan.rows)


KINDS = {
    "plain": Case(19, 2, 5, 64, 32, torch.float32, "sentinels"),
    "lora": Case(23, 2, 5, 64, 32, torch.float32, "empty_first_middle_last", bias=True, lora_rank=4),
    "gateless": Case(19, 3, 5, 64, 32, torch.float32, "zipf", gated=False, activation="relu2"),
}


def results(inputs, gate_up, down, backend, **others):
    own = inputs.with_own_leaves()
    extras = dict(own.extras)
    arguments = own.options | others | {"backend": backend}
    for name in ("gate_up_lora", "down_lora"):
        if f"{name}_b" in extras:
            arguments[name] = extras.pop(f"{name}_b"), extras.pop(f"{name}_a")
    out = fused_experts(own.x, own.topk_ids, own.topk_weights, gate_up, down, **arguments, **extras)
    out.backward(inputs.grad)
    return {"out": out.detach()} | {name: t.grad for name, t in own.leaves().items() if t.grad is not None}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("by_columns", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_whole_weight(device, backend, kind, by_columns, monkeypatch):
    """Blocks of two and of four experts, the last of fewer."""
    case = KINDS[kind]
    inputs = make_inputs(case, device)
    experts, width = case.experts, (2 if case.gated else 1) * case.intermediate
    sizes = [(width, case.hidden), (case.hidden, case.intermediate)]
    gate_up, down = (packed(experts, *(s[::-1] if by_columns else s), device, seed=i) for i, s in enumerate(sizes))
    if by_columns:
        gate_up, down = gate_up.mT, down.mT
    monkeypatch.setattr(packed_weights, "BLOCK_BYTES", 2 * width * case.hidden * 4)
    with use_small_tiles():
        for others in ({}, {"recompute": True}):
            found = results(inputs, gate_up, down, backend, **others)
            expected = results(inputs, gate_up.experts(0, experts), down.experts(0, experts), backend, **others)
            for name, value in expected.items():
                assert value.abs().max() > 0, name
                torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def test_one_weight_in_4_bits_and_the_other_trained(device):
    inputs = make_inputs(KINDS["plain"], device)
    gate_up, down = packed(5, 64, 64, device), inputs.down.detach().clone().requires_grad_()
    out = fused_experts(inputs.x, inputs.topk_ids, inputs.topk_weights, gate_up, down, backend="triton")
    out.backward(inputs.grad)
    grad, down.grad = down.grad, None
    whole = gate_up.experts(0, 5)
    fused_experts(inputs.x, inputs.topk_ids, inputs.topk_weights, whole, down, backend="triton").backward(inputs.grad)
    torch.testing.assert_close(grad, down.grad)


def test_wrong_sizes_are_refused(device):
    inputs = make_inputs(KINDS["plain"], device)
    with pytest.raises(ValueError, match="sizes disagree"):
        fused_experts(inputs.x, inputs.topk_ids, inputs.topk_weights, packed(5, 62, 64, device), inputs.down)


@pytest.mark.plain_memory
def test_second_derivatives_and_compiled_calls_take_the_whole(device):
    inputs = make_inputs(KINDS["plain"], device)
    gate_up, down = packed(5, 64, 64, device), packed(5, 64, 32, device, seed=1)

    def call(x, *weights):
        return fused_experts(x, inputs.topk_ids, inputs.topk_weights, *weights, backend="torch")

    x = inputs.x.detach().requires_grad_()
    expected = call(x, gate_up.experts(0, 5), down.experts(0, 5))
    [grad] = torch.autograd.grad(call(x, gate_up, down), x, inputs.grad, create_graph=True)
    [want] = torch.autograd.grad(expected, x, inputs.grad, create_graph=True)
    torch.testing.assert_close(grad, want)
    compiled = torch.compile(lambda x: call(x, gate_up, down), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
