"""Time transformers' routers and the fused one on this GPU: the evidence behind docs/router.md.

    python benchmarks/router_cost.py --tokens 16384 --out router.json

Each router runs in bfloat16 with its linear, forward alone and forward with backward, as in a training under autocast
and without. Times are medians of round-robin calls, the L2 cache flushed before each.
"""

from __future__ import annotations

import argparse
import importlib
import json
import types
from pathlib import Path
from typing import Any

import torch

from moe_kernels.integrations.router import install_fused_router
from moe_kernels.tools.bench.timing import Clock, count_launches
from moe_kernels.tools.common.machine import environment

# family, class, hidden size, experts, experts a token, groups, groups kept
ROUTERS = [
    ("mixtral", "MixtralTopKRouter", 1024, 8, 2, 1, 1),
    ("qwen2_moe", "Qwen2MoeTopKRouter", 1024, 64, 8, 1, 1),
    ("deepseek_v3", "DeepseekV3TopkRouter", 1024, 128, 8, 8, 4),
    ("qwen3_moe", "Qwen3MoeTopKRouter", 2048, 128, 8, 1, 1),
    ("deepseek_v3", "DeepseekV3TopkRouter", 7168, 256, 8, 8, 4),
]


def make(family: str, name: str, hidden: int, experts: int, top_k: int, groups: int, kept: int) -> Any:
    """A router module of transformers with random weights, and its fused twin in a model of one module."""
    config = types.SimpleNamespace(
        hidden_size=hidden, num_experts=experts, num_local_experts=experts, num_experts_per_tok=top_k,
        norm_topk_prob=True, routed_scaling_factor=2.5, n_group=groups, topk_group=kept,
    )  # fmt: skip
    module = getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), name)(config)
    torch.nn.init.normal_(module.weight, std=hidden**-0.5)
    module.weight.data = module.weight.data.bfloat16()
    return module.cuda()


def measure(router: tuple[Any, ...], tokens: int, autocast: bool, repeats: int) -> dict[str, Any]:
    """Times and launches of one router, stock and fused."""
    stock, fused = make(*router), make(*router)
    install_fused_router(torch.nn.ModuleList([fused]))
    x = torch.randn(tokens, router[2], device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(tokens, router[4], device="cuda")

    def forward(module: Any) -> Any:
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            return module(x)

    def both(module: Any) -> None:
        weights = forward(module)[1]
        weights.backward(grad.to(weights.dtype))

    def cleanup() -> None:
        x.grad = stock.weight.grad = fused.weight.grad = None

    clock = Clock(x.device)
    result: dict[str, Any] = {"router": list(router), "tokens": tokens, "autocast": autocast}
    for what, call in (("forward", forward), ("forward_backward", both)):
        calls = {"stock": lambda call=call: call(stock), "fused": lambda call=call: call(fused)}
        for warm in calls.values():
            warm()
            cleanup()
        for who, times in clock.compare(calls, repeats, cleanup, lambda: None).items():
            launches = count_launches(calls[who])
            result[f"{who}_{what}"] = {
                "ms": times.total.median,
                "gpu_ms": times.queued.median if times.queued else None,
                "gpu_ms_p20_p80": (times.queued.p20, times.queued.p80) if times.queued else None,
                "host_ms": times.host.median,
                "launches": launches.kernels if launches else None,
            }
            cleanup()
    return result


def main() -> None:
    """Measure every router and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path("router.json"))
    args = parser.parse_args()
    rows = []
    for router in ROUTERS:
        for autocast in (False, True):
            row = measure(router, args.tokens, autocast, args.repeats)
            rows.append(row)
            for what in ("forward", "forward_backward"):
                a, b = row[f"stock_{what}"], row[f"fused_{what}"]
                print(f"{router[1]} E{router[3]} H{router[2]} autocast={autocast:d} {what}")
                for who, cost in (("stock", a), ("fused", b)):
                    times = f"{cost['gpu_ms']:.3f} ms GPU, {cost['host_ms']:.3f} ms host"
                    print(f"    {who}: {times}, {cost['launches']} launches")
    args.out.write_text(
        json.dumps({"schema": 1, "kind": "router", "environment": environment(), "rows": rows}, indent=1)
    )


if __name__ == "__main__":
    main()
