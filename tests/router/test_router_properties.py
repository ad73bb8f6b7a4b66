"""Any sizes, any logits: both backends choose alike, and what must hold of a routing holds."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_kernels import router


@st.composite
def problems(draw):
    """(logits, keyword arguments of route), with ties and infinities now and then."""
    groups = draw(st.sampled_from([1, 1, 2, 3, 8]))
    experts = groups * draw(st.integers(2 if groups > 1 else 1, 40))
    top_groups = draw(st.integers(1, groups))
    top_k = draw(st.integers(1, min(12, top_groups * (experts // groups))))
    sigmoid = groups > 1 or draw(st.booleans())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits = torch.randn(draw(st.integers(0, 70)), experts, generator=generator)
    logits *= draw(st.sampled_from([0.1, 1.0, 30.0]))
    if draw(st.booleans()):
        logits = logits.round()
    if draw(st.booleans()) and experts > top_k:
        logits[:, draw(st.integers(0, experts - 1))] = float("-inf")
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    arguments = {"top_k": top_k, "normalize": draw(st.booleans()), "scale": draw(st.sampled_from([1.0, 2.5]))}
    if draw(st.booleans()):
        arguments["weights_dtype"] = torch.float32
    if sigmoid:
        arguments |= {"scoring": "sigmoid", "groups": groups, "top_groups": top_groups}
        if draw(st.booleans()):
            arguments["correction_bias"] = torch.randn(experts, generator=generator)
    return logits.to(dtype), arguments


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(problems())
def test_backends_agree_and_routings_are_sound(device, problem):
    logits, arguments = problem
    arguments = {k: v.to(device) if torch.is_tensor(v) else v for k, v in arguments.items()}
    results = []
    for backend in ("triton", "torch"):
        leaf = logits.to(device).requires_grad_()
        weights, ids = router.route(leaf, backend=backend, **arguments)
        grad = torch.randn(weights.shape, generator=torch.Generator().manual_seed(1)).to(device, weights.dtype)
        weights.backward(grad)
        results.append((weights.detach(), ids, leaf.grad))
    (weights, ids, dlogits), (expected, expected_ids, expected_grad) = results
    # Two sigmoids one unit in the last place apart may swap neighbours.
    alike = (ids == expected_ids).all(-1)
    choice = logits.to(device).float()
    if "scoring" in arguments:
        choice = choice.sigmoid() + arguments.get("correction_bias", 0.0)
        gap = 1e-6 if weights.dtype == torch.float32 else 4e-3
        torch.testing.assert_close(choice.gather(-1, ids), choice.gather(-1, expected_ids), rtol=0, atol=gap)
    else:
        assert alike.all()
    assert alike.sum() >= len(ids) - 1 - len(ids) // 20
    coarse = weights.dtype != torch.float32 or logits.dtype != torch.float32
    rtol = 1e-2 if weights.dtype != torch.float32 else 1e-5
    torch.testing.assert_close(weights[alike], expected[alike], rtol=rtol, atol=1e-6)
    # Scores that all but vanish are divided by their sum and the model's own 1e-20: a gradient of rounding errors.
    scores = logits.float().sigmoid() if "scoring" in arguments else torch.ones_like(logits, dtype=torch.float32)
    sound = scores.to(device).gather(-1, ids).sum(-1) > 1e-3
    same = sound & alike
    torch.testing.assert_close(
        dlogits[same], expected_grad[same], rtol=2e-2 if coarse else 1e-4, atol=1e-3 if coarse else 1e-6
    )

    assert ((ids >= 0) & (ids < logits.shape[1])).all()
    assert (ids.sort(-1).values.diff() > 0).all(), "an expert twice"
    assert (weights >= 0).all()
    if arguments["normalize"] and len(ids):
        sums = weights.float().sum(-1) / arguments["scale"]
        assert ((sums - 1).abs() < 2e-2)[sound].all()


@pytest.mark.parametrize("normalize", [True, False])
def test_a_softmax_router_ignores_a_shift_of_all_logits(normalize, device):
    logits = torch.randn(33, 24, device=device, requires_grad=True)
    weights, _ = router.route(logits, 5, normalize=normalize, backend="triton")
    weights.backward(torch.randn_like(weights))
    assert logits.grad.sum(-1).abs().max() < 1e-6
    assert logits.grad.abs().max() > 1e-3
