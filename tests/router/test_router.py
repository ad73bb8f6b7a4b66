"""The fused router against transformers' own: their code in float64 is the truth, as it is the yardstick."""

import importlib
import types

import pytest
import torch

from moe_kernels import router
from moe_kernels.backends import UnsupportedProblem
from moe_kernels.kernels.device import interpreting
from moe_kernels.kernels.triton import router as kernels
from moe_kernels.tools.check.tolerances import assert_close_to_truth
from support import interpreter

pytest.importorskip("transformers")
BF16 = torch.bfloat16
BACKENDS = ["torch", "triton"]


class _Float64(types.SimpleNamespace):
    """torch with float32 spelt float64: what a modelling file would compute without rounding."""

    float = float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


class Model:
    """A router class of transformers, fed with logits: its linear is the identity."""

    def __init__(self, family, name, experts, top_k, *, weights_float32=False, **attributes):
        self.module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        self.cls, self.experts = getattr(self.module, name), experts
        settings = {"num_experts_per_tok": top_k, "num_experts": experts, "num_local_experts": experts,
                    "hidden_size": experts, "norm_topk_prob": True, "routed_scaling_factor": 1.0, "n_group": 1,
                    "topk_group": 1, **attributes}  # fmt: skip
        self.config = types.SimpleNamespace(**settings)
        sigmoid = "Topk" in name
        self.ours = {"top_k": top_k, "normalize": settings["norm_topk_prob"], "scoring": "softmax"}
        self.bias = None
        if sigmoid:
            # Large enough to change choices, negative as often as not.
            self.bias = 0.2 * torch.randn(experts, generator=torch.Generator().manual_seed(5))
            self.ours |= {"scoring": "sigmoid", "groups": settings["n_group"], "top_groups": settings["topk_group"],
                          "scale": settings["routed_scaling_factor"]}  # fmt: skip
        self.weights_dtype = torch.float32 if weights_float32 else None

    def stock(self, logits, monkeypatch=None):
        """(weights, ids) of the model's own code; in float64 when the logits are."""
        gate = self.cls(self.config).to(logits.device, logits.dtype)
        with torch.no_grad():
            gate.weight.copy_(torch.eye(self.experts))
            if self.bias is not None:
                gate.e_score_correction_bias = self.bias.to(
                    logits.device, torch.promote_types(logits.dtype, torch.float)
                )
        if logits.dtype == torch.float64:
            monkeypatch.setattr(self.module, "torch", _Float64())
            monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
        _, weights, ids = gate(logits)
        if logits.dtype == torch.float64:
            monkeypatch.undo()
        return weights, ids

    def route(self, logits, backend, **changes):
        bias = None if self.bias is None else self.bias.to(logits.device)
        return router.route(logits, correction_bias=bias, weights_dtype=self.weights_dtype, backend=backend,
                            **self.ours | changes)  # fmt: skip


MODELS = {
    "mixtral": Model("mixtral", "MixtralTopKRouter", 8, 2, weights_float32=True),
    "qwen2_moe": Model("qwen2_moe", "Qwen2MoeTopKRouter", 60, 4, norm_topk_prob=False),
    "qwen3_moe": Model("qwen3_moe", "Qwen3MoeTopKRouter", 128, 8),
    "olmoe": Model("olmoe", "OlmoeTopKRouter", 64, 8, norm_topk_prob=False),
    "odd": Model("qwen3_moe", "Qwen3MoeTopKRouter", 7, 7),
    "many": Model("qwen3_moe", "Qwen3MoeTopKRouter", 512, 10),
    "deepseek_v3": Model("deepseek_v3", "DeepseekV3TopkRouter", 128, 8, n_group=8, topk_group=4,
                         routed_scaling_factor=2.5),
    "deepseek_odd": Model("deepseek_v3", "DeepseekV3TopkRouter", 21, 4, n_group=3, topk_group=2,
                          routed_scaling_factor=1.7, norm_topk_prob=False),
    "deepseek_256": Model("deepseek_v3", "DeepseekV3TopkRouter", 256, 8, n_group=8, topk_group=4,
                          routed_scaling_factor=2.5),
    "glm4_moe": Model("glm4_moe", "Glm4MoeTopkRouter", 160, 8),
}  # fmt: skip


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]


def random(model, tokens, dtype, device, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(tokens, model.experts, generator=g)).to(dtype).to(device)


def dense(weights, ids, experts):
    """(T, E): the weight of each expert, so that the order of the choices does not matter."""
    return weights.new_zeros(weights.shape[0], experts).scatter(-1, ids, weights)


def run(function, logits, cotangent):
    """(dense weights, ids, gradient of the logits)."""
    logits = logits.clone().requires_grad_()
    weights, ids = function(logits)
    table = dense(weights, ids, cotangent.shape[1])
    (table * cotangent.to(table.dtype)).sum().backward()
    return table.detach(), ids, logits.grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "tokens"), [(torch.float32, 37), (torch.float32, 1), (BF16, 70)], ids=str)
def test_as_close_to_the_truth_as_the_model_itself(model, dtype, tokens, backend, device, monkeypatch):
    logits = random(model, tokens, dtype, device)
    if dtype == BF16:
        # Distinct logits: among equals the model chooses as its top-k happens to.
        logits = torch.stack([torch.randperm(model.experts) for _ in range(tokens)]).to(device)
        logits = ((logits - model.experts // 2) / 64).to(dtype)
        if model.bias is not None:
            pytest.skip("these models compute their logits in float32")
    cotangent = random(model, tokens, torch.float32, device, seed=1)
    stock, stock_ids, stock_grad = run(lambda x: model.stock(x), logits, cotangent)
    truth, _, truth_grad = run(lambda x: model.stock(x, monkeypatch), logits.double(), cotangent.double())
    ours, ids, grad = run(lambda x: model.route(x, backend), logits, cotangent)

    assert ids.dtype == torch.int64
    assert truth.dtype == truth_grad.dtype == torch.float64
    assert ours.dtype == stock.dtype
    assert grad.dtype == dtype
    assert torch.equal(ids.sort(-1).values, stock_ids.sort(-1).values)
    if model.bias is None:
        assert torch.equal(ids, stock_ids)
    assert_close_to_truth(ours, truth, stock, "weights")
    assert_close_to_truth(grad, truth_grad, stock_grad, "dlogits")


@pytest.mark.parametrize("backend", BACKENDS)
def test_choices_come_by_falling_value(model, backend, device):
    logits = random(model, 9, torch.float32, device)
    _, ids = model.route(logits, backend)
    choice = logits if model.bias is None else logits.sigmoid() + model.bias.to(device)
    assert (choice.gather(-1, ids).diff() <= 0).all()


def test_both_backends_choose_alike_among_ties(model, device):
    """bf16 logits of few values tie in every row; the lowest index wins, in groups too."""
    logits = random(model, 33, torch.float32, device).round().to(BF16)
    ours, reference = (model.route(logits, backend) for backend in ("triton", "torch"))
    assert torch.equal(ours[1], reference[1])
    torch.testing.assert_close(ours[0], reference[0], rtol=1e-2 if model.weights_dtype is None else 1e-6, atol=0)
    equal = torch.zeros(3, model.experts, device=device)
    if model.bias is None:
        assert (model.route(equal, "triton")[1] == torch.arange(model.ours["top_k"], device=device)).all()


def test_the_sign_of_nan_does_not_matter(device):
    logits = torch.tensor([[1.0, float("nan"), 2.0, 0.0]], device=device)
    for sign in (1.0, -1.0):
        logits[0, 1] = logits[0, 1].copysign(torch.tensor(sign))
        assert logits.signbit()[0, 1] == (sign < 0)
        for backend in BACKENDS:
            assert router.route(logits, 2, backend=backend)[1].tolist() == [[1, 2]]


def test_negative_zero_ties_with_zero(device):
    logits = torch.tensor([[-0.0, 0.0, -0.0, -1.0]], device=device)
    for backend in BACKENDS:
        assert router.route(logits, 3, backend=backend)[1].tolist() == [[0, 1, 2]]


def test_a_bf16_sigmoid_is_rounded_as_torch_rounds_it(device):
    """Under autocast a DeepSeek router's scores are bf16: 0.5 and what rounds to it tie, whatever the logits."""
    logits = torch.tensor([[0.0, 1e-3, 0.5, -2.0]], dtype=BF16, device=device)
    assert (logits.sigmoid()[0, :2] == 0.5).all()
    for backend in BACKENDS:
        weights, ids = router.route(logits, 3, scoring="sigmoid", normalize=False, backend=backend)
        assert ids.tolist() == [[2, 0, 1]]
        assert torch.equal(weights, logits.sigmoid().gather(-1, ids))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_infinity(backend, device):
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor([[0.0, nan, 2.0, 1.0], [inf, 0.0, 1.0, 0.5], [-inf] * 4, [-inf, 1.0, -inf, -inf]],
                          device=device)  # fmt: skip
    weights, ids = router.route(logits, 2, backend=backend)
    assert ids.tolist() == [[1, 2], [0, 2], [0, 1], [1, 0]]
    assert weights.isnan().all(-1).tolist() == [True, True, True, False]
    assert weights[3].tolist() == [1.0, 0.0]
    weights, ids = router.route(logits, 2, scoring="sigmoid", normalize=False, backend=backend)
    assert ids.tolist() == [[1, 2], [0, 2], [0, 1], [1, 0]]
    assert weights.isnan().tolist() == [[True, False]] + [[False, False]] * 3
    assert router.route(logits, 2, scoring="sigmoid", backend=backend)[0][0].isnan().all()


def test_no_token(model, device):
    for backend in BACKENDS:
        logits = torch.empty(0, model.experts, device=device, requires_grad=True)
        weights, ids = model.route(logits, backend)
        assert weights.shape == ids.shape == (0, model.ours["top_k"])
        weights.sum().backward()
        assert logits.grad.shape == logits.shape


def test_unused_weights_and_frozen_logits(device):
    logits = torch.randn(5, 8, device=device)
    assert not router.route(logits, 2, backend="triton")[0].requires_grad
    weights, ids = router.route(logits.requires_grad_(), 2, backend="triton")
    assert not ids.requires_grad
    assert torch.autograd.grad(weights[:, 0].sum(), logits, retain_graph=True)[0].shape == logits.shape


def test_strided_logits_and_gradients(device):
    wide = torch.randn(6, 16, device=device)
    ours = run(lambda x: router.route(x[:, ::2], 2, backend="triton"), wide, torch.ones(6, 8, device=device))
    expected = run(lambda x: router.route(x[:, ::2], 2, backend="torch"), wide, torch.ones(6, 8, device=device))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)
    logits = torch.randn(6, 8, device=device, requires_grad=True)
    weights, ids = router.route(logits, 2, backend="triton")
    gradient = torch.randn(2, 6, device=device).t()
    weights.backward(gradient)
    expected = torch.softmax(logits.detach().requires_grad_(), -1)
    picked = logits.detach().gather(-1, ids).requires_grad_()
    picked.softmax(-1).backward(gradient)
    torch.testing.assert_close(logits.grad.gather(-1, ids), picked.grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_strided_bias(backend, device):
    logits, biases = torch.randn(6, 8, device=device), torch.randn(8, 2, device=device)
    for bias in (biases[:, 0], biases[:1, 0].expand(8)):
        assert not bias.is_contiguous()
        ids, expected = (
            router.route(logits, 2, scoring="sigmoid", correction_bias=b, backend=backend)[1]
            for b in (bias, bias.contiguous())
        )
        assert torch.equal(ids, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_best_groups_are_chosen_from(backend, device):
    """Where their experts are ruled out by a bias of -inf too."""
    bias = torch.tensor([-torch.inf] * 4 + [1.0, 1.0, -torch.inf, -torch.inf], device=device)
    choice = {"scoring": "sigmoid", "correction_bias": bias, "groups": 2, "top_groups": 1, "backend": backend}
    _, ids = router.route(torch.zeros(3, 8, device=device), 3, **choice)
    assert ids.tolist() == [[4, 5, 6]] * 3


def test_many_tokens_are_a_loop_in_each_program(model, device, monkeypatch):
    logits = random(model, 300, torch.float32, device)
    weights, ids = model.route(logits, "triton")
    monkeypatch.setattr(kernels, "_MAX_PROGRAMS", 2)
    again = model.route(logits, "triton")
    assert torch.equal(again[0], weights)
    assert torch.equal(again[1], ids)


@pytest.mark.skipif(not interpreting(), reason="needs Triton's interpreter: TRITON_INTERPRET=1")
def test_no_finding_and_one_launch_each(model, device):
    logits = random(model, 67, torch.float32, device).requires_grad_()
    with interpreter.sanitize(), interpreter.overflow_asserts(), interpreter.recorded_launches() as launches:
        weights, ids = model.route(logits, "triton")
        weights.backward(torch.ones_like(weights))
    assert launches == ["route_kernel", "route_grad_kernel"]
    gradient = logits.grad.clone()
    with interpreter.shuffled(0):
        again = model.route(logits.detach(), "triton")
    assert torch.equal(again[0], weights)
    assert torch.equal(again[1], ids)
    assert gradient.isfinite().all()


@pytest.mark.plain_memory
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_odd"])
def test_the_custom_ops_keep_their_contract(name, device):
    model = MODELS[name]
    logits = random(model, 5, torch.float32, device).requires_grad_()
    bias = None if model.bias is None else model.bias.to(device)
    ours = model.ours
    settings = router.Settings(ours["top_k"], bias is not None, ours["normalize"], ours.get("groups", 1),
                               ours.get("top_groups", 1), ours.get("scale", 1.0), torch.float32)  # fmt: skip
    torch.library.opcheck(router.route_forward, (logits, bias, *settings))
    weights, ids = router.route_forward(logits, bias, *settings)
    (through_op,) = torch.autograd.grad(weights.square().sum(), logits)
    eager, eager_ids = model.route(logits, "triton")
    (through_function,) = torch.autograd.grad(eager.square().sum(), logits)
    assert torch.equal(weights, eager)
    assert torch.equal(ids, eager_ids)
    assert torch.equal(through_op, through_function)


@pytest.mark.plain_memory
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["qwen2_moe", "deepseek_v3"])
def test_compiles_to_one_graph(name, backend, device):
    model = MODELS[name]
    compiled = torch.compile(lambda x: model.route(x, backend), fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (5, 9):
        cotangent = random(model, tokens, torch.float32, device, seed=1)
        logits = random(model, tokens, torch.float32, device)
        expected = run(lambda x: model.route(x, backend), logits, cotangent)
        for ours, eager in zip(run(compiled, logits, cotangent), expected, strict=True):
            torch.testing.assert_close(ours, eager, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 9}, "top_k=9 does not fit 8 experts"),
        ({"top_k": 0}, "1 to 8"),
        ({"scoring": "tanh"}, "neither softmax nor sigmoid"),
        ({"groups": 2}, "belong to scoring='sigmoid'"),
        ({"scoring": "sigmoid", "groups": 3}, "must divide 8 experts"),
        ({"scoring": "sigmoid", "groups": 8}, "groups of two at least"),
        ({"scoring": "sigmoid", "groups": 4, "top_groups": 1, "top_k": 3}, "cannot give 3 experts"),
        ({"scoring": "sigmoid", "groups": 4, "top_groups": 5}, "cannot give"),
        ({"scoring": "sigmoid", "groups": 0}, "groups=0 must be at least 1"),
        ({"scoring": "sigmoid", "correction_bias": torch.zeros(8, device="meta")}, "correction_bias is on meta"),
        ({"scoring": "sigmoid", "correction_bias": torch.zeros(7)}, r"correction_bias is \(7,\), want \(8,\)"),
        ({"backend": "cuda"}, "not one of auto, triton, torch"),
        ({"scale": torch.tensor(2.0, requires_grad=True)}, "scale is a Tensor, .* multiply the weights"),
        ({"weights_dtype": torch.int32}, "weights_dtype=torch.int32 is no floating dtype"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        router.route(torch.zeros(3, 8), **{"top_k": 2, **changes})


def test_what_the_kernel_cannot_run_is_refused(device):
    with pytest.raises(ValueError, match="logits must be"):
        router.route(torch.zeros(3, 8, 1), 2)
    with pytest.raises(UnsupportedProblem, match="513 experts are more than 512: use backend='torch'"):
        router.route(torch.zeros(3, 513, device=device), 2, backend="triton")
    with pytest.raises(UnsupportedProblem, match="float64"):
        router.route(torch.zeros(3, 8, device=device, dtype=torch.float64), 2, backend="triton")
    assert router.route(torch.zeros(3, 513, device=device), 2, backend="torch")[1].tolist() == [[0, 1]] * 3
