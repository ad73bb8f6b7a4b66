"""What this machine can do at most: a large matrix product and a large copy, measured in the same run."""

from __future__ import annotations

import torch

from moe_kernels.tools.bench.timing import Call, Clock

GPU_SIZE, CPU_SIZE = 8192, 512
GPU_COPY_BYTES, CPU_COPY_BYTES = 2 * 2**30, 32 * 2**20
REPEATS = 10


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Medians of ten on random data.

    Returns:
        ``matmul_tflops``, of a square matrix product in ``dtype``, and ``copy_tbs``, TB/s of a copy, bytes read and
        bytes written together.
    """
    size, count = (GPU_SIZE, GPU_COPY_BYTES // 4) if device.type == "cuda" else (CPU_SIZE, CPU_COPY_BYTES // 4)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product, source = torch.empty_like(left), torch.randn(count, device=device)
    target = torch.empty_like(source)
    calls: dict[str, Call] = {
        "product": lambda: torch.mm(left, right, out=product),
        "copy": lambda: target.copy_(source),
    }
    for call in calls.values():
        call()
    times = Clock(device).compare(calls, REPEATS, cleanup=lambda: None, progress=lambda: None)
    product_s, copy_s = (times[name].total.median * 1e-3 for name in calls)
    return {"matmul_tflops": 2 * size**3 / product_s * 1e-12, "copy_tbs": 2 * source.nbytes / copy_s * 1e-12}
