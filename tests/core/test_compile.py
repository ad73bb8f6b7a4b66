"""The op as PyTorch sees it: operator contracts, and torch.compile without a graph break."""

import re

import pytest
import torch
import torch._dynamo.testing

import moe_kernels.moe
from moe_kernels.autograd import backward_op, forward_op
from moe_kernels.ops import custom_ops
from moe_kernels.router import route_backward, route_forward
from moe_kernels.routing import RoutingPlan
from moe_kernels.tools.check.problems import Case, make_inputs

SMALL = Case(tokens=7, top_k=2, experts=3, hidden=32, intermediate=16, dtype=torch.bfloat16)
DTYPES = (torch.float32, torch.bfloat16)


EVERYTHING = Case(**{**SMALL.__dict__, "bias": True, "lora_rank": 16, "transposed": True, "interleaved": True})
APART = "experts apart"
STORED = "factors as PEFT stores them"
KINDS = {
    "plain": SMALL,
    "everything": EVERYTHING,
    "unreduced": Case(**{**SMALL.__dict__, "reduce": False}),
    APART: Case(**{**SMALL.__dict__, "transposed": True}),
    STORED: Case(**{**SMALL.__dict__, "lora_rank": 5}),
}
EXTRAS = ("gate_up_bias", "down_bias", "gate_up_lora_b", "gate_up_lora_a", "down_lora_b", "down_lora_a")


def as_peft_stores_it(name, factor):
    """In float32, and of lora_b experts are the fastest dimension."""
    factor = factor.float()
    return factor.permute(1, 2, 0).contiguous().permute(2, 0, 1) if name.endswith("_b") else factor


def tensors(inputs, requires_grad, kind="plain"):
    weights = inputs.topk_weights
    if weights is None:
        weights = torch.ones_like(inputs.topk_ids, dtype=torch.float32)
    floating = (inputs.x, weights, inputs.gate_up, inputs.down, *(inputs.extras.get(name) for name in EXTRAS))
    leaves = [None if t is None else t.detach().clone() for t in floating]
    if kind == STORED:
        leaves[6:] = map(as_peft_stores_it, EXTRAS[2:], leaves[6:])
    if kind == APART:
        leaves[2:4] = (torch.stack([w.mT, w.mT], 1).flatten(0, 1)[::2].mT for w in leaves[2:4])
    leaves = [None if t is None else t.requires_grad_(requires_grad) for t in leaves]
    return (leaves[0], inputs.topk_ids, *leaves[1:])


def settings(inputs, backend):
    options, scalings = inputs.options, (0.5, 2.0)
    layout = options.get("interleaved", False), options.get("reduce", True)
    return ("silu", [], *layout, False, 64, True, backend, *scalings)


def forward_arguments(inputs, backend, requires_grad=True, kind="plain"):
    return (*tensors(inputs, requires_grad, kind), *settings(inputs, backend), True)


# What the plan does not use stays unwritten; poisoned memory makes even that comparable.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_forward_contract(backend, device, dtype, kind):
    inputs = make_inputs(Case(**{**KINDS[kind].__dict__, "dtype": dtype}), device)
    arguments = forward_arguments(inputs, backend, kind=kind)
    torch.library.opcheck(forward_op, arguments)


@pytest.mark.parametrize(
    ("kind", "needs"),
    [
        ("plain", [True] * 4 + [False] * 6),
        ("plain", [True, False, False, True] + [False] * 6),
        ("plain", [False, True, True, False] + [False] * 6),
        (APART, [True] * 4 + [False] * 6),
        ("everything", [True] * 10),
        ("everything", [True] * 2 + [False] * 4 + [True] * 4),
        (STORED, [True] * 2 + [False] * 4 + [True] * 4),
    ],
    ids=str,
)
def test_backward_contract(backend, device, kind, needs):
    inputs = make_inputs(KINDS[kind], device)
    arguments = forward_arguments(inputs, backend, False, kind)
    _, z, x_low, a_low, plan = forward_op(*arguments)
    x, _, *others = tensors(inputs, False, kind)
    torch.library.opcheck(
        backward_op,
        (inputs.grad, x, *others, z, x_low, a_low, plan, *settings(inputs, backend), needs, False),
    )


class Layer(torch.nn.Module):
    def __init__(self, inputs, backend):
        super().__init__()
        self.gate_up = torch.nn.Parameter(inputs.gate_up.clone())
        self.down = torch.nn.Parameter(inputs.down.clone())
        self.router = torch.nn.Linear(inputs.x.shape[1], inputs.gate_up.shape[0], dtype=torch.float32)
        self.backend = backend

    def forward(self, x):
        scores = self.router(x.float()).softmax(-1)
        weights, ids = scores.topk(2, dim=-1)
        return moe_kernels.fused_experts(x, ids, weights, self.gate_up, self.down, backend=self.backend) * 2


@pytest.mark.plain_memory
def test_one_graph_for_every_number_of_tokens(backend, device):
    torch._dynamo.reset()
    inputs = make_inputs(SMALL, device)
    torch.manual_seed(0)
    layer = Layer(inputs, backend).to(device)
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=graphs)
    for tokens in (7, 12, 3):
        x = torch.randn(tokens, SMALL.hidden, device=device).bfloat16()
        results = []
        for call in (layer, compiled):
            leaf = x.clone().requires_grad_()
            layer.zero_grad()
            out = call(leaf)
            out.backward(torch.ones_like(out))
            results.append([out, leaf.grad, *(p.grad.clone() for p in layer.parameters())])
        for plain, graph in zip(*results, strict=True):
            assert torch.equal(plain, graph)
    assert graphs.frame_count == 1


def test_fake_shapes_agree_with_the_plan():
    inputs = make_inputs(SMALL)
    *_, packed = forward_op(*forward_arguments(inputs, "torch", requires_grad=False))
    plan = RoutingPlan.from_packed(packed, SMALL.tokens, SMALL.top_k, SMALL.experts, 64)
    assert (plan.rows, plan.tokens, plan.experts) == (14, 7, 3)


def test_an_op_of_another_schema_has_another_name():
    """torch.compile's graphs on disk name ops, not what they take: those of another release must not be taken."""

    def names(backward):
        ops = {"named": (torch.clone, "(Tensor x) -> Tensor"), "named_backward": (torch.clone, backward)}
        return [op._name for op in custom_ops(**ops)]

    assert not {*names("(Tensor x) -> Tensor")} & {*names("(Tensor x, Tensor y) -> Tensor")}
    for op in (forward_op, backward_op, route_forward, route_backward):
        assert re.fullmatch(r"moe_kernels::(experts|route)_(forward|backward)_[0-9a-f]{8}", op.name())
