"""Gradient checkpointing around the op: what is computed again, and that gradients are bitwise those without it."""

import collections
import functools
import itertools
import sys

import pytest
import torch
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)
from torch.utils.flop_counter import FlopCounterMode

import moe_kernels
from moe_kernels import backends, checkpointing, steps
from moe_kernels.autograd import forward_op
from moe_kernels.kernels.launch import launch
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
    """How often each step of the forward ran. On a GPU nothing is replayed, nor compiled ahead of its first use."""
    monkeypatch.setattr(launch, "launcher", lambda: "direct")
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


def squared(experts):
    """A layer that saves more after the experts, as one with a shared expert does."""
    return lambda *args, **kwargs: experts(*args, **kwargs).float().square().to(SMALL.dtype)


def twice_in_a_row(experts):
    return lambda x, *args, **kwargs: experts(experts(x, *args, **kwargs), *args, **kwargs)


def in_4_bits(backend, device):
    """Experts of the size SMALL with weights of their own, whichever they are called with."""
    weights = [packed(SMALL.experts, 32, columns, device, dtype=SMALL.dtype) for columns in (32, 16)]
    return lambda x, ids, topk, **_: moe_kernels.fused_experts(x, ids, topk, *weights, backend=backend)


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
    experts = in_4_bits(backend, device)
    inputs = make_inputs(SMALL, device)

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

    layer = squared(experts)
    expected = results(layer, inputs)
    counted.clear()
    assert_bitwise(results(checkpointed(layer), inputs), expected)
    assert (counted["up"], counted["down"]) == (2, 2)


def test_two_layers_in_a_region(experts, device, counted):
    inputs = inputs_of("biases and LoRA", device)

    layers = twice_in_a_row(experts)
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
    monkeypatch.setattr(moe_kernels.autograd, "saves_through_hooks", lambda: False)
    with saved_tensors_hooks(keep, lambda t: t):
        assert_bitwise(results(experts, inputs), expected)
    assert kept == in_halves


def test_kept_on_the_cpu(experts, device):
    inputs = inputs_of("biases and LoRA", device)
    expected = results(experts, inputs)
    with save_on_cpu():
        assert_bitwise(results(experts, inputs), expected)


def assert_same_second_derivatives(device, layer_of):
    """Up to rounding: autograd adds up gradients in an order that on a GPU depends on what its threads did before."""
    inputs = make_inputs(Case(**(SMALL.__dict__ | LORA | {"dtype": torch.float64})), device)
    experts = functools.partial(moe_kernels.fused_experts, backend="torch")

    def twice(layer):
        own = inputs.with_own_leaves()
        leaves = list(own.leaves().values())
        grads = torch.autograd.grad(call(layer, own), leaves, inputs.grad, create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in grads), leaves)

    torch.testing.assert_close(twice(layer_of(experts)), twice(experts), rtol=1e-12, atol=1e-12)


def hooked(experts):
    def layer(*args, **kwargs):
        with saved_tensors_hooks(lambda t: t, lambda t: t):
            return experts(*args, **kwargs)

    return layer


@pytest.mark.parametrize("around", [hooked, checkpointed])
def test_second_derivatives(device, around):
    assert_same_second_derivatives(device, around)


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


# --------------------------------------------------------------------------------------- selective checkpointing
def selective(experts, policy):
    return checkpointed(experts, context_fn=functools.partial(create_selective_checkpoint_contexts, policy))


def keep_experts(ctx, op, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE if op is forward_op else CheckpointPolicy.PREFER_RECOMPUTE


@kinds
def test_nothing_runs_again_where_the_op_is_kept(experts, device, kind, counted):
    inputs = inputs_of(kind, device)
    expected = results(experts, inputs)
    once = counted.copy()
    for policy in (keep_experts, [forward_op]):
        counted.clear()
        assert_bitwise(results(selective(experts, policy), inputs), expected)
        assert counted == once


def test_nothing_runs_again_before_a_shared_expert(experts, device, counted):
    inputs = inputs_of("biases and LoRA", device)

    layer = squared(experts)
    expected = results(layer, inputs)
    counted.clear()
    assert_bitwise(results(selective(layer, keep_experts), inputs), expected)
    assert (counted["up"], counted["down"], counted["combine"]) == (1, 1, 1)


def test_a_kept_op_that_recomputes(experts, device, counted):
    experts = functools.partial(experts, recompute=True)
    inputs = inputs_of("biases and LoRA", device)
    expected = results(experts, inputs)
    counted.clear()
    assert_bitwise(results(selective(experts, keep_experts), inputs), expected)
    assert (counted["up"], counted["down"]) == (2, 1)


@pytest.mark.parametrize("keep", [False, CheckpointPolicy.PREFER_RECOMPUTE], ids=str)
def test_where_something_else_is_kept(experts, device, counted, keep):
    """What the layer does inside is not shown: a replay would not do the same."""
    seen = []

    def policy(ctx, op, *args, **kwargs):
        seen.append(op)
        return keep if op is forward_op else op is torch.ops.aten.mul.Tensor

    def layer(x, *args, **kwargs):
        return experts(x * 2, *args, **kwargs)

    inputs = inputs_of("biases and LoRA", device)
    expected = results(layer, inputs)
    counted.clear()
    assert_bitwise(results(selective(layer, policy), inputs), expected)
    assert (counted["up"], counted["down"]) == (2, 1)
    assert seen.count(forward_op) == 1
    assert {op.namespace for op in seen} == {"aten", "moe_kernels"}
    assert not {op for op in seen if op in (torch.ops.aten.mm.default, torch.ops.aten.new_empty.default)}


def test_a_region_is_asked_before_its_second_computation(experts, device, counted):
    """Up to torch 2.12, and where Axolotl offloads, the mode of that one has the policy too."""
    answers = iter([False])  # a second question finds none

    def policy(ctx, op, *args, **kwargs):
        return op is forward_op and next(answers)

    def contexts():
        modes = create_selective_checkpoint_contexts(policy)
        modes[1].policy_fn = policy
        return modes

    inputs = inputs_of("plain", device)
    expected = results(experts, inputs)
    counted.clear()
    assert_bitwise(results(checkpointed(experts, context_fn=contexts), inputs), expected)
    assert (counted["up"], counted["down"]) == (2, 1)


def test_weights_in_4_bits_are_not_kept(backend, device, counted, monkeypatch):
    experts = in_4_bits(backend, device)
    inputs, wanted = make_inputs(SMALL, device), ("x", "topk_weights")

    def never(*args):
        raise AssertionError("dequantised whole")

    expected = results(experts, inputs, wanted)
    monkeypatch.setattr(moe_kernels.moe, "whole", never)
    counted.clear()
    assert_bitwise(results(selective(experts, keep_experts), inputs, wanted), expected)
    assert (counted["up"], counted["down"]) == (2, 1)


def test_two_layers_and_a_policy_that_changes_its_mind(experts, device, counted):
    """The modes count an operator's calls: a layer that was no operator must not take what another one left."""
    inputs = inputs_of("biases and LoRA", device)

    layers = twice_in_a_row(experts)
    expected = results(layers, inputs)
    for first in (True, False):
        answers = itertools.cycle([first, not first])
        counted.clear()
        found = results(selective(layers, lambda ctx, op, *_, a=answers: op is forward_op and next(a)), inputs)
        assert_bitwise(found, expected)


def test_each_region_is_asked(experts, device, counted):
    """As Axolotl does, which keeps attention in some layers alone.

    A layer says so in both its computations: up to torch 2.12 the policy is asked in the second one too.
    """
    inputs, answers = inputs_of("plain", device), []

    def policy(ctx, op, *args, **kwargs):
        return op is forward_op and answers[-1]

    def region(answer):
        def layer(*args, **kwargs):
            answers.append(answer)
            return experts(*args, **kwargs)

        return selective(layer, policy)

    def regions(x, *args, **kwargs):
        for answer in (True, False):
            x = region(answer)(x, *args, **kwargs)
        return x

    layers = twice_in_a_row(experts)
    expected = results(layers, inputs)
    counted.clear()
    assert_bitwise(results(regions, inputs), expected)
    assert (counted["up"], counted["down"]) == (3, 2)


def test_what_is_kept_is_not_overwritten(experts, device, monkeypatch):
    run, overwritten = moe_kernels.autograd._run_backward, []

    def spy(t, spec):
        before = t.z.clone()
        grads = run(t, spec)
        overwritten.append(not torch.equal(before, t.z))
        return grads

    monkeypatch.setattr(moe_kernels.autograd, "_run_backward", spy)
    inputs = inputs_of("biases and LoRA", device)
    for layer in (experts, selective(experts, keep_experts)):
        results(layer, inputs)
    assert overwritten == [True, False]


def test_second_derivatives_of_what_is_kept(device):
    assert_same_second_derivatives(device, functools.partial(selective, policy=keep_experts))


def test_other_dispatch_modes_see_the_steps(device):
    """They are not to keep anything: a FLOP counter counts the torch backend's products."""
    inputs = inputs_of("plain", device)
    with FlopCounterMode(display=False) as flops:
        results(functools.partial(moe_kernels.fused_experts, backend="torch"), inputs)
    rows = SMALL.tokens * SMALL.top_k
    assert flops.get_total_flops() == 3 * 2 * rows * SMALL.hidden * 3 * SMALL.intermediate


def test_the_modes_are_seen():
    """What tells them from other modes has no public name: this fails where a release drops it."""
    modes = create_selective_checkpoint_contexts([forward_op])
    for mode in modes:
        assert checkpointing.selective_modes() == []
        with mode:
            assert checkpointing.selective_modes() == [mode]
