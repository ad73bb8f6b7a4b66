"""The op against float64 and plain PyTorch: output and every gradient, on every backend."""

import dataclasses
import functools

import pytest
import torch

import moe_kernels
from moe_kernels.activation import ACTIVATIONS, PLAIN, Activation
from moe_kernels.tools.check.problems import DIFFERENTIABLE, Case, eager, make_inputs, run, truth
from moe_kernels.tools.check.routings import ROUTINGS
from support.judge import check

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALL = Case(tokens=11, top_k=2, experts=4, hidden=48, intermediate=32)


def case(**changes):
    return Case(**{**SMALL.__dict__, **changes})


def judge(experts, c, device, **options):
    return check(functools.partial(experts, **options), make_inputs(c, device), str(c))


@pytest.mark.parametrize("routing", ROUTINGS)
def test_hostile_routings(experts, device, routing):
    judge(experts, case(routing=routing, dtype=torch.bfloat16), device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("routing", ["random", "sentinels", "all_to_last", "duplicated_ids"])
def test_dtypes(experts, device, routing, dtype):
    judge(experts, case(routing=routing, dtype=dtype), device)


# Clamps and caps that the unit-variance data crosses often.
CLAMPED = Activation("clamped_glu", (1.702, 0.7))
CHOICES = [
    *PLAIN,
    CLAMPED,
    Activation("clamped_silu", (0.5,)),
    Activation("softcapped_silu", (0.8, 1.5)),
]


def test_every_activation_is_tried():
    assert {Activation.of(choice).name for choice in CHOICES} == set(ACTIVATIONS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", CHOICES, ids=lambda a: Activation.of(a).name)
def test_activations(experts, device, activation, dtype):
    judge(experts, case(routing="sentinels", dtype=dtype, activation=activation), device)


@pytest.mark.parametrize("activation", CHOICES, ids=lambda a: Activation.of(a).name)
def test_the_partials_are_autograds(activation):
    chosen = Activation.of(activation)
    gate = torch.linspace(-9, 9, 1001, dtype=torch.float64, requires_grad=True)
    up = torch.linspace(-5, 6, 1001, dtype=torch.float64).flip(0).requires_grad_()
    rule = ACTIVATIONS[chosen.name]
    expected = torch.autograd.grad(rule.value(gate, up, *chosen.parameters).sum(), (gate, up))
    actual = rule.partials(gate.detach(), up.detach(), *chosen.parameters)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)


AT_A_BOUND = [Activation("clamped_glu", (1.702, 0.5)), Activation("clamped_silu", (0.5,))]


@pytest.mark.parametrize("choice", AT_A_BOUND, ids=lambda a: a.name)
def test_a_clamp_at_its_bound_is_the_installed_torchs(experts, device, choice):
    """Until torch 2.13 the gradient passes there, from 2.14 on it does not; in bfloat16 values often lie there."""
    inputs = make_inputs(case(dtype=torch.bfloat16, activation=choice), device)
    inputs.x.zero_()[:, 0] = 1  # so that Z is the first column of the weights
    bounds = torch.tensor([-0.5, 0.25, 0.5], dtype=torch.bfloat16, device=device)
    inputs.gate_up[:, :, 0] = bounds[torch.arange(inputs.gate_up.shape[1], device=device) % 3]
    check(experts, inputs, str(choice))


LAYOUTS = [
    case(routing="sentinels", transposed=True),
    case(routing="sentinels", interleaved=True),
    case(routing="sentinels", bias=True),
    case(routing="sentinels", gated=False, activation="relu2"),
    case(routing="sentinels", gated=False, bias=True, transposed=True, activation="gelu"),
    case(routing="sentinels", reduce=False),
    # gpt-oss, and its neighbour with gate and up apart
    case(routing="zipf", transposed=True, interleaved=True, bias=True, activation=CLAMPED),
    case(routing="zipf", transposed=True, bias=True, activation=CLAMPED),
    case(routing="empty_first_middle_last", tokens=23, hidden=72, intermediate=40, interleaved=True, bias=True),
    case(routing="empty_first_middle_last", tokens=23, hidden=37, intermediate=21, transposed=True, bias=True),
    case(routing="sentinels", lora_rank=4),
    case(routing="zipf", tokens=23, lora_rank=16, transposed=True, interleaved=True, bias=True),
    case(routing="zipf", lora_rank=5, gated=False, hidden=40, intermediate=24),
    case(routing="one_hot_expert", lora_rank=20, reduce=False, bias=True),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("c", LAYOUTS, ids=str)
def test_layouts(experts, device, c, dtype):
    judge(experts, dataclasses.replace(c, dtype=dtype), device)


@pytest.mark.parametrize("c", [LAYOUTS[6], LAYOUTS[11]], ids=str)
def test_layouts_in_small_tiles(experts, device, c, small_tiles):
    judge(experts, dataclasses.replace(c, tokens=37, dtype=torch.bfloat16), device)


def test_gradients_keep_the_memory_order_of_the_weights(experts, device):
    inputs = make_inputs(case(transposed=True), device)
    stored = [w.mT.clone().requires_grad_() for w in (inputs.gate_up, inputs.down)]
    experts(inputs.x, inputs.topk_ids, inputs.topk_weights, *(w.mT for w in stored)).sum().backward()
    assert all(w.grad.is_contiguous() for w in stored)


def test_frozen_weights_cost_no_gradient(experts, device):
    inputs = make_inputs(case(lora_rank=8), device)
    wanted = tuple(inputs.extras)
    results = run(experts, inputs, wanted)
    expected = run(experts, inputs)
    assert all(results[f"d{name}"] is None for name in ("x", "topk_weights", "gate_up", "down"))
    assert all(torch.equal(results[f"d{name}"], expected[f"d{name}"]) for name in wanted)


@pytest.mark.parametrize("name", ["x", "topk_weights", "gate_up", "down", "down_lora_a", "gate_up_lora_b"])
def test_a_gradient_alone_is_the_one_among_all(experts, device, name):
    """What serves others, such as wA for the down weight and its lora_a, is left out without harm."""
    inputs = make_inputs(case(lora_rank=8), device)
    assert torch.equal(run(experts, inputs, (name,))[f"d{name}"], run(experts, inputs)[f"d{name}"])


def test_recompute_changes_no_bit(experts, device):
    inputs = make_inputs(case(routing="zipf", lora_rank=8, bias=True), device)
    expected, actual = run(experts, inputs), run(functools.partial(experts, recompute=True), inputs)
    assert all(torch.equal(value, expected[name]) for name, value in actual.items())


def test_a_kept_graph_can_be_walked_again(experts, device):
    """The backward writes dZ over Z, but not while the graph is kept."""
    inputs = make_inputs(case(), device)
    x = inputs.x.clone().requires_grad_()
    out = experts(x, inputs.topk_ids, inputs.topk_weights, inputs.gate_up, inputs.down)
    (first,) = torch.autograd.grad(out, x, inputs.grad, retain_graph=True)
    (second,) = torch.autograd.grad(out, x, inputs.grad)
    assert torch.equal(first, second)


SIZES = [
    case(tokens=1, top_k=1, experts=1),
    case(tokens=1, top_k=4),
    case(tokens=7, top_k=2, experts=2, hidden=16, intermediate=8),
    case(tokens=5, top_k=3, experts=64, hidden=16, intermediate=8),
    case(tokens=3, top_k=6, experts=4, routing="duplicated_ids"),
    # Sizes that are no multiples of 16: the pointer kernels.
    case(hidden=40, intermediate=24),
    case(hidden=36, intermediate=20),
    case(hidden=41, intermediate=13),
    # Intermediate and hidden sizes one block, one block and a bit, several blocks.
    case(tokens=20, hidden=64, intermediate=64),
    case(tokens=20, hidden=80, intermediate=80),
    case(tokens=10, hidden=136, intermediate=88),
    # Rows of one expert: a full tile, one more, one less.
    case(tokens=64, top_k=1, experts=2, hidden=16, intermediate=16, routing="all_to_last"),
    case(tokens=65, top_k=1, experts=2, hidden=16, intermediate=16, routing="all_to_last"),
    case(tokens=63, top_k=2, experts=1, hidden=16, intermediate=16, routing="all_to_last"),
]


@pytest.mark.parametrize("c", SIZES, ids=str)
def test_sizes_bf16(experts, device, c):
    judge(experts, Case(**{**c.__dict__, "dtype": torch.bfloat16}), device)


@pytest.mark.parametrize("c", [SIZES[6], SIZES[7], SIZES[9]], ids=str)
def test_sizes_fp32(experts, device, c):
    judge(experts, c, device)


@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("group_size", [64, 128, 256, "auto"])
def test_settings_change_nothing(experts, device, group_size, persistent):
    c = case(
        tokens=70, top_k=2, experts=3, hidden=32, intermediate=24, dtype=torch.bfloat16, routing="one_hot_expert"
    )
    judge(experts, c, device, group_size=group_size, persistent=persistent)


@pytest.mark.parametrize("weights_dtype", DTYPES, ids=str)
def test_routing_weights_of_another_dtype(experts, device, weights_dtype):
    c = case(dtype=torch.bfloat16, weights_dtype=weights_dtype)
    inputs = make_inputs(c, device)
    results = run(experts, inputs)
    assert results["dtopk_weights"].dtype == weights_dtype
    judge(experts, c, device)


def test_no_tokens(experts, device):
    results = run(experts, make_inputs(case(tokens=0), device))
    assert results["out"].shape == (0, SMALL.hidden)
    assert results["dx"].shape == (0, SMALL.hidden)
    assert results["dtopk_weights"].shape == (0, SMALL.top_k)
    assert torch.count_nonzero(results["dgate_up"]) == 0
    assert torch.count_nonzero(results["ddown"]) == 0


def test_no_tokens_without_a_sum(experts, device):
    results = run(experts, make_inputs(case(tokens=0, reduce=False), device))
    assert results["out"].shape == (0, SMALL.top_k, SMALL.hidden)


def test_float64_gradcheck_on_torch_backend():
    c = case(
        tokens=6, hidden=6, intermediate=4, dtype=torch.float64, weights_dtype=torch.float64, routing="sentinels"
    )
    inputs = make_inputs(c)
    leaves = [getattr(inputs, n).clone().requires_grad_() for n in DIFFERENTIABLE]

    def op(x, w, gate_up, down):
        return moe_kernels.fused_experts(x, inputs.topk_ids, w, gate_up, down, backend="torch")

    assert torch.autograd.gradcheck(op, leaves, fast_mode=True)


# ------------------------------------------------------------------------------------------------ exactness
def integers(c, device, density=0.25):
    """A problem in which every intermediate and result is exactly representable in the dtype, in any order of
    summation: silu is exactly 0 or the identity on gates of 0, 32, 64, ..., everything else is a small integer."""
    g = torch.Generator().manual_seed(3)

    def sparse(shape, values, nonzero):
        pick = torch.tensor(values, dtype=torch.float32)[torch.randint(len(values), shape, generator=g)]
        return pick * (torch.rand(shape, generator=g) < nonzero)

    inputs = make_inputs(c)
    x = torch.zeros(c.tokens, c.hidden)
    x.scatter_(1, torch.randint(c.hidden, (c.tokens, 2), generator=g), 1.0)
    gate = sparse((c.experts, c.intermediate, c.hidden), [32.0], density)
    up = sparse((c.experts, c.intermediate, c.hidden), [-1.0, 1.0], density)
    down = sparse((c.experts, c.hidden, c.intermediate), [-1.0, 1.0], 0.12)
    weights = torch.tensor([0.5, 1.0, -1.0])[torch.randint(3, (c.tokens, c.top_k), generator=g)]
    grad = torch.zeros(c.tokens, c.hidden)
    grad.scatter_(1, torch.randint(c.hidden, (c.tokens, 2), generator=g), 1.0)
    changed = {"x": x, "gate_up": torch.cat([gate, up], 1), "down": down, "grad": grad}
    changed = {name: value.to(c.dtype).to(device) for name, value in changed.items()}
    return type(inputs)(topk_ids=inputs.topk_ids.to(device), topk_weights=weights.to(device), **changed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("routing", ["random", "sentinels", "duplicated_ids"])
def test_integers_are_bitwise_exact(experts, device, dtype, routing):
    inputs = integers(case(tokens=21, hidden=40, intermediate=24, dtype=dtype, routing=routing), device)
    # float32 on purpose: there the sigmoid of 32 is exactly one.
    expected = eager(inputs.to(torch.float32))
    for name, value in run(experts, inputs).items():
        rounded = expected[name].to(value.dtype)
        assert torch.equal(rounded.float(), expected[name]), f"{name}: the test's own data is not representable"
        assert torch.equal(value, rounded), f"{name} differs at {(value != rounded).nonzero()[:3].tolist()}"


def test_empty_experts_have_exactly_zero_weight_gradients(experts, device):
    inputs = make_inputs(case(routing="all_to_last", dtype=torch.bfloat16), device)
    results = run(experts, inputs)
    for name in ("dgate_up", "ddown"):
        assert torch.count_nonzero(results[name][:-1]) == 0
        assert torch.count_nonzero(results[name][-1]) > 0


def test_dropped_slots_cost_and_leak_nothing(experts, device):
    inputs = make_inputs(case(routing="sentinels"), device)
    dropped = (inputs.topk_ids < 0) | (inputs.topk_ids >= SMALL.experts)
    inputs.topk_weights[dropped] = float("nan")
    inputs.x[0] = float("nan")  # token 0 has no expert here
    results = run(experts, inputs)
    for name, value in results.items():
        assert torch.isfinite(value).all(), name
    assert torch.count_nonzero(results["out"][0]) == 0
    assert torch.count_nonzero(results["dx"][0]) == 0
    assert torch.count_nonzero(results["dtopk_weights"][dropped]) == 0


def test_unused_experts_may_hold_nan(experts, device):
    inputs = make_inputs(case(routing="all_to_last"), device)
    inputs.gate_up[:-1] = float("nan")
    inputs.down[:-1] = float("nan")
    for name, value in run(experts, inputs).items():
        assert torch.isfinite(value).all(), name


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["x", "topk_weights", "gate_up", "down", "grad"])
def test_non_finite_values_go_where_the_reference_sends_them(experts, device, where, bad):
    inputs = make_inputs(SMALL, device)
    getattr(inputs, where).view(-1)[7] = bad
    expected, actual = truth(inputs), run(experts, inputs)
    for name, value in actual.items():
        assert torch.equal(torch.isfinite(value), torch.isfinite(expected[name])), name


# ------------------------------------------------------------------------------------------------ layouts
def test_int32_ids(experts, device):
    inputs = make_inputs(SMALL, device)
    narrow = type(inputs)(**{**inputs.__dict__, "topk_ids": inputs.topk_ids.int()})
    assert_equal(run(experts, narrow), run(experts, inputs))


def assert_equal(results, expected):
    for name, value in results.items():
        assert torch.equal(value, expected[name]), name


def strided(t, kind):
    if kind == "transposed":
        return t.transpose(-1, -2).contiguous().transpose(-1, -2)
    if kind == "sliced":
        return torch.stack([t, torch.full_like(t, 99)], -1)[..., 0]
    return torch.cat([torch.full_like(t[:1], 99), t])[1:]  # offset: same strides, another base address


@functools.cache
def contiguous_results(backend, device):
    inputs = make_inputs(case(dtype=torch.bfloat16), device)
    return run(functools.partial(moe_kernels.fused_experts, backend=backend), inputs)


@pytest.mark.parametrize(
    ("which", "kind"),
    [("x", "transposed"), ("x", "offset"), ("topk_ids", "sliced"), ("topk_weights", "transposed"),
     ("grad", "sliced"), ("grad", "transposed")],
)  # fmt: skip
def test_strided_inputs(experts, backend, device, which, kind):
    inputs = make_inputs(case(dtype=torch.bfloat16), device)
    i = type(inputs)(**{**inputs.__dict__, which: strided(getattr(inputs, which), kind)})
    # Not run(): it clones its inputs, which would make them contiguous.
    leaves = [getattr(i, n).detach().requires_grad_() for n in DIFFERENTIABLE]
    out = experts(leaves[0], i.topk_ids, *leaves[1:])
    grads = torch.autograd.grad(out, leaves, i.grad)
    results = {"out": out, **{"d" + n: g for n, g in zip(DIFFERENTIABLE, grads, strict=True)}}
    assert_equal(results, contiguous_results(backend, device))


def loose(t):
    """The same numbers with an odd stride along the first dimension, which says nothing where there is one of it."""
    t = t.detach()
    return t.as_strided(t.shape, (t.stride(0) + 1, *t.stride()[1:]))


@pytest.mark.parametrize("transposed", [False, True])
def test_strides_of_one_expert_and_one_token(experts, device, transposed):
    c = case(tokens=1, experts=1, top_k=1, hidden=64, intermediate=64, dtype=torch.bfloat16, transposed=transposed)
    inputs = make_inputs(c, device)
    found = []
    for leaf in (torch.Tensor.detach, loose):
        leaves = [leaf(getattr(inputs, name)).requires_grad_() for name in DIFFERENTIABLE]
        out = experts(leaves[0], inputs.topk_ids, *leaves[1:])
        grads = torch.autograd.grad(out, leaves, leaf(inputs.grad))
        found.append({"out": out, **dict(zip(DIFFERENTIABLE, grads, strict=True))})
    assert_equal(*found)


def assert_alike(results, expected):
    """Tensor maps and pointers may differ in the last bit."""
    for name, value in results.items():
        torch.testing.assert_close(value, expected[name], rtol=2e-2, atol=2e-2)


def every_other(t):
    return torch.stack([t, torch.full_like(t, float("nan"))], 1).flatten(0, 1)[::2]


def in_records(t):
    """Each expert's matrix behind five other numbers: no stride of whole rows, no address of 16 bytes."""
    flat = t.flatten(1)
    return torch.cat([torch.full_like(flat[:, :5], float("nan")), flat], 1)[:, 5:].unflatten(1, t.shape[1:])


APART = {"every other": every_other, "in records": in_records}


def apart(weight, kind):
    """``weight`` with its experts apart, each stored as it was."""
    return APART[kind](weight) if weight.is_contiguous() else APART[kind](weight.mT).mT


FAR = [
    case(hidden=64, intermediate=32, dtype=torch.bfloat16),
    case(hidden=64, intermediate=32, dtype=torch.bfloat16, transposed=True),
    case(hidden=41, intermediate=13, transposed=True, bias=True, lora_rank=4, routing="sentinels"),
    case(hidden=48, intermediate=32, dtype=torch.float16, interleaved=True, transposed=True, bias=True, lora_rank=4),
    case(hidden=40, intermediate=24, gated=False, activation="gelu", reduce=False),
    case(hidden=64, intermediate=32, dtype=torch.bfloat16, experts=1),
]


@pytest.mark.parametrize("kind", APART)
@pytest.mark.parametrize("c", FAR, ids=str)
def test_experts_that_lie_apart(experts, device, c, kind):
    """Any stride between experts; what lies in the gaps is never read."""

    def implementation(x, ids, weights, gate_up, down, **others):
        return experts(x, ids, weights, apart(gate_up, kind), apart(down, kind), **others)

    check(implementation, make_inputs(c, device), f"{c} {kind}")


def test_experts_that_lie_apart_in_small_tiles(experts, device, small_tiles):
    def implementation(x, ids, weights, gate_up, down, **others):
        return experts(x, ids, weights, every_other(gate_up), in_records(down), **others)

    check(implementation, make_inputs(case(tokens=37, hidden=80, intermediate=48, dtype=torch.bfloat16), device))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", APART)
@pytest.mark.parametrize("count", [1, 4])
def test_gradients_of_experts_that_lie_apart(experts, backend, device, kind, transposed, count):
    """They are those of weights without gaps, in the same memory order and without gaps themselves."""
    c = case(hidden=64, intermediate=32, dtype=torch.bfloat16, transposed=transposed, experts=count, top_k=1)
    inputs = make_inputs(c, device)
    found = []
    for leaf in (torch.Tensor.detach, lambda t: apart(t.detach(), kind)):
        weights = [leaf(w).requires_grad_() for w in (inputs.gate_up, inputs.down)]
        out = experts(inputs.x, inputs.topk_ids, inputs.topk_weights, *weights)
        grads = torch.autograd.grad(out, weights, inputs.grad)
        found.append({"out": out, "gate_up": grads[0], "down": grads[1]})
    assert all(found[0][name].stride() == value.stride() for name, value in found[1].items())
    assert_alike(*found)


@pytest.mark.parametrize("transposed", [False, True])
def test_one_matrix_for_several_experts(experts, device, transposed):
    """A stride of zero, and experts that share rows with the next."""
    inputs = make_inputs(case(hidden=32, intermediate=32, dtype=torch.bfloat16, transposed=transposed), device)

    def overlapping(w):
        matrix = w.mT if transposed else w
        view = matrix.as_strided(matrix.shape, (8 * matrix.shape[2], *matrix.stride()[1:]))
        return view.mT if transposed else view

    for view in (lambda w: w[:1].expand(w.shape), overlapping):
        found = []
        for copy in (torch.Tensor.detach, torch.clone):
            leaves = [copy(view(w.detach())).requires_grad_() for w in (inputs.gate_up, inputs.down)]
            out = experts(inputs.x, inputs.topk_ids, inputs.topk_weights, *leaves)
            grads = torch.autograd.grad(out, leaves, inputs.grad)
            found.append({"out": out, "gate_up": grads[0], "down": grads[1]})
        assert_alike(*found)


def test_tensor_maps_are_of_experts_on_a_grid_of_rows():
    """Experts over each other or off the grid of whole rows are loaded by pointers."""
    operands = pytest.importorskip("moe_kernels.kernels.operands")
    weight = torch.zeros(4, 64, 32, dtype=torch.bfloat16)  # tensors of the CPU are taken for those of a Hopper
    assert operands.tma_fits(weight)
    assert operands.tma_fits(weight[::2])
    assert operands.tma_fits(weight[:, :32])
    assert not operands.tma_fits(weight[:1].expand(4, 64, 32))
    assert not operands.tma_fits(weight.as_strided((4, 64, 32), (32, 32, 1)))
    off_grid = torch.zeros(3 * 64 * 33, dtype=torch.bfloat16).as_strided((3, 64, 32), (2056, 32, 1))
    assert not operands.tma_fits(off_grid)


def test_expanded_upstream_gradient(experts, device):
    inputs = make_inputs(SMALL, device)
    ones = type(inputs)(**{**inputs.__dict__, "grad": torch.ones((), device=device).expand(11, 48)})
    dense = type(inputs)(**{**inputs.__dict__, "grad": torch.ones(11, 48, device=device)})
    assert_equal(run(experts, ones), run(experts, dense))
