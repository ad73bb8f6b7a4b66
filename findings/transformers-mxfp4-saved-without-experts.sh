#!/usr/bin/env bash
# transformers 5.16.1, 5.20.1 and 5.23.0: a gpt-oss model that was loaded from its mxfp4 checkpoint with
# Mxfp4Config(dequantize=True), which is how it is trained, is written by save_pretrained without its experts, and
# nothing is said. 5.16 and 5.20 write the experts of every layer under the keys "gate_up_proj$" and "down_proj$", each
# over the last; 5.23 writes all of them under the names of mxfp4's blocks, in bfloat16 and without scales. The saved
# config.json says nothing of mxfp4. Loading the folder again draws the experts at random, with a table of missing keys
# in the log. So do Trainer's checkpoints, as it saves by save_pretrained. save_original_format=False writes them right.
# 5.24.0 is right in both ways.
#
# Seen with transformers 5.16.1, 5.20.1, 5.23.0 and 5.24.0, accelerate 1.15.0, torch 2.14.1, Python 3.12, on a CPU.
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

FOLDER = pathlib.Path(sys.argv[1])
config = transformers.GptOssConfig(
    vocab_size=53, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=32, num_local_experts=4, num_experts_per_tok=2, sliding_window=8,
    layer_types=["sliding_attention", "full_attention"], dtype="bfloat16")
torch.manual_seed(0)
transformers.AutoModelForCausalLM.from_config(config).save_pretrained(FOLDER / "mxfp4")
file, described = FOLDER / "mxfp4/model.safetensors", FOLDER / "mxfp4/config.json"
tensors = safetensors.torch.load_file(file)
for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
    experts, inputs, outputs = tensors.pop(name).shape
    tensors[f"{name}_blocks"] = torch.randint(256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
    tensors[f"{name}_scales"] = torch.randint(118, 122, (experts, outputs, inputs // 32), dtype=torch.uint8)
safetensors.torch.save_file(tensors, file, {"format": "pt"})
quantized = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
described.write_text(json.dumps(json.loads(described.read_text()) | {"quantization_config": quantized}))

print("transformers", transformers.__version__)
load = transformers.AutoModelForCausalLM.from_pretrained
for options in ({}, {"save_original_format": False}):
    model = load(FOLDER / "mxfp4", quantization_config=transformers.Mxfp4Config(dequantize=True))
    model.save_pretrained(FOLDER / "saved", **options)
    again, held = load(FOLDER / "saved"), safetensors.torch.load_file(FOLDER / "saved/model.safetensors")
    state = again.state_dict()
    lost = [name for name, tensor in model.state_dict().items() if not state[name].equal(tensor)]
    keys = sorted(name for name in held if "proj" in name and "attn" not in name and "bias" not in name)
    print(*options or ["default"], "| lost:", len(lost), "| first key:", keys[0])
PY
"${PYTHON:-python3.12}" -m venv "$work/venv"
for version in 5.16.1 5.20.1 5.23.0 5.24.0; do
	"$work/venv/bin/python" -m pip install -q torch==2.14.1 accelerate==1.15.0 "transformers==$version"
	HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W ignore "$work/probe.py" "$work/$version" 2>"$work/log" ||
		{ cat "$work/log" >&2; exit 1; }
done | tee "$work/seen"
whole=model.layers.0.mlp.experts.down_proj
for version in 5.16.1 5.20.1 5.23.0 5.24.0; do
	case $version in
	5.23.0) wanted="4 | first key: ${whole}_blocks" ;;
	5.24.0) wanted="0 | first key: $whole" ;;
	*) wanted="4 | first key: down_proj\$" ;;
	esac
	cat <<WANTED
transformers $version
default | lost: $wanted
save_original_format | lost: 0 | first key: $whole
WANTED
done | diff "$work/seen" - || { echo "changed" >&2; exit 1; }
echo "as found: save_pretrained of a gpt-oss dequantised from mxfp4 loses its experts before transformers 5.24"
