#!/usr/bin/env bash
# PEFT 0.20.0 and 0.21.2: `layers_to_transform` and `exclude_modules` choose among `target_modules` alone. Weights named in
# `target_parameters`, which is how LoRA reaches the experts of transformers 5, are adapted in every layer, also in those
# that were left out or excluded by name, and nothing is said. Axolotl hands both on (`peft_layers_to_transform`,
# `lora_exclude_modules`). Whoever adapts the upper half of a model trains the attention of that half and the experts of
# all of it. Naming each parameter with its layer does what was meant.
#
# Seen with peft 0.20.0 and 0.21.2, transformers 5.16.1, torch 2.13.0, Python 3.11.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat >"$work/probe.py" <<'PY'
import re

import peft
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

SIZES = dict(vocab_size=64, hidden_size=32, moe_intermediate_size=32, num_hidden_layers=4, num_experts=4, head_dim=16,
             num_attention_heads=2, num_key_value_heads=2)  # fmt: skip


def adapted(weights, **choice):
    """The layers whose attention and whose experts have an adapter."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], target_parameters=weights, **choice)
    model = peft.get_peft_model(Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES)), config)
    names = [name for name, _ in model.named_parameters() if "lora_A" in name]
    return [sorted({int(re.search(r"layers\.(\d)", n)[1]) for n in names if part in n}) for part in ("q_proj", "experts")]


every = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
by_layer = [f"layers.{layer}.{weight}" for layer in (2, 3) for weight in every]
for name, weights, choice in (
    ("layers_to_transform", every, {"layers_to_transform": [2, 3]}),
    ("exclude_modules", every, {"exclude_modules": r".*layers\.[01]\..*"}),
    ("named by layer", by_layer, {"layers_to_transform": [2, 3]}),
):
    print(f"peft {peft.__version__}, {name}: attention of {{}}, experts of {{}}".format(*adapted(weights, **choice)))
PY
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -q torch==2.13.0 transformers==5.16.1 peft==0.20.0
for version in 0.20.0 0.21.2; do
	"$work/venv/bin/python" -m pip install -q "peft==$version"
	HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W ignore "$work/probe.py"
done | tee "$work/seen"
diff "$work/seen" - <<'WANTED' || { echo "changed" >&2; exit 1; }
peft 0.20.0, layers_to_transform: attention of [2, 3], experts of [0, 1, 2, 3]
peft 0.20.0, exclude_modules: attention of [2, 3], experts of [0, 1, 2, 3]
peft 0.20.0, named by layer: attention of [2, 3], experts of [2, 3]
peft 0.21.2, layers_to_transform: attention of [2, 3], experts of [0, 1, 2, 3]
peft 0.21.2, exclude_modules: attention of [2, 3], experts of [0, 1, 2, 3]
peft 0.21.2, named by layer: attention of [2, 3], experts of [2, 3]
WANTED
echo "as found: the layers chosen for modules are not those of the experts"
