"""Watches one NVIDIA GPU through NVML while a training runs beside it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from moe_kernels.tools.compare.decode import Misfit, Number

INTERVAL_S = 0.1
GIB = 1 << 30
# The hardware counters (GPM), which average over the time between two reads, are read once in so many samples.
COUNTERS_EVERY = 5


@dataclass
class Samples:
    """Samples of one run; the lists of one group have the same length."""

    t: list[Number] = field(default_factory=list)  # Unix seconds of the next three
    busy: list[Number] = field(default_factory=list)  # percent of the period with a kernel running, as nvidia-smi
    memory: list[Number] = field(default_factory=list)  # GiB in use on the whole device
    power: list[Number] = field(default_factory=list)  # watts
    counters_t: list[Number] = field(default_factory=list)  # Unix seconds of the next three (from Hopper on)
    sm_active: list[Number] = field(default_factory=list)  # percent of time, mean of the multiprocessors
    tensor_active: list[Number] = field(default_factory=list)  # percent of time, mean of the tensor cores
    dram_active: list[Number] = field(default_factory=list)  # percent of the memory's bandwidth
    note: str = ""  # why something is missing, for the report

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
    memory_gib: Number


def visible_gpu() -> str | None:
    """The first GPU a training may use, as CUDA_VISIBLE_DEVICES names it; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip() or None


def describe(device: str | None) -> Gpu | None:
    """Name, driver and memory of a GPU, or NVML's error as the name; None without a device."""
    if device is None:
        return None
    import pynvml

    try:
        handle = _handle(pynvml, device)
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle).total / GIB
        return Gpu(pynvml.nvmlDeviceGetName(handle), pynvml.nvmlSystemGetDriverVersion(), round(memory, 1))
    except pynvml.NVMLError as error:
        return Gpu(f"GPU {device} (NVML: {error})", "unknown", 0.0)


def compute_capability(device: str) -> tuple[int, int] | None:
    """Of a GPU, without a context on it; None where NVML does not say."""
    import pynvml

    try:
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(_handle(pynvml, device))
    except pynvml.NVMLError:
        return None
    return int(major), int(minor)


def _handle(pynvml: Any, device: str) -> Any:
    pynvml.nvmlInit()
    if device.startswith(("GPU-", "MIG-")):
        return pynvml.nvmlDeviceGetHandleByUUID(device)
    return pynvml.nvmlDeviceGetHandleByIndex(int(device))


@contextmanager
def sampled(device: str | None) -> Iterator[Samples]:
    """Sample a GPU in a thread until the block ends; without a device the samples stay empty."""
    samples = Samples(note="" if device else "no GPU on this machine")
    stop = threading.Event()
    thread = threading.Thread(target=_sample, args=(device, samples, stop), daemon=True)
    if device is not None:
        thread.start()
    try:
        yield samples
    finally:
        stop.set()
        if thread.is_alive():
            thread.join()


def _sample(device: str, samples: Samples, stop: threading.Event) -> None:
    import pynvml

    try:
        handle = _handle(pynvml, device)
        counters = _counters(pynvml, handle, samples)
        next(counters, None)
        while not stop.wait(INTERVAL_S):
            busy = pynvml.nvmlDeviceGetUtilizationRates(handle).gpu
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle).used / GIB
            power = pynvml.nvmlDeviceGetPowerUsage(handle) / 1000
            if len(samples.t) % COUNTERS_EVERY == 0:
                next(counters, None)
            series = (samples.t, samples.busy, samples.memory, samples.power)
            for values, value in zip(series, (time.time(), busy, memory, power), strict=True):
                values.append(round(float(value), 3))
    except pynvml.NVMLError as error:
        samples.note = f"NVML stopped answering: {error}"


def _counters(nvml: Any, handle: Any, samples: Samples) -> Iterator[None]:
    """Each step appends the averages of NVML's hardware counters (GPM) since the step before.

    Ends, with a note in ``samples``, where the GPU has no counters or they stop answering.
    """
    try:
        if not nvml.nvmlGpmQueryDeviceSupport(handle).isSupportedDevice:
            samples.note = "no hardware counters: this GPU has none (Hopper and newer have)"
            return
        before, after = nvml.nvmlGpmSampleAlloc(), nvml.nvmlGpmSampleAlloc()
        nvml.nvmlGpmSampleGet(handle, before)
    except nvml.NVMLError as error:
        samples.note = f"no hardware counters: {error}"
        return
    series = {
        nvml.NVML_GPM_METRIC_SM_UTIL: samples.sm_active,
        nvml.NVML_GPM_METRIC_ANY_TENSOR_UTIL: samples.tensor_active,
        nvml.NVML_GPM_METRIC_DRAM_BW_UTIL: samples.dram_active,
    }
    while True:
        yield
        try:
            nvml.nvmlGpmSampleGet(handle, after)
            wanted = nvml.c_nvmlGpmMetricsGet_t()
            wanted.version = nvml.NVML_GPM_METRICS_GET_VERSION
            wanted.numMetrics = len(series)
            wanted.sample1, wanted.sample2 = before, after
            for slot, metric in enumerate(series):
                wanted.metrics[slot].metricId = metric
            nvml.nvmlGpmMetricsGet(wanted)
        except nvml.NVMLError as error:
            samples.note = f"hardware counters stopped answering: {error}"
            return
        before, after = after, before
        found = wanted.metrics[: len(series)]
        if not any(metric.nvmlReturn for metric in found):
            samples.counters_t.append(round(time.time(), 3))
            for values, metric in zip(series.values(), found, strict=True):
                values.append(round(float(metric.value), 2))
