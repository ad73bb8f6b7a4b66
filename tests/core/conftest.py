import functools
import importlib.util

import pytest

import moe_kernels

BACKENDS = [
    "torch",
    pytest.param(
        "triton",
        marks=pytest.mark.skipif(
            importlib.util.find_spec("moe_kernels.triton_backend") is None, reason="the Triton backend is absent"
        ),
    ),
]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture
def experts(backend):
    """The op on one backend: every test that takes it runs once per backend."""
    return functools.partial(moe_kernels.fused_experts, backend=backend)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16 rows and 32 columns, so that a few tokens fill several of them in every direction."""
    from moe_kernels.testing.tiles import use_small_tiles

    with use_small_tiles():
        yield
