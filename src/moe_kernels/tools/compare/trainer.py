"""``axolotl``, which also logs what the experts of the model ran on and what they are kept in, and draws weights.

Run as ``python -m moe_kernels.tools.compare.trainer train CONFIG.yml --launcher python``. The run file cannot tell:
plugins choose an implementation, or replace the class, while the model's config still names another one. The weights
of a model that has none on the disk are drawn here (:mod:`moe_kernels.tools.compare.weights`).
"""

from __future__ import annotations

import json
from typing import Any

from axolotl.cli.main import main  # first: it sets what later imports read
from transformers import TrainerCallback, trainer

from moe_kernels.tools.compare.held import frozen, implementation
from moe_kernels.tools.compare.lines import EXPERTS_LINE, FROZEN_LINE
from moe_kernels.tools.compare.weights import DrawnWeights


class ExpertsRecorder(TrainerCallback):
    """Prints, after the first step, what ran the experts that were called in it, and what the frozen ones take."""

    def __init__(self) -> None:
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
        if state.global_step == 1 and state.is_world_process_zero:
            print(EXPERTS_LINE + (", ".join(sorted(self.called)) or "no experts module"), flush=True)
            if held := frozen(model):
                print(FROZEN_LINE + json.dumps(held), flush=True)
        while self.hooks:
            self.hooks.pop().remove()


def train(*more: Any) -> None:
    """Run ``axolotl`` on this process's arguments, with these callbacks of Trainer and ``more``."""
    callbacks: list[Any] = trainer.DEFAULT_CALLBACKS
    callbacks += [ExpertsRecorder, DrawnWeights().installed(), *more]
    main()


if __name__ == "__main__":
    train()
