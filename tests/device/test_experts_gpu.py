"""The op on a real GPU at real sizes: numerics, determinism, streams, graphs, more than 2**31 elements."""

import dataclasses
import functools

import pytest
import torch

import moe_kernels
from moe_kernels.activation import Activation
from moe_kernels.tools.check.problems import DIFFERENTIABLE, Case, eager, make_inputs, run, truth
from moe_kernels.tools.check.routings import ROUTINGS
from moe_kernels.tools.check.tolerances import assert_close_to_truth
from support.judge import check

pytestmark = [pytest.mark.gpu, pytest.mark.plain_memory]
BF16 = torch.bfloat16
CUDA = "cuda"
experts = functools.partial(moe_kernels.fused_experts, backend="triton")

MODELS = {
    "mixtral-1b": Case(4096, 2, 8, 1024, 3584, BF16),
    "qwen2-moe-1b": Case(4096, 8, 64, 1024, 704, BF16, "zipf"),
    "deepseek-v3-1b": Case(4096, 8, 128, 1024, 256, BF16),
}


@functools.cache
def inputs_of(case):
    return make_inputs(case, CUDA)


def judge(case, record, **settings):
    for name, measured in check(functools.partial(experts, **settings), inputs_of(case), str(case)).items():
        record(f"{name}_rms_ratio", round(measured.rms, 3))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("group_size", [64, 128, 256, "auto"])
def test_models(model, group_size, persistent, record_property):
    judge(MODELS[model], record_property, group_size=group_size, persistent=persistent)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_dtypes(dtype, record_property):
    judge(Case(1000, 4, 16, 512, 352, dtype, "zipf"), record_property)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_hostile_routings(routing, record_property):
    judge(Case(333, 4, 9, 512, 176, BF16, routing), record_property)


CLAMPED = Activation("clamped_glu", (1.702, 0.7))
KINDS = {
    "gpt-oss": {"transposed": True, "interleaved": True, "bias": True, "activation": CLAMPED},
    "privacy-filter": {"transposed": True, "bias": True, "activation": CLAMPED},
    "gateless": {"gated": False, "activation": "relu2"},
    "softcapped": {"activation": Activation("softcapped_silu", (0.8, 1.5))},
    "clamped_silu": {"activation": Activation("clamped_silu", (0.5,))},
    "gelu": {"activation": "gelu"},
    "gelu_pytorch_tanh": {"activation": "gelu_pytorch_tanh"},
    "quick_gelu": {"activation": "quick_gelu"},
    "relu": {"activation": "relu"},
    "unreduced": {"reduce": False},
    "lora": {"lora_rank": 16},
    "lora64": {"lora_rank": 64},
    "lora128": {"lora_rank": 128},
    "gpt-oss-lora": {"transposed": True, "interleaved": True, "bias": True, "activation": CLAMPED, "lora_rank": 8},
}


@pytest.mark.parametrize("group_size", [64, 128, 256])
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_experts(kind, group_size, record_property):
    judge(Case(1000, 4, 16, 512, 352, BF16, "zipf", **KINDS[kind]), record_property, group_size=group_size)


@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 64, 64), (1, 8, 64, 1000, 704), (129, 2, 5, 1000, 200), (77, 3, 7, 333, 77)], ids=str
)
def test_sizes_that_fit_no_tile(sizes, record_property):
    judge(Case(*sizes, BF16), record_property)


def results(inputs):
    return [t for t in run(experts, inputs).values() if t is not None]


def test_a_hundred_runs_are_equal_to_the_bit():
    inputs = inputs_of(Case(512, 8, 64, 256, 128, BF16, "zipf"))
    first = results(inputs)
    busy = torch.cuda.Stream()
    noise = torch.randn(2048, 2048, device=CUDA)
    for _ in range(100):
        with torch.cuda.stream(busy):  # other work on the device, at the same time
            noise = (noise @ noise).clamp(-1, 1)
        assert all(torch.equal(a, b) for a, b in zip(first, results(inputs), strict=True))


def test_another_stream():
    inputs = inputs_of(Case(512, 8, 64, 256, 128, BF16, "zipf"))
    expected = results(inputs)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        actual = results(inputs)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))


def leaves_of(inputs):
    return {n: getattr(inputs, n).detach().clone().requires_grad_() for n in DIFFERENTIABLE}


def test_forward_and_backward_never_wait_for_the_device():
    inputs = inputs_of(Case(512, 8, 64, 256, 128, BF16, "zipf"))
    leaves = leaves_of(inputs)
    arguments = (leaves["x"], inputs.topk_ids, leaves["topk_weights"], leaves["gate_up"], leaves["down"])
    experts(*arguments).backward(inputs.grad)  # compile first
    torch.cuda.set_sync_debug_mode("error")
    try:
        experts(*arguments).backward(inputs.grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cuda_graph_replays_with_new_inputs():
    case = Case(512, 8, 64, 256, 128, BF16, "zipf")
    inputs = make_inputs(case, CUDA)
    other = make_inputs(dataclasses.replace(case, seed=5, routing="sentinels"), CUDA)
    static = leaves_of(inputs)
    ids, grad = inputs.topk_ids.clone(), inputs.grad.clone()

    def step():
        out = experts(static["x"], ids, static["topk_weights"], static["gate_up"], static["down"])
        return out, *torch.autograd.grad(out, list(static.values()), grad)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for name, leaf in static.items():
            leaf.copy_(getattr(other, name))
        ids.copy_(other.topk_ids)
        grad.copy_(other.grad)
    graph.replay()
    expected = run(experts, other)
    for name, value in zip(("out", *(f"d{n}" for n in static)), captured, strict=True):
        assert torch.equal(value, expected[name]), name


def test_more_than_two_billion_activations(record_property):
    case = Case(2**16, 4, 4, 256, 4160, BF16)
    assert 2 * case.intermediate * case.tokens * case.top_k > 2**31
    check(experts, make_inputs(case, CUDA), str(case))
    torch.cuda.empty_cache()


def test_more_than_two_billion_weights():
    """The last expert of a stack beyond 2**31 elements, judged alone: a float64 truth of the stack would not fit."""
    small = make_inputs(Case(256, 1, 2, 4096, 4096, BF16), CUDA)
    spread = torch.tensor([0, 65], device=CUDA)  # the two experts' places in the large stack
    gate_up = small.gate_up.new_zeros(66, *small.gate_up.shape[1:]).index_copy_(0, spread, small.gate_up)
    down = small.down.new_zeros(66, *small.down.shape[1:]).index_copy_(0, spread, small.down)
    assert gate_up.numel() > 2**31
    large = dataclasses.replace(small, topk_ids=spread[small.topk_ids], gate_up=gate_up, down=down)
    got = run(experts, large)
    assert not got["dgate_up"][1:65].any()
    assert not got["ddown"][1:65].any()
    got |= {name: got[name][spread] for name in ("dgate_up", "ddown")}
    expected, plain = truth(small), eager(small)
    for name, value in got.items():
        assert_close_to_truth(value, expected[name], plain[name].to(value.dtype), name, compute_dtype=BF16)
    torch.cuda.empty_cache()
