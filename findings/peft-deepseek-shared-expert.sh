#!/usr/bin/env bash
# PEFT 0.21.2 and transformers 5.20.1, LoRA on DeepSeek-V3: target_modules that name gate_proj, up_proj and down_proj
# adapt the routed experts alone. The shared expert and the dense layers at the start of the model, which have modules
# of just these names, get no adapter. Even target_modules that name nothing but the shared expert, as names with their
# path or as a regular expression, adapt the routed experts in its place. Nothing is said.
# PEFT turns the names of projections of this model family into target_parameters of the fused expert weights and drops
# them from target_modules, whatever path stands before them. target_parameters with the path of the weight
# (shared_experts.gate_proj.weight) adapt the shared expert.
#
# Seen with peft 0.21.2 and transformers 5.20.1, Python 3.12; peft 0.20.0 with transformers 5.16.1 does the same.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat >"$work/probe.py" <<'PY'
import peft
import transformers

SIZES = dict(vocab_size=53, hidden_size=32, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=2)
EXPERTS = dict(intermediate_size=24, moe_intermediate_size=24, n_routed_experts=4, n_shared_experts=1,
               num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1)
HEADS = dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16)


def adapted(**targets):
    """The modules of the second layer's MLP that LoRA trains, and whether it trains the dense first layer's."""
    config = transformers.DeepseekV3Config(**SIZES, **EXPERTS, **HEADS)
    model = peft.get_peft_model(transformers.DeepseekV3ForCausalLM(config), peft.LoraConfig(r=4, **targets))
    names = {n.partition(".lora_")[0] for n, p in model.named_parameters() if p.requires_grad}
    experts = sorted({n.partition("layers.1.mlp.")[2].partition(".")[0] for n in names if "layers.1.mlp." in n})
    return experts, any("layers.0.mlp." in n for n in names)


projections = ("gate_proj", "up_proj", "down_proj")
shared = [f"shared_experts.{name}" for name in projections]
print("names:", *adapted(target_modules=list(projections)))
print("names of the shared expert:", *adapted(target_modules=shared))
print("its regular expression:", *adapted(target_modules=r".*\.shared_experts\.(gate|up|down)_proj"))
print("its weights:", *adapted(target_modules=["o_proj"], target_parameters=[f"{name}.weight" for name in shared]))
PY
"${PYTHON:-python3.12}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -q torch==2.14.1 transformers==5.20.1 peft==0.21.2
HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W ignore "$work/probe.py" 2>"$work/log" | tee "$work/seen" ||
	{ cat "$work/log" >&2; exit 1; }
diff "$work/seen" - <<'WANTED' || { echo "changed" >&2; exit 1; }
names: ['experts'] False
names of the shared expert: ['experts'] False
its regular expression: ['experts'] False
its weights: ['shared_experts'] False
WANTED
echo "as found: names of projections of DeepSeek-V3 mean its routed experts alone, the shared expert's own names too"
