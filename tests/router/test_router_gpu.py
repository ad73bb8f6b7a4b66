"""What only a GPU shows: the choices of torch's own CUDA kernels on many tokens, launches, and a whole model."""

import pytest
import torch

from moe_kernels import router
from moe_kernels.tools.bench.timing import count_launches

pytestmark = pytest.mark.gpu
TOKENS = 16384


def stock_sigmoid(logits, bias, top_k, groups, kept):
    scores = logits.sigmoid()
    choice = scores + bias
    sums = choice.view(len(logits), groups, -1).topk(2, dim=-1).values.sum(-1)
    mask = torch.zeros_like(sums).scatter(1, sums.topk(kept, dim=-1).indices, 1).bool()
    mask = mask[:, :, None].expand(-1, -1, logits.shape[1] // groups).flatten(1)
    ids = choice.masked_fill(~mask, float("-inf")).topk(top_k, dim=-1).indices
    return scores, ids


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("experts", "groups"), [(128, 8), (256, 8), (256, 1)])
def test_sigmoid_choices_are_torchs_on_many_tokens(experts, groups, seed):
    """The exponential and the division are torch's own, so that even scores one rounding apart fall alike."""
    generator = torch.Generator("cuda").manual_seed(seed)
    logits = torch.randn(TOKENS, experts, device="cuda", generator=generator)
    bias = 0.1 * torch.randn(experts, device="cuda", generator=generator)
    kept = max(1, groups // 2)
    scores, expected = stock_sigmoid(logits, bias, 8, groups, kept)
    weights, ids = router.route(logits, 8, scoring="sigmoid", normalize=False, correction_bias=bias, groups=groups,
                                top_groups=kept)  # fmt: skip
    alike = (ids.sort(-1).values == expected.sort(-1).values).all(-1)
    assert alike.float().mean() > 0.9999
    torch.testing.assert_close(weights, scores.gather(-1, ids), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (60, 4), (128, 8), (512, 10)])
def test_softmax_choices_are_torchs_on_many_tokens(experts, top_k, dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    logits = torch.randn(TOKENS, experts, device="cuda", generator=generator).to(dtype)
    values, ids = torch.softmax(logits.float(), -1).topk(top_k)
    weights, ours = router.route(logits, top_k, normalize=False, weights_dtype=torch.float32)
    torch.testing.assert_close(weights, values, rtol=1e-6, atol=1e-9)
    # Equal values may be equal experts in another order, or other experts of the same value.
    torch.testing.assert_close(logits.gather(-1, ours), logits.gather(-1, ids), rtol=1e-6, atol=1e-6)
    assert (ours.sort(-1).values.diff() > 0).all()


@pytest.mark.plain_memory
@pytest.mark.plain_memory  # poisoning launches fills
def test_one_launch_forward_and_one_backward():
    logits = torch.randn(TOKENS, 128, device="cuda", requires_grad=True)
    weights, _ = router.route(logits, 8)
    grad = torch.randn_like(weights)

    def both():
        logits.grad = None
        router.route(logits, 8)[0].backward(grad)

    both()
    launches = count_launches(both)
    assert launches is not None
    assert launches.kernels == 2


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_model_on_the_gpu(name, autocast):
    pytest.importorskip("transformers")
    from test_router_models import IDS, make_model

    from moe_kernels.integrations.router import install_fused_router

    model, ids = make_model(name).cuda(), IDS.cuda()
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        expected = model(input_ids=ids, labels=ids).loss
        assert install_fused_router(model) == 2
        actual = model(input_ids=ids, labels=ids).loss
    actual.backward()
    torch.testing.assert_close(actual, expected, rtol=0.02 if autocast else 1e-4, atol=0)
    gates = [parameter for key, parameter in model.named_parameters() if key.endswith("mlp.gate.weight")]
    assert all(gate.grad.abs().max() > 0 for gate in gates)
