"""NaN and infinity in an input come out where the reference has them and nowhere else, bit for bit."""

import dataclasses
import functools

import pytest
import torch

import moe_kernels
from moe_kernels.activation import Activation
from moe_kernels.tools.check.problems import Case, make_inputs, run, truth
from support.tiles import use_small_tiles

BF16 = torch.bfloat16
#: Sizes that are multiples of 16 load by TMA where the GPU has it; the odd ones by pointers.
CASES = {
    "plain": Case(33, 2, 5, 48, 32, BF16, "sentinels"),
    "odd": Case(33, 2, 5, 37, 21, BF16, "zipf"),
    "gpt-oss": Case(33, 2, 5, 48, 32, BF16, "sentinels", bias=True, transposed=True, interleaved=True,
                    activation=Activation("clamped_glu", (1.702, 0.7))),
    "gateless": Case(33, 2, 5, 48, 32, BF16, "zipf", bias=True, gated=False, activation="relu2"),
    "lora": Case(33, 2, 5, 48, 32, BF16, "sentinels", lora_rank=4),
}  # fmt: skip
#: Where the derivative of a clamp or a ReLU is zero, torch passes zero on, also of a NaN; here NaN times zero is NaN.
ZERO_DERIVATIVES = ("gpt-oss", "gateless")
TOKEN, EXPERT = 5, 2
NAN, INF = float("nan"), float("inf")
PER_TOKEN = ("x", "topk_weights", "grad")


@functools.cache
def clean(name, backend, device):
    return results(make_inputs(CASES[name], device), backend)


def results(inputs, backend):
    return run(functools.partial(moe_kernels.fused_experts, backend=backend), inputs)


def spoil(inputs, where, bad):
    """A copy with one element of token TOKEN, or of expert EXPERT's weights, replaced by ``bad``."""
    tensor = inputs.extras[where] if where in inputs.extras else getattr(inputs, where)
    tensor = tensor.clone()  # keeps the memory order
    place = (TOKEN, 0) if where in PER_TOKEN else (EXPERT, *(1 for _ in tensor.shape[1:]))
    assert inputs.topk_ids[TOKEN, 0] in range(inputs.down.shape[0])
    tensor[place] = bad
    if where in inputs.extras:
        return dataclasses.replace(inputs, extras=inputs.extras | {where: tensor})
    return dataclasses.replace(inputs, **{where: tensor})


def untouched(inputs, where):
    """(tokens, experts) as masks that the spoilt element cannot reach."""
    ids, experts = inputs.topk_ids, inputs.down.shape[0]
    tokens = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    others = torch.ones(experts, dtype=torch.bool, device=ids.device)
    if where in PER_TOKEN:
        tokens[TOKEN] = False
        mine = ids[TOKEN]
        others[mine[(mine >= 0) & (mine < experts)]] = False
    else:
        tokens &= ~(ids == EXPERT).any(-1)
        others[EXPERT] = False
    return tokens, others


@pytest.mark.parametrize(
    ("name", "where", "bad"),
    [("plain", where, NAN) for where in (*PER_TOKEN, "gate_up", "down")]
    + [("plain", where, bad) for where, bad in (("x", INF), ("topk_weights", -INF), ("gate_up", INF), ("grad", -INF))]
    + [(name, where, NAN) for name in CASES if name != "plain" for where in ("x", "grad", "gate_up")]
    + [("gpt-oss", "gate_up_bias", NAN), ("gpt-oss", "down_bias", INF)]
    + [("lora", "gate_up_lora_b", NAN), ("lora", "down_lora_a", INF)],
)
def test_where_the_reference_has_them_and_nowhere_else(backend, device, name, where, bad):
    with use_small_tiles():  # many tiles, and experts that share the columns of one
        inputs = make_inputs(CASES[name], device)
        spoilt = spoil(inputs, where, bad)
        before, after = clean(name, backend, device), results(spoilt, backend)
    expected = truth(spoilt)
    tokens, experts = untouched(inputs, where)
    assert tokens.sum() > 9
    assert experts.sum() > 0
    for key, value in after.items():
        rows = tokens if key in ("out", "dx", "dtopk_weights") else experts
        assert torch.equal(value[rows], before[key][rows]), f"{key}: the spoilt element cannot reach these rows"
        ours, theirs = ~torch.isfinite(value), ~torch.isfinite(expected[key])
        assert torch.equal(ours if name not in ZERO_DERIVATIVES else ours & theirs, theirs), key
    assert not all(torch.isfinite(value).all() for value in after.values()), "the spoilt element reached nothing"


def test_shipped_tiles_keep_them_apart(backend, device):
    """Tiles of 128 rows: the last rows of one expert and the first of the next lie in one load."""
    if backend == "torch" and device.type == "cpu" and torch.__version__ < "2.12":
        pytest.skip("torch 2.11's matmul in bfloat16, on a CPU with AMX, lets a NaN of one row into the row before")
    inputs = make_inputs(dataclasses.replace(CASES["plain"], tokens=150, routing="zipf"), device)
    spoilt = spoil(inputs, "x", NAN)
    before, after = results(inputs, backend), results(spoilt, backend)
    tokens, experts = untouched(inputs, "x")
    for key, value in after.items():
        rows = tokens if key in ("out", "dx", "dtopk_weights") else experts
        assert torch.equal(value[rows], before[key][rows]), key
    assert not torch.isfinite(after["out"][TOKEN]).any()
