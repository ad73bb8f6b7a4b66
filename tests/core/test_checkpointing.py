"""Gradient checkpointing around the op: what is computed again, and that gradients are bitwise those without it."""

import collections
import functools
import sys

import pytest
import torch
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import moe_kernels
from moe_kernels import backends, checkpointing, steps
from moe_kernels.tools.check.problems import Case, call, make_inputs
from support.packed import packed

SMALL = Case(tokens=9, top_k=2, experts=3, hidden=32, intermediate=16, dtype=torch.bfloat16)
LORA = {"bias": True, "lora_rank": 4}
KINDS = {
    "plain": {},
    "unreduced": {"reduce": False},
    "biases and LoRA": LORA,
    "biases and LoRA, unreduced": LORA | {"reduce": False},
    "no gate": {"gated": False, "activation": "relu2"},
    "no token has an expert": {"routing": "all_sentinels"},
    "no tokens": {"tokens": 0},
}
kinds = pytest.mark.parametrize("kind", KINDS)
STEPS = "make_plan", "up", "low", "down", "combine"


def inputs_of(kind, device):
    return make_inputs(Case(**(SMALL.__dict__ | KINDS[kind])), device)


@pytest.fixture
def counted(backend, monkeypatch):
    """How often each step of the forward ran."""
    counts, instance = collections.Counter(), backends.load(backend)

    def counting(step, run):
        def counted(*args, **kwargs):
            counts[step] += sys._getframe(1).f_globals is vars(steps)  # the torch backend calls itself too
            return run(*args, **kwargs)

        return counted

    for step in STEPS:
        monkeypatch.setattr(instance, step, counting(step, getattr(instance, step)))
    return counts


def checkpointed(experts, **options):
    return lambda *args, **kwargs: checkpoint(experts, *args, use_reentrant=False, **options, **kwargs)


def results(experts, inputs, wanted=None, after=lambda out: out):
    """Output, and the gradient of every tensor that is ``wanted``."""
    own = inputs.with_own_leaves(wanted)
    out = after(call(experts, own))
    out.backward(inputs.grad)
    return {"out": out.detach()} | {name: leaf.grad for name, leaf in own.leaves().items()}


def assert_bitwise(some, others):
    assert some.keys() == others.keys()
    for name, value in some.items():
        assert (value is None) == (others[name] is None), name
        assert value is None or torch.equal(value, others[name]), name


@kinds
def test_nothing_is_computed_again_after_what_is_saved(experts, device, kind, counted):
    inputs = inputs_of(kind, device)
    expected = results(experts, inputs)
    once = counted.copy()
    assert once["down"] == once["combine"] == 1
    counted.clear()
    assert_bitwise(results(checkpointed(experts), inputs), expected)
    again = {"make_plan", "up", "low"}
    assert counted == {step: times * (2 if step in again else 1) for step, times in once.items()}


@pytest.mark.parametrize(
    "wanted", [("x",), ("gate_up_lora_a", "down_lora_b"), ("down",), ("topk_weights", "down_bias")], ids="+".join
)
def test_of_a_frozen_base(experts, device, counted, wanted):
    inputs = inputs_of("biases and LoRA", device)
    expected = results(experts, inputs, wanted)
    counted.clear()
    assert_bitwise(results(checkpointed(experts), inputs, wanted), expected)
    assert (counted["up"], counted["down"]) == (2, 1)


def test_of_weights_in_4_bits(backend, device, counted):
    gate_up, down = (packed(SMALL.experts, 32, columns, device, dtype=SMALL.dtype) for columns in (32, 16))
    inputs = make_inputs(SMALL, device)

    def experts(x, ids, topk_weights, *_):
        return moe_kernels.fused_experts(x, ids, topk_weights, gate_up, down, backend=backend)

    wanted = "x", "topk_weights"
    expected = results(experts, inputs, wanted)
    counted.clear()
    assert_bitwise(results(checkpointed(experts), inputs, wanted), expected)
    assert (counted["up"], counted["down"]) == (2, 1)


def test_with_recompute(experts, device, counted):
    """Z is not kept in the checkpoint either, so that up runs a third time."""
    experts = functools.partial(experts, recompute=True)
    inputs = inputs_of("biases and LoRA", device)
    expected = results(experts, inputs)
    counted.clear()
    assert_bitwise(results(checkpointed(experts), inputs), expected)
    assert (counted["up"], counted["down"]) == (3, 1)


def test_where_the_region_saves_more_after_the_experts(experts, device, counted):
    """As a shared expert that follows does: all is computed again, and is right."""
    inputs = inputs_of("plain", device)

    def layer(*args, **kwargs):
        return experts(*args, **kwargs).float().square().to(SMALL.dtype)

    expected = results(layer, inputs)
    counted.clear()
    assert_bitwise(results(checkpointed(layer), inputs), expected)
    assert (counted["up"], counted["down"]) == (2, 2)


def test_two_layers_in_a_region(experts, device, counted):
    inputs = inputs_of("biases and LoRA", device)

    def layers(x, *args, **kwargs):
        return experts(experts(x, *args, **kwargs), *args, **kwargs)

    expected = results(layers, inputs)
    counted.clear()
    assert_bitwise(results(checkpointed(layers), inputs), expected)
    assert (counted["up"], counted["down"]) == (4, 3)


def test_without_early_stop(experts, device, counted):
    inputs = inputs_of("biases and LoRA", device)
    expected = results(experts, inputs)
    counted.clear()
    with set_checkpoint_early_stop(False):
        assert_bitwise(results(checkpointed(experts), inputs), expected)
    assert (counted["up"], counted["down"]) == (2, 2)


@kinds
def test_the_same_is_saved_with_hooks_as_without(experts, device, kind, monkeypatch):
    inputs, kept = inputs_of(kind, device), []

    def keep(t):
        kept.append((tuple(t.shape), t.dtype))
        return t

    with saved_tensors_hooks(keep, lambda t: t):
        expected = results(experts, inputs)
    in_halves, kept[:] = kept.copy(), []
    monkeypatch.setattr(moe_kernels.moe, "saves_through_hooks", lambda: False)
    with saved_tensors_hooks(keep, lambda t: t):
        assert_bitwise(results(experts, inputs), expected)
    assert kept == in_halves


def test_kept_on_the_cpu(experts, device):
    inputs = inputs_of("biases and LoRA", device)
    expected = results(experts, inputs)
    with save_on_cpu():
        assert_bitwise(results(experts, inputs), expected)


@pytest.mark.parametrize("around", ["hooks", "checkpoint"])
def test_second_derivatives(device, around):
    inputs = make_inputs(Case(**(SMALL.__dict__ | LORA | {"dtype": torch.float64})), device)
    experts = functools.partial(moe_kernels.fused_experts, backend="torch")

    def twice(layer):
        own = inputs.with_own_leaves()
        leaves = list(own.leaves().values())
        grads = torch.autograd.grad(call(layer, own), leaves, inputs.grad, create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in grads), leaves)

    expected = twice(experts)
    if around == "checkpoint":
        found = twice(checkpointed(experts))
    else:
        with saved_tensors_hooks(lambda t: t, lambda t: t):
            found = twice(experts)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_backward_twice_over_halves(experts, device):
    inputs = inputs_of("biases and LoRA", device)
    own = inputs.with_own_leaves()
    with saved_tensors_hooks(lambda t: t, lambda t: t):
        out = call(experts, own)
    leaves = list(own.leaves().values())
    first = torch.autograd.grad(out, leaves, inputs.grad, retain_graph=True)
    second = torch.autograd.grad(out, leaves, inputs.grad)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_several_gradients_at_a_time_over_halves(device):
    inputs = make_inputs(SMALL, device)
    own = inputs.with_own_leaves()
    experts = functools.partial(moe_kernels.fused_experts, backend="torch")
    grads = torch.stack([inputs.grad, 2 * inputs.grad])
    with saved_tensors_hooks(lambda t: t, lambda t: t):
        out = call(experts, own)
    [found] = torch.autograd.grad(out, own.x, grads, is_grads_batched=True)
    [expected] = torch.autograd.grad(call(experts, own), own.x, grads, is_grads_batched=True)
    assert torch.equal(found, expected)


@pytest.mark.plain_memory
def test_compiled_inside_a_checkpoint(experts, device):
    torch._dynamo.reset()
    inputs = inputs_of("plain", device)
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    assert_bitwise(results(checkpointed(compiled), inputs), results(experts, inputs))


def test_the_hooks_are_seen():
    """What torch is asked has no public name: this fails where a release drops it."""
    assert checkpointing.saves_through_hooks() is False
    with saved_tensors_hooks(lambda t: t, lambda t: t):
        assert checkpointing.saves_through_hooks() is True
    assert checkpointing.saves_through_hooks() is False
    seen = []
    leaf = torch.ones(2, requires_grad=True)
    out = checkpoint(lambda t: seen.append(checkpointing.saves_through_hooks()) or t.exp(), leaf, use_reentrant=False)
    out.sum().backward()
    assert seen == [True, True]
