"""Measure tiles: every candidate of every GEMM kernel on one layer, checked before it is timed.

The winner of a bucket is verified on hostile problems before it may enter a table: output and every gradient against
float64, unwritten memory poisoned, twice and bitwise equal.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import triton

from moe_kernels.activation import Activation, Gate
from moe_kernels.backends.triton import TritonBackend
from moe_kernels.kernels.device import interpreting
from moe_kernels.kernels.tiles.config import use_config
from moe_kernels.kernels.tiles.table import GemmConfig, table
from moe_kernels.kernels.tiles.tuned import Key, Sizes, bucket
from moe_kernels.layer import Weight
from moe_kernels.shapes import LAYERS, LayerShape
from moe_kernels.tools.bench.accuracy import Error
from moe_kernels.tools.bench.layer import make_layer
from moe_kernels.tools.check.problems import Case
from moe_kernels.tools.check.verification import verify_case

STEPS = TritonBackend()
#: The six GEMMs of a layer, and the kernel that runs each.
CALLS = {
    "up": "up",
    "down": "down",
    "dgrad": "dgrad",
    "dgrad (dA0)": "dgrad",
    "wgrad": "wgrad",
    "wgrad (dW2)": "wgrad",
}
#: A candidate whose result differs by more from that of the tile in use is wrong: both round the same sums once.
LARGEST_DIFFERENCE = 1e-2
#: A tile must be this much faster than the one in use to replace it: less is noise.
GAIN = 0.98
#: Multiples of 16, so that they load as real layers do, and of no tile: every edge has a partial tile.
VERIFY_SHAPES = (LayerShape("ragged", 257, 144, 80, 16, 4), LayerShape("uneven", 130, 272, 208, 3, 2))
VERIFY_ROUTINGS = ("random", "one_hot_expert", "sentinels")
VERIFY_TOKENS, VERIFY_EXPERTS = 1024, 8

# block_n, block_k, warps, stages: candidates of the row-tiled kernels, whose block_m is the group size.
_UP = [(128, 64, 8, 3), (128, 64, 8, 4), (128, 32, 8, 4), (64, 64, 8, 4), (64, 64, 4, 3), (64, 64, 4, 4)]
_ROWS = [(256, 64, 8, 3), (256, 64, 8, 4), (128, 64, 8, 4), (128, 64, 4, 4), (128, 128, 8, 3), (128, 64, 4, 3)]
# With block_m.
_WGRAD = [
    (128, 256, 64, 8, 3), (256, 128, 64, 8, 3), (128, 256, 64, 8, 4), (256, 128, 64, 8, 4), (128, 256, 32, 8, 4),
    (128, 128, 64, 8, 4), (128, 128, 64, 4, 4), (128, 128, 64, 4, 3), (64, 256, 64, 4, 3),
]  # fmt: skip
Progress = Callable[[str], object]


def candidates(kernel: str, group: int) -> list[GemmConfig]:
    """Configurations worth trying for ``kernel`` with ``group`` rows per tile."""
    if kernel == "wgrad":
        return [GemmConfig(*tile) for tile in _WGRAD]
    tiles = _UP if kernel == "up" else _ROWS
    if group == 256:
        tiles = [(n // 2, k, warps, stages) for n, k, warps, stages in tiles if warps == 8]
    return [
        GemmConfig(group, n, k, warps, stages, flatten=flatten, programs_per_sm=per_sm)
        for n, k, warps, stages in tiles
        for per_sm in ((1, 2) if warps == 4 else (1,))
        for flatten in ((False,) if kernel == "up" else (False, True))
    ]


@dataclass(frozen=True)
class Timing:
    """One candidate on one GEMM of one layer."""

    shape: str  # the layer
    call: str  # the GEMM, one of CALLS
    key: Key  # the line of the table that it could become
    config: GemmConfig
    ms: float | None  # median; None if it was not timed
    default_ms: float  # of the tile in use without tuning, timed before and after this one
    fault: str = ""  # why it was not timed: it does not fit the GPU, or its result is wrong
    wrong: bool = False  # it ran, and its result is wrong


def sizes_of(call: str, shape: LayerShape) -> Sizes:
    """Rows per expert, columns and inner length of one GEMM of ``shape``."""
    hidden, intermediate = shape.hidden, shape.intermediate
    width, depth = {
        "up": (intermediate, hidden),
        "down": (hidden, intermediate),
        "dgrad": (hidden, 2 * intermediate),
        "dgrad (dA0)": (intermediate, hidden),
        "wgrad": (hidden, 2 * intermediate),
        "wgrad (dW2)": (intermediate, hidden),
    }[call]
    return Sizes(shape.rows // shape.experts, width, depth)


def loads(shape: LayerShape, device: torch.device) -> str:
    """How the kernels load ``shape`` in 16 bits on ``device``: "tma" or "pointer"."""
    modern = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)
    return "tma" if modern and shape.hidden % 16 == 0 and shape.intermediate % 16 == 0 else "pointer"


def layer_tensors(shape: LayerShape, group: int, device: torch.device) -> SimpleNamespace:
    """A layer's plan, inputs and intermediate tensors: random bf16 data, mildly skewed routing."""
    layer = make_layer(shape, "mild", device, torch.bfloat16)
    t = SimpleNamespace(x=layer.x.detach(), dout=layer.grad_out, experts=shape.experts, ids=layer.topk_ids)
    t.gate_up, t.down = Weight(layer.gate_up.detach()), Weight(layer.down.detach())
    t.weights = layer.topk_weights.detach()
    t.gate = Gate(Activation("silu"))
    t.plan = STEPS.make_plan(t.ids, t.experts, group)
    t.z, t.a = STEPS.up(t.x, t.gate_up, t.plan, t.gate, True)
    t.dout_rows, t.x_rows = STEPS.gather(t.dout, t.plan), STEPS.gather(t.x, t.plan)
    done = STEPS.down_grad(t.dout_rows, t.down, t.z, t.weights, t.plan, t.gate, True)
    t.dz, t.wa = done.dz, done.wa
    return t


def gemms(shape: LayerShape, group: int, device: torch.device) -> dict[str, Callable[[], torch.Tensor]]:
    """The six GEMMs of a layer on the tensors above: name of the call -> a call of it."""
    t = layer_tensors(shape, group, device)
    return {
        "up": lambda: STEPS.up(t.x, t.gate_up, t.plan, t.gate, True)[1],
        "down": lambda: STEPS.down(t.a, t.down, t.plan),
        "dgrad": lambda: STEPS.dgrad(t.dz, t.gate_up, t.plan),
        "dgrad (dA0)": lambda: STEPS.dgrad(t.dout_rows, t.down, t.plan),
        "wgrad": lambda: STEPS.wgrad(t.dz, t.x_rows, t.plan),
        "wgrad (dW2)": lambda: STEPS.wgrad(t.dout_rows, t.wa, t.plan),
    }


def relative_difference(result: torch.Tensor, expected: torch.Tensor) -> float:
    """||result - expected|| / ||expected||, in float32 a part at a time: gradients of all experts are large."""
    error = Error()
    for ours, truth in zip(result.chunk(64), expected.chunk(64), strict=True):
        error.add(ours, truth.float())
    return error.value()


def attempt(call: Callable[[], torch.Tensor], kernel: str, config: GemmConfig) -> torch.Tensor | str:
    """The result with this tile, or why the tile does not run on this GPU."""
    try:
        with use_config(kernel, config):
            return call()
    except (triton.runtime.errors.OutOfResources, triton.runtime.errors.PTXASError) as error:
        return f"does not fit: {str(error).splitlines()[0]}"
    except RuntimeError as error:
        if "PassManager" not in str(error):
            raise
        return "Triton's compiler fails on it"


def default_tile(kernel: str, group: int, loads: str, device: torch.device) -> GemmConfig:
    """The tile in use without tuning."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return table(capability, torch.bfloat16, loads == "tma")[kernel, None if kernel == "wgrad" else group]


def median_ms(call: Callable[[], object]) -> float:
    """Time of one call in milliseconds; where there is no GPU, of the interpreter."""
    if interpreting():
        begin = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - begin)
    return float(triton.testing.do_bench(call, warmup=5, rep=25, return_mode="median"))


def time_shape(shape: LayerShape, group: int, device: torch.device, progress: Progress) -> list[Timing]:
    """Check every candidate of every GEMM of ``shape`` against the tile in use, and time those that are right."""
    found = []
    how = loads(shape, device)
    for name, call in gemms(shape, group, device).items():
        kernel = CALLS[name]
        key = Key(kernel, None if kernel == "wgrad" else group, how, bucket(sizes_of(name, shape)))
        default = default_tile(kernel, group, how, device)
        with use_config(kernel, default):
            expected = call()
            default_ms = [median_ms(call)]
        for config in candidates(kernel, group):
            if config == default:
                continue
            progress(f"{shape.name}, group size {group}: {name} {describe(config)}")
            timing = functools.partial(Timing, shape.name, name, key, config, default_ms=default_ms[-1])
            result = attempt(call, kernel, config)
            if isinstance(result, str):
                found.append(timing(ms=None, fault=result))
                continue
            difference = relative_difference(result, expected)
            if not difference <= LARGEST_DIFFERENCE:
                fault = f"differs from the tile in use by {difference:.1e}"
                found.append(timing(ms=None, fault=fault, wrong=True))
                continue
            # The GPU's clocks drift with its temperature: the tile in use is timed before and after each candidate.
            with use_config(kernel, config):
                ms = median_ms(call)
            with use_config(kernel, default):
                default_ms.append(median_ms(call))
            found.append(timing(ms=ms, default_ms=statistics.mean(default_ms[-2:])))
    return found


def ranking(timings: Iterable[Timing]) -> dict[Key, list[tuple[float, GemmConfig]]]:
    """For each key the faster tiles that are right on all its GEMMs: (time over that of the tile in use, tile)."""
    by_key: dict[Key, list[Timing]] = {}
    for timing in timings:
        by_key.setdefault(timing.key, []).append(timing)
    ranks = {}
    for key, members in by_key.items():
        gemm_count = len({(timing.shape, timing.call) for timing in members})
        ratios: dict[GemmConfig, list[float]] = {}
        for timing in members:
            if timing.ms is not None:
                ratios.setdefault(timing.config, []).append(timing.ms / timing.default_ms)
        means = [(statistics.geometric_mean(r), config) for config, r in ratios.items() if len(r) == gemm_count]
        ranks[key] = sorted((mean for mean in means if mean[0] <= GAIN), key=lambda mean: mean[0])
    return ranks


def verify_tile(key: Key, config: GemmConfig, shapes: Iterable[LayerShape], device: torch.device) -> list[str]:
    """What is wrong with a tile on hostile problems and on small versions of ``shapes``; empty if nothing is."""
    small = [
        dataclasses.replace(
            shape,
            tokens=min(shape.tokens, VERIFY_TOKENS),
            experts=min(shape.experts, VERIFY_EXPERTS),
            top_k=min(shape.top_k, shape.experts, VERIFY_EXPERTS),
        )
        for shape in shapes
    ]
    group: Any = key.group_size or 128
    failures = []
    with use_config(key.kernel, config):
        for shape in (*VERIFY_SHAPES, *small):
            for verdict in verify_case(
                Case.of(shape, torch.bfloat16),
                shape.name,
                device=device,
                routings=VERIFY_ROUTINGS,
                configurations=((group, True), (group, False)),
                backend="triton",
            ):
                failures += [f"{shape.name}: {failure}" for failure in verdict.failures]
    return failures


class Tuned(NamedTuple):
    """The outcome for one key: the accepted tile (None keeps the one in use), and the refused ones."""

    key: Key
    config: GemmConfig | None
    ratio: float
    refused: tuple[tuple[GemmConfig, str], ...]


def choose(timings: list[Timing], shapes: list[LayerShape], device: torch.device, progress: Progress) -> list[Tuned]:
    """For each key the fastest tile that passes :func:`verify_tile`."""
    chosen = []
    for key, ranked in ranking(timings).items():
        members = {timing.shape for timing in timings if timing.key == key}
        refused: list[tuple[GemmConfig, str]] = []
        accepted, ratio = None, 1.0
        for speed, config in ranked:
            progress(f"verifying {key.kernel}, {key.bucket}: {describe(config)}")
            failures = verify_tile(key, config, [shape for shape in shapes if shape.name in members], device)
            if not failures:
                accepted, ratio = config, speed
                break
            refused.append((config, failures[0]))
        chosen.append(Tuned(key, accepted, ratio, tuple(refused)))
    return chosen


def describe(config: GemmConfig) -> str:
    """A tile in one short phrase."""
    flags = " flat" * config.flatten + f" x{config.programs_per_sm}" * (config.programs_per_sm > 1)
    return f"{config.block_m}x{config.block_n}x{config.block_k} w{config.num_warps} s{config.num_stages}{flags}"


def compile_ahead(shapes: list[str], groups: list[int], jobs: int) -> None:
    """Fill Triton's cache with every candidate, by ``jobs`` processes."""
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        for done in [pool.submit(_compile_share, shapes, groups, jobs, share) for share in range(jobs)]:
            done.result()


def _compile_share(shapes: list[str], groups: list[int], jobs: int, share: int) -> None:
    """One process's part. With few tokens and experts, which compile to the same kernels."""
    device = torch.device("cuda")
    for name, group in itertools.product(shapes, groups):
        layer = LAYERS[name]
        calls = gemms(dataclasses.replace(layer, tokens=256, experts=min(layer.experts, 16)), group, device)
        runs = [(call, config) for call, kernel in CALLS.items() for config in candidates(kernel, group)]
        for call, config in runs[share::jobs]:
            attempt(calls[call], CALLS[call], config)
