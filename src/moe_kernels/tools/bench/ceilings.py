"""What this machine can do at most: a large matrix product and a large copy, measured in the same run."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch

GPU_SIZE, CPU_SIZE = 8192, 512
GPU_COPY_BYTES, CPU_COPY_BYTES = 2 * 2**30, 32 * 2**20
REPEATS = 10


@dataclass(frozen=True)
class Ceilings:
    """Rates of this machine.

    Attributes:
        matmul_tflops: of a square matrix product in the dtype of the run.
        copy_tbs: TB/s of a copy, bytes read and bytes written together.
    """

    matmul_tflops: float
    copy_tbs: float


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Medians of ten on random data."""
    cuda = device.type == "cuda"
    size = GPU_SIZE if cuda else CPU_SIZE
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    count = (GPU_COPY_BYTES if cuda else CPU_COPY_BYTES) // 4
    source = torch.randn(count, device=device)
    target = torch.empty_like(source)

    def seconds(call: object) -> float:
        assert callable(call)
        samples = []
        for _ in range(REPEATS + 2):
            if cuda:
                torch.cuda.synchronize()
            begin = time.perf_counter()
            call()
            if cuda:
                torch.cuda.synchronize()
            samples.append(time.perf_counter() - begin)
        return statistics.median(samples[2:])

    product = torch.empty(size, size, device=device, dtype=dtype)
    return Ceilings(
        2 * size**3 / seconds(lambda: torch.mm(left, right, out=product)) * 1e-12,
        2 * source.nbytes / seconds(lambda: target.copy_(source)) * 1e-12,
    )
