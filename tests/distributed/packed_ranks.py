"""LoRA over experts in few bits on ranks that talk gloo, against the same values in float32, PEFT's own way and
transformers' own experts in one process."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer
from workers import BASELINE, OURS, batches, no_delta, own_half, shard_adapted, summary, train

import moe_kernels.integrations.transformers as mk
from moe_kernels import backends
from moe_kernels.integrations import fp8 as integration
from moe_kernels.integrations.quantized import packed_weight
from moe_kernels.packed import whole
from support import fp8, mxfp4

KINDS = ("4 bits", "fp8", "mxfp4")
WEIGHTS = ("gate_up_proj", "down_proj")


def casts_everything(param: Any, policy: MixedPrecisionPolicy) -> None:
    """What FSDP2 does with each parameter in torch 2.11; later ones leave integers alone."""
    param.orig_dtype = param.sharded_param.dtype
    param.param_dtype = policy.param_dtype if policy.param_dtype != param.orig_dtype else None
    param.reduce_dtype = policy.reduce_dtype if policy.reduce_dtype != policy.param_dtype else None


def run(folder: Path) -> dict[str, Any]:
    FSDPParam.init_dtype_attrs = casts_everything
    write_checkpoints(folder)
    data = batches()
    results: dict[str, Any] = {}
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    # transformers dequantises fp8 where there is no GPU that multiplies it; here nothing does.
    with mock.patch.object(FineGrainedFP8HfQuantizer, "validate_environment", return_value=None):
        for kind in KINDS:
            results[kind, "whole"] = trained(in_float32(folder, kind), data, None)
            backends.reset_dispatch_counts()
            with no_delta():
                results[kind, "fsdp2"] = trained(packed(folder, kind), data, shard_adapted)
                if kind != "fp8":  # gloo sends none, and DDP would have to
                    results[kind, "ddp"] = trained(packed(folder, kind), data, nn.parallel.DistributedDataParallel)
            for experts, build in ((BASELINE, in_float32), (OURS, packed)):
                results[kind, "bf16", experts] = trained(
                    build(folder, kind), data, lambda model: shard_adapted(model, mp_policy=policy)
                )
            results[kind, "seen"] = seen_in_forward(packed(folder, kind), policy)
        for kind in ("fp8", "mxfp4"):  # in 4 bits torch makes no state dict of a sharded model
            results[kind, "saved"] = saved(packed(folder, kind), whole_too=kind == "mxfp4")  # gloo gathers no fp8
        # As on a GPU, where a backward needs the codes transposed as well.
        with mock.patch.object(integration, "interpreting", return_value=True):
            mk.register(backend="torch", fp8_activations=True)
            for name, wrap in (("whole", None), ("fsdp2", shard_adapted)):
                model = packed(folder, "fp8")
                found = trained(model, data, wrap)
                copied = sum(len(copies) for copies in integration._copies.values())
                results["fp8 activations", name] = found | {"copied": copied}
                del model
                integration._copies.clear()
            mk.register(backend="torch")
    return results


def write_checkpoints(folder: Path) -> None:
    if dist.get_rank() == 0:
        for kind, write in zip(KINDS, (fp8.save_model, fp8.write_checkpoint, mxfp4.write_checkpoint), strict=True):
            (folder / kind).mkdir()
            write(folder / kind)
    dist.barrier()


def in_float32(folder: Path, kind: str) -> Any:
    """The values that the packed weights stand for."""
    configs = {"fp8": FineGrainedFP8Config, "mxfp4": Mxfp4Config}
    options = {"quantization_config": configs[kind](dequantize=True)} if kind in configs else {}
    model = load(folder, kind, **options).float()  # transformers dequantises mxfp4 to bfloat16
    model.set_experts_implementation(BASELINE)  # transformers 5.16 loads no fp8 model where it is named at once
    if kind == "4 bits":
        for name, module in in_4_bits(load(folder, kind)):
            model.get_parameter(name).data.copy_(getattr(module, name.rpartition(".")[2]))
    return adapted(model)


def packed(folder: Path, kind: str) -> Any:
    model = load(folder, kind, experts_implementation=OURS)
    if kind == "4 bits":
        in_4_bits(model)
    model = adapted(model)
    assert mk.check_model(model).lora_weights == 4
    return model


def load(folder: Path, kind: str, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder / kind, dtype=torch.float32, attn_implementation="eager", **options
    )


def in_4_bits(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """As Axolotl's quantize_moe_experts does it at load; (name, its module) of each weight."""
    found = [(f"{name}.{weight}", module) for name, module in mk.experts_modules(model) for weight in WEIGHTS]
    for name, module in found:
        replace_parameter_4bit(module, name.rpartition(".")[2], compress_statistics=True, quant_type="nf4")
    return found


def adapted(model: Any) -> Any:
    """By whole names, by which alone PEFT finds parametrised weights."""
    experts = [f"{name}.{weight}" for name, _ in mk.experts_modules(model) for weight in WEIGHTS]
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "o_proj"], target_parameters=experts))
    names = by_weight(model)
    for name, parameter in model.named_parameters():
        if name in names:
            generator = torch.Generator().manual_seed(zlib.crc32(names[name].encode()))
            parameter.data.normal_(0.0, 0.15, generator=generator)
    return model.train()


def by_weight(model: nn.Module) -> dict[str, str]:
    """What each factor is called by its weight: PEFT wraps the two of a layer in another order over 4 bits."""
    modules = dict(model.named_modules())
    names = {}
    for name, _ in model.named_parameters():
        path, factor, rest = name.partition(".lora_")
        if factor:
            wrapper = modules[path]
            weight = wrapper.parameter_name if isinstance(wrapper, ParamWrapper) else "weight"
            names[name] = f"{path.replace('.base_layer', '')}.{weight}{factor}{rest}"
    return names


def trained(model: Any, data: list[Tensor], wrap: Any) -> dict[str, Any]:
    names = by_weight(model)
    losses, grads = train(model if wrap is None else wrap(model), data, own=own_half if wrap else None)
    return summary((losses, {names[name]: grad for name, grad in grads.items()}))


def seen_in_forward(model: Any, policy: MixedPrecisionPolicy) -> dict[str, bool]:
    """Whether each weight is to the bit in a forward what it is before it is sharded."""
    kept = {name: module for name, module in model.named_modules() if packed_of(module)}
    expected = {name: packed_of(module) for name, module in kept.items()}
    same: dict[str, bool] = {}

    def compare(name: str) -> Any:
        def hook(module: nn.Module, _: Any) -> None:
            found = packed_of(module)
            same[name] = found.keys() == expected[name].keys() and all(
                torch.equal(found[weight], value) for weight, value in expected[name].items()
            )

        return hook

    for name, module in kept.items():
        module.register_forward_pre_hook(compare(name))
    train(shard_adapted(model, mp_policy=policy), batches(1), own=own_half)
    assert same.keys() == kept.keys()
    return same


def saved(model: Any, whole_too: bool) -> dict[str, bool]:
    """Whether the state dicts with which accelerate saves a sharded model are those of the model before."""
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    adapter = {name: value for name, value in expected.items() if "lora_" in name}
    shard_adapted(model)
    same = {"adapter": as_saved(model, adapter, ignore_frozen_params=True)}
    if whole_too:
        with pytest.raises(mk.UnsupportedExperts, match=r"in pieces.*save the adapter, or the model before"):
            model.get_base_model().save_pretrained("nowhere")
        same["whole"] = as_saved(model, expected)
    return same


def as_saved(model: Any, expected: dict[str, Tensor], **options: Any) -> bool:
    found = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, **options))
    assert found.keys() == expected.keys()
    return all(torch.equal(found[name], value) for name, value in expected.items())


def packed_of(module: nn.Module) -> dict[str, Tensor]:
    names = [*WEIGHTS, "weight"] if not isinstance(module, ParamWrapper) else []
    found = {name: packed_weight(module, name, torch.float32) for name in names}
    return {name: whole(weight) for name, weight in found.items() if weight is not None}
