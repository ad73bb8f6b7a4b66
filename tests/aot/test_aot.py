"""Every kernel in every shipped configuration, compiled for GPUs that are not here.

The compiler needs kernels that were not imported for the interpreter, so these tests run in a process of their own:
in the ordinary run one test starts it, ``MOE_KERNELS_AOT=1 pytest tests/aot`` is that process.
"""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

from support import aot

AOT = os.environ.get("MOE_KERNELS_AOT") == "1"
ARCHS = (80, 90, 100)

if not AOT:

    @pytest.mark.slow
    def test_all_configurations_compile_in_a_process_of_their_own():
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"MOE_KERNELS_AOT": "1"}
        result = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider", __file__],
            env=environment, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2],
        )  # fmt: skip
        assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


@triton.jit
def _dot_kernel(a, b, out, N: tl.constexpr):
    at = tl.arange(0, N)
    grid = at[:, None] * N + at[None, :]
    tl.store(out + grid, tl.dot(tl.load(a + grid), tl.load(b + grid)))


@gluon.jit
def _products_kernel(out, n, IN_FLIGHT: gl.constexpr):
    """Two sums in one branch, one in the other; IN_FLIGHT: both branches end before their products do."""
    operand: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    a = gl.allocate_shared_memory(gl.bfloat16, [64, 64], operand)
    b = gl.allocate_shared_memory(gl.bfloat16, [64, 128], operand)
    one = gl.zeros((64, 128), gl.float32, layout)
    two = gl.zeros((64, 128), gl.float32, layout)
    if n > 1:
        for _ in range(n):
            one = hopper.warpgroup_mma(a, b, one, is_async=True)
            two = hopper.warpgroup_mma(a, b, two, is_async=True)
            one, two = hopper.warpgroup_mma_wait(2, deps=(one, two))
        if not IN_FLIGHT:
            one, two = hopper.warpgroup_mma_wait(0, deps=(one, two))
    else:
        for _ in range(2, n + 9):
            one = hopper.warpgroup_mma(a, b, one, is_async=True)
            one = hopper.warpgroup_mma_wait(1, deps=(one,))
        if not IN_FLIGHT:
            one = hopper.warpgroup_mma_wait(0, deps=(one,))
    one, two = hopper.warpgroup_mma_wait(0, deps=(one, two))
    rows, cols = gl.arange(0, 64, gl.SliceLayout(1, layout)), gl.arange(0, 128, gl.SliceLayout(0, layout))
    gl.store(out + rows[:, None] * 128 + cols[None, :], one + two)


if AOT:
    from support.cases import CompileCase
    from support.catalog import compile_cases, fp8_cases

    def simple(size, warps):
        types = {"a": "*bf16", "b": "*bf16", "out": "*fp32"}
        options = {"num_warps": warps, "num_stages": 1}
        return CompileCase(f"dot{size}", _dot_kernel, types, {"N": size}, options)

    # Gluon is what changes between releases of triton. With every triton these kinds are compiled, which have between
    # them each line of the Hopper kernels.
    KINDS = (
        "silu-bf16", "silu-bf16-lora16", "silu-bf16-lora128-ping-pong-large-weights",
        "clamped_glu-bf16-lora16-bias-interleaved-transposed", "relu2-bf16-lora16-no-gate-transposed",
    )  # fmt: skip

    def param(arch, case):
        every = arch == 90 and case.name.startswith("hopper") and case.name.endswith(KINDS)
        return pytest.param(arch, case, id=f"sm{arch}-{case.name}", marks=() if every else pytest.mark.one_triton)

    # float16 and bfloat16 differ in the name of one instruction: one group size of float16 stands for all. What
    # multiplies no matrices is the same on all GPUs.
    ELEMENTWISE = "dact-", "route-", "count-", "place-", "combine-", "dequantize-", "pack-", "experts_last-"
    CASES = [
        param(arch, case)
        for arch in ARCHS
        for case in compile_cases(divmod(arch, 10))
        if ("-fp16-" not in case.name or "-g128-fp16" in case.name)
        and (arch == 90 or not case.name.startswith(ELEMENTWISE))
    ]
    CASES += [param(89, case) for case in fp8_cases(tma=False)]
    # What sm_80 runs, compiled for another instruction set: a few stand for all.
    CASES += [
        param(120, case)
        for case in compile_cases((12, 0))
        if case.name.endswith(("-g128-bf16-pointer", "wgrad-bf16-pointer", "lora128-bf16-pointer"))
    ]

    @pytest.mark.parametrize(("arch", "case"), CASES)
    def test_compiles_within_the_machine(arch, case):
        resources = aot.compile_case(case, arch)
        # GPUs with less shared memory, Ada among them, run the tables of sm_80.
        problems = resources.problems(86 if arch == 80 else arch)
        # Sizes that are not multiples of 16 run, exactly, on tiles that were chosen for the others. The catalog says
        # what is accepted of experts other than the plain ones.
        if not case.divisible or resources.spills <= case.spills:
            problems = [p for p in problems if not p.startswith("spills")]
        assert not problems, f"{case.name} on sm_{arch}: {problems}"
        if case.uses_dot and "fp32" not in case.name:
            matrix = (aot.FP8_INSTRUCTION if case.fp8 else aot.MATRIX_INSTRUCTION)[arch]
            assert resources.opcodes.get(matrix, 0) > 0, f"no {matrix}: {sorted(resources.opcodes)}"
        assert (resources.opcodes.get(aot.TMA_LOAD, 0) > 0) == case.uses_tma
        assert not (case.name.startswith("hopper") and resources.in_series)

    @pytest.mark.parametrize("name", ["hopper-wgrad-dW1-silu-bf16", "hopper-down_grad-silu-bf16"])
    def test_arguments_that_are_one_are_constants(name):
        """One expert, one row: triton hands them to a kernel as constants, but fields of aggregates are tensors."""
        case = next(param.values[1] for param in CASES if param.values[1].name == name)
        ones = dict.fromkeys({"E", "R"} & case.types.keys(), 1)
        types = {argument: kind for argument, kind in case.types.items() if argument not in ones}
        assert ones
        aot.compiled(dataclasses.replace(case, types=types, constants=case.constants | ones), 90)

    @pytest.mark.parametrize("in_flight", [False, True])
    def test_products_in_series_are_seen(in_flight):
        types, constants = {"out": "*fp32", "n": "i32"}, {"IN_FLIGHT": in_flight}
        case = CompileCase("products", _products_kernel, types, constants, {"num_warps": 4})
        assert aot.compile_case(case, 90).in_series == in_flight

    def test_names_are_unique():
        names = [param.id for param in CASES]
        assert len(names) == len(set(names))

    @pytest.mark.parametrize("arch", ARCHS)
    def test_the_matrix_instruction_is_seen(arch):
        resources = aot.compile_case(simple(64, 4), arch)
        assert resources.opcodes[aot.MATRIX_INSTRUCTION[arch]] > 0
        assert resources.problems(arch) == []

    def test_spills_are_seen():
        resources = aot.compile_case(simple(128, 1), 80)
        assert resources.stack > 0
        assert resources.spills > 0
        assert "spills" in resources.problems(80)[0]
