"""mxfp4 checkpoints as gpt-oss is published: its experts in 4 bits, 32 values a scale, all else in bfloat16."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

#: The value of each code of e2m1.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(blocks, scales) of (E, rows, columns): (E, rows, columns / 32, 16) and (E, rows, columns / 32), uint8."""
    values = weight.float().unflatten(-1, (-1, 32))
    exponents = (values.abs().amax(-1, keepdim=True).log2().floor() - 2).clamp(-127, 127)
    distances = (values / exponents.exp2()).unsqueeze(-1) - torch.tensor(E2M1)
    codes = distances.abs().argmin(-1)
    return (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8), (exponents + 127).squeeze(-1).to(torch.uint8)


def dequantised(blocks: Tensor, scales: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """(E, rows, columns), by the format: the product in float32, rounded once."""
    codes = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2).long()
    values = torch.tensor(E2M1)[codes] * torch.ldexp(torch.ones(scales.shape), scales.int() - 127).unsqueeze(-1)
    return values.flatten(-2).to(dtype)


def save_model(folder: Path, hidden: int = 64, intermediate: int = 96) -> None:
    """A random gpt-oss in bfloat16, of two layers and 4 experts."""
    from transformers import AutoModelForCausalLM, GptOssConfig

    config = GptOssConfig(
        vocab_size=128,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=8,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(std=0.1)
    model.save_pretrained(folder)


def write_checkpoint(folder: Path, **sizes: int) -> dict[str, Tensor]:
    """That model with its experts in mxfp4; what its file holds, by key."""
    save_model(folder, **sizes)
    return quantise_checkpoint(folder)


def quantise_checkpoint(folder: Path) -> dict[str, Tensor]:
    """Turn a 16-bit checkpoint of gpt-oss in one file into mxfp4."""
    from safetensors.torch import load_file, save_file

    held: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):  # stored by columns in 16 bits
            held[f"{name}_blocks"], held[f"{name}_scales"] = quantised(tensor.mT)
        else:
            held[name] = tensor
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    path = folder / "config.json"
    config: dict[str, Any] = json.loads(path.read_text())
    others = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": others}
    path.write_text(json.dumps(config))
    return held


def dequantise_checkpoint(folder: Path) -> None:
    """The way back, to values in float32 that mxfp4 holds."""
    from safetensors.torch import load_file, save_file

    held = load_file(folder / "model.safetensors")
    for name in [name.removesuffix("_blocks") for name in held if name.endswith("_blocks")]:
        values = dequantised(held.pop(f"{name}_blocks"), held.pop(f"{name}_scales"), torch.float32)
        held[name] = values.mT.contiguous()
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    path = folder / "config.json"
    config: dict[str, Any] = json.loads(path.read_text())
    del config["quantization_config"]
    path.write_text(json.dumps(config))
