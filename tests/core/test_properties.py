"""Laws that hold for every problem, on problems nobody chose."""

import functools

import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

import moe_kernels
from moe_kernels.tools.check.problems import Case, make_inputs, run
from moe_kernels.tools.check.routings import ROUTINGS
from support.judge import check
from support.tiles import use_small_tiles

triton_only = functools.partial(moe_kernels.fused_experts, backend="triton")


def budget(examples):
    return settings(
        max_examples=examples,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
    )  # fmt: skip


@st.composite
def cases(draw, max_tokens=24, routings=tuple(ROUTINGS)):
    # Sixteen bits and a handful of elements: one cancellation and there is nothing left to compare.
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    return Case(
        tokens=draw(st.integers(1 if dtype == torch.float32 else 4, max_tokens)),
        top_k=draw(st.integers(1, 4)),
        experts=draw(st.integers(1, 6)),
        hidden=draw(st.integers(1 if dtype == torch.float32 else 8, 50)),
        intermediate=draw(st.integers(1, 40)),
        dtype=dtype,
        routing=draw(st.sampled_from(routings)),
        seed=draw(st.integers(0, 1000)),
    )


@budget(8)
@given(cases(), st.booleans())
@example(Case(1, 1, 1, 1, 1), True)
@example(Case(17, 1, 1, 17, 17, torch.bfloat16, "all_to_last"), False)
def test_agrees_with_the_reference(device, case, persistent):
    with use_small_tiles():
        check(functools.partial(triton_only, persistent=persistent), make_inputs(case, device), str(case))


@budget(40)
@given(cases(max_tokens=60))
def test_torch_backend_agrees_with_the_reference(case):
    check(functools.partial(moe_kernels.fused_experts, backend="torch"), make_inputs(case), str(case))


def replaced(inputs, **changes):
    return type(inputs)(**{**inputs.__dict__, **changes})


@budget(4)
@given(cases(), st.randoms(use_true_random=False))
def test_permuted_tokens_permute_the_output(device, case, random):
    inputs = make_inputs(case, device)
    order = list(range(case.tokens))
    random.shuffle(order)
    shuffled = replaced(inputs, **{n: getattr(inputs, n)[order] for n in ("x", "topk_ids", "topk_weights", "grad")})
    with use_small_tiles():
        plain, moved = run(triton_only, inputs), run(triton_only, shuffled)
    for name in ("out", "dx", "dtopk_weights"):
        assert torch.equal(plain[name][order], moved[name]), name


@budget(4)
@given(cases(), st.randoms(use_true_random=False))
def test_renamed_experts_change_nothing(device, case, random):
    inputs = make_inputs(case, device)
    new_name = list(range(case.experts))
    random.shuffle(new_name)
    lookup = torch.tensor(new_name, device=device)
    inside = (inputs.topk_ids >= 0) & (inputs.topk_ids < case.experts)
    ids = torch.where(inside, lookup[inputs.topk_ids.clamp(0, case.experts - 1)], inputs.topk_ids)
    old = lookup.argsort()
    renamed = replaced(inputs, topk_ids=ids, gate_up=inputs.gate_up[old], down=inputs.down[old])
    with use_small_tiles():
        plain, other = run(triton_only, inputs), run(triton_only, renamed)
    for name in ("out", "dx", "dtopk_weights"):
        assert torch.equal(plain[name], other[name]), name
    for name in ("dgate_up", "ddown"):
        assert torch.equal(plain[name][old], other[name]), name


@budget(4)
@given(cases())
def test_a_tokens_row_does_not_depend_on_the_others(device, case):
    assume(case.tokens > 1)
    inputs = make_inputs(case, device)
    alone = replaced(inputs, **{n: getattr(inputs, n)[:1] for n in ("x", "topk_ids", "topk_weights", "grad")})
    with use_small_tiles():
        together, single = run(triton_only, inputs), run(triton_only, alone)
    for name in ("out", "dx", "dtopk_weights"):
        assert torch.equal(together[name][:1], single[name]), name
