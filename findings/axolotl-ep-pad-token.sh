#!/usr/bin/env bash
# Axolotl 0.21.0, expert_parallel_size above 1, sample packing, and a tokenizer whose pad token is its end-of-text token
# (common: many recipes set pad_token to eos_token): the end-of-text tokens inside packed sequences are taken for
# padding and get no expert output, in every MoE layer, although they are trained on and attended to. Nothing is said.
# A packed batch has no two-dimensional attention mask; the plugin then looks for input_ids == config.pad_token_id.
# With an attention mask, or with a pad token of its own, all tokens reach their experts.
#
# Seen with axolotl 0.21.0, Python 3.12, on the hook that the plugin registers; no GPU and no ranks are needed for it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat >"$work/probe.py" <<'PY'
import types

import torch
from axolotl.integrations.expert_parallel import experts_fn
from axolotl.integrations.expert_parallel.plugin import ExpertParallelPlugin

EOS = 2


class Model(torch.nn.Module):
    """Returns which tokens the expert layers of a forward would send to experts."""

    def __init__(self, pad):
        super().__init__()
        self.config = types.SimpleNamespace(pad_token_id=pad, eos_token_id=EOS)
        ExpertParallelPlugin._register_padding_dispatch_hook(self)

    def forward(self, **batch):
        return experts_fn._get_valid_token_mask().int().tolist()


ids = torch.tensor([[5, 6, EOS, 7, 8, EOS]])  # two texts in one packed sequence
positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
print("packed, pad is eos:", Model(EOS)(input_ids=ids, position_ids=positions))
print("packed, pad of its own:", Model(0)(input_ids=ids, position_ids=positions))
print("attention mask, pad is eos:", Model(EOS)(input_ids=ids, attention_mask=torch.ones_like(ids)))
PY
"${PYTHON:-python3.12}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -q torch==2.14.1
"$work/venv/bin/python" -m pip install -q axolotl==0.21.0
HF_HUB_OFFLINE=1 AXOLOTL_DO_NOT_TRACK=1 "$work/venv/bin/python" -W ignore "$work/probe.py" 2>"$work/log" | grep -E "^(packed|attention)" | tee "$work/seen" ||
	{ cat "$work/log" >&2; exit 1; }
diff "$work/seen" - <<'WANTED' || { echo "changed" >&2; exit 1; }
packed, pad is eos: [1, 1, 0, 1, 1, 0]
packed, pad of its own: [1, 1, 1, 1, 1, 1]
attention mask, pad is eos: [1, 1, 1, 1, 1, 1]
WANTED
echo "as found: end-of-text tokens of packed sequences get no expert output where pad is eos"
