"""``axolotl``, which also draws weights, and keeps what it logs, what the experts ran on and what they are kept in.

Run as ``python -m moe_kernels.tools.compare.trainer train CONFIG.yml --launcher python``. The run file cannot tell:
plugins choose an implementation, or replace the class, while the model's config still names another one. The weights
of a model that has none on the disk are drawn here (:mod:`moe_kernels.tools.compare.weights`).
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from axolotl.cli.main import main  # first: it sets what later imports read
from transformers import TrainerCallback, trainer
from transformers.integrations import rewrite_logs

from moe_kernels.tools.compare.held import frozen, implementation
from moe_kernels.tools.compare.runner import RECORD
from moe_kernels.tools.compare.weights import DrawnWeights


class Recorder(TrainerCallback):
    """Writes lines of JSON. The first, at the end of the first step, says what ran the experts that were called in
    it, what the frozen ones take, what the training started from where that was drawn, and which run of W&B it is.
    Each other one is what the trainer logs of a step, under W&B's names, and when.
    """

    def __init__(self, file: Path, drawn: DrawnWeights) -> None:
        self.file, self.drawn = file, drawn
        self.called: set[str] = set()
        self.hooks: list[Any] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        for module in model.modules():
            if (name := implementation(module)) is None:
                continue
            if args.torch_compile:  # a hook would change its graphs
                self.called.add(name)
            else:
                self.hooks.append(module.register_forward_pre_hook(lambda *_, name=name: self.called.add(name)))

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == 1:
            run = getattr(sys.modules.get("wandb"), "run", None)  # None too where W&B is switched off
            self._write(
                experts=", ".join(sorted(self.called)) or "no experts module",
                frozen=frozen(model),
                weights=self.drawn.checksum,
                wandb={"project": run.project, "id": run.id, "name": run.name or ""} if run else {},
            )
        while self.hooks:
            self.hooks.pop().remove()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs:  # neither an evaluation nor the sum of the training
            self._write(_timestamp=time.time(), **rewrite_logs(logs))

    def _write(self, **entry: Any) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps(entry, default=float) + "\n")  # numbers of numpy and torch too


def train(*more: Any) -> None:
    """Run ``axolotl`` on this process's arguments, with these callbacks of Trainer and ``more``."""
    callbacks: list[Any] = trainer.DEFAULT_CALLBACKS
    drawn = DrawnWeights().installed()
    callbacks += [drawn, *more]
    if os.environ.get("RANK", "0") == "0":  # Trainer's own state takes each rank on a CPU for the first
        callbacks.append(Recorder(Path(sys.argv[2]).with_name(RECORD), drawn))
    main()


if __name__ == "__main__":
    train()
