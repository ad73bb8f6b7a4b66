"""Tuning on a real GPU: a table is measured, verified, written, and used by the next launch."""

import dataclasses
import functools

import pytest
import torch

import moe_kernels
from moe_kernels.kernels.tiles import config, tuned
from moe_kernels.shapes import LayerShape
from moe_kernels.tools.bench import tiles, tune
from moe_kernels.tools.check.problems import Case, make_inputs
from support.judge import check

pytestmark = pytest.mark.gpu
SHAPE = LayerShape("small", 2048, 512, 256, 8, 2)


@pytest.fixture
def device(monkeypatch, tmp_path):
    monkeypatch.setenv(tuned.CACHE_VARIABLE, str(tmp_path))
    config.forget_tuned_tiles()
    yield torch.device("cuda", torch.cuda.current_device())
    monkeypatch.undo()
    config.forget_tuned_tiles()


def test_a_measured_tile_is_verified_and_used(device, monkeypatch):
    real = tiles.candidates
    monkeypatch.setattr(tiles, "candidates", lambda kernel, group: real(kernel, group)[:3])
    timings = tiles.time_shape(SHAPE, 64, device, lambda message: None)
    assert {timing.call for timing in timings} == set(tiles.CALLS)
    assert not [timing for timing in timings if timing.wrong]
    # Whatever was measured, so that something is chosen: what is tested is that a chosen tile is verified and used.
    monkeypatch.setattr(tiles, "GAIN", 100.0)
    results = tune.conclude(timings, [SHAPE], device, None, False)
    assert all(result.config is not None for result in results), [result.refused for result in results]
    for result in results:
        sizes = next(
            tiles.sizes_of(call, SHAPE) for call, kernel in tiles.CALLS.items()
            if kernel == result.key.kernel and tuned.bucket(tiles.sizes_of(call, SHAPE)) == result.key.bucket
        )  # fmt: skip
        found = config.select_config(
            result.key.kernel, device, torch.bfloat16, result.key.group_size, result.key.loads == "tma", sizes
        )
        assert found == result.config
    case = Case(SHAPE.tokens, SHAPE.top_k, SHAPE.experts, SHAPE.hidden, SHAPE.intermediate, torch.bfloat16)
    check(functools.partial(moe_kernels.fused_experts, group_size=64), make_inputs(case, device))


def test_a_tile_too_large_for_the_gpu_is_a_fault(device):
    call = tiles.gemms(SHAPE, 128, device)["down"]
    large = dataclasses.replace(tiles.candidates("down", 128)[0], num_stages=8)
    assert "does not fit" in tiles.attempt(call, "down", large)
