"""Each step of the Triton backend against the same step in float64 torch, at tile sizes small enough that a few
tokens fill several tiles with ragged ends."""

import dataclasses
import functools

import pytest
import torch

from moe_kernels import UnsupportedProblem, fused_experts
from moe_kernels.activation import Activation, Gate
from moe_kernels.backends.torch import TorchBackend
from moe_kernels.backends.triton import TritonBackend
from moe_kernels.kernels.device import dot_precision
from moe_kernels.kernels.tiles import fit
from moe_kernels.kernels.triton import row_pass
from moe_kernels.layer import Weight
from moe_kernels.routing import TokenRows
from moe_kernels.tools.check.problems import Case, make_inputs, run
from moe_kernels.tools.check.routings import ROUTINGS, make_routing
from moe_kernels.tools.check.tolerances import assert_close_to_truth
from support.judge import assert_one_gemm

BF16 = torch.bfloat16
SILU = Gate(Activation("silu"))
torch_backend, triton_backend = TorchBackend(), TritonBackend()


# ---------------------------------------------------------------------------------------------------- the plan
def check_plan(plan, ids, experts, group_size):
    """Every field, to the bit, against torch's stable sort and the definition of the tiles."""
    flat = ids.reshape(-1).long()
    flat = torch.where((flat >= 0) & (flat < experts), flat, experts)
    order = torch.sort(flat, stable=True).indices
    assert plan.row_slot.tolist() == order.tolist()
    assert plan.slot_row[order].tolist() == list(range(len(flat)))
    starts = plan.expert_start.tolist()
    assert starts == [int((flat < e).sum()) for e in range(experts + 1)]
    assert plan.expert_order.tolist() == sorted(range(experts), key=lambda e: starts[e] - starts[e + 1])
    tiles = [(e, row) for e in range(experts) for row in range(starts[e], starts[e + 1], group_size)]
    assert plan.tile_count.item() == len(tiles) <= plan.max_tiles
    table = zip(plan.tile_expert[: len(tiles)].tolist(), plan.tile_row[: len(tiles)].tolist(), strict=True)
    assert list(table) == tiles


BACKENDS = [torch_backend, triton_backend]


@pytest.mark.parametrize("steps", BACKENDS, ids=lambda b: b.name)
@pytest.mark.parametrize("name", ROUTINGS)
def test_plan_of_hostile_routings(steps, device, name):
    ids, _ = make_routing(name, 47, 3, 5)
    check_plan(steps.make_plan(ids.to(device), 5, 64), ids, 5, 64)


@pytest.mark.parametrize("steps", BACKENDS, ids=lambda b: b.name)
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "group_size"),
    [
        (0, 2, 4, 64),
        (1, 1, 1, 64),
        (130, 1, 1, 64),
        (129, 2, 3, 128),
        (300, 2, 2, 256),
        (200, 8, 64, 64),
        (9, 3, 257, 64),
        (1, 9, 512, 64),
        (1025, 1, 8, 64),
        (341, 6, 60, 128),
        (256, 8, 128, 128),
        (257, 8, 256, 256),
        (433, 5, 300, 64),
        (517, 4, 512, 64),
    ],
)
def test_plan_of_sizes(steps, device, tokens, top_k, experts, group_size):
    ids, _ = make_routing("zipf", tokens, top_k, experts)
    check_plan(steps.make_plan(ids.to(device), experts, group_size), ids, experts, group_size)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("name", ROUTINGS)
def test_plan_of_several_blocks_a_program(device, small_plan_blocks, name, dtype):
    ids, _ = make_routing(name, 389, 2, 4)
    check_plan(triton_backend.make_plan(ids.to(dtype).to(device), 4, 64), ids.to(dtype), 4, 64)


def test_plan_drops_ids_that_are_valid_in_their_low_32_bits_alone(device, small_plan_blocks):
    ids, _ = make_routing("random", 150, 2, 4)
    ids[::3] += 2**32
    ids[1::7] -= 2**40
    check_plan(triton_backend.make_plan(ids.to(device), 4, 64), ids, 4, 64)


@pytest.mark.parametrize(("name", "experts"), [("zipf", 256), ("sentinels", 300)])
def test_plan_of_many_rows(device, name, experts):
    ids, _ = make_routing(name, 17011, 8, experts)
    check_plan(triton_backend.make_plan(ids.to(device), experts, 128), ids, experts, 128)


# ---------------------------------------------------------------------------------------------- the GEMM steps
CASES = {
    "aligned": Case(tokens=19, top_k=2, experts=3, hidden=64, intermediate=32, dtype=BF16, routing="one_hot_expert"),
    "ragged": Case(tokens=19, top_k=2, experts=3, hidden=80, intermediate=48, dtype=BF16, routing="sentinels"),
    "odd": Case(
        tokens=13, top_k=3, experts=4, hidden=37, intermediate=21, dtype=BF16, routing="empty_first_middle_last"
    ),
}


@dataclasses.dataclass
class Steps:
    """The tensors that the steps hand to each other, from the torch backend in float64, and rounded."""

    case: Case
    inputs: object
    plan: object
    routed: slice
    rounded: dict


def prepare(case, device):
    inputs = make_inputs(case, device)
    wide = inputs.to(torch.float64)
    plan = torch_backend.make_plan(inputs.topk_ids, case.experts, 16)
    t = {}
    t["z"], t["a"] = torch_backend.up(wide.x, Weight(wide.gate_up), plan, SILU, True)
    t["y"] = torch_backend.down(t["a"], Weight(wide.down), plan)
    t["dout"] = torch_backend.gather(wide.grad, plan)
    t["da"] = torch_backend.dgrad(t["dout"], Weight(wide.down), plan)
    done = torch_backend.dact(t["da"], t["z"], wide.topk_weights, plan, SILU)
    t["dz"], t["wa"] = done.dz, done.wa
    rounded = {name: value.to(case.dtype) for name, value in t.items()}
    return Steps(case, inputs, plan, slice(0, int(plan.expert_start[-1])), rounded)


@pytest.fixture(params=CASES)
def s(request, device, small_tiles):
    return prepare(CASES[request.param], device)


def both(s, step, *args, triton_args=None, **kwargs):
    """(triton in the dtype, torch in float64 from the same rounded inputs, torch in the dtype)."""
    wide = [Weight(a.matrix.double()) if isinstance(a, Weight) else a for a in args]
    wide = [a.double() if torch.is_tensor(a) and a.is_floating_point() else a for a in wide]
    return (
        getattr(triton_backend, step)(*(triton_args or args), **kwargs),
        getattr(torch_backend, step)(*wide, **kwargs),
        getattr(torch_backend, step)(*args, **kwargs),
    )


def walk(s, persistent):
    return dataclasses.replace(s.plan, persistent=persistent)


@pytest.mark.parametrize("persistent", [True, False])
def test_up(s, persistent):
    ours, truth, eager = both(s, "up", s.inputs.x, Weight(s.inputs.gate_up), walk(s, persistent), SILU, True)
    r = s.routed
    assert_one_gemm(ours[0][r], truth[0][r], eager[0][r], "z")
    assert_one_gemm(ours[1][r], truth[1][r], eager[1][r], "a")


def test_up_without_saving_z(s):
    z, a = triton_backend.up(s.inputs.x, Weight(s.inputs.gate_up), s.plan, SILU, False)
    _, expected = triton_backend.up(s.inputs.x, Weight(s.inputs.gate_up), s.plan, SILU, True)
    assert z.numel() == 0
    assert torch.equal(a[s.routed], expected[s.routed])


@pytest.mark.parametrize("persistent", [True, False])
def test_down(s, persistent):
    ours, truth, eager = both(s, "down", s.rounded["a"], Weight(s.inputs.down), walk(s, persistent))
    assert_one_gemm(ours[s.routed], truth[s.routed], eager[s.routed], "y")


@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize(("rows", "weight"), [("dz", "gate_up"), ("dout", "down")])
def test_dgrad(s, rows, weight, persistent):
    ours, truth, eager = both(s, "dgrad", s.rounded[rows], Weight(getattr(s.inputs, weight)), walk(s, persistent))
    assert_one_gemm(ours[s.routed], truth[s.routed], eager[s.routed], rows)


def test_gather(s):
    ours, expected = triton_backend.gather(s.inputs.x, s.plan), torch_backend.gather(s.inputs.x, s.plan)
    assert torch.equal(ours[s.routed], expected[s.routed])


@pytest.mark.parametrize("weights_dtype", [torch.float32, BF16], ids=str)
def test_dact(s, weights_dtype):
    weights = s.inputs.topk_weights.to(weights_dtype)
    da, z = s.rounded["da"], s.rounded["z"]
    spoiled = [t.clone() for t in (da, z)]
    for t in spoiled:
        t[s.routed.stop :] = float("nan")
    ours, truth, eager = both(s, "dact", da, z, weights, s.plan, SILU, triton_args=(*spoiled, weights, s.plan, SILU))
    for name, a, b, c in zip(("dz", "wa"), ours, truth, eager, strict=False):
        assert_one_gemm(a[s.routed], b[s.routed], c[s.routed], name)
    assert_close_to_truth(ours[2], truth[2], eager[2], "dw")


def test_down_grad_without_wa(s):
    """For frozen weights: dZ and dw are the same to the bit, and wA takes no memory."""
    arguments = s.rounded["dout"], Weight(s.inputs.down), s.rounded["z"], s.inputs.topk_weights, s.plan, SILU
    for backend in BACKENDS:
        whole, lean = (backend.down_grad(*arguments, needs_wa=needs_wa) for needs_wa in (True, False))
        assert lean[1].numel() == 0
        assert torch.equal(lean[0][s.routed], whole[0][s.routed])
        assert torch.equal(lean[2], whole[2])


@pytest.mark.parametrize(("left", "right"), [("dout", "wa"), ("dz", "x")])
def test_wgrad(s, left, right):
    operands = [s.rounded[left], s.rounded["wa"] if right == "wa" else torch_backend.gather(s.inputs.x, s.plan)]
    # Rows behind the routed ones belong to nobody and may hold anything.
    spoiled = [t.clone() for t in operands]
    for t in spoiled:
        t[s.routed.stop :] = float("nan")
    ours, truth, eager = both(s, "wgrad", *operands, s.plan, triton_args=(*spoiled, s.plan))
    assert_one_gemm(ours, truth, eager, f"{left}^T {right}")
    counts = s.plan.expert_start.diff()
    assert torch.count_nonzero(ours[counts == 0]) == 0


def test_wgrad_of_tokens(s):
    """Rows to gather on either side: what a copy of them in expert order gives, to the bit."""
    dz, tokens = s.rounded["dz"], TokenRows(s.inputs.x, s.case.top_k)
    for backend in BACKENDS:
        rows = backend.gather(s.inputs.x, s.plan)
        assert torch.equal(backend.wgrad(dz, tokens, s.plan), backend.wgrad(dz, rows, s.plan))
        assert torch.equal(backend.wgrad(tokens, dz, s.plan), backend.wgrad(rows, dz, s.plan))


def spoiled(rows, s):
    """``rows`` with NaN behind the routed ones: rows that belong to nobody and may hold anything."""
    rows = rows.clone()
    rows[s.routed.stop :] = float("nan")
    return rows


def factors(s, width, inner):
    """lora_b (E, width, 16), low (R, 16) and lora_a (E, 16, inner)."""
    generator = torch.Generator().manual_seed(0)
    shapes = (s.case.experts, width, 16), (s.plan.rows, 16), (s.case.experts, 16, inner)
    return [torch.randn(shape, generator=generator).to(s.inputs.x) * 0.3 for shape in shapes]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("asked", ["lora", "bias", "lora frozen", "bias frozen", "both"])
def test_added_grads(s, weighted, asked, fused, monkeypatch):
    """Of W2 from tokens and routing weights, of W1 from rows in expert order."""
    monkeypatch.setattr(row_pass, "MAX_RANK", 32 if fused else 0)
    name = "down" if weighted else "gate_up"
    matrix = getattr(s.inputs, name)
    width = matrix.shape[1]
    lora_b, low, _ = factors(s, width, 1)
    bias = torch.linspace(-1, 1, s.case.experts * width).view(s.case.experts, width).to(matrix)
    lora, biased = asked != "bias" and "bias f" not in asked, asked in ("bias", "bias frozen", "both")
    weight = Weight(matrix, bias if biased else None, low if lora else None, lora_b if lora else None)
    given = spoiled(low, s) if lora else None
    dy = TokenRows(s.inputs.grad, s.case.top_k) if weighted else s.rounded["dz"]
    ours_dy = dy if weighted else spoiled(dy, s)
    owner = lora_b if "frozen" not in asked and lora else None
    rest = owner, "frozen" not in asked and biased
    w = (s.inputs.topk_weights,) if weighted else ()
    ours = triton_backend.added_grads(ours_dy, weight._replace(low=given), s.plan, *rest, *w)
    wide = Weight(*(None if t is None else t.double() for t in weight))
    wide_dy = TokenRows(dy.tokens.double(), dy.top_k) if weighted else dy.double()
    wide_rest = None if owner is None else owner.double(), rest[1]
    truth = torch_backend.added_grads(wide_dy, wide, s.plan, *wide_rest, *(t.double() for t in w))
    eager = torch_backend.added_grads(dy, weight, s.plan, *rest, *w)
    for field, mine, want, plain in zip(ours._fields, ours, truth, eager, strict=True):
        assert (mine is None) == (want is None), field
        if mine is not None:
            part = s.routed if field in ("rows", "low", "bias_dot") else slice(None)
            assert_close_to_truth(mine[part], want[part], plain[part], field)
    if owner is None and not rest[1] and not lora and not (biased and weighted):
        assert ours[1:] == (None,) * 4


@pytest.mark.parametrize("gathered", [True, False])
def test_low_and_the_gradient_of_lora_a(s, gathered):
    width = s.case.hidden if gathered else s.case.intermediate
    _, low, lora_a = factors(s, 1, width)
    rows = TokenRows(s.inputs.x, s.case.top_k) if gathered else s.rounded["a"]
    wide = TokenRows(rows.tokens.double(), rows.top_k) if gathered else rows.double()
    bad = rows if gathered else spoiled(rows, s)
    ours, r = triton_backend.low(rows, lora_a, s.plan), s.routed
    truth, eager = torch_backend.low(wide, lora_a.double(), s.plan), torch_backend.low(rows, lora_a, s.plan)
    assert_one_gemm(ours[r], truth[r], eager[r], "low")
    ours = triton_backend.lora_a_grad(spoiled(low, s), bad, s.plan, lora_a)
    truth = torch_backend.lora_a_grad(low.double(), wide, s.plan, lora_a.double())
    eager = torch_backend.lora_a_grad(low, rows, s.plan, lora_a)
    assert_one_gemm(ours, truth, eager, "dlora_a")
    assert torch.count_nonzero(ours[s.plan.expert_start.diff() == 0]) == 0


def test_combine(s):
    y = s.rounded["y"].clone()
    y[s.routed.stop :] = float("nan")
    ours, truth, eager = both(s, "combine", s.rounded["y"], s.inputs.topk_weights, s.plan,
                              triton_args=(y, s.inputs.topk_weights, s.plan))  # fmt: skip
    assert_one_gemm(ours, truth, eager, "out", share=0.95)


def test_combine_grad(s):
    dxr = s.rounded["y"].clone()
    dxr[s.routed.stop :] = float("nan")
    ours, truth, eager = both(s, "combine_grad", s.rounded["y"], s.plan, triton_args=(dxr, s.plan))
    assert_one_gemm(ours, truth, eager, "dx", share=0.95)


@pytest.mark.parametrize("setting", ["tf32", "ieee"])
def test_the_newer_switch_for_tf32_is_read_too(setting):
    """Once it is set, torch refuses to read the older one; ``TrainingArguments(tf32=True)`` sets it."""
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = setting
        assert dot_precision(torch.float32) == setting
        assert dot_precision(torch.bfloat16) == "ieee"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_factors_that_do_not_fit_beside_a_tile_are_refused(device, monkeypatch):
    monkeypatch.setattr(fit, "shared_memory", lambda device: 99 * 1024)
    with pytest.raises(UnsupportedProblem, match="set moe_group_size: 128"):
        run(
            functools.partial(fused_experts, backend="triton", group_size=256),
            make_inputs(Case(4, 1, 2, 16, 16, lora_rank=65), device),
        )
