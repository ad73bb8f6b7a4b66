#!/usr/bin/env bash
# PEFT 0.20.0 and 0.21.2, bitsandbytes 0.50.2: of a MoE layer whose two expert weights are kept in 4 bits and both have a
# LoRA adapter (target_parameters), only the adapter of gate_up_proj counts. Both have trainable factors and are saved;
# the output is that of the first alone, to the bit, and nothing is said. In 16 bits both count, and in 4 bits each does
# where it is the only one.
#
# Seen with peft 0.21.2, transformers 5.20.1, torch 2.14.1, Python 3.12, on a CPU.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat >"$work/probe.py" <<'PY'
import bitsandbytes.nn.parametrize as four_bits
import peft
import torch
import transformers

WEIGHTS = "gate_up_proj", "down_proj"
CONFIG = transformers.Qwen3MoeConfig(
    vocab_size=53, hidden_size=64, num_attention_heads=2, num_key_value_heads=2, head_dim=32, num_hidden_layers=1,
    moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2, intermediate_size=32,
)


def logits(packed, adapted):
    torch.manual_seed(0)
    model = transformers.Qwen3MoeForCausalLM(CONFIG).eval()
    if packed:
        for name in WEIGHTS:
            four_bits.replace_parameter_4bit(model.model.layers[0].mlp.experts, name, quant_type="nf4")
    names = [f"model.layers.0.mlp.experts.{name}" for name in adapted]
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=32, target_parameters=names))
    factors = [p for n, p in model.named_parameters() if ".lora_" in n]
    for factor in factors:  # alike wherever a weight has an adapter: the shapes differ
        factor.data.normal_(std=0.3, generator=torch.Generator().manual_seed(sum(factor.shape)))
    with torch.no_grad():
        return model(torch.arange(12)[None]).logits, sum(factor.requires_grad for factor in factors)


for packed in (False, True):
    both, factors = logits(packed, WEIGHTS)
    for name in WEIGHTS:
        print(f"{4 if packed else 16} bits, {factors} factors: as with {name}'s alone", torch.equal(both, logits(packed, [name])[0]))
PY
"${PYTHON:-python3.12}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -q torch==2.14.1 transformers==5.20.1 peft==0.21.2 bitsandbytes==0.50.2
HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W ignore "$work/probe.py" 2>"$work/log" | tee "$work/seen" ||
	{ cat "$work/log" >&2; exit 1; }
diff "$work/seen" - <<'WANTED' || { echo "changed" >&2; exit 1; }
16 bits, 4 factors: as with gate_up_proj's alone False
16 bits, 4 factors: as with down_proj's alone False
4 bits, 4 factors: as with gate_up_proj's alone True
4 bits, 4 factors: as with down_proj's alone False
WANTED
echo "as found: of two adapters of 4-bit expert weights one does not count"
