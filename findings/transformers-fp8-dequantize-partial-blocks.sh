#!/usr/bin/env bash
# transformers 5.20.1, 5.23.0 and 5.24.0, block-fp8 checkpoints (one scale for each 128 x 128 values, the last block of
# a row or column smaller) that are dequantised as they are loaded: of a matrix whose size is no multiple of 128, the
# blocks are taken for equal parts of it, 192 values for 2 of 96 in place of 128 and 64. The weights are off by some
# percent and nothing is said. Where no equal parts exist, the checkpoint does not load: kv_a_proj_with_mqa of
# DeepSeek-V3's attention has 576 rows and 5 rows of scales. FP8Linear, the same library's layer for such weights, has
# scales of these shapes. Not only FineGrainedFP8Config(dequantize=True) does so: without a GPU that computes in fp8,
# transformers dequantises by itself, with a warning that it does, to the same weights. What is right is a model from a
# 16-bit checkpoint of the same weights, dequantised by the format in float32 arithmetic.
#
# Seen with transformers 5.20.1, 5.23.0 and 5.24.0, accelerate 1.15.0, torch 2.14.1, Python 3.12, on a CPU.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat >"$work/probe.py" <<'PY'
import json
import pathlib
import sys

import safetensors.torch
import torch
import transformers
from transformers.integrations.finegrained_fp8 import FP8Linear

FOLDER = pathlib.Path(sys.argv[1])
SIDE = 128
SIZES = dict(vocab_size=53, hidden_size=256, intermediate_size=256, num_attention_heads=2, num_hidden_layers=1,
             num_experts_per_tok=2, dtype="bfloat16")
FORMAT = dict(quant_method="fp8", activation_scheme="dynamic", weight_block_size=[SIDE, SIDE])


def in_blocks(weight):
    """The codes, the scales and the values in bfloat16 that these two stand for, one block after the other."""
    codes, values = torch.empty_like(weight, dtype=torch.float8_e4m3fn), torch.empty_like(weight, dtype=torch.bfloat16)
    scales = torch.empty([-(-n // SIDE) for n in weight.shape])
    for r in range(scales.shape[0]):
        for c in range(scales.shape[1]):
            block = slice(r * SIDE, (r + 1) * SIDE), slice(c * SIDE, (c + 1) * SIDE)
            scales[r, c] = weight[block].float().abs().max() / 448
            codes[block] = (weight[block].float() / scales[r, c]).to(codes.dtype)
            values[block] = (codes[block].float() * scales[r, c]).bfloat16()
    return codes, scales, values


def weights(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(FOLDER / folder, **options).state_dict()


def compare(size, config):
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(FOLDER / "16")
    config.save_pretrained(FOLDER / "8")
    tensors = safetensors.torch.load_file(FOLDER / "16/model.safetensors")
    stored = dict(tensors)
    for name, tensor in tensors.items():
        if "_proj" in name:
            stored[name], stored[f"{name}_scale_inv"], tensors[name] = in_blocks(tensor)
    safetensors.torch.save_file(tensors, FOLDER / "16/model.safetensors", {"format": "pt"})
    safetensors.torch.save_file(stored, FOLDER / "8/model.safetensors", {"format": "pt"})
    path = FOLDER / "8/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": FORMAT}))
    want = weights("16")
    try:
        got = weights("8", quantization_config=transformers.FineGrainedFP8Config(dequantize=True))
    except RuntimeError as error:
        return print(size, type(error).__name__)
    off = {n: (got[n].float() - t.float()).norm() / t.float().norm() for n, t in want.items() if not got[n].equal(t)}
    print(size, ", ".join(f"{n.rpartition('.')[2]} off by {error:.1%}" for n, error in off.items()) or "right")
    default = weights("8")
    print(size, "the same without the option", all(default[n].equal(got[n]) for n in want))


print("transformers", transformers.__version__)
layers = (FP8Linear(256, size, block_size=(SIDE, SIDE)) for size in (192, 576))
print("scales of FP8Linear", *(list(layer.weight_scale_inv.shape) for layer in layers))
for size in (256, 192):
    compare(size, transformers.Qwen3MoeConfig(**SIZES, moe_intermediate_size=size, num_experts=4, head_dim=128,
                                              num_key_value_heads=2))
for rotary in (128, 64):
    compare(512 + rotary, transformers.DeepseekV3Config(
        **SIZES, moe_intermediate_size=128, n_routed_experts=4, num_key_value_heads=2, n_group=1, topk_group=1,
        first_k_dense_replace=0, q_lora_rank=128, kv_lora_rank=512, qk_rope_head_dim=rotary, qk_nope_head_dim=128,
        v_head_dim=128))
PY
"${PYTHON:-python3.12}" -m venv "$work/venv"
for version in 5.20.1 5.23.0 5.24.0; do
	"$work/venv/bin/python" -m pip install -q torch==2.14.1 accelerate==1.15.0 "transformers==$version"
	HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W ignore "$work/probe.py" "$work/$version" 2>"$work/log" ||
		{ cat "$work/log" >&2; exit 1; }
done | tee "$work/seen"
for version in 5.20.1 5.23.0 5.24.0; do
	cat <<WANTED
transformers $version
scales of FP8Linear [2, 2] [5, 2]
256 right
256 the same without the option True
192 gate_up_proj off by 4.5%, down_proj off by 4.8%
192 the same without the option True
640 right
640 the same without the option True
576 RuntimeError
WANTED
done | diff "$work/seen" - || { echo "changed" >&2; exit 1; }
echo "as found: where a size is no multiple of 128, values get the scale of another block or the checkpoint does not load"
