#!/usr/bin/env bash
# Expert parallelism of transformers, DistributedConfig(fsdp_size=2, ep_size=2), two ranks with tokens of their own:
# before 5.23.0 the gradient of the experts is half of what it is without it, that of every other weight is right, the
# loss is right, and nothing is said. The experts' gradient is divided by the number of ranks once too often.
#
# Seen with transformers 5.20.1, 5.21.0 and 5.22.0, right in 5.23.0; torch 2.13.0 and 2.14.1, gloo, CPU, stock experts
# (grouped_mm), Mixtral; NCCL was not tried. Axolotl 0.21.0 pins 5.20.1 (its own expert parallelism is another one).
# With AdamW such a training still learns, with the experts' share of a clipped gradient norm too small; with SGD or
# weight decay the experts learn at half the rate.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat >"$work/probe.py" <<'PY'
import os, sys

import torch
import torch.distributed as dist
import transformers
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

folder = sys.argv[1]
dist.init_process_group("gloo")
rank = dist.get_rank()
config = transformers.MixtralConfig(
    vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
)
torch.manual_seed(0)
whole = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
if rank == 0:
    whole.save_pretrained(folder)
dist.barrier()
ids = torch.randint(128, (2, 2, 12), generator=torch.Generator().manual_seed(1))


def step(model, ids):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    full = {name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for name, p in model.named_parameters()}
    return float(loss.detach()), full


right_loss, right = step(whole, ids.flatten(0, 1))
sharded = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, distributed_config=DistributedConfig(fsdp_size=2, ep_size=2)
)
loss, found = step(sharded, ids[rank])
both = torch.tensor(loss)
dist.all_reduce(both)
ratio = {name: float((found[name] * grad).sum() / (grad * grad).sum()) for name, grad in right.items()}
experts = sorted({round(value, 3) for name, value in ratio.items() if ".experts." in name})
others = sorted({round(value, 3) for name, value in ratio.items() if ".experts." not in name})
if rank == 0:
    agree = abs(float(both) / 2 - right_loss) < 1e-5
    print(f"transformers {transformers.__version__}: loss right: {agree}; gradients over the right ones: "
          f"experts {experts}, others {others}", flush=True)
dist.destroy_process_group()
PY
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -q torch==2.13.0 "numpy<2.4" accelerate==1.15.0
for pair in "5.22.0 0.5" "5.23.0 1.0"; do
	read -r version share <<<"$pair"
	"$work/venv/bin/python" -m pip install -q "transformers==$version"
	seen=$(HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 "$work/venv/bin/torchrun" --nproc-per-node 2 --master-port 29517 \
		"$work/probe.py" "$work/model-$version" 2>"$work/log" | grep "^transformers ") || { cat "$work/log" >&2; exit 1; }
	echo "$seen"
	wanted="transformers $version: loss right: True; gradients over the right ones: experts [$share], others [1.0]"
	[ "$seen" = "$wanted" ] || { echo "changed: expected $wanted" >&2; exit 1; }
done
echo "as found: before 5.23.0 the experts' gradients are half under expert parallelism on two ranks"
