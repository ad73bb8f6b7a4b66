"""An Axolotl plugin that turns router telemetry off and on while a model trains: see telemetry_cost.py."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from axolotl.integrations.base import BasePlugin
from transformers import TrainerCallback

from axolotl.integrations.moe_kernels.telemetry import RouterCallback
from moe_kernels.telemetry.counter import RouterCounter
from telemetry_cost import PARTS, TIMES, telemetry_is_on


class TelemetrySwitch(BasePlugin):
    """Add after moe-kernels' own plugin, with ``moe_router_telemetry`` on."""

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[TrainerCallback]:
        """The callback that does it."""
        return [_Switch(trainer)]


class _Timed(RouterCounter):
    """Adds up the host's time in its hooks."""

    spent = 0.0

    def _hook(self, number: int) -> Any:
        count = super()._hook(number)

        def timed(*args: Any) -> None:
            began = time.perf_counter()
            count(*args)
            self.spent += time.perf_counter() - began

        return timed


class _Switch(TrainerCallback):
    """Times each step from its begin to the begin of the next, the trainer's log included, switching left out."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.on = False
        self.began: float | None = None
        self.step_ms: list[float] = []
        self.parts: dict[str, list[float]] = {name: [] for name in PARTS}
        self.read_at: list[int] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.began is not None:
            self.step_ms.append(1000 * (time.perf_counter() - self.began))
        telemetry, on = self._telemetry(), telemetry_is_on(state.global_step)
        if not on:  # what is still to be written waits for a step with telemetry
            telemetry.counter.close()
            telemetry.on_step_end = telemetry.on_pre_optimizer_step = lambda *args, **kwargs: None
            telemetry.read_at = state.global_step + 1  # nothing to read at a save or at the end
        elif not self.on:
            telemetry.counter.close()
            telemetry.counter = _Timed(model)
            telemetry.on_step_end, telemetry.on_pre_optimizer_step = self._log, self._write
        self.on = on
        self.began = time.perf_counter()

    def _telemetry(self) -> RouterCallback:
        return next(c for c in self.trainer.callback_handler.callbacks if isinstance(c, RouterCallback))

    def _log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        telemetry = self._telemetry()
        counter = telemetry.counter
        assert isinstance(counter, _Timed)
        self.read_at.append(state.global_step)
        self.parts["hooks_ms"].append(1000 * counter.spent)
        counter.spent = 0.0
        # What follows reads from the device, so it waits anyway: the wait is not telemetry's own work.
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        began = time.perf_counter()
        type(telemetry).on_step_end(telemetry, args, state, control, **kwargs)
        self.parts["log_ms"].append(1000 * (time.perf_counter() - began))

    def _write(self, *args: Any, **kwargs: Any) -> None:
        telemetry = self._telemetry()
        began = time.perf_counter()
        type(telemetry).on_pre_optimizer_step(telemetry, *args, **kwargs)
        self.parts["write_ms"].append(1000 * (time.perf_counter() - began))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        times = {"step_ms": self.step_ms, "read_at": self.read_at, **self.parts}
        Path(args.output_dir, TIMES).write_text(json.dumps(times))
