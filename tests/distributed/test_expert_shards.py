"""One expert layer cut over ranks, in one process: what every engine of expert parallelism asks of the op.

A rank holds some of the experts and sees every token; ids of experts elsewhere arrive as sentinels (transformers
says E local, DeepEP -1). The ranks' outputs and gradients must add up to the whole layer's.
"""

from __future__ import annotations

import functools
import inspect
import sys
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import moe_kernels
from moe_kernels import backends
from moe_kernels.kernels.launch import launch
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


class Operators(TorchDispatchMode):
    """Names of the operators that the host asks torch for; none of them runs a kernel of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class Launch(NamedTuple):
    """One launch, and what Triton compiles a kernel anew for: compile-time arguments, and of numbers whether they are
    1 or a multiple of 16 where the kernel does not say otherwise."""

    name: str
    compiled_for: tuple[Any, ...]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """What is launched, of which nothing runs."""
    found: list[Launch] = []
    original = launch.launch
    backends.load("triton")  # the modules that launch are imported

    def remember(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        numbers = [
            (name, arg == 1, arg % 16 == 0)
            for name, arg in zip(inspect.signature(kernel.fn).parameters, args, strict=False)
            if type(arg) is int and name not in (kernel.kwargs.get("do_not_specialize") or ())
        ]
        found.append(Launch(kernel.fn.__name__, (*numbers, *keywords.items())))

    for name, module in list(sys.modules.items()):
        if name.startswith("moe_kernels.") and getattr(module, "launch", None) is original:
            monkeypatch.setattr(module, "launch", remember)
    return found


#: What allocates and what looks at the same memory otherwise. None reads data, so none waits for a GPU or copies.
DATA_FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "view", "split_with_sizes",
             "slice", "transpose", "permute", "as_strided", "alias", "detach", "expand", "unsqueeze"}  # fmt: skip


def received(rows: int, ids_dtype: torch.dtype, weights_dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Rows, ids and weights as an all-to-all leaves them; ids -1 and 4 are elsewhere."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 64, generator=g).bfloat16().requires_grad_()
    ids = torch.randint(-1, 5, (rows, 2), generator=g).to(ids_dtype)
    return x, ids, torch.rand(rows, 2, generator=g).to(weights_dtype).requires_grad_()


def experts(lora: bool) -> dict[str, Any]:
    """The rank's weights."""
    g = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    made: dict[str, Any] = {}
    for name, cols in (("gate_up", 64), ("down", 32)):
        made[name] = normal(4, 64, cols).bfloat16().requires_grad_(not lora)
        if lora:
            made[f"{name}_lora"] = normal(4, 64, 8).requires_grad_(), normal(4, 8, cols).requires_grad_()
    return made


@pytest.mark.plain_memory
@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16])  # Axolotl's, and transformers' of 1
@pytest.mark.parametrize("lora", [False, True], ids=["", "lora"])
def test_a_rank_neither_waits_nor_copies(
    lora: bool, weights_dtype: torch.dtype, ids_dtype: torch.dtype, launched: list[Launch]
) -> None:
    """Rows, ids with sentinels and weights go to the kernels as they arrived: no operator between the receive buffer
    and the kernels moves or reads data, in either pass."""
    x, ids, weights = received(50, ids_dtype, weights_dtype)
    weights_of_rank, dout = experts(lora), torch.ones_like(x)
    with Operators() as asked:
        out = moe_kernels.fused_experts(x, ids, weights, **weights_of_rank, backend="triton")
        forward = len(launched)
        torch.autograd.backward(out, dout)
    assert 0 < forward < len(launched)
    assert set(asked.names) <= DATA_FREE


@pytest.mark.parametrize("lora", [False, True], ids=["", "lora"])
def test_a_number_of_rows_that_was_never_seen_compiles_nothing(lora: bool, launched: list[Launch]) -> None:
    """Each step brings another."""
    kinds = []
    for rows in (50, 96, 1, 16, 1037):
        launched.clear()
        x, ids, weights = received(rows, torch.int64, torch.float32)
        out = moe_kernels.fused_experts(x, ids, weights, **experts(lora), backend="triton")
        out.sum().backward()
        kinds.append(set(launched))
    assert [kind ^ kinds[0] for kind in kinds] == [set()] * len(kinds)


def test_ranks_that_get_nothing_launch_no_gemm(launched: list[Launch]) -> None:
    """No rows at all: a plan (its readers find no tile) and zeros for the weights, which FSDP is to reduce."""
    x, ids, weights = received(0, torch.int64, torch.float32)
    moe_kernels.fused_experts(x, ids, weights, **experts(False), backend="triton").sum().backward()
    assert sorted(each.name for each in launched) == ["count_kernel", "place_kernel", "wgrad_kernel", "wgrad_kernel"]
