"""Time tile configurations of every GEMM kernel on this GPU: the evidence behind moe_kernels/tuning/config.py.

    python benchmarks/tune_tiles.py --shapes mixtral-1b,qwen2-moe-1b,deepseek-v3-1b --out tiles.json

Each candidate is checked against the shipped configuration's output before it is timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import subprocess
import sys
from collections.abc import Callable

import torch
import triton

from moe_kernels import triton_backend as steps
from moe_kernels.shapes import LAYERS, LayerShape
from moe_kernels.tuning.config import KERNELS, GemmConfig, use_config

G = GemmConfig


def candidates(kernel: str, group: int) -> list[GemmConfig]:
    """Configurations worth trying; the row-tiled kernels keep block_m = group."""
    if kernel == "up":
        two = [
            (128, 64, 8, 3),
            (128, 64, 8, 4),
            (128, 32, 8, 4),
            (64, 64, 8, 4),
            (64, 64, 4, 3),
            (64, 64, 4, 4),
        ]
    elif kernel == "dact":
        two = [
            (128, 64, 8, 3),
            (128, 64, 8, 4),
            (256, 64, 8, 3),
            (128, 64, 4, 3),
            (64, 64, 4, 4),
            (256, 64, 8, 4),
        ]
    else:
        two = [
            (256, 64, 8, 3),
            (256, 64, 8, 4),
            (128, 64, 8, 4),
            (128, 64, 4, 4),
            (128, 128, 8, 3),
            (128, 64, 4, 3),
        ]
    if kernel.startswith("wgrad"):
        tiles = [(128, 256, 64, 8, 3), (256, 128, 64, 8, 3), (128, 256, 64, 8, 4), (256, 128, 64, 8, 4)]
        tiles += [
            (128, 256, 32, 8, 4),
            (128, 128, 64, 8, 4),
            (128, 128, 64, 4, 4),
            (128, 128, 64, 4, 3),
            (64, 256, 64, 4, 3),
        ]
        return [G(*t, programs_per_sm=p) for t in tiles for p in ((1, 2) if t[3] == 4 else (1,))]
    if group == 256:
        two = [(n // 2, k, w, s) for n, k, w, s in two if w == 8]
    out = []
    for n, k, warps, stages in two:
        for per_sm in (1, 2) if warps == 4 else (1,):
            for flatten in (False, True) if kernel in ("down", "dgrad") else (False,):
                out.append(G(group, n, k, warps, stages, flatten=flatten, programs_per_sm=per_sm))
    return out


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
    dz, wa, _ = steps.dact(dout, down, z, weights, plan, "silu", True)
    return {
        "up": lambda p: steps.up(x, gate_up, plan, "silu", p, True)[1],
        "down": lambda p: steps.down(a, down, plan, p),
        "dact": lambda p: steps.dact(dout, down, z, weights, plan, "silu", p)[0],
        "wgrad_down": lambda p: steps.wgrad(
            dout, wa, plan, gather_left=True, gather_right=False, persistent=p
        ),
        "dgrad": lambda p: steps.dgrad(dz, gate_up, plan, p),
        "wgrad_up": lambda p: steps.wgrad(dz, x, plan, gather_left=False, gather_right=True, persistent=p),
    }


def runs(group: int) -> list[tuple[str, GemmConfig, bool]]:
    """Every (kernel, configuration, persistent) to time."""
    return [
        (kernel, config, persistent)
        for kernel in KERNELS
        for config in candidates(kernel, group)
        for persistent in ((True, False) if config.programs_per_sm == 1 and not config.flatten else (True,))
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
        with use_config(kernel, config):
            return call(persistent)
    except (triton.runtime.errors.OutOfResources, triton.runtime.errors.PTXASError) as error:
        return str(error)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    if any([worker.wait() for worker in workers]):
        raise SystemExit("a compile worker failed; see its traceback above")
    rows = []
    for name, group in itertools.product(shapes, groups):
        shape = LAYERS[name]
        calls = problem(shape, group)
        gemm_flops = 2 * shape.tokens * shape.top_k * shape.hidden * shape.intermediate
        want = {kernel: call(True) for kernel, call in calls.items()}
        for kernel, config, persistent in runs(group):
            got = attempt(calls[kernel], kernel, config, persistent)
            row = {"shape": name, "kernel": kernel, "persistent": persistent, **dataclasses.asdict(config)}
            if isinstance(got, str):
                rows.append(row | {"error": got})
                continue
            error = ((got - want[kernel]).float().norm() / want[kernel].float().norm()).item()
            del got
            with use_config(kernel, config):
                ms = triton.testing.do_bench(
                    lambda: calls[kernel](persistent),
                    warmup=5,
                    rep=25,
                    return_mode="median",  # noqa: B023
                )
            flops = gemm_flops * (1 if kernel in ("down", "dact", "wgrad_down") else 2)
            rows.append(row | {"ms": ms, "tflops": flops / ms / 1e9, "relative_difference": error})
        del calls, want
        torch.cuda.empty_cache()
        for kernel in KERNELS:
            timed = sorted(
                (
                    r
                    for r in rows
                    if r["kernel"] == kernel
                    and r["shape"] == name
                    and "ms" in r
                    and (r["block_m"] == group or kernel.startswith("wgrad"))
                ),
                key=lambda r: r["ms"],
            )
            for r in timed[:4] + timed[-1:]:
                print(
                    f"{name:15s} g{group} {kernel:10s} {r['ms']:.3f} ms {r['tflops']:.0f} TFLOP/s  "
                    f"{r['block_m']}x{r['block_n']}x{r['block_k']} w{r['num_warps']} s{r['num_stages']} "
                    f"flat{int(r['flatten'])} pps{r['programs_per_sm']} p{int(r['persistent'])} diff {r['relative_difference']:.1e}"
                )
    with open(args.out, "w") as file:
        json.dump(
            {
                "gpu": torch.cuda.get_device_name(),
                "torch": torch.__version__,
                "triton": triton.__version__,
                "rows": rows,
            },
            file,
        )


if __name__ == "__main__":
    main()
