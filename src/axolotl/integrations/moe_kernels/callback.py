"""Proof, from inside the training loop, that the experts ran on moe-kernels."""

from __future__ import annotations

from collections import Counter
from typing import Any

from axolotl.utils.logging import get_logger
from transformers import TrainerCallback

from moe_kernels.backends import dispatch_counts, dispatch_reason
from moe_kernels.settings import ExpertsSettings

LOG = get_logger(__name__)


class DispatchCallback(TrainerCallback):
    """Counts the expert calls of each step, reports the first step in words and fails if it had none."""

    def __init__(self, trainer: Any, settings: ExpertsSettings, expert_layers: int) -> None:
        self.trainer = trainer
        self.settings = settings
        self.expert_layers = expert_layers
        self.before: Counter[str] = Counter()
        self.reported = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.before = Counter(dispatch_counts())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        calls = Counter(dispatch_counts()) - self.before
        if not self.reported:
            self.reported = True
            self._report(calls, state.global_step)
        # Trainers of preference learning bring no metric store; the line above is the proof there.
        if hasattr(self.trainer, "store_metrics"):
            self.trainer.store_metrics({"moe/expert_calls": float(calls.total())}, train_eval="train")

    def _report(self, calls: Counter[str], step: int) -> None:
        if not calls:
            raise RuntimeError(
                f"moe_kernels: step {step} dispatched no expert call, so something replaced the expert "
                "layers after the model was loaded (use_kernels, a patch of the block). Switch it off, or "
                "set moe_kernels: false."
            )
        LOG.info(
            f"moe_kernels: backend={'+'.join(sorted(calls))} ({dispatch_reason()}), {calls.total()} expert "
            f"calls dispatched in step {step}, group_size={self.settings.group_size}, "
            f"persistent={self.settings.persistent}, {self.expert_layers} expert layers"
        )
