"""YAML keys of the plugin, and run files for ``compare``: accepted exactly where an independent rule says so."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml
from budget import fuzz
from hypothesis import given
from hypothesis import strategies as st
from mutate import JUNK, mutated, mutated_bytes

from moe_kernels.tools.common.errors import UsageError
from moe_kernels.tools.common.runfile import dump_yaml, load_yaml
from moe_kernels.tools.compare.pair import Options, files_pair

CONFIGS = Path(__file__).parents[2] / "configs" / "moe"
BASELINE, OPTIMIZED = CONFIGS / "mixtral-1b-baseline.yml", CONFIGS / "mixtral-8x7b-moe-optimized.yml"

values = st.one_of(
    st.sampled_from(
        [*JUNK, True, False, 64, 128, 256, "auto", "layers", 64.0, "128", ["mixtral"], ["a", 7], "mixtral"]
    ),
    st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=4),
)
keys = st.sampled_from(
    [
        "moe_kernels",
        "moe_group_size",
        "moe_persistent_kernel",
        "moe_recompute",
        "moe_fp8_activations",
        "moe_kernel_models",
        "moe_router_telemetry",
        "moe_fused_router",
        "gradient_checkpointing",
    ]
) | st.sampled_from(["moe_groupsize", "moe_kernel", "moe_", "moe_bnb_fast", "experts_implementation", "base_model"])
settings = st.dictionaries(keys, values, max_size=6)


def is_valid(data: dict[str, Any]) -> bool:
    """What the documentation says, without a line of the code that is tested."""
    on, experts = data.get("moe_kernels"), data.get("experts_implementation")
    knobs = {
        "moe_group_size": lambda v: (type(v) is int and v in (64, 128, 256)) or v == "auto",
        "moe_persistent_kernel": lambda v: type(v) is bool,
        "moe_recompute": lambda v: type(v) is bool,
        "moe_fp8_activations": lambda v: type(v) is bool,
        "moe_kernel_models": lambda v: type(v) is list and len(v) > 0 and all(type(name) is str for name in v),
    }
    right = {
        **knobs,
        "moe_kernels": lambda v: type(v) is bool,
        "moe_router_telemetry": lambda v: type(v) is bool or v == "layers",
        "moe_fused_router": lambda v: type(v) is bool,
    }
    if any(data.get(key) is not None and not rule(data[key]) for key, rule in right.items()):
        return False
    if any(key in data for key in ("moe_groupsize", "moe_kernel")):
        return False
    # A key that is not like any of ours may be another plugin's, unless the run uses this one.
    if "moe_" in data and (experts == "moe_kernels" or any(data.get(key) is not None for key in right)):
        return False
    if on is None and any(data.get(key) is not None for key in knobs):
        return False
    if on and data.get("moe_recompute") and data.get("gradient_checkpointing"):
        return False
    return experts in (None, "moe_kernels") if on else experts != "moe_kernels"


@pytest.mark.skipif(importlib.util.find_spec("axolotl") is None, reason="needs axolotl")
@fuzz(4)
@given(data=settings | settings.map(lambda data: data | {"moe_kernels": True}))
def test_keys(count: Callable[[], None], data: dict[str, Any]) -> None:
    from pydantic import ValidationError

    from axolotl.integrations.moe_kernels.args import MoeKernelsArgs

    count()
    try:
        accepted = MoeKernelsArgs(**data)
    except ValidationError:
        assert not is_valid(data)
        return
    assert is_valid(data)
    for key, value in accepted.model_dump().items():
        if key in data:
            assert value == data[key]
            assert type(value) is type(data[key])


@fuzz(2)
@given(random=st.randoms(use_true_random=False))
def test_run_files_as_bytes(
    count: Callable[[], None], tmp_path_factory: pytest.TempPathFactory, random: Random
) -> None:
    count()
    path = tmp_path_factory.getbasetemp() / "run.yml"
    path.write_bytes(mutated_bytes(BASELINE.read_bytes(), random))
    try:
        config = load_yaml(path)
    except UsageError:
        return
    assert isinstance(config, dict)
    assert all(isinstance(key, str) for key in config)


@fuzz(2)
@given(random=st.randoms(use_true_random=False))
def test_run_files_as_settings(
    count: Callable[[], None], tmp_path_factory: pytest.TempPathFactory, random: Random
) -> None:
    count()
    folder = tmp_path_factory.getbasetemp()
    paths = folder / "baseline.yml", folder / "optimized.yml"
    for path, source in zip(paths, (BASELINE, OPTIMIZED), strict=True):
        config = mutated(yaml.safe_load(source.read_text()), random)
        path.write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    try:
        pair = files_pair(*paths, Options(size="own", steps=random.choice((None, 1, 20, 60))))
    except UsageError:
        return
    assert [run.uses_kernels for run in pair.runs] == [False, True, False]
    for run in pair.runs:
        assert run.steps >= 13
        assert yaml.safe_load(dump_yaml(run.config)) == run.config
