import functools

import pytest

import moe_kernels


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    return request.param


@pytest.fixture
def experts(backend):
    """The op on one backend: every test that takes it runs once per backend."""
    return functools.partial(moe_kernels.fused_experts, backend=backend)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16 rows and 32 columns, so that a few tokens fill several of them in every direction."""
    from support.tiles import use_small_tiles

    with use_small_tiles():
        yield


@pytest.fixture
def small_plan_blocks(monkeypatch):
    """make_plan with 3 programs and 64 slots a block, so that a few hundred slots take every loop several times."""
    plan = pytest.importorskip("moe_kernels.kernels.triton.plan")
    small = {"_MAX_CHUNKS": 3, "_BLOCK_S": 64, "_NUM_WARPS": 2, "_COUNTS": 64, "_BLOCK_T": 2}
    for name, value in small.items():
        monkeypatch.setattr(plan, name, value)
    plan.plan_blocks.cache_clear()
    yield
    plan.plan_blocks.cache_clear()
