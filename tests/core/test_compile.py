"""The op as PyTorch sees it: operator contracts, and torch.compile without a graph break."""

import pytest
import torch
import torch._dynamo.testing

import moe_kernels.moe
from moe_kernels.routing import RoutingPlan
from moe_kernels.testing.problems import Case, make_inputs

SMALL = Case(tokens=7, top_k=2, experts=3, hidden=32, intermediate=16, dtype=torch.bfloat16)
DTYPES = (torch.float32, torch.bfloat16)


def forward_arguments(inputs, backend, requires_grad=True):
    weights = [t.detach().clone().requires_grad_(requires_grad) for t in (inputs.x, inputs.topk_weights)]
    experts = [t.detach().clone().requires_grad_(requires_grad) for t in (inputs.gate_up, inputs.down)]
    return (weights[0], inputs.topk_ids, weights[1], *experts, "silu", 64, True, backend, True)


# What the plan does not use stays unwritten; poisoned memory makes even that comparable.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_contract(backend, device, dtype):
    inputs = make_inputs(Case(**{**SMALL.__dict__, "dtype": dtype}), device)
    torch.library.opcheck(torch.ops.moe_kernels.experts_forward.default, forward_arguments(inputs, backend))


@pytest.mark.parametrize("needs", [[True] * 4, [True, False, False, True], [False, True, True, False]], ids=str)
def test_backward_contract(backend, device, needs):
    inputs = make_inputs(SMALL, device)
    arguments = forward_arguments(inputs, backend, requires_grad=False)
    _, z, plan = torch.ops.moe_kernels.experts_forward(*arguments)
    x, _, weights, gate_up, down = arguments[:5]
    torch.library.opcheck(
        torch.ops.moe_kernels.experts_backward.default,
        (inputs.grad, x, weights, gate_up, down, z, plan, "silu", 64, True, backend, needs),
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
    _, _, packed = torch.ops.moe_kernels.experts_forward(*forward_arguments(inputs, "torch", requires_grad=False))
    plan = RoutingPlan.from_packed(packed, SMALL.tokens, SMALL.top_k, SMALL.experts, 64)
    assert (plan.rows, plan.tokens, plan.experts) == (14, 7, 3)
