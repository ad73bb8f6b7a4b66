#!/usr/bin/env bash
# Expert weights that bitsandbytes keeps in 4 bits (replace_parameter_4bit) train under FSDP2, and torch's full state
# dict of such a model fails: get_model_state_dict, with which accelerate, and so transformers' Trainer, saves an adapter
# where state_dict_type is FULL_STATE_DICT, reads each key as an attribute, bitsandbytes' hook calls the packed weight by
# the name of the weight, and reading that dequantises a DTensor ("got mixed torch.Tensor and DTensor"). So such a
# training ends at its first save. With SHARDED_STATE_DICT accelerate asks PEFT for the adapter, and that is saved.
#
# Seen with bitsandbytes 0.50.2, torch 2.14.1, Python 3.12, one rank that talks gloo, on a CPU.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat >"$work/probe.py" <<'PY'
import bitsandbytes
import torch
import torch.distributed as dist
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

dist.init_process_group("gloo")
torch.manual_seed(0)


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = torch.nn.Module()
        self.experts.weight = torch.nn.Parameter(torch.randn(4, 64, 64), requires_grad=False)
        self.adapter = torch.nn.Linear(64, 64)

    def forward(self, x):
        return x @ self.experts.weight[0].mT + self.adapter(x)


options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True)
found = {}
for bits in (32, 4):
    model = Layer()
    if bits == 4:
        replace_parameter_4bit(model.experts, "weight", compress_statistics=True, quant_type="nf4")
    fully_shard(model)
    model(torch.randn(8, 64)).square().mean().backward()
    trained = bool(model.adapter.weight.grad.full_tensor().any())
    try:
        found[bits] = trained, sorted(get_model_state_dict(model, options=options))
    except RuntimeError as error:
        found[bits] = trained, str(error).split(",")[0]
print(f"bitsandbytes {bitsandbytes.__version__}: 32 bits {found[32]}; 4 bits {found[4]}", flush=True)
dist.destroy_process_group()
PY
"${PYTHON:-python3.12}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -q torch==2.14.1 numpy bitsandbytes==0.50.2
seen=$(OMP_NUM_THREADS=1 "$work/venv/bin/torchrun" --nproc-per-node 1 --master-port 29521 "$work/probe.py" \
	2>"$work/log" | grep "^bitsandbytes ") || { cat "$work/log" >&2; exit 1; }
echo "$seen"
wanted="bitsandbytes 0.50.2: 32 bits (True, ['adapter.bias', 'adapter.weight']); 4 bits (True, 'bitsandbytes.dequantize_4bit.default got mixed torch.Tensor and DTensor')"
[ "$seen" = "$wanted" ] || { echo "changed: expected $wanted" >&2; exit 1; }
echo "as found: a model with 4-bit expert parameters trains under FSDP2, and its full state dict cannot be made"
