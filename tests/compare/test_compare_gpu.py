"""The NVML sampler against a driver of our own: pynvml's structures are the real ones, only the answers are ours."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pynvml
import pytest

from moe_kernels.tools.compare import gpu


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """A GPU that is 90% busy, with counters; ``answers["gpm"]`` may hold an error to raise."""
    answers: dict[str, object] = {"supported": 1, "gpm": None, "read": 0}

    def metrics(wanted: pynvml.c_nvmlGpmMetricsGet_t) -> pynvml.c_nvmlGpmMetricsGet_t:
        if isinstance(answers["gpm"], Exception):
            raise answers["gpm"]
        assert wanted.version == pynvml.NVML_GPM_METRICS_GET_VERSION
        assert wanted.numMetrics == 3
        assert wanted.sample1
        assert wanted.sample2
        values = {
            pynvml.NVML_GPM_METRIC_SM_UTIL: 80.0,
            pynvml.NVML_GPM_METRIC_ANY_TENSOR_UTIL: 40.0,
            pynvml.NVML_GPM_METRIC_DRAM_BW_UTIL: 50.0,
        }
        for slot in range(wanted.numMetrics):
            wanted.metrics[slot].value = values[wanted.metrics[slot].metricId]
        return wanted

    def sample() -> pynvml.c_nvmlGpmSample_t:
        return pynvml.c_nvmlGpmSample_t(pynvml.struct_c_nvmlGpmSample_t())

    fakes = {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetHandleByIndex": lambda index: f"handle {index}",
        "nvmlDeviceGetHandleByUUID": lambda uuid: f"handle {uuid}",
        "nvmlDeviceGetUtilizationRates": lambda handle: SimpleNamespace(gpu=90),
        "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(used=30 * gpu.GIB, total=140 * gpu.GIB),
        "nvmlDeviceGetPowerUsage": lambda handle: 500_000,
        "nvmlDeviceGetName": lambda handle: f"NVIDIA H200, {handle}",
        "nvmlSystemGetDriverVersion": lambda: "580",
        "nvmlGpmQueryDeviceSupport": lambda handle: SimpleNamespace(isSupportedDevice=answers["supported"]),
        "nvmlGpmSampleAlloc": sample,
        "nvmlGpmSampleGet": lambda handle, into: into,
        "nvmlGpmMetricsGet": metrics,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(pynvml, name, fake)
    monkeypatch.setattr(gpu, "INTERVAL_S", 0.01)
    return answers


def sampled(device: str | None = "0") -> gpu.Samples:
    with gpu.sampled(device) as samples:
        time.sleep(0.3)
    return samples


def test_samples_and_counters(driver: dict[str, object]) -> None:
    samples = sampled()
    assert len(samples.t) == len(samples.busy) == len(samples.memory) == len(samples.power) > 3
    assert (set(samples.busy), set(samples.memory), set(samples.power)) == ({90.0}, {30.0}, {500.0})
    assert 0 < len(samples.counters_t) == len(samples.tensor_active) < len(samples.t)
    assert (samples.sm_active[0], samples.tensor_active[0], samples.dram_active[0]) == (80.0, 40.0, 50.0)
    assert samples.note == ""


def test_a_gpu_without_counters_is_sampled_all_the_same(driver: dict[str, object]) -> None:
    driver["supported"] = 0
    samples = sampled()
    assert samples.busy
    assert samples.tensor_active == []
    assert "no hardware counters" in samples.note


def test_counters_that_fail_do_not_end_the_sampling(driver: dict[str, object]) -> None:
    driver["gpm"] = pynvml.NVMLError(pynvml.NVML_ERROR_NO_PERMISSION)
    samples = sampled()
    assert len(samples.busy) > 3
    assert samples.tensor_active == []
    assert samples.note == "hardware counters stopped answering: Insufficient Permissions"


def test_without_a_gpu_nothing_is_sampled() -> None:
    samples = sampled(None)
    assert samples.t == []
    assert samples.note == "no GPU on this machine"
    assert gpu.describe(None) is None


@pytest.mark.parametrize("device", ["1", "GPU-abc"])
def test_the_device_is_described(driver: dict[str, object], device: str) -> None:
    assert gpu.describe(device) == gpu.Gpu(f"NVIDIA H200, handle {device}", "580", 140.0)
