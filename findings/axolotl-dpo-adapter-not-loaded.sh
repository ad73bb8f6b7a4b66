#!/usr/bin/env bash
# Axolotl 0.19.0 and 0.21.0: with `rl: dpo` an adapter in `lora_model_dir` is not loaded. Its configuration is read and
# handed to TRL's trainer, which makes a new adapter of that form on the base model; the exit code is 0. Whoever goes on
# from supervised fine-tuning by DPO, as one does, prefers answers of the untrained base model and loses the adapter.
#
# Here the adapter that goes in has a B of ones, and the learning rate is next to zero: what was loaded would come out
# with a B of ones. Supervised training of the same run file keeps it.
#
# Seen with axolotl 0.19.0, peft 0.20.0, trl 1.9.0, transformers 5.16.1, torch 2.13.0, Python 3.11, on a CPU; axolotl
# 0.21.0 with peft 0.21.2 and torch 2.14.1 does the same.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat >"$work/make.py" <<'PY'
import json, sys
from pathlib import Path

import peft
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

folder = Path(sys.argv[1])
words = ["one", "two", "three", "four", "five"]
vocabulary = {word: n for n, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *words])}
tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
                        unk_token="<unk>").save_pretrained(folder / "base")  # fmt: skip
torch.manual_seed(0)
sizes = dict(vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
base = LlamaForCausalLM(LlamaConfig(**sizes))
base.save_pretrained(folder / "base")
model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
for name, parameter in model.named_parameters():
    if "lora_B" in name:
        torch.nn.init.ones_(parameter)
model.save_pretrained(folder / "adapter")
pairs = [{"prompt": a, "chosen": f"{b} {a}", "rejected": f"{a} {a}"} for a in words for b in words]
(folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
(folder / "texts.jsonl").write_text("".join(json.dumps({"text": f"{a} {b}"}) + "\n" for a in words for b in words))
fields = {f"field_{name}": name for name in pairs[0]} | {f"{name}_format": f"{{{name}}}" for name in pairs[0]}
common = {
    "base_model": str(folder / "base"), "adapter": "lora", "lora_model_dir": str(folder / "adapter"), "lora_r": 4,
    "lora_alpha": 8, "lora_target_modules": ["q_proj"], "sequence_len": 64, "micro_batch_size": 2, "max_steps": 2,
    "gradient_accumulation_steps": 1, "learning_rate": 1e-12, "optimizer": "adamw_torch", "lr_scheduler": "constant",
    "attn_implementation": "eager", "bf16": False, "fp16": False, "tf32": False, "use_cpu": True,
}  # fmt: skip
runs = {
    "sft": {"datasets": [{"path": str(folder / "texts.jsonl"), "ds_type": "json", "type": "completion"}]},
    "dpo": {"rl": "dpo", "datasets": [{"path": str(folder / "pairs.jsonl"), "ds_type": "json", "split": "train",
                                       "type": fields}]},
}  # fmt: skip
for name, run in runs.items():
    out = {"output_dir": str(folder / name), "dataset_prepared_path": str(folder / f"{name}-data")}
    (folder / f"{name}.yml").write_text(json.dumps(common | run | out))
PY
cat >"$work/read.py" <<'PY'
import sys
from pathlib import Path

from safetensors.torch import load_file

weights = load_file(Path(sys.argv[1]) / "adapter_model.safetensors")
(b,) = (weight for name, weight in weights.items() if "lora_B" in name)
print(f"{Path(sys.argv[1]).name}: B of the saved adapter is {b.float().abs().mean():.3f} in size")
PY
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -q torch==2.13.0 axolotl==0.19.0
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 AXOLOTL_DO_NOT_TRACK=1 CUDA_VISIBLE_DEVICES=
"$work/venv/bin/python" -W ignore "$work/make.py" "$work" 2>"$work/log" || { cat "$work/log" >&2; exit 1; }
for run in sft dpo; do
	"$work/venv/bin/axolotl" train "$work/$run.yml" --launcher python >"$work/log" 2>&1 || { tail -50 "$work/log" >&2; exit 1; }
	"$work/venv/bin/python" "$work/read.py" "$work/$run"
done | tee "$work/seen"
diff "$work/seen" - <<'WANTED' || { echo "changed" >&2; exit 1; }
sft: B of the saved adapter is 1.000 in size
dpo: B of the saved adapter is 0.000 in size
WANTED
echo "as found: rl: dpo starts a new adapter in place of the one in lora_model_dir"
