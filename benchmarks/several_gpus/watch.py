"""What is looked at while ranks train: where the GPU's time goes, and how evenly the router would load the ranks.

Both are callbacks of transformers' Trainer, which Axolotl's is too, and leave a JSON file of every rank or of rank 0.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import TrainerCallback

from moe_kernels.telemetry.counter import RouterCounter
from moe_kernels.telemetry.load import Loads
from moe_kernels.tools.common.files import read_json, write_json
from moe_kernels.tools.common.machine import installed_version

PROFILED = 2
"""Steps at the end of a training that are profiled and not timed."""

Interval = tuple[float, float]  # begin and end


class Operation(NamedTuple):
    """What the device did from ``begin`` to ``end`` (microseconds)."""

    name: str
    begin: float
    end: float

    @property
    def collective(self) -> str | None:
        """The kind, as NCCL or gloo calls it (AllGather, SendRecv); None for anything but communication."""
        # ncclDevKernel_AllGather_RING_LL(...), ncclSymkDevKernel_..., gloo:all_gather
        if self.name.startswith("nccl") and "Kernel_" in self.name:
            return self.name.split("Kernel_")[1].split("_")[0].split("(")[0]
        return self.name.removeprefix("gloo:") if self.name.startswith("gloo:") else None


def united(intervals: Iterable[Interval]) -> list[Interval]:
    """The same time in intervals that do not overlap, in order."""
    found: list[Interval] = []
    for begin, end in sorted(intervals):
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((begin, end))
    return found


def length(intervals: Iterable[Interval]) -> float:
    """Time that the intervals cover together."""
    return sum(end - begin for begin, end in united(intervals))


def shares(operations: Sequence[Operation], steps: int) -> dict[str, Any]:
    """Milliseconds of a step: the window, communication, what of it no other operation hides, and nothing at all.

    A collective begins when its rank is ready, and ends when the last rank is: waiting for others counts.
    """
    every = [(one.begin, one.end) for one in operations]
    talk = [(one.begin, one.end) for one in operations if one.collective]
    work = [(one.begin, one.end) for one in operations if not one.collective]
    window = max((end for _, end in every), default=0.0) - min((begin for begin, _ in every), default=0.0)
    kinds: dict[str, float] = defaultdict(float)
    for one in operations:
        if one.collective:
            kinds[one.collective] += one.end - one.begin
    times = {
        "window_ms": window,
        "communication_ms": length(talk),
        "exposed_ms": length(every) - length(work),
        "idle_ms": window - length(every),
    }
    return {
        **{name: time / 1000 / steps for name, time in times.items()},
        "collectives_ms": {kind: time / 1000 / steps for kind, time in sorted(kinds.items())},
    }


def rank_imbalance(loads: Loads, ranks: int) -> dict[str, float]:
    """Rows of the busiest rank over the mean, were each layer's experts spread over the ranks in equal blocks.

    Mean and worst of the layers: the rows that expert parallelism makes the ranks wait for.
    """
    found = []
    for layer in loads.layers():
        share = len(layer.tokens) // ranks
        rows = [sum(layer.tokens[rank * share : (rank + 1) * share]) for rank in range(ranks)]
        found.append(max(rows) * ranks / max(sum(rows), 1))
    return {"mean": sum(found) / len(found), "worst": max(found)}


class Watch(TrainerCallback):
    """Counts the router's rows in the last step of warm-up, and profiles the last steps of a training.

    Neither is timed. Every rank writes ``traffic-RANK.json`` into ``folder``, rank 0 ``imbalance.json`` and
    ``versions.json``; :func:`seen` reads them.
    """

    def __init__(self, folder: Path, steps: int, warmup: int, rank: int, ranks: int) -> None:
        self.folder, self.rank, self.ranks = folder, rank, ranks
        self.counted, self.first = max(warmup - 1, 0), steps - PROFILED  # steps that are done when these begin
        self.counter: RouterCounter | None = None
        self.profile: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Once a step, with gradient accumulation too."""
        if state.global_step == self.counted:
            self.counter = RouterCounter(model)
        if state.global_step == self.first:
            # On a GPU its own operations alone: the CPU's would take more time than they are worth.
            cuda = torch.profiler.ProfilerActivity.CUDA if torch.cuda.is_available() else None
            self.profile = torch.profiler.profile(activities=[cuda or torch.profiler.ProfilerActivity.CPU])
            _wait()
            self.profile.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After the optimizer."""
        if self.counter is not None:
            loads = self.counter.take()
            self.counter.close()
            self.counter = None
            if self.rank == 0:
                write_json(self.folder / "imbalance.json", rank_imbalance(loads, self.ranks))
                packages = ("axolotl", "transformers", "torch", "triton", "peft")
                write_json(self.folder / "versions.json", {name: installed_version(name) for name in packages})
        if self.profile is not None and state.global_step == self.first + PROFILED:
            _wait()
            self.profile.stop()
            write_json(self.folder / f"traffic-{self.rank}.json", shares(operations(self.profile), PROFILED))
            self.profile = None


def seen(folder: Path) -> dict[str, Any]:
    """What :class:`Watch` left in ``folder``; None and nothing where a training did not get so far."""
    files = {name: folder / f"{name}.json" for name in ("imbalance", "versions")}
    return {
        **{name: read_json(path) if path.is_file() else None for name, path in files.items()},
        "traffic": [read_json(path) for path in sorted(folder.glob("traffic-*.json"))],
    }


def operations(profile: Any) -> list[Operation]:
    """What ran on the device while ``profile`` was on; without a GPU, what ran on the CPU."""
    wanted = torch.autograd.DeviceType.CUDA if torch.cuda.is_available() else torch.autograd.DeviceType.CPU
    return [
        Operation(event.name, event.time_range.start, event.time_range.end)
        for event in profile.events()
        if event.device_type == wanted and (event.name.startswith("gloo:") or not event.is_user_annotation)
    ]


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
