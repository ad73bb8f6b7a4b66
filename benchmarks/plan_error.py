"""Write into docs/planning.md how far `moe-kernels plan` was from what was measured on several GPUs.

    python benchmarks/plan_error.py [--check]

Every committed result of ``benchmarks/scaling.py`` from GPUs is read. A step on several GPUs is predicted from the
measured step of one (its compute), the all-to-all and FSDP traffic of the estimate, and the link speed that it
assumes; memory by its formulas. So what is judged is what the estimate says of several GPUs, not the speed of a
kernel, which it takes from measurements.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import pages
from moe_kernels.shapes import FAMILIES, TOKENS_PER_STEP, ModelShape
from moe_kernels.tools.plan.estimate import Assumptions, Estimate, Model, Rates, estimate

# As the run files of the 1B models train: bfloat16 weights, gradients and states, activations kept.
TRAINED = Assumptions(
    TOKENS_PER_STEP, other_flops=1.0, weight_bytes=2, grad_bytes=2, optimizer_bytes=4, checkpointing=False
)
#: Engines that are judged, and whether the experts are spread. Those of Trainer need Trainer's step on one GPU.
JUDGED = {"fsdp2": ("one GPU", False), "axolotl-ep": ("one GPU", True),
          "trainer": ("trainer one GPU", False), "ep": ("trainer one GPU", True)}  # fmt: skip
COLUMNS = ("file", "family", "engine", "GPUs", "experts", "step ms: predicted, measured", "error",
           "peak GiB: predicted, measured", "error")  # fmt: skip


def model_of(shape: ModelShape) -> Model:
    """A 1B model as the estimate takes it."""
    hidden, heads, extras = shape.hidden, shape.heads, shape.extras
    if "kv_lora_rank" in extras:  # DeepSeek-V3's attention (MLA): q_a, q_b, kv_a, kv_b, o
        query = extras["qk_nope_head_dim"] + extras["qk_rope_head_dim"]
        value, q_rank, kv_rank = extras["v_head_dim"], extras["q_lora_rank"], extras["kv_lora_rank"]
        attention = hidden * q_rank + q_rank * heads * query + hidden * (kv_rank + extras["qk_rope_head_dim"])
        attention += kv_rank * heads * (extras["qk_nope_head_dim"] + value) + heads * value * hidden
        width, shared = heads * (query + value), 3 * hidden * shape.intermediate
    else:
        attention = 2 * hidden * (hidden + hidden // heads * shape.kv_heads)
        width, shared = 2 * hidden, 3 * hidden * extras.get("shared_expert_intermediate_size", 0)
    return Model(
        shape.layer(TOKENS_PER_STEP), shape.layers, shape.moe_layers, int(attention), int(width),
        int(shared) + shape.experts * hidden, int(3 * hidden * extras.get("intermediate_size", 0)), shape.vocab,
    )  # fmt: skip


def predicted(family: str, gpus: int, spread: bool, alone_ms: float) -> tuple[Estimate, float]:
    """The estimate, and milliseconds of a step whose compute took ``alone_ms`` on one GPU."""
    shape = FAMILIES[family].sizes["1b"]
    row = estimate(shape.name, gpus, gpus if spread else 1, Rates(1.0, 1.0, ""), TRAINED, model_of(shape))
    row = dataclasses.replace(row, experts_s=alone_ms / 1000, other_s=0.0)
    assert row.step_s is not None
    return row, 1000 * row.step_s


def judged(name: str, data: dict[str, Any]) -> list[dict[str, Any]]:
    """Prediction and measurement of every run on several GPUs of a family that the estimate can be given."""
    by = {(row["family"], row["engine"], row["experts"]): row for row in data["rows"] if row["ok"]}
    found = []
    for (family, engine, experts), row in sorted(by.items()):
        if family not in FAMILIES or engine not in JUDGED:
            continue
        base, spread = JUDGED[engine]
        alone = by.get((family, base, experts)) or by.get((family, "one GPU", experts))
        if alone is None:
            continue
        plan, step_ms = predicted(family, row["gpus"], spread, alone["step_ms"]["median"])
        found.append({
            "file": name, "family": family, "engine": engine, "gpus": row["gpus"], "experts": experts,
            "step_ms": (step_ms, row["step_ms"]["median"]), "peak_gib": (plan.memory / 2**30, row["peak_gib"]),
        })  # fmt: skip
    return found


def error(pair: tuple[float, float]) -> float:
    """Of the prediction, relative to the measurement."""
    return pair[0] / pair[1] - 1


def section(rows: list[dict[str, Any]]) -> str:
    """The page's part: how far off in words, and every row."""
    if not rows:
        return "No training on several GPUs is committed yet."
    lines = []
    for what, spread in (("FSDP2 alone", False), ("expert parallelism", True)):
        errors = [error(row["step_ms"]) for row in rows if JUDGED[row["engine"]][1] == spread]
        if errors:
            lines.append(
                f"Step time with {what}, {len(errors)} trainings: off by {statistics.median(errors):+.0%} in the "
                f"median, from {min(errors):+.0%} to {max(errors):+.0%} (- is predicted too fast)."
            )
    peaks = [error(row["peak_gib"]) for row in rows if row["experts"] == "moe_kernels" and row["peak_gib"][1]]
    if peaks:
        lines.append(
            f"Peak memory with moe_kernels, {len(peaks)} trainings: off by {statistics.median(peaks):+.0%} in the "
            f"median, from {min(peaks):+.0%} to {max(peaks):+.0%} (- is predicted too small)."
        )
    table = pages.table(COLUMNS, [_cells(row) for row in rows])
    return "\n".join(f"- {line}" for line in lines) + "\n\n" + table


def _cells(row: dict[str, Any]) -> list[str]:
    (step, took), (peak, held) = row["step_ms"], row["peak_gib"]
    memory = [f"{peak:.1f}, {held:.1f}", f"{error((peak, held)):+.0%}"] if held else ["", ""]
    return [f"`{row['file']}`", row["family"], row["engine"], str(row["gpus"]), row["experts"],
            f"{step:.0f}, {took:.0f}", f"{error((step, took)):+.0%}", *memory]  # fmt: skip


def parts(root: Path) -> dict[str, str]:
    """What belongs into docs/planning.md."""
    rows = []
    for path in sorted((root / "benchmarks" / "results").glob("*.json")):
        data = json.loads(path.read_bytes())
        if data.get("kind") == "scaling" and data["environment"]["gpu"]:
            rows += judged(path.name, data)
    return {"docs/planning.md": section(rows)}


if __name__ == "__main__":
    sys.exit(pages.main(__doc__ or "", "error", parts))
