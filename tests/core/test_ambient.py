"""The op gives the same bits whatever dtype and device the process makes tensors of when none is named."""

import pytest
import torch

from moe_kernels.router import route
from support.ambient import STATES

MAKERS = [state for state in STATES if state.endswith("by default")] + ["meta device"]


def problem():
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(*size, generator=generator).requires_grad_()

    x, gate_up, down = normal(9, 32), normal(4, 48, 32), normal(4, 32, 24)
    biases = {"gate_up_bias": normal(4, 48), "down_bias": normal(4, 32)}
    lora = {"gate_up_lora": (normal(4, 48, 3), normal(4, 3, 32)), "down_lora": (normal(4, 32, 3), normal(4, 3, 24))}
    return x, normal(9, 4), (gate_up, down), biases | lora


def run(inputs, experts, backend, reduce):
    x, logits, weights, others = inputs
    topk_weights, ids = route(logits, 2, scoring="sigmoid", groups=2, backend=backend)
    out = experts(x, ids, topk_weights if reduce else None, *weights, reduce=reduce, **others)
    flat = [t for value in others.values() for t in (value if isinstance(value, tuple) else (value,))]
    leaves = [x, *weights, *flat, *([logits] if reduce else [])]
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


@pytest.mark.parametrize("reduce", [True, False])
@pytest.mark.parametrize("state", MAKERS)
def test_defaults_of_the_process_do_not_matter(state, reduce, experts, backend, small_tiles):
    inputs = problem()
    expected = run(inputs, experts, backend, reduce)
    with STATES[state]():
        actual = run(inputs, experts, backend, reduce)
    for ours, theirs in zip(actual, expected, strict=True):
        assert theirs.count_nonzero()
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
