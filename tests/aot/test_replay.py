"""What a replay hands to the driver is what the steps themselves hand to it: compiled kernels, but no GPU."""

import dataclasses
import os

import pytest
import torch
import triton

import moe_kernels
from moe_kernels import registry
from moe_kernels.activation import Activation
from moe_kernels.backends import register_backend
from moe_kernels.backends.triton import TritonBackend
from moe_kernels.fp8 import Fp8Weight, transposed
from moe_kernels.kernels.launch import launch as module
from moe_kernels.kernels.launch import replay
from moe_kernels.tools.check.problems import DIFFERENTIABLE, Case, call, make_inputs
from support import fake_cuda
from support.packed import block_fp8, mxfp4, packed

pytestmark = [
    pytest.mark.plain_memory,
    pytest.mark.skipif(os.environ.get("MOE_KERNELS_AOT") != "1", reason="needs the compiler: make test-compiled"),
    pytest.mark.skipif(fake_cuda.why_not() is not None, reason=str(fake_cuda.why_not())),
]
BF16 = torch.bfloat16
CLAMPED = Activation("clamped_glu", (1.702, 0.7))
CASES = {
    "plain": Case(512, 8, 64, 256, 128, BF16, "zipf"),
    "gpt-oss-lora": Case(
        300, 4, 16, 256, 128, BF16, activation=CLAMPED, interleaved=True, transposed=True, bias=True, lora_rank=8
    ),
    "qlora": Case(300, 4, 16, 256, 128, BF16, "zipf", lora_rank=8),
    "fp8-lora": Case(300, 4, 16, 256, 128, BF16, "zipf", lora_rank=8),
    "fp8-activations": Case(300, 4, 16, 256, 128, BF16, "zipf", lora_rank=8),
    "mxfp4-lora": Case(300, 4, 16, 256, 128, BF16, activation=CLAMPED, interleaved=True, bias=True, lora_rank=8),
    "float32-adapters": Case(300, 4, 16, 256, 128, BF16, lora_rank=24),
    "apart": Case(512, 8, 64, 128, 128, BF16, "zipf", gated=False),
}  # fmt: skip
_ALLOCATE = ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty"))


@pytest.fixture(scope="module")
def cuda(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TritonBackend, "why_not", lambda self, problem: None)  # tensors of the CPU
        with fake_cuda.install(tmp_path_factory.mktemp("cuda"), patch) as cuda:
            cuda.expect()
            yield cuda
    for cached in (module.launcher, module.refusal):
        cached.cache_clear()


@pytest.fixture
def launched(monkeypatch):
    """What the C launchers get, in order: names, numbers, addresses, and of tensor maps what they were made of.

    No memory is freed meanwhile, so that an address means one tensor.
    """
    kept, calls, maps = [], [], {}

    def keeping(allocate):
        def allocated(*args, **options):
            kept.append(allocate(*args, **options))
            return kept[-1]

        return allocated

    for place, name in _ALLOCATE:
        monkeypatch.setattr(place, name, keeping(getattr(place, name)))
    make_map, direct = module._tensor_map, module._direct

    def tensor_map(dtype, block, layout, meta, pointer, shape, strides):
        made = make_map(dtype, block, layout, meta, pointer, shape, strides)
        maps[id(made[0])] = [pointer, block, shape, strides]
        kept.append(made[0])
        return made

    def recording(kernel, *args):
        found = direct(kernel, *args)

        def launch(*values):
            calls.append([kernel.fn.__name__, *(maps.get(id(value), value) for value in flat(values))])
            return found.call(*values)

        return found._replace(call=launch)

    monkeypatch.setattr(module, "_tensor_map", tensor_map)
    monkeypatch.setattr(module, "_direct", recording)
    module._known.clear()
    return calls


def flat(values):
    for value in values:
        if isinstance(value, list | tuple):
            yield from flat(value)
        else:
            yield value


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_a_replay_launches_what_the_steps_launch(cuda, launched, monkeypatch, case, recompute):
    inputs = make_inputs(CASES[case])
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in inputs.leaves().items()}
    if case == "apart":  # each expert's two matrices side by side: one lies in the gaps of the other
        together = torch.stack([inputs.gate_up, inputs.down], 1)
        leaves |= {name: together[:, n].requires_grad_() for n, name in enumerate(("gate_up", "down"))}
    if case == "float32-adapters":
        leaves |= {name: leaf.detach().float().requires_grad_() for name, leaf in leaves.items() if "_lora_" in name}
    makers = {"qlora": packed, "fp8-lora": block_fp8, "fp8-activations": block_fp8, "mxfp4-lora": mxfp4}
    if case in makers:
        make = makers[case]
        monkeypatch.setattr(moe_kernels.packed, "BLOCK_BYTES", 5 * 256 * 256 * 2)
        sizes = {"gate_up": (256, 256), "down": (256, 128)}
        frozen = {name: make(16, *size, inputs.x.device, dtype=BF16) for name, size in sizes.items()}
        if case == "fp8-activations":
            frozen = {name: Fp8Weight.of(w, transposed(w.data)) for name, w in frozen.items()}
        leaves = {name: leaf for name, leaf in leaves.items() if name not in frozen}
        inputs = dataclasses.replace(inputs, **frozen)
    known = {name: leaf for name, leaf in leaves.items() if name in DIFFERENTIABLE}
    inputs = dataclasses.replace(inputs, **known, extras={name: leaves[name] for name in inputs.extras})

    def step():
        def experts(*args, **options):
            return moe_kernels.fused_experts(*args, **options, recompute=recompute, backend="triton")

        launched.clear()
        out = call(experts, inputs)
        grads = torch.autograd.grad(out, list(leaves.values()), inputs.grad.to(out.dtype))
        return list(launched), [(t.shape, t.stride(), t.dtype) for t in (out, *grads)]

    def choose(way):
        monkeypatch.setenv(module.LAUNCHER_VARIABLE, way)
        module.launcher.cache_clear()
        module.refusal.cache_clear()

    choose("direct")
    step()
    calls, shapes = step()
    choose("replay")
    step()
    step()
    before = module.launch_counts()["direct"]
    replayed, replayed_shapes = step()
    assert module.launch_counts()["direct"] == before
    assert any(isinstance(program, replay._Program) for program in replay._programs.values())
    assert replayed_shapes == shapes

    names: dict[int, int] = {}  # addresses of the one in those of the other
    for (kernel, *values), (replayed_kernel, *replayed_values) in zip(calls, replayed, strict=True):
        assert kernel == replayed_kernel
        for value, other in zip(flat(values), flat(replayed_values), strict=True):
            if isinstance(value, int) and value > 2**32:
                assert names.setdefault(value, other) == other, kernel
            else:
                assert value == other, kernel
    assert len(set(names.values())) == len(names) > 20
    for tensor in (*leaves.values(), inputs.topk_ids):
        assert names.get(tensor.data_ptr(), tensor.data_ptr()) == tensor.data_ptr()
    assert triton.runtime.driver.active.get_current_device() == -1


class Mine(TritonBackend):
    """A backend from outside the package: what its steps do besides this package's launches, nobody records."""

    name = "mine"
    ran = 0

    def down(self, a, weight, plan):
        type(self).ran += 1
        return super().down(a, weight, plan)


def test_a_backend_from_outside_runs_in_every_call(cuda, launched, monkeypatch):
    monkeypatch.setattr(registry, "registered", {})
    monkeypatch.setattr(replay, "_programs", {})
    register_backend(Mine)
    monkeypatch.setenv(module.LAUNCHER_VARIABLE, "replay")
    module.launcher.cache_clear()
    module.refusal.cache_clear()
    inputs = make_inputs(next(iter(CASES.values())))
    x = inputs.x.detach().requires_grad_()
    for call_number in range(1, 7):
        out = moe_kernels.fused_experts(
            x, inputs.topk_ids, inputs.topk_weights, inputs.gate_up, inputs.down, backend="mine"
        )
        torch.autograd.grad(out, x, torch.ones_like(out))
        assert Mine.ran == call_number
    assert replay._programs
    assert not any(isinstance(program, replay._Program) for program in replay._programs.values())
