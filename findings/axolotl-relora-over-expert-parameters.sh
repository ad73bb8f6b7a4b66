#!/usr/bin/env bash
# Axolotl 0.19.0 and 0.21.0: `relora: true` over LoRA on expert parameters (`lora_target_parameters`) is accepted, trains
# for `jagged_restart_steps` steps, and ends at the first restart: the merge adds each module's update to its `weight`,
# and PEFT's wrapper of a parameter has none. By then the linear layers that come before the first experts are merged
# into the base and their factors are drawn anew; those behind it are not.
#
# Seen with axolotl 0.19.0, peft 0.20.0, transformers 5.16.1, torch 2.13.0, Python 3.11; axolotl 0.21.0 with peft 0.21.2
# does the same without quantisation.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat >"$work/probe.py" <<'PY'
import peft
import torch
from axolotl.monkeypatch.relora import merge_and_save
from transformers import MixtralConfig, MixtralForCausalLM

SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_local_experts=4, head_dim=16)


def trained(**targets):
    """A model whose adapter changes it, as after some steps."""
    torch.manual_seed(0)
    base = MixtralForCausalLM(MixtralConfig(**SIZES, num_attention_heads=2, num_key_value_heads=2))
    return peft.get_peft_model(base, peft.LoraConfig(r=4, init_lora_weights=False, **targets))


def restart(model):
    """What Axolotl's callback does at a restart of a base that is not quantised: which q_proj it has merged."""
    weights = {n: p.clone() for n, p in model.named_parameters() if "q_proj.base_layer" in n}
    try:
        merge_and_save(model, "", "", reinit=True)
        end = "merged"
    except AttributeError as error:
        end = str(error)
    return end, [not torch.equal(weights[n], p) for n, p in model.named_parameters() if n in weights]


print("linear layers:", *restart(trained(target_modules=["q_proj"])))
both = dict(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
print("and experts:", *restart(trained(**both)))
PY
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -q torch==2.13.0 axolotl==0.19.0
HF_HUB_OFFLINE=1 AXOLOTL_DO_NOT_TRACK=1 "$work/venv/bin/python" -W ignore "$work/probe.py" 2>"$work/log" | grep -E "^(linear|and) " | tee "$work/seen" ||
	{ cat "$work/log" >&2; exit 1; }
diff "$work/seen" - <<'WANTED' || { echo "changed" >&2; exit 1; }
linear layers: merged [True, True]
and experts: 'ParamWrapper' object has no attribute 'weight' [True, False]
WANTED
echo "as found: a restart of ReLoRA ends at the first experts, half merged"
