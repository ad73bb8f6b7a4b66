"""What LoRA over block-fp8 experts gives in both modes, on a CPU: errors of a layer, and the losses of a training.

    PYTHONPATH=src:tests python benchmarks/fp8_numerics.py --out benchmarks/results/fp8-numerics.json

Layers run on the torch backend, whose fp8 mode rounds as the kernels do and sums in float32; what tensor cores lose
in sums of 128 products is not in these numbers. Errors are against float64 on the dequantised weights and unrounded
rows. The training: a small Qwen3-MoE learns the bytes of Python's own library, is quantised to block-fp8, and LoRA
trains it on the pages in docs, in both modes and, as the baseline, over weights that transformers dequantised.
"""

from __future__ import annotations

import argparse
import json
import sysconfig
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from moe_kernels import fused_experts
from moe_kernels.fp8 import Fp8Weight
from moe_kernels.packed import BlockFp8
from moe_kernels.tools.check.packing import in_fp8
from moe_kernels.tools.common.machine import environment
from moe_kernels.tools.compare.judge import judge_loss

BF16 = torch.bfloat16
T, K, E, H, I, RANK = 256, 2, 4, 2048, 768, 16
DATA = ("normal", "one sign", "outlier channels")
SEQUENCE, BATCH = 128, 4


# ------------------------------------------------------------------------------------------------------- a layer
def layer(data: str) -> tuple[dict[str, Tensor], BlockFp8, BlockFp8, Tensor, Tensor]:
    """(tensors with gradients, gate_up, down, topk_ids, dout), bfloat16.

    "one sign": nothing is negative. "outlier channels": every 97th channel of X and dO is 30 times as large.
    """
    g = torch.Generator().manual_seed(0)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(*size, generator=g) * scale
        return values.abs() if data == "one sign" else values

    x, dout = normal(T, H), normal(T, H)
    gate_up, down = normal(E, 2 * I, H, scale=H**-0.5), normal(E, H, I, scale=I**-0.5)
    if data == "outlier channels":
        for tensor in (x, dout):
            tensor[..., ::97] *= 30
    leaves = {"x": x, "topk_weights": torch.rand(T, K, generator=g) + 0.1}
    for name, (n, k) in {"gate_up": (2 * I, H), "down": (H, I)}.items():
        leaves[f"{name}_lora_b"] = normal(E, n, RANK, scale=0.3 * RANK**-0.5)
        leaves[f"{name}_lora_a"] = normal(E, RANK, k, scale=k**-0.5)
    ids = torch.rand(T, E, generator=g).topk(K).indices
    rounded = {name: leaf.to(BF16) for name, leaf in leaves.items()}
    return rounded, in_fp8(gate_up.to(BF16), 2), in_fp8(down.to(BF16)), ids, dout.to(BF16)


def results(data: str, mode: str) -> dict[str, Tensor]:
    """Output and gradients in a mode, or of "truth"."""
    leaves, gate_up, down, ids, dout = layer(data)
    if mode == "truth":
        leaves, dout = {name: leaf.double() for name, leaf in leaves.items()}, dout.double()
        gate_up, down = gate_up.to(torch.float64), down.to(torch.float64)
    elif mode == "fp8":
        gate_up, down = Fp8Weight.of(gate_up), Fp8Weight.of(down)
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    lora: Any = {f"{name}_lora": (leaves[f"{name}_lora_b"], leaves[f"{name}_lora_a"]) for name in ("gate_up", "down")}
    out = fused_experts(leaves["x"], ids, leaves["topk_weights"], gate_up, down, **lora, backend="torch")
    out.backward(dout)
    grads = {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {"out": out.detach()} | grads


def errors(data: str) -> list[dict[str, Any]]:
    """A row for each mode: relative L2 errors, and by what share results are larger than the truth on average."""
    truth, rows = results(data, "truth"), []
    for mode in ("exact", "fp8"):
        found = {name: value.double() for name, value in results(data, mode).items()}
        size = {name: float(want.square().sum()) for name, want in truth.items()}
        rows.append(
            {
                "data": data,
                "mode": mode,
                "rel_error": {n: float((found[n] - truth[n]).square().sum() / size[n]) ** 0.5 for n in truth},
                "slope": {n: float((found[n] * truth[n]).sum() / size[n]) - 1 for n in truth},
            }
        )
        print(data, mode, {n: f"{e:.1e}" for n, e in rows[-1]["rel_error"].items()}, flush=True)
    return rows


# ------------------------------------------------------------------------------------------------------ a training
def batches(files: list[Path], steps: int, seed: int) -> list[Tensor]:
    """``steps`` batches (BATCH, SEQUENCE) of bytes from anywhere in the files."""
    text = torch.frombuffer(bytearray(b"\n".join(file.read_bytes() for file in files)), dtype=torch.uint8).long()
    g = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - SEQUENCE, (steps, BATCH), generator=g)
    return [torch.stack([text[s : s + SEQUENCE] for s in batch]) for batch in starts.tolist()]


def train(model: Any, data: list[Tensor], rate: float) -> tuple[list[float], list[float]]:
    """Loss and norm of the gradient at every step."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, rate, weight_decay=0.0)
    model.train()
    losses, norms = [], []
    for ids in data:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, 1.0)))
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms


def curves(folder: Path, base_steps: int, steps: int) -> dict[str, Any]:
    """The losses of each mode from one base, one adapter and one order of the data, and what ``compare`` says."""
    import peft
    import transformers
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    import moe_kernels.integrations.transformers as mk
    from support.fp8 import quantise_checkpoint

    sizes: dict[str, int] = {
        "vocab_size": 256, "hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 256,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 8,
        "num_experts_per_tok": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    base: Any = transformers.AutoModelForCausalLM.from_config(
        transformers.Qwen3MoeConfig(**sizes), dtype=torch.float32
    )
    library = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    before, _ = train(base, batches(library, base_steps, 0), 3e-3)
    base.to(BF16).save_pretrained(folder)
    quantise_checkpoint(folder)
    data = batches(sorted((Path(__file__).parents[1] / "docs").glob("*.md")), steps, 1)
    runs = []
    for name in ("dequantised", "exact", "fp8"):
        mk.register(backend="torch", fp8_activations=name == "fp8")
        options: Any = {"experts_implementation": "moe_kernels", "dtype": BF16}
        if name == "dequantised":
            options["quantization_config"] = transformers.FineGrainedFP8Config(dequantize=True)
        # transformers dequantises by itself where there is no GPU that multiplies fp8; here none does.
        with mock.patch.object(FineGrainedFP8HfQuantizer, "validate_environment", return_value=None):
            model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, **options, local_files_only=True)
        weights = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        torch.manual_seed(0)
        config = peft.LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"], target_parameters=weights)
        model = peft.get_peft_model(model, config)
        torch.manual_seed(0)
        for key, parameter in sorted(model.named_parameters()):  # PEFT draws them in the dtype of the weight
            if "lora_A" in key:
                torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        mk.check_model(model)
        losses, norms = train(model, data, 2e-3)
        role = "baseline" if name == "dequantised" else "optimized"
        runs.append(SimpleNamespace(run_id=name, role=role, ok=True, losses=losses, grad_norms=norms))
        print(name, f"{losses[0]:.5f} -> {sum(losses[-10:]) / 10:.5f}", flush=True)
    baseline, *others = runs
    verdicts: dict[str, Any] = {}
    for run in others:
        agreement = judge_loss([baseline, run], "bf16")  # type: ignore[list-item]
        verdicts[run.run_id] = {"verdict": agreement.verdict, "words": agreement.words}
        print(run.run_id, verdicts[run.run_id], flush=True)
    return {
        "sizes": sizes, "tokens_per_step": BATCH * SEQUENCE, "base_losses": before, "verdicts": verdicts,
        "runs": {run.run_id: {"losses": run.losses, "grad_norms": run.grad_norms} for run in runs},
    }  # fmt: skip


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-steps", type=int, default=120)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--out", type=Path, default=Path("fp8-numerics.json"))
    args = parser.parse_args()
    report: dict[str, Any] = {"schema": 1, "kind": "fp8-numerics", "environment": environment()}
    report["layer"] = {"tokens": T, "top_k": K, "experts": E, "hidden": H, "intermediate": I, "rank": RANK}
    report["errors"] = [row for data in DATA for row in errors(data)]
    with tempfile.TemporaryDirectory() as folder:
        report["training"] = curves(Path(folder), args.base_steps, args.steps)
    args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
