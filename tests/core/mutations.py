"""Would the tests notice a bug? Plants bugs in the kernels, one at a time, in a copy, and runs the quick tests of them.

    python tests/core/mutations.py --json benchmarks/results/mutants.json           # in triton's interpreter
    python tests/core/mutations.py --gpu --json benchmarks/results/mutants-gpu.json # the kernels for Hopper, compiled
    python tests/core/mutations.py --barriers --json mutants-barriers.json          # the barriers of their warps

The interpreter does not run the kernels for Hopper: their mutants need such a GPU. A mutant counts as noticed if a
test fails on a wrong result or the process crashes; one that does not compile, or does not end in time, proves
nothing and counts as alive. So that none can stop the GPU, no mutant of --gpu touches the synchronisation of warps:
the phases and counts of barriers, and the number of ring stages that each warpgroup passes. Those of --barriers do, and
run with random delays (tests/device/test_delays_gpu.py) in a process that ends itself if a kernel does not end.

15 minutes to an hour and a half of one core (mutants.json: 15); on 16 cores two minutes with --gpu, six with
--barriers. Exit code 1 if a mutant is alive, or if a planted text is not in the source any more; 2 if there is no such
GPU.
"""

# ruff: noqa: E501
from __future__ import annotations

import argparse
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from moe_kernels.tools.common.machine import environment

ROOT = Path(__file__).parents[2]
TRITON, HOPPER = "src/moe_kernels/kernels/triton", "src/moe_kernels/kernels/hopper"
TESTS = ["tests/core/test_kernels.py", "tests/core/test_sanitized.py"]
ROUTER_TESTS = ["tests/router/test_router.py"]
PACKED_TESTS = ["tests/core/test_packed.py"]
FACTOR_TESTS = ["tests/core/test_factors.py"]
FP8_TESTS = ["tests/core/test_fp8_activations.py"]
AT_A_BOUND = "tests/core/test_experts.py::test_a_clamp_at_its_bound_is_the_installed_torchs"
QUICK = "not shipped_tiles and not scheduling and not sanitisers"
GPU_TESTS = ["tests/device/test_gluon_gpu.py"]
# Without the options of pyproject.toml, which refuse to run where a plugin for one of its settings is missing.
PYTEST = (sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-o", "addopts=")

# what the bug is, file, text, replacement, how often the text is there if not once
MUTANTS: list[tuple[Any, ...]] = [
    ("row mask lets one row too many in", "tile.py", "return expert, row0, rows, rows < row_end", "return expert, row0, rows, rows <= row_end"),
    ("tile takes the wrong expert's end", "tile.py", "expert_start_ptr + expert + 1)", "expert_start_ptr + expert)"),
    ("column mask off by one", "tile.py", "(n < col_limit)[None, :])", "(n <= col_limit)[None, :])"),
    ("K tail of the weights is not masked", "tile.py", "mask=(r < ROWS)[:, None] & (c < COLS)[None, :], other=0.0", "mask=(r < ROWS)[:, None] & (c < COLS + 1)[None, :], other=0.0"),
    ("missing other= in the row loads", "tile.py", "block = tl.load(pointers, mask=(k < K)[None, :], other=0.0)", "block = tl.load(pointers, mask=(k < K)[None, :])"),
    ("wrong gathered token", "tile.py", "(slot // TOP_K).to(tl.int64)", "(slot // TOP_K * 0 + slot % TOP_K).to(tl.int64)"),
    ("expert offset in 32 bits", "tile.py", "base = w + expert.to(tl.int64) * STRIDE", "base = w + expert * STRIDE"),
    ("gate and up swapped in the epilogue", "up.py", "a = value(gate, up, ACTIVATION, P0, P1)", "a = value(up, gate, ACTIVATION, P0, P1)", 2),
    ("up columns read from the gate half", "up.py", "expert, I + n0, k0,", "expert, n0, k0,"),
    ("last K block lost", "up.py", "for k0 in tl.range(0, H, BLOCK_K)", "for k0 in tl.range(0, H - BLOCK_K + 1, BLOCK_K)", 2),
    ("combine forgets the routing weight", "combine.py", "total += weight * values", "total += values"),
    ("combine adds dropped slots", "combine.py", "mask=col_mask & kept, other=0.0", "mask=col_mask, other=0.0"),
    ("combine loses the last slot", "combine.py", "tl.static_range(TOP_K)", "tl.static_range(TOP_K - 1)", 2),
    ("sign of the activation's derivative", "dact.py", "d_gate = (da * d_gate)", "d_gate = (-da * d_gate)"),
    ("derivative without its second term", "../../activation.py", "derivative = s + value * (1.0 - s)", "derivative = s", 2),
    ("dZ without the routing weight", "dact.py", "        da *= weight\n", ""),
    ("wA without the routing weight", "dact.py", "(weight * a).to(", "(a).to("),
    ("wA is not written", "dact.py", '"WRITE_WA": needs_wa', '"WRITE_WA": False'),
    ("dw of dropped slots not written", "dact.py", "dw.to(dw_ptr.dtype.element_ty), mask=rows < R)", "dw.to(dw_ptr.dtype.element_ty), mask=routed)"),
    ("wgrad takes a row of the next expert", "wgrad.py", "rows < end, m0, M, BLOCK_M, EVEN_M, True)", "rows <= end, m0, M, BLOCK_M, EVEN_M, True)"),
    ("wgrad loses the partial block", "wgrad.py", "if whole_end < end:", "if whole_end > end:"),
    ("wgrad skips experts without rows", "wgrad.py", "mask=(cols_m < M)[:, None] & (cols_n < N)[None, :])", "mask=(end > start) & (cols_m < M)[:, None] & (cols_n < N)[None, :])"),
    ("plan is not stable", "plan.py", "tl.sort(experts * BLOCK_S + place)\n        expert = key // BLOCK_S\n        slot = first_slot + key % BLOCK_S", "tl.sort(experts * BLOCK_S + BLOCK_S - 1 - place)\n        expert = key // BLOCK_S\n        slot = first_slot + BLOCK_S - 1 - key % BLOCK_S"),
    ("plan counts negative ids", "plan.py", "tl.where((ids >= 0) & (ids < E), ids, E)", "tl.where(ids < E, ids, E)"),
    ("plan cuts ids to 32 bits before it judges them", "plan.py", "    experts = tl.where((ids", "    ids = ids.to(tl.int32)\n    experts = tl.where((ids"),
    ("plan stores what lies behind the last slot", "plan.py", "return tl.where(in_range, experts, E + 1)", "return experts"),
    ("plan loses the earlier blocks of a chunk", "plan.py", "        next_row += counts\n", ""),
    ("dropped slots lose the earlier blocks of a chunk", "plan.py", "        routed_before += in_block\n", ""),
    ("plan counts the first block of a chunk for all", "plan.py", "        experts = following\n    tl.store(counts_ptr", "    tl.store(counts_ptr"),
    ("plan sorts the first block of a chunk for all", "plan.py", "        first_slot += BLOCK_S\n        experts = following\n", "        first_slot += BLOCK_S\n"),
    ("place in the sorted block not less its expert's first", "plan.py", "tl.gather(next_row - first,", "tl.gather(next_row,"),
    ("plan reads the first histograms alone", "plan.py", "for c0 in range(0, num_chunks, BLOCK_C):", "for c0 in range(0, BLOCK_C, BLOCK_C):"),
    ("tile of the next expert", "plan.py", "tile_end[None, :] <= t[:, None]", "tile_end[None, :] < t[:, None]"),
    ("tile's row without the tiles before its expert", "plan.py", "start - (tile_end - tiles) * GROUP_SIZE", "start"),
    ("a program describes its first tiles alone", "plan.py", "tile_count, num_chunks * BLOCK_T):", "tile_count, num_chunks * BLOCK_T + tile_count):"),
    ("one tile too few", "plan.py", "(total + GROUP_SIZE - 1) // GROUP_SIZE", "(total + GROUP_SIZE - 2) // GROUP_SIZE"),
    ("bias of the first expert for all", "tile.py", "bias_ptr + expert.to(tl.int64) * N + n", "bias_ptr + n"),
    ("low-rank part lost", "tile.py", "return tl.dot(low, factor, total, input_precision=PRECISION)", "return total"),
    ("low-rank factor of the first expert for all", "tile.py", "load_weight(factor_ptr, expert, n0,", "load_weight(factor_ptr, expert * 0, n0,"),
    ("low-rank up columns read from the gate half", "up.py", "row_mask, I + n0, 2 * I, RANK", "row_mask, n0, 2 * I, RANK"),
    ("bias of up read from the gate half", "up.py", "bias_ptr, expert, I + n0,", "bias_ptr, expert, n0,"),
    ("last column of interleaved Z lost", "up.py", "BLOCK_Z, PER_COLUMN * I - z0)", "BLOCK_Z, PER_COLUMN * I - z0 - 1)"),
    ("interleaved dZ in the wrong order", "dact.py", "tl.join(d_gate, d_up)", "tl.join(d_up, d_gate)"),
    ("dw without the bias's share", "dact.py", "        dw += tl.load(bias_dot_ptr", "        tl.load(bias_dot_ptr"),
    ("the bias's share of the next row", "dact.py", "tl.load(bias_dot_ptr + rows,", "tl.load(bias_dot_ptr + rows - 1,"),
    ("clamp passes gradient outside", "../../activation.py", "d_up = tl.where(passes_u, act, 0.0)", "d_up = act", 2),
    ("clamp at its bound as in another torch", "../../activation.py", "tl.constexpr(CLAMP_PASSES_AT_ITS_BOUND)", "tl.constexpr(not CLAMP_PASSES_AT_ITS_BOUND)"),
    ("4 bits: halves of a byte the wrong way round", "dequantize.py", "tl.join(left, right)", "tl.join(right, left)"),
    ("4 bits: scale of the first block for all", "dequantize.py", "tl.load(scales_ptr + block, mask", "tl.load(scales_ptr + block * 0, mask"),
    ("4 bits: nested scale without its offset", "dequantize.py", " * outer + tl.load(offset_ptr)", " * outer"),
    ("fp8: scales of the first experts for a later block", "dequantize.py", "((first + expert) * blocks_r + block_r)", "(expert * blocks_r + block_r)"),
    ("fp8: scale of the block above", "dequantize.py", "* blocks_r + block_r) * blocks_c", "* blocks_r + block_r // 2 * 2) * blocks_c"),
    ("fp8: scale rounded to bfloat16", "dequantize.py", "blocks_c + block_c).to(tl.float32)", "blocks_c + block_c).to(tl.bfloat16).to(tl.float32)"),
    ("fp8: blocks of up begin where a whole block of gate would end", "dequantize.py", "above = block_r // blocks_each * height", "above = block_r // blocks_each * blocks_each * SIDE"),
    ("fp8: the last block of gate reaches into up", "dequantize.py", "(r < height)[:, None]", "(r <= height)[:, None]"),
    ("fp8: one column too few", "dequantize.py", "& (c < columns)[None, :]", "& (c < columns - 1)[None, :]"),
    ("fp8: one column too many", "dequantize.py", "& (c < columns)[None, :]", "& (c <= columns)[None, :]"),
    ("fp8: numbers without an exponent as if they had one", "dequantize.py", "tl.where(size < 8,", "tl.where(size < 0,"),
    ("fp8: NaN becomes a number", "dequantize.py", "tl.where(size == 0x7F, 0x7FC00000, bits)", "tl.where(size == 0x80, 0x7FC00000, bits)"),
    ("fp8: the sign of zero is lost", "dequantize.py", "| ((code & 0x80) << 24)", "| tl.where(size == 0, 0, (code & 0x80) << 24)"),
    ("fp8: exponent off by one", "dequantize.py", "(size << 20) + (120 << 23)", "(size << 20) + (121 << 23)"),
    ("fp8 rows: largest number of a block instead of the largest size", "round.py", "tl.max(tl.abs(values), axis=2)", "tl.max(values, axis=2)"),
    ("fp8 rows: a block of zeros has the scale zero", "round.py", "tl.maximum(tl.max(tl.abs(values), axis=2), _SMALLEST)", "tl.max(tl.abs(values), axis=2)"),
    ("fp8 rows: numbers beyond e4m3 are cut", "round.py", "tl.div_rn(_LARGEST, most)[", "tl.div_rn(2.0 * _LARGEST, most)["),
    ("fp8 rows: a piece reaches into the next", "round.py", "& (k < K)[None, :]", "& (k < PIECES * K - piece * K)[None, :]"),
    ("fp8 rows: the second piece begins where a whole block would end", "round.py", "* PIECES + piece)[:, None] * K + k", "* PIECES)[:, None] * K + (piece * tl.cdiv(K, _SIDE) * _SIDE + k)"),
    ("fp8 rows: codes of the second piece over those of the first", "round.py", "place = piece * blocks + block", "place = block"),
    ("fp8 rows: scale stored in the next block", "round.py", "place.to(tl.int64)[None, :] * pitch", "((place + 1) % (PIECES * blocks)).to(tl.int64)[None, :] * pitch"),
    ("fp8 rows: blocks of a later chunk over those of the first", "round.py", "block = k0 // _SIDE + tl.arange", "block = tl.arange"),
    ("fp8 rows: tokens written to the row of their first expert", "round.py", "rows * TOP_K + slot, mask=own", "rows * TOP_K, mask=own"),
    ("fp8 rows: tokens without an expert written too", "round.py", "kept = own & (row < routed)", "kept = own"),
    ("fp8 rows: dZ of up over that of gate", "dact.py", "rows < R, i0, I, 1, PIECES", "rows < R, i0, I, 0, PIECES"),
    ("fp8 rows: dZ without the activation's derivative", "dact.py", "to_fp8(d_gate)", "to_fp8(da.to(d_gate.dtype))"),
    ("fp8 rows: the first columns of dZ alone", "dact.py", "to_fp8(d_up)\n                store_fp8(codes_ptr, scales_ptr, pitch, codes, scales, rows, rows < R, i0,", "to_fp8(d_up)\n                store_fp8(codes_ptr, scales_ptr, pitch, codes, scales, rows, rows < R, 0,"),
    ("fp8: a row's scale of its first block for all", "fp8.py", "row_scales + block * pitch.to(tl.int64)", "row_scales"),
    ("fp8: scales of the sorted row for a gathered one", "fp8.py", "row_scales = row_scales_ptr + source\n", "row_scales = row_scales_ptr + rows % tl.max(source)\n"),
    ("fp8: weight's scale of the first k block for all", "fp8.py", "tl.load(w_scales + block * SCALE_K)", "tl.load(w_scales)"),
    ("fp8: weight's scale of the first columns for all", "fp8.py", " + n0 // SIDE * SCALE_N", ""),
    ("fp8: weight's scales of the first expert for all", "fp8.py", "expert.to(tl.int64) * W_SCALES", "expert.to(tl.int64) * 0"),
    ("fp8: up with the scales of gate", "fp8.py", "w_scales + tl.cdiv(N, SIDE) * SCALE_N + block", "w_scales + block"),
    ("fp8: scales of up where a whole block of gate would end", "fp8.py", "tl.cdiv(N, SIDE) * SCALE_N", "N // SIDE * SCALE_N"),
    ("fp8: codes of up are those of gate", "fp8.py", "expert, N + n0, block, WIDTH", "expert, n0, block, WIDTH"),
    ("fp8: codes of the first piece for both", "fp8.py", "w.load([expert, piece, n0, k0])", "w.load([expert, piece * 0, n0, k0])"),
    ("fp8: by pointers, codes of the first piece for both", "fp8.py", "(row * PIECES + piece)[:, None]", "(row * PIECES)[:, None]"),
    ("fp8: by pointers, codes of the first expert for all", "fp8.py", "expert.to(tl.int64) * N + n\n", "expert.to(tl.int64) * 0 + n\n"),
    ("fp8: by pointers, codes behind the last row of a weight", "fp8.py", "(k < K)[None, :]", "(k < K + 200)[None, :]"),
    ("fp8: last k block lost", "fp8.py", "tl.range(0, PIECES * blocks)", "tl.range(0, PIECES * blocks - 1)"),
    ("fp8: low-rank up columns read from the gate half", "fp8.py", "row_mask, N + n0, WIDTH)", "row_mask, n0, WIDTH)"),
    ("fp8: bias of up read from the gate half", "fp8.py", "bias_ptr, expert, N + n0,", "bias_ptr, expert, n0,"),
    ("fp8: gate and up swapped in the epilogue", "fp8.py", "value(total, up, ACTIVATION", "value(up, total, ACTIVATION"),
    ("fp8: Z of up over that of gate", "fp8.py", "row_mask, N + n0, WIDTH, up, BLOCK_N", "row_mask, n0, WIDTH, up, BLOCK_N"),
    ("mxfp4: halves of a byte the wrong way round", "dequantize.py", "tl.join(low, high)", "tl.join(high, low)"),
    ("mxfp4: scales of the first experts for a later block", "dequantize.py", "scales_ptr + first + place", "scales_ptr + place"),
    ("mxfp4: codes of the first experts for a later block", "dequantize.py", "(first + place)[:, None] * SIZE", "place[:, None] * SIZE"),
    ("mxfp4: scale of the block before", "dequantize.py", "scales_ptr + first + place", "scales_ptr + (first + place) // 2 * 2"),
    ("mxfp4: one block too many", "dequantize.py", "    mask = place < count\n    code", "    mask = place <= count\n    code"),
    ("mxfp4: one block too few", "dequantize.py", "    mask = place < count\n    code", "    mask = place < count - 1\n    code"),
    ("mxfp4: the smallest scale is zero", "dequantize.py", "tl.where(code == 0, 1 << 22, code << 23)", "code << 23"),
    ("mxfp4: the smallest scale twice as large", "dequantize.py", "code == 0, 1 << 22,", "code == 0, 1 << 23,"),
    ("mxfp4: NaN becomes infinity", "dequantize.py", "tl.where(code == 0xFF, 0x7FC00000, bits)", "bits"),
    ("mxfp4: numbers without an exponent as if they had one", "dequantize.py", "tl.where(size < 2,", "tl.where(size < 0,"),
    ("mxfp4: exponent off by one", "dequantize.py", "(size << 22) + (126 << 23)", "(size << 22) + (127 << 23)"),
    ("mxfp4: the sign is lost", "dequantize.py", "(bits | ((code & 8) << 28))", "bits"),
    ("tiles of a part numbered as in the whole", "plan.py", "mask=mine, other=0) - first", "mask=mine, other=0)"),
    ("a part begins with the first expert's tiles", "plan.py", "before = tl.sum(tl.where(e < first, tiles, 0), axis=0)", "before = first * 0"),
    ("pass takes a row of the next expert", "row_pass.py", "own = rows < end", "own = rows <= end"),
    ("pass reads the rows of the first expert's factor", "row_pass.py", "factor_ptr + (expert * N + n)", "factor_ptr + n"),
    ("pass reads the first expert's bias", "row_pass.py", "bias_ptr + expert * N + n, mask", "bias_ptr + n, mask"),
    ("factor's gradient without the routing weight", "row_pass.py", "inner = (weight * inner.to(tl.float32)).to(inner.dtype)", "inner = inner"),
    ("bias gradient without the routing weight", "row_pass.py", "bias_grad += weight * values", "bias_grad += values"),
    ("parts of one block of columns alone", "row_pass.py", "        part_ptrs += size\n", ""),
    ("low of every block in the first one's place", "row_pass.py", "low_ptr + block.to(tl.int64) * R * RANK + narrow", "low_ptr + narrow"),
    ("a pass walks slots, not tokens", "row_pass.py", "source = (slot // TOP_K).to(tl.int64)", "source = slot.to(tl.int64) % (R // TOP_K)"),
    ("factor's gradient loses the blocks before", "row_pass.py", "grad = multiply_add(values.T, inner, grad, PRECISION)", "grad = multiply_add(values.T, inner, tl.zeros((BLOCK_N, RANK), tl.float32), PRECISION)"),
    ("sorted copy in the rows of slots", "row_pass.py", "tl.store(sorted_ptr + rows.to(tl.int64)", "tl.store(sorted_ptr + slot.to(tl.int64)"),
    ("low over columns outside", "row_pass.py", "mask = mask & in_width[None, :]", "mask = mask"),
    ("gradient of a float32 factor rounded to the dtype of the rows", "row_pass.py", "grad = (grad * scaling).to(", "grad = (grad * scaling).to(rows_ptr.dtype.element_ty).to("),
    ("gradient of lora_a without the scaling", "row_pass.py", "grad = (grad * scaling)", "grad = grad"),
    ("gradient of the padding written over the next row", "row_pass.py", "mask = in_width[:, None] & (r < rank)[None, :]", "mask = in_width[:, None] & (r < RANK)[None, :]"),
    ("factor read beyond its rank", "factors.py", "((row < rows) & (column < columns))", "((row < size) & (column < size))"),
    ("factor of the first experts for all", "factors.py", "source = e[:, None] * source_expert", "source = (e % BLOCK_E)[:, None] * source_expert"),
    ("factor not scaled", "factors.py", "(values.to(tl.float32) * scaling)", "(values.to(tl.float32))"),
    ("factor scaled in float32 and rounded once", "factors.py", "values = (values.to(tl.float32) * scaling).to(source_ptr.dtype.element_ty)", "values = values.to(tl.float32) * scaling"),
    ("lora_b of the second weight with the rows of the first", "factors.py", "tile, E, N1, r1,", "tile, E, N0, r1,"),
    ("lora_a of the second weight with the scaling of the first", "factors.py", "1, scaling1, True,", "1, scaling0, True,"),
    ("a tile between the two weights lost", "factors.py", "return tile - tiles", "return tile - tiles - 1"),
    ("last experts of a factor lost", "factors.py", "(e < E)[:, None]", "(e < E - 1)[:, None]"),
    ("last elements of a factor lost", "factors.py", "(q < size)[None, :]", "(q < size - 1)[None, :]"),
    ("second gradient with the size of the first", "factors.py", "1, size1, size1, size1, size1, 0,", "1, size0, size0, size0, size0, 0,"),
    ("second gradient is the first one", "factors.py", "_copy(grad1_ptr, out1_ptr,", "_copy(grad0_ptr, out1_ptr,"),
    ("gradient of lora_b in its own order", "factors.py", "size0, 0, 1, 1, E, 1.0", "size0, 0, 1, size0, 1, 1.0"),
    ("last tile of a group walked twice", "tile.py", "size_m = tl.minimum(num_m - first_m, GROUP_M)", "size_m = GROUP_M"),
    ("gather loses a slot", "combine.py", "row = tl.load(slot_row_ptr + token * TOP_K + k)\n        tl.store", "row = tl.load(slot_row_ptr + token * TOP_K + TOP_K - 1 - k * 0)\n        tl.store"),
    ("gather loses the last column", "combine.py", "values, mask=(cols < H) & (row < routed))", "values, mask=(cols < H - 1) & (row < routed))"),
    ("counts of another chunk", "plan.py", "tl.where((c < chunk)[:, None], counts, 0)", "tl.where((c <= chunk)[:, None], counts, 0)"),
    ("router forgets the correction bias", "router.py", "key = _sortable(value + bias[None, :])", "key = _sortable(value)"),
    ("router weights with the correction bias", "router.py", "            value = _sigmoid(logits, weights_ptr.dtype.element_ty)\n", "            value = _sigmoid(logits, weights_ptr.dtype.element_ty) + bias[None, :]\n"),
    ("router takes one group too many", "router.py", "for _ in range(TOP_GROUPS):", "for _ in range(TOP_GROUPS + 1):"),
    ("router's groups by their largest alone", "router.py", "_sorted_value(first) + _sorted_value(second)", "_sorted_value(first)"),
    ("router forgets the scale", "router.py", "(weight * scale).to(", "weight.to("),
    ("router's weights not normalised", "router.py", "weight = value / (total + 1e-20 if SIGMOID else total)[:, None]", "weight = value"),
    ("router chooses the same expert twice", "router.py", "            key = tl.where(hit, _TAKEN, key)\n", ""),
    ("gradient of a router without the softmax's sum", "router.py", "weight * (grad - tl.sum(grad * weight, axis=1)[:, None])", "weight * grad"),
    ("gradient of a sigmoid router without its slope", "router.py", "tl.where(chosen == 1, grad * slope, 0.0)", "tl.where(chosen == 1, grad, 0.0)"),
    ("gradient of a router for experts not chosen", "router.py", "tl.where(chosen == 1, grad * slope, 0.0)", "grad * slope + value"),
]  # fmt: skip

# pytest's -k: which tests of GPU_TESTS are run on a mutant
ROUTINGS = "hostile and bfloat16 and gathered"  # experts of one to a few tiles each, tails, dropped ids, empty experts
LARGE_WEIGHTS, LARGE_EXPERT, WIDE_TILES = "come_from_memory", "large_expert", "wide_tiles and 512"
MODELS = "models and deepseek"  # whose programs take several tiles
BIAS, INTERLEAVED, LORA128 = (f"kinds_of_experts and {kind}" for kind in ("bias", "interleaved", "lora-128"))
# at these sizes an H200 takes down by ping-pong, whose tiles have two chunks of columns; cooperative ones have four
WIDE_BIAS = "routings_of_kinds and bias and cooperative"
LORA = "kinds_of_experts and lora and not oss and not gateless and not 32 and not 64 and not 128"
GATELESS_COPIES = "gathered_or_copied_of_kinds and gateless"
GATELESS = "kinds_of_experts and gateless and not lora"
FP8 = "gemms_in_fp8"
IN_LOAD = "dequantising_in_the_load"

# what the bug is, file, text, replacement, tests; those that compile longest come first
GPU_MUTANTS = [
    ("partial tile takes the wrong rows of its column", "ring.py", "mask=(rows < row_end)[:, None])", "mask=(rows < row_end - 1)[:, None])", ROUTINGS),
    ("partial tile written to the first columns", "ring.py", "cols = col0 + gl.arange(0, COLUMNS,", "cols = gl.arange(0, COLUMNS,", ROUTINGS),
    ("chunk sent before it is in its buffer", "ring.py", "    put(values, buffer)\n    fence_async_shared()\n    tma_store(descriptor, [row, col], buffer)\n", "    tma_store(descriptor, [row, col], buffer)\n    tma.store_wait(0)\n    put(values, buffer)\n", ROUTINGS),
    ("no wait for the buffer to be free", "ring.py", "    tma.store_wait(1)\n", "", ROUTINGS),
    ("no wait for two buffers to be free", "epilogue.py", "    tma.store_wait(0)\n    put(left,", "    put(left,", ROUTINGS),
    ("a tile that begins early begins one row too early", "ring.py", "gl.minimum(row0, row_end - self.BLOCK_M)", "gl.minimum(row0, row_end - self.BLOCK_M - 1)", ROUTINGS),
    ("a tile that begins early reaches into the expert before", "ring.py", "gl.maximum(gl.minimum(row0, row_end - self.BLOCK_M), start)", "gl.maximum(gl.minimum(row0, row_end - self.BLOCK_M), 0)", ROUTINGS),
    ("a large expert's second group is its first again", "ring.py", "(first + in_group % size) * self.BLOCK_M", "(in_group % size) * self.BLOCK_M", LARGE_EXPERT),
    ("an expert's last group is as large as the others", "ring.py", "size = gl.minimum(largest, count - first)", "size = largest", LARGE_EXPERT),
    ("every other tile is looked up ahead", "gemm.py", "tiles.at(number + stride)  # while", "tiles.at(number + 2 * stride)  # while", MODELS),
    ("wrong gathered token", "mainloop.py", "(slot // self.TOP_K).to(gl.int64)", "(slot % self.TOP_K).to(gl.int64)", ROUTINGS),
    ("last row of an expert gathers token 0", "mainloop.py", "mask=rows < tile.row_end, other=0)", "mask=rows < tile.row_end - 1, other=0)", ROUTINGS),
    ("every K block gathers the first columns", "mainloop.py", "cp_async(a, sources + k0)", "cp_async(a, sources)", ROUTINGS),
    ("second of two blocks is the first again", "mainloop.py", "operands.load(second, sources, tile, k1)", "operands.load(second, sources, tile, k0)", LARGE_WEIGHTS),
    ("tile of rows begins one row late", "mainloop.py", "self.rows.descriptor, [tile.row0, k0]", "self.rows.descriptor, [tile.row0 + 1, k0]", ROUTINGS),
    ("gate weights read from the up half", "mainloop.py", "matrices, [gate_row, k0]", "matrices, [gate_row + N, k0]", ROUTINGS),
    ("weights of the first expert for all", "mainloop.py", "[tile.expert * N + tile.n * b.shape[0], k0]", "[tile.n * b.shape[0], k0]", ROUTINGS),
    ("last K block of the weights lost", "mainloop.py", "tile.n * b.shape[0], k0]", "tile.n * b.shape[0], k0 + (k0 + b.shape[1]) // K * K]", ROUTINGS),
    ("transposed weights of the first expert for all", "mainloop.py", "[tile.expert * K + k0, tile.n * b.shape[1]]", "[k0, tile.n * b.shape[1]]", ROUTINGS),
    ("K blocks of the transposed weights one too far", "mainloop.py", "[tile.expert * K + k0, tile.n", "[tile.expert * K + k0 + b.shape[0], tile.n", ROUTINGS),
    ("the last K block alone counts", "mainloop.py", "            b = b.permute((1, 0))\n        acc = warpgroup_mma(a, b, acc, is_async=True)", "            b = b.permute((1, 0))\n        acc = warpgroup_mma(a, b, acc, use_acc=False, is_async=True)", ROUTINGS),
    ("both groups multiply the upper half", "mainloop.py", "            a = a.slice(ROW0, acc.shape[0])\n        if not", "            a = a.slice(0, acc.shape[0])\n        if not", ROUTINGS),
    ("both groups write the upper half", "gemm.py", "tile.row0 + ROW0, operands.GATED", "tile.row0, operands.GATED", ROUTINGS),
    ("gate and up swapped in the epilogue", "epilogue.py", "epilogue.activated(gate0, up0)", "epilogue.activated(up0, gate0)", ROUTINGS),
    ("the activation's halves swapped", "epilogue.py", "_write_pair(a0, a1, buffers,", "_write_pair(a1, a0, buffers,", ROUTINGS),
    ("Z's up half written over its gate half", "epilogue.py", "row0, row_end, N + col0, 2 * N)", "row0, row_end, col0, N)", ROUTINGS),
    ("right half of a tile written over the left", "epilogue.py", "row0, row_end, col0 + HALF + CHUNK)", "row0, row_end, col0 + CHUNK)", ROUTINGS),
    ("second chunk of a half written over the first", "epilogue.py", "(left1, buffers.index(1), out, row0, row_end, col0 + CHUNK)", "(left1, buffers.index(1), out, row0, row_end, col0)", ROUTINGS),
    ("second chunk of a pair written over the first", "epilogue.py", "out.descriptor, [row0, col0 + CHUNK], buffers.index(1)", "out.descriptor, [row0, col0], buffers.index(1)", ROUTINGS),
    ("second chunk of a pair lost at the edge", "epilogue.py", "two = col0 + CHUNK < col_end", "two = col0 + 2 * CHUNK < col_end", MODELS),
    ("tile written over the next expert's rows", "epilogue.py", "elif row0 + values.shape[0] <= row_end:", "elif row0 <= row_end:", ROUTINGS),
    ("pair written over the next expert's rows", "epilogue.py", "if row0 + buffers.shape[1] <= row_end:", "if row0 <= row_end:", ROUTINGS),
    ("partial block of columns lost", "gemm.py", "num_n = (N + COLUMNS - 1) // COLUMNS", "num_n = N // COLUMNS", ROUTINGS),
    ("last tile lost", "gemm.py", "num_m = gl.load(tile_count_ptr)", "num_m = gl.load(tile_count_ptr) - 1", ROUTINGS),
    ("wgrad loses an expert's last row", "wgrad.py", "mask=(rows < row_end)[:, None] &", "mask=(rows < row_end - 1)[:, None] &", ROUTINGS),
    ("wgrad's partial block multiplies other rows", "wgrad.py", "_sources(row_slot_ptr, row, end, BLOCK_N, BLOCK_K, 0)", "_sources(row_slot_ptr, tile.start, end, BLOCK_N, BLOCK_K, 0)", ROUTINGS),
    ("wgrad gathers the same block of tokens again", "wgrad.py", "_sources(row_slot_ptr, row + BLOCK_K, end,", "_sources(row_slot_ptr, row, end,", ROUTINGS),
    ("wgrad gathers another token", "wgrad.py", "other=0) // TOP_K", "other=0) % TOP_K", ROUTINGS),
    ("wgrad's programs skip a tile", "wgrad.py", "2 * gl.num_programs(0) - tile.stride", "2 * gl.num_programs(0) - tile.stride + 1", "models and qwen2"),
    ("an expert's place in the order taken for its number", "wgrad.py", "stride=stride, expert=expert,", "stride=stride, expert=gl.minimum(number // self.per_expert, self.experts - 1),", ROUTINGS),
    ("wgrad's whole blocks one row late on the left", "wgrad.py", "(left.descriptor, [row, m * BLOCK_M], ready, a)", "(left.descriptor, [row + 1, m * BLOCK_M], ready, a)", ROUTINGS),
    ("wgrad's right columns are the left's", "wgrad.py", "(right.descriptor, [row, n * BLOCK_N], ready, b)", "(right.descriptor, [row, m * BLOCK_M], ready, b)", ROUTINGS),
    ("wgrad sums the last block of rows alone", "wgrad.py", "b, acc, is_async=True)", "b, acc, use_acc=False, is_async=True)", ROUTINGS),
    ("wgrad skips experts without rows", "wgrad.py", "if m0 < M:", "if (m0 < M) & (tile.start < tile.end):", ROUTINGS),
    ("wgrad writes the right half twice", "wgrad.py", "_write(left, buffers, out,", "_write(right, buffers, out,", ROUTINGS),
    ("wgrad's partial block multiplies other rows on the left", "wgrad.py", "_sources(row_slot_ptr, row, end, BLOCK_M, BLOCK_K, 0)", "_sources(row_slot_ptr, tile.start, end, BLOCK_M, BLOCK_K, 0)", ROUTINGS),
    ("wgrad gathers the columns of another block on the right", "wgrad.py", "_copy_rows(b, right, sources, row, end, n * BLOCK_N)", "_copy_rows(b, right, sources, row, end, m * BLOCK_N)", ROUTINGS),
    ("wgrad writes the upper rows twice", "wgrad.py", "_write(lower, buffers, out,", "_write(upper, buffers, out,", ROUTINGS),
    ("wgrad writes over the next expert's rows", "wgrad.py", "if m0 + _STORED < M:", "if m0 >= 0:", GATELESS_COPIES),
    ("wgrad's partial block of columns lost", "wgrad.py", "num_n = (N + BLOCK_N - 1) // BLOCK_N", "num_n = N // BLOCK_N", ROUTINGS),
    ("both groups of wgrad multiply the upper half", "wgrad.py", "slice(WARPGROUP * ROWS, ROWS, dim=1)", "slice(0, ROWS, dim=1)", ROUTINGS),
    ("both groups take the upper half of a wide tile", "down_grad.py", "WARPGROUP * ROWS if COOPERATIVE else 0", "0", WIDE_TILES),
    ("both groups of a wide tile write the upper half", "down_grad.py", "tile.row0 + ROW0, tile.row_end", "tile.row0, tile.row_end", WIDE_TILES),
    ("right half of a wide tile from where a narrow one's is", "down_grad.py", "col0 + HALF\n", "col0 + 64\n", WIDE_TILES),
    ("dZ without the routing weight", "down_grad.py", "    da *= weight[:, None]\n", "    da *= 1.0\n", ROUTINGS),
    ("wA without the routing weight", "down_grad.py", "put(weight[:, None] * a,", "put(a,", ROUTINGS),
    ("wA is not written", "down_grad.py", '"WRITE_WA": needs_wa', '"WRITE_WA": False', ROUTINGS),
    ("routing weight of another slot", "down_grad.py", "gl.load(topk_weights_ptr + slot,", "gl.load(topk_weights_ptr + rows,", ROUTINGS),
    ("gate's gradient with up's derivative", "down_grad.py", "self.put_dz(da * d_gate, da * d_up, SET)", "self.put_dz(da * d_up, da * d_up, SET)", ROUTINGS),
    ("lower rows take the upper rows' weights", "down_grad.py", "finish(da1, weight1, SET + 1", "finish(da1, weight0, SET + 1", ROUTINGS),
    ("dw of the lower rows is that of the upper", "down_grad.py", "gl.store(dw_out + rows1, dw1,", "gl.store(dw_out + rows1, dw0,", ROUTINGS),
    ("Z of the lower rows is that of the upper", "down_grad.py", "fetch_z(SET + 1, row0 + DOWN, col0 + RIGHT)", "fetch_z(SET + 1, row0, col0 + RIGHT)", ROUTINGS),
    ("dZ written over the next expert's rows", "down_grad.py", "if row0 + da.shape[0] <= row_end:", "if row0 <= row_end:", ROUTINGS),
    ("dw without its last partial sum", "down_grad.py", "for _ in range(blocks):", "for _ in range(blocks - 1):", ROUTINGS),
    ("dw of dropped slots is not zero", "down_grad.py", "tl.load(part, mask=kept, other=0.0)", "tl.load(part, mask=kept, other=1.0)", ROUTINGS),
    ("interleaved gate and up swapped", "epilogue.py", "gate, up = pairs(left)", "up, gate = pairs(left)", INTERLEAVED),
    ("interleaved dZ swapped", "down_grad.py", "gl.join(d_gate, d_up)", "gl.join(d_up, d_gate)", INTERLEAVED),
    ("interleaved Z one column too far", "down_grad.py", "tma_load(self.z, [row0, 2 * col0]", "tma_load(self.z, [row0, 2 * col0 + 8]", INTERLEAVED),
    ("bias of the first expert for all", "epilogue.py", "self.bias + expert.to(gl.int64) * width + cols", "self.bias + cols", BIAS),
    ("bias of up read from the gate half", "epilogue.py", "biased(up0, expert, N + col0, 2 * N)", "biased(up0, expert, col0, 2 * N)", BIAS),
    ("last chunk of a tile without its bias", "epilogue.py", "        right1 = epilogue.biased(right1, expert, col0 + HALF + CHUNK, out.width)\n", "", WIDE_BIAS),
    ("dw without the bias's share", "down_grad.py", "        dw += tl.load(bias_dot_ptr", "        tl.load(bias_dot_ptr", BIAS),
    ("activation of experts without a gate as of the first chunk", "epilogue.py", "epilogue.activated(right, 1.0)", "epilogue.activated(left, 1.0)", GATELESS),
    ("low-rank factor of the first expert for all", "mainloop.py", "load_columns(self.factor, b, ready, tile, k0, self.RANK, self.N", "load_columns(self.factor, b, ready, tile, k0, self.RANK, 0", LORA),
    ("transposed low-rank factor of the first expert for all", "mainloop.py", "load_columns(self.factor, b, ready, tile, k0, self.RANK,", "load_columns(self.factor, b, ready, tile, k0, 0,", LORA),
    ("up columns read from the gate half", "mainloop.py", "matrices, [gate_row + N, k0]", "matrices, [gate_row, k0]", ROUTINGS),
    ("low-rank rows begin one row late", "mainloop.py", "tma_load(self.low, [tile.row0, k0]", "tma_load(self.low, [tile.row0 + 1, k0]", LORA),
    ("both groups take the upper half of the low-rank rows", "mainloop.py", "a = a.slice(ROW0, acc.shape[0])\n            if not", "a = a.slice(0, acc.shape[0])\n            if not", LORA),
    ("the low-rank part alone counts", "mainloop.py", "            acc = warpgroup_mma(a, b, acc, is_async=True)\n            acc = warpgroup_mma_wait(1, deps=(acc,))\n            ring", "            acc = warpgroup_mma(a, b, acc, use_acc=False, is_async=True)\n            acc = warpgroup_mma_wait(1, deps=(acc,))\n            ring", LORA),
    ("every low-rank block is the first", "mainloop.py", "k0 = block * self.LOW_K", "k0 = 0 * self.LOW_K", LORA128),
    ("fp8: scales of a row's first k block for all", "fp8.py", "block.to(gl.int64) * self.pitch", "block.to(gl.int64) * 0", FP8),
    ("fp8: weight's scale of the first k block for all", "fp8.py", "columns = block * self.k_stride", "columns = block * 0", FP8),
    ("fp8: weight's scales of the first expert for all", "fp8.py", "tile.expert.to(gl.int64) * self.expert_stride", "tile.expert.to(gl.int64) * 0", FP8),
    ("fp8: up with the scales of gate", "fp8.py", "left, right = tile.n, self.column_blocks + tile.n", "left, right = tile.n, tile.n", FP8),
    ("fp8: right columns with the scales of the left", "fp8.py", "next_rows * next_right.to", "next_rows * next_left.to", FP8),
    ("fp8: first scales of the tile before", "fp8.py", "scales.of_tile(following, following.row0 + ROW0", "scales.of_tile(tile, tile.row0 + ROW0", FP8),
    ("fp8: both groups multiply the upper half", "fp8.py", "a = a.slice(ROW0, ROWS)", "a = a.slice(0, ROWS)", FP8),
    ("fp8: right columns are the left ones", "fp8.py", "b.slice(HALF, HALF, dim=1), layout)", "b.slice(0, HALF, dim=1), layout)", FP8),
    ("fp8: the second piece begins where a whole block would end", "fp8.py", "block // blocks * inner +", "block // blocks * (blocks * SIDE) +", FP8),
    ("fp8: the first codes of a row for every k block", "fp8.py", "[tile.row0, block * SIDE]", "[tile.row0, block * 0]", FP8),
    ("fp8: low-rank part of the left columns for the right", "fp8.py", "factor.slice(COL0, COLUMNS, dim=1)", "factor.slice(0, COLUMNS, dim=1)", FP8),
    ("dequantised: codes of the first expert for all", "dequantizing.py", "first = tile.expert * self.rows", "first = tile.expert * 0", IN_LOAD),
    ("dequantised: scales of the first expert for all", "dequantizing.py", "tile.expert.to(gl.int64) * self.expert_stride", "tile.expert.to(gl.int64) * 0", IN_LOAD),
    ("dequantised: right columns with the scale of the left", "dequantizing.py", "(right.to(gl.float32) * right_scale)", "(right.to(gl.float32) * left_scale)", IN_LOAD),
    ("dequantised: right columns are the left ones", "dequantizing.py", "self.buffers.index(2 * slot + 1).load(layout)", "self.buffers.index(2 * slot).load(layout)", IN_LOAD),
    ("dequantised: scales of the first k block for all", "dequantizing.py", "gl.minimum(k0, self.K - 1) // self.SIDE", "k0 * 0", IN_LOAD),
    ("dequantised: scales of the first columns for all", "dequantizing.py", "gl.minimum(tile.n * self.BLOCKS + BLOCK,", "gl.minimum(BLOCK,", IN_LOAD),
    ("dequantised: up with the scales of gate", "dequantizing.py", "n_block = BLOCK * blocks_n + tile.n", "n_block = tile.n", IN_LOAD),
    ("dequantised: up's codes are gate's", "dequantizing.py", "first + block * self.N + tile.n", "first + tile.n", IN_LOAD),
    ("rows in expert order taken for tokens", "../../backends/gluon.py", "return TokenRows(dout, plan.top_k)", "return TokenRows(super().gather(dout, plan), plan.top_k)", ROUTINGS),
]  # fmt: skip


DELAYED = ("-k", "delays", "tests/device/test_delays_gpu.py")
_EMPTY, _READY = "ring.await_empty(step)\n", "ring.await_ready(step)\n"
# what the bug is, file, text, replacement
BARRIER_MUTANTS = [
    ("no wait for a group's turn", "ring.py", "    mbarrier.wait(turns.index(WARPGROUP), (tile + 1 - WARPGROUP) & 1)\n", "    pass\n"),
    ("a stage is filled before it is empty", "mainloop.py", f"            {_EMPTY}            if K_BLOCKS", "            if K_BLOCKS"),
    ("the second of two stages is filled before it is empty", "mainloop.py", "                ring.await_empty(step + 1)\n", "                pass\n"),
    ("a stage is multiplied before it is full", "mainloop.py", f"BLOCK_K):\n        {_READY}", "BLOCK_K):\n"),
    ("one group gives a stage back for both", "gemm.py", "2 if COOPERATIVE else 1)", "1)"),
    ("a stage counts as full without its rows", "mainloop.py", "b.numel * 2 if self.GATHER else (a.numel + b.numel) * 2", "b.numel * 2"),
    ("gathered rows are not waited for", "gemm.py", "1 + (128 if GATHER else 1 if SIDE else 0)", "1"),
    ("codes are read before they have come", "dequantizing.py", "        mbarrier.wait(self.ready.index(slot), (count // self.SLOTS) & 1)\n", ""),
    ("wgrad's stage is filled before it is empty", "wgrad.py", f"            {_EMPTY}", ""),
    ("wgrad's stage is multiplied before it is full", "wgrad.py", f"            {_READY}", ""),
    ("one group of wgrad gives a stage back for both", "wgrad.py", "(BLOCK_K, BLOCK_N), 129, 2)", "(BLOCK_K, BLOCK_N), 129, 1)"),
    ("one group gives a stage of a wide tile back for both", "down_grad.py", "READY_COUNT, 2 if COOPERATIVE else 1)", "READY_COUNT, 1)"),
    ("Z is read before it has come", "down_grad.py", "        mbarrier.wait(self.z_arrived.index(SET), z_phase)\n", ""),
    ("a stage of codes is filled before it is empty", "fp8.py", f"            {_EMPTY}            a, b, ready = ring.stage(step)\n", "            a, b, ready = ring.stage(step)\n"),
    ("codes are multiplied before they are there", "fp8.py", f"                {_READY}                a, b, _ready = ring.stage(step)\n", "                a, b, _ready = ring.stage(step)\n"),
]  # fmt: skip


class Mutant(NamedTuple):
    """One planted bug, and pytest's arguments that must notice it. ``file`` is relative to ROOT."""

    title: str
    file: str
    text: str
    replacement: str
    tests: tuple[str, ...]
    times: int = 1

    def plant(self, source: str) -> str | None:
        """``source`` with the bug; None if the text is not there exactly as often as it was."""
        return source.replace(self.text, self.replacement) if source.count(self.text) == self.times else None


@dataclass(frozen=True)
class Suite:
    """Mutants and how their tests are run: ``timeout`` is in seconds, of one mutant's tests."""

    mutants: list[Mutant]
    interpreted: bool
    timeout: float
    command: tuple[str, ...] = PYTEST


def interpreted_suite() -> Suite:
    """The Triton kernels, in the interpreter."""
    mutants = []
    for title, file, text, replacement, *times in MUTANTS:
        tests = {"router.py": ROUTER_TESTS, "dequantize.py": PACKED_TESTS, "plan.py": [*TESTS, *PACKED_TESTS], "factors.py": FACTOR_TESTS, "fp8.py": FP8_TESTS, "round.py": FP8_TESTS, "dact.py": [*FP8_TESTS, *TESTS], "row_pass.py": [*FACTOR_TESTS, *TESTS], "../../activation.py": [*TESTS, AT_A_BOUND]}.get(file, TESTS)
        mutants.append(Mutant(title, f"{TRITON}/{file}", text, replacement, ("-k", QUICK, *tests), *times))
    return Suite(mutants, True, 600)


def gpu_suite() -> Suite:
    """The kernels for Hopper, compiled."""
    mutants = [
        Mutant(title, f"{HOPPER}/{file}", text, replacement, ("-k", tests, *GPU_TESTS))
        for title, file, text, replacement, tests in GPU_MUTANTS
    ]
    return Suite(mutants, False, 180)


def barrier_suite() -> Suite:
    """The kernels for Hopper with random delays, compiled."""
    mutants = [Mutant(title, f"{HOPPER}/{file}", text, replacement, DELAYED)
               for title, file, text, replacement in BARRIER_MUTANTS]  # fmt: skip
    return Suite(mutants, False, 1200)  # each waits until those before it ran


def why_no_gpu() -> str | None:
    """None if the kernels for Hopper run on this machine, else why not."""
    if not torch.cuda.is_available():
        return "torch.cuda.is_available() is false here"
    if torch.cuda.get_device_capability()[0] != 9:
        return f"this is a {torch.cuda.get_device_name()}"
    from moe_kernels.kernels.hopper import gluon_names

    lacking = gluon_names.lacks()
    return f"the Gluon of triton {triton.__version__} has no {lacking}" if lacking else None


#: How a test fails on a kernel that does not compile: the mutant is no working program, whatever it should have been.
_NO_PROGRAM = re.compile(
    r"[\w.]*(?:SyntaxError|NameError|AttributeError|TypeError|ImportError|ModuleNotFoundError|UnboundLocalError"
    r"|Compil\w+|OutOfResources)\b|RuntimeError: PassManager|.*PTXASError"
)
_SUMMARY = re.compile(r"^(?:FAILED|ERROR) .*? - (.*)$", re.MULTILINE)


def run_tests(suite: Suite, folder: Path, tests: tuple[str, ...], cache: Path) -> tuple[int | None, str]:
    """(exit code of the tests on the copy in ``folder``, their output); no code if they did not end in time."""
    # COLUMNS: pytest cuts the reason of a failure to the width of the terminal.
    # PYTHONPATH: the copy first, and then what this process has, which may be another triton than the installed one.
    paths = os.pathsep.join(filter(None, [str(folder / "src"), os.environ.get("PYTHONPATH")]))
    variables = os.environ | {"PYTHONPATH": paths, "TRITON_CACHE_DIR": str(cache), "COLUMNS": "400"}
    variables.pop("TRITON_INTERPRET", None)
    if suite.interpreted:
        variables["TRITON_INTERPRET"] = "1"
    try:
        done = subprocess.run(
            [*suite.command, *tests], cwd=folder, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", timeout=suite.timeout, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return None, ""
    return done.returncode, done.stdout


def verdict(code: int | None, output: str) -> tuple[bool, str]:
    """(whether the tests noticed, what they said) of a mutant's tests that ended with ``code``."""
    if code is None:
        return False, "did not end in time"
    if code < 0 and code != -signal.SIGKILL:
        return True, f"crashed with {signal.Signals(-code).name}"
    reason = next(iter(_SUMMARY.findall(output)), "")
    if code != 1:
        return False, f"survived (exit code {code})"
    if _NO_PROGRAM.match(reason):
        return False, f"no working program: {reason}"
    return True, reason


def problem_of_sources(suite: Suite, folder: Path, cache: Path, pool: ThreadPoolExecutor) -> str | None:
    """Why the tests can say nothing: they must pass, and not be skipped, on unbroken kernels. Fills ``cache``."""
    selections = list(dict.fromkeys(mutant.tests for mutant in suite.mutants))
    runs = [pool.submit(run_tests, suite, folder, tests, cache) for tests in selections]
    for tests, run in zip(selections, runs, strict=True):
        code, output = run.result()
        if code != 0:
            return f"{' '.join(tests)} fails without any mutant (exit code {code}):\n{output[-3000:]}"
        if not re.search(r"\b[1-9]\d* passed", output):
            return f"{' '.join(tests)} runs no test:\n{output[-3000:]}"
    return None


def judge(suite: Suite, mutant: Mutant, folders: queue.Queue[Path], cache: Path) -> dict[str, object]:
    """Plant one bug in a free copy, run its tests there, take it out again."""
    began, folder = time.monotonic(), folders.get()
    path = (folder / mutant.file).resolve()
    source = path.read_text()
    planted = mutant.plant(source)
    if planted is None:
        killed, note = False, f"the text to replace is there {source.count(mutant.text)} times: update the mutant"
    else:
        # A cache of its own, which knows the unbroken kernels: only what the mutant changes is compiled.
        with tempfile.TemporaryDirectory(dir=folder) as own:
            if cache.exists():
                shutil.copytree(cache, own, dirs_exist_ok=True)
            path.write_text(planted)
            killed, note = verdict(*run_tests(suite, folder, mutant.tests, Path(own)))
            path.write_text(source)
    folders.put(folder)
    return {"mutant": mutant.title, "file": mutant.file.rpartition("/")[2], "killed": killed, "note": note,
            "seconds": round(time.monotonic() - began, 1)}  # fmt: skip


def run_suite(suite: Suite, jobs: int) -> Iterable[dict[str, object]]:
    """What became of each mutant, as they end.

    Raises:
        SystemExit: the tests do not pass on the unbroken kernels.
    """
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(jobs) as pool:
        folders: queue.Queue[Path] = queue.Queue()
        for number in range(jobs):
            folder = Path(name, f"copy-{number}")
            for part in ("src", "tests", "pyproject.toml"):
                source = ROOT / part
                if source.is_dir():
                    shutil.copytree(source, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(source, folder / part)
            folders.put(folder)
        cache = Path(name, "cache")
        problem = problem_of_sources(suite, folder, cache, pool)
        if problem is not None:
            raise SystemExit(f"nothing can be said: {problem}")
        runs: list[Future[dict[str, object]]] = [
            pool.submit(judge, suite, mutant, folders, cache) for mutant in suite.mutants
        ]
        for run in as_completed(runs):
            yield run.result()


def main(arguments: list[str] | None = None) -> int:
    """Run every mutant; print one line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--gpu", action="store_true", help="the kernels for Hopper, on such a GPU")
    which.add_argument("--barriers", action="store_true", help="the barriers of their warps, on such a GPU")
    jobs = max(1, (os.cpu_count() or 1) * 3 // 4)
    parser.add_argument(
        "--jobs", type=int, default=jobs, help="mutants at a time (default: three quarters of the cores)"
    )
    parser.add_argument("--only", metavar="TEXTS", help="those whose description or file has one of these: gemm.py,group")
    parser.add_argument("--json", type=Path, help="write what became of each mutant, after each")
    wanted = parser.parse_args(arguments)
    reason = why_no_gpu() if wanted.gpu or wanted.barriers else None
    if reason is not None:
        print(f"{'--gpu' if wanted.gpu else '--barriers'} needs an NVIDIA Hopper GPU (H100, H200): {reason}")
        return 2
    suite = barrier_suite() if wanted.barriers else gpu_suite() if wanted.gpu else interpreted_suite()
    if wanted.only:
        texts = wanted.only.split(",")
        chosen = [mutant for mutant in suite.mutants if any(text in mutant.title + mutant.file for text in texts)]
        if not chosen:
            parser.error(f"no mutant has {' or '.join(texts)} in its description or file")
        suite = replace(suite, mutants=chosen)
    results: list[dict[str, object]] = []
    command = ["python", "tests/core/mutations.py", *(sys.argv[1:] if arguments is None else arguments)]
    machine = environment() | {"command": " ".join(command)}
    began = time.monotonic()
    for result in run_suite(suite, wanted.jobs):
        results.append(result)
        print(f"{'dead ' if result['killed'] else 'ALIVE'}  {result['mutant']}: {result['note']}"[:200], flush=True)
        if wanted.json:
            report = {"mutants": len(suite.mutants), "seconds": round(time.monotonic() - began, 1),
                      "environment": machine, "results": results}  # fmt: skip
            wanted.json.write_text(json.dumps(report, indent=1) + "\n")
    killed = sum(bool(result["killed"]) for result in results)
    print(f"{killed} of {len(suite.mutants)} mutants killed in {time.monotonic() - began:.0f} s")
    return int(killed < len(suite.mutants))


if __name__ == "__main__":
    sys.exit(main())
