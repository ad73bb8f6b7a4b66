"""Makes what a comparison trains: random models of a known size, a tokenizer and text, offline and seeded."""

from __future__ import annotations

from typing import Any

from moe_kernels.shapes import ALL_FAMILIES
from moe_kernels.tools.prepare.models import prepare_model
from moe_kernels.tools.prepare.text import prepare_data

__all__ = ["prepare_data", "prepare_model", "tiny_overrides"]


def tiny_overrides(family: str) -> dict[str, Any]:
    """What turns any run file of a family into one that a CPU finishes in a minute.

    Neither bf16 nor fp16: without a GPU, Axolotl's trainer refuses the first and torch's layers the second.
    """
    # The first rows alone, in one process: tokenising all of them would take longer than the training.
    text = {"path": "artifacts/data/stdlib.jsonl", "ds_type": "json", "type": "completion", "field": "text"}
    return {
        "base_model": f"artifacts/models/{ALL_FAMILIES[family].sizes['tiny'].name}",
        "datasets": [{**text, "split": "train[:4]"}],
        "dataset_num_proc": 1,
        "sequence_len": 256,
        "micro_batch_size": 2,
        "max_steps": 20,
        "warmup_steps": 2,
        "learning_rate": 0.003,
        "bf16": False,
        "fp16": False,
        "optimizer": "adamw_torch",
    }
