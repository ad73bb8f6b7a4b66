"""Derivatives that the kernels do not have: second ones, forward mode, torch.func. They take plain steps of torch."""

import dataclasses
import functools

import pytest
import torch
from torch.autograd import forward_ad

import moe_kernels
from moe_kernels import backends, plain
from moe_kernels.activation import Activation
from moe_kernels.reference import reference_experts
from moe_kernels.tools.check.problems import Case, call, make_inputs
from moe_kernels.tools.check.routings import make_routing

SMALL = Case(tokens=7, top_k=2, experts=3, hidden=16, intermediate=8, routing="sentinels")
CLAMPED = Activation("clamped_glu", (1.702, 0.7))
CASES = {
    "plain": SMALL,
    "everything": Case(**{**SMALL.__dict__, "bias": True, "lora_rank": 4, "interleaved": True, "transposed": True,
                          "activation": CLAMPED, "routing": "duplicated_ids"}),
    "no gate, no sum": Case(**{**SMALL.__dict__, "gated": False, "activation": "gelu", "reduce": False}),
}  # fmt: skip
SAMPLES = 3


class Layer:
    """The layer of one case as a function of its differentiable tensors, and of the experts of its tokens."""

    def __init__(self, implementation, inputs, vmap):
        self.implementation, self.inputs, self.vmap = implementation, inputs, vmap
        self.names = tuple(inputs.leaves())
        self.tensors = tuple(inputs.leaves().values())
        case_of = inputs.topk_ids.shape
        self.ids = torch.stack([make_routing("sentinels", *case_of, 3, seed=seed)[0] for seed in range(SAMPLES)])
        g = torch.Generator().manual_seed(5)
        self.samples = torch.randn(SAMPLES, *inputs.x.shape, generator=g).to(inputs.x)
        self.cotangents = torch.randn(SAMPLES, *inputs.grad.shape, generator=g).to(inputs.x)

    def __call__(self, *tensors, ids=None):
        given = dict(zip(self.names, tensors, strict=True))
        changed = {name: given.pop(name) for name in ("x", "topk_weights", "gate_up", "down") if name in given}
        ids = self.inputs.topk_ids if ids is None else ids
        return call(self.implementation, dataclasses.replace(self.inputs, **changed, extras=given, topk_ids=ids))

    def loss(self, *tensors, ids=None):
        return (self(*tensors, ids=ids) * self.inputs.grad).sin().sum()

    def sample(self, x, ids, *others):
        return self.loss(x, *others, ids=ids)

    @property
    def leaves(self):
        return tuple(t.detach().clone().requires_grad_() for t in self.tensors)

    @property
    def tangents(self):
        return tuple(t.cos() for t in self.tensors)

    @property
    def every(self):
        return tuple(range(len(self.tensors)))


def looped(function, in_dims):
    """vmap, by hand."""

    def call(*args):
        outs = [
            function(*(a if d is None else a[n] for a, d in zip(args, in_dims, strict=True))) for n in range(SAMPLES)
        ]
        return tuple(map(torch.stack, zip(*outs, strict=True))) if isinstance(outs[0], tuple) else torch.stack(outs)

    return call


def second(layer):
    leaves = layer.leaves
    first = torch.autograd.grad(layer.loss(*leaves), leaves, create_graph=True)
    return first + torch.autograd.grad(sum(g.sin().sum() for g in first), leaves, allow_unused=True)


def third(layer):
    leaves = layer.leaves
    (dx,) = torch.autograd.grad(layer.loss(*leaves), leaves[0], create_graph=True)
    (ddx,) = torch.autograd.grad(dx.sin().sum(), leaves[0], create_graph=True)
    return torch.autograd.grad(ddx.sin().sum(), leaves)


def backward_of_backward(layer):
    leaves = layer.leaves
    layer.loss(*leaves).backward(create_graph=True, inputs=leaves)
    loss = sum(t.grad.sin().sum() for t in leaves)
    return torch.autograd.grad(loss, leaves)


def routed_by_x(layer):
    """Routing weights that are made of x: its gradient has two ways."""
    x, *others = layer.leaves
    if "topk_weights" in layer.names:
        others[0] = x[:, : layer.inputs.topk_ids.shape[1]].sigmoid()
    (dx,) = torch.autograd.grad(layer.loss(x, *others), x, create_graph=True)
    return dx, *torch.autograd.grad(dx.sin().sum(), x)


def batched_backwards(layer, create_graph):
    leaves = layer.leaves
    out = layer(*leaves)
    if layer.vmap is looped:
        return looped(lambda d: torch.autograd.grad(out, leaves, d, retain_graph=True), (0,))(layer.cotangents)
    return torch.autograd.grad(out, leaves, layer.cotangents, is_grads_batched=True, create_graph=create_graph)


def vmap_of_autograd(layer):
    leaves = layer.leaves
    out = layer(*leaves)
    vmap = functools.partial(layer.vmap, in_dims=(0,))
    return vmap(lambda d: torch.autograd.grad(out, leaves, d, retain_graph=True))(layer.cotangents)


def forward_mode(layer):
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(*pair) for pair in zip(layer.tensors, layer.tangents, strict=True)]
        return tuple(forward_ad.unpack_dual(layer.loss(*duals)))


def samples(layer, function):
    dims = (0, 0, *(None for _ in layer.tensors[1:]))
    return layer.vmap(function, in_dims=dims)(layer.samples, layer.ids, *layer.tensors[1:])


def ensemble(layer):
    """Experts of several models, the same tokens."""
    several = [torch.stack([t * (1 + n) for n in range(SAMPLES)]) for t in layer.tensors[1:]]
    dims = (None, *(0 for _ in several))
    return layer.vmap(torch.func.grad(layer.loss), in_dims=dims)(layer.tensors[0], *several)


USES = {
    "func.grad": lambda layer: torch.func.grad(layer.loss, argnums=layer.every)(*layer.tensors),
    "func.vjp": lambda layer: torch.func.vjp(layer, *layer.tensors)[1](layer.inputs.grad),
    "func.jvp": lambda layer: torch.func.jvp(layer.loss, layer.tensors, layer.tangents),
    "vmap": lambda layer: (samples(layer, layer.sample),),
    "gradients of each sample": lambda layer: samples(
        layer, torch.func.grad(layer.sample, (0, *range(2, len(layer.tensors) + 1)))
    ),
    "an ensemble": lambda layer: (ensemble(layer),),
    "hessian-vector, forward over reverse": lambda layer: torch.func.jvp(
        torch.func.grad(layer.loss, argnums=layer.every), layer.tensors, layer.tangents
    )[1],
    "hessian-vector, autograd.functional": lambda layer: torch.autograd.functional.hvp(
        layer.loss, layer.tensors, layer.tangents
    )[1],
    "hessian": lambda layer: (torch.func.hessian(layer.loss)(*layer.tensors),),
    "autograd.grad twice": second,
    "autograd.grad three times": third,
    "backward of backward": backward_of_backward,
    "routing weights of x": routed_by_x,
    "batched backwards": lambda layer: batched_backwards(layer, False),
    "batched backwards with a graph": lambda layer: batched_backwards(layer, True),
    "vmap of autograd.grad": vmap_of_autograd,
    "forward mode": forward_mode,
}  # fmt: skip


def assert_near(ours, theirs):
    ours, theirs = ours.detach().cpu().double(), theirs.detach()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * (1 + theirs.abs().max().item()))


@functools.cache
def expected(use, name):
    inputs = make_inputs(CASES[name]).to(torch.float64)
    return USES[use](Layer(reference_experts, inputs, looped))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("use", USES)
def test_right_derivatives(experts, device, use, name):
    inputs = make_inputs(CASES[name], device)
    found, wanted = USES[use](Layer(experts, inputs, torch.func.vmap)), expected(use, name)
    assert len(found) == len(wanted) > 0
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours is not None
        assert_near(ours, theirs)


@pytest.mark.plain_memory
@pytest.mark.parametrize("use", ["func.grad", "func.jvp", "vmap", "gradients of each sample"])
def test_under_compile(experts, device, use):
    torch._dynamo.reset()
    layer = Layer(experts, make_inputs(CASES["everything"], device), torch.func.vmap)
    compiled = torch.compile(lambda: USES[use](layer), backend="aot_eager", fullgraph=True)
    for ours, theirs in zip(compiled(), expected(use, "everything"), strict=True):
        assert_near(ours, theirs)


def test_autocast_around_a_second_derivative_changes_no_dtype(experts, device):
    inputs = make_inputs(SMALL, device)
    x = inputs.x.clone().requires_grad_()
    found = []
    for around in (False, True):
        out = experts(x, inputs.topk_ids, inputs.topk_weights, inputs.gate_up, inputs.down)
        with torch.autocast(device.type, torch.bfloat16, enabled=around):
            (dx,) = torch.autograd.grad(out, x, inputs.grad, create_graph=True)
        found.append(dx)
    assert torch.equal(*found)


def test_vmapped_overflow_stays_with_its_own_expert(experts, device):
    """Under vmap every expert sees every token: what is not its own must not come back as NaN."""
    inputs = make_inputs(Case(**{**SMALL.__dict__, "routing": "all_to_last"}), device)
    weights = [w.clone() for w in (inputs.gate_up, inputs.down)]
    for weight in weights:
        weight[:-1] = 1e30
    loss = lambda x: experts(x, inputs.topk_ids, inputs.topk_weights, *weights).sum()  # noqa: E731
    grads = torch.func.vmap(torch.func.grad(loss))(torch.stack([inputs.x, inputs.x * 1e30]))
    assert torch.isfinite(grads[0]).all()


def test_plain_steps_are_counted_and_said_once(experts, device, caplog, monkeypatch):
    inputs = make_inputs(SMALL, device)
    backends.reset_dispatch_counts()
    monkeypatch.setattr(backends, "_reasons", {})
    plain._warn.cache_clear()
    layer = Layer(experts, inputs, torch.func.vmap)
    with caplog.at_level("WARNING", "moe_kernels"):
        for _ in range(2):
            torch.func.grad(layer.loss)(*layer.tensors)
    assert moe_kernels.dispatch_counts() == {"torch": 2}
    assert "torch.func" in backends.dispatch_reason()
    assert [record.getMessage() for record in caplog.records] == [
        "second derivatives, forward mode and torch.func of an expert layer run by plain steps of torch, not by the "
        "kernels: they are right, but slow"
    ]


def test_first_gradients_take_the_kernels(experts, backend, device):
    """Also those of a graph that is differentiated a second time later, and within torch.no_grad."""
    inputs = make_inputs(SMALL, device)
    backends.reset_dispatch_counts()
    layer = Layer(experts, inputs, torch.func.vmap)
    leaves = layer.leaves
    first = torch.autograd.grad(layer(*leaves), leaves, inputs.grad)
    out = layer(*leaves)
    torch.autograd.grad(out, leaves, inputs.grad, create_graph=True)
    later = torch.autograd.grad(out, leaves, inputs.grad)
    assert all(torch.equal(a, b) for a, b in zip(first, later, strict=True))
    assert moe_kernels.dispatch_counts() == {backend: 2}
