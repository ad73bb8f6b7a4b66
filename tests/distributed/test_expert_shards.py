"""One expert layer cut over ranks, in one process: what every engine of expert parallelism asks of the op.

A rank holds some of the experts and sees every token; ids of experts elsewhere arrive as sentinels (transformers
says E local, DeepEP -1). The ranks' outputs and gradients must add up to the whole layer's.
"""

from __future__ import annotations

import functools

import pytest
import torch

import moe_kernels
from moe_kernels import backends
from moe_kernels.tools.check.problems import Case, Inputs, make_inputs, run
from support.judge import check

BACKENDS = ("torch", "triton")
CASE = Case(tokens=13, top_k=3, experts=8, hidden=32, intermediate=16)


def local(inputs: Inputs, experts: range, sentinel: int) -> Inputs:
    """What the rank that owns ``experts`` computes with."""
    here = (inputs.topk_ids >= experts.start) & (inputs.topk_ids < experts.stop)
    own = slice(experts.start, experts.stop)
    return Inputs(
        inputs.x,
        torch.where(here, inputs.topk_ids - experts.start, sentinel),
        inputs.topk_weights,
        inputs.gate_up[own].contiguous(),
        inputs.down[own].contiguous(),
        inputs.grad,
    )


@pytest.mark.parametrize("routing", ["random", "one_hot_expert", "all_to_last", "zipf"])
@pytest.mark.parametrize("sizes", [(4, 4), (1, 5, 2)], ids=str)
@pytest.mark.parametrize("sentinel", ["experts", -1, 2**31 - 1, -(2**31)])
def test_the_ranks_add_up(sentinel: str | int, sizes: tuple[int, ...], routing: str) -> None:
    whole = make_inputs(Case(**{**CASE.__dict__, "routing": routing, "dtype": torch.float64}))
    expected = run(moe_kernels.fused_experts, whole)
    parts, start = [], 0
    for size in sizes:
        part = local(whole, range(start, start + size), size if sentinel == "experts" else int(sentinel))
        parts.append(run(moe_kernels.fused_experts, part))
        start += size
    for name in ("out", "dx", "dtopk_weights"):
        torch.testing.assert_close(sum(part[name] for part in parts), expected[name])
    for name in ("dgate_up", "ddown"):
        torch.testing.assert_close(torch.cat([part[name] for part in parts]), expected[name])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rank_is_right_on_its_own(backend: str) -> None:
    part = local(make_inputs(CASE), range(2, 5), 3)
    check(functools.partial(moe_kernels.fused_experts, backend=backend), part)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sentinels_are_planned_into_no_tile(backend: str) -> None:
    """Rows outside every tile cost no GEMM work: the kernels walk tiles."""
    part = local(make_inputs(CASE), range(0, 4), -1)
    here = part.topk_ids >= 0
    for ids, rows in ((part.topk_ids, int(here.sum())), (torch.full_like(part.topk_ids, 4), 0)):
        plan = backends.load(backend).make_plan(ids, 4, 64)
        assert int(plan.expert_start[-1]) == rows
        assert int(plan.tile_count) == len(ids[(ids >= 0) & (ids < 4)].unique())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [0, 5])
def test_a_rank_without_work_gives_zeros_of_the_right_shapes(backend: str, tokens: int) -> None:
    """No tokens at all, and tokens that all go elsewhere: zeros, not whatever the memory held."""
    part = local(make_inputs(Case(**{**CASE.__dict__, "tokens": tokens})), range(0, 0), 4)
    weights = make_inputs(Case(**{**CASE.__dict__, "experts": 4}))
    part = Inputs(part.x, part.topk_ids, part.topk_weights, weights.gate_up, weights.down, part.grad)
    part.x.fill_(float("nan"))
    results = run(functools.partial(moe_kernels.fused_experts, backend=backend), part)
    shapes = {"out": part.x, "dx": part.x, "dtopk_weights": part.topk_weights}
    shapes |= {"dgate_up": weights.gate_up, "ddown": weights.down}
    for name, like in shapes.items():
        assert results[name].shape == like.shape, name
        assert torch.count_nonzero(results[name]) == 0, name
