"""Counts what each expert of a model is given, on the device, without waiting for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed

from moe_kernels.integrations.transformers import experts_modules
from moe_kernels.router_load import LayerLoad

# Names under which model configurations keep the number of routed experts.
_EXPERTS_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# Histograms that a layer keeps before it adds them up: some kilobytes, and a reading copies all of them.
_MOST = 32


@dataclass
class _Layer:
    """One expert layer.

    Attributes:
        name: of the module.
        experts: of the whole layer, on all ranks.
        seen: ids that its experts function can be given: ``experts``, or this rank's own under transformers'
            expert parallelism, which hands it ids of its own and one id for all others.
        histograms: (1 + seen,) on the device, one of each call since the last reading, first the ids of -1.
        rows: tokens x K since the last reading, counted on the host from shapes.
    """

    name: str
    experts: int
    seen: int
    histograms: list[torch.Tensor] = field(default_factory=list)
    rows: int = 0

    def add(self, ids: torch.Tensor) -> None:
        """Count ``ids`` (any shape, integers), those outside [0, seen) as rows alone."""
        self.rows += ids.numel()
        # With its range given, histc never waits for the device; bincount does. On a CPU it knows no integers. One
        # bin more than experts, for -1: the range of a single expert would be empty, and histc would look for one.
        values = ids.double() if ids.device.type == "cpu" else ids
        if len(self.histograms) == _MOST:
            self.histograms = [self.total()]
        # Kept, not added to a counter: the host pays for each operation, in every layer of every step.
        self.histograms.append(torch.histc(values, bins=self.seen + 1, min=-1, max=self.seen - 1))

    def total(self) -> torch.Tensor:
        """(1 + seen,): the sum of the histograms."""
        return torch.stack(self.histograms).sum(0)


class RouterCounter:
    """Counts the routed rows of every expert of a model, in training mode only.

    A hook of each experts module sees the ids that the router gives it, whichever implementation runs the experts.
    Per layer and call it makes a histogram of the ids on the device: no copy to the host and no wait.
    A call inside a backward pass is a recomputation (gradient checkpointing) and is not counted again. Padding
    counts, for the experts work on it. Under ``torch.compile`` each layer costs a graph break.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        """Hook the experts modules of ``model``; ValueError where it has none."""
        modules = experts_modules(model)
        if not modules:
            raise ValueError(
                f"{type(model).__name__} has no experts module that dispatches through transformers' experts "
                "interface, so that there is no routing to count: set moe_router_telemetry: false."
            )
        self.layers = [_layer(name, module) for name, module in modules]
        self._hooks = [
            module.register_forward_pre_hook(self._hook(layer), with_kwargs=True)
            for layer, (_, module) in zip(self.layers, modules, strict=True)
        ]

    def close(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()

    def take(self) -> list[LayerLoad]:
        """The counts since the last call, of all ranks together, and start again. Waits for the device.

        Where several processes train, all must call it at the same step: it adds up over them.
        """
        parallel = torch.distributed.is_available() and torch.distributed.is_initialized()
        loads = self._everywhere() if parallel else self._here()
        for layer in self.layers:
            layer.rows = 0
            layer.histograms.clear()
        return loads

    def _here(self) -> list[LayerLoad]:
        # One copy for each device that holds layers.
        parts: dict[torch.device, list[torch.Tensor]] = {}
        for layer in self.layers:
            for histogram in layer.histograms:
                parts.setdefault(histogram.device, []).append(histogram)
        numbers = {device: torch.cat(of_device).cpu().numpy().astype(np.int64) for device, of_device in parts.items()}
        read = dict.fromkeys(numbers, 0)
        loads = []
        for layer in self.layers:
            tokens: tuple[int, ...] = (0,) * layer.seen
            if layer.histograms:
                device, first = layer.histograms[0].device, read[layer.histograms[0].device]
                read[device] += len(layer.histograms) * (layer.seen + 1)
                mine = numbers[device][first : read[device]].reshape(-1, layer.seen + 1)
                tokens = tuple(mine.sum(0)[1:].tolist())
            loads.append(LayerLoad(tokens, layer.rows))
        return loads

    def _everywhere(self) -> list[LayerLoad]:
        """Of all ranks together."""
        devices = (histogram.device for layer in self.layers for histogram in layer.histograms)
        device = next(devices, torch.device("cpu"))
        total = torch.cat([_everywhere(layer, device) for layer in self.layers])
        torch.distributed.all_reduce(total)
        numbers = total.tolist()
        loads = []
        for layer in self.layers:
            tokens, rows = tuple(numbers[: layer.experts]), numbers[layer.experts]
            # The ranks that share a layer's experts all saw the same tokens.
            loads.append(LayerLoad(tokens, rows // (layer.experts // layer.seen)))
            del numbers[: layer.experts + 1]
        return loads

    def _hook(self, layer: _Layer) -> Any:
        @torch.compiler.disable
        def count(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if module.training and torch._C._current_graph_task_id() == -1:
                layer.add(_ids(args, kwargs))

        return count


def _ids(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The router's choice among the arguments of an experts module: models name it differently."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor) and not value.is_floating_point():
            return value
    raise ValueError("An experts module was called without expert ids: set moe_router_telemetry: false.")


def _everywhere(layer: _Layer, device: torch.device) -> torch.Tensor:
    """(experts + 1,) int64: this rank's counts at their place in the whole layer, and its rows."""
    total = torch.zeros(layer.experts + 1, dtype=torch.int64, device=device)
    if layer.histograms:
        rank = torch.distributed.get_rank() if layer.seen < layer.experts else 0
        first = rank % (layer.experts // layer.seen) * layer.seen
        total[first : first + layer.seen] = layer.total()[1:].to(device)
    total[-1] = layer.rows
    return total


def _layer(name: str, module: Any) -> _Layer:
    # Axolotl's expert parallelism dispatches inside the experts function: the ids are those of all experts.
    everywhere = getattr(module, "num_experts_global", None)
    if everywhere:
        return _Layer(name, everywhere, everywhere)
    config = getattr(module, "config", None)
    known = [getattr(config, key, None) for key in _EXPERTS_KEYS]
    total = next((count for count in known if isinstance(count, int) and count > module.num_experts), None)
    parallel = torch.distributed.is_available() and torch.distributed.is_initialized()
    return _Layer(name, total if total and parallel else module.num_experts, module.num_experts)
