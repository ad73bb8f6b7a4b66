"""Every kernel in every shipped configuration, as arguments for ahead-of-time compilation without a GPU."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from moe_kernels.activation import ACTIVATIONS
from moe_kernels.kernels.triton.combine import combine_kernel, gather_kernel
from moe_kernels.kernels.triton.dact import dact_kernel
from moe_kernels.kernels.triton.grouped_gemm import grouped_gemm_kernel
from moe_kernels.kernels.triton.plan import count_kernel, place_kernel, plan_blocks
from moe_kernels.kernels.triton.up import up_kernel
from moe_kernels.kernels.triton.wgrad import wgrad_kernel
from moe_kernels.tuning.config import GemmConfig, table

_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_PLAN = (
    "row_slot_ptr",
    "slot_row_ptr",
    "expert_start_ptr",
    "tile_expert_ptr",
    "tile_row_ptr",
    "tile_count_ptr",
)


@dataclass(frozen=True)
class CompileCase:
    """One kernel to compile.

    Attributes:
        name: unique and readable, such as "up-g128-bf16-tma".
        fn: the ``triton.jit`` function.
        types: Triton type of every run-time argument.
        constants: value of every compile-time argument.
        options: num_warps and num_stages.
        uses_dot: the kernel must contain matrix instructions.
        uses_tma: the kernel must contain tensor-memory loads.
        divisible: integer arguments are multiples of 16, which the launcher tells the compiler.
    """

    name: str
    fn: Any
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int]
    uses_dot: bool = True
    uses_tma: bool = False
    divisible: bool = True


def _gemm_case(
    name: str, fn: Any, types: dict[str, str], constants: dict[str, Any], config: GemmConfig, uses_tma: bool
) -> CompileCase:
    ints = {arg: "*i32" for arg in fn.arg_names if arg in _PLAN}
    sizes = {arg: "i32" for arg in fn.arg_names if arg in ("H", "I", "R", "K", "N", "M", "E")}
    tiles = {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
    }
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return CompileCase(name, fn, types | ints | sizes, constants | tiles, options, uses_tma=uses_tma)


def gemm_case(
    kernel: str,
    config: GemmConfig,
    dtype: torch.dtype,
    tma: bool,
    name: str | None = None,
    aligned: bool = True,
    divisible: bool = True,
    activation: str = "silu",
) -> CompileCase:
    """One of ``tuning.config.KERNELS`` with ``config``.

    ``aligned``: sizes are multiples of the tile; ``divisible``: they are multiples of 16 at least.
    """
    t = _TYPES[dtype]
    pointer = f"*{t}"
    m, n, k = config.block_m, config.block_n, config.block_k

    def weight(*block: int) -> str:
        return f"tensordesc<{t}[1, {block[0]}, {block[1]}]>" if tma else pointer

    def rows(*block: int) -> str:
        return f"tensordesc<{t}[{block[0]}, {block[1]}]>" if tma else pointer

    common = {"PRECISION": "ieee", "USE_TMA": tma}
    if kernel == "up":
        types = {"x_ptr": pointer, "w": weight(n, k), "z_ptr": pointer, "a_ptr": pointer}
        constants = common | {"TOP_K": 8, "ACTIVATION": activation, "EVEN_K": aligned, "SAVE_Z": True}
        case = _gemm_case("", up_kernel, types, constants, config, tma)
    elif kernel in ("down", "dgrad"):
        kn = kernel == "dgrad"
        types = {"rows_in": rows(m, k), "w": weight(k, n) if kn else weight(n, k), "out_ptr": pointer}
        constants = common | {"W_IS_KN": kn, "EVEN_K": aligned, "FLATTEN": config.flatten}
        case = _gemm_case("", grouped_gemm_kernel, types, constants, config, tma)
    else:
        types = {"left": rows(k, m), "right": rows(k, n)}
        types |= {"left_ptr": pointer, "right_ptr": pointer, "out_ptr": pointer}
        constants = common | {"EVEN_M": aligned, "EVEN_N": aligned}
        case = _gemm_case("", wgrad_kernel, types, constants, config, tma)
    label = name or f"{kernel}-m{m}n{n}k{k}w{config.num_warps}s{config.num_stages}"
    sizes = "" if aligned else "-ragged" if divisible else "-odd"
    suffix = f"{t}-{'tma' if tma else 'pointer'}{sizes}"
    return dataclasses.replace(case, name=f"{label}-{suffix}", divisible=divisible)


def compile_cases(capability: tuple[int, int]) -> Iterator[CompileCase]:
    """All shipped configurations for a GPU of ``capability``."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        # 16-bit tensors load by TMA where the GPU has it and their sizes are multiples of 16.
        sizes = [(False, (True, True)), (False, (False, True)), (False, (False, False))]
        if capability >= (9, 0) and dtype != torch.float32:
            sizes = [(True, (True, True)), (True, (False, True)), (False, (False, False))]
        for tma, (aligned, divisible) in sizes:
            for (kernel, group), config in table(capability, dtype, tma).items():
                label = kernel if group is None else f"{kernel}-g{group}"
                yield gemm_case(kernel, config, dtype, tma, label, aligned, divisible)
    tma = capability >= (9, 0)
    for activation in ACTIVATIONS:
        if activation != "silu":
            for (kernel, group), config in table(capability, torch.bfloat16, tma).items():
                if kernel == "up":
                    label = f"up-g{group}-{activation}"
                    yield gemm_case(kernel, config, torch.bfloat16, tma, label, activation=activation)
    yield from _small_cases()


def _small_cases() -> Iterator[CompileCase]:
    for experts in (8, 128, 256):
        constants, num_warps = plan_blocks(experts)
        options = {"num_warps": num_warps, "num_stages": 3}
        ints = {"R": "i32", "blocks_per_chunk": "i32"}
        yield CompileCase(
            f"count-e{experts}",
            count_kernel,
            {"ids_ptr": "*i64", "counts_ptr": "*i32"} | ints,
            constants,
            options,
            uses_dot=False,
        )
        yield CompileCase(
            f"place-e{experts}",
            place_kernel,
            {"ids_ptr": "*i64", "counts_ptr": "*i32"}
            | dict.fromkeys(_PLAN, "*i32")
            | ints
            | {"num_chunks": "i32", "max_tiles": "i32"},
            constants | {"GROUP_SIZE": 128, "BLOCK_C": 4096 // constants["BLOCK_E"], "BLOCK_T": 16},
            options,
            uses_dot=False,
        )
    for weighted in (False, True):
        yield CompileCase(
            f"combine-{'weighted' if weighted else 'sum'}",
            combine_kernel,
            {
                "rows_ptr": "*bf16",
                "weights_ptr": "*fp32",
                "slot_row_ptr": "*i32",
                "routed_ptr": "*i32",
                "out_ptr": "*bf16",
                "H": "i32",
            },
            {"TOP_K": 8, "WEIGHTED": weighted, "BLOCK_H": 1024},
            {"num_warps": 4, "num_stages": 3},
            uses_dot=False,
        )
    small = {"num_warps": 4, "num_stages": 3}
    yield CompileCase(
        "gather",
        gather_kernel,
        {"x_ptr": "*bf16", "row_slot_ptr": "*i32", "out_ptr": "*bf16", "H": "i32"},
        {"TOP_K": 8, "BLOCK_H": 1024},
        small,
        uses_dot=False,
    )
    pointers = {
        "da_ptr": "*bf16",
        "z_ptr": "*bf16",
        "topk_weights_ptr": "*fp32",
        "dz_ptr": "*bf16",
        "dw_ptr": "*fp32",
    }
    for activation, (block_r, block_i) in itertools.product(ACTIVATIONS, ((1, 1024), (4, 256))):
        yield CompileCase(
            f"dact-i{block_i}-{activation}",
            dact_kernel,
            pointers | {"row_slot_ptr": "*i32", "routed_ptr": "*i32", "R": "i32", "I": "i32"},
            {"ACTIVATION": activation, "BLOCK_R": block_r, "BLOCK_I": block_i},
            small,
            uses_dot=False,
        )
