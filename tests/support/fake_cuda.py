"""A CUDA driver that launches nothing and remembers what it was asked: Triton's launcher runs on it without a GPU.

Triton compiles a C launcher per kernel signature and calls ``libcuda.so.1``. :func:`install` builds a library of that
name from the C below, so that everything up to the driver's door is the real thing: binding, compilation for sm_90,
the C launcher, tensor maps. Tensors stay in the memory of the CPU; the current device is -1, which is theirs.
"""

import contextlib
import ctypes
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.nvidia import driver as nvidia

from moe_kernels.kernels.launch import launch, replay

SOURCE = r"""
#include "cuda.h"
#include <string.h>

typedef struct { unsigned grid[3], block[3], shared, attributes; void *stream, *function; } Launch;
Launch fake_launch;
unsigned char fake_arguments[4096];
int fake_sizes[64], fake_count, fake_launches, fake_encoded;

CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **params, void **extra) {
  fake_launch = (Launch){{c->gridDimX, c->gridDimY, c->gridDimZ}, {c->blockDimX, c->blockDimY, c->blockDimZ},
                         c->sharedMemBytes, c->numAttrs, c->hStream, f};
  unsigned char *to = fake_arguments;
  for (int i = 0; i < fake_count; to += fake_sizes[i++]) memcpy(to, params[i], fake_sizes[i]);
  ++fake_launches;
  return CUDA_SUCCESS;
}
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
    const cuuint64_t *dims, const cuuint64_t *strides, const cuuint32_t *box, const cuuint32_t *steps,
    CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
    CUtensorMapFloatOOBfill fill) {
  cuuint64_t *words = (cuuint64_t *)map;
  memset(map, 0, sizeof(CUtensorMap));
  words[0] = (cuuint64_t)address;
  words[1] = type | (cuuint64_t)rank << 8 | (cuuint64_t)swizzle << 16 | (cuuint64_t)fill << 24;
  for (unsigned i = 0; i < rank; ++i) {
    words[2 + i] = dims[i];
    words[7 + i] = strides[i];
    words[12] = words[12] * 1000 + box[i];
  }
  ++fake_encoded;
  return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult e, const char **s) { *s = "fake"; return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *v) { *v = 13000; return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *d, int i) { *d = 0; return CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int *v, CUdevice_attribute a, CUdevice d) { *v = 232448; return CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *c) { *c = (CUcontext)1; return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *d) { *d = 0; return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext c) { return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice d) { *c = (CUcontext)1; return CUDA_SUCCESS; }
CUresult cuModuleLoadData(CUmodule *m, const void *image) { *m = (CUmodule)1; return CUDA_SUCCESS; }
CUresult cuModuleUnload(CUmodule m) { return CUDA_SUCCESS; }
CUresult cuStreamIsCapturing(CUstream s, CUstreamCaptureStatus *v) { *v = 0; return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction *f, CUmodule m, const char *name) {
  static cuuint64_t next = 4096;
  *f = (CUfunction)++next;
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int *v, CUfunction_attribute a, CUfunction f) { *v = 1024; return CUDA_SUCCESS; }
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int v) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache c) { return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *v, CUlimit l) { *v = 0; return CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit l, size_t v) { return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int *n, CUfunction f, const CUlaunchConfig *c) { *n = 1; return CUDA_SUCCESS; }
CUresult cuPointerGetAttribute(void *out, CUpointer_attribute a, CUdeviceptr p) {
  *(CUdeviceptr *)out = p;
  return CUDA_SUCCESS;
}
"""


class _Launch(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("attributes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("function", ctypes.c_void_p),
    )


class Launched(NamedTuple):
    """What the driver was last asked to launch."""

    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    attributes: int
    stream: int
    function: int
    arguments: bytes


class FakeCuda:
    """The library, and what it remembers."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def expect(self, *sizes: int) -> None:
        """Bytes of each argument of the kernels launched from now on."""
        known = (ctypes.c_int * 64).in_dll(self._library, "fake_sizes")
        for i, size in enumerate(sizes):
            known[i] = size
        ctypes.c_int.in_dll(self._library, "fake_count").value = len(sizes)
        self._bytes = sum(sizes)

    @property
    def launches(self) -> int:
        """Kernels launched so far."""
        return ctypes.c_int.in_dll(self._library, "fake_launches").value

    @property
    def encoded(self) -> int:
        """Tensor maps encoded so far."""
        return ctypes.c_int.in_dll(self._library, "fake_encoded").value

    @property
    def last(self) -> Launched:
        """The last launch."""
        launch = _Launch.in_dll(self._library, "fake_launch")
        arguments = bytes((ctypes.c_ubyte * 4096).in_dll(self._library, "fake_arguments"))[: self._bytes]
        return Launched(
            tuple(launch.grid), tuple(launch.block), launch.shared, launch.attributes, launch.stream or 0,
            launch.function, arguments,
        )  # fmt: skip


class FakeDriver(nvidia.CudaDriver):
    """Triton's CUDA driver on the library above. ``streams`` gives each thread its current stream."""

    def __init__(self, capability: tuple[int, int] = (9, 0)) -> None:
        super().__init__()
        self.streams = threading.local()
        self.get_device_capability = lambda device: capability
        self.get_current_stream = lambda device: getattr(self.streams, "current", 7)
        self.get_current_device = lambda: -1

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def why_not() -> str | None:
    """None if the library can be built and loaded here."""
    if torch.cuda.is_available():
        return "there is a real driver"
    return None if shutil.which("gcc") else "needs gcc"


@contextlib.contextmanager
def install(folder: Path, monkeypatch: Any) -> Iterator[FakeCuda]:
    """Within this context Triton launches kernels on the fake driver; gives it as a FakeCuda."""
    source, library = folder / "fake_cuda.c", folder / "libcuda.so.1"
    source.write_text(SOURCE)
    include = Path(nvidia.__file__).parent / "include"
    command = ["gcc", "-shared", "-fPIC", "-O1", "-w", f"-I{include}", "-Wl,-soname,libcuda.so.1", str(source)]
    subprocess.run([*command, "-o", str(library)], check=True)
    monkeypatch.setenv("TRITON_LIBCUDA_PATH", str(folder))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder / "cache"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(replay, "_on_gpu", lambda tensor: True)
    # A CUDA build of torch would look for a GPU.
    monkeypatch.setattr(launch, "_current_device", lambda: -1)
    loaded = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    config = triton.runtime.driver
    previous = config._active
    config.set_active(FakeDriver())
    try:
        yield FakeCuda(loaded)
    finally:
        config._active = previous
