"""On a real GPU: memory that runs out in the middle of a step, and more than 2**31 elements in tensors of rows."""

import contextlib
import functools
import gc

import pytest
import torch

import moe_kernels
from moe_kernels import memory
from moe_kernels.tools.check.problems import DIFFERENTIABLE, Case, make_inputs, run

pytestmark = [pytest.mark.gpu, pytest.mark.plain_memory]
BF16, CUDA = torch.bfloat16, "cuda"
CASE = Case(8192, 4, 8, 1024, 1024, BF16, "zipf")
experts = functools.partial(moe_kernels.fused_experts, backend="triton")


@contextlib.contextmanager
def room_for(size):
    """Inside the block torch may take ``size`` bytes more than is allocated now, but for some small pieces."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total, reserved = torch.cuda.get_device_properties(0).total_memory, torch.cuda.memory_reserved()
    torch.cuda.set_per_process_memory_fraction(reserved / total)
    # What another test left in the middle of a large piece keeps torch from giving the rest of it back.
    filling, piece = [], size
    try:
        while piece >= 2**21:
            try:
                filling.append(torch.empty(piece, dtype=torch.uint8, device=CUDA))
            except torch.OutOfMemoryError:
                piece //= 2
        torch.cuda.set_per_process_memory_fraction((reserved + size) / total)
        yield
    finally:
        filling.clear()
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


def bytes_of(case):
    width = 2 * case.intermediate
    saved = memory.saved_bytes(case.tokens, case.top_k, case.hidden, width, 2)
    return saved, memory.peak_bytes(case.tokens, case.top_k, case.hidden, case.intermediate, width, 2)


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_out_of_memory_in_the_middle_of_a_step(when):
    inputs = make_inputs(CASE, CUDA)
    expected = run(experts, inputs)
    leaves = {name: getattr(inputs, name).detach().requires_grad_() for name in DIFFERENTIABLE}
    arguments = leaves["x"], inputs.topk_ids, leaves["topk_weights"], leaves["gate_up"], leaves["down"]
    gc.collect()  # of what tests before left
    allocated = torch.cuda.memory_allocated()
    saved, peak = bytes_of(CASE)
    with contextlib.ExitStack() as stack:
        out = None
        if when == "backward":
            out = experts(*arguments)
        stack.enter_context(room_for(saved // 2))
        with pytest.raises(torch.OutOfMemoryError) as caught:
            experts(*arguments) if out is None else out.backward(inputs.grad)
    text = str(caught.value)
    assert f"the {when} pass of an expert layer ran out of memory: T=8192 tokens, K=4, E=8, H=1024, I=1024" in text
    assert f"{peak / 2**30:.2f} GiB" in text
    assert f"{saved / 2**30:.2f} GiB" in text
    assert "moe_recompute: true" in text
    assert "CUDA out of memory" in text
    # Some of the gradients may have been made. Through the call of backward() its traceback holds the graph.
    if when == "backward":
        del caught
    del out
    gc.collect()
    for leaf in leaves.values():
        leaf.grad = None
    assert torch.cuda.memory_allocated() <= allocated + 2**20
    for name, value in run(experts, inputs).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("recompute", [False, True])
def test_the_message_tells_the_true_sizes(recompute, record_property):
    case = Case(16384, 4, 8, 1024, 1536, BF16)
    inputs = make_inputs(case, CUDA)
    leaves = {name: getattr(inputs, name).detach().requires_grad_() for name in DIFFERENTIABLE}
    arguments = leaves["x"], inputs.topk_ids, leaves["topk_weights"], leaves["gate_up"], leaves["down"]
    for weight in (leaves["gate_up"], leaves["down"]):
        weight.grad = torch.zeros_like(weight)  # there from the step before
    experts(*arguments, recompute=recompute).backward(inputs.grad)  # compile first
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = experts(*arguments, recompute=recompute)
    kept = torch.cuda.memory_allocated() - before - out.numel() * out.element_size()
    saved = memory.saved_bytes(case.tokens, case.top_k, case.hidden, 2 * case.intermediate, 2, recompute)
    # X is the caller's own tensor here; the plan comes on top.
    assert kept == pytest.approx(saved - inputs.x.numel() * 2, rel=0.02, abs=2**21)
    out.backward(inputs.grad)
    taken = torch.cuda.max_memory_allocated() - before
    weights = 2 * (inputs.gate_up.numel() + inputs.down.numel())
    record_property("taken", taken)
    _, peak = bytes_of(case)
    assert peak * 0.8 < taken < peak * 1.2 + weights


def relative_error(value, wanted):
    return ((value.double() - wanted.double()).norm() / wanted.double().norm()).item()


def test_more_than_two_billion_elements_in_tokens_and_rows():
    """x, out and dX (T, H), Y, dOs, dXr and gathered X (R, H) all beyond 2**31 elements.

    The tokens repeat every ``period``, so that a small problem says what each of them gives; the weights' gradients
    are sums over all of them. Another tile may round otherwise; a wrong address gives other numbers altogether.
    """
    period, repeats, hidden = 4096, 130, 4224
    small = make_inputs(Case(period, 2, 4, hidden, 64, BF16, "zipf"), CUDA)
    expected = run(experts, small)
    x, ids, weights, grad = (t.repeat(repeats, 1) for t in (small.x, small.topk_ids, small.topk_weights, small.grad))
    assert x.numel() > 2**31
    x.requires_grad_()
    weights.requires_grad_()
    gate_up, down = small.gate_up.requires_grad_(), small.down.requires_grad_()
    out = experts(x, ids, weights, gate_up, down)
    out.backward(grad)
    for name, value in (("out", out), ("dx", x.grad), ("dtopk_weights", weights.grad)):
        for start in (0, repeats // 2, repeats - 1):
            part = value[start * period : (start + 1) * period]
            assert relative_error(part, expected[name]) < 5e-3, f"{name}, tokens from {start * period}"
    for name, value in (("dgate_up", gate_up.grad), ("ddown", down.grad)):
        assert relative_error(value, repeats * expected[name].double()) < 5e-3, name
    del x, out, grad
    torch.cuda.empty_cache()
