"""Synthetic comparisons with known numbers."""

from __future__ import annotations

from typing import Any

from moe_kernels.tools.compare.comparison import Comparison
from moe_kernels.tools.compare.gpu import Gpu, Samples
from moe_kernels.tools.compare.runner import RunResult

STEPS, WARMUP, START = 40, 10, 1_700_000_000.0


def losses(offset: float = 0.0) -> list[float]:
    return [10.0 - 0.05 * step + offset for step in range(STEPS)]


def run(run_id: str, step_ms: float, *, memory: float = 20.0, calls: int | None = None, **changes: Any) -> RunResult:
    """A finished training of 40 steps; 1000 tokens a step, the first step after 30 s."""
    role = run_id.rpartition("-")[0]
    values = changes.pop("losses", losses())
    rows = []
    for i, loss in enumerate(values):
        rows.append(
            {
                "train/loss": loss,
                "train/grad_norm": changes.get("first_norm", 2.0),
                "train/tokens/trainable": 1000 * (i + 1),
                "train/tokens/train_per_sec_per_gpu": 1e6 / step_ms,
                # The highest peak is in the warm-up: it counts all the same.
                "train/memory/max_allocated (GiB)": memory if i == 0 else memory - 1,
                "train/memory/max_active (GiB)": memory + 1,
                "_timestamp": START + 30 + i * step_ms / 1000 + (5 if i >= WARMUP - 1 else 0),
                **({} if calls is None else {"train/moe/expert_calls": calls}),
            }
        )
    changes.pop("first_norm", None)
    times = [START + 0.1 * i for i in range(600)]
    steady = [float(rows[WARMUP - 1]["_timestamp"]), float(rows[-1]["_timestamp"])] if len(rows) > WARMUP else [0, 0]
    inside = [steady[0] <= t <= steady[1] for t in times]
    fast = role == "optimized"
    return RunResult(
        run_id=run_id,
        role=role,
        status=changes.pop("status", "finished"),
        command=["python", "-m", "axolotl.cli.main", "train", "derived.yml"],
        source=f"{role}.yml",
        config=changes.pop(
            "config",
            {"bf16": True, "max_steps": STEPS, **({"experts_implementation": "moe_kernels"} if fast else {})},
        ),
        overrides={"max_steps": STEPS, "output_dir": "x"},
        uses_kernels=changes.pop("uses_kernels", fast),
        log="train.log",
        started_at=START,
        trainer_started_at=START + 20,
        ended_at=START + 60,
        exit_code=0,
        rows=rows,
        samples=Samples(
            t=times,
            busy=[95.0 if x else 1.0 for x in inside],
            memory=[30.0] * 600,
            power=[500.0 if x else 90.0 for x in inside],
            counters_t=times,
            sm_active=[80.0 if x else 0.0 for x in inside],
            tensor_active=[(40.0 if fast else 30.0) if x else 0.0 for x in inside],
            dram_active=[50.0 if x else 0.0 for x in inside],
        ),
        wandb={
            "project": "moe-kernels" if fast else "moe-baseline",
            "name": run_id,
            "id": "a",
            "file": "f",
            "complete": "yes",
        },
        plugin_line="moe_kernels: backend=triton (sm_90), 10 expert calls dispatched in step 1" if calls else "",
        fingerprint="f",
        versions={},
        **changes,
    )


def layer_row(name: str, forward: float, both: float, launches: int, saved: float | None) -> dict[str, Any]:
    def spread(value: float) -> dict[str, float]:
        return {"median": value, "p20": value * 0.99, "p80": value * 1.01}

    return {
        "implementation": name,
        "ok": True,
        "note": "",
        "dtype": "bfloat16",
        "forward_ms": spread(forward),
        "forward_backward_ms": spread(both),
        "forward_tflops": 500 / forward,
        "forward_backward_tflops": 1500 / both,
        "dense_fraction": 2.8 / both,
        "launches_forward": launches // 3,
        "launches_forward_backward": launches,
        "saved_mb": saved,
        "peak_mb": 1000.0,
        "rel_error": {"out": 3e-3, "dx": 4e-3},
    }


def experts() -> dict[str, Any]:
    return {
        "measurements": [
            layer_row("eager", 3.6, 10.7, 300, 1121.0),
            layer_row("grouped_mm", 3.0, 7.7, 60, 1057.0),
            layer_row("moe_kernels", 1.4, 3.9, 12, 481.0),
            layer_row("dense", 0.9, 2.8, 6, None),
        ],
        "layer": {
            "name": "mixtral-1b",
            "tokens": 16384,
            "hidden": 1024,
            "intermediate": 3584,
            "experts": 8,
            "top_k": 2,
        },
        "moe_layers": 10,
        "default": "grouped_mm",
        "error": "",
    }


def comparison(**changes: Any) -> Comparison:
    """187 ms a step against 150 ms, 20 GiB against 18, the same losses but for 1e-3."""
    runs = changes.pop(
        "runs",
        [
            run("baseline-1", 187.0),
            run("optimized-1", 150.0, memory=18.0, calls=10, losses=losses(1e-3)),
            run("baseline-2", 187.0, losses=losses(5e-4)),
        ],
    )
    values: dict[str, Any] = {
        "name": "mixtral",
        "size": "1b",
        "warmup_steps": WARMUP,
        "yaml_diff": "--- a.yml\n+++ b.yml\n@@ -1 +1 @@\n+moe_kernels: true",
        "files": ["a.yml", "b.yml"],
        "planned": [result.run_id for result in runs],
        "command": "moe-kernels compare mixtral",
        "created": "2026-01-01T00:00:00+00:00",
        "versions": {"python": "3.12", "torch": "2.11"},
        "gpu": Gpu("NVIDIA H200", "580", 140.0),
        "cpu": "a processor",
        "runs": runs,
        "experts": experts(),
    }
    return Comparison(**{**values, **changes})
