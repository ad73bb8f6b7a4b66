"""Tiny models of transformers by family. A test names what it needs to be otherwise, and nothing else."""

from __future__ import annotations

from typing import Any

import torch

COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 40,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 40, "num_experts": 6},
    # Names of experts in a checkpoint have one digit or two.
    "qwen3_moe": {"moe_intermediate_size": 24, "head_dim": 16, "num_experts": 12, "norm_topk_prob": True},
    "olmoe": {"num_experts": 8},
    # A dense layer first, groups of experts, a shared expert.
    "deepseek_v3": {
        "moe_intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    },
    # Stored transposed and interleaved, with biases and a clamp.
    "gpt_oss": {"head_dim": 16, "num_local_experts": 4, "layer_types": ["full_attention"] * 2},
    # Without a gate; one layer has experts.
    "nemotron_h": {
        "head_dim": 16,
        "layers_block_type": ["full_attention", "moe"],
        "moe_intermediate_size": 24,
        "moe_shared_expert_intermediate_size": 24,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
    },
}


def tiny_config(family: str, **changes: Any) -> Any:
    """The configuration of a tiny model; ``changes`` are of any of its keys."""
    from transformers import AutoConfig

    return AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family], **changes})


def tiny_model(config: Any, implementation: str = "eager", std: float = 0.25) -> Any:
    """A causal model whose random weights are large enough that a wrong expert shows in the logits."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(7)
    made = AutoModelForCausalLM.from_config(config, experts_implementation=implementation)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0.0, std) if parameter.dim() > 1 else parameter.uniform_(0.5, 1.5)
    return made
