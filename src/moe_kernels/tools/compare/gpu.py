"""Watches one NVIDIA GPU through NVML while a training runs beside it."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from moe_kernels.tools.compare.decode import Misfit

INTERVAL_S = 0.1
GIB = 1 << 30
# Every how many samples the hardware counters (GPM) are read: they average over the time between two reads.
COUNTERS_EVERY = 5


@dataclass
class Samples:
    """Samples of one run; the lists of one group have the same length.

    Attributes:
        t: Unix seconds of the samples of ``busy``, ``memory`` and ``power``.
        busy: percent of the last sampling period in which at least one kernel ran (what nvidia-smi shows).
        memory: GiB in use on the whole device.
        power: watts.
        counters_t: Unix seconds of the samples of the hardware counters (Hopper and newer; else empty).
        sm_active: percent of time the multiprocessors were busy, averaged over them.
        tensor_active: percent of time the tensor cores were busy, averaged over them.
        dram_active: percent of the memory's bandwidth in use.
        note: why something is missing, for the report.
    """

    t: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    power: list[float] = field(default_factory=list)
    counters_t: list[float] = field(default_factory=list)
    sm_active: list[float] = field(default_factory=list)
    tensor_active: list[float] = field(default_factory=list)
    dram_active: list[float] = field(default_factory=list)
    note: str = ""

    def check(self) -> None:
        """Raise Misfit where the lists of one group have different lengths."""
        groups = (
            (self.t, self.busy, self.memory, self.power),
            (self.counters_t, self.sm_active, self.tensor_active, self.dram_active),
        )
        if any(len({len(series) for series in group}) > 1 for group in groups):
            raise Misfit("the lists of GPU samples have different lengths")


@dataclass(frozen=True)
class Gpu:
    """One GPU by name, with its driver and memory."""

    name: str
    driver: str
    memory_gib: float


def visible_gpu() -> str | None:
    """The first GPU a training may use, as CUDA_VISIBLE_DEVICES names it; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip() or None


def describe(device: str | None) -> Gpu | None:
    """Name, driver and memory of a GPU; None where there is none or NVML is not there."""
    if device is None:
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
        handle = _handle(pynvml, device)
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle).total / GIB
        return Gpu(pynvml.nvmlDeviceGetName(handle), pynvml.nvmlSystemGetDriverVersion(), round(memory, 1))
    except pynvml.NVMLError as error:
        return Gpu(f"GPU {device} (NVML: {error})", "unknown", 0.0)


def _handle(pynvml: Any, device: str) -> Any:
    if device.startswith(("GPU-", "MIG-")):
        return pynvml.nvmlDeviceGetHandleByUUID(device)
    return pynvml.nvmlDeviceGetHandleByIndex(int(device))


class Sampler:
    """Context manager that samples a GPU in a thread of its own; with ``device=None`` it samples nothing."""

    def __init__(self, device: str | None) -> None:
        self.samples = Samples(note="" if device else "no GPU on this machine")
        self._device = device
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Sampler:
        if self._device is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        import pynvml

        assert self._device is not None
        try:
            pynvml.nvmlInit()
            handle = _handle(pynvml, self._device)
            counters = _counters(pynvml, handle, self.samples)
            number = 0
            while not self._stop.wait(INTERVAL_S):
                self._sample(pynvml, handle)
                if counters is not None and number % COUNTERS_EVERY == 0 and not counters.read():
                    counters = None
                number += 1
        except pynvml.NVMLError as error:
            self.samples.note = f"NVML stopped answering: {error}"

    def _sample(self, pynvml: Any, handle: Any) -> None:
        busy = pynvml.nvmlDeviceGetUtilizationRates(handle).gpu
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle).used / GIB
        power = pynvml.nvmlDeviceGetPowerUsage(handle) / 1000
        for series, value in (
            (self.samples.t, time.time()),
            (self.samples.busy, busy),
            (self.samples.memory, memory),
            (self.samples.power, power),
        ):
            series.append(round(float(value), 3))


def _counters(pynvml: Any, handle: Any, samples: Samples) -> _Counters | None:
    try:
        if pynvml.nvmlGpmQueryDeviceSupport(handle).isSupportedDevice:
            return _Counters(pynvml, handle, samples)
    except pynvml.NVMLError as error:
        samples.note = f"no hardware counters: {error}"
        return None
    samples.note = "no hardware counters: this GPU has none (Hopper and newer have)"
    return None


class _Counters:
    """NVML's GPM: averages of hardware counters over the time between two reads."""

    def __init__(self, pynvml: Any, handle: Any, samples: Samples) -> None:
        self._nvml, self._handle, self._samples = pynvml, handle, samples
        self._before, self._after = pynvml.nvmlGpmSampleAlloc(), pynvml.nvmlGpmSampleAlloc()
        self._series = (
            (pynvml.NVML_GPM_METRIC_SM_UTIL, samples.sm_active),
            (pynvml.NVML_GPM_METRIC_ANY_TENSOR_UTIL, samples.tensor_active),
            (pynvml.NVML_GPM_METRIC_DRAM_BW_UTIL, samples.dram_active),
        )
        pynvml.nvmlGpmSampleGet(handle, self._before)

    def read(self) -> bool:
        """Append the averages since the last read; False, with a note, once the counters stop answering."""
        try:
            self._read()
        except self._nvml.NVMLError as error:
            self._samples.note = f"hardware counters stopped answering: {error}"
            return False
        return True

    def _read(self) -> None:
        nvml = self._nvml
        nvml.nvmlGpmSampleGet(self._handle, self._after)
        wanted = nvml.c_nvmlGpmMetricsGet_t()
        wanted.version = nvml.NVML_GPM_METRICS_GET_VERSION
        wanted.numMetrics = len(self._series)
        wanted.sample1, wanted.sample2 = self._before, self._after
        for slot, (metric, _series) in enumerate(self._series):
            wanted.metrics[slot].metricId = metric
        nvml.nvmlGpmMetricsGet(wanted)
        self._before, self._after = self._after, self._before
        if any(wanted.metrics[slot].nvmlReturn for slot in range(len(self._series))):
            return
        self._samples.counters_t.append(round(time.time(), 3))
        for slot, (_metric, series) in enumerate(self._series):
            series.append(round(float(wanted.metrics[slot].value), 2))
