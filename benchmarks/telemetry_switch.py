"""An Axolotl plugin that turns router telemetry off and on while a model trains: see telemetry_cost.py."""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from telemetry_cost import telemetry_is_on
from transformers import TrainerCallback

from axolotl.integrations.moe_kernels.telemetry import RouterCallback
from moe_kernels.integrations.router_counter import RouterCounter


class TelemetrySwitch(BasePlugin):
    """Add after moe-kernels' own plugin, with ``moe_router_telemetry`` on."""

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[TrainerCallback]:
        """The callback that does it."""
        return [_Switch(trainer)]


class _Switch(TrainerCallback):
    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        telemetry = next(c for c in self.trainer.callback_handler.callbacks if isinstance(c, RouterCallback))
        on, was_on = telemetry_is_on(state.global_step), "on_step_end" not in vars(telemetry)
        if on and not was_on:
            telemetry.counter = RouterCounter(model)
            del telemetry.on_step_end
        elif was_on and not on:
            telemetry.counter.close()
            telemetry.on_step_end = lambda *args, **kwargs: None
