"""Block-fp8 checkpoints as publishers write them: one key per expert and projection, each quantised by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SIDE = 128


def quantised(weight: Tensor, scale_dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """(codes, scales) of a matrix, a block after the other, the last of fewer rows or columns."""
    rows, columns = weight.shape
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-rows // SIDE), -(-columns // SIDE), dtype=scale_dtype)
    for r, c in torch.cartesian_prod(*(torch.arange(0, n, SIDE) for n in weight.shape)).tolist():
        block = weight[r : r + SIDE, c : c + SIDE].float()
        scales[r // SIDE, c // SIDE] = block.abs().max() / 448
        codes[r : r + SIDE, c : c + SIDE] = (block / scales[r // SIDE, c // SIDE].float()).to(codes.dtype)
    return codes, scales


def dequantised(codes: Tensor, scales: Tensor) -> Tensor:
    """In bfloat16, by the format: the product in float32, rounded once."""
    for dim, size in enumerate(codes.shape):
        scales = scales.float().repeat_interleave(SIDE, dim).narrow(dim, 0, size)
    return (codes.float() * scales).bfloat16()


def save_model(folder: Path, intermediate: int = 256) -> None:
    """A random Qwen3-MoE in bfloat16, of two layers, 4 experts and hidden size 256."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    config = Qwen3MoeConfig(
        vocab_size=128,
        hidden_size=256,
        intermediate_size=256,
        moe_intermediate_size=intermediate,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_experts=4,
        num_experts_per_tok=2,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def write_checkpoint(folder: Path, intermediate: int = 256, scales: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """That model in block-fp8; what its file holds, by key."""
    save_model(folder, intermediate)
    return quantise_checkpoint(folder, scales)


def quantise_checkpoint(folder: Path, scale_dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Turn a 16-bit checkpoint in one file into block-fp8: every projection, not the router, not the head."""
    from safetensors.torch import load_file, save_file

    held: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            held[name], held[f"{name}_scale_inv"] = quantised(tensor, scale_dtype)
        else:
            held[name] = tensor
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    path = folder / "config.json"
    config: dict[str, Any] = json.loads(path.read_text())
    gates = [name.removesuffix(".weight") for name in held if name.endswith(".mlp.gate.weight")]
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [SIDE, SIDE],
        "modules_to_not_convert": ["lm_head", *gates],
    }
    path.write_text(json.dumps(config))
    return held
