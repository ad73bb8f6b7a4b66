"""What is trained: the families, the engines, and what all runs of one call share."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_kernels.shapes import FAMILIES, REAL_FAMILIES
from moe_kernels.tools.plan.estimate import Assumptions, Rates, estimate

STOCK, OURS = "grouped_mm", "moe_kernels"
LARGE, FULL = "qwen3-moe", "qwen3-moe-full"  # LoRA, and all weights
ENGINES = ONE, DDP, FSDP2, AXOLOTL_EP, TRAINER_ONE, TRAINER, EP = (
    "one GPU", "ddp", "fsdp2", "axolotl-ep", "trainer one GPU", "trainer", "ep",
)  # fmt: skip
#: Those that transformers' Trainer runs without Axolotl, and how transformers spreads the model over N ranks.
LAYOUTS = {TRAINER_ONE: (), TRAINER: ("fsdp_size",), EP: ("fsdp_size", "ep_size")}
BY_AXOLOTL = (ONE, DDP, FSDP2, AXOLOTL_EP)
EXPERT_PARALLEL = (AXOLOTL_EP, EP)
#: What each family is trained by. Eight experts of Mixtral on two GPUs are data parallelism in disguise.
CELLS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(FAMILIES, (ONE, FSDP2, AXOLOTL_EP, TRAINER_ONE, TRAINER, EP)),
    "mixtral": (ONE, FSDP2, TRAINER_ONE, TRAINER),
    LARGE: (ONE, DDP, FSDP2, AXOLOTL_EP),
    FULL: (FSDP2, AXOLOTL_EP),
}
DECODER_LAYERS = {
    "mixtral": "MixtralDecoderLayer",
    "qwen2-moe": "Qwen2MoeDecoderLayer",
    "deepseek-v3": "DeepseekV3DecoderLayer",
    LARGE: "Qwen3MoeDecoderLayer",
    FULL: "Qwen3MoeDecoderLayer",
}
RUNS = Path("artifacts") / "runs" / "scaling"
Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """What all runs share."""

    gpus: int
    steps: int
    warmup: int
    tiny: bool
    timeout_s: float
    newest: str | None  # folder of a transformers of 5.19 or later, for Trainer's engines
    newest_axolotl: str | None  # folders of an Axolotl of 0.20 or later and what it needs, for its expert parallelism
    liger: bool = False  # Liger's norms, rotary embedding and loss in Axolotl's runs, stock's and ours

    def size(self, family: str) -> str:
        """The name of the size in ``moe_kernels.shapes``."""
        known = (FAMILIES | REAL_FAMILIES)[model_of(family)]
        return "tiny" if self.tiny else known.large

    def folder(self, family: str, engine: str, experts: str) -> Path:
        """Where a training of Axolotl keeps what it writes."""
        return RUNS / f"{family}-{self.size(family)}-{engine}-{experts}{'-liger' if self.liger else ''}"

    def ranks(self, engine: str) -> int:
        """GPUs that an engine trains on."""
        return 1 if engine in (ONE, TRAINER_ONE) else self.gpus


def model_of(family: str) -> str:
    """The family of ``moe_kernels.shapes``."""
    return LARGE if family == FULL else family


def cuda() -> bool:
    """Whether there are GPUs to train on."""
    return torch.cuda.is_available()


def python_path(folders: str | None) -> str:
    """PYTHONPATH with ``folders`` in front."""
    return os.pathsep.join(path for path in (folders, os.environ.get("PYTHONPATH")) if path)


def full_micro_batch(gpus: int, memory: float, sequence: int = 4096) -> int | None:
    """Sequences of a step with which all weights of Qwen3-30B-A3B train under FSDP2 in ``memory`` bytes a GPU.

    By ``moe-kernels plan``: bfloat16 weights, gradients and optimizer state, as Axolotl keeps them, and a twentieth
    of the memory left to NCCL, CUDA and fragmentation. None: not even one fits.
    """
    for sequences in (4, 2, 1):
        bytes_kept = Assumptions(sequences * sequence, sequence, weight_bytes=2, grad_bytes=2, optimizer_bytes=4)
        if estimate("qwen3-30b-a3b", gpus, 1, Rates(1.0, 1.0, ""), bytes_kept).memory < 0.95 * memory:
            return sequences
    return None
