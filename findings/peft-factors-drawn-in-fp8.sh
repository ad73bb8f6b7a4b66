#!/usr/bin/env bash
# PEFT 0.20.0 and 0.21.2: a new LoRA adapter over fp8 weights starts with an A rounded to e4m3. PEFT casts the factors
# it has drawn to the dtype of the weight and then back to float32. The values of A are below 1/sqrt(inputs), where e4m3
# has steps of 2**-9: for DeepSeek-V3's 7,168 inputs 13 values are left, 8% of A are zeros, and A is off by 8% (over
# bfloat16 weights 0.2%). Nothing shows it: the factors are float32. Linear layers (target_modules) and expert weights
# (target_parameters) do so alike; an adapter that is saved and loaded keeps its values.
#
# Seen with peft 0.20.0 and 0.21.2, torch 2.14.1, Python 3.12, on a CPU.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat >"$work/probe.py" <<'PY'
import sys

import peft
import torch


def model(dtype, experts):
    weight = torch.zeros(*[4] * experts, 16, 7168, dtype=dtype)
    layer = torch.nn.Linear(7168, 16, bias=False, device="meta")
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    return torch.nn.ModuleDict({"proj": layer})


def factor(adapted):
    return adapted.base_model.model["proj"].lora_A["default"].weight.data


def first(dtype, experts):
    """The A of a new adapter, and whether one with other values is the same after saving and loading."""
    torch.manual_seed(0)
    target = {"target_parameters": ["proj.weight"]} if experts else {"target_modules": ["proj"]}
    adapted = peft.get_peft_model(model(dtype, experts), peft.LoraConfig(r=16, **target))
    drawn = factor(adapted).clone()
    trained = factor(adapted).mul_(1.01)
    adapted.save_pretrained(sys.argv[1])
    return drawn, factor(peft.PeftModel.from_pretrained(model(dtype, experts), sys.argv[1])).equal(trained)


print("peft", peft.__version__)
for experts in (False, True):
    exact, _ = first(torch.float32, experts)
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        drawn, kept = first(dtype, experts)
        off, zeros = (drawn - exact).norm() / exact.norm(), (drawn == 0).float().mean()
        print(f"{'experts' if experts else 'linear'} in {dtype}: A of {drawn.dtype}, {off:.1%} off, {zeros:.0%} zeros,",
              f"{len(drawn.unique())} different values; loaded as saved {kept}")
PY
"${PYTHON:-python3.12}" -m venv "$work/venv"
for version in 0.20.0 0.21.2; do
	"$work/venv/bin/python" -m pip install -q torch==2.14.1 transformers==5.20.1 "peft==$version"
	HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W ignore "$work/probe.py" "$work/adapter" 2>"$work/log" ||
		{ cat "$work/log" >&2; exit 1; }
done | tee "$work/seen"
for version in 0.20.0 0.21.2; do
	cat <<WANTED
peft $version
linear in torch.bfloat16: A of torch.float32, 0.2% off, 0% zeros, 2343 different values; loaded as saved True
linear in torch.float8_e4m3fn: A of torch.float32, 8.2% off, 8% zeros, 13 different values; loaded as saved True
experts in torch.bfloat16: A of torch.float32, 0.2% off, 0% zeros, 2818 different values; loaded as saved True
experts in torch.float8_e4m3fn: A of torch.float32, 8.2% off, 8% zeros, 13 different values; loaded as saved True
WANTED
done | diff "$work/seen" - || { echo "changed" >&2; exit 1; }
echo "as found: over fp8 weights the first values of A are rounded to e4m3"
