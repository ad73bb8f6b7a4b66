"""Energy of every step of an expert layer on this GPU: at the power limit it is what sets the time.

    python benchmarks/energy.py --shapes mixtral-1b,deepseek-v3 --out energy.json

Each step runs back to back for a while; NVML's energy counter gives the joules of a call, and its clock is read while
they run. At the power limit the clock falls until the power fits: then a step takes less time only if it takes less
energy. "dense" is torch.mm on as many rows. The clock and the limit are left as they are.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import pynvml
import torch

from moe_kernels.shapes import LAYERS
from moe_kernels.tools.bench.tiles import layer_tensors
from moe_kernels.tools.common.files import write_json
from moe_kernels.tools.common.machine import environment
from step_times import calls_of, dense_calls

_BATCH_SECONDS = 0.02  # of calls between two looks at the clock


class Meter:
    """NVML's counters of the current GPU."""

    def __init__(self) -> None:
        pynvml.nvmlInit()
        self._gpu = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties().uuid}")

    @property
    def limit_watts(self) -> float:
        """The power limit in force."""
        return pynvml.nvmlDeviceGetEnforcedPowerLimit(self._gpu) / 1e3

    def measure(self, call: Callable[[], object], seconds: float) -> dict[str, float]:
        """Run ``call`` back to back for about ``seconds``, after a third of it unmeasured."""
        call()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        torch.cuda.synchronize()
        batch = max(1, int(_BATCH_SECONDS / (time.perf_counter() - begin)))
        self._run(call, batch, seconds / 3)
        joules, clocks = pynvml.nvmlDeviceGetTotalEnergyConsumption(self._gpu), list[int]()
        calls, elapsed = self._run(call, batch, seconds, clocks)
        joules = (pynvml.nvmlDeviceGetTotalEnergyConsumption(self._gpu) - joules) / 1e3
        return {
            "ms": 1e3 * elapsed / calls,
            "joules": joules / calls,
            "watts": joules / elapsed,
            "mhz": sum(clocks) / len(clocks),
        }

    def _run(
        self, call: Callable[[], object], batch: int, seconds: float, clocks: list[int] | None = None
    ) -> tuple[int, float]:
        """(calls, seconds) until ``seconds`` are over."""
        begin, calls = time.perf_counter(), 0
        while time.perf_counter() - begin < seconds:
            for _ in range(batch):
                call()
            if clocks is not None:
                clocks.append(pynvml.nvmlDeviceGetClockInfo(self._gpu, pynvml.NVML_CLOCK_SM))
            torch.cuda.synchronize()
            calls += batch
        return calls, time.perf_counter() - begin


def main() -> None:
    """Measure every step of every layer and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="mixtral-1b,qwen3-30b-a3b,deepseek-v3", help="comma-separated layers")
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="of every step: the counter advances every tenth of a second"
    )
    parser.add_argument("--out", type=Path, default=Path("energy.json"))
    args = parser.parse_args()
    if unknown := [name for name in args.shapes.split(",") if name not in LAYERS]:
        parser.error(f"no layer {', '.join(unknown)}: choose from {', '.join(LAYERS)}")
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        raise SystemExit("This needs an NVIDIA Hopper GPU (H100, H200).")
    meter, rows = Meter(), []
    for name in args.shapes.split(","):
        t = layer_tensors(LAYERS[name], 128, torch.device("cuda"))
        for who, steps in (("gluon", calls_of("gluon", t)), ("dense", dense_calls(t))):
            for step, call in steps.items():
                found = meter.measure(call, args.seconds)
                rows.append({"shape": name, "who": who, "step": step, **found})
                text = (
                    f"{found['ms']:8.3f} ms {found['watts']:4.0f} W {found['mhz']:5.0f} MHz {found['joules']:7.3f} J"
                )
                print(f"{name:16} {who:6} {step:13} {text}", flush=True)
        del t
        torch.cuda.empty_cache()
        write_json(
            args.out,
            {
                "schema": 1,
                "kind": "energy",
                "limit_watts": meter.limit_watts,
                "environment": environment(),
                "rows": rows,
            },
        )


if __name__ == "__main__":
    main()
