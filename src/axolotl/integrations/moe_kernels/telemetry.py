"""Writes how the routers of a training load the experts into the trainer's log and into a file of the run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from axolotl.utils.logging import get_logger
from transformers import TrainerCallback

from moe_kernels.telemetry import load as router_load
from moe_kernels.telemetry.counter import RouterCounter
from moe_kernels.telemetry.load import Loads

LOG = get_logger(__name__)
#: Between two writes to the file: the records that a killed training loses at most.
SECONDS = 5.0
#: A record covers at least one in so many of the steps before it: a record a step would take gigabytes.
FINEST = 100


class RouterCallback(TrainerCallback):
    """Reads the counters when the trainer logs or saves, and at no other step: reading waits for the device.

    The trainer's log gets what was counted since its last log, whatever was saved in between. The file gets a record
    at each log of the first 100 steps, at fewer later (``FINEST``), and at each save.
    """

    def __init__(self, trainer: Any, counter: RouterCounter, folder: str, each_layer: bool) -> None:
        self.trainer = trainer
        self.counter = counter
        self.file: Path | None = Path(folder, router_load.FILE_NAME)
        self.each_layer = each_layer
        self.unwritten: list[tuple[int, Loads]] = []
        self.unlogged: Loads | None = None
        self.unrecorded: Loads | None = None
        self.read_at = self.recorded_at = 0
        self.written = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not hasattr(self.trainer, "store_metrics"):
            LOG.warning(f"moe_kernels: this trainer keeps no metrics of callbacks; router telemetry: {self.file}")
        self.counter.open()  # the end of an earlier training closed it
        self.unlogged = self.unrecorded = None
        self.read_at = self.recorded_at = state.global_step
        layers = self.counter.layers
        names, experts = [layer.name for layer in layers], [layer.experts for layer in layers]
        self._write(state, router_load.head(names, experts, state.global_step), "a" if state.global_step else "w")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not control.should_log:
            return
        self._read(state)
        if FINEST * (self.read_at - self.recorded_at) >= self.read_at:
            self._record()
        if self.unlogged is not None and hasattr(self.trainer, "store_metrics"):
            self.trainer.store_metrics(metrics(self.unlogged, self.each_layer), train_eval="train")
        self.unlogged = None

    on_epoch_end = on_step_end  # logging_strategy: epoch

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Here the device is busy with gradients; at the end of a step it would wait.
        if time.monotonic() - self.written >= SECONDS:
            self._write_records(state)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._read(state)
        self._record()  # a training that resumes from there counts from there
        self._write_records(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_save(args, state, control)
        self.counter.close()

    def _read(self, state: Any) -> None:
        if state.global_step == self.read_at:
            return
        loads = self.counter.take()  # of all processes: each is here at the same steps
        self.unlogged = loads if self.unlogged is None else self.unlogged + loads
        self.unrecorded = loads if self.unrecorded is None else self.unrecorded + loads
        self.read_at = state.global_step

    def _record(self) -> None:
        if self.unrecorded is not None:
            self.unwritten.append((self.read_at, self.unrecorded))
            self.unrecorded, self.recorded_at = None, self.read_at

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
    imbalance, entropy, dead, dropped = numbers
    found = {
        "moe/load_imbalance": max(imbalance),
        "moe/load_imbalance_mean": sum(imbalance) / len(imbalance),
        "moe/load_entropy": min(entropy),
        "moe/dead_experts": float(sum(dead)),
        "moe/dropped_share": sum(dropped) / len(dropped),
    }
    if each_layer:
        names = ("load_imbalance", "load_entropy", "dead_experts", "dropped_share")
        for name, of_layers in zip(names, numbers, strict=True):
            for layer, value in enumerate(of_layers):
                found[f"moe/layer_{layer:02d}/{name}"] = float(value)
    return found


def idle_balancing(model: torch.nn.Module) -> str | None:
    """A warning where the configuration has a load-balancing loss that is not trained on, else None."""
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
