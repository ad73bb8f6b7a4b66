"""Model folders whose config.json is broken: `verify` reads layers that make sense from it, or says a sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random

import pytest
import torch
from budget import fuzz
from hypothesis import given
from hypothesis import strategies as st
from mutate import mutated

pytest.importorskip("transformers", reason="needs the extra [transformers]")
from transformers import AutoConfig

from moe_kernels.integrations.support import UnsupportedExperts
from moe_kernels.tools.common.errors import CommandError
from moe_kernels.tools.common.layers import expert_layers, read_target

SIZES = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 1}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
SIZES |= {"first_k_dense_replace": 0}  # DeepSeek's only layer has experts
MODELS = ("mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss")


@fuzz(0.5)
@given(random=st.randoms(use_true_random=False))
def test_broken_configurations(
    count: Callable[[], None], tmp_path_factory: pytest.TempPathFactory, random: Random
) -> None:
    count()
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    folder.mkdir(exist_ok=True)
    AutoConfig.for_model(random.choice(MODELS), **SIZES).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    # Sizes that would take memory and minutes to refuse are not what is tried here.
    changed = {key: value for key, value in mutated(config, random).items() if key != "num_hidden_layers"}
    small = {key: value for key, value in changed.items() if not (isinstance(value, (int, float)) and value > 2**40)}
    (folder / "config.json").write_text(json.dumps(small | {"num_hidden_layers": 1}))
    try:
        layers = expert_layers(read_target(folder))
    except (CommandError, UnsupportedExperts):
        return
    for _, case in layers:
        assert min(case.hidden, case.intermediate, case.experts, case.top_k) >= 1
        assert case.dtype == torch.float32
