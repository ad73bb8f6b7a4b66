"""Axolotl's expert parallelism on ranks that talk gloo: its plugin's own hooks, all-to-all and FSDP2 wrapping, with
our experts as the local kernel, against the whole model in one process on transformers' own experts.

`axolotl train` itself names CUDA devices when it starts several processes. So does the one function replaced here,
which sends rank 0's weights to the others.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import packed_ranks
import torch
import torch.distributed as dist
from axolotl.integrations.base import PluginManager
from axolotl.integrations.expert_parallel import experts_fn, shard
from axolotl.integrations.expert_parallel.plugin import ExpertParallelPlugin, per_rank_expert_mesh
from axolotl.utils.config import prepare_plugins
from axolotl.utils.dict import DictDefault
from torch.distributed.fsdp import fully_shard
from workers import BASELINE, GPT_OSS, Batch, adapted, batches, build, gradients, own_half, summary, train

import moe_kernels.integrations.transformers as mk
from moe_kernels import backends
from moe_kernels.integrations.peft import check_lora
from moe_kernels.integrations.quantized import packed_weight
from moe_kernels.shapes import FAMILIES
from moe_kernels.telemetry.counter import RouterCounter

PLUGIN = "axolotl.integrations.moe_kernels.plugin.MoeOptimizedPlugin"


def run(folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = {}
    data = batches()
    for family in (*FAMILIES, GPT_OSS):
        results[family, "whole"] = summary(train(build(family, BASELINE), data))
        for chunks in (1, 3):
            results[family, f"{chunks} chunks"] = train_sharded(family, data, expert_parallel_dispatch_chunks=chunks)
        results[family, "checkpointing"] = train_sharded(family, data, gradient_checkpointing=True)
        results[family, "lora, whole"] = summary(train(adapted(family, BASELINE), data))
        results[family, "lora"] = train_adapted(family, data)
        results[family, "starved"] = starved(family)
        for chunks in (1, 2):
            results[family, "idle", chunks] = one_idle_rank(family, chunks)
    packed_ranks.write_checkpoints(folder)
    results["4 bits, whole"] = packed_ranks.trained(packed_ranks.in_float32(folder, "4 bits"), data, None)
    results["4 bits"] = train_over_4_bits(folder, data)
    return results


def settings(**changes: Any) -> Any:
    """The config of a run, seen by the plugins as `axolotl train` shows it to them."""
    cfg = DictDefault(
        {
            "plugins": [PLUGIN],
            "moe_kernels": True,
            "experts_implementation": "moe_kernels",
            "expert_parallel_size": dist.get_world_size(),
            "expert_parallel_backend": "torch",
            "fsdp_version": 2,
        }
        | changes
    )
    prepare_plugins(cfg)
    return cfg


def sharded(family: str, cfg: Any) -> tuple[Any, Any]:
    """The model, each rank with its own experts, as Axolotl's loader has it before an adapter."""
    manager = PluginManager.get_instance()
    manager.pre_model_load(cfg)
    assert cfg.experts_implementation == experts_fn.EXPERT_PARALLEL
    assert experts_fn.get_local_implementation() == "moe_kernels"
    model = build(family, BASELINE)
    model.config.pad_token_id = None  # Axolotl sends no tokens of padding to the experts, and these ids are random
    model.set_experts_implementation(cfg.experts_implementation)
    with mock.patch.object(shard, "_scatter_expert_from_rank0", keep_own_slice):
        manager.post_model_build(cfg, model)
    return manager, model


def keep_own_slice(module: Any, name: str, experts: int, ranks: list[int]) -> None:
    start = ranks[dist.get_rank()] * experts
    shard._replace_with_slice(module, name, start, start + experts)


def wrap(model: Any) -> Any:
    """FSDP2 as Axolotl applies it to pure expert parallelism: the experts by themselves, each whole on its rank."""
    shard.shard_expert_lora(model, dist.get_world_size())
    ExpertParallelPlugin.fully_shard_experts(model, per_rank_expert_mesh(None, "cpu"), {})
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    for layer in base.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def train_sharded(family: str, data: list[Batch], **changes: Any) -> dict[str, Any]:
    cfg = settings(**changes)
    manager, model = sharded(family, cfg)
    manager.post_model_load(cfg, model)
    if cfg.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    held = {tuple(module.gate_up_proj.shape) for _, module in mk.experts_modules(model)}
    counter = RouterCounter(model)
    backends.reset_dispatch_counts()
    losses, grads = train(wrap(model), data, own=own_half)
    counter.close()
    return summary((losses, together(grads))) | {"held": held, "routed": counter.take().tokens.tolist()}


def train_adapted(family: str, data: list[Batch]) -> dict[str, Any]:
    cfg = settings(adapter="lora")
    manager, model = sharded(family, cfg)
    import peft

    whole = adapted(family, BASELINE)
    model = peft.get_peft_model(model, whole.peft_config["default"])
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            if "lora_" in name:
                own[name].copy_(own_experts(name, parameter, experts=own_count(family)))
    manager.post_model_load(cfg, model)
    assert check_lora(model) == 2 * len(mk.experts_modules(model))
    losses, grads = train(wrap(model), data, own=own_half)
    return summary((losses, together(grads, own_count(family))))


def train_over_4_bits(folder: Path, data: list[Batch]) -> dict[str, Any]:
    """As train_adapted, and Axolotl itself sends each rank the codes and scales of its experts."""
    cfg = settings(adapter="qlora", load_in_4bit=True, quantize_moe_experts=True)
    manager = PluginManager.get_instance()
    manager.pre_model_load(cfg)
    model = packed_ranks.load(folder, "4 bits")
    model.config.pad_token_id = None
    model.set_experts_implementation(cfg.experts_implementation)
    packed_ranks.in_4_bits(model)
    manager.post_model_build(cfg, model)
    whole = packed_ranks.in_float32(folder, "4 bits")
    model = packed_ranks.adapted(model)
    count = model.config.num_experts // dist.get_world_size()
    names, theirs = packed_ranks.by_weight(model), packed_ranks.by_weight(whole)
    factors = {theirs[name]: factor for name, factor in whole.named_parameters() if name in theirs}
    for name, parameter in model.named_parameters():
        if name in names:
            parameter.data.copy_(own_experts(name, factors[names[name]], count))
    manager.post_model_load(cfg, model)
    assert check_lora(model) == 2 * len(mk.experts_modules(model))
    held = {tuple(packed_weight(m, "down_proj", torch.float32).shape) for _, m in mk.experts_modules(model)}
    losses, grads = train(wrap(model), data, own=own_half)
    grads = {names[name]: grad for name, grad in together(grads, count).items()}
    return summary((losses, grads)) | {"held": held}


def own_count(family: str) -> int:
    [count] = {module.num_experts for _, module in mk.experts_modules(build(family, BASELINE))}
    return int(count) // dist.get_world_size()


def own_experts(name: str, factor: torch.Tensor, experts: int) -> torch.Tensor:
    """Of a factor that PEFT made for all experts, what this rank's experts have."""
    if ".experts." not in name:
        return factor
    total, first = experts * dist.get_world_size(), experts * dist.get_rank()
    if "lora_A" in name:  # (E * r, K)
        return factor.view(total, -1, factor.shape[1])[first : first + experts].flatten(0, 1)
    return factor.view(factor.shape[0], -1, total)[:, :, first : first + experts].flatten(1)  # (N, r * E)


def together(grads: dict[str, torch.Tensor], experts: int = 0) -> dict[str, torch.Tensor]:
    """Gradients of the experts of all ranks; the others are whole already."""
    found = {}
    for name, grad in grads.items():
        found[name] = grad
        if ".experts." in name and ".shared_experts." not in name:
            parts = [torch.empty_like(grad) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, grad.contiguous())
            if "lora_B" in name:
                found[name] = torch.cat([part.view(part.shape[0], -1, experts) for part in parts], dim=2).flatten(1)
            else:
                found[name] = torch.cat(parts)
    return found


def starved(family: str) -> dict[str, Any]:
    """A router that sends every token to the experts of one rank: how many gradients are not zero, per layer."""
    cfg = settings()
    manager, model = sharded(family, cfg)
    for module in model.modules():
        gate = getattr(module, "gate", getattr(module, "router", None))
        if hasattr(module, "experts") and gate is not None:
            with torch.no_grad():
                for parameter in gate.parameters():
                    parameter.zero_()
    manager.post_model_load(cfg, model)
    losses, grads = train(wrap(model), batches(1), own=own_half)
    return {
        "losses": losses,
        "nonzero": [int(torch.count_nonzero(g)) for n, g in grads.items() if n.endswith("experts.gate_up_proj")],
    }


def one_idle_rank(family: str, chunks: int) -> dict[str, Any]:
    """One sparse block, rank 1 without a token: its gradients by two ranks and whole."""
    found = {}
    for name in ("whole", "sharded"):
        if name == "whole":
            block = build(family, BASELINE).model.layers[-1].mlp
        else:
            cfg = settings(expert_parallel_dispatch_chunks=chunks)
            manager, model = sharded(family, cfg)
            manager.post_model_load(cfg, model)
            block = model.model.layers[-1].mlp
            experts_fn.set_valid_token_mask(None)
        width = block.experts.down_proj.shape[2 if family == GPT_OSS else 1]
        x = torch.randn(1, 24, width, generator=torch.Generator().manual_seed(3))
        x = (x if name == "whole" or dist.get_rank() == 0 else x[:, :0]).requires_grad_()
        out = block(x)
        (out[0] if isinstance(out, tuple) else out).square().sum().backward()
        grads = gradients(block)
        if name == "sharded":  # pure expert parallelism halves them, for a mean over ranks of the loss
            grads = {n: g * dist.get_world_size() if n.startswith("experts.") else g for n, g in grads.items()}
            grads = {n.removeprefix("."): g for n, g in together({f".{n}": g for n, g in grads.items()}).items()}
        found[name] = {"dx": x.grad, "grads": grads}
    return found
