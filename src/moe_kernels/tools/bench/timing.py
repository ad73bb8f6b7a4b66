"""Clocks and counters: time on the GPU and on the host, kernels launched, memory held."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

Call = Callable[[], object]

FLUSH_BYTES = 256 * 2**20
#: Cycles per millisecond for torch.cuda._sleep: of the fastest clock known, so that it sleeps long enough.
SLEEP_CYCLES_PER_MS = 2_000_000
#: A call whose host time is longer synchronises inside: its launches cannot be queued ahead.
LONGEST_QUEUE_MS = 20.0
#: A call slower than this is timed only so often: its spread is small.
SLOW_MS, SLOW_REPEATS = 100.0, 5
MIB = 2**20


@dataclass(frozen=True)
class Spread:
    """Median, 20th and 80th percentile of repeated measurements."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, samples: list[float]) -> Spread:
        """The spread of one or more samples."""
        if len(samples) < 2:
            return cls(samples[0], samples[0], samples[0])
        fifths = statistics.quantiles(samples, n=5, method="inclusive")
        return cls(statistics.median(samples), fifths[0], fifths[3])


@dataclass(frozen=True)
class Times:
    """Times of one call in milliseconds."""

    total: Spread  # from the start of the call to the end of its last kernel, the host's launch time included
    host: Spread  # until the call returns, without synchronising
    queued: Spread | None  # GPU time alone, the launches queued ahead; None without a GPU


class Clock:
    """Times calls round-robin, so that a drift of the GPU's frequency affects all of them equally.

    On a GPU the L2 cache is flushed before every call by writing 256 MiB. Before a call whose launches are queued the
    GPU idles, as long before each: at its power limit it is faster after a rest, and resting for a call's own host
    time would favour those that launch slowly (benchmarks/results/h200-log-20-rest.json).
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        if self.cuda:
            self._flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device=device)

    def compare(self, calls: dict[str, Call], repeats: int, cleanup: Call, progress: Call) -> dict[str, Times]:
        """Time every call ``repeats`` times (slow ones less often), round-robin, each round starting with another.

        ``cleanup`` runs after each call, outside the measured time; ``progress`` after each round.
        """
        names = list(calls)
        totals, hosts, queues = ({name: list[float]() for name in names} for _ in range(3))
        for turn in range(repeats):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                if turn >= SLOW_REPEATS and statistics.median(totals[name]) > SLOW_MS:
                    continue
                total, host = self.once(calls[name])
                cleanup()
                totals[name].append(total)
                hosts[name].append(host)
                if self.cuda and host > LONGEST_QUEUE_MS:
                    queues[name].append(total)
                elif self.cuda:
                    queues[name].append(self.once(calls[name], queue_ms=_rest(hosts.values()))[0])
                    cleanup()
            progress()
        return {
            name: Times(
                Spread.of(totals[name]), Spread.of(hosts[name]), Spread.of(queues[name]) if self.cuda else None
            )
            for name in names
        }

    def once(self, call: Call, queue_ms: float = 0.0) -> tuple[float, float]:
        """(milliseconds to the end of the work, milliseconds until the call returned).

        With ``queue_ms`` the GPU first idles that long, so that every launch is queued when it wakes.
        """
        if not self.cuda:
            begin = time.perf_counter()
            result = call()
            elapsed = 1e3 * (time.perf_counter() - begin)
            del result
            return elapsed, elapsed
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        if queue_ms:
            torch.cuda._sleep(int(queue_ms * SLEEP_CYCLES_PER_MS))
        self._flush.zero_()
        start.record()
        begin = time.perf_counter()
        result = call()
        host = 1e3 * (time.perf_counter() - begin)
        end.record()
        torch.cuda.synchronize()
        del result
        return start.elapsed_time(end), host


def _rest(hosts: Iterable[list[float]]) -> float:
    """Milliseconds in which the launches of any of the calls are queued, given their host times until now."""
    return min(2 * max(statistics.median(host) for host in hosts if host) + 1, LONGEST_QUEUE_MS)


@dataclass(frozen=True)
class Launches:
    """What one call launched: compute kernels, and memcpys and memsets."""

    kernels: int
    copies: int


def count_launches(call: Call) -> Launches | None:
    """Count the GPU activities of one call with torch's profiler. None where the profiler sees no GPU."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    categories = [event.get("cat") for event in events]
    kernels = categories.count("kernel")
    if not kernels:
        return None
    return Launches(kernels, categories.count("gpu_memcpy") + categories.count("gpu_memset"))


def saved_bytes(call: Call, excluded: Iterable[torch.Tensor]) -> int:
    """Bytes that one forward keeps for its backward: the distinct storages saved, without ``excluded``'s."""
    skip = {tensor.untyped_storage().data_ptr() for tensor in excluded}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in skip:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(kept.values())


def peak_bytes(call: Call) -> int:
    """Highest memory in use during one call, above what was in use before it. CUDA only."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
