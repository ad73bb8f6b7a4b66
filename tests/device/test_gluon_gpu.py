"""The Gluon backend on a Hopper GPU: against float64, on routings that hurt, in every schedule, twice and bitwise."""

import contextlib
import dataclasses
import functools
from types import SimpleNamespace

import pytest
import torch

import moe_kernels
from moe_kernels import backends
from moe_kernels.activation import Activation
from moe_kernels.routing import TokenRows
from moe_kernels.tools.check.problems import Case, make_inputs, run
from moe_kernels.tools.check.routings import ROUTINGS
from moe_kernels.tools.check.verification import variants
from support.fp8_layers import CLOSE, error, make, oracle
from support.judge import check
from support.packed import block_fp8, mxfp4, packed, results

pytestmark = [pytest.mark.gpu, pytest.mark.plain_memory]
if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9:
    pytest.skip("the Gluon kernels are for Hopper", allow_module_level=True)

BF16 = torch.bfloat16
gluon = functools.partial(moe_kernels.fused_experts, backend="gluon")
CASE = Case(333, 4, 9, 512, 192, BF16)
GPT_OSS = Activation("clamped_glu", (1.702, 0.7))
MODELS = {
    "mixtral-1b": Case(4096, 2, 8, 1024, 3584, BF16),
    "qwen2-moe-1b": Case(4096, 8, 64, 1024, 704, BF16, "zipf"),
    "deepseek-v3-1b": Case(4096, 8, 128, 1024, 256, BF16),
}


@functools.cache
def inputs_of(case):
    return make_inputs(case, "cuda")


def judge(case, record):
    for name, measured in check(gluon, inputs_of(case), str(case)).items():
        record(f"{name}_rms_ratio", round(measured.rms, 3))


@pytest.mark.parametrize("model", MODELS)
def test_models(model, record_property):
    judge(MODELS[model], record_property)


@pytest.mark.parametrize("gathered", [True, False], ids=["gathered", "copied"])
@pytest.mark.parametrize("variant", [0, 1], ids=["cooperative", "ping-pong"])
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
def test_hostile_routings(routing, dtype, variant, gathered, record_property):
    from moe_kernels.backends.gluon import use_gathered

    with list(variants("gluon").values())[variant], use_gathered(gathered):
        judge(dataclasses.replace(CASE, routing=routing, dtype=dtype), record_property)


@pytest.mark.parametrize(
    "sizes",
    [(1, 1, 1, 64, 64), (1, 8, 64, 1024, 704), (129, 2, 5, 1024, 192), (64, 1, 2, 64, 128), (1000, 8, 300, 256, 64)],
    ids=str,
)
def test_sizes(sizes, record_property):
    tokens, top_k, experts, hidden, intermediate = sizes
    judge(Case(tokens, top_k, experts, hidden, intermediate, BF16), record_property)


def every_other(weight):
    return torch.stack([weight, torch.full_like(weight, float("nan"))], 1).flatten(0, 1)[::2]


def in_records(weight):
    """Off the grid of whole rows, which tensor maps cannot be of."""
    flat = weight.flatten(1)
    return torch.cat([torch.full_like(flat[:, :8], float("nan")), flat], 1)[:, 8:].unflatten(1, weight.shape[1:])


@pytest.mark.parametrize("backend", ["gluon", "triton"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("apart", [every_other, in_records])
def test_experts_that_lie_apart(apart, transposed, backend):
    """They take the Triton kernels, by tensor maps or by pointers; the gradient's GEMM stays Gluon's."""

    def implementation(x, ids, weights, gate_up, down, **others):
        weights_apart = (apart(w.mT).mT if transposed else apart(w) for w in (gate_up, down))
        return moe_kernels.fused_experts(x, ids, weights, *weights_apart, backend=backend, **others)

    check(implementation, inputs_of(dataclasses.replace(CASE, transposed=transposed)))


# Few rows for much weight, with an even and an odd number of k blocks.
LARGE = [Case(500, 8, 64, 1024, 704, BF16), Case(300, 8, 48, 1088, 832, BF16, "zipf")]


@pytest.mark.parametrize("case", LARGE, ids=str)
@pytest.mark.parametrize("together", [None, 1, 2])
def test_weights_that_come_from_memory(case, together, record_property):
    from moe_kernels.kernels.hopper import mainloop

    inputs = inputs_of(case)
    plan = SimpleNamespace(rows_per_expert=case.tokens * case.top_k // case.experts)
    assert mainloop.k_blocks_per_wait("dgrad", plan, inputs.gate_up) == 2
    with mainloop.use_k_blocks_per_wait(together) if together else contextlib.nullcontext():
        judge(case, record_property)


@pytest.mark.parametrize("gathered", [True, False])
@pytest.mark.parametrize("sizes", [(700, 2, 5, 128, 704), (129, 1, 2, 64, 576)], ids=str)
def test_rows_gathered_or_copied(sizes, gathered, record_property):
    from moe_kernels.backends.gluon import use_gathered

    with use_gathered(gathered):
        judge(Case(*sizes, BF16, "zipf"), record_property)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("intermediate", [256, 512])
def test_wide_tiles_of_down_grad(intermediate, routing, record_property):
    """Whole tiles of 256 columns, rows of dO gathered, few rows an expert."""
    from moe_kernels.backends.gluon import use_gathered
    from moe_kernels.kernels.hopper import down_grad

    case = dataclasses.replace(CASE, routing=routing, intermediate=intermediate)
    plan = SimpleNamespace(rows_per_expert=case.tokens * case.top_k // case.experts)
    rows = TokenRows(torch.empty(case.tokens, case.hidden), case.top_k)
    assert down_grad.gains_from_wide(rows, intermediate, plan)
    with use_gathered(True):
        judge(case, record_property)


@pytest.mark.parametrize("within", [True, False])
@pytest.mark.parametrize("routing", ["one_hot_expert", "zipf"])
def test_groups_of_a_large_expert(routing, within, record_property):
    """More row tiles than a group has: several groups, the last of which is smaller."""
    from moe_kernels.kernels.hopper.ring import use_within_experts

    with use_within_experts(within):
        judge(Case(2500, 2, 9, 128, 704, BF16, routing), record_property)


@pytest.mark.parametrize(
    ("kernel", "schedule"),
    [  # up has cooperative tiles alone
        ("down", "ping-pong"),
        ("dgrad", "ping-pong"),
        ("up", "three stages"),
        ("down", "three stages"),
        ("dgrad", "three stages"),
    ],
)
@pytest.mark.parametrize("routing", ["zipf", "sentinels"])
def test_other_schedules(kernel, schedule, routing, record_property):
    from moe_kernels.kernels.hopper.ring import Schedule, use_schedule

    chosen = {"ping-pong": Schedule(False, 128, 5), "three stages": Schedule(True, 256, 3)}[schedule]
    with use_schedule(kernel, chosen):
        judge(dataclasses.replace(CASE, routing=routing), record_property)


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 256, 257])
def test_sizes_of_the_last_tile(rows, record_property):
    """Expert 0 has so many rows, and those of the experts after it border on its last tile."""
    judge(Case(rows + 2, 1, 3, 256, 192, BF16, "one_token_each"), record_property)


@pytest.fixture
def every_form():
    """Also what runs on the Triton kernels because they are faster at it."""
    from moe_kernels.backends.gluon import use_every_form

    with use_every_form(True):
        yield


KINDS = {
    "gelu": {"activation": "gelu"},
    "softcapped": {"activation": Activation("softcapped_silu", (0.8, 1.5))},
    "clamped_silu": {"activation": Activation("clamped_silu", (0.5,))},
    "unreduced": {"reduce": False},
    "lora": {"lora_rank": 16},
    "lora-32": {"lora_rank": 24},
    "lora-64": {"lora_rank": 64},
    "lora-128": {"lora_rank": 128},
    "bias": {"bias": True},
    "stored by columns": {"transposed": True},
    "interleaved": {"interleaved": True},
    "gateless": {"gated": False, "activation": "relu2"},
    "gpt-oss": {"bias": True, "interleaved": True, "transposed": True, "activation": GPT_OSS},
    "gpt-oss-lora": {"bias": True, "interleaved": True, "transposed": True, "activation": GPT_OSS, "lora_rank": 16},
    "gateless-lora": {"gated": False, "activation": "relu2", "bias": True, "transposed": True, "lora_rank": 16},
}
MIXED = ("lora", "lora-128", "bias", "interleaved", "gpt-oss-lora", "gateless-lora")


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_experts(kind, every_form, record_property):
    judge(dataclasses.replace(CASE, routing="zipf", **KINDS[kind]), record_property)


@pytest.mark.parametrize("variant", [0, 1], ids=["cooperative", "ping-pong"])
@pytest.mark.parametrize("routing", ["one_hot_expert", "empty_first_middle_last", "sentinels"])
@pytest.mark.parametrize("kind", MIXED)
def test_hostile_routings_of_kinds(kind, routing, variant, every_form, record_property):
    with list(variants("gluon").values())[variant]:
        judge(dataclasses.replace(CASE, routing=routing, **KINDS[kind]), record_property)


@pytest.mark.parametrize("gathered", [True, False])
@pytest.mark.parametrize("kind", ["interleaved", "gateless", "stored by columns"])
def test_rows_gathered_or_copied_of_kinds(kind, gathered, every_form, record_property):
    from moe_kernels.backends.gluon import use_gathered

    with use_gathered(gathered):
        judge(dataclasses.replace(CASE, routing="zipf", **KINDS[kind]), record_property)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "stored by columns"])
def test_the_gemms_of_kinds_are_this_backends(kind, every_form, monkeypatch):
    from moe_kernels.backends.triton import TritonBackend

    def other(*_, **__):
        raise AssertionError("a GEMM of the Triton backend")

    for step in ("up", "down", "dgrad", "down_grad"):
        monkeypatch.setattr(TritonBackend, step, other)
    run(gluon, inputs_of(dataclasses.replace(CASE, routing="zipf", **KINDS[kind])))


@pytest.mark.parametrize("rank", [16, 128])
def test_factors_of_one_expert_reach_no_other(rank):
    """Blocks of factors border on each other in memory, and ranks on the 64 columns of a k block."""
    inputs = inputs_of(dataclasses.replace(CASE, top_k=1, lora_rank=rank))
    clean = run(gluon, inputs)
    expert = int(inputs.topk_ids[7, 0])
    extras = {name: factor.clone() for name, factor in inputs.extras.items()}
    for name, factor in extras.items():
        factor[expert] = float("nan" if name.startswith("down") else "inf")
    result = run(gluon, dataclasses.replace(inputs, extras=extras))
    others = [e for e in range(CASE.experts) if e != expert]
    tokens = (inputs.topk_ids != expert).all(1)
    for name, value in result.items():
        part = tokens if name in ("out", "dx", "dtopk_weights") else others
        assert torch.equal(value[part], clean[name][part]), name


@pytest.mark.parametrize("make", [packed, block_fp8, mxfp4])
@pytest.mark.parametrize("kind", ["lora", "gateless-lora", "gpt-oss-lora"])
def test_experts_in_few_bits(kind, make, every_form, monkeypatch):
    from moe_kernels import packed as packed_weights

    case = dataclasses.replace(CASE, routing="zipf", **KINDS[kind])
    inputs, experts = inputs_of(case), CASE.experts
    sizes = [tuple(weight.shape[1:]) for weight in (inputs.gate_up, inputs.down)]
    weights = [make(experts, *size, torch.device("cuda"), dtype=BF16, seed=i) for i, size in enumerate(sizes)]
    if case.transposed:
        stored = (make(experts, *size[::-1], torch.device("cuda"), dtype=BF16) for size in sizes)
        weights = [weight.mT for weight in stored]
    monkeypatch.setattr(packed_weights, "BLOCK_BYTES", 2 * sizes[0][0] * sizes[0][1] * 2)
    frozen = tuple(name for name in inputs.leaves() if name not in ("gate_up", "down"))

    def by(gate_up, down):
        def experts_of(x, ids, topk_weights, **others):
            return gluon(x, ids, topk_weights, **others | {"gate_up": gate_up, "down": down})

        return run(experts_of, inputs, frozen)

    found, expected = by(*weights), by(*(weight.experts(0, experts) for weight in weights))
    for name, value in expected.items():
        if value is not None:
            assert torch.equal(found[name], value), name


block_fp8_layers = pytest.mark.parametrize(
    ("sizes", "kind"),
    [
        ((333, 4, 9, 512, 256), {"lora_rank": 16}),
        ((333, 4, 9, 576, 192), {"lora_rank": 128, "bias": True}),  # no multiples of a block of scales
        ((6000, 2, 5, 1024, 704), {}),  # more tiles than programs
        ((700, 3, 7, 256, 320), {"gated": False, "activation": "relu2", "lora_rank": 32, "dtype": torch.float16}),
    ],
    ids=str,
)


@pytest.mark.parametrize("routing", ["zipf", "sentinels", "one_hot_expert", "empty_first_middle_last"])
@block_fp8_layers
def test_gemms_in_fp8(sizes, kind, routing):
    """As good as Triton's, against the same arithmetic in float64; twice, and bitwise."""
    case = dataclasses.replace(Case(*sizes, BF16, routing), **kind)
    inputs, gate_up, down = make(case, torch.device("cuda"))
    expected = oracle(inputs, gate_up, down)
    by_triton = results(inputs, gate_up, down, "triton")
    found, again = (results(inputs, gate_up, down, "gluon") for _ in range(2))
    for name, value in found.items():
        assert error(value, expected[name]) < 1.25 * error(by_triton[name], expected[name]) + CLOSE, name
        assert torch.equal(value, again[name]), name


@pytest.mark.parametrize("routing", ["zipf", "sentinels", "one_hot_expert"])
@block_fp8_layers
def test_dequantising_in_the_load(sizes, kind, routing):
    """Bitwise what dequantising a block of experts ahead gives."""
    from moe_kernels.kernels.hopper.dequantizing import use_dequantizing

    case = dataclasses.replace(Case(*sizes, BF16, routing, packed="fp8", frozen=True), **kind)
    inputs = make_inputs(case, "cuda")
    with use_dequantizing(False):
        expected = run(gluon, inputs)
    with use_dequantizing(True):
        found = run(gluon, inputs)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_it_is_this_backend_that_runs():
    backends.reset_dispatch_counts()
    run(gluon, inputs_of(CASE))
    assert set(backends.dispatch_counts()) == {"gluon"}


def test_fifty_runs_are_equal_to_the_bit():
    inputs = inputs_of(MODELS["qwen2-moe-1b"])
    first = run(gluon, inputs)
    for _ in range(50):
        again = run(gluon, inputs)
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_nan_stays_in_its_expert():
    """Rows of one expert border on those of the next inside a tile: nothing may leak."""
    inputs = inputs_of(dataclasses.replace(CASE, top_k=1))
    clean = run(gluon, inputs)
    poisoned = dataclasses.replace(inputs, x=inputs.x.clone())
    expert = int(inputs.topk_ids[7, 0])
    poisoned.x[7] = float("nan")
    result = run(gluon, poisoned)
    others = [e for e in range(CASE.experts) if e != expert]
    for name in ("dgate_up", "ddown"):
        assert torch.equal(result[name][others], clean[name][others]), name
    tokens = torch.arange(CASE.tokens, device="cuda") != 7
    assert torch.equal(result["out"][tokens], clean["out"][tokens])
    assert torch.equal(result["dx"][tokens], clean["dx"][tokens])
