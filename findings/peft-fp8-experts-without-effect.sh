#!/usr/bin/env bash
# PEFT 0.20.0 and 0.21.2: LoRA on expert weights in block-fp8 (target_parameters; e4m3 codes and a float32 scale for
# each 128 x 128 of them) has no effect, gets gradients of zeros, and nothing is said. PEFT adds the product of the
# factors to the codes, not to what codes and scales stand for, and rounds the sum to e4m3: beside codes of up to 448 an
# adapter of ordinary size is lost. The gradient of the codes, that of the weight times the scale, passes through e4m3
# too, which has nothing between 0 and 2**-9. Over the same weights in 16 bits the same adapter changes the output by 4%
# and has gradients; in fp8 it does so only divided by the scale (here 2**-12 for every block), still without gradients.
# PEFT takes e4m3 weights on purpose, since its pull request 3055, which was made for MiniMax-M2.5. The layer here is
# one of plain torch that holds codes and scales: transformers runs its own fp8 layers on a GPU alone.
#
# Seen with peft 0.20.0 and 0.21.2, torch 2.14.1, Python 3.12, on a CPU.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat >"$work/probe.py" <<'PY'
import peft
import torch

SCALE = 2.0**-12
torch.manual_seed(0)
CODES = (0.02 * torch.randn(4, 256, 512) / SCALE).to(torch.float8_e4m3fn)  # experts, outputs, inputs
SCALES = torch.full((4, 2, 4), SCALE)  # one for each block
X, GRAD = torch.randn(32, 512), 0.01 * torch.randn(4, 32, 256)


def values(codes):
    return codes.float() * SCALES.repeat_interleave(128, 1).repeat_interleave(128, 2)


class Experts(torch.nn.Module):
    def __init__(self, fp8):
        super().__init__()
        self.fp8 = fp8
        self.weight = torch.nn.Parameter(CODES if fp8 else values(CODES).bfloat16(), requires_grad=False)

    def forward(self, x):
        weight = self.weight  # with the adapter, by PEFT
        return x @ (values(weight) if self.fp8 else weight.float()).mT


def results(fp8, times=1):
    model = peft.get_peft_model(
        torch.nn.ModuleDict({"experts": Experts(fp8)}),
        peft.LoraConfig(r=16, lora_alpha=32, target_parameters=["experts.weight"]),
    )
    layer = model.base_model.model["experts"]
    factors = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    generator = torch.Generator().manual_seed(1)
    for factor in factors:
        factor.data.normal_(std=0.01, generator=generator)
    factors[1].data.mul_(times)
    output = layer(X)
    output.backward(GRAD)
    with model.disable_adapter():
        base = layer(X)
    change = (output - base).norm() / base.norm()
    zeros = [f"{(f.grad == 0).float().mean():.0%}" for f in factors]
    return f"{factors[0].dtype} factors, output changed by {change:.1%}, zeros in the gradients {' '.join(zeros)}"


print("peft", peft.__version__)
print("16 bits:", results(False))
print("fp8:", results(True))
print("fp8, divided by the scale:", results(True, 1 / SCALE))
PY
"${PYTHON:-python3.12}" -m venv "$work/venv"
for version in 0.20.0 0.21.2; do
	"$work/venv/bin/python" -m pip install -q torch==2.14.1 transformers==5.20.1 "peft==$version"
	HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W ignore "$work/probe.py" 2>"$work/log" || { cat "$work/log" >&2; exit 1; }
done | tee "$work/seen"
for version in 0.20.0 0.21.2; do
	cat <<WANTED
peft $version
16 bits: torch.float32 factors, output changed by 3.9%, zeros in the gradients 0% 0%
fp8: torch.float32 factors, output changed by 0.0%, zeros in the gradients 100% 100%
fp8, divided by the scale: torch.float32 factors, output changed by 4.1%, zeros in the gradients 100% 100%
WANTED
done | diff "$work/seen" - || { echo "changed" >&2; exit 1; }
echo "as found: LoRA on block-fp8 experts is added to the codes and lost, and its gradients are zeros"
