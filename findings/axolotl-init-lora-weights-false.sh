#!/usr/bin/env bash
# Axolotl 0.19.0 and 0.21.0: `peft_init_lora_weights: false` is accepted and does nothing. PEFT's init_lora_weights=False
# draws both LoRA factors, so that the adapter changes the model from the first step; the key's schema allows a boolean,
# but the loader passes a value on only where it is true. The factor B is zeros as without the key, and nothing is said.
# So two trainings that should start from a drawn adapter, to compare gradients of both factors at the first step, start
# from one whose A gets no gradient at all.
#
# Seen with axolotl 0.19.0, peft 0.20.0, transformers 5.16.1, torch 2.13.0, Python 3.11; axolotl 0.21.0 with peft 0.21.2
# does the same.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat >"$work/probe.py" <<'PY'
import peft
from axolotl.loaders.adapter import load_lora
from axolotl.utils.dict import DictDefault
from transformers import Qwen3Config, Qwen3ForCausalLM

SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, head_dim=16)
YAML = dict(base_model="x", adapter="lora", lora_r=4, lora_alpha=8, lora_dropout=0.0, lora_target_modules=["q_proj"])


def fresh():
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, num_attention_heads=2, num_key_value_heads=2))


def drawn(model):
    """Whether factor A and factor B hold anything but zeros."""
    return [any(bool(p.any()) for n, p in model.named_parameters() if f"lora_{letter}" in n) for letter in "AB"]


print("peft:", *drawn(peft.get_peft_model(fresh(), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))))
for value in (False, "gaussian"):
    model, _ = load_lora(fresh(), DictDefault(YAML | {"peft_init_lora_weights": value}))
    print(f"axolotl, {value}:", *drawn(model))
PY
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -q torch==2.13.0 axolotl==0.19.0
HF_HUB_OFFLINE=1 AXOLOTL_DO_NOT_TRACK=1 "$work/venv/bin/python" -W ignore "$work/probe.py" 2>"$work/log" | grep -E "^(peft|axolotl)" | tee "$work/seen" ||
	{ cat "$work/log" >&2; exit 1; }
diff "$work/seen" - <<'WANTED' || { echo "changed" >&2; exit 1; }
peft: True True
axolotl, False: True False
axolotl, gaussian: True False
WANTED
echo "as found: peft_init_lora_weights: false is accepted and ignored"
