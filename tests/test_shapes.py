"""The tables of sizes say what they are meant to say."""

from __future__ import annotations

import subprocess
import sys

import pytest

from moe_kernels.shapes import (
    ALL_FAMILIES,
    FAMILIES,
    LAYERS,
    REAL_FAMILIES,
    TOKENS_PER_STEP,
    LayerShape,
    ModelShape,
)

MODELS = [shape for family in ALL_FAMILIES.values() for shape in family.sizes.values()]


def test_layers_are_the_measured_ones() -> None:
    assert [*LAYERS] == [
        "mixtral-1b", "qwen2-moe-1b", "deepseek-v3-1b",
        "mixtral-8x7b", "qwen2-57b-a14b", "qwen3-30b-a3b", "olmoe-7b", "deepseek-v3",
        "7b-fine", "30b-fine", "gpt-oss-like", "glm-4.5-air", "qwen3-next", "qwen3-235b-a22b", "few-rows",
    ]  # fmt: skip
    assert all(name == layer.name for name, layer in LAYERS.items())
    assert {LAYERS[f.sizes["1b"].name].tokens for f in FAMILIES.values()} == {TOKENS_PER_STEP} == {16384}


def test_flops_count_each_multiply_add_as_two() -> None:
    layer = LayerShape("x", tokens=3, hidden=5, intermediate=7, experts=4, top_k=2)
    rows = 3 * 2
    up, down = 2 * rows * 5 * (2 * 7), 2 * rows * 7 * 5
    assert layer.rows == rows
    assert layer.forward_flops == up + down
    assert layer.forward_backward_flops == 3 * (up + down)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_models_can_be_routed(model: ModelShape) -> None:
    assert model.top_k <= model.experts >= 8
    assert model.moe_layers >= 2
    assert model.heads % model.kv_heads == 0
    groups, chosen = model.extras.get("n_group", 1), model.extras.get("topk_group", 1)
    assert model.experts % groups == 0
    assert model.top_k <= chosen * model.experts // groups
    # 16 bytes: what torch's grouped GEMM, the baseline, asks of a row.
    for width in (model.hidden, model.intermediate):
        assert width * {"bfloat16": 2, "float32": 4}[model.dtype] % 16 == 0


def test_families_and_sizes_are_complete() -> None:
    assert [*FAMILIES] == ["mixtral", "qwen2-moe", "deepseek-v3"]
    for name, family in FAMILIES.items():
        assert name == family.name
        assert [*family.sizes] == ["1b", "tiny"]
        assert [shape.name for shape in family.sizes.values()] == [f"{name}-{size}" for size in family.sizes]
    for name, family in REAL_FAMILIES.items():
        assert name == family.name
        assert family.drawn
        assert [family.large, "tiny"] == [*family.sizes]
        assert family.sizes["tiny"].name == f"{name}-tiny"
    names = [shape.name for shape in MODELS]
    assert len({*names}) == len(names)


def test_reading_the_tables_imports_nothing_heavy() -> None:
    code = (
        "import importlib.util, sys, pathlib\n"
        f"path = pathlib.Path({str(sys.modules['moe_kernels.shapes'].__file__)!r})\n"
        "spec = importlib.util.spec_from_file_location('shapes', path)\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "sys.modules['shapes'] = module\n"
        "spec.loader.exec_module(module)\n"
        "print(sorted({'torch', 'transformers', 'triton', 'numpy'} & {*sys.modules}))\n"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
