"""Counts the rows of each expert of a model on the device, without waiting for it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed
from numpy.typing import NDArray
from torch.utils.hooks import RemovableHandle

from moe_kernels.integrations.transformers import experts_modules
from moe_kernels.telemetry.load import Loads

# Keys of model configurations for the number of routed experts.
_EXPERTS_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# Histograms that are kept before they are added up: each is some kilobytes.
_MOST = 32


@dataclass
class _Layer:
    """One expert layer.

    ``seen``: ids that its module can be given: ``experts``, or where transformers' expert parallelism masks the
    router those of this rank, with one more id for all others.
    """

    name: str  # of the module
    experts: int  # of the whole layer, on all ranks
    seen: int
    rows: int = 0  # tokens x K since the last reading, counted on the host from shapes
    counted: bool = False  # whether a call outside a backward pass was counted since then


class RouterCounter:
    """Counts the routed rows of every expert of a model, once for each row that is trained on.

    A hook of each experts module keeps the router's ids, whichever implementation runs the experts. Once every layer
    was called, one histogram of all of them is made on the device: no copy to the host, no wait, and few operations,
    each of which costs host time. Padding counts: the experts compute it. Under ``torch.compile`` each layer costs a
    graph break.

    Calls in evaluation mode or without gradients (the reference of DPO) do not count, nor do calls inside a backward
    pass (recomputation by gradient checkpointing). Reentrant checkpointing calls a layer first without gradients:
    then the call in the backward pass counts, so that a layer which the backward does not reach is not counted.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        """Hook the experts modules of ``model``; ValueError where it has none."""
        modules = experts_modules(model)
        if not modules:
            raise ValueError(
                f"{type(model).__name__} has no experts module that dispatches through transformers' experts "
                "interface, so that there is no routing to count: set moe_router_telemetry: false."
            )
        # Tensor parallelism of transformers, whose model.tp_size stays None; DeepSpeed's is not seen.
        distributed = getattr(getattr(model, "config", None), "distributed_config", None)
        dispatched = _dispatched(model)
        self._begin(
            [_layer(name, module, dispatched) for name, module in modules], getattr(distributed, "tp_size", None) or 1
        )
        self._modules = [module for _, module in modules]
        self._hooks: list[RemovableHandle] = []
        self.open()

    def _begin(self, layers: list[_Layer], tensor_parallel: int = 1) -> None:
        self.layers, self._tensor_parallel = layers, tensor_parallel
        # Of each layer in the forward pass under way: the ids, and how often they had been changed.
        self._ids: dict[int, tuple[torch.Tensor, int]] = {}
        # By layers that were counted together, their ``seen`` and the device: histograms since the last reading.
        self._histograms: dict[tuple[tuple[int, ...], int, torch.device], list[torch.Tensor]] = {}
        self._device = torch.device("cpu")

    def open(self) -> None:
        """Hook the experts modules, again after :meth:`close`, and count from zero."""
        self.close()
        self._ids.clear()
        self._start_again()
        self._hooks = [
            module.register_forward_pre_hook(self._hook(number), with_kwargs=True)
            for number, module in enumerate(self._modules)
        ]

    def close(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()

    def count(self, number: int, ids: torch.Tensor) -> None:
        """Count the ``ids`` (any shape, integers) of a layer, those outside [0, seen) as rows alone."""
        if number in self._ids:  # another layer was not called
            self._add_up()
        self.layers[number].rows += ids.numel()
        self._ids[number] = ids, ids._version
        if len(self._ids) == len(self.layers):  # whichever is the last: a backward pass comes from the other end
            self._add_up()

    def take(self) -> Loads:
        """The counts since the last call, of all ranks together, and start again. Waits for the device.

        Where several processes train, all must call it at the same step: it adds up over them.
        """
        self._add_up()
        tokens = [np.zeros(layer.seen, np.int64) for layer in self.layers]
        for (numbers, seen, _), histograms in self._histograms.items():
            counted = _sum(histograms).cpu().numpy().astype(np.int64).reshape(-1, seen + 2)
            for number, of_layer in zip(numbers, counted, strict=True):
                tokens[number] += of_layer[1:-1]
        rows = [layer.rows for layer in self.layers]
        self._start_again()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            tokens, rows = self._everywhere(tokens, rows)
        return Loads(np.concatenate(tokens), tuple(layer.experts for layer in self.layers), tuple(rows))

    def _start_again(self) -> None:
        """Forget what was added up."""
        for layer in self.layers:
            layer.rows, layer.counted = 0, False
        self._histograms.clear()

    def _add_up(self) -> None:
        """One histogram of the ids of all layers that have the same shape."""
        alike: dict[tuple[Any, ...], list[int]] = {}
        for number, (ids, version) in self._ids.items():
            if ids._version != version:
                raise RuntimeError(
                    f"{self.layers[number].name} changes its expert ids in place, so that they cannot be counted: "
                    "set moe_router_telemetry: false."
                )
            alike.setdefault((self.layers[number].seen, ids.device, ids.dtype, ids.shape), []).append(number)
        for (seen, device, dtype, shape), numbers in alike.items():
            # Bins of a layer: one for what is below 0, one for each expert, one for what is above.
            values = torch.stack([self._ids[number][0] for number in numbers]).clamp_(-1, seen)
            values += _first_bins(len(numbers), seen + 2, len(shape), device, dtype)
            # With its range given, histc never waits for the device; bincount does. On a CPU it knows no integers.
            values = values.double() if device.type == "cpu" else values
            bins = len(numbers) * (seen + 2)
            self._device = device
            histograms = self._histograms.setdefault((tuple(numbers), seen, device), [])
            histograms.append(torch.histc(values, bins=bins, min=0, max=bins - 1))
            if len(histograms) == _MOST:
                histograms[:] = [_sum(histograms)]
        self._ids.clear()

    def _everywhere(
        self, tokens: list[NDArray[np.int64]], rows: list[int]
    ) -> tuple[list[NDArray[np.int64]], list[int]]:
        """Of all ranks together, each layer with all its experts."""
        parts = []
        for layer, of_layer, count in zip(self.layers, tokens, rows, strict=True):
            part = np.zeros(layer.experts + 1, np.int64)
            first = torch.distributed.get_rank() % (layer.experts // layer.seen) * layer.seen
            part[first : first + layer.seen] = of_layer
            part[-1] = count
            parts.append(part)
        total = torch.from_numpy(np.concatenate(parts)).to(self._device)
        torch.distributed.all_reduce(total)
        parts = np.split(total.cpu().numpy(), np.cumsum([len(part) for part in parts])[:-1])
        # The ranks that share a layer's experts, or its tensors, all saw the same tokens.
        sharing = [layer.experts // layer.seen for layer in self.layers]
        alike = [max(ranks, self._tensor_parallel) for ranks in sharing]
        return [part[:-1] // (n // ranks) for part, n, ranks in zip(parts, alike, sharing, strict=True)], [
            int(part[-1]) // n for part, n in zip(parts, alike, strict=True)
        ]

    def _hook(self, number: int) -> Any:
        @torch.compiler.disable
        def count(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not module.training or not torch.is_grad_enabled():
                return
            if module is not self._modules[number] and not getattr(module, "_is_replica", False):
                return  # of a copy of the model, which has the same hooks; replicas are those of nn.DataParallel
            layer, in_backward = self.layers[number], torch._C._current_graph_task_id() != -1
            if in_backward and layer.counted:
                return
            self.count(number, _ids(args, kwargs))
            layer.counted = not in_backward

        return count


@functools.cache
def _first_bins(layers: int, bins: int, dimensions: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """(layers, 1, ...): the bin of expert 0 of each layer."""
    return (torch.arange(layers, device=device, dtype=dtype) * bins + 1).view(-1, *[1] * dimensions)


def _sum(histograms: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(histograms).sum(0) if len(histograms) > 1 else histograms[0]


def _ids(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The router's choice among the arguments of an experts module: models name it differently."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor) and not value.is_floating_point():
            return value
    raise ValueError("An experts module was called without expert ids: set moe_router_telemetry: false.")


def _dispatched(model: Any) -> bool:
    """Whether transformers sends tokens to the experts' ranks inside the experts module (5.19 and later): the ids
    that the module is called with are those of all experts, of this rank's tokens. Asked as transformers asks it."""
    styles = set((getattr(model, "ep_plan", None) or {}).values())
    return "ep_dispatch_experts" in styles and not {"ep_router", "moe_tp_experts"} <= styles


def _layer(name: str, module: Any, dispatched: bool = False) -> _Layer:
    # Axolotl's expert parallelism dispatches inside the experts function: the ids are those of all experts.
    everywhere = getattr(module, "num_experts_global", None)
    if everywhere:
        return _Layer(name, everywhere, everywhere)
    config = getattr(module, "config", None)
    known = [getattr(config, key, None) for key in _EXPERTS_KEYS]
    total = next((count for count in known if isinstance(count, int) and count > module.num_experts), None)
    parallel = torch.distributed.is_available() and torch.distributed.is_initialized()
    experts = total if total and parallel else module.num_experts
    return _Layer(name, experts, experts if dispatched else module.num_experts)
