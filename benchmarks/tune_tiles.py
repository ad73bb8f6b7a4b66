"""Time tile configurations of every GEMM kernel on this GPU: the evidence behind moe_kernels/tuning/config.py.

    python benchmarks/tune_tiles.py --shapes mixtral-1b,qwen2-moe-1b,deepseek-v3-1b --out tiles.json

Each candidate is checked against the shipped configuration's output before it is timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
import triton

from moe_kernels import triton_backend as steps
from moe_kernels.bench.environment import environment
from moe_kernels.shapes import LAYERS, LayerShape
from moe_kernels.tuning.config import GemmConfig, use_config

G = GemmConfig
CALLS = ("up", "down", "dgrad", "dgrad (dA0)", "wgrad", "wgrad (dW2)")


# Columns, inner block, warps, stages: candidates of the row-tiled kernels, whose block_m is the group size.
UP_TILES = [(128, 64, 8, 3), (128, 64, 8, 4), (128, 32, 8, 4), (64, 64, 8, 4), (64, 64, 4, 3), (64, 64, 4, 4)]
ROW_TILES = [(256, 64, 8, 3), (256, 64, 8, 4), (128, 64, 8, 4), (128, 64, 4, 4), (128, 128, 8, 3), (128, 64, 4, 3)]
WGRAD_TILES = [
    G(128, 256, 64, 8, 3),
    G(256, 128, 64, 8, 3),
    G(128, 256, 64, 8, 4),
    G(256, 128, 64, 8, 4),
    G(128, 256, 32, 8, 4),
    G(128, 128, 64, 8, 4),
    G(128, 128, 64, 4, 4),
    G(128, 128, 64, 4, 3),
    G(64, 256, 64, 4, 3),
]


def candidates(kernel: str, group: int) -> list[GemmConfig]:
    """Configurations worth trying."""
    if kernel == "wgrad":
        return WGRAD_TILES
    tiles = UP_TILES if kernel == "up" else ROW_TILES
    if group == 256:
        tiles = [(n // 2, k, warps, stages) for n, k, warps, stages in tiles if warps == 8]
    return [
        G(group, n, k, warps, stages, flatten=flatten, programs_per_sm=per_sm)
        for n, k, warps, stages in tiles
        for per_sm in ((1, 2) if warps == 4 else (1,))
        for flatten in ((False,) if kernel == "up" else (False, True))
    ]


def walks(kernel: str, config: GemmConfig) -> tuple[bool, ...]:
    """Values of ``persistent`` that make a difference: wgrad never is, and programs_per_sm only counts if it is."""
    if kernel == "wgrad":
        return (False,)
    return (True, False) if config.programs_per_sm == 1 else (True,)


def problem(shape: LayerShape, group: int) -> dict[str, Callable[[bool], torch.Tensor]]:
    """One call per kernel on random data: name -> f(persistent) -> output."""
    generator = torch.Generator("cuda").manual_seed(0)

    def randn(*size: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*size, device="cuda", generator=generator) * scale).bfloat16()

    t, h, i, e, k = shape.tokens, shape.hidden, shape.intermediate, shape.experts, shape.top_k
    x, dout = randn(t, h), randn(t, h)
    gate_up, down = randn(e, 2 * i, h, scale=h**-0.5), randn(e, h, i, scale=i**-0.5)
    skew = torch.randn(e, device="cuda", generator=generator) * 0.3
    logits = torch.randn(t, e, device="cuda", generator=generator) + skew
    weights, ids = logits.softmax(-1).topk(k)
    plan = steps.make_plan(ids, e, group)
    z, a = steps.up(x, gate_up, plan, "silu", True, True)
    dout_rows, x_rows = steps.gather(dout, plan), steps.gather(x, plan)
    dz, wa, _ = steps.dact(steps.dgrad(dout_rows, down, plan, True), z, weights, plan, "silu")
    return {
        "up": lambda p: steps.up(x, gate_up, plan, "silu", p, True)[1],
        "down": lambda p: steps.down(a, down, plan, p),
        "dgrad": lambda p: steps.dgrad(dz, gate_up, plan, p),
        "dgrad (dA0)": lambda p: steps.dgrad(dout_rows, down, plan, p),
        "wgrad": lambda _: steps.wgrad(dz, x_rows, plan),
        "wgrad (dW2)": lambda _: steps.wgrad(dout_rows, wa, plan),
    }


def runs(group: int) -> list[tuple[str, GemmConfig, bool]]:
    """Every (kernel, configuration, persistent) to time."""
    return [
        (kernel, config, persistent)
        for kernel in CALLS
        for config in candidates(kernel.split()[0], group)
        for persistent in walks(kernel.split()[0], config)
    ]


def compile_share(shapes: list[str], groups: list[int], share: int, shares: int) -> None:
    """Fill the compile cache with every ``shares``-th configuration, on few tokens."""
    for name, group in itertools.product(shapes, groups):
        small = dataclasses.replace(LAYERS[name], tokens=256)
        calls = problem(small, group)
        for kernel, config, persistent in runs(group)[share::shares]:
            attempt(calls[kernel], kernel, config, persistent)


def attempt(
    call: Callable[[bool], torch.Tensor], kernel: str, config: GemmConfig, persistent: bool
) -> torch.Tensor | str:
    """The output, or why this configuration does not run on this GPU."""
    try:
        with use_config(kernel.split()[0], config):
            return call(persistent)
    except (triton.runtime.errors.OutOfResources, triton.runtime.errors.PTXASError) as error:
        return str(error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="mixtral-1b,qwen2-moe-1b,deepseek-v3-1b")
    parser.add_argument("--groups", default="128")
    parser.add_argument("--jobs", type=int, default=12, help="processes that compile ahead")
    parser.add_argument("--share", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", default="tiles.json")
    args = parser.parse_args()
    shapes, groups = args.shapes.split(","), [int(g) for g in args.groups.split(",")]
    if args.share is not None:
        return compile_share(shapes, groups, args.share, args.jobs)
    workers = [subprocess.Popen([sys.executable, *sys.argv, f"--share={n}"]) for n in range(args.jobs)]
    if sum(worker.wait() for worker in workers):
        raise SystemExit("a compile worker failed; see its traceback above")
    rows = []
    for name, group in itertools.product(shapes, groups):
        timed = time_shape(name, group)
        rows += timed
        print_best(name, group, timed)
        torch.cuda.empty_cache()
    with open(args.out, "w") as file:
        json.dump({"kind": "tiles", "environment": environment(), "rows": rows}, file)


def time_shape(name: str, group: int) -> list[dict[str, Any]]:
    """Check and time every configuration on one shape."""
    shape = LAYERS[name]
    calls = problem(shape, group)
    gemm_flops = 2 * shape.tokens * shape.top_k * shape.hidden * shape.intermediate
    want = {kernel: call(True) for kernel, call in calls.items()}
    rows = []
    for kernel, config, persistent in runs(group):
        call = functools.partial(calls[kernel], persistent)
        row = {"shape": name, "group": group, "kernel": kernel, "persistent": persistent}
        row |= dataclasses.asdict(config)
        got = attempt(calls[kernel], kernel, config, persistent)
        if isinstance(got, str):
            rows.append(row | {"error": got})
            continue
        error = ((got - want[kernel]).float().norm() / want[kernel].float().norm()).item()
        del got
        with use_config(kernel.split()[0], config):
            ms = triton.testing.do_bench(call, warmup=5, rep=25, return_mode="median")
        flops = gemm_flops * (1 if kernel in ("down", "dgrad (dA0)", "wgrad (dW2)") else 2)
        rows.append(row | {"ms": ms, "tflops": flops / ms / 1e9, "relative_difference": error})
    return rows


def print_best(name: str, group: int, rows: list[dict[str, Any]]) -> None:
    """The four fastest configurations of each kernel."""
    for kernel in CALLS:
        timed = sorted((r for r in rows if r["kernel"] == kernel and "ms" in r), key=lambda r: r["ms"])
        for r in timed[:4]:
            tile = f"{r['block_m']}x{r['block_n']}x{r['block_k']} w{r['num_warps']} s{r['num_stages']}"
            flags = f"flat{r['flatten']:d} pps{r['programs_per_sm']} persistent{r['persistent']:d}"
            print(
                f"{name} g{group} {kernel:10s} {r['ms']:.3f} ms {r['tflops']:.0f} TFLOP/s {tile} {flags} "
                f"difference {r['relative_difference']:.1e}"
            )


if __name__ == "__main__":
    main()
