"""Hardware counters of the Hopper kernels of whole layers, as NVIDIA's ncu reads them: what each kernel waits for.

    python benchmarks/counters.py --layers mixtral-1b,qwen3-30b-a3b --out counters.json

Needs a Hopper GPU whose counters this user may read, and ncu, which comes with the CUDA toolkit. Half a minute a
layer. The clock is left as it is: under load it is lower than the data sheet's, which is part of the answer.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from moe_kernels import fused_experts
from moe_kernels.shapes import LAYERS
from moe_kernels.tools.bench.layer import make_layer
from moe_kernels.tools.common.files import write_json
from moe_kernels.tools.common.machine import environment

#: Hopper kernels of a forward and backward pass, in the order of their launches; numbers as in moe_kernels.moe.
STEPS = ("up", "down", "down_grad", "wgrad (dW2)", "dgrad (dXr)", "wgrad (dW1)")
#: Name in the results: ncu's metric, and what one of its units is in the unit of the results.
METRICS = {
    "ms": ("gpu__time_duration.sum", 1e-6),
    "cycles": ("sm__cycles_elapsed.max", 1.0),
    "tensor_active_pct": ("sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed", 1.0),
    "issue_active_pct": ("sm__issue_active.avg.pct_of_peak_sustained_elapsed", 1.0),
    "shared_read_pct": ("l1tex__data_bank_reads.avg.pct_of_peak_sustained_elapsed", 1.0),
    "shared_write_pct": ("l1tex__data_bank_writes.avg.pct_of_peak_sustained_elapsed", 1.0),
    "l2_gb": ("lts__t_bytes.sum", 1e-9),
    "l2_pct": ("lts__t_sectors.avg.pct_of_peak_sustained_elapsed", 1.0),
    "dram_pct": ("dram__throughput.avg.pct_of_peak_sustained_elapsed", 1.0),
    "dram_read_gb": ("dram__bytes_read.sum", 1e-9),
    "dram_write_gb": ("dram__bytes_write.sum", 1e-9),
}


def run_layer(name: str) -> None:
    """Forward and backward twice: the first call compiles."""
    layer = make_layer(LAYERS[name], "mild", torch.device("cuda"), torch.bfloat16)
    for _ in range(2):
        fused_experts(layer.x, layer.topk_ids, layer.topk_weights, layer.gate_up, layer.down).backward(layer.grad_out)
        layer.clear_gradients()
    torch.cuda.synchronize()


def parsed(text: str) -> list[dict[str, float | str]]:
    """ncu's raw page as CSV, one kernel in each row -> the metrics of each of STEPS."""
    table = csv.DictReader(line for line in text.splitlines() if not line.startswith("=="))
    units, *kernels = table
    if len(kernels) != len(STEPS):
        raise SystemExit(f"ncu measured {len(kernels)} kernels, not the {len(STEPS)} of a forward and backward pass.")
    rows: list[dict[str, float | str]] = []
    for step, kernel in zip(STEPS, kernels, strict=True):
        row: dict[str, float | str] = {"step": step}
        for name, (metric, unit) in METRICS.items():
            if units[metric] not in ("ns", "cycle", "%", "byte"):
                raise SystemExit(f"ncu gives {metric} in {units[metric]}: this script expects base units.")
            row[name] = round(float(kernel[metric].replace(",", "")) * unit, 4)
        row["clock_ghz"] = round(float(row["cycles"]) / float(row["ms"]) / 1e6, 3)
        rows.append(row)
    return rows


def counted(name: str) -> list[dict[str, float | str]]:
    """The metrics of each of STEPS for one of LAYERS, measured in a process of its own."""
    ncu = shutil.which("ncu")
    if ncu is None:
        raise SystemExit("There is no ncu on the PATH. Cure: add the bin folder of the CUDA toolkit to it.")
    metrics = ",".join(metric for metric, _ in METRICS.values())
    kernels = ["--kernel-name", "regex:hopper", "--launch-skip", str(len(STEPS)), "--launch-count", str(len(STEPS))]
    command = [ncu, "--clock-control", "none", *kernels, "--metrics", metrics, "--csv", "--page", "raw",
               "--print-units", "base", sys.executable, __file__, "--run", name]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"ncu failed on {name}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return parsed(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="mixtral-1b,qwen3-30b-a3b", help=f"of {', '.join(LAYERS)}")
    parser.add_argument("--out", type=Path, default=Path("counters.json"))
    parser.add_argument("--run", help=argparse.SUPPRESS)  # what ncu watches
    arguments = parser.parse_args()
    if arguments.run:
        run_layer(arguments.run)
        return
    names = arguments.layers.split(",")
    if unknown := [name for name in names if name not in LAYERS]:
        parser.error(f"no layer {', '.join(unknown)}: choose from {', '.join(LAYERS)}")
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        raise SystemExit("This needs an NVIDIA Hopper GPU (H100, H200).")
    rows = []
    for name in names:
        for row in counted(name):
            rows.append({"layer": name, **row})
            print(*(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
    write_json(arguments.out, {"schema": 1, "kind": "counters", "environment": environment(), "rows": rows})


if __name__ == "__main__":
    main()
