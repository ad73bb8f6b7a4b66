"""What the routers of a training do: into the trainer's log, and into a file of the run."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
from axolotl.utils.logging import get_logger
from transformers import TrainerCallback

from moe_kernels import router_load
from moe_kernels.integrations.router_counter import RouterCounter
from moe_kernels.router_load import Loads

LOG = get_logger(__name__)
#: Between two writings: what a killed training loses of its records, at most, since its last checkpoint.
SECONDS = 5.0


class RouterCallback(TrainerCallback):
    """Reads the counters when the trainer logs or saves, and at no other step: reading waits for the device.

    Each reading is a record of the file, of what was counted since the one before. What goes into the trainer's log
    is what was counted since the log before, whatever was saved in between.
    """

    def __init__(self, trainer: Any, counter: RouterCounter, folder: str, each_layer: bool) -> None:
        self.trainer = trainer
        self.counter = counter
        self.file: Path | None = Path(folder, router_load.FILE_NAME)
        self.each_layer = each_layer
        self.unwritten: list[tuple[int, Loads]] = []
        self.unlogged: Loads | None = None
        self.read_at = 0
        self.written = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not hasattr(self.trainer, "store_metrics"):
            LOG.warning(f"moe_kernels: this trainer keeps no metrics of callbacks; router telemetry: {self.file}")
        self.counter.open()  # the end of a training before closed it
        self.unlogged, self.read_at = None, state.global_step
        layers = self.counter.layers
        names, experts = [layer.name for layer in layers], [layer.experts for layer in layers]
        self._write(state, router_load.head(names, experts, state.global_step), "a" if state.global_step else "w")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not control.should_log:
            return
        self._read(state)
        if self.unlogged is not None and hasattr(self.trainer, "store_metrics"):
            self.trainer.store_metrics(metrics(self.unlogged, self.each_layer), train_eval="train")
        self.unlogged = None

    on_epoch_end = on_step_end  # logging_strategy: epoch

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Here the device is busy with gradients. At the end of a step, once it was read from, it has nothing to do.
        if time.monotonic() - self.written >= SECONDS:
            self._write_records(state)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._read(state)  # a training that resumes from there counts from there
        self._write_records(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._read(state)
        self._write_records(state)
        self.counter.close()

    def _read(self, state: Any) -> None:
        if state.global_step == self.read_at:
            return
        loads, before = self.counter.take(), self.unlogged  # of all processes: each is here at the same steps
        self.unwritten.append((state.global_step, loads))
        if before is not None:
            loads = dataclasses.replace(loads, tokens=before.tokens + loads.tokens, rows=before.rows + loads.rows)
        self.unlogged, self.read_at = loads, state.global_step

    def _write_records(self, state: Any) -> None:
        if self.unwritten:
            lines = [router_load.record(step, loads.layers()) for step, loads in self.unwritten]
            self._write(state, "".join(lines), "a")
            self.unwritten.clear()
            self.written = time.monotonic()

    def _write(self, state: Any, lines: str, mode: str) -> None:
        if self.file is None or not state.is_world_process_zero:
            return
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open(mode, encoding="utf-8") as file:
                file.write(lines)
        except OSError as error:
            # A full disk must not end a training for the sake of its statistics.
            LOG.warning(f"moe_kernels: router telemetry is not written to {self.file} any more: {error}")
            self.file = None


def metrics(loads: Loads, each_layer: bool) -> dict[str, float]:
    """What goes into the trainer's log: the worst layer and the sums, and each layer if asked for."""
    numbers = loads.numbers()
    found = {
        "moe/load_imbalance": float(numbers.imbalance.max()),
        "moe/load_imbalance_mean": float(numbers.imbalance.mean()),
        "moe/load_entropy": float(numbers.entropy.min()),
        "moe/dead_experts": float(numbers.dead.sum()),
        "moe/dropped_share": float(numbers.dropped_share.mean()),
    }
    if each_layer:
        names = ("load_imbalance", "load_entropy", "dead_experts", "dropped_share")
        for name, of_layers in zip(names, numbers, strict=True):
            for layer, value in enumerate(of_layers):
                found[f"moe/layer_{layer:02d}/{name}"] = float(value)
    return found


def idle_balancing(model: torch.nn.Module) -> str | None:
    """Why the load-balancing loss that the model's configuration names is not trained on; None where all is well."""
    if not hasattr(model, "config"):
        return None
    config = model.config.get_text_config()
    weight = getattr(config, "router_aux_loss_coef", None)
    if not weight or getattr(config, "output_router_logits", True):
        return None
    return (
        f"router_aux_loss_coef is {weight} but output_router_logits is false, so that the load-balancing loss is not "
        "part of the training. Set overrides_of_model_config: {output_router_logits: true} to train on it, or "
        "{router_aux_loss_coef: 0.0} to say that you do not."
    )
