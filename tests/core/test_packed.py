"""Experts in few bits against the same experts dequantised at once, and the kernels that read them."""

import dataclasses
import math

import pytest
import torch

from moe_kernels import fused_experts
from moe_kernels import packed as packed_weights
from moe_kernels.kernels.triton.dequantize import dequantize
from moe_kernels.kernels.triton.plan import make_plan, part_of
from moe_kernels.tools.check.problems import Case, eager, make_inputs, truth
from moe_kernels.tools.check.routings import ROUTINGS, make_routing
from moe_kernels.tools.check.tolerances import assert_close_to_truth
from support.packed import block_fp8, mxfp4, packed, results
from support.tiles import use_small_tiles

BACKENDS = ["torch", "triton"]


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16], ids=str)
def test_the_kernels_values_are_bitwise_torchs(device, nested, stored):
    weight = dataclasses.replace(packed(5, 48, 96, device, nested), stored=stored)
    whole = weight.experts(0, 5)
    assert whole.unique().numel() > 100
    for first, last in ((0, 5), (0, 2), (2, 5), (4, 5)):
        assert torch.equal(dequantize(weight, first, last), whole[first:last])
        assert torch.equal(dequantize(weight.mT, first, last), whole[first:last].mT)


def e4m3(code):
    """The value of a code, by the definition of the format."""
    exponent, fraction = code >> 3 & 15, code & 7
    size = 2.0 ** (exponent - 7) * (1 + fraction / 8) if exponent else 2.0**-6 * fraction / 8
    return math.nan if code & 127 == 127 else math.copysign(size, -1 if code >> 7 else 1)


def by_the_format(weight):
    """Every value of fp8 weights from its own code and scale."""
    _, rows, columns = weight.sizes
    height = rows // weight.stacked
    each = weight.scales.shape[1] // weight.stacked
    places = [r // height * each + r % height // 128 for r in range(rows)]
    scales = weight.scales.cpu().float()[:, places][:, :, [c // 128 for c in range(columns)]]
    values = torch.tensor([e4m3(code) for code in range(256)])
    return values[weight.data.cpu().view(torch.uint8).int()] * scales


def bits(values):
    """What torch.equal tells apart as bits do: NaN is equal to itself, zeros of two signs are not equal."""
    return torch.nan_to_num(values, nan=12345.0), torch.signbit(values) & ~values.isnan()


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stacked", [1, 2])
@pytest.mark.parametrize("sizes", [(2, 4, 3), (3, 32, 128), (3, 136, 72), (2, 260, 130), (2, 384, 16)])
def test_fp8_is_bitwise_by_the_format(device, sizes, stacked, scale_dtype):
    """Blocks of fewer rows and columns, alone and after whole ones; every code at least where there is room."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.arange(sizes[0] * sizes[1] * sizes[2]) % 256
    codes = codes[torch.randperm(len(codes), generator=generator)].to(torch.uint8).view(sizes)
    weight = block_fp8(*sizes, device, stacked, scale_dtype=scale_dtype, codes=codes)
    expected = by_the_format(weight).to(device)
    assert expected.isnan().any() == (codes & 127 == 127).any()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        used, want = weight.to(dtype), expected.to(dtype)
        for first, last in ((0, sizes[0]), (1, sizes[0]), (1, 2)):
            for found in (used.experts(first, last), dequantize(used, first, last)):
                assert found.dtype == dtype
                assert all(map(torch.equal, bits(found), bits(want[first:last])))
            assert all(map(torch.equal, bits(dequantize(used.mT, first, last)), bits(want[first:last].mT)))


def test_fp8_rounds_once(device):
    """A product just above the middle of two bfloat16 goes up: through float16 or a bfloat16 scale it would not."""
    codes = torch.full((1, 1, 1), 0x39, dtype=torch.uint8)  # 1.125
    weight = block_fp8(1, 1, 1, device, dtype=torch.bfloat16, codes=codes)
    for product in (1 + 2**-8 + 2**-20, 1 + 2**-8 - 2**-20):
        weight.scales.fill_(product / 1.125)
        want = torch.tensor(torch.tensor(product / 1.125).item() * 1.125, dtype=torch.float32).bfloat16()
        for found in (weight.experts(0, 1), dequantize(weight, 0, 1)):
            assert found.item() == want.item() == (1 + 2**-7 if product > 1 + 2**-8 else 1)


def e2m1(code):
    """The value of a code, by the definition of the format."""
    exponent, fraction = code >> 1 & 3, code & 1
    size = 2.0 ** (exponent - 1) * (1 + fraction / 2) if exponent else fraction / 2
    return math.copysign(size, -1 if code >> 3 else 1)


@pytest.mark.parametrize("sizes", [(2, 3, 32), (3, 7, 64), (2, 65, 96)])
def test_mxfp4_is_bitwise_by_the_format(device, sizes):
    """Every code beside every scale, in more than one program; halves of a byte in their order."""
    weight = mxfp4(*sizes, device)
    codes = weight.data.flatten()
    codes.copy_(torch.arange(len(codes)) * 89 % 256)
    scales = weight.scales.flatten()
    scales.copy_(torch.arange(len(scales)) * 7 % 256)
    data = weight.data.cpu()
    halves = torch.stack([data & 15, data >> 4], dim=-1).flatten(-2).int()
    powers = torch.tensor([2.0 ** (code - 127) for code in range(255)] + [math.nan], dtype=torch.float64)
    exact = torch.tensor([e2m1(code) for code in range(16)], dtype=torch.float64)[halves]
    exact = (exact * powers[weight.scales.cpu().int()][..., None]).view(sizes).to(device)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        used, want = weight.to(dtype), exact.float().to(dtype)
        for first, last in ((0, sizes[0]), (1, sizes[0]), (1, 2)):
            for found in (used.experts(first, last), dequantize(used, first, last)):
                assert found.dtype == dtype
                assert all(map(torch.equal, bits(found), bits(want[first:last])))
            assert all(map(torch.equal, bits(dequantize(used.mT, first, last)), bits(want[first:last].mT)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dtype": torch.uint8}, "is used in float32"),
        ({"sizes": (5, 48, 72)}, "blocks of 32 values do not divide 72 columns"),
        ({"sizes": (5, 40, 64)}, r"blocks are torch.uint8 \(5, 48, 2, 16\), wanted uint8 \(5, 40, 2, 16\)"),
        ({"data": torch.zeros(5, 48, 2, 16, dtype=torch.int8)}, "blocks are torch.int8"),
        ({"scales": torch.zeros(5, 48, 4, dtype=torch.uint8)}, r"scales are torch.uint8 \(5, 48, 4\), wanted uint8"),
        ({"scales": torch.zeros(5, 48, 2)}, r"scales are torch.float32 \(5, 48, 2\), wanted uint8 \(5, 48, 2\)"),
        ({"scales": torch.zeros(5, 48, 2, dtype=torch.uint8, device="meta")}, "are on cpu and meta"),
    ],
)
def test_mxfp4_parts_that_do_not_fit_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(mxfp4(5, 48, 64, torch.device("cpu")), **change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dtype": torch.float8_e4m3fn}, "is used in float32"),
        ({"sizes": (5, 40, 64)}, r"data is torch.float8_e4m3fn \(5, 48, 64\), wanted float8_e4m3fn \(5, 40, 64\)"),
        ({"data": torch.zeros(5, 48, 64, dtype=torch.uint8)}, "data is torch.uint8"),
        ({"data": torch.zeros(5, 48, 64, dtype=torch.float8_e5m2)}, "data is torch.float8_e5m2"),
        ({"data": torch.zeros(5, 64, 48, dtype=torch.float8_e4m3fn).mT}, "must be contiguous"),
        ({"scales": torch.ones(5, 2, 1)}, r"scales are torch.float32 \(5, 2, 1\), wanted .* \(5, 1, 1\)"),
        ({"scales": torch.ones(4, 1, 1)}, r"wanted .* \(5, 1, 1\)"),
        ({"scales": torch.ones(5, 1, 1, dtype=torch.float16)}, "scales are torch.float16"),
        ({"scales": torch.ones(5, 1, 1, device="meta")}, "are on cpu and meta"),
        ({"stacked": 2}, r"wanted .* \(5, 2, 1\)"),
        ({"stacked": 5}, "5 matrices above each other do not divide 48 rows"),
    ],
)
def test_fp8_parts_that_do_not_fit_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(block_fp8(5, 48, 64, torch.device("cpu")), **change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sizes": (5, 49, 64)}, "data is torch.uint8"),
        ({"sizes": (5, 3, 5)}, "the 32 values of a 4-bit block do not divide an expert's"),
        ({"data": torch.zeros(2, dtype=torch.uint8)}, r"wanted uint8 \(7680,\)"),
        ({"table": torch.zeros(256)}, r"table is torch.float32 \(256,\)"),
        ({"blocksize": 64}, "480 scales, blocks of 64 values need 240"),
        ({"values": torch.ones(480)}, "nested scales need values in uint8"),
        ({"outer": None}, "nested scales need"),
        ({"outer_size": 8}, "120 outer scales, one for each 8"),
        ({"offset": torch.zeros(2)}, "and 2 offsets"),
    ],
)
def test_4_bit_parts_that_do_not_fit_are_refused(change, words):
    weight = packed(5, 48, 64, torch.device("cpu"))
    [name] = change
    if not hasattr(weight, name):
        change = {"scales": dataclasses.replace(weight.scales, **change)}
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(weight, **change)


@pytest.mark.parametrize("make", [packed, block_fp8, mxfp4])
def test_a_packed_weight_moves_to_a_dtype_and_to_no_device(make):
    weight = make(2, 32, 64, torch.device("cpu"))
    assert weight.to(torch.float16).experts(0, 1).dtype == torch.float16
    for place in ("cuda", torch.device("cpu"), torch.int8, torch.float8_e4m3fn):
        with pytest.raises(ValueError, match="is used in float32, bfloat16, float16 or float64, not in"):
            weight.to(place)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["one_hot_expert", "sentinels", "empty_first_middle_last", "duplicated_ids"])
def test_lora_over_fp8_against_float64_of_its_values(device, name, backend, monkeypatch):
    """Judged as every problem is; blocks of two experts, scale blocks of one and of two rows of blocks."""
    case = Case(37, 2, 5, 136, 80, torch.bfloat16, name, lora_rank=4)
    gate_up = block_fp8(5, 160, 136, device, stacked=2, dtype=torch.bfloat16)
    down = block_fp8(5, 136, 80, device, dtype=torch.bfloat16, seed=1)
    inputs = make_inputs(case, device)
    inputs = dataclasses.replace(inputs, gate_up=gate_up.experts(0, 5), down=down.experts(0, 5))
    monkeypatch.setattr(packed_weights, "BLOCK_BYTES", 2 * 160 * 136 * 2)
    expected, plain = truth(inputs), eager(inputs)
    with use_small_tiles():
        actual = results(inputs, gate_up, down, backend)
    assert len(actual) == 7
    for kind, value in actual.items():
        key = kind if kind == "out" else f"d{kind}"
        assert_close_to_truth(value, expected[key], plain[key], f"{name} {key}", compute_dtype=torch.bfloat16)


@pytest.mark.parametrize("name", ROUTINGS)
def test_the_tiles_of_a_part(device, name):
    experts, group_size = 7, 64
    ids, _ = make_routing(name, 389, 2, experts)
    plan = make_plan(ids.to(device), experts, group_size)
    count = int(plan.tile_count)
    tiles = list(zip(plan.tile_expert[:count].tolist(), plan.tile_row[:count].tolist(), strict=True))
    for first, last in ((0, 7), (0, 3), (3, 4), (4, 7)):
        part = part_of(plan, first, last)
        count = int(part.tile_count)
        found = zip(part.tile_expert[:count].tolist(), part.tile_row[:count].tolist(), strict=True)
        assert list(found) == [(expert - first, row) for expert, row in tiles if first <= expert < last]
        assert part.expert_start.tolist() == plan.expert_start[first : last + 1].tolist()
        assert (part.rows_per_expert, part.rows) == (plan.rows_per_expert, plan.rows)


KINDS = {
    "plain": Case(19, 2, 5, 64, 32, torch.float32, "sentinels"),
    "lora": Case(23, 2, 5, 64, 32, torch.float32, "empty_first_middle_last", bias=True, lora_rank=4),
    "gateless": Case(19, 3, 5, 64, 32, torch.float32, "zipf", gated=False, activation="relu2"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("by_columns", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize(("kind", "make"), [*((k, packed) for k in KINDS), ("lora", block_fp8), ("lora", mxfp4)])
def test_equals_the_whole_weight(device, backend, kind, by_columns, make, monkeypatch):
    """Blocks of two and of four experts, the last of fewer."""
    case = KINDS[kind]
    inputs = make_inputs(case, device)
    experts, width = case.experts, (2 if case.gated else 1) * case.intermediate
    sizes = [(width, case.hidden), (case.hidden, case.intermediate)]
    gate_up, down = (make(experts, *(s[::-1] if by_columns else s), device, seed=i) for i, s in enumerate(sizes))
    if by_columns:
        gate_up, down = gate_up.mT, down.mT
    monkeypatch.setattr(packed_weights, "BLOCK_BYTES", 2 * width * case.hidden * 4)
    with use_small_tiles():
        for others in ({}, {"recompute": True}):
            found = results(inputs, gate_up, down, backend, **others)
            expected = results(inputs, gate_up.experts(0, experts), down.experts(0, experts), backend, **others)
            for name, value in expected.items():
                assert value.abs().max() > 0, name
                torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def test_one_weight_in_4_bits_and_the_other_trained(device):
    inputs = make_inputs(KINDS["plain"], device)
    gate_up, down = packed(5, 64, 64, device), inputs.down.detach().clone().requires_grad_()
    out = fused_experts(inputs.x, inputs.topk_ids, inputs.topk_weights, gate_up, down, backend="triton")
    out.backward(inputs.grad)
    grad, down.grad = down.grad, None
    whole = gate_up.experts(0, 5)
    fused_experts(inputs.x, inputs.topk_ids, inputs.topk_weights, whole, down, backend="triton").backward(inputs.grad)
    torch.testing.assert_close(grad, down.grad)


@pytest.mark.parametrize("which", ["data", "scales"])
@pytest.mark.parametrize("make", [packed, block_fp8, mxfp4])
def test_a_write_between_forward_and_backward_is_an_error(device, make, which):
    """As of a tensor: the gradients would be those of other weights."""
    inputs = make_inputs(KINDS["plain"], device)
    weight, down = make(5, 64, 64, device), inputs.down.detach()
    x = inputs.x.detach().requires_grad_()
    out = fused_experts(x, inputs.topk_ids, inputs.topk_weights, weight, down, backend="torch")
    written = getattr(weight, which)
    written = written.values if isinstance(written, packed_weights.Scales) else written
    written.view(torch.uint8).zero_()
    with pytest.raises(RuntimeError, match=f"a {type(weight).__name__} of .* was written to between forward and"):
        out.backward(inputs.grad)


def test_a_weight_of_inference_mode_is_taken(device):
    inputs = make_inputs(KINDS["plain"], device)
    with torch.inference_mode():
        weight = block_fp8(5, 64, 64, device)
    x = inputs.x.detach().requires_grad_()
    out = fused_experts(x, inputs.topk_ids, inputs.topk_weights, weight, inputs.down.detach(), backend="torch")
    out.backward(inputs.grad)
    assert x.grad.abs().max() > 0


def test_wrong_sizes_are_refused(device):
    inputs = make_inputs(KINDS["plain"], device)
    with pytest.raises(ValueError, match="sizes disagree"):
        fused_experts(inputs.x, inputs.topk_ids, inputs.topk_weights, packed(5, 62, 64, device), inputs.down)


@pytest.mark.plain_memory
def test_second_derivatives_and_compiled_calls_take_the_whole(device):
    inputs = make_inputs(KINDS["plain"], device)
    gate_up, down = packed(5, 64, 64, device), packed(5, 64, 32, device, seed=1)

    def call(x, *weights):
        return fused_experts(x, inputs.topk_ids, inputs.topk_weights, *weights, backend="torch")

    x = inputs.x.detach().requires_grad_()
    expected = call(x, gate_up.experts(0, 5), down.experts(0, 5))
    [grad] = torch.autograd.grad(call(x, gate_up, down), x, inputs.grad, create_graph=True)
    [want] = torch.autograd.grad(expected, x, inputs.grad, create_graph=True)
    torch.testing.assert_close(grad, want)
    compiled = torch.compile(lambda x: call(x, gate_up, down), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
