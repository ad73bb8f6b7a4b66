#!/usr/bin/env bash
# A block-fp8 model of transformers under FSDP2 with mixed precision (MixedPrecisionPolicy(param_dtype=torch.bfloat16),
# which accelerate makes of bf16): its linear layers multiply the e4m3 codes as if they were the weight, without the
# scales, and nothing is said. FSDP2 casts every floating parameter as it gathers it, e4m3 codes too, and transformers'
# FP8Linear takes a weight of more than one byte an element for one that was not quantised. Without the policy FSDP2
# gathers codes and scales as they are, and with it integers, so that weights in uint8 come through.
#
# Seen with transformers 5.16.1, 5.20.1 and 5.24.0, torch 2.13.0 and 2.14.1, one rank that talks gloo, on a CPU.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat >"$work/probe.py" <<'PY'
import torch
import torch.distributed as dist
import transformers
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers.integrations.finegrained_fp8 import FP8Linear

dist.init_process_group("gloo")
torch.manual_seed(0)
SCALE = 2.0**-12
weight = 0.02 * torch.randn(256, 256)
x = torch.randn(8, 256)


def sharded(policy):
    layer = FP8Linear(256, 256, block_size=(128, 128), activation_scheme="dynamic", has_bias=False)
    with torch.no_grad():
        layer.weight.copy_((weight / SCALE).to(torch.float8_e4m3fn))
        layer.weight_scale_inv.fill_(SCALE)
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    model = torch.nn.Sequential(layer)
    seen = []
    layer.register_forward_pre_hook(lambda module, _: seen.append(module.weight.dtype))
    return fully_shard(model, mp_policy=policy), layer, seen


model, layer, seen = sharded(MixedPrecisionPolicy(param_dtype=torch.bfloat16))
with torch.no_grad():
    found = model(x).float()
codes = (weight / SCALE).to(torch.float8_e4m3fn).float()
plain, layer, stored = sharded(MixedPrecisionPolicy())
layer.forward = lambda x: x  # its own one multiplies on a GPU alone
plain(x)
error = {name: float((found - x @ w.mT).norm() / (x @ w.mT).norm()) for name, w in (("codes", codes), ("weight", weight))}
print(
    f"transformers {transformers.__version__}: weight in a forward {seen[0]}, without the policy {stored[0]}; output off "
    f"by {error['weight']:.0%} from the weight's, by {error['codes']:.0%} from that of the codes without scales",
    flush=True,
)
dist.destroy_process_group()
PY
"${PYTHON:-python3.12}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -q torch==2.14.1 numpy
for version in 5.20.1 5.24.0; do
	"$work/venv/bin/python" -m pip install -q "transformers==$version"
	seen=$(OMP_NUM_THREADS=1 "$work/venv/bin/torchrun" --nproc-per-node 1 --master-port 29519 "$work/probe.py" \
		2>"$work/log" | grep "^transformers ") || { cat "$work/log" >&2; exit 1; }
	echo "$seen"
	wanted="transformers $version: weight in a forward torch.bfloat16, without the policy torch.float8_e4m3fn; output off by 409*% from the weight's, by 0% from that of the codes without scales"
	[[ "$seen" == $wanted ]] || { echo "changed: expected $wanted" >&2; exit 1; }
done
echo "as found: under FSDP2's mixed precision fp8 linear layers multiply codes without their scales"
