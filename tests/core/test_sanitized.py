"""What a friendly run hides: bounds, races, undefined lanes, order of programs, 32-bit offsets (interpreter only)."""

import dataclasses
import functools

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

import moe_kernels
from moe_kernels.activation import Activation, Gate
from moe_kernels.backends.torch import TorchBackend
from moe_kernels.backends.triton import TritonBackend
from moe_kernels.kernels.tiles.config import use_config
from moe_kernels.kernels.tiles.table import GemmConfig
from moe_kernels.layer import Weight
from moe_kernels.routing import RoutingPlan
from moe_kernels.tools.check.problems import Case, make_inputs, run
from moe_kernels.tools.check.routings import make_routing
from support import interpreter
from support.judge import check

torch_backend, triton_backend = TorchBackend(), TritonBackend()
gpu = pytest.importorskip("moe_kernels.kernels.device")
pytestmark = pytest.mark.skipif(not gpu.interpreting(), reason="needs Triton's interpreter: TRITON_INTERPRET=1")

BF16 = torch.bfloat16
SILU = Gate(Activation("silu"))
experts = functools.partial(moe_kernels.fused_experts, backend="triton")
CASES = {
    "aligned": Case(tokens=17, top_k=2, experts=3, hidden=64, intermediate=32, dtype=BF16, routing="one_hot_expert"),
    "ragged": Case(tokens=17, top_k=2, experts=4, hidden=80, intermediate=48, dtype=BF16, routing="sentinels"),
    "odd": Case(tokens=11, top_k=3, experts=5, hidden=37, intermediate=21, dtype=BF16, routing="one_token_each"),
    "float32": Case(tokens=11, top_k=2, experts=3, hidden=35, intermediate=19, routing="zipf"),
    "gpt-oss": Case(tokens=17, top_k=2, experts=3, hidden=64, intermediate=48, dtype=BF16, routing="one_hot_expert",
                    # A clamp's gradient jumps, and bfloat16 may round Z across it: a seed that does not.
                    seed=1, bias=True, transposed=True, interleaved=True,
                    activation=Activation("clamped_glu", (1.702, 0.7))),
    "lora": Case(tokens=17, top_k=2, experts=4, hidden=80, intermediate=48, dtype=BF16, routing="sentinels",
                 seed=1, bias=True, lora_rank=4, activation=Activation("clamped_silu", (0.5,))),
    "gateless": Case(tokens=11, top_k=3, experts=5, hidden=37, intermediate=21, dtype=BF16, routing="zipf",
                     bias=True, gated=False, activation="relu2", transposed=True),
}  # fmt: skip


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@pytest.mark.parametrize("persistent", [True, False])
def test_no_finding_with_small_tiles(case, persistent, small_tiles):
    with interpreter.sanitize(), interpreter.recorded_launches() as launches:
        check(functools.partial(experts, persistent=persistent), make_inputs(case), str(case))
    expected = {
        "count_kernel", "place_kernel", "up_kernel", "grouped_gemm_kernel", "combine_kernel",
        "gather_kernel", "dact_kernel", "wgrad_kernel",
    }  # fmt: skip
    added = {"row_pass_kernel", "sum_blocks_kernel"} if case.bias or case.lora_rank else set()
    added |= {"pack_kernel", "experts_last_kernel"} if case.lora_rank else set()
    assert set(launches) == expected | added


@pytest.mark.parametrize("name", ["ragged", "odd"])
@pytest.mark.parametrize("group_size", [64, 128])
def test_no_finding_with_shipped_tiles(name, group_size):
    with interpreter.sanitize():
        check(functools.partial(experts, group_size=group_size), make_inputs(CASES[name]), name)


@pytest.mark.parametrize("seed", [0, 1])
def test_order_of_programs_changes_no_bit(case, seed, small_tiles):
    inputs = make_inputs(case)
    expected = run(experts, inputs)
    with interpreter.sanitize(), interpreter.shuffled(seed):
        for name, value in run(experts, inputs).items():
            assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("seed", [0, 1])
def test_plan_of_many_blocks(seed, small_plan_blocks):
    ids, _ = make_routing("sentinels", 389, 2, 4)
    expected = torch_backend.make_plan(ids, 4, 64)
    with interpreter.sanitize(), interpreter.overflow_asserts(), interpreter.shuffled(seed):
        plan = triton_backend.make_plan(ids, 4, 64)
    tiles = int(expected.tile_count)
    for field in dataclasses.fields(RoutingPlan)[1:-4]:  # but for the packed tensor, which has gaps, and the settings
        used = slice(tiles if field.name in ("tile_expert", "tile_row") else None)
        assert torch.equal(getattr(plan, field.name)[used], getattr(expected, field.name)[used]), field.name


@pytest.mark.parametrize("settings", [{"persistent": False}, {"group_size": 64}, {"group_size": 256}], ids=str)
def test_scheduling_changes_no_bit(settings):
    """Which program computes a tile, and how many rows share one, is not visible in any output or gradient."""
    inputs = make_inputs(CASES["ragged"])
    expected, actual = run(experts, inputs), run(functools.partial(experts, **settings), inputs)
    for name in ("out", "dx", "dgate_up", "ddown") if "group_size" in settings else expected:
        assert torch.equal(actual[name], expected[name]), name


def test_no_32_bit_product_overflows(small_tiles):
    with interpreter.overflow_asserts():
        run(experts, make_inputs(CASES["odd"]))


# ------------------------------------------------------------------------------------- offsets beyond 2**31
def last_tile_plan(rows, expert, experts_, top_k=1):
    """A plan with one tile: the last five of ``rows`` rows, which belong to ``expert``."""
    plan = RoutingPlan.empty(torch.empty(rows // top_k, top_k, dtype=torch.int32), experts_, 64)
    plan.packed.zero_()
    plan.row_slot.copy_(torch.arange(rows))
    plan.expert_start[expert] = rows - 5
    plan.expert_start[expert + 1 :] = rows
    plan.tile_expert[0], plan.tile_row[0] = expert, rows - 5
    plan.tile_count.fill_(1)
    return plan


def span(*shape, dtype=BF16):
    """Uninitialised and never touched but for what a kernel touches: virtual memory alone."""
    t = torch.empty(shape, dtype=dtype)
    assert t.numel() > 2**31
    return t


@pytest.fixture(params=["tma", "pointer"])
def large_tiles(request, monkeypatch):
    """Few programs, and both ways to load: only pointer loads compute offsets themselves."""
    if request.param == "pointer":
        for module in ("up", "grouped_gemm"):
            monkeypatch.setattr(f"moe_kernels.kernels.triton.{module}.tma_fits", lambda *_: False)
    with use_config("up", LARGE), use_config("down", LARGE), use_config("dgrad", LARGE):
        yield


LARGE = GemmConfig(block_m=64, block_n=256, block_k=256, num_warps=4, num_stages=2)


@pytest.mark.plain_memory
def test_expert_weights_beyond_two_billion_elements(large_tiles):
    e, i, h = 520, 1024, 2048
    weight, x = span(e, 2 * i, h), torch.ones(5, h, dtype=BF16)
    weight[-1] = 2.0**-11
    plan = torch_backend.make_plan(torch.full((5, 1), e - 1), e, 64)
    with interpreter.sanitize(races=False), interpreter.overflow_asserts():
        z, _ = triton_backend.up(x, Weight(weight), plan, SILU, True)
        dxr = triton_backend.dgrad(torch.ones_like(z), Weight(weight), plan)
    assert torch.equal(z, torch.ones_like(z))
    assert torch.equal(dxr, torch.ones_like(dxr))


@pytest.mark.plain_memory
def test_rows_beyond_two_billion_elements(large_tiles):
    i, h = 1040, 16
    rows = 2**20 + 64
    plan = last_tile_plan(rows, expert=1, experts_=2)
    gate_up = torch.ones(2, 2 * i, h, dtype=BF16)
    with interpreter.sanitize(races=False), interpreter.overflow_asserts():
        z, _ = triton_backend.up(torch.ones(rows, h, dtype=BF16), Weight(gate_up), plan, SILU, True)
        assert z.numel() > 2**31
        assert torch.equal(z[-5:], torch.full((5, 2 * i), 16.0, dtype=BF16))
        dxr = triton_backend.dgrad(z, Weight(gate_up), plan)
        assert torch.equal(dxr[-5:], torch.full((5, h), 16.0 * 2 * i, dtype=BF16))
        # The same kernel with the long side out: rows times columns of the result.
        z = triton_backend.down(torch.ones(rows, h, dtype=BF16), Weight(gate_up), plan)
        assert torch.equal(z[-5:], torch.full((5, 2 * i), 16.0, dtype=BF16))


# ------------------------------------------------------------------- the sanitisers see what they are there for
@triton.jit
def _copy(source, target, n, width, BLOCK: tl.constexpr, MASK: tl.constexpr, STRIDE: tl.constexpr):
    at = tl.program_id(0) * STRIDE + tl.arange(0, BLOCK)
    if MASK == "none":
        value = tl.load(source + at)
    elif MASK == "no other":
        value = tl.load(source + at, mask=at < n)
    else:
        value = tl.load(source + at, mask=at < n, other=0.0)
    tl.store(target + at * width, value, mask=at < n if MASK == "right" else at < at + 1)


@pytest.mark.parametrize(
    ("mask", "stride", "width", "finding"),
    [("right", 8, 1, None), ("none", 8, 1, "out-of-bounds load"), ("other", 8, 1, "out-of-bounds store"),
     ("right", 4, 1, "race"), ("right", 8, 0, "two lanes|race")],
)  # fmt: skip
def test_sanitisers_find(mask, stride, width, finding):
    source, target = torch.arange(20.0), torch.empty(20)
    with interpreter.sanitize():
        if finding is None:
            _copy[(3,)](source, target, 20, width, BLOCK=8, MASK=mask, STRIDE=stride)
            assert torch.equal(source, target)
        else:
            with pytest.raises(InterpreterError, match=finding):
                _copy[(3,)](source, target, 20, width, BLOCK=8, MASK=mask, STRIDE=stride)


def test_undefined_lanes_are_poisoned():
    source, target = torch.arange(24.0), torch.empty(24)
    with interpreter.sanitize():
        _copy[(3,)](source, target, 20, 1, BLOCK=8, MASK="no other", STRIDE=8)
    assert torch.isnan(target[20:]).all()


@triton.jit
def _bf16_dot(a, b, out, N: tl.constexpr):
    at = tl.arange(0, N)
    grid = at[:, None] * N + at[None, :]
    product = tl.dot(tl.load(a + grid), tl.load(b + grid))
    tl.store(out + grid, (product.to(tl.bfloat16) * tl.load(a + grid) + tl.load(b + grid)))


def test_bfloat16_is_exact_in_the_interpreter():
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(32, 32, generator=g).to(BF16) for _ in range(2))
    out = torch.empty_like(a)
    _bf16_dot[(1,)](a, b, out, N=32)
    product = (a.float() @ b.float()).to(BF16)
    assert torch.equal(out, product * a + b)


@triton.jit
def _big_stride(source, target, stride):
    pid = tl.program_id(0)
    tl.store(target + pid, tl.load(source + (pid + 2) * stride))


def test_32_bit_overflow_is_found():
    with interpreter.overflow_asserts(), pytest.raises(InterpreterError, match="int32 overflow"):
        _big_stride[(1,)](torch.zeros(1), torch.zeros(5), 2**30)
