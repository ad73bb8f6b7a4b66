"""Tensors that have shapes and no data: on meta, in FakeTensorMode, and what make_fx records of real ones."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import make_fx

from moe_kernels.tools.check.problems import Case, call, make_inputs

SMALL = Case(tokens=9, top_k=2, experts=3, hidden=32, intermediate=16, dtype=torch.bfloat16)
CASES = {
    "plain": SMALL,
    "by columns": Case(**{**SMALL.__dict__, "transposed": True, "weights_dtype": torch.bfloat16}),
    "everything": Case(**{**SMALL.__dict__, "bias": True, "lora_rank": 4, "interleaved": True, "transposed": True}),
    "no gate, no sum": Case(**{**SMALL.__dict__, "gated": False, "activation": "gelu", "reduce": False}),
    "no tokens": Case(**{**SMALL.__dict__, "tokens": 0}),
}


def results(experts, inputs, convert, **options):
    """Output and every gradient of leaves that ``convert`` made."""
    leaves = {name: convert(t).requires_grad_() for name, t in inputs.leaves().items()}
    changed = {name: leaves.pop(name) for name in list(leaves) if name not in inputs.extras}
    changed |= {"topk_ids": convert(inputs.topk_ids), "extras": leaves, "options": inputs.options | options}
    out = call(experts, type(inputs)(**{**inputs.__dict__, **changed}))
    wanted = [t for t in (*changed.values(), *leaves.values()) if isinstance(t, torch.Tensor) and t.requires_grad]
    return out, *torch.autograd.grad(out, wanted, convert(inputs.grad).to(out.dtype))


def described(tensors):
    return [(tuple(t.shape), t.dtype, t.stride()) for t in tensors]


def fake(mode):
    def convert(t):
        with unset_fake_temporarily():
            return mode.from_tensor(t.detach())

    return convert


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ["meta", "fake", "fake, its mode left"])
def test_shapes_forward_and_backward(experts, device, kind, name, recompute):
    inputs = make_inputs(CASES[name], device)
    wanted = described(results(experts, inputs, torch.Tensor.detach, recompute=recompute))
    mode = FakeTensorMode()
    if kind == "meta":
        found = results(experts, inputs, lambda t: t.to("meta"), recompute=recompute)
    elif kind == "fake":
        with mode:
            found = results(experts, inputs, fake(mode), recompute=recompute)
    else:
        found = results(experts, inputs, fake(mode), recompute=recompute)
    assert described(found) == wanted
    assert {t.device.type for t in found} == {"meta" if kind == "meta" else device.type}


def test_shapes_under_autocast(experts, device):
    """In FakeTensorMode autocast is that of the device; tensors on meta are left alone, as torch's own ops do."""
    inputs = make_inputs(Case(**{**SMALL.__dict__, "dtype": torch.float32}), device)
    mode = FakeTensorMode()
    with torch.autocast(device.type, torch.bfloat16):
        wanted = described(results(experts, inputs, torch.Tensor.detach))
        with mode:
            assert described(results(experts, inputs, fake(mode))) == wanted
        assert described(results(experts, inputs, lambda t: t.to("meta"))) == wanted


def test_tensors_of_a_gpu_that_is_not_here(experts):
    with FakeTensorMode(), torch.no_grad():
        inputs = make_inputs(SMALL)
        tensors = (inputs.x, inputs.topk_ids, inputs.topk_weights, inputs.gate_up, inputs.down)
        out = experts(*(torch.empty_like(t, device="cuda") for t in tensors))
    assert (out.shape, out.dtype, out.device.type) == (inputs.x.shape, torch.bfloat16, "cuda")


@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_shapes_of_second_derivatives(experts, device, kind):
    inputs, mode = make_inputs(SMALL, device), FakeTensorMode()
    convert = fake(mode) if kind == "fake" else lambda t: t.to("meta")
    tensors = (inputs.x, inputs.topk_weights, inputs.gate_up, inputs.down)
    leaves, ids = [convert(t).requires_grad_() for t in tensors], convert(inputs.topk_ids)
    first = torch.autograd.grad(experts(leaves[0], ids, *leaves[1:]).sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.sum() for g in first), leaves)
    assert [g.shape for g in first] == [g.shape for g in second] == [t.shape for t in tensors]


@pytest.mark.plain_memory
@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
def test_make_fx_records_the_steps(experts, device, tracing_mode):
    """Kernels that run while a graph is recorded would leave no trace in it."""
    inputs = make_inputs(SMALL, device)

    def gradients(x, ids, weights, gate_up, down):
        out = experts(x, ids, weights, gate_up, down)
        return out, *torch.autograd.grad(out, (x, weights, gate_up, down), torch.ones_like(out))

    def leaves(seed):
        i = make_inputs(Case(**{**SMALL.__dict__, "seed": seed}), device)
        floating = [t.requires_grad_() for t in (i.x, i.topk_weights, i.gate_up, i.down)]
        return floating[0], i.topk_ids, *floating[1:]

    graph = make_fx(gradients, tracing_mode=tracing_mode)(*leaves(0))
    for ours, theirs in zip(graph(*leaves(1)), gradients(*leaves(1)), strict=True):
        assert torch.equal(ours, theirs)
    assert inputs.x.shape == graph(*leaves(1))[0].shape
