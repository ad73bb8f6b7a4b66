"""The op inside PyTorch: which gradients, what is saved, checkpointing, autocast, no_grad, dispatch, errors."""

import dataclasses
import functools
import itertools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import moe_kernels
from moe_kernels import backends, steps
from moe_kernels.activation import Activation
from moe_kernels.factors import LowRank
from moe_kernels.routing import plan_elements
from moe_kernels.tools.check.problems import DIFFERENTIABLE, Case, bound, call, eager, make_inputs, run, truth
from moe_kernels.tools.check.tolerances import assert_close_to_truth

MIXED_EXTRAS = ("gate_up_bias", "down_bias", "gate_up_lora_b", "gate_up_lora_a", "down_lora_b", "down_lora_a")
SMALL = Case(tokens=9, top_k=2, experts=3, hidden=32, intermediate=16, dtype=torch.bfloat16)


def args(inputs, requires_grad=True):
    leaves = {n: getattr(inputs, n).detach().clone().requires_grad_(requires_grad) for n in DIFFERENTIABLE}
    return leaves["x"], inputs.topk_ids, leaves["topk_weights"], leaves["gate_up"], leaves["down"]


def grads_of(call, inputs):
    leaves = args(inputs)
    call(*leaves).backward(inputs.grad)
    return {n: t.grad for n, t in zip(("x", "ids", *DIFFERENTIABLE[1:]), leaves, strict=True) if t.grad is not None}


SUBSETS = [s for n in range(4) for s in itertools.combinations(DIFFERENTIABLE, n)]


@functools.cache
def everything_of(backend, device):
    return run(functools.partial(moe_kernels.fused_experts, backend=backend), make_inputs(SMALL, device))


@pytest.mark.parametrize("wanted", SUBSETS, ids="+".join)
def test_gradients_exactly_of_what_requires_them(experts, backend, device, wanted):
    everything, some = everything_of(backend, device), run(experts, make_inputs(SMALL, device), wanted)
    for name in DIFFERENTIABLE:
        if name in wanted:
            assert torch.equal(some["d" + name], everything["d" + name]), name
        else:
            assert some["d" + name] is None, name
    assert torch.equal(some["out"], everything["out"])


def test_backward_twice_is_equal(experts, device):
    inputs = make_inputs(SMALL, device)
    leaves = args(inputs)
    out = experts(*leaves)
    wanted = [t for t in leaves if t.requires_grad]
    first = torch.autograd.grad(out, wanted, inputs.grad, retain_graph=True)
    second = torch.autograd.grad(out, wanted, inputs.grad)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gradients_accumulate_into_grad(experts, device):
    inputs = make_inputs(SMALL, device)
    leaves = args(inputs)
    for _ in range(2):
        experts(*leaves).backward(inputs.grad)
    once = run(experts, inputs)
    assert torch.equal(leaves[3].grad, once["dgate_up"] + once["dgate_up"])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(experts, device, mode):
    inputs = make_inputs(SMALL, device)
    leaves = args(inputs)
    with mode():
        out = experts(*leaves)
    assert not out.requires_grad
    assert torch.equal(out, experts(*leaves))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_nothing(experts, device, reentrant):
    inputs = make_inputs(SMALL, device)
    plain = grads_of(experts, inputs)
    again = grads_of(lambda *a: checkpoint(experts, *a, use_reentrant=reentrant), inputs)
    assert plain.keys() == again.keys()
    for name in plain:
        assert torch.equal(plain[name], again[name]), name


def test_autocast_runs_in_the_autocast_dtype(experts, device):
    inputs = make_inputs(Case(**{**SMALL.__dict__, "dtype": torch.float32}), device)
    with torch.autocast(device.type, torch.bfloat16):
        out = experts(*args(inputs))
    half = inputs.to(torch.bfloat16)
    expected = experts(half.x, half.topk_ids, inputs.topk_weights, half.gate_up, half.down)
    assert out.dtype == torch.float32
    assert torch.equal(out, expected.float())


def test_autocast_gradients_keep_the_parameters_dtype(experts, device):
    inputs = make_inputs(Case(**{**SMALL.__dict__, "dtype": torch.float32}), device)
    leaves = args(inputs)
    with torch.autocast(device.type, torch.bfloat16):
        out = experts(*leaves)
    out.backward(inputs.grad)
    for leaf in leaves:
        assert leaf.grad is None or (leaf.grad.dtype == leaf.dtype and torch.isfinite(leaf.grad).all())
    assert leaves[0].grad is not None


# Each tensor of a layer with everything, in a dtype that is not the others'.
MIXED = Case(**{**SMALL.__dict__, "bias": True, "lora_rank": 4})
MIXTURES = {
    "down": {"down"},
    "gate_up": {"gate_up"},
    "down and its factors": {"down", "down_lora_b", "down_lora_a"},
    "biases": {"gate_up_bias", "down_bias"},
    "one bias and one factor": {"down_bias", "gate_up_lora_b"},
    "x": {"x"},
    "all but x": {"gate_up", "down", *MIXED_EXTRAS},
}


@pytest.mark.parametrize("other", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("which", MIXTURES)
def test_two_dtypes_under_autocast(experts, device, which, other):
    """Autocast casts both; gradients come back in the dtype of each, those of factors rounded to that alone."""
    half = make_inputs(MIXED, device)
    expected = run(experts, half)
    mixed = {name: t.to(other) if name in MIXTURES[which] else t for name, t in half.leaves().items()}
    own = dataclasses.replace(half, **{n: mixed.pop(n) for n in DIFFERENTIABLE}, extras=mixed).with_own_leaves()
    with torch.autocast(device.type, torch.bfloat16):
        out = call(experts, own)
    assert out.dtype == own.x.dtype
    assert torch.equal(out, expected["out"].to(out.dtype))
    out.backward(half.grad.to(out.dtype))
    for name, leaf in own.leaves().items():
        assert leaf.grad.dtype == leaf.dtype
        once = "_lora_" in name and leaf.dtype != torch.bfloat16
        if once:
            assert not torch.equal(leaf.grad, leaf.grad.bfloat16().to(leaf.dtype)), name
        if once and leaf.dtype == torch.float16:  # rounded from float32 to either
            torch.testing.assert_close(leaf.grad.float(), expected[f"d{name}"].float(), rtol=2**-8, atol=0)
        elif once:
            assert torch.equal(leaf.grad.bfloat16(), expected[f"d{name}"]), name
        else:
            assert torch.equal(leaf.grad, expected[f"d{name}"].to(leaf.dtype)), name


@pytest.mark.parametrize("wide", ["gate_up", "down"])
def test_float64_beside_another_dtype_is_refused_under_autocast_too(experts, device, wide):
    """It is the one floating dtype that autocast leaves alone."""
    inputs = make_inputs(SMALL, device)
    inputs = dataclasses.replace(inputs, **{wide: getattr(inputs, wide).double()})
    with torch.autocast(device.type, torch.bfloat16), pytest.raises(ValueError, match="cast one of them"):
        call(experts, inputs)


def test_float32_activations_with_bfloat16_weights(experts, device):
    inputs = make_inputs(SMALL, device)
    wide = type(inputs)(**{**inputs.__dict__, "x": inputs.x.float(), "grad": inputs.grad.float()})
    results, expected, plain = run(experts, wide), truth(inputs), eager(inputs)
    assert results["out"].dtype == torch.float32
    for name, value in results.items():
        assert_close_to_truth(
            value.to(plain[name].dtype), expected[name], plain[name], name, compute_dtype=torch.bfloat16
        )


# ------------------------------------------------------------------------------------------- what is saved
def saved(experts, inputs):
    """(shape, bytes) of everything autograd keeps that is not an input weight."""
    leaves = args(inputs)
    weights = {leaves[3].data_ptr(), leaves[4].data_ptr()}
    kept = {}

    def pack(t):
        if t.data_ptr() not in weights:
            kept[t.data_ptr(), t.shape] = t.nbytes
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = experts(*leaves)
    return out, kept


def test_saved_memory_is_x_z_weights_and_plan(experts, device):
    c = SMALL
    _, kept = saved(experts, make_inputs(c, device))
    rows = c.tokens * c.top_k
    x, z, w = 2 * c.tokens * c.hidden, 4 * rows * c.intermediate, 4 * rows
    plan = 4 * plan_elements(rows, c.experts)
    assert sum(kept.values()) == x + z + w + plan
    assert plan <= 4 * (2 * rows + c.experts + rows // 32 + 2 * c.experts) + 6 * 128 + 128


def test_saved_shapes_do_not_depend_on_the_routing(experts, device):
    shapes = set()
    for routing in ("random", "all_to_last", "all_sentinels", "one_token_each"):
        _, kept = saved(experts, make_inputs(Case(**{**SMALL.__dict__, "routing": routing}), device))
        shapes.add(tuple(sorted(tuple(shape) for _, shape in kept)))
    assert len(shapes) == 1


# ------------------------------------------------------------------------------------------- dispatch, errors
def test_every_forward_is_counted(experts, backend, device):
    inputs = make_inputs(SMALL, device)
    backends.reset_dispatch_counts()
    run(experts, inputs)
    run(experts, inputs)
    assert moe_kernels.dispatch_counts() == {backend: 2}
    with pytest.raises(RuntimeError), backends.uncounted():
        raise RuntimeError(run(experts, inputs))
    assert moe_kernels.dispatch_counts() == {backend: 2}, "what was not to be counted is not, also where it fails"


def test_the_backend_of_the_forward_runs_the_backward(experts, backend, device, monkeypatch):
    """A backend chosen by argument is chosen for the backward too."""
    inputs = make_inputs(SMALL, device)
    other = {"torch": "triton", "triton": "torch"}[backend]
    leaves = args(inputs)
    out = experts(*leaves)
    asked = []
    choose = steps.backend_of

    def backend_of(*call):
        asked.append(choose(*call).name)
        return choose(*call)

    monkeypatch.setattr(steps, "backend_of", backend_of)
    out.backward(inputs.grad)
    assert backend in asked
    assert other not in asked


def test_auto_takes_torch_on_cpu_and_says_why():
    inputs = make_inputs(SMALL)
    name, why = backends.select(backends.Problem.of(inputs.down, SMALL.top_k), "auto")
    assert name == "torch"
    assert "NVIDIA GPU" in why


BAD = {
    "x of three dimensions": (lambda a: {"x": a.x[None]}, "wants x"),
    "hidden sizes": (lambda a: {"x": a.x[:, :-8].contiguous()}, "sizes disagree"),
    "number of experts": (lambda a: {"down": a.down[:-1].contiguous()}, "sizes disagree"),
    "odd gate_up": (lambda a: {"gate_up": a.gate_up[:, :-1].contiguous()}, "sizes disagree"),
    "tokens": (lambda a: {"topk_ids": a.topk_ids[:-1]}, r"must be \(T, K\)"),
    "top_k": (lambda a: {"topk_weights": a.topk_weights[:, :-1]}, r"must both be \(T, K\)"),
    "ids of float": (lambda a: {"topk_ids": a.topk_ids.float()}, "int64 or int32"),
    "integer x": (lambda a: {"x": a.x.long()}, "must be a floating dtype"),
    "integer routing weights": (lambda a: {"topk_weights": a.topk_weights.long()}, "must be a floating dtype"),
    "weights of two dtypes": (lambda a: {"down": a.down.float()}, "cast one of them"),
    "weights of 8 bits": (
        lambda a: {"gate_up": a.gate_up.to(torch.float8_e4m3fn), "down": a.down.to(torch.float8_e4m3fn)},
        "gate_up must be a floating dtype .*, not torch.float8_e4m3fn",
    ),
    "integer weights": (lambda a: {"down": a.down.long()}, "down must be a floating dtype"),
    "weights with gaps": (lambda a: {"down": a.down.repeat(1, 1, 2)[..., ::2]}, "must be contiguous"),
    "one id": (lambda a: {"topk_ids": a.topk_ids[0, 0]}, r"must be \(T, K\)"),
    "no expert": (lambda a: {"gate_up": a.gate_up[:0], "down": a.down[:0]}, "0 experts"),
    "no expert of a token": (
        lambda a: {"topk_ids": a.topk_ids[:, :0], "topk_weights": a.topk_weights[:, :0]},
        "nothing to route to",
    ),
    "a low-rank pair of numbers": (
        lambda a: {"extras": {"down_lora_b": a.down.sum(), "down_lora_a": a.down.sum()}},
        "down_lora is",
    ),
    "weights without a sum": (lambda a: {"options": {"reduce": False}}, "None with reduce=False"),
    "bias of another size": (lambda a: {"extras": {"gate_up_bias": a.gate_up[:, 1:, 0]}}, "gate_up_bias is"),
    "rank of the factors": (
        lambda a: {"extras": {"down_lora_b": a.down[..., :4], "down_lora_a": a.down[:, :3]}},
        "down_lora is",
    ),
    "interleaved without a gate": (
        lambda a: {"gate_up": a.gate_up[:, : a.down.shape[2]].contiguous(), "options": {"interleaved": True}},
        "without a gate",
    ),
}


@pytest.mark.parametrize("name", ["x", "topk_ids", "topk_weights", "gate_up", "down", "gate_up_bias", "down_bias"])
@pytest.mark.parametrize("made", [torch.Tensor.tolist, torch.Tensor.numpy, lambda _: 3], ids=["list", "array", "3"])
def test_what_is_no_tensor_is_named(name, made):
    inputs = make_inputs(dataclasses.replace(SMALL, bias=True, dtype=torch.float32))
    given = {name: getattr(inputs, name) for name in ("x", "topk_ids", "topk_weights", "gate_up", "down")}
    given |= inputs.extras
    given[name] = made(given[name].detach())
    with pytest.raises(ValueError, match=rf"^{name} must be a tensor, not (list|ndarray|int): "):
        moe_kernels.fused_experts(**given)


@pytest.mark.parametrize(
    ("pair", "kinds"),
    [
        (lambda b, a: b, "Tensor"),
        (lambda b, a: (b,), "Tensor"),
        (lambda b, a: (), "empty"),
        (lambda b, a: (b, a, 1.0, 1.0), "Tensor, Tensor, float, float"),
        (lambda b, a: (None, a), "NoneType, Tensor"),
        (lambda b, a: LowRank(b, None), "Tensor, NoneType, float"),
        (lambda b, a: (b, 8), "Tensor, int"),
    ],
)
def test_what_is_no_pair_of_factors_is_named(experts, device, pair, kinds):
    """A single factor would be left out in silence."""
    inputs = make_inputs(dataclasses.replace(SMALL, lora_rank=4), device)
    wrong = pair(inputs.extras["down_lora_b"], inputs.extras["down_lora_a"])
    with pytest.raises(ValueError, match=rf"down_lora should be \(lora_b, lora_a\), two .* and is {kinds}$"):
        bound(experts, inputs)(inputs.x, inputs.topk_ids, inputs.topk_weights, down_lora=wrong)


@pytest.mark.parametrize("scaling", [torch.tensor(2.0, requires_grad=True), "2"])
def test_a_scaling_that_is_no_number_is_refused(experts, device, scaling):
    """A trained one would get no gradient in silence."""
    inputs = make_inputs(dataclasses.replace(SMALL, lora_rank=4), device)
    pair = inputs.extras["down_lora_b"], inputs.extras["down_lora_a"], scaling
    with pytest.raises(ValueError, match=f"has a {type(scaling).__name__} as its scaling.* pass a float"):
        bound(experts, inputs)(inputs.x, inputs.topk_ids, inputs.topk_weights, down_lora=pair)


@pytest.mark.parametrize("what", BAD)
def test_bad_inputs_are_named(experts, device, what):
    change, message = BAD[what]
    inputs = make_inputs(SMALL, device)
    a = type(inputs)(**{**inputs.__dict__, **change(inputs)})
    with pytest.raises(ValueError, match=message):
        call(experts, a)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"group_size": 100}, "64, 128, 256, auto"),
        ({"group_size": True}, "64, 128, 256, auto"),
        ({"persistent": "yes"}, "true or false"),
        ({"interleaved": "no"}, "true or false"),
        ({"reduce": 1}, "true or false"),
        ({"activation": "tanh"}, "silu"),
        ({"activation": "clamped_glu"}, r"takes the parameters \(alpha, limit\)"),
        ({"backend": "cuda"}, "auto, gluon, triton, torch"),
    ],
    ids=str,
)
def test_bad_settings_list_the_valid_ones(device, setting, message):
    inputs = make_inputs(SMALL, device)
    with pytest.raises(ValueError, match=message):
        moe_kernels.fused_experts(
            inputs.x, inputs.topk_ids, inputs.topk_weights, inputs.gate_up, inputs.down, **setting
        )


def test_a_limit_may_be_infinite():
    """So models switch a clamp off."""
    assert Activation("clamped_silu", (float("inf"),)).parameters == (float("inf"),)


@pytest.mark.parametrize("parameters", [(-1.0,), (0.0,), (float("nan"),), ("7",)], ids=str)
def test_parameters_of_an_activation_are_positive_numbers(parameters):
    with pytest.raises(ValueError, match=r"takes positive numbers for \(limit\)"):
        Activation("clamped_silu", parameters)
