"""Each step of the Triton backend against the same step in float64 torch, at tile sizes small enough that a few
tokens fill several tiles with ragged ends."""

import dataclasses

import pytest
import torch

from moe_kernels import torch_backend
from moe_kernels.testing.problems import Case, make_inputs
from moe_kernels.testing.routings import ROUTINGS, make_routing
from moe_kernels.testing.tolerances import assert_close_to_truth

triton_backend = pytest.importorskip("moe_kernels.triton_backend")

BF16 = torch.bfloat16


# ---------------------------------------------------------------------------------------------------- the plan
def check_plan(plan, ids, experts, group_size):
    """Against torch's stable sort; the tiles must cover every routed row exactly once."""
    flat = ids.reshape(-1).long()
    flat = torch.where((flat >= 0) & (flat < experts), flat, experts)
    order = torch.sort(flat, stable=True).indices
    routed = int((flat < experts).sum())
    assert plan.row_slot.tolist() == order.tolist()
    assert plan.slot_row[order].tolist() == list(range(len(flat)))
    starts = plan.expert_start.tolist()
    assert starts == [int((flat < e).sum()) for e in range(experts + 1)]
    count = plan.tile_count.item()
    assert count <= plan.max_tiles
    covered = []
    for expert, row in zip(plan.tile_expert[:count].tolist(), plan.tile_row[:count].tolist(), strict=True):
        assert starts[expert] <= row < starts[expert + 1]
        covered += range(row, min(row + group_size, starts[expert + 1]))
    assert sorted(covered) == list(range(routed))


BACKENDS = [torch_backend, triton_backend]


@pytest.mark.parametrize("steps", BACKENDS, ids=lambda b: b.NAME)
@pytest.mark.parametrize("name", ROUTINGS)
def test_plan_of_hostile_routings(steps, device, name):
    ids, _ = make_routing(name, 47, 3, 5)
    check_plan(steps.make_plan(ids.to(device), 5, 64), ids, 5, 64)


@pytest.mark.parametrize("steps", BACKENDS, ids=lambda b: b.NAME)
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "group_size"),
    [(0, 2, 4, 64), (1, 1, 1, 64), (130, 1, 1, 64), (129, 2, 3, 128), (300, 2, 2, 256), (200, 8, 64, 64), (9, 3, 257, 64)],
)
def test_plan_of_sizes(steps, device, tokens, top_k, experts, group_size):
    ids, _ = make_routing("zipf", tokens, top_k, experts)
    check_plan(steps.make_plan(ids.to(device), experts, group_size), ids, experts, group_size)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_plan_of_several_blocks_a_program(device, monkeypatch, dtype):
    monkeypatch.setattr("moe_kernels.kernels.triton.plan._MAX_CHUNKS", 3)
    ids, _ = make_routing("sentinels", 700, 2, 4)
    ids = ids.clamp(-1, 9).to(dtype)
    check_plan(triton_backend.make_plan(ids.to(device), 4, 64), ids, 4, 64)


# ---------------------------------------------------------------------------------------------- the GEMM steps
CASES = {
    "aligned": Case(tokens=19, top_k=2, experts=3, hidden=48, intermediate=32, dtype=BF16, routing="one_hot_expert"),
    "ragged": Case(tokens=19, top_k=2, experts=3, hidden=40, intermediate=24, dtype=BF16, routing="sentinels"),
    "odd": Case(tokens=13, top_k=3, experts=4, hidden=37, intermediate=21, dtype=BF16, routing="empty_first_middle_last"),
}


@dataclasses.dataclass
class Steps:
    """The tensors that the steps hand to each other, from the torch backend in float64, and rounded."""

    case: Case
    inputs: object
    plan: object
    routed: slice
    exact: dict
    rounded: dict


def prepare(case, device):
    inputs = make_inputs(case, device)
    wide = inputs.to(torch.float64)
    plan = torch_backend.make_plan(inputs.topk_ids, case.experts, 16)
    t = {}
    t["z"], t["a"] = torch_backend.up(wide.x, wide.gate_up, plan, "silu", True, True)
    t["y"] = torch_backend.down(t["a"], wide.down, plan, True)
    z = t["z"].to(BF16).double()  # what the backward reads is rounded
    t["dz"], t["wa"], _ = torch_backend.dact(wide.grad, wide.down, z, wide.topk_weights, plan, "silu", True)
    rounded = {name: value.to(case.dtype) for name, value in t.items()}
    return Steps(case, inputs, plan, slice(0, int(plan.expert_start[-1])), t, rounded)


@pytest.fixture(params=CASES)
def s(request, device, small_tiles):
    return prepare(CASES[request.param], device)


def both(s, step, *args, triton_args=None, **kwargs):
    """(triton in the dtype, torch in float64 from the same rounded inputs, torch in the dtype)."""
    wide = [a.double() if torch.is_tensor(a) and a.is_floating_point() else a for a in args]
    return (
        getattr(triton_backend, step)(*(triton_args or args), **kwargs),
        getattr(torch_backend, step)(*wide, **kwargs),
        getattr(torch_backend, step)(*args, **kwargs),
    )


@pytest.mark.parametrize("persistent", [True, False])
def test_up(s, persistent):
    ours, truth, eager = both(s, "up", s.inputs.x, s.inputs.gate_up, s.plan, "silu", persistent, True)
    r = s.routed
    assert_close_to_truth(ours[0][r], truth[0][r], eager[0][r], "z", min_exact_share=0.9)
    assert_close_to_truth(ours[1][r], truth[1][r], eager[1][r], "a", min_exact_share=0.9)


def test_up_without_saving_z(s):
    z, a = triton_backend.up(s.inputs.x, s.inputs.gate_up, s.plan, "silu", True, False)
    _, expected = triton_backend.up(s.inputs.x, s.inputs.gate_up, s.plan, "silu", True, True)
    assert z.numel() == 0
    assert torch.equal(a[s.routed], expected[s.routed])


@pytest.mark.parametrize("persistent", [True, False])
def test_down(s, persistent):
    ours, truth, eager = both(s, "down", s.rounded["a"], s.inputs.down, s.plan, persistent)
    assert_close_to_truth(ours[s.routed], truth[s.routed], eager[s.routed], "y", min_exact_share=0.9)


def test_dgrad(s):
    ours, truth, eager = both(s, "dgrad", s.rounded["dz"], s.inputs.gate_up, s.plan, True)
    assert_close_to_truth(ours[s.routed], truth[s.routed], eager[s.routed], "dxr", min_exact_share=0.9)


@pytest.mark.parametrize("persistent", [True, False])
def test_dact(s, persistent):
    i = s.inputs
    ours, truth, eager = both(
        s, "dact", i.grad, i.down, s.rounded["z"], i.topk_weights, s.plan, "silu", persistent
    )
    for name, a, b, c in zip(("dz", "wa"), ours, truth, eager, strict=False):
        assert_close_to_truth(a[s.routed], b[s.routed], c[s.routed], name, min_exact_share=0.85)
    partial, exact, plain = (t[2].sum(0)[s.routed] for t in (ours, truth, eager))
    assert_close_to_truth(partial, exact, plain.float(), "<dA0, A>", compute_dtype=BF16)


@pytest.mark.parametrize("which", ["down", "gate_up"])
@pytest.mark.parametrize("persistent", [True, False])
def test_wgrad(s, which, persistent):
    if which == "down":
        left, right, gather_left = s.inputs.grad, s.rounded["wa"], True
    else:
        left, right, gather_left = s.rounded["dz"], s.inputs.x, False
    # Rows behind the routed ones belong to nobody and may hold anything.
    spoiled = [t.clone() for t in (left, right)]
    spoiled[1 if gather_left else 0][s.routed.stop :] = float("nan")
    ours, truth, eager = both(
        s, "wgrad", left, right, s.plan, triton_args=(*spoiled, s.plan),
        gather_left=gather_left, gather_right=not gather_left, persistent=persistent,
    )  # fmt: skip
    assert_close_to_truth(ours, truth, eager, which, min_exact_share=0.9)
    counts = s.plan.expert_start.diff()
    assert torch.count_nonzero(ours[counts == 0]) == 0


def test_combine(s):
    y = s.rounded["y"].clone()
    y[s.routed.stop :] = float("nan")
    ours, truth, eager = both(s, "combine", s.rounded["y"], s.inputs.topk_weights, s.plan,
                              triton_args=(y, s.inputs.topk_weights, s.plan))  # fmt: skip
    assert_close_to_truth(ours, truth, eager, "out", min_exact_share=0.95)


def test_combine_grad(s):
    dxr = s.rounded["y"].clone()
    dxr[s.routed.stop :] = float("nan")
    ours, truth, eager = both(s, "combine_grad", s.rounded["y"], s.plan, triton_args=(dxr, s.plan))
    assert_close_to_truth(ours, truth, eager, "dx", min_exact_share=0.95)


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_weight_grad(s, dtype):
    g = torch.Generator().manual_seed(1)
    partial = torch.randn(3, s.plan.rows, generator=g).to(s.plan.packed.device)
    truth = torch_backend.weight_grad(partial.double(), s.plan, torch.float64)
    eager = torch_backend.weight_grad(partial, s.plan, dtype)
    partial[:, s.routed.stop :] = float("nan")
    ours = triton_backend.weight_grad(partial, s.plan, dtype)
    assert_close_to_truth(ours, truth, eager, "dw")
