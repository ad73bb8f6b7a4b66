"""The fused router under torch.func, twice differentiated, in forward mode, and on tensors without data."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from moe_kernels.kernels.triton.launch import interpreting
from moe_kernels.router import route

SOFTMAX = {"top_k": 2}
SIGMOID = {"top_k": 3, "scoring": "sigmoid", "groups": 4, "top_groups": 2, "scale": 2.5, "normalize": False}
KINDS = {"softmax": SOFTMAX, "softmax, not normalised": SOFTMAX | {"normalize": False}, "sigmoid": SIGMOID}


@pytest.fixture(params=["torch", "triton"])
def backend(request, device):
    if request.param == "triton" and device.type == "cpu" and not interpreting():
        pytest.skip("the fused router needs an NVIDIA GPU or Triton's interpreter")
    return request.param


def numbers(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def loss_of(kind, backend):
    def loss(logits):
        weights, ids = route(logits, backend=backend, **KINDS[kind])
        return (weights * (1 + ids)).sin().sum()

    return loss


def twice(loss, logits):
    leaf = logits.detach().requires_grad_()
    (first,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    return first.detach(), *torch.autograd.grad(first.sin().sum(), leaf, allow_unused=True)


def forward_mode(loss, logits):
    with forward_ad.dual_level():
        return (forward_ad.unpack_dual(loss(forward_ad.make_dual(logits, logits.cos()))).tangent,)


def batched(loss, logits):
    leaf = logits.detach().requires_grad_()
    return torch.autograd.grad(loss(leaf), leaf, torch.arange(3.0).to(logits), is_grads_batched=True)


USES = {
    "func.grad": lambda loss, x: (torch.func.grad(loss)(x),),
    "func.jvp": lambda loss, x: torch.func.jvp(loss, (x,), (x.cos(),)),
    "gradients of each sample": lambda loss, x: (torch.func.vmap(torch.func.grad(loss))(torch.stack([x, -x])),),
    "hessian": lambda loss, x: (torch.func.hessian(loss)(x),),
    "autograd.grad twice": twice,
    "batched backwards": batched,
    "forward mode": forward_mode,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use", USES)
def test_right_derivatives(backend, device, use, kind):
    logits = numbers(5, 8)
    wanted = USES[use](loss_of(kind, "torch"), logits.double())
    found = USES[use](loss_of(kind, backend), logits.to(device))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.cpu().double(), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_second_derivative_is_autograds(kind):
    """The yardstick of the test above, by finite differences."""
    weights = lambda logits: route(logits, backend="torch", **KINDS[kind])[0]  # noqa: E731
    if kind == "sigmoid":  # whose values are rounded to the dtype of the logits: float64 here
        assert torch.autograd.gradcheck(weights, numbers(3, 8).double().requires_grad_())
    assert torch.autograd.gradgradcheck(weights, numbers(3, 8).double().requires_grad_())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["meta", "fake"])
def test_shapes_without_data(backend, device, place, kind):
    mode = FakeTensorMode()
    logits = numbers(5, 8).to(device)
    leaf = (logits.to("meta") if place == "meta" else mode.from_tensor(logits)).requires_grad_()
    weights, ids = route(leaf, backend=backend, **KINDS[kind])
    (grad,) = torch.autograd.grad(weights.sum(), leaf)
    expected = (5, KINDS[kind]["top_k"])
    assert (weights.shape, weights.dtype, ids.shape, ids.dtype) == (expected, torch.float32, expected, torch.int64)
    assert (grad.shape, grad.dtype, grad.device) == (leaf.shape, leaf.dtype, leaf.device)


@pytest.mark.plain_memory
def test_make_fx_records_the_routing(backend, device):
    def gradient(logits):
        weights, _ = route(logits, backend=backend, **SIGMOID)
        return torch.autograd.grad(weights.square().sum(), logits)

    graph = make_fx(gradient)(numbers(5, 8).to(device).requires_grad_())
    other = (numbers(5, 8) * 3).to(device).requires_grad_()
    assert torch.equal(*graph(other), *gradient(other))
