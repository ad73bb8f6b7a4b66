"""When memory runs out in the middle of a step: the message names sizes and cures, and the process goes on."""

import functools
import gc
import weakref

import pytest
import torch

import moe_kernels
from moe_kernels import memory
from moe_kernels.autograd import forward_op
from moe_kernels.backends.torch import TorchBackend
from moe_kernels.tools.check.problems import DIFFERENTIABLE, Case, make_inputs, run

CASE = Case(tokens=11, top_k=3, experts=5, hidden=48, intermediate=32, dtype=torch.bfloat16)
CUDA_SAYS = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB."
experts = functools.partial(moe_kernels.fused_experts, backend="torch")


@pytest.fixture
def full(monkeypatch):
    """full(step): that step of the backend finds no memory, until full(None)."""

    def fill(step):
        monkeypatch.undo()
        if step is not None:
            monkeypatch.setattr(TorchBackend, step, fail)

    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError(CUDA_SAYS)

    return fill


def leaves():
    inputs = make_inputs(CASE)
    return inputs, [getattr(inputs, name).detach().requires_grad_() for name in DIFFERENTIABLE]


def message(call):
    with pytest.raises(torch.OutOfMemoryError) as caught:
        call()
    [text] = caught.value.args  # trainers that shrink the batch look at one argument
    return text


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("step", ["make_plan", "up", "down", "combine"])
def test_forward(full, step, grad):
    inputs, (x, weights, gate_up, down) = leaves()
    full(step)
    with torch.set_grad_enabled(grad):
        text = message(lambda: experts(x, inputs.topk_ids, weights, gate_up, down))
    assert text.startswith("the forward pass of an expert layer ran out of memory: ")
    assert "T=11 tokens, K=3, E=5, H=48, I=32 in bfloat16" in text
    for cure in ("micro_batch_size", "moe_recompute: true", "gradient_checkpointing: true"):
        assert cure in text
    assert text.endswith(CUDA_SAYS)


@pytest.mark.parametrize("step", ["gather", "dgrad", "dact", "wgrad", "combine_grad"])
def test_backward(full, step):
    inputs, (x, weights, gate_up, down) = leaves()
    out = experts(x, inputs.topk_ids, weights, gate_up, down)
    full(step)
    text = message(lambda: out.backward(inputs.grad))
    assert text.startswith("the backward pass of an expert layer ran out of memory: T=11 tokens, K=3, E=5")
    assert text.endswith(CUDA_SAYS)


def test_recompute_is_no_cure_where_it_is_on(full):
    inputs, (x, weights, gate_up, down) = leaves()
    full("up")
    text = message(lambda: experts(x, inputs.topk_ids, weights, gate_up, down, recompute=True))
    assert "moe_recompute" not in text
    assert "gradient_checkpointing: true" in text


def test_compiled(full):
    inputs, (x, weights, gate_up, down) = leaves()
    full("up")
    tensors = x, inputs.topk_ids, weights, gate_up, down, *(None,) * 6
    settings = "silu", [], False, True, False, 128, True, "torch", 1.0, 1.0, True
    text = message(lambda: forward_op(*tensors, *settings))
    assert "the forward pass of an expert layer ran out of memory" in text


@pytest.mark.parametrize("step", ["down", "dact"])
def test_the_next_step_is_right(full, step):
    inputs = make_inputs(CASE)
    expected = run(experts, inputs)
    full(step)
    with pytest.raises(torch.OutOfMemoryError):
        run(experts, inputs)
    full(None)
    for name, value in run(experts, inputs).items():
        assert torch.equal(value, expected[name]), name


def test_nothing_of_the_layer_stays_alive_with_the_exception(monkeypatch):
    alive = []

    def fail(self, y, *args):
        alive.append(weakref.ref(y))
        raise torch.OutOfMemoryError(CUDA_SAYS)

    monkeypatch.setattr(TorchBackend, "combine", fail)
    inputs = make_inputs(CASE)
    with torch.no_grad():
        try:
            experts(inputs.x, inputs.topk_ids, inputs.topk_weights, inputs.gate_up, inputs.down)
        except torch.OutOfMemoryError:  # here, while the exception is at hand, a trainer tries a smaller batch
            gc.collect()
            still = [tensor() for tensor in alive]
    assert still == [None]


def test_other_errors_stay_what_they_are(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(TorchBackend, "up", fail)
    with pytest.raises(RuntimeError, match=r"^an illegal memory access was encountered$"):
        run(experts, make_inputs(CASE))


def test_the_numbers_of_a_known_layer():
    """2TH + 4TKI bytes of Mixtral-1B at 16384 tokens are the 480 MiB of benchmarks/results/compare-h200."""
    sizes = {"tokens": 16384, "top_k": 2, "hidden": 1024}
    assert memory.saved_bytes(**sizes, width=7168, size=2) == 480 * 2**20
    assert memory.saved_bytes(**sizes, width=7168, size=2, recompute=True) == 32 * 2**20
