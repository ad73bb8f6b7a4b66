"""LoRA's factors as they are stored: packed as torch would, and gradients that are rounded once, to their dtype."""

import contextlib

import pytest
import torch

from moe_kernels import fused_experts
from moe_kernels.backends.torch import TorchBackend
from moe_kernels.backends.triton import TritonBackend
from moe_kernels.factors import LowRank, factor_room, has_experts_last, packed, padded_rank
from moe_kernels.kernels.device import interpreting
from moe_kernels.kernels.launch.launch import launch_counts
from moe_kernels.layer import Weight
from moe_kernels.routing import TokenRows
from moe_kernels.tools.check.problems import Case, make_inputs
from support import interpreter

torch_backend, triton_backend = TorchBackend(), TritonBackend()
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
EXPERTS = 70  # more than a tile of lora_b has


def peft(lora_b):
    """In PEFT's memory order: experts fastest."""
    return lora_b.permute(1, 2, 0).contiguous().permute(2, 0, 1)


def within(factor):
    """In a larger tensor, on an odd address."""
    room = factor.new_full((*factor.shape[:2], factor.shape[2] + 3), float("nan"))
    room[..., 1:-2] = factor
    return room[..., 1:-2]


STORED = {
    "peft": peft,
    "contiguous": lambda factor: factor,
    "within": within,
    "transposed": lambda factor: factor.mT.contiguous().mT,
}


def make_pair(rows, columns, rank, dtype, device, stored="peft", scaling=1.0, experts=EXPERTS):
    generator = torch.Generator().manual_seed(rank + rows)
    lora_b, lora_a = (torch.randn(experts, *s, generator=generator) for s in ((rows, rank), (rank, columns)))
    lora_b, lora_a = (factor.to(device, dtype) for factor in (lora_b, lora_a))
    return LowRank(STORED[stored](lora_b), lora_a if stored == "peft" else STORED[stored](lora_a), scaling)


@contextlib.contextmanager
def checked():
    """Launches that the interpreter looks over, where it runs."""
    with contextlib.ExitStack() as stack:
        if interpreting():
            stack.enter_context(interpreter.sanitize())
            stack.enter_context(interpreter.overflow_asserts())
        yield


def assert_packed(parts, dtype):
    with checked():
        ours = triton_backend.pack_factors(parts, dtype)
    for (lora_b, lora_a), part, plain in zip(ours, parts, torch_backend.pack_factors(parts, dtype), strict=True):
        for mine, expected, given in zip((lora_b, lora_a), plain, part[:2], strict=True):
            assert (mine is None) == (given is None)
            if given is not None:
                assert mine.is_contiguous()
                assert torch.equal(mine, expected)
                assert mine.dtype == dtype
    return ours


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("own", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize(("rank", "other"), [(1, 16), (5, 33), (16, 128), (100, 8)])
def test_the_kernel_packs_bitwise_as_torch(rank, other, own, dtype, device):
    """Both weights of a layer in one launch, of different ranks, of which one is scaled."""
    parts = [make_pair(13, 21, rank, own, device, scaling=0.3), make_pair(21, 11, other, own, device)]
    assert_packed(parts, dtype)


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("experts", [1, 3, EXPERTS])
def test_any_memory_order_is_packed(stored, experts, device):
    assert_packed([make_pair(9, 300, 4, FP32, device, stored, 1.5, experts)], BF16)


@pytest.mark.parametrize("given", ["b", "a", "b of the second", "a of the second", "b and the other's a"])
def test_a_part_of_the_factors(given, device):
    one, two = make_pair(13, 21, 5, FP32, device), make_pair(21, 11, 9, BF16, device, scaling=2.0)
    only_b, only_a = (lambda p: p._replace(lora_a=None)), (lambda p: p._replace(lora_b=None))
    parts = {
        "b": [only_b(one)],
        "a": [only_a(one)],
        "b of the second": [LowRank(), only_b(two)],
        "a of the second": [LowRank(), only_a(two)],
        "b and the other's a": [only_b(one), only_a(two)],
    }[given]
    assert_packed(parts, BF16)


def launched():
    """Kernels so far, also on a GPU, where no interpreter records them."""
    return sum(launch_counts().values())


def test_what_is_packed_already_is_read_where_it_is(device):
    part = make_pair(13, 21, 16, BF16, device, "contiguous")
    for scaling in (1.0, 0.5):
        before = launched()
        [(lora_b, lora_a)] = triton_backend.pack_factors([part._replace(scaling=scaling)], BF16)
        assert lora_b is part.lora_b
        assert (lora_a is part.lora_a) == (scaling == 1.0)
        assert launched() - before == (0 if scaling == 1.0 else 1)
    odd = torch.empty(part.lora_b.numel() + 1, dtype=BF16, device=device)[1:].view(part.lora_b.shape)
    odd.copy_(part.lora_b)  # TMA and the Hopper kernels want addresses of 16 bytes
    [(lora_b, _)] = triton_backend.pack_factors([LowRank(odd)], BF16)
    assert lora_b.data_ptr() % 16 == 0
    assert torch.equal(lora_b, odd)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("count", [1, 2])
def test_gradients_in_pefts_memory_order(count, dtype, device):
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(EXPERTS, *s, generator=generator).to(device, dtype) for s in ((13, 5), (21, 16))[:count]]
    with checked():
        ours = triton_backend.experts_last(grads)
    for mine, plain, grad in zip(ours, torch_backend.experts_last(grads), grads, strict=True):
        assert torch.equal(mine, grad)
        assert has_experts_last(mine)
        assert mine.stride() == plain.stride() == factor_room(peft(grad)).stride()


@pytest.mark.parametrize(("rank", "wide"), [(1, 16), (16, 16), (17, 32), (64, 64), (100, 128)])
def test_ranks_that_tiles_have(rank, wide):
    assert padded_rank(rank) == wide
    factor = torch.ones(2, 3, rank)
    assert packed(factor, FP32, 2).shape == (2, 3, wide)
    assert packed(factor, FP32, 2)[..., rank:].abs().sum() == 0
    assert packed(factor.mT, BF16, 1, 0.5)[:, :rank].unique() == 0.5


# ------------------------------------------------------------------------------------------------------ gradients
def rounding_alone(truth):
    return error(truth.bfloat16(), truth)


def error(actual, truth):
    return float((actual.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("steps", [torch_backend, triton_backend], ids=lambda steps: steps.name)
@pytest.mark.parametrize("rank", [5, 16, 40])
def test_gradients_of_float32_factors_are_never_rounded_to_bfloat16(steps, rank, device):
    """From the same numbers in bf16, a hundredth of the error that rounding the true gradient to bf16 would make."""
    inputs = make_inputs(Case(65, 2, 5, 48, 32, BF16, "sentinels"), device)
    plan = steps.make_plan(inputs.topk_ids, 5, 64)
    lora_b, lora_a, _ = make_pair(48, 48, rank, FP32, device, "contiguous", experts=5)
    low = torch.randn(plan.rows, padded_rank(rank), generator=torch.Generator().manual_seed(1)).to(device, BF16)
    [(wide_b, _)] = steps.pack_factors([LowRank(lora_b)], BF16)
    tokens = TokenRows(inputs.grad, 2)
    wide = TokenRows(inputs.grad.double(), 2)
    ours = steps.lora_a_grad(low, tokens, plan, lora_a, 0.7)
    truth = torch_backend.lora_a_grad(low.double(), wide, plan, lora_a.double(), 0.7)
    assert (ours.dtype, ours.shape) == (FP32, lora_a.shape)
    assert error(ours, truth) < rounding_alone(truth) / 100
    ours = steps.added_grads(tokens, Weight(inputs.down, None, low, wide_b), plan, lora_b, False).factor
    doubles = Weight(inputs.down.double(), None, low.double(), wide_b.double())
    truth = torch_backend.added_grads(wide, doubles, plan, lora_b.double(), False).factor
    assert (ours.dtype, ours.shape) == (FP32, lora_b.shape)
    assert error(ours, truth) < rounding_alone(truth) / 100


PAIRS = ("gate_up_lora", "down_lora")
LAYER = Case(33, 2, 5, 48, 32, BF16, "sentinels", bias=True)


def layer(inputs, pairs, experts, **options):
    tensors = inputs.x, inputs.topk_ids, inputs.topk_weights, inputs.gate_up, inputs.down
    return experts(*tensors, **dict(zip(PAIRS, pairs, strict=True)), **inputs.extras, **options)


def layer_pairs(dtype, device, rank=5, stored="peft"):
    sizes = (64, 48), (48, 32)
    pairs = [make_pair(*size, rank, dtype, device, stored, s, 5) for size, s in zip(sizes, (0.5, 0.7), strict=True)]
    return [LowRank(b.mul(0.3).requires_grad_(), a.mul(0.3).requires_grad_(), s) for b, a, s in pairs]


def factors_of(pairs):
    return [factor for pair in pairs for factor in pair[:2]]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("stored", STORED)
def test_a_layer_of_stored_factors_is_that_of_packed_ones(experts, backend, stored, recompute, device):
    """Output and gradients, to the bit: float32 factors in any order, or what torch makes of them beforehand.

    On some CPUs torch sums a product of another width in another order: the gradients of its backend are within 1e-6.
    """
    inputs = make_inputs(LAYER, device)
    pairs = layer_pairs(FP32, device, stored=stored)
    out = layer(inputs, pairs, experts, recompute=recompute)
    grads = torch.autograd.grad(out, factors_of(pairs), inputs.grad)
    plain = [LowRank(packed(b, BF16, 2), packed(a, BF16, 1, s)) for b, a, s in pairs]
    ready = [LowRank(b.detach().float().requires_grad_(), a.detach().float().requires_grad_()) for b, a, _ in plain]
    expected = layer(inputs, ready, experts, recompute=recompute)
    assert torch.equal(out, expected)
    wide = torch.autograd.grad(expected, factors_of(ready), inputs.grad)
    for mine, theirs, factor, scaling in zip(grads, wide, factors_of(pairs), (1, 0.5, 1, 0.7), strict=True):
        assert mine.dtype == FP32
        theirs = theirs[..., : factor.shape[2]][:, : factor.shape[1]]
        error = (mine - theirs * scaling).norm() / mine.norm()
        assert error <= (1e-6 if backend == "torch" else 0.0)
        if stored == "peft":
            assert mine.stride() == factor.stride()


def test_second_derivatives_and_functions_scale_too(experts, device):
    inputs = make_inputs(Case(**{**LAYER.__dict__, "dtype": FP32}), device)
    pairs = layer_pairs(FP32, device)
    scaled = [LowRank(b, a * s) for b, a, s in pairs]

    def second(given):
        first = torch.autograd.grad(layer(inputs, given, experts).sin().sum(), factors_of(pairs), create_graph=True)
        return first + torch.autograd.grad(sum(g.sin().sum() for g in first), factors_of(pairs))

    for mine, theirs in zip(second(pairs), second(scaled), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        tangents = [torch.ones_like(factor) for factor in factors_of(pairs)]
        scalings = [pair.scaling for pair in pairs]

        def value(*factors):
            given = [LowRank(*factors[n : n + 2], s) for n, s in zip((0, 2), scalings, strict=True)]
            return layer(inputs, given, experts)

        out, _ = torch.func.jvp(value, tuple(f.detach() for f in factors_of(pairs)), tuple(tangents))
    torch.testing.assert_close(out, layer(inputs, pairs, fused_experts), rtol=1e-4, atol=1e-4)


@pytest.mark.plain_memory
def test_nothing_packed_is_saved(experts, device):
    """Autograd keeps views of the factors themselves."""
    inputs, pairs = make_inputs(LAYER, device), layer_pairs(FP32, device)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(inputs, pairs, experts)
    own = {factor.data_ptr() for factor in factors_of(pairs)}
    assert own <= {t.data_ptr() for t in kept}
    inner = {t.shape for t in kept if t.data_ptr() not in own and t.dim() == 3}
    assert inner <= {inputs.gate_up.shape, inputs.down.shape}
