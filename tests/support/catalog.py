"""Every kernel in every shipped configuration, as arguments for ahead-of-time compilation without a GPU."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl

from moe_kernels.activation import Activation, Gate
from moe_kernels.kernels.device import loads_by_tma
from moe_kernels.kernels.tiles.fit import fit_columns, fit_rank
from moe_kernels.kernels.tiles.table import ROW_TILED, GemmConfig, table
from moe_kernels.kernels.triton.combine import combine_kernel, gather_kernel
from moe_kernels.kernels.triton.dact import dact_kernel
from moe_kernels.kernels.triton.dequantize import block_fp8_kernel, four_bit_kernel, mxfp4_kernel
from moe_kernels.kernels.triton.factors import BLOCKS, experts_last_kernel, pack_kernel
from moe_kernels.kernels.triton.fp8 import fp8_gemm_kernel
from moe_kernels.kernels.triton.fp8 import tile as fp8_tile
from moe_kernels.kernels.triton.grouped_gemm import grouped_gemm_kernel
from moe_kernels.kernels.triton.plan import count_kernel, part_kernel, place_kernel, plan_blocks
from moe_kernels.kernels.triton.round import quantize_kernel
from moe_kernels.kernels.triton.router import route_blocks, route_grad_blocks, route_grad_kernel, route_kernel
from moe_kernels.kernels.triton.row_pass import MAX_RANK, pass_tile, row_pass_kernel, sum_blocks_kernel
from moe_kernels.kernels.triton.up import up_kernel
from moe_kernels.kernels.triton.wgrad import wgrad_kernel
from support import hopper_catalog
from support.cases import EVERY_ACTIVATION, CompileCase

_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_PLAN = (
    "row_slot_ptr",
    "slot_row_ptr",
    "expert_start_ptr",
    "expert_order_ptr",
    "tile_expert_ptr",
    "tile_row_ptr",
    "tile_count_ptr",
)


_SILU = Activation("silu")


def _gemm_case(
    name: str, fn: Any, types: dict[str, str], constants: dict[str, Any], config: GemmConfig, uses_tma: bool
) -> CompileCase:
    ints = {arg: "*i32" for arg in fn.arg_names if arg in _PLAN}
    sizes = {arg: "i32" for arg in fn.arg_names if arg in ("H", "I", "R", "K", "N", "M", "E", "W_STRIDE")}
    tiles = {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
    }
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return CompileCase(name, fn, types | ints | sizes, constants | tiles, options, uses_tma=uses_tma)


@dataclass(frozen=True)
class Variant:
    """A kind of experts. Plain: SwiGLU, gate and up rows apart, row-major weights, no bias, no low rank."""

    name: str = ""
    activation: Activation = _SILU
    gated: bool = True
    interleaved: bool = False
    transposed: bool = False
    bias: bool = False
    rank: int = 0

    @property
    def gate(self) -> Gate:
        return Gate(self.activation, self.gated, self.interleaved)


PLAIN_EXPERTS = Variant()
_CLAMPED = Activation("clamped_glu", (1.702, 7.0))
VARIANTS = (
    Variant("stored-by-columns", transposed=True),
    Variant("gateless", Activation("relu2"), gated=False),
    Variant("gpt-oss", _CLAMPED, interleaved=True, transposed=True, bias=True),
    Variant("privacy-filter", _CLAMPED, transposed=True, bias=True),
    Variant("lora", rank=16),
    Variant("lora64", rank=64),
    Variant("lora128", rank=128),
    Variant("gpt-oss-lora", _CLAMPED, interleaved=True, transposed=True, bias=True, rank=16),
)


def gemm_case(
    kernel: str,
    config: GemmConfig,
    dtype: torch.dtype,
    tma: bool,
    name: str | None = None,
    aligned: bool = True,
    divisible: bool = True,
    variant: Variant = PLAIN_EXPERTS,
) -> CompileCase:
    """One of ``tiles.table.KERNELS`` with ``config``.

    ``aligned``: sizes are multiples of the tile; ``divisible``: they are multiples of 16 at least.
    """
    t = _TYPES[dtype]
    pointer = f"*{t}"
    config = fit_rank(config, variant.rank, torch.device("cpu"), dtype.itemsize)
    m, n, k = config.block_m, config.block_n, config.block_k

    def weight(columns: int, by_columns: bool) -> str:
        block = (k, columns) if by_columns else (columns, k)
        return f"tensordesc<{t}[1, {block[0]}, {block[1]}]>" if tma else pointer

    def rows(*block: int) -> str:
        return f"tensordesc<{t}[{block[0]}, {block[1]}]>" if tma else pointer

    common = {"PRECISION": "ieee", "USE_TMA": tma}
    low = {"bias_ptr": pointer, "low_ptr": pointer}
    if kernel == "up":
        columns = 2 * n if variant.interleaved else n
        types = {"x_ptr": pointer, "w": weight(columns, variant.transposed), "factor_ptr": pointer}
        types |= low | {"z_ptr": pointer, "a_ptr": pointer}
        constants = common | variant.gate.constants() | {"TOP_K": 8, "EVEN_K": aligned, "SAVE_Z": True}
        constants |= {"W_IS_KN": variant.transposed, "HAS_BIAS": variant.bias, "RANK": variant.rank}
        case = _gemm_case("", up_kernel, types, constants, config, tma)
    elif kernel in ("down", "dgrad"):
        kn = (kernel == "dgrad") != variant.transposed
        types = {"rows_in": rows(m, k), "w": weight(n, kn), "factor_ptr": pointer, "out_ptr": pointer} | low
        constants = common | {"W_IS_KN": kn, "EVEN_K": aligned, "FLATTEN": config.flatten, "RANK": variant.rank}
        constants |= {"HAS_BIAS": variant.bias and kernel == "down", "LOW_IS_KN": kernel == "dgrad"}
        case = _gemm_case("", grouped_gemm_kernel, types, constants, config, tma)
    else:
        types = {"left": rows(k, m), "right": rows(k, n)}
        types |= {"left_ptr": pointer, "right_ptr": pointer, "out_ptr": pointer}
        constants = common | {"EVEN_M": aligned, "EVEN_N": aligned}
        case = _gemm_case("", wgrad_kernel, types, constants, config, tma)
    label = name or f"{kernel}-m{m}n{n}k{k}w{config.num_warps}s{config.num_stages}"
    sizes = "" if aligned else "-ragged" if divisible else "-odd"
    suffix = f"{t}-{'tma' if tma else 'pointer'}{sizes}"
    spills = 0 if variant == PLAIN_EXPERTS else 120
    return dataclasses.replace(case, name=f"{label}-{suffix}", divisible=divisible, spills=spills)


def compile_cases(capability: tuple[int, int]) -> Iterator[CompileCase]:
    """All shipped configurations for a GPU of ``capability``."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        # 16-bit tensors load by TMA where the GPU has it and their sizes are multiples of 16.
        sizes = [(False, (True, True)), (False, (False, True)), (False, (False, False))]
        if loads_by_tma(capability) and dtype != torch.float32:
            sizes = [(True, (True, True)), (True, (False, True)), (False, (False, False))]
        for tma, (aligned, divisible) in sizes:
            for (kernel, group), config in table(capability, dtype, tma).items():
                label = kernel if group is None else f"{kernel}-g{group}"
                yield gemm_case(kernel, config, dtype, tma, label, aligned, divisible)
    tma = loads_by_tma(capability)
    yield from _variant_cases(table(capability, torch.bfloat16, tma), tma)
    for (kernel, group), config in table(capability, torch.float32, False).items():
        if kernel in ROW_TILED:  # the highest rank that fits everywhere: it takes most shared memory and registers
            rank = 64 if group == 256 else 128
            label = f"{kernel}-g{group}-lora{rank}"
            case = gemm_case(kernel, config, torch.float32, False, label, variant=Variant(rank=rank))
            yield dataclasses.replace(case, spills=10_000)
    yield from _small_cases()
    yield from _router_cases()
    yield from _row_pass_cases()
    yield from _packed_cases()
    yield from _factor_cases()
    if capability >= (8, 9):
        yield from fp8_cases(tma)
    if capability == (9, 0):
        yield from hopper_catalog.compile_cases()
        yield from hopper_catalog.fp8_cases()


def _variant_cases(configs: dict[tuple[str, int | None], GemmConfig], tma: bool) -> Iterator[CompileCase]:
    activations = [Variant(a.name, a) for a in EVERY_ACTIVATION if a.name != "silu"]
    for (kernel, group), config in configs.items():
        if group != 128:  # the other sizes differ in the tile alone
            continue
        chosen = [*activations, *VARIANTS] if kernel == "up" else VARIANTS
        for variant in chosen:
            label = f"{kernel}-g{group}-{variant.name}"
            yield gemm_case(kernel, config, torch.bfloat16, tma, label, variant=variant)
    # The GEMMs of a low-rank factor are 16 columns wide.
    for kernel, group in (("up", 128), ("down", 128), ("dgrad", 128), ("wgrad", None)):
        config = fit_columns(configs[kernel, group], 16)
        plain = Variant("low", gated=False)
        yield gemm_case(kernel, config, torch.bfloat16, tma, f"{kernel}-rank16", variant=plain)


def _small_cases() -> Iterator[CompileCase]:
    for experts, ids in ((8, "i64"), (60, "i32"), (128, "i64"), (256, "i64"), (512, "i32"), (512, "i64")):
        count_blocks, place_blocks, num_warps = plan_blocks(experts)
        options = {"num_warps": num_warps, "num_stages": 3}
        types = {"ids_ptr": f"*{ids}", "counts_ptr": "*i32", "R": "i32", "blocks_per_chunk": "i32"}
        yield CompileCase(f"count-e{experts}-{ids}", count_kernel, types, count_blocks, options, uses_dot=False)
        yield CompileCase(
            f"place-e{experts}-{ids}",
            place_kernel,
            types | dict.fromkeys(_PLAN, "*i32") | {"num_chunks": "i32"},
            place_blocks | {"GROUP_SIZE": 128},
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
        {"x_ptr": "*bf16", "slot_row_ptr": "*i32", "routed_ptr": "*i32", "out_ptr": "*bf16", "H": "i32"},
        {"TOP_K": 8, "BLOCK_H": 1024},
        small,
        uses_dot=False,
    )
    variants = [Variant(a.name, a) for a in EVERY_ACTIVATION] + [v for v in VARIANTS if not v.rank]
    for variant, blocks in itertools.product(variants, ((1, 1024), (4, 256))):
        yield _dact_case(variant, *blocks)
    sizes = dict.fromkeys(("R", "width", "blocks"), "i32")
    yield CompileCase(
        "sum_blocks",
        sum_blocks_kernel,
        {"parts_ptr": "*fp32", "routed_ptr": "*i32", "out_ptr": "*bf16"} | sizes,
        {"BLOCK": 1024},
        small,
        uses_dot=False,
    )


def _dact_case(variant: Variant, block_r: int, block_i: int, rounds: bool = False) -> CompileCase:
    types = dict.fromkeys(("da_ptr", "z_ptr", "dz_ptr"), "*bf16")
    types |= dict.fromkeys(("topk_weights_ptr", "dw_ptr", "bias_dot_ptr"), "*fp32")
    types |= {"row_slot_ptr": "*i32", "expert_start_ptr": "*i32", "R": "i32", "pitch": "i32", "I": "i32", "E": "i32"}
    types |= {"codes_ptr": "*fp8e4nv" if rounds else "*bf16", "scales_ptr": "*fp32" if rounds else "*bf16"}
    constants = {**variant.gate.constants(), "HAS_BIAS": variant.bias, "WRITE_WA": True, "QUANTIZE": rounds}
    return CompileCase(
        f"dact-i{block_i}-{variant.name}" + ("-fp8" if rounds else ""),
        dact_kernel,
        {name: types[name] for name in dact_kernel.arg_names if name in types},
        constants | {"BLOCK_R": block_r, "BLOCK_I": block_i},
        {"num_warps": 4, "num_stages": 3},
        uses_dot=False,
    )


def _packed_cases() -> Iterator[CompileCase]:
    tensors = {"data_ptr": "*u8", "table_ptr": "*fp32", "scales_table_ptr": "*fp32", "outer_ptr": "*fp32"}
    for nested in (True, False):
        yield CompileCase(
            f"dequantize-{'nested' if nested else 'plain'}",
            four_bit_kernel,
            {
                **tensors,
                "scales_ptr": "*u8" if nested else "*fp32",
                "offset_ptr": "*fp32",
                "out_ptr": "*bf16",
                "first": "i64",
                "count": "i32",
            },
            {"BLOCKSIZE": 64, "OUTER_SIZE": 256 * nested, "NESTED": nested, "STORED": tl.bfloat16, "BLOCK": 2048},
            {"num_warps": 4, "num_stages": 3},
            uses_dot=False,
        )
    for stacked, scale in ((1, "fp32"), (2, "bf16")):
        yield CompileCase(
            f"dequantize-fp8-{stacked}-{scale}",
            block_fp8_kernel,
            {"data_ptr": "*u8", "scales_ptr": f"*{scale}", "out_ptr": "*bf16"}
            | dict.fromkeys(("first", "rows", "columns"), "i32"),
            {"STACKED": stacked, "SIDE": 128, "BLOCK": 32},
            {"num_warps": 4, "num_stages": 3},
            uses_dot=False,
        )
    yield CompileCase(
        "dequantize-mxfp4",
        mxfp4_kernel,
        {"data_ptr": "*u8", "scales_ptr": "*u8", "out_ptr": "*bf16", "first": "i64", "count": "i32"},
        {"SIZE": 16, "BLOCK": 128},
        {"num_warps": 4, "num_stages": 3},
        uses_dot=False,
    )
    lists = ("expert_start", "tile_expert", "tile_row", "part_expert", "part_row", "part_count")
    yield CompileCase(
        "part",
        part_kernel,
        {f"{name}_ptr": "*i32" for name in lists} | {"first": "i32", "last": "i32"},
        {"GROUP_SIZE": 128, "BLOCK_E": 128, "BLOCK_T": 128},
        {"num_warps": 4, "num_stages": 3},
        uses_dot=False,
    )


def fp8_cases(tma: bool) -> Iterator[CompileCase]:
    """GEMMs of block-fp8 weights in fp8; with TMA also those of sizes that it does not load."""
    for dtype, top_k in (("bf16", 0), ("bf16", 8), ("fp32", 0)):
        yield CompileCase(
            f"quantize-{dtype}-k{top_k}",
            quantize_kernel,
            {"rows_ptr": f"*{dtype}", "codes_ptr": "*fp8e4nv", "scales_ptr": "*fp32"}
            | dict.fromkeys(("slot_row_ptr", "routed_ptr"), "*i32")
            | dict.fromkeys(("count", "pitch", "K"), "i32"),
            {"TOP_K": top_k, "PIECES": 2, "BLOCK_R": 4, "BLOCK_K": 1024},
            {"num_warps": 4, "num_stages": 3},
            uses_dot=False,
        )
    yield from (_dact_case(v, 1, 1024, True) for v in (PLAIN_EXPERTS, *(v for v in VARIANTS if not v.gated)))
    for variant in (PLAIN_EXPERTS, *(v for v in VARIANTS if v.name.startswith("lora") or not v.gated)):
        for kernel, group in itertools.product(("up", "down", "dgrad"), (64, 128, 256)):
            if group == 128 or variant.rank == 16:
                yield fp8_case(kernel, group, tma, variant)
    for kernel in ("up", "down"):
        yield fp8_case(kernel, 128, tma, Variant("biases", _CLAMPED, bias=True, rank=16))
    if tma:
        for kernel in ("up", "dgrad"):
            yield fp8_case(kernel, 128, False, Variant("lora", rank=16))


def fp8_case(kernel: str, group: int, tma: bool, variant: Variant) -> CompileCase:
    """up; down; or dgrad, of gathered rows if the experts have no gate."""
    gated, gathered = kernel == "up" and variant.gated, kernel == "up" or not variant.gated
    config = fit_rank(fp8_tile(gated, group, tma), variant.rank, torch.device("cpu"), 2)
    codes, bf16 = "fp8e4nv", "*bf16"
    types = {
        "rows_in": f"*{codes}" if gathered or not tma else f"tensordesc<{codes}[{group}, 128]>",
        "w": f"tensordesc<{codes}[1, 1, {config.block_n}, 128]>" if tma else f"*{codes}",
        **dict.fromkeys(("row_scales_ptr", "w_scales_ptr"), "*fp32"),
        **dict.fromkeys(("bias_ptr", "low_ptr", "factor_ptr", "z_ptr", "out_ptr"), bf16),
        **dict.fromkeys(("blocks", "pitch", "W_SCALES", "SCALE_N", "SCALE_K"), "i32"),
    }
    gate = variant.gate.constants() if kernel == "up" else {"ACTIVATION": "", "P0": 0.0, "P1": 0.0}
    constants = {name: value for name, value in gate.items() if name != "INTERLEAVED"} | {
        "GATED": gated,
        "PIECES": 2 if kernel == "dgrad" and variant.gated else 1,
        "SIDE": 128,
        "TOP_K": 8 if gathered else 0,
        "SAVE_Z": kernel == "up",
        "HAS_BIAS": variant.bias and kernel != "dgrad",
        "RANK": variant.rank,
        "LOW_IS_KN": kernel == "dgrad",
        "USE_TMA": tma,
        "PRECISION": "ieee",
        "FLATTEN": config.flatten,
    }
    name = f"fp8-{kernel}-g{group}-{variant.name or 'plain'}-{'tma' if tma else 'pointer'}"
    return dataclasses.replace(_gemm_case(name, fp8_gemm_kernel, types, constants, config, tma), fp8=True)


def _factor_cases() -> Iterator[CompileCase]:
    """LoRA's factors as PEFT stores them: strides of one are compile-time constants, as at run time."""
    options = {"num_warps": 4, "num_stages": 1}
    every = {f"HAS_{factor}{number}": True for factor in "AB" for number in range(2)}
    for rank, own in ((16, "fp32"), (16, "bf16"), (64, "fp32"), (128, "bf16")):
        unit = {f"b{number}_expert": 1 for number in range(2)} | {f"a{number}_column": 1 for number in range(2)}
        types = {
            arg: "*bf16" if arg.endswith("_out_ptr")
            else f"*{own}" if arg.endswith("_ptr")
            else "fp32" if arg.startswith("scaling")
            else "i32"
            for arg in pack_kernel.arg_names
            if arg not in {*every, *BLOCKS, *unit, "RANK0", "RANK1"}
        }  # fmt: skip
        constants = every | BLOCKS | unit | {"RANK0": rank, "RANK1": rank}
        yield CompileCase(f"pack-r{rank}-{own}", pack_kernel, types, constants, options, uses_dot=False)
    for own in ("fp32", "bf16"):
        types = {arg: f"*{own}" if arg.endswith("_ptr") else "i32" for arg in experts_last_kernel.arg_names[:7]}
        blocks = {name: BLOCKS[name] for name in ("B_EXPERTS", "B_COLUMNS")}
        yield CompileCase(f"experts_last-{own}", experts_last_kernel, types, blocks, options, uses_dot=False)


def _row_pass_cases() -> Iterator[CompileCase]:
    everything: dict[str, Any] = {"LOW": True, "GRAD": True, "BIAS_GRAD": True, "BIAS_DOT": True}
    nothing = dict.fromkeys(everything, False) | {"TOP_K": 0, "WEIGHTED": False, "COPY": False, "TRANSPOSED": False}
    dout: dict[str, Any] = {"TOP_K": 8, "WEIGHTED": True, "COPY": True}
    kinds: dict[str, dict[str, Any]] = {
        "dout": dout | everything,
        "dout-lora": dout | {"LOW": True, "GRAD": True},
        "dout-bias": dout | {"BIAS_GRAD": True, "BIAS_DOT": True},
        "dz": {"LOW": True, "GRAD": True, "BIAS_GRAD": True},
        "dz-bias": {"BIAS_GRAD": True},
        "lora_a-x": {"TOP_K": 8, "GRAD": True, "TRANSPOSED": True},
        "lora_a-wa": {"GRAD": True, "TRANSPOSED": True},
    }
    for (name, kind), rank, dtype in itertools.product(kinds.items(), (16, 32, 64, 128), _TYPES):
        low = kind.get("LOW", False)
        if (rank > MAX_RANK and low) or (rank > 16 and not low and "GRAD" not in kind):
            continue
        if dtype != torch.bfloat16 and rank > 16:
            continue
        t, tile = _TYPES[dtype], pass_tile(dtype, 2048, rank if low or "GRAD" in kind else 0)
        tensors = ("rows_ptr", "factor_ptr", "inner_ptr", "bias_ptr", "sorted_ptr", "grad_ptr", "bias_grad_ptr")
        types = dict.fromkeys(tensors, f"*{t}") | dict.fromkeys(_PLAN[:1] + _PLAN[2:4], "*i32")
        types |= {"topk_weights_ptr": "*fp32", "low_ptr": "*fp32", "bias_dot_ptr": "*fp32"}
        types |= {"R": "i32", "N": "i32", "blocks": "i32", "rank": "i32", "scaling": "fp32"}
        blocks = {"RANK": rank, "EVEN_N": True, "BLOCK_R": tile.block_r, "BLOCK_N": tile.block_n}
        for grad in ("", "-fp32-grad") if "GRAD" in kind and t != "fp32" else ("",):
            wide = {"grad_ptr": "*fp32"} if grad else {}
            yield CompileCase(
                f"row_pass-{name}-r{rank}-{t}{grad}",
                row_pass_kernel,
                {arg: (types | wide)[arg] for arg in row_pass_kernel.arg_names if arg in types},
                nothing | kind | blocks | {"PRECISION": "ieee"},
                {"num_warps": tile.num_warps, "num_stages": tile.num_stages},
                uses_dot=dtype != torch.float32 and "GRAD" in kind,
                # Where triton keeps too much in registers: with biases on sm_100 a few; on sm_80 at rank 32 up to 34
                # with 3.6, and up to 53 with 3.8 for a float32 gradient of the down projection's lora_a alone.
                spills=60 if grad else 34,
            )


def _router_cases() -> Iterator[CompileCase]:
    # scoring, dtype of the logits, normalised, groups, groups kept
    kinds = {
        "softmax": (False, "bf16", True, 1, 1),
        "softmax-plain": (False, "fp32", False, 1, 1),
        "sigmoid": (True, "fp32", True, 8, 4),
    }
    for (name, (sigmoid, t, normalize, groups, kept)), (experts, top_k) in itertools.product(
        kinds.items(), ((60, 4), (128, 8), (256, 8), (512, 10))
    ):
        if experts % groups:
            continue
        common = {"E": experts, "TOP_K": top_k, "SIGMOID": sigmoid, "NORMALIZE": normalize}
        tensors = {"logits_ptr": f"*{t}", "ids_ptr": "*i64", "T": "i32", "scale": "fp32"}
        blocks, num_warps = route_blocks(experts, groups)
        chosen = {"HAS_BIAS": sigmoid, "GROUPS": groups, "TOP_GROUPS": kept}
        yield CompileCase(
            f"route-{name}-e{experts}",
            route_kernel,
            tensors | {"bias_ptr": "*fp32", "weights_ptr": f"*{t}", "tokens_per_program": "i32"},
            common | chosen | blocks,
            {"num_warps": num_warps, "num_stages": 3},
            uses_dot=False,
        )
        blocks, num_warps = route_grad_blocks(experts)
        yield CompileCase(
            f"route-grad-{name}-e{experts}",
            route_grad_kernel,
            tensors | {"dweights_ptr": f"*{t}", "dlogits_ptr": f"*{t}"},
            common | blocks,
            {"num_warps": num_warps, "num_stages": 3},
            uses_dot=False,
        )
