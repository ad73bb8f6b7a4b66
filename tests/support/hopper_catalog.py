"""Every Hopper kernel in every schedule, as arguments for ahead-of-time compilation without a GPU.

The arguments are those of real calls: the host functions run on small tensors with a ``launch`` that only records.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from moe_kernels.activation import Activation, Gate
from moe_kernels.fp8 import Fp8Rows, Fp8Weight
from moe_kernels.fp8 import transposed as fp8_transposed
from moe_kernels.kernels.hopper import dequantizing, down_grad, fp8, gemm, mainloop, wgrad
from moe_kernels.kernels.hopper.ring import PING_PONG, use_schedule, use_within_experts
from moe_kernels.kernels.operands import Descriptor
from moe_kernels.kernels.triton import fp8 as steps
from moe_kernels.kernels.triton.round import empty_fp8
from moe_kernels.layer import Weight
from moe_kernels.packed import BlockFp8
from moe_kernels.routing import RoutingPlan, TokenRows
from support.cases import EVERY_ACTIVATION, CompileCase

_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int32: "i32",
}
_TOKENS, _TOP_K, _EXPERTS, _HIDDEN, _INTERMEDIATE = 16, 2, 4, 128, 64


def _type(argument: Any) -> str:
    if isinstance(argument, Descriptor):
        block = ", ".join(map(str, argument.block))
        return f"tensordesc<{_TYPES[argument.tensor.dtype]}[{block}],{argument.layout!r}>"
    return f"*{_TYPES[argument.dtype]}" if isinstance(argument, torch.Tensor) else "i32"


def _recorded(name: str, module: Any, call: Callable[[], object]) -> CompileCase:
    """The first launch that ``call`` makes in ``module``."""
    with mock.patch.object(module, "launch") as launch:
        call()
    kernel, _, arguments, keywords = launch.call_args_list[0].args
    types = dict(zip(kernel.arg_names, map(_type, arguments), strict=False))
    constants = {key: value for key, value in keywords.items() if key != "num_warps"}
    options = {"num_warps": keywords["num_warps"], "num_stages": 3}
    # Epilogues may spill, once per tile: down_grad's, and those of activations with many intermediates (two tanh and
    # a sigmoid in softcapped_silu). The mainloop is the same for all, and silu's kernels do not spill.
    activation = constants.get("ACTIVATION", "identity")
    spills = {"identity": 0, "silu": 50 if module is down_grad else 0, "softcapped_silu": 600}.get(activation, 250)
    return CompileCase(name, kernel, types, constants, options, uses_tma=True, spills=spills)


def compile_cases() -> Iterator[CompileCase]:
    """All kernels for sm_90: both 16-bit types, every activation, every schedule in use."""
    return (case for case in _every_case() if not _covered(case.name.removeprefix("hopper-")))


def _covered(name: str) -> bool:
    """Whether others have the code of a case: both types differ in the name of one instruction, rank 64 is one k
    block as 16 is, and what writes no Z or wA, or gathers, has the loop and the epilogue of what does not."""
    if "fp16" in name:
        return not name.startswith(("up-silu", "dgrad", "down_grad-silu", "wgrad-dW1"))
    if "no-gate" in name and "silu" in name:
        return True
    if "lora64" in name:
        return "transposed" not in name
    others = name.startswith(("up-no-grad", "up-copied", "down_grad-gather", "down_grad-no-wa"))
    plain = (
        "-silu-bf16",
        "-wide",
        "-silu-bf16-lora16",
        "-relu2-bf16-lora16-no-gate",
        "-silu-bf16-ping-pong-large-weights",
    )
    return others and not name.endswith(plain)


def _every_case() -> Iterator[CompileCase]:
    for dtype in (torch.bfloat16, torch.float16):
        yield from _cases(dtype, Activation("silu"))
    for rank in (16, 64, 128):
        yield from _cases(torch.bfloat16, Activation("silu"), rank)
    for rank in (0, 16):
        yield from (
            case
            for case in _cases(torch.bfloat16, Activation("silu"), rank, bias=True)
            if case.constants.get("HAS_BIAS", False)
        )
    for name, bias, rank in itertools.product(("silu", "relu2"), (False, True), (0, 16)):
        yield from (
            case
            for case in _cases(torch.bfloat16, Activation(name), rank, gated=False, bias=bias)
            if case.constants.get("ACTIVATION", "identity") != "identity"
        )
    silu, gpt_oss = Activation("silu"), Activation("clamped_glu", (1.702, 7.0))
    for activation, rank, transposed in ((silu, 0, False), (silu, 64, True), (gpt_oss, 0, True), (gpt_oss, 16, True)):
        yield from (
            case
            for case in _cases(torch.bfloat16, activation, rank, True, True, True, transposed)
            if "wgrad" not in case.name
        )
    yield from (
        case
        for case in _cases(torch.bfloat16, Activation("relu2"), 16, False, False, False, True)
        if case.constants.get("ACTIVATION", "identity") != "identity"
    )
    with contextlib.ExitStack() as both:
        for kernel in ("down", "dgrad"):
            both.enter_context(use_schedule(kernel, PING_PONG))
        both.enter_context(mainloop.use_k_blocks_per_wait(2))
        both.enter_context(use_within_experts(False))
        cases = [case for rank in (0, 16, 64, 128) for case in _cases(torch.bfloat16, Activation("silu"), rank)]
        cases += [
            case
            for case in _cases(torch.bfloat16, Activation("silu"), bias=True)
            if case.name.startswith("hopper-down-")
        ]
    yield from (dataclasses.replace(case, name=f"{case.name}-ping-pong-large-weights") for case in cases)
    for rank in (0, 16):
        for case in _cases(torch.bfloat16, Activation("silu"), rank, intermediate=256):
            if case.name.startswith("hopper-down_grad-gather"):
                yield dataclasses.replace(case, name=f"{case.name}-wide")
    for activation in EVERY_ACTIVATION:
        if activation.name != "silu":
            yield from (
                case
                for case in _cases(torch.bfloat16, activation)
                # Those that write no Z, or gather dO, have the same epilogue.
                if case.constants.get("ACTIVATION") == activation.name
                and not case.name.startswith(("hopper-up-no-grad", "hopper-down_grad-gather"))
            )


def _cases(
    dtype: torch.dtype,
    activation: Activation,
    rank: int = 0,
    gated: bool = True,
    bias: bool = False,
    interleaved: bool = False,
    transposed: bool = False,
    intermediate: int = _INTERMEDIATE,
) -> Iterator[CompileCase]:
    gate, rows = Gate(activation, gated, interleaved), _TOKENS * _TOP_K
    x = torch.zeros(_TOKENS, _HIDDEN, dtype=dtype)
    low, width = (torch.zeros(rows, rank, dtype=dtype) if rank else None), (1 + gated) * intermediate

    def weight(rows: int, columns: int, *factor: int) -> Weight:
        outer = torch.zeros(_EXPERTS, *factor, dtype=dtype) if rank else None
        added = torch.zeros(_EXPERTS, rows, dtype=dtype) if bias else None
        matrix = torch.zeros(_EXPERTS, rows, columns, dtype=dtype)
        return Weight(matrix.mT.contiguous().mT if transposed else matrix, added, low, outer)

    w1, w2 = weight(width, _HIDDEN, width, rank), weight(_HIDDEN, intermediate, _HIDDEN, rank)
    w1_grad, w2_grad = weight(width, _HIDDEN, rank, _HIDDEN), weight(_HIDDEN, intermediate, rank, intermediate)
    z, a = torch.zeros(rows, width, dtype=dtype), torch.zeros(rows, intermediate, dtype=dtype)
    weights, dout_rows = torch.zeros(_TOKENS, _TOP_K), torch.zeros(rows, _HIDDEN, dtype=dtype)
    plan = RoutingPlan.empty(torch.empty(_TOKENS, _TOP_K, dtype=torch.int32), _EXPERTS, 128)
    t = _TYPES[dtype]
    kinds = [f"-lora{rank}" if rank else "", "-bias" if bias else "", "" if gated else "-no-gate"]
    kinds += ["-interleaved" if interleaved else "", "-transposed" if transposed else ""]
    suffix = f"{activation.name}-{t}{''.join(kinds)}"
    gathered = TokenRows(x, _TOP_K)
    yield _recorded(f"hopper-up-{suffix}", gemm, lambda: gemm.up(gathered, w1, plan, gate, True))
    yield _recorded(f"hopper-up-no-grad-{suffix}", gemm, lambda: gemm.up(gathered, w1, plan, gate, False))
    yield _recorded(f"hopper-up-copied-{suffix}", gemm, lambda: gemm.up(dout_rows, w1, plan, gate, True))
    yield _recorded(f"hopper-down-{suffix}", gemm, lambda: gemm.down(a, w2, plan))
    yield _recorded(f"hopper-dgrad-{suffix}", gemm, lambda: gemm.dgrad(z, w1_grad._replace(bias=None), plan))
    if not rank:
        yield _recorded(f"hopper-wgrad-dW1-{suffix}", wgrad, lambda: wgrad.wgrad(z, a, plan))
        yield _recorded(f"hopper-wgrad-dW1-gather-{suffix}", wgrad, lambda: wgrad.wgrad(z, gathered, plan))
    how: dict[str, torch.Tensor | TokenRows] = {"": dout_rows, "-gather": gathered}
    for name, dout in how.items():
        backward = functools.partial(down_grad.down_grad, dout, w2_grad, z, weights, plan, gate, True)
        if not rank:
            yield _recorded(f"hopper-wgrad-dW2{name}-{suffix}", wgrad, functools.partial(wgrad.wgrad, dout, a, plan))
        yield _recorded(f"hopper-down_grad{name}-{suffix}", down_grad, backward)
        if activation.name == "silu" and not rank:  # frozen, without an adapter
            frozen = functools.partial(backward, needs_wa=False)
            yield _recorded(f"hopper-down_grad{name}-no-wa-{suffix}", down_grad, frozen)


def fp8_cases() -> Iterator[CompileCase]:
    """GEMMs of block-fp8 weights, in fp8 and dequantised in the load; their epilogues are those of the others."""
    silu, relu2 = Gate(Activation("silu")), Gate(Activation("relu2"), False)
    rows = _TOKENS * _TOP_K
    x, z = torch.zeros(_TOKENS, _HIDDEN, dtype=torch.bfloat16), torch.zeros(rows, 2 * _INTERMEDIATE).bfloat16()
    plan = RoutingPlan.empty(torch.empty(_TOKENS, _TOP_K, dtype=torch.int32), _EXPERTS, 128)

    def weight(height: int, width: int, stacked: int, rank: int = 0, *factor: int) -> Weight:
        codes = torch.zeros(_EXPERTS, height, width).to(torch.float8_e4m3fn)
        scales = torch.ones(_EXPERTS, stacked * -(-height // stacked // 128), -(-width // 128))
        blocks = BlockFp8((_EXPERTS, height, width), torch.bfloat16, codes, scales, stacked)
        packed = Fp8Weight.of(blocks, fp8_transposed(codes))
        if not rank:
            return Weight(packed)
        low, outer = torch.zeros(rows, rank), torch.zeros(_EXPERTS, *factor)
        return Weight(packed, None, low.bfloat16(), outer.bfloat16())

    i, h = _INTERMEDIATE, _HIDDEN
    calls = {
        "down-silu-bf16": lambda: steps.down(fp8.gemm, z[:, :i].contiguous(), weight(h, i, 1), plan),
        "up-silu-bf16-lora16": lambda: steps.up(fp8.gemm, x, weight(2 * i, h, 2, 16, 2 * i, 16), plan, silu, True),
        "up-relu2-bf16-lora16-no-gate": lambda: steps.up(fp8.gemm, x, weight(i, h, 1, 16, i, 16), plan, relu2, True),
        "dgrad-silu-bf16-lora128": lambda: steps.dgrad(fp8.gemm, z, weight(2 * i, h, 2, 128, 128, h), plan),
    }

    def in_order(rows: Any, pieces: int, plan: RoutingPlan) -> Fp8Rows:
        width = (rows if isinstance(rows, torch.Tensor) else rows.tokens).shape[1]
        return empty_fp8(plan.rows, width // pieces, pieces, plan.row_slot.device)

    def blocks(*sizes: int) -> Weight:
        made = weight(*sizes)
        of = made.matrix
        assert isinstance(of, Fp8Weight)
        return made._replace(matrix=BlockFp8(of.sizes, torch.bfloat16, of.data, of.scales, of.stacked))

    dequantized = {
        "up-silu-bf16-lora16": lambda: gemm.up(
            TokenRows(x, _TOP_K), blocks(2 * i, h, 2, 16, 2 * i, 16), plan, silu, True
        ),
        "up-relu2-bf16-no-gate": lambda: gemm.up(TokenRows(x, _TOP_K), blocks(i, h, 1), plan, relu2, True),
        "dgrad-silu-bf16-lora128": lambda: gemm.dgrad(z.repeat(1, 2), blocks(4 * i, h, 2, 128, 128, h), plan),
    }
    dout = torch.zeros(rows, h).bfloat16()
    routed = (z, torch.ones(_TOKENS, _TOP_K), plan, silu, True)
    of_down = {
        "silu-bf16": lambda: down_grad.down_grad(dout, blocks(h, i, 1), *routed),
        "silu-bf16-lora16": lambda: down_grad.down_grad(dout, blocks(h, i, 1, 16, 16, i), *routed),
    }
    with dequantizing.use_dequantizing(True):
        for name, call in dequantized.items():
            yield _recorded(f"hopper-dequantizing-{name}", gemm, call)
        for name, call in of_down.items():
            yield _recorded(f"hopper-dequantizing-down_grad-{name}", down_grad, call)
    with mock.patch.object(fp8, "in_order", in_order):
        for name, call in calls.items():
            yield dataclasses.replace(_recorded(f"hopper-fp8-{name}", fp8, call), fp8=True, spills=100)
