"""Expert layers whose frozen block-fp8 weights are multiplied in fp8, against the same arithmetic in float64."""

import dataclasses
import itertools
import math

import pytest
import torch
from torch import Tensor

from moe_kernels import UnsupportedProblem, fp8, fused_experts
from moe_kernels.activation import Activation, Gate
from moe_kernels.backends.torch import TorchBackend
from moe_kernels.backends.triton import TritonBackend
from moe_kernels.fp8 import Fp8Rows, Fp8Weight
from moe_kernels.kernels.device import interpreting
from moe_kernels.kernels.triton.dact import dact
from moe_kernels.kernels.triton.round import in_order, quantize
from moe_kernels.layer import Weight
from moe_kernels.packed import BlockFp8
from moe_kernels.routing import RoutingPlan, TokenRows
from moe_kernels.tools.check.problems import Case, make_inputs
from moe_kernels.tools.check.routings import ROUTINGS, make_routing
from support import interpreter
from support.cases import EVERY_ACTIVATION
from support.fp8_layers import CLOSE, error, in_fp8, make, oracle
from support.packed import block_fp8, results

BF16 = torch.bfloat16
SILU = Gate(Activation("silu"))
BACKENDS = ["torch", "triton"]


@pytest.fixture(autouse=True)
def a_gpu_that_multiplies_fp8(device):
    if device.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 needs compute capability 8.9")


# ------------------------------------------------------------------------------------------------------ rounding
def nearest_e4m3(values: Tensor) -> Tensor:
    """The number of e4m3 nearest to each value, by the table of all of them."""
    table = torch.tensor(sorted({sign * n * 2.0**e for sign in (-1, 1) for e in range(-9, 6) for n in range(16)}))
    table = table[table.abs() <= 448].to(values)
    place = torch.bucketize(values, (table[1:] + table[:-1]) / 2)
    return table[place]


def test_the_table_is_that_of_torch():
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    every = every[~every.isnan()]
    assert torch.equal(nearest_e4m3(every), every)
    assert every.max() == fp8.LARGEST


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("count", "width", "pieces"), [(1, 128, 1), (70, 300, 1), (33, 74, 2), (5, 260, 2), (0, 64, 1)]
)
def test_rows_are_rounded_block_by_block(device, count, width, pieces, dtype):
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(count, width, generator=g) * torch.logspace(-4, 3, count)[:, None]
    rows = rows.to(dtype).to(device)
    blocks = -(-width // pieces // 128)
    for codes, scales in (quantize(rows, pieces), fp8.quantized(rows, pieces)):
        assert (codes.dtype, codes.shape) == (torch.float8_e4m3fn, (count, pieces * blocks * 128))
        assert (scales.dtype, scales.shape) == (torch.float32, (count, pieces * blocks))
        for piece in range(pieces):
            for block in range(blocks):
                first, end = block * 128, min(width // pieces, block * 128 + 128)
                own = rows[:, piece * (width // pieces) :][:, first:end].double()
                place = piece * blocks + block
                found = codes[:, place * 128 : place * 128 + 128].double()
                scale = scales[:, place].double()
                torch.testing.assert_close(scale, own.abs().amax(1) / 448, rtol=1e-6, atol=0)
                assert not found[:, end - first :].any()
                exact = own / scale[:, None]
                least = (nearest_e4m3(exact) - exact).abs()  # of two as near, either
                assert ((found[:, : end - first] - exact).abs() <= least + 1e-6 * exact.abs()).all()
    assert torch.equal(quantize(rows, pieces)[0].view(torch.uint8), fp8.quantized(rows, pieces)[0].view(torch.uint8))
    assert torch.equal(quantize(rows, pieces)[1], fp8.quantized(rows, pieces)[1])
    assert count == 0 or error(fp8.rounded(rows, pieces), rows) < 0.04


@pytest.mark.parametrize("steps", [quantize, fp8.quantized])
def test_what_is_no_number_stays_none_and_zeros_stay_zeros(device, steps):
    rows = torch.ones(6, 256, device=device)
    rows[0, 3], rows[1, 130], rows[2, 0] = math.nan, math.inf, -math.inf
    rows[3], rows[4], rows[5] = 0.0, 1e-44, 3e38
    codes, scales = steps(rows)
    values = codes.float().view(6, 2, 128) * scales[..., None]
    assert values[0, 0].isnan().any()
    assert values[1, 1].isnan().any()
    assert values[2, 0].isnan().any()
    for row, block in ((0, 1), (1, 0), (2, 1)):
        assert torch.equal(values[row, block], torch.ones(128, device=device))
    assert torch.equal(values[3:5], torch.zeros(2, 2, 128, device=device))
    torch.testing.assert_close(values[5].flatten(), rows[5], rtol=1e-6, atol=0)
    assert scales[1:].gt(0).all()


def same_bits(found: Fp8Rows, expected: Fp8Rows, rows: slice) -> None:
    assert [t.shape for t in found] == [t.shape for t in expected]
    assert torch.equal(found.codes[rows].view(torch.uint8), expected.codes[rows].view(torch.uint8))
    assert torch.equal(found.scales[rows], expected.scales[rows])


@pytest.mark.parametrize("width", [128, 300, 640])
@pytest.mark.parametrize("routing", ["zipf", "sentinels", "all_sentinels"])
def test_tokens_are_rounded_as_their_rows(device, routing, width):
    """Each token once, into expert order."""
    backend, (tokens, top_k, experts) = TritonBackend(), (11, 3, 4)
    ids, _ = make_routing(routing, tokens, top_k, experts)
    plan = backend.make_plan(ids.to(device), experts, 16)
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(0)).to(device, BF16)
    found = in_order(TokenRows(x, top_k), 1, plan)
    routed = int(plan.expert_start[-1])
    same_bits(found, quantize(backend.gather(x, plan)), slice(routed))
    assert found.scales[routed:].isnan().all()  # memory as it came: nobody reads these rows, and none is written
    assert found.scales.stride(1) % 16 == 0  # or the GEMMs were compiled again for another number of tokens


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("gate", [SILU, Gate(Activation("relu2"), gated=False)], ids=["gate", "no gate"])
@pytest.mark.parametrize("intermediate", [32, 128, 300, 1100])
def test_dz_is_rounded_as_it_is_written(device, intermediate, gate, dtype):
    """The codes of ``quantize``, and all else bit by bit as without them."""
    backend, (tokens, top_k, experts) = TritonBackend(), (11, 3, 4)
    ids, weights = make_routing("sentinels", tokens, top_k, experts)
    plan = backend.make_plan(ids.to(device), experts, 16)
    g = torch.Generator().manual_seed(0)
    pieces = 2 if gate.gated else 1
    da, z = (torch.randn(plan.rows, n * intermediate, generator=g).to(device, dtype) for n in (1, pieces))
    weights = torch.rand(tokens, top_k, generator=g).to(device)
    found, plain = (dact(da.clone(), z, weights, plan, gate, rounds=rounds) for rounds in (True, False))
    routed = slice(int(plan.expert_start[-1]))
    for mine, theirs in zip(found[:2], plain[:2], strict=True):
        assert torch.equal(mine[routed], theirs[routed])
    assert torch.equal(found.dw, plain.dw)
    assert plain.rounded_dz is None
    same_bits(found.rounded_dz, quantize(plain.dz, pieces), routed)


# --------------------------------------------------------------------------------------------------- single GEMMs
@pytest.mark.parametrize(
    ("sizes", "routing"),
    [*(((37, 21), routing) for routing in ROUTINGS), ((128, 32), "zipf"), ((144, 272), "zipf"), ((256, 129), "zipf")],
)
def test_each_product(device, sizes, routing, small_tiles):
    """up, down and both dgrads of float32 rows, against float64 of what the operands stand for."""
    (hidden, intermediate), (tokens, top_k, experts) = sizes, (11, 3, 4)
    ids, _ = make_routing(routing, tokens, top_k, experts)
    triton, torch_backend = TritonBackend(), TorchBackend()
    plan = triton.make_plan(ids.to(device), experts, 16)
    routed = int(plan.expert_start[-1])
    own = list(itertools.pairwise(plan.expert_start.tolist()))
    gate_up = in_fp8(block_fp8(experts, 2 * intermediate, hidden, device, stacked=2))
    down = in_fp8(block_fp8(experts, hidden, intermediate, device, seed=1))
    g = torch.Generator().manual_seed(0)
    x, a, dz = (
        torch.randn(*size, generator=g).to(device)
        for size in ((tokens, hidden), (plan.rows, intermediate), (plan.rows, 2 * intermediate))
    )

    def product(rows: Tensor, weight: Tensor) -> Tensor:
        return torch.cat([rows[first:last].double() @ weight[e] for e, (first, last) in enumerate(own)])

    sorted_x = torch_backend.gather(x, plan)
    w1, w2 = gate_up.to(torch.float64).experts(0, experts), down.to(torch.float64).experts(0, experts)
    z, made = triton.up(x, Weight(gate_up), plan, SILU, True)
    expected = {
        "z": (z, product(fp8.rounded(sorted_x), w1.mT)),
        "a": (made, SILU.value(z.double())),
        "y": (triton.down(a, Weight(down), plan), product(fp8.rounded(a), w2.mT)),
        "da": (triton.dgrad(TokenRows(x, top_k), Weight(down), plan), product(fp8.rounded(sorted_x), w2)),
        "dxr": (triton.dgrad(dz, Weight(gate_up), plan), product(fp8.rounded(dz, 2), w1)),
    }
    for name, (found, want) in expected.items():
        if routed:
            assert error(found[:routed], want[:routed]) < 3 * CLOSE, name
    if routed:  # and the torch backend, which the layers are compared with
        assert error(torch_backend.down(a, Weight(down), plan)[:routed], expected["y"][1]) < 2e-6
        assert error(torch_backend.dgrad(dz, Weight(gate_up), plan)[:routed], expected["dxr"][1]) < 2e-6


# ---------------------------------------------------------------------------------------------- the whole layer
CLAMPED = Activation("clamped_glu", (1.702, 7.0))
KINDS = {
    "plain": Case(11, 2, 4, 128, 32, routing="zipf"),
    "lora": Case(13, 2, 4, 144, 48, routing="sentinels", lora_rank=4),
    "lora40": Case(9, 2, 4, 144, 32, routing="empty_first_middle_last", lora_rank=40),
    "biases-lora": Case(11, 2, 3, 80, 144, routing="one_hot_expert", lora_rank=4, bias=True, activation=CLAMPED),
    "odd": Case(7, 3, 4, 37, 21, routing="duplicated_ids", lora_rank=3, bias=True),
    "unreduced": Case(7, 3, 4, 80, 48, routing="sentinels", lora_rank=3, reduce=False),  # dO comes by slot
    "gateless": Case(11, 3, 4, 144, 32, routing="zipf", gated=False, activation="relu2", bias=True),
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_and_every_gradient(device, kind, backend, small_tiles):
    inputs, gate_up, down = make(KINDS[kind], device)
    expected = oracle(inputs, gate_up, down)
    for others in ({}, {"recompute": True, "persistent": False})[: 2 if kind == "lora" else 1]:
        found = results(inputs, gate_up, down, backend, **others)
        assert found.keys() == expected.keys() - {"gate_up", "down"}
        for name, value in found.items():
            # A float32 number on the middle between two of e4m3 may go to the other side.
            assert error(value, expected[name]) < max(5e-5, 3 * CLOSE), name


@pytest.mark.parametrize("group_size", [64, 128, 256])
@pytest.mark.parametrize(("hidden", "intermediate"), [(144, 80), (37, 21)])
def test_shipped_tiles(device, hidden, intermediate, group_size):
    inputs, gate_up, down = make(Case(90, 2, 3, hidden, intermediate, routing="zipf", lora_rank=4), device)
    expected = oracle(inputs, gate_up, down)
    for name, value in results(inputs, gate_up, down, "triton", group_size=group_size).items():
        assert error(value, expected[name]) < max(5e-5, 3 * CLOSE), name


def test_which_kernels_of_hopper_take_them(device):
    """Those in fp8, never those in 16 bits, also where sizes and layout are theirs."""
    from moe_kernels.backends import gluon

    weight = in_fp8(block_fp8(2, 128, 128, device, dtype=BF16))
    dout, plan = torch.zeros(4, 128, dtype=BF16, device=device), TritonBackend().make_plan(
        torch.zeros(4, 1, dtype=torch.int64, device=device), 2, 128
    )
    assert gluon._weight_fits(Weight(weight.experts(0, 2)))
    assert gluon._weight_fits(Weight(BlockFp8(weight.sizes, BF16, weight.data, weight.scales)))
    assert not gluon._weight_fits(Weight(weight))
    backend = gluon.GluonBackend()
    assert backend.fp8_gemm(Weight(weight)).__module__ == "moe_kernels.kernels.hopper.fp8"
    with gluon.use_fp8(False):
        assert backend.fp8_gemm(Weight(weight)).__module__ == "moe_kernels.kernels.triton.fp8"
    rows = backend.dout_rows(dout, weight, plan, SILU)
    assert isinstance(rows, TokenRows)
    assert rows.tokens is dout


@pytest.mark.parametrize(("kind", "interleaved"), [("gate_up", False), ("down", False), ("down", True)])
def test_one_weight_alone_is_multiplied_in_fp8(device, kind, interleaved, small_tiles):
    """The other is a tensor, or is dequantised ahead of its GEMMs."""
    inputs, gate_up, down = make(dataclasses.replace(KINDS["lora"], interleaved=interleaved), device)
    other = down if kind == "gate_up" else gate_up
    exact = BlockFp8(other.sizes, other.dtype, other.data, other.scales, other.stacked)
    expected: dict[str, Tensor] = {}
    for form, backend in itertools.product((exact, exact.experts(0, exact.shape[0])), ("torch", "triton")):
        weights = (gate_up, form) if kind == "gate_up" else (form, down)
        found = results(inputs, *weights, backend)
        expected = expected or found
        for name, value in found.items():
            assert error(value, expected[name]) < max(5e-5, 3 * CLOSE), (backend, name)


def test_which_weights_are_dequantised_in_the_load(device):
    """Of block-fp8 weights, where experts have few rows, those whose tiles have whole blocks of scales."""
    from moe_kernels.kernels.hopper.dequantizing import in_load, use_dequantizing

    few, many = (RoutingPlan.empty(torch.empty(rows, 2, dtype=torch.int32), 2, 128) for rows in (511, 512))
    whole, odd = (block_fp8(2, rows, 128, device, dtype=BF16) for rows in (256, 384))
    assert in_load(whole, few, True)
    assert not in_load(whole, many, True)
    with use_dequantizing(False):
        assert not in_load(whole, few, True)
    with use_dequantizing(True):
        assert in_load(whole, many, True)
        assert in_load(odd, few, False)
        assert not in_load(odd, few, True)  # a block has rows of gate and of up
        assert in_load(block_fp8(2, 384, 128, device, 2, BF16), few, True)
        assert not in_load(whole.mT, few, False)
        assert not in_load(whole.experts(0, 2), few, True)


@pytest.mark.parametrize("activation", EVERY_ACTIVATION, ids=lambda a: a.name)
def test_activations(device, activation, small_tiles):
    inputs, gate_up, down = make(Case(7, 2, 3, 48, 32, activation=activation), device)
    expected = oracle(inputs, gate_up, down)
    for name, value in results(inputs, gate_up, down, "triton").items():
        assert error(value, expected[name]) < max(5e-5, 3 * CLOSE), name


@pytest.mark.skipif(not interpreting(), reason="needs Triton's interpreter: TRITON_INTERPRET=1")
@pytest.mark.parametrize("kind", ["odd", "lora"])
def test_no_finding_in_any_order(device, kind, small_tiles):
    """Bounds, races, undefined lanes, 32-bit offsets; and programs in another order give the same bits."""
    inputs, gate_up, down = make(KINDS[kind], device)
    with interpreter.sanitize(), interpreter.overflow_asserts(), interpreter.recorded_launches() as launches:
        expected = results(inputs, gate_up, down, "triton")
    assert launches.count("fp8_gemm_kernel") == 4
    assert launches.count("quantize_kernel") == 3  # dZ is rounded where it is made
    assert "gather_kernel" not in launches
    with interpreter.shuffled(0):
        for name, value in results(inputs, gate_up, down, "triton").items():
            assert torch.equal(value, expected[name]), name


# ----------------------------------------------------------------------------------- against what is not rounded
@pytest.mark.parametrize("data", ["normal", "one sign", "outlier channels"])
def test_errors_against_unrounded_rows(device, data):
    """A few percent, without a bias: also of sums of one sign, which a narrow accumulator loses a part of."""
    case = Case(32, 2, 3, 1024, 256, BF16, lora_rank=4)
    inputs, gate_up, down = make(case, device)
    if data == "one sign":
        gate_up, down = (dataclasses.replace(w, data=w.data.float().abs().to(w.data.dtype)) for w in (gate_up, down))
        inputs = dataclasses.replace(inputs, x=inputs.x.abs(), grad=inputs.grad.abs())
    if data == "outlier channels":
        inputs.x[:, ::97] *= 100
    gate_up, down = in_fp8(gate_up), in_fp8(down)
    found = results(inputs, gate_up, down, "torch")
    exact = results(inputs.to(torch.float64), *(unrounded(w) for w in (gate_up, down)), "torch")
    for name, value in found.items():
        assert 1e-3 < error(value, exact[name]) < 0.08, name
    for name in ("out", "x"):
        want = exact[name].double()
        slope = ((found[name].double() * want).sum() / want.square().sum()).item() - 1
        assert abs(slope) < 0.004, name


def unrounded(weight: Fp8Weight) -> BlockFp8:
    return BlockFp8(weight.sizes, torch.float64, weight.data, weight.scales, weight.stacked)


# -------------------------------------------------------------------------------------------------- bad input
def test_autocast_changes_nothing(device):
    """Rows that were rounded to e4m3 are float32, which autocast would round once more; so are sums of gradients."""
    inputs, gate_up, down = make(dataclasses.replace(KINDS["biases-lora"], dtype=BF16), device)
    expected = results(inputs, gate_up, down, "torch")
    with torch.autocast(device.type, BF16):
        found = results(inputs, gate_up, down, "torch")
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_what_is_no_number_comes_out_in_its_row_alone(device, small_tiles):
    inputs, gate_up, down = make(KINDS["lora"], device)
    for backend in BACKENDS:
        clean = results(inputs, gate_up, down, backend)
        for bad in (math.nan, math.inf):
            spoilt = dataclasses.replace(inputs, x=inputs.x.clone())
            spoilt.x[5, 3] = bad
            found = results(spoilt, gate_up, down, backend)
            others = torch.arange(len(inputs.x)) != 5
            routed = bool(((inputs.topk_ids[5] >= 0) & (inputs.topk_ids[5] < len(gate_up.data))).any())
            assert routed
            for name in ("out", "x"):
                assert found[name][5].isnan().all(), (backend, name)
                assert torch.equal(found[name][others], clean[name][others]), (backend, name)


def test_a_code_that_is_no_number_comes_out(device, small_tiles):
    inputs, gate_up, down = make(KINDS["plain"], device)
    expert = int(inputs.topk_ids[0, 0])
    gate_up.data.view(torch.uint8)[expert, 0, 0] = 0x7F
    for backend in BACKENDS:
        out = results(inputs, gate_up, down, backend)["out"]
        assert torch.equal(out.isnan().all(1), (inputs.topk_ids == expert).any(1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("interleaved", "whose gate and up rows alternate, are not multiplied in fp8: leave fp8_activations"),
        ("by columns", "weights stored by columns, .* leave fp8_activations"),
        ("one block", "a block of scales holds rows of gate and of up, .* leave fp8_activations"),
    ],
)
def test_what_the_kernels_do_not_cover_is_refused(device, backend, kind, words):
    inputs = make_inputs(Case(5, 2, 3, 64, 96), device)
    gate_up = block_fp8(3, 192, 64, device, stacked=1 if kind == "one block" else 2)
    if kind == "by columns":
        gate_up = block_fp8(3, 64, 192, device).mT
    down, options = in_fp8(block_fp8(3, 64, 96, device)), {"interleaved": kind == "interleaved"}
    with pytest.raises(UnsupportedProblem, match=words):
        fused_experts(
            inputs.x, inputs.topk_ids, inputs.topk_weights, in_fp8(gate_up), down, backend=backend, **options
        )


@pytest.mark.parametrize(("stacked", "rows", "gated"), [(2, 96, False), (4, 192, True)])
def test_scales_of_other_matrices_are_refused(device, stacked, rows, gated):
    """Where all blocks are whole they are the same blocks."""
    weight = block_fp8(2, rows, 64, device, stacked)
    reason = fp8.why_not(weight, gated, False, device)
    assert f"those of {stacked} matrices above each other, and it has {2 if gated else 1}: leave" in reason
    with pytest.raises(UnsupportedProblem, match="matrices above each other"):
        fp8.check_fp8(in_fp8(weight), gated, False, device)
    assert fp8.why_not(block_fp8(2, 128 * stacked, 64, device, stacked), gated, False, device) is None


def test_other_transposed_codes_are_refused(device):
    weight = block_fp8(3, 64, 96, device)
    with pytest.raises(ValueError, match=r"the transposed codes are .* \(3, 64, 96\), wanted .* \(3, 96, 64\)"):
        Fp8Weight.of(weight, weight.data)


def test_dgrad_without_transposed_codes_is_refused(device):
    inputs, gate_up, down = make(KINDS["plain"], device)
    bare = [dataclasses.replace(w, transposed=None) for w in (gate_up, down)]
    with torch.no_grad():  # nobody asks for it
        fused_experts(inputs.x, inputs.topk_ids, inputs.topk_weights, *bare, backend="triton")
    with pytest.raises(ValueError, match=r"without transposed codes has no dgrad: give it those of fp8\.transposed"):
        results(inputs, *bare, "triton")


def test_what_the_weight_takes(device):
    """With the second layout 2 bytes a value, as in 16 bits, and the scales."""
    gate_up = in_fp8(block_fp8(3, 1536, 2048, device, stacked=2))
    held = sum(part.numel() * part.element_size() for part in gate_up.parts() if isinstance(part, Tensor))
    assert held <= 1.001 * 3 * 1536 * 2048 * 2
