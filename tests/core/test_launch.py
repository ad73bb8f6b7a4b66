
"""The direct launch: the same kernels, arguments and results as Triton's own launch.

Three kinds of tests: stubs that tell which way a launch went; Triton's real launcher on a driver that only records
(fake_cuda.py); and, on a GPU, results to the bit.
"""

import contextlib
import dataclasses
import gc
import itertools
import logging
import os
import re
import subprocess
import sys
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from triton import knobs
from triton._C.libtriton import native_specialize_impl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.backends.nvidia.compiler import CUDABackend
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

import moe_kernels
import support
from moe_kernels.activation import Activation
from moe_kernels.kernels.hopper.gluon_names import tma_load, tma_store
from moe_kernels.kernels.launch import launch as module
from moe_kernels.kernels.launch import replay
from moe_kernels.kernels.launch.compile import compiling_only
from moe_kernels.kernels.launch.launch import launch, launch_counts, launcher, refusal
from moe_kernels.kernels.operands import Descriptor, descriptor
from moe_kernels.kernels.tiles import config
from moe_kernels.kernels.tiles.table import GemmConfig
from moe_kernels.tools import doctor
from moe_kernels.tools.check.problems import Case, make_inputs, run
from support import fake_cuda

pytestmark = pytest.mark.plain_memory
ONE_BY_ONE = hasattr(nvidia, "_BASE_ARGS_FORMAT")  # triton 3.6
HOPPER = GPUTarget("cuda", 90, 32)


@pytest.fixture
def choose(monkeypatch):
    """choose("direct") or choose("triton"): the way of every launch from now on."""

    def chosen(way):
        monkeypatch.setenv(module.LAUNCHER_VARIABLE, way)
        launcher.cache_clear()
        refusal.cache_clear()

    chosen("direct")
    yield chosen
    monkeypatch.undo()
    launcher.cache_clear()
    refusal.cache_clear()


@pytest.fixture
def counted():
    """counted() is the number of launches since it was last called: .direct, .replay, .triton."""
    seen = {}

    def since():
        before, now = dict(seen), launch_counts()
        seen.update(now)
        return SimpleNamespace(**{way: now.get(way, 0) - before.get(way, 0) for way in module.LAUNCHERS})

    since()
    return since


def memory(dtype=torch.bfloat16):
    return torch.zeros(64, 64, dtype=dtype)


# ------------------------------------------------------------------------------------------------- which way it goes
class Kernel:
    """Stands for a compiled kernel: remembers what its C launcher got, and how often Triton launched it."""

    def __init__(self, run_time=2, compile_time=0, tensor_maps=0, scratch=0):
        self.fn = lambda: None
        self.fn.__name__ = "stub"
        self.pre_run_hooks = []
        self.params = [SimpleNamespace(is_constexpr=i >= run_time) for i in range(run_time + compile_time)]
        self.through_triton, self.direct = 0, []
        signature = {i: "tensordesc<bf16[16, 16]>" if i >= run_time - tensor_maps else "i32" for i in range(run_time)}
        meta = {"swizzle": 3, "elem_size": 2, "elem_type": 9, "fp4_padded": False}
        metas = [{**meta, "block_size": [16, 16 * (i + 1)]} for i in range(tensor_maps)]

        def record(*args):
            # triton 3.7 passes two descriptions of the arguments, and the arguments in one
            self.direct.append(args if ONE_BY_ONE else (*args[:-3], *args[-1]))

        call = nvidia.wrap_handle_tensordesc(record, signature, metas)
        self.compiled = SimpleNamespace(
            run=SimpleNamespace(
                launch=call, global_scratch_size=scratch, profile_scratch_size=0, launch_cooperative_grid=False,
                launch_pdl=False, arg_annotations=[], kernel_signature=b"",
            ),
            metadata=SimpleNamespace(tensordesc_meta=metas), function=4096, packed_metadata=(4, 1, 0),
        )  # fmt: skip

    def __getitem__(self, grid):
        def launched(*args, **keywords):
            self.through_triton += 1
            return self.compiled

        return launched


@pytest.fixture
def driver(monkeypatch, choose):
    """A driver for stubs: ``stream`` is a thread's current one, ``encoded`` lists the tensor maps that were made."""
    encoded, streams = [], threading.local()

    def encode(*args):
        encoded.append(args)
        return args

    active = SimpleNamespace(
        encoded=encoded,
        streams=streams,
        get_current_stream=lambda device: getattr(streams, "current", 7),
        get_current_target=lambda: HOPPER,
        utils=SimpleNamespace(fill_tma_descriptor=encode, fill_tma_descriptor_tiled=encode),
    )
    monkeypatch.setattr(triton.runtime.driver, "_active", active)
    monkeypatch.setattr(module, "_current_device", lambda: -1)  # where tensors of the CPU lie
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    refusal.cache_clear()
    return active


def ways(*calls, **kernel):
    """How often Triton launched one kernel that was called with each of ``calls``, (arguments, keywords)."""
    stub = Kernel(**kernel)
    for args, keywords in calls:
        launch(stub, (1,), args, keywords)
    return stub.through_triton


NUMBERS = [0, 1, 2, 3, 16, 17, 48, -1, -16, -17, 2**31 - 1, 2**31 - 16, 2**31, 2**31 + 1, -(2**31), -(2**31) - 16]
NUMBERS += [2**63 - 1, 2**63, 2**63 + 1, 2**64 - 16, -(2**63), True, False, 0.0, 1.0, 16.0, 0.5, None]


def arguments():
    """What a kernel may get, each with what Triton makes of it."""
    flat = {dtype: memory(dtype).view(-1) for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.int64)}
    views = [tensor[offset:] for tensor in flat.values() for offset in (0, 1, 2, 4, 8)]
    views.append(torch.nn.Parameter(memory()))
    backend = CUDABackend(HOPPER)
    found = [(arg, native_specialize_impl(backend, arg, False, True, True)) for arg in [*NUMBERS, *views]]
    for tensor in (memory(), memory(torch.float16), memory(torch.float32).view(32, 128), memory().view(4, 32, 32)):
        for block in ((16, 16), (16, 32)):
            block = (1,) * (tensor.dim() - 2) + block
            host = TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(block))
            found.append((descriptor(tensor, *block), native_specialize_impl(backend, host, False, True, True)))
    for layout in (gl.NVMMASharedLayout(32, 16), gl.NVMMASharedLayout(64, 16), gl.NVMMASharedLayout(32, 16)):
        tensor = memory()
        host = GluonDescriptor(tensor, [64, 64], [64, 1], [16, 32], layout)
        found.append((Descriptor(tensor, (16, 32), layout), native_specialize_impl(backend, host, False, True, True)))
    return found


def test_the_key_tells_apart_exactly_what_triton_does(driver):
    first = memory()
    for (a, a_class), (b, b_class) in itertools.combinations_with_replacement(arguments(), 2):
        maps = isinstance(a, Descriptor)
        if maps != isinstance(b, Descriptor):
            continue  # a kernel's argument is the one or the other
        compiled = ways(((first, a), {}), ((first, b), {}), tensor_maps=int(maps))
        assert compiled == (1 if a_class == b_class else 2), f"{a_class} and {b_class}"


def test_the_key_holds_kernel_and_keywords(driver):
    args = (memory(), 5)
    assert ways((args, {"B": 16}), (args, {"B": 16}), compile_time=1) == 1
    assert ways((args, {"B": 16}), (args, {"B": 32}), compile_time=1) == 2
    assert ways((args, {"B": 16, "num_warps": 4}), (args, {"B": 16, "num_warps": 8}), compile_time=1) == 2
    assert ways((args, {"B": 16, "C": 8}), (args, {"B": 8, "C": 16}), compile_time=2) == 2
    assert ways((args, {"B": 16}), (args, {"C": 16}), compile_time=1) == 2
    one, other = Kernel(), Kernel()
    for kernel in (one, other, one):
        launch(kernel, (1,), args, {})
    assert (one.through_triton, len(one.direct), other.through_triton, len(other.direct)) == (1, 1, 1, 0)


def test_what_the_c_launcher_gets(driver):
    kernel, tensor = Kernel(run_time=4, compile_time=2), memory()
    for _ in range(2):
        launch(kernel, (3, 2), (tensor, 5, 0.5, None), {"B": 16, "C": "silu", "num_warps": 4})
    metadata, nothing = ((4, 1, 0), None), (None, None)
    rest = (*nothing, *metadata, *nothing) if ONE_BY_ONE else (*metadata, *nothing, *nothing)
    base = (3, 2, 1, 7, 4096, False, False, *rest)
    assert kernel.direct == [(*base, tensor.data_ptr(), 5, 0.5, None, None, None)]


def test_each_descriptor_becomes_its_own_map_shape_and_strides(driver):
    kernel, narrow, wide = Kernel(run_time=3, tensor_maps=2), memory(), memory().view(32, 128)
    for _ in range(2):
        launch(kernel, (1,), (narrow, descriptor(narrow, 16, 16), descriptor(wide, 16, 32)), {})
    (narrow_map, wide_map), base = sorted(driver.encoded, key=lambda call: call[4]), kernel.direct[0][:13]
    assert (narrow_map[0], narrow_map[4]) == (narrow.data_ptr(), [16, 16])
    assert (wide_map[0], wide_map[4]) == (wide.data_ptr(), [16, 32])
    assert kernel.direct == [(*base, narrow.data_ptr(), narrow_map, 64, 64, 64, 1, wide_map, 32, 128, 128, 1)]


def test_an_argument_it_does_not_know_is_refused(driver):
    with pytest.raises(TypeError, match="stub got a list: pass tensors"):
        launch(Kernel(), (1,), (memory(), [1]), {})


def test_tensor_maps_are_kept_and_bounded(driver, monkeypatch):
    monkeypatch.setattr(module, "_TENSOR_MAPS", 4)
    kernel, tensors = Kernel(tensor_maps=1), [memory() for _ in range(6)]

    def encoded_by(tensor):
        before = len(driver.encoded)
        launch(kernel, (1,), (tensors[0], descriptor(tensor, 16, 16)), {})
        return len(driver.encoded) - before

    encoded_by(tensors[0])
    assert [encoded_by(tensor) for tensor in tensors[:4] * 3] == [1, 1, 1, 1, *(0,) * 8]
    assert [encoded_by(tensor) for tensor in tensors * 2] == [*(0,) * 4, *(1,) * 8]  # six take turns in four places
    # The same address, another shape and other strides.
    assert [encoded_by(tensors[5].view(32, 128)), encoded_by(tensors[5][:, :32]), encoded_by(tensors[5])] == [1, 1, 0]
    maps = next(direct for key, direct in module._known.items() if key[0] is kernel.fn).tensor_maps
    assert maps[0].cache_info().currsize == 4


def test_hooks_debugging_and_instrumentation_see_every_launch(driver, monkeypatch):
    kernel, args = Kernel(), (memory(), 5)

    def direct():
        before = len(kernel.direct)
        launch(kernel, (1,), args, {})
        return len(kernel.direct) - before

    assert [direct(), direct()] == [0, 1]
    for chain in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        chain.add(print)
        try:
            assert direct() == 0
        finally:
            chain.remove(print)
        assert direct() == 1
    with monkeypatch.context() as patch:  # a plain function instead of the chain, as older profilers set it
        patch.setattr(knobs.runtime, "launch_enter_hook", print)
        assert direct() == 0
    for place, name, value in (
        (knobs.runtime, "debug", True),
        (knobs.runtime, "add_stages_inspection_hook", print),
        (knobs.compilation, "instrumentation_mode", "x"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, value)
            assert direct() == 0
    kernel.pre_run_hooks.append(print)
    assert direct() == 0
    kernel.pre_run_hooks.clear()
    assert direct() == 1


def test_kernels_that_only_triton_can_launch(driver, caplog):
    args = (memory(), 5)
    tile = (memory(), descriptor(memory(), 16, 16))
    late = Kernel(run_time=2, compile_time=1)
    late.params.reverse()
    plain_pointers = Kernel(tensor_maps=1)
    plain_pointers.compiled.metadata.tensordesc_meta = [None]
    for kernel, given, why in (
        (Kernel(scratch=128), args, "needs scratch memory"),
        (late, args, "do not come last"),
        (plain_pointers, tile, "no tensor maps"),
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "moe_kernels"):
            for _ in range(3):
                launch(kernel, (1,), given, {"B": 1} if kernel is late else {})
        assert kernel.through_triton == 3
        assert not kernel.direct
        assert [why in message for message in caplog.messages] == [True]


def test_the_way_is_said_and_chosen(driver, choose, monkeypatch, caplog):
    def reason():
        launcher.cache_clear()
        refusal.cache_clear()
        caplog.clear()
        with caplog.at_level(logging.INFO, "moe_kernels"):
            said = refusal()
            refusal()
        assert len(caplog.messages) == 1
        assert caplog.messages[0].endswith("directly" if said is None else said)
        return said

    assert reason() is None
    choose("triton")
    assert reason() == "MOE_KERNELS_LAUNCHER=triton"
    kernel = Kernel()
    for _ in range(3):
        launch(kernel, (1,), (memory(), 5), {})
    assert (kernel.through_triton, kernel.direct) == (3, [])
    choose("fast")
    with pytest.raises(ValueError, match="'fast' is not one of replay, direct, triton"):
        refusal()
    choose("direct")
    with monkeypatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        assert "interpreter" in reason()
    with monkeypatch.context() as patch:
        patch.setattr(module, "_ONE_BY_ONE", False)
        patch.setattr(module, "_IN_ONE", False)
        assert "a form that is not known here" in reason()
    with monkeypatch.context() as patch:
        patch.setattr(driver, "get_current_target", lambda: GPUTarget("hip", "gfx942", 64))
        assert "no NVIDIA GPU" in reason()


def test_doctor_says_how_kernels_are_launched(driver, choose, monkeypatch):
    def finding():
        (found,) = doctor._launcher()
        return found.status, found.detail

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert finding() == ("ok", "direct, from the second launch of a kernel on")
    choose("replay")
    assert finding() == ("ok", "direct, from the second launch of a kernel on; calls of known sizes are replayed")
    choose("triton")
    assert finding() == ("note", "through Triton: MOE_KERNELS_LAUNCHER=triton")
    choose("fast")
    assert finding() == ("broken", "MOE_KERNELS_LAUNCHER='fast' is not one of replay, direct, triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert doctor._launcher() == []


def test_many_threads_and_streams(driver):
    kernel, tensor = Kernel(run_time=3), memory()

    def work(number):
        driver.streams.current = number
        for _ in range(300):
            launch(kernel, (1,), (tensor, number, tensor), {"num_warps": number % 3})

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(args[3] == args[14] for args in kernel.direct)  # the thread's stream and its argument
    assert kernel.through_triton + len(kernel.direct) == 6 * 300
    assert 3 <= kernel.through_triton <= 20


@pytest.mark.parametrize("strange", ["topk_ids", "topk_weights", "down"])
def test_tensors_on_two_devices_are_refused(strange):
    inputs = make_inputs(Case(4, 2, 3, 16, 16))
    args = {name: getattr(inputs, name) for name in ("x", "topk_ids", "topk_weights", "gate_up", "down")}
    args[strange] = args[strange].to("meta")
    with pytest.raises(ValueError, match="the expert weights are on cpu, another tensor on meta: move it there"):
        moe_kernels.fused_experts(**args, backend="triton")


def test_it_runs_on_the_device_of_its_tensors(driver, monkeypatch):
    class Elsewhere(torch.Tensor):
        def get_device(self):
            return 1

    current = [0]
    monkeypatch.setattr(module, "_current_device", lambda: current[0])

    class Device:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            self.before, current[0] = current[0], self.index

        def __exit__(self, *_):
            current[0] = self.before

    monkeypatch.setattr(torch.cuda, "device", Device)
    streams = []
    driver.get_current_stream = lambda device: streams.append(device) or 7
    kernel, tensor = Kernel(), memory().as_subclass(Elsewhere)
    for _ in range(3):
        launch(kernel, (1,), (tensor, 5), {})
    assert (kernel.through_triton, len(kernel.direct), streams, current) == (1, 2, [1, 1], [0])
    launch(kernel, (1,), (memory(), 5), {})  # of the CPU: for Triton to refuse
    assert (kernel.through_triton, len(kernel.direct)) == (2, 2)


# ----------------------------------------------------------------------------------------------------- replayed steps
@pytest.fixture
def replaying(driver, choose, monkeypatch):
    choose("replay")
    monkeypatch.setattr(replay, "_on_gpu", lambda tensor: True)
    replay._programs.clear()
    yield
    replay._programs.clear()


class Steps:
    """Two launches on two allocations, and how often Python decided them."""

    def __init__(self, foreign=None):
        self.ran = 0
        self.first, self.second = Kernel(run_time=3), Kernel(run_time=4, tensor_maps=2)
        self.foreign = foreign
        self.replayed = replay.replayed(self.steps)

    def call(self, x, number, flags, other):
        return self.replayed((x, other), (number, *flags))

    def steps(self, tensors, settings):
        (x, _), (number, *_) = tensors, settings
        self.ran += 1
        low = x.new_empty(6, 8)
        launch(self.first, (5, 2), (x[1:], low[2:], number), {"num_warps": 4})
        high = torch.empty_like(low, dtype=torch.float32)
        if self.foreign is not None:
            low = self.foreign(x, low)
        blocks = descriptor(low.view(3, 16)[1:], 16, 16), descriptor(high, 16, 32)
        launch(self.second, (3,), (high, number, *blocks), {"num_warps": 4})
        return high.mT, x.new_empty(0), high


def test_the_third_call_is_replayed(replaying, driver, counted):
    steps = Steps()
    for call in range(1, 6):
        x, other = memory(), memory()
        transposed, empty, high = steps.call(x, 48, [True, False], other)
        assert steps.ran == min(call, 2)
        assert transposed.shape == (8, 6)
        assert transposed.stride() == (1, 8)
        assert (high.shape, high.dtype, empty.shape) == ((6, 8), torch.float32, (0,))
        assert transposed.data_ptr() == high.data_ptr()
        if call == 1:
            continue  # launched by Triton
        first, second = steps.first.direct[-1], steps.second.direct[-1]
        assert first[:5] == (5, 2, 1, 7, 4096)
        assert second[:5] == (3, 1, 1, 7, 4096)
        low = first[14] - 2 * 8 * 2
        assert first[13:] == (x.data_ptr() + 128, low + 32, 48)
        maps = {made[0]: made for made in driver.encoded}
        low_map, high_map = maps[low + 32], maps[high.data_ptr()]
        assert [[*low_map[5]], [*low_map[6]], low_map[4]] == [[2, 16], [16, 1], [16, 16]]
        assert second[13:] == (high.data_ptr(), 48, low_map, 2, 16, 16, 1, high_map, 6, 8, 8, 1)
    assert (steps.first.through_triton, len(steps.first.direct)) == (1, 4)
    assert vars(counted()) == {"replay": 6, "direct": 2, "triton": 2}


def test_in_a_custom_op_the_same_is_recorded():
    """Below autograd, operators made of others are not taken apart on the way to a mode."""
    obstacles = []
    for below in (contextlib.nullcontext, torch._C._AutoDispatchBelowAutograd):
        for step in (lambda x: x.mT.mT.reshape(2, 32), lambda x: x.reshape(-1)[1:], lambda x: x.mT.reshape(-1)):
            recorder, x = replay._Recorder([]), torch.empty(4, 16)
            with torch.no_grad(), below(), recorder:
                step(x)
            obstacles.append(bool(recorder.obstacle))
    assert obstacles == [False, False, True] * 2  # the last one copies


def test_another_signature_is_another_program(replaying):
    steps, x = Steps(), memory()
    for _ in range(4):
        steps.call(x, 48, [True], None)
    assert steps.ran == 2
    for args in (
        (x, 64, [True], None),
        (x, 48, [False], None),
        (x, 48, [True], x.view(-1)[64:]),
        (x[:32], 48, [True], None),
        (x.mT.contiguous().mT, 48, [True], None),
        (x.half(), 48, [True], None),
    ):
        before = steps.ran
        for _ in range(5):
            steps.call(*args)
        assert steps.ran - before >= 2, args[1:]
    assert steps.first.direct[-1][15] == 48


def test_inputs_may_lie_in_one_storage(replaying):
    steps, flat = (
        Steps(),
        torch.zeros(3 * 4096, dtype=torch.bfloat16),
    )  # as parameters do that FSDP or DeepSpeed flattens
    for call in range(5):
        x, other = (flat[64 * place :][:4096].view(64, 64) for place in ((0, 64), (64, 128))[call % 2])
        steps.call(x, 48, [], other)
        if call > 1:
            assert steps.first.direct[-1][13] == x.data_ptr() + 128
    assert steps.ran == 2


def test_what_cannot_be_replayed_is_not(replaying):
    elsewhere, x = torch.zeros(6, 8, dtype=torch.bfloat16), memory()
    for foreign in (lambda x, low: low + 1, lambda x, low: elsewhere, lambda x, low: low.zero_()):
        steps = Steps(foreign)
        for _ in range(6):
            steps.call(x, 48, [], None)
        assert steps.ran == 6
    steps = Steps()
    for _ in range(6):
        steps.call(x[:32], 48, [], x)  # whose address would it be?
    assert steps.ran == 6
    for _ in range(6):
        steps.call(memory().view(-1)[1:65].view(8, 8), 48, [], None)  # unaligned
    assert steps.ran == 12

    def hands_through(tensors, _):
        (x,) = tensors
        launch(steps.first, (1,), (x, x.new_empty(3), 5), {})
        return (x,)

    def writes_nothing(tensors, _):
        (x,) = tensors
        launch(steps.first, (1,), (x, x, 5), {})
        return (x.new_empty(3),)

    for function in (hands_through, writes_nothing):
        call = replay.replayed(function)
        assert [call((x,), ())[0].shape for _ in range(5)] == [function((x,), ())[0].shape] * 5
        assert not any(
            isinstance(program, replay._Program) for key, program in replay._programs.items() if key[0] is function
        )


def test_the_cpu_needs_no_driver(tmp_path):
    """The torch backend asks nothing of Triton, which has no driver on a machine without a GPU."""
    code = """if True:
        import torch, moe_kernels
        from moe_kernels.tools.check.problems import Case, make_inputs, run
        for _ in range(4):
            run(moe_kernels.fused_experts, make_inputs(Case(8, 2, 4, 16, 16)))
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment[module.LAUNCHER_VARIABLE] = "replay"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_other_tiles_and_observers_end_a_replay(replaying):
    steps, x = Steps(), memory()

    def ran(calls=1):
        before = steps.ran
        for _ in range(calls):
            steps.call(x, 48, [], None)
        return steps.ran - before

    assert ran(4) == 2
    with config.use_config("up", GemmConfig(64, 64, 64, 4, 3)):
        assert ran(4) == 2
    assert ran(4) == 2
    config.forget_tuned_tiles()
    assert ran(4) == 2
    knobs.runtime.launch_enter_hook.add(print)
    try:
        assert ran(4) == 4
    finally:
        knobs.runtime.launch_enter_hook.remove(print)
    assert ran(4) == 0


def test_an_absent_tensor_has_its_place_in_the_signature(replaying):
    kernel, ran = Kernel(), []

    def steps(tensors, _):
        x, a, _ = tensors
        ran.append(a is None)
        launch(kernel, (1,), (x.new_empty(3), 5 if a is None else 6), {})
        out = x.new_empty(2)
        launch(kernel, (1,), (out, 5), {})
        return out, None

    call, x, y = replay.replayed(steps), memory(), memory()
    for args in ((x, y, None), (x, None, y)):
        for _ in range(4):
            assert call(args, ())[1] is None
    assert ran == [False, False, True, True]


def test_a_kernel_of_which_triton_makes_the_first_launch_only_delays_a_replay(replaying):
    steps, x = Steps(), memory()
    steps.call(x, 48, [], None)
    module._known.clear()
    for _ in range(4):
        steps.call(x, 48, [], None)
    assert steps.ran == 3


def test_sizes_that_never_repeat_are_forgotten(replaying, monkeypatch):
    monkeypatch.setattr(replay, "_SIGNATURES", 8)
    steps, x = Steps(), memory()
    for number in range(100):
        steps.call(x, number, [], None)
    assert len(replay._programs) <= 8


def test_temporaries_live_as_long_as_they_are_needed(replaying, monkeypatch):
    kernel, x = Kernel(run_time=3), memory()

    def steps(tensors, _):
        (x,) = tensors
        a, b, c = x.new_empty(3), x.new_empty(4), x.new_empty(5)
        launch(kernel, (1,), (x, a, 5), {})
        launch(kernel, (1,), (a, b, 5), {})
        launch(kernel, (1,), (b, c, 5), {})
        return (c,)

    call = replay.replayed(steps)
    for _ in range(2):
        call((x,), ())
    made, alive = [], []
    allocate = torch.empty_strided

    def followed(*args, **options):
        tensor = allocate(*args, **options)
        made.append(weakref.ref(tensor))
        return tensor

    def record(*args):
        alive.append([ref() is not None for ref in made])

    (program,) = (entry for entry in replay._programs.values() if isinstance(entry, replay._Program))
    program.launches[:] = [each._replace(call=record) for each in program.launches]
    monkeypatch.setattr(torch, "empty_strided", followed)
    output = call((x,), ())
    assert alive == [[True], [True, True], [False, True, True]]
    assert [ref() is not None for ref in made] == [False, False, True]
    del output
    assert made[-1]() is None


def test_threads_replay_one_program(replaying, driver):
    steps, wrong = Steps(), []
    for _ in range(3):
        steps.call(memory(), 48, [], None)

    def work(number):
        driver.streams.current = number
        inputs = [memory() for _ in range(5)]
        for turn in range(200):
            x = inputs[turn % 5]
            high = steps.call(x, 48, [], None)[2]
            mine = [args for args in list(steps.second.direct) if args[3] == number][-1]
            if mine[13] != high.data_ptr():
                wrong.append((number, turn))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(20, 24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert steps.ran == 2
    assert len(steps.first.direct) == 2 + 4 * 200


# ------------------------------------------------------------------- Triton's real launcher on a driver that records
@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    reason = fake_cuda.why_not()
    if reason is not None:
        pytest.skip(reason)
    with pytest.MonkeyPatch.context() as patch, fake_cuda.install(tmp_path_factory.mktemp("cuda"), patch) as cuda:
        yield cuda


@pytest.fixture
def cuda(installed, choose):
    return installed


def copy(source, target, n, scale, flag, nothing, BLOCK: tl.constexpr, KIND: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at, mask=at < n) * scale, mask=(at < n) & flag)


def copy_tile(target, source, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(target + at[:, None] * n + at[None, :], source.load([BLOCK, 0]))


@gluon.jit
def gluon_copy_tile(source, target, row, BLOCK: gl.constexpr):
    buffer = gl.allocate_shared_memory(source.dtype, [BLOCK, BLOCK], source.layout)
    barrier = gl.allocate_shared_memory(gl.int64, [1], hopper.mbarrier.MBarrierLayout())
    hopper.mbarrier.init(barrier, count=1)
    hopper.mbarrier.expect(barrier, source.block_type.nbytes)
    tma_load(source, [row, 0], barrier, buffer)
    hopper.mbarrier.wait(barrier, 0)
    tma_store(target, [0, 0], buffer)
    hopper.tma.store_wait(0)


COPY, COPY_TILE = JITFunction(copy), JITFunction(copy_tile)
KEYWORDS = {"BLOCK": 32, "KIND": "silu", "num_warps": 2}
LAYOUT = gl.NVMMASharedLayout(64, 16)
TILE = (128, 4, 4, 8, 8)  # bytes of a tensor map, of two sizes and of two strides


def twice(cuda, choose, *call):
    """What the driver got from Triton, and what it got directly."""
    launches = []
    for way in ("triton", "direct", "direct"):
        choose(way)
        before = launch_counts()
        launch(*call)
        launches.append(cuda.last)
    after = launch_counts()
    assert [after.get(way, 0) - before.get(way, 0) for way in ("direct", "triton")] == [1, 0]
    return launches[0], launches[-1]


@pytest.mark.parametrize("offset", [0, 1, 8])
@pytest.mark.parametrize("n", [1, 17, 2048, 2**31 + 16])
def test_the_driver_gets_the_same_of_plain_arguments(cuda, choose, n, offset):
    cuda.expect(8, 8, *((4,) if 1 < n < 2**31 else (8,) if n > 1 else ()), 4, 1)  # n == 1 is compiled in
    source, target = (memory().view(-1)[offset:] for _ in range(2))
    args = (source, target, n, 0.7, True, None)
    expected, actual = twice(cuda, choose, COPY, (5, 3, 2), args, KEYWORDS)
    assert actual == expected
    assert actual.grid == (5, 3, 2)
    assert actual.block == (64, 1, 1)
    assert actual.arguments[:8] == source.data_ptr().to_bytes(8, "little")


def test_alignment_chooses_another_kernel(cuda):
    cuda.expect(8, 8, 4, 4, 1)
    flat, functions = memory().view(-1), []
    for offset in (0, 8, 1, 16, 3):
        for _ in range(2):
            launch(COPY, (1,), (flat[offset:], flat, 64, 1.0, True, None), KEYWORDS)
        functions.append(cuda.last.function)
    aligned, unaligned = functions[0], functions[2]
    assert functions == [aligned, aligned, unaligned, aligned, unaligned]
    assert aligned != unaligned


@pytest.mark.parametrize("gluon", [False, True])
def test_the_driver_gets_the_same_tensor_maps(cuda, choose, gluon):
    cuda.expect(*((*TILE, *TILE, 4) if gluon else (8, *TILE, 4)))
    for source in (memory(), memory().view(32, 128), memory()[:, :32]):
        target = memory()
        if gluon:
            args = (Descriptor(source, (32, 32), LAYOUT), Descriptor(target, (32, 32), LAYOUT), 3)
        else:
            args = (target, descriptor(source, 32, 32), 64)
        call = (gluon_copy_tile if gluon else COPY_TILE, (1,), args, {"BLOCK": 32, "num_warps": 4})
        expected, actual = twice(cuda, choose, *call)
        assert actual == expected
        before = cuda.encoded
        launch(*call)
        assert cuda.encoded == before


def test_another_thread_launches_on_its_stream(cuda):
    cuda.expect(8, 8, 4, 4, 1)
    args = (memory(), memory(), 64, 1.0, True, None)
    launch(COPY, (1,), args, KEYWORDS)

    def work():
        triton.runtime.driver.active.streams.current = 99
        launch(COPY, (1,), args, KEYWORDS)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert cuda.last.stream == 99
    launch(COPY, (1,), args, KEYWORDS)
    assert cuda.last.stream == 7


@pytest.fixture
def compiled(monkeypatch):
    """One entry each time that Triton had to compile a kernel, or to wait for it."""
    found, real = [], JITFunction._do_compile
    monkeypatch.setattr(JITFunction, "_do_compile", lambda *args, **kw: found.append(1) or real(*args, **kw))
    return found


def test_compiling_only_launches_nothing(cuda, choose, compiled):
    cuda.expect(8, 8, 4, 4, 1)
    kernel, other = JITFunction(copy), JITFunction(copy)
    args = (memory(), memory(), 64, 1.0, True, None)
    launch(COPY, (1,), args, KEYWORDS)
    compiled.clear()
    before = cuda.launches
    with compiling_only(torch.device("cpu")) as asked:
        launch(kernel, (1,), args, KEYWORDS)
        launch(kernel, (1,), args, KEYWORDS)
        with compiling_only(torch.device("cpu")) as inner:
            launch(other, (1,), args, KEYWORDS | {"BLOCK": 64})
        assert inner is asked
        thread = threading.Thread(target=launch, args=(COPY, (1,), args, KEYWORDS))
        thread.start()
        thread.join()
        assert cuda.launches == before + 1  # another thread's launch is a launch
    assert len(asked) == 2
    compiled.clear()
    assert all(kernel.result()._run is not None for kernel in asked)
    launch(kernel, (1,), args, KEYWORDS)
    launch(other, (1,), args, KEYWORDS | {"BLOCK": 64})
    assert cuda.launches == before + 3
    assert not compiled


def test_what_does_not_compile_is_said_while_compiling_only(cuda, choose):
    def broken(x, BLOCK: tl.constexpr):
        tl.store(x, undefined)  # noqa: F821

    with pytest.raises(triton.CompilationError, match="undefined"), compiling_only(torch.device("cpu")):
        launch(JITFunction(broken), (1,), (memory(),), {"BLOCK": 32})
    assert not module._compilers


FIRST_FORWARD = """
import logging, sys
from pathlib import Path
import pytest, torch
from triton.runtime.jit import JITFunction
import moe_kernels
from moe_kernels import backends
from support import fake_cuda
from moe_kernels.tools.check.problems import Case, make_inputs

logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
compiled, real = [], JITFunction._do_compile
JITFunction._do_compile = lambda *args, **kwargs: compiled.append(1) or real(*args, **kwargs)
with pytest.MonkeyPatch.context() as patch, fake_cuda.install(Path(sys.argv[1]), patch) as cuda:
    cuda.expect()
    patch.setattr(backends, "select", lambda problem, name: ("triton", "asked for"))
    for tokens in (48, 32, 16):
        inputs = make_inputs(Case(tokens, 2, 3, 64, 32, torch.bfloat16))
        leaves = {name: leaf.requires_grad_() for name, leaf in inputs.leaves().items()}
        args = (leaves["x"], inputs.topk_ids, leaves["topk_weights"], leaves["gate_up"], leaves["down"])
        out = moe_kernels.fused_experts(*args, backend="triton")
        print("forward", tokens, len(compiled) > 9, cuda.launches)
        compiled.clear()
        torch.autograd.grad(out, list(leaves.values()), inputs.grad)
        print("backward", tokens, len(compiled), backends.dispatch_counts())
"""


def test_the_first_forward_compiles_the_backward_too(tmp_path):
    reason = fake_cuda.why_not()
    if reason is not None:
        pytest.skip(reason)
    environment = {name: value for name, value in support.environment().items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", FIRST_FORWARD, str(tmp_path)]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    found = [line for line in said.splitlines() if line.startswith(("compiled", "forward", "backward"))]
    assert re.fullmatch(
        r"compiled 1\d kernels for gate_up \(3, 64, 64\), down \(3, 64, 32\) in \d+\.\d s", found.pop(0)
    )
    launches = [int(line.split()[-1]) for line in found[::2]]
    assert launches[0] == 5  # compiling launched nothing
    assert found[::2] == [
        f"forward {tokens} {tokens == 48} {number}" for tokens, number in zip((48, 32, 16), launches, strict=True)
    ]
    # The backward compiles nothing, and no number of tokens does again.
    assert found[1::2] == [
        f"backward {tokens} 0 {{'triton': {calls}}}" for calls, tokens in enumerate((48, 32, 16), start=1)
    ]


VARIANTS = """
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
import pytest, torch, triton
from triton.runtime.jit import JITFunction
import moe_kernels
from moe_kernels import backends
from moe_kernels.kernels.hopper import gluon_names
from moe_kernels.kernels.launch.compile import compiling_only
from moe_kernels.tools.check import verification
from moe_kernels.tools.check.problems import Case, make_inputs, run
from support import fake_cuda

compiled, real = [], JITFunction._do_compile
JITFunction._do_compile = lambda *args, **kwargs: compiled.append(1) or real(*args, **kwargs)
with pytest.MonkeyPatch.context() as patch, fake_cuda.install(Path(sys.argv[1]), patch) as cuda:
    cuda.expect()
    patch.setattr(backends, "select", lambda problem, name: (name, "asked for"))
    # As if the GPU were there: the tensors are the CPU's.
    patch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
    case = Case(48, 2, 3, 64, 64, torch.bfloat16, "zipf")
    inputs = make_inputs(replace(case, bias=True, lora_rank=8) if sys.argv[2] == "more" else case)
    todo = [("triton", 64), ("triton", 128)]
    if gluon_names.lacks() is None:
        todo.append(("gluon", 128))
    with compiling_only(torch.device("cpu")):
        for backend, size in todo:
            ours = partial(moe_kernels.fused_experts, backend=backend, group_size=size)
            verification.compile_variants(ours, backend, inputs)
    print(len(compiled), cuda.launches, {name: count for name, count in backends.dispatch_counts().items() if count})
    compiled.clear()
    for backend, size in todo:
        for chosen in verification.variants(backend).values():
            with chosen:
                run(partial(moe_kernels.fused_experts, backend=backend, group_size=size), inputs)
    print(len(compiled), cuda.launches)
"""


@pytest.mark.parametrize("what", ["plain", "more"])
def test_a_check_compiles_all_variants_before_it_runs_one(what, tmp_path):
    reason = fake_cuda.why_not()
    if reason is not None:
        pytest.skip(reason)
    environment = {name: value for name, value in support.environment().items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", VARIANTS, str(tmp_path), what]
    said = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    before, after = said.stdout.splitlines()
    compiled, launches, counts = before.split(" ", 2)
    assert (int(compiled) > 20, launches, counts) == (True, "0", "{}")
    assert after.split()[0] == "0"
    assert int(after.split()[1]) > 20


# ---------------------------------------------------------------------------------------------------------- on a GPU
BF16 = torch.bfloat16
CLAMPED = Activation("clamped_glu", (1.702, 0.7))
CASES = {
    "plain": Case(512, 8, 64, 256, 128, BF16, "zipf"),
    "float32": Case(100, 2, 5, 64, 48),
    "odd": Case(77, 3, 7, 333, 77, BF16),
    "one": Case(1, 1, 1, 64, 64, BF16),
    "gpt-oss-lora": Case(
        300, 4, 16, 256, 128, BF16, "sentinels", activation=CLAMPED, interleaved=True, transposed=True, bias=True,
        lora_rank=8,
    ),
    "gateless": Case(300, 4, 16, 256, 128, BF16, gated=False, activation="relu2"),
}  # fmt: skip


def outcome(inputs, **settings):
    def experts(*args, **options):
        return moe_kernels.fused_experts(*args, **options, **settings, backend="triton")

    return {name: value for name, value in run(experts, inputs).items() if value is not None}


def every_way(choose, counted, call):
    """``call`` gives the same tensors when Triton launches, with direct launches, and replayed."""
    choose("triton")
    expected = call()
    for way in ("direct", "replay"):
        choose(way)
        for _ in range(3):  # compiled kernels are looked up, calls are followed
            call()
        counted()
        actual = call()
        launches = counted()
        assert launches.triton == 0
        assert getattr(launches, way) >= 10
        assert launches.direct == 0 or way == "direct"
        assert expected.keys() == actual.keys()
        for name in expected:
            assert torch.equal(expected[name], actual[name]), f"{way} {name}"


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_results_are_equal_to_the_bit(choose, counted, case):
    inputs = make_inputs(CASES[case], "cuda")
    every_way(choose, counted, lambda: outcome(inputs))


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{"group_size": 64, "persistent": False}, {"recompute": True}], ids=str)
def test_settings_are_equal_to_the_bit(choose, counted, settings):
    inputs = make_inputs(CASES["plain"], "cuda")
    every_way(choose, counted, lambda: outcome(inputs, **settings))


def step_of(inputs):
    """A forward and backward on tensors that stay where they are."""
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in inputs.leaves().items()}

    def step():
        args = (leaves["x"], inputs.topk_ids, leaves["topk_weights"], leaves["gate_up"], leaves["down"])
        out = moe_kernels.fused_experts(*args, backend="triton")
        grads = torch.autograd.grad(out, list(leaves.values()), inputs.grad)
        return dict(zip(("out", *leaves), (out.detach(), *grads), strict=True))

    return step


@pytest.mark.gpu
@pytest.mark.parametrize("moved", ["x", "topk_ids", "topk_weights", "gate_up", "down"])
def test_unaligned_tensors_get_kernels_of_their_own(choose, counted, moved):
    inputs = make_inputs(CASES["plain"], "cuda")
    for way in ("direct", "replay"):
        choose(way)
        for _ in range(3):
            outcome(inputs)  # what is compiled for aligned tensors is known
    tensor = getattr(inputs, moved)
    off = tensor.new_empty(tensor.numel() + 1)[1:].view(tensor.shape).copy_(tensor)
    assert off.data_ptr() % 16
    step = step_of(dataclasses.replace(inputs, **{moved: off}))
    choose("triton")
    expected = step()
    for way in ("direct", "replay"):
        choose(way)
        step()
        counted()
        actual = step()
        assert counted().triton == 0
        assert all(torch.equal(expected[name], actual[name]) for name in expected)


@pytest.mark.gpu
def test_reused_addresses(choose, counted):
    """Freed memory comes back with other shapes at the same addresses, where tensor maps of before are still kept."""
    for turn in range(24):
        case = dataclasses.replace(CASES["plain"], tokens=500 + turn % 12, hidden=256 + 64 * (turn % 3))
        inputs = make_inputs(case, "cuda")
        every_way(choose, counted, lambda inputs=inputs: outcome(inputs))
        torch.cuda.empty_cache()


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["direct", "replay"])
def test_a_graph_captures_the_launches(choose, counted, way):
    step = step_of(make_inputs(CASES["plain"], "cuda"))
    choose(way)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            expected = {name: value.clone() for name, value in step().items()}
    torch.cuda.current_stream().wait_stream(side)
    counted()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    launches = counted()
    assert launches.triton == 0
    assert getattr(launches, way) >= 10
    for value in captured.values():
        value.zero_()
    graph.replay()
    assert all(torch.equal(expected[name], captured[name]) for name in expected)


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["direct", "replay"])
def test_the_backward_thread_launches_too(choose, counted, way):
    inputs = make_inputs(CASES["plain"], "cuda")
    choose(way)
    x, weights = inputs.x.clone().requires_grad_(), inputs.gate_up.clone().requires_grad_()
    threads = set()
    weights.register_hook(lambda _: threads.add(threading.get_ident()))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(4):
            x.grad = weights.grad = None
            out = moe_kernels.fused_experts(
                x, inputs.topk_ids, inputs.topk_weights, weights, inputs.down, backend="triton"
            )
            counted()
            out.backward(inputs.grad)
            launches = counted()
    assert threads
    assert threading.get_ident() not in threads
    assert getattr(launches, way) >= 6
    assert launches.triton == 0
    stream.synchronize()
    assert torch.equal(x.grad, outcome(inputs)["dx"])


@pytest.mark.gpu
def test_a_graph_that_is_kept_is_walked_twice(choose):
    inputs = make_inputs(CASES["plain"], "cuda")
    choose("replay")
    expected = outcome(inputs)
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in inputs.leaves().items()}
    args = (leaves["x"], inputs.topk_ids, leaves["topk_weights"], leaves["gate_up"], leaves["down"])
    for _ in range(4):
        out = moe_kernels.fused_experts(*args, backend="triton")
        for keep in (True, True, False):
            grads = torch.autograd.grad(out, list(leaves.values()), inputs.grad, retain_graph=keep)
            for name, grad in zip(leaves, grads, strict=True):
                assert torch.equal(grad, expected[f"d{name}"]), name


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["direct", "replay"])
def test_a_profilers_hook_sees_every_launch(choose, counted, way):
    inputs, seen = make_inputs(CASES["plain"], "cuda"), []
    choose(way)
    for _ in range(3):
        expected = outcome(inputs)

    def hook(metadata):
        seen.append(metadata.get()["name"])

    counted()
    knobs.runtime.launch_enter_hook.add(hook)
    try:
        actual = outcome(inputs)
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    assert vars(counted()) == {"direct": 0, "replay": 0, "triton": len(seen)}
    assert "up_kernel" in seen
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


@pytest.mark.gpu
def test_a_replay_needs_no_more_memory(choose):
    inputs = make_inputs(dataclasses.replace(CASES["plain"], tokens=4096), "cuda")
    step, peaks = step_of(inputs), {}
    for way in ("direct", "replay"):
        choose(way)
        for _ in range(3):
            step()
        gc.collect()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        peaks[way] = torch.cuda.max_memory_allocated() - before
        assert torch.cuda.memory_allocated() == before
    assert peaks["replay"] <= peaks["direct"]


@pytest.mark.gpu
def test_gluon_kernels(choose, counted):
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("TMA needs Hopper or later")
    for rows in (64, 128, 192):
        source = torch.randn(rows, 64, device="cuda", dtype=BF16)
        for _ in range(2):
            target = torch.zeros(32, 64, device="cuda", dtype=BF16)
            args = (Descriptor(source, (32, 32), LAYOUT), Descriptor(target, (32, 32), LAYOUT), rows - 32)
            launch(gluon_copy_tile, (1,), args, {"BLOCK": 32, "num_warps": 4})
            assert torch.equal(target[:, :32], source[-32:, :32])
            assert not target[:, 32:].any()
    assert counted().direct >= 3
