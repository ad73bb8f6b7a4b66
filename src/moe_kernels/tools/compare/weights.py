"""Draws the weights of a model that is too large to be written, and those of its adapter, where a training starts.

`moe-kernels prepare` writes the configuration, the tokenizer and a seed of such a model. Seed, configuration, dtype
and kind of device alone decide what is drawn: two trainings start from the same bits, with whatever kernels. The
weights go through ``from_pretrained`` as those of a checkpoint do, and so into 4 bits as those do. Where the
configuration is that of a checkpoint in block-fp8 or mxfp4, they have its names and tensors, and transformers keeps
them or dequantises them as it does that checkpoint's.
"""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedConfig, PreTrainedModel, TrainerCallback, modeling_utils
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

from moe_kernels.integrations.quantized import BLOCKS, MX_SCALES, SCALES, dequantised, packed_weight
from moe_kernels.tools.check.packing import in_fp8, in_mxfp4
from moe_kernels.tools.compare.pair import digest
from moe_kernels.tools.prepare.cache import made_with
from moe_kernels.tools.prepare.models import seeded_model


class DrawnWeights(TrainerCallback):
    """Once :meth:`installed`, draws what a folder of ``prepare`` leaves out, and new adapters of what it made.

    Anything else loads as ever.
    """

    seed: int | None = None  # of the model that was loaded; None: it is not of `prepare`
    drawn = False  # whether its weights were
    dtype: torch.dtype | None = None  # that it was loaded in
    checksum = ""  # of what the training starts from, once it began

    def installed(self) -> DrawnWeights:
        """Have ``PreTrainedModel.from_pretrained`` draw the weights of a folder that has none."""
        load: Any = PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]

        @wraps(load)
        def from_pretrained(cls: Any, name: Any = None, *arguments: Any, **settings: Any) -> Any:
            seed = seed_of(name)
            if seed is not None:
                self.seed, self.drawn = seed, not any(Path(name).glob("*.safetensors"))
            if seed is None or not self.drawn:
                return load(cls, name, *arguments, **settings)
            self.dtype = settings.get("dtype") or settings.get("torch_dtype")
            weights = draw_base(settings["config"], self.dtype, seed)
            # "auto" would divide what is left beside the weights just drawn, and Axolotl's map of several processes
            # names a GPU by its number even where there is none.
            settings["device_map"] = {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}
            with ExitStack() as patches:
                # The weights are on the device already: room for them a second time would show as the peak.
                _replace(patches, modeling_utils, "caching_allocator_warmup")
                if not torch.cuda.is_available():
                    # Where no GPU runs transformers' own fp8 layers it would dequantise; ours run on a CPU too.
                    _replace(patches, FineGrainedFP8HfQuantizer, "validate_environment")
                model = load(cls, None, *arguments, state_dict=weights, **settings)
            if not torch.cuda.is_available():
                # To bfloat16 alone does transformers dequantise mxfp4, and a CPU trains in 32 bits.
                for parameter in model.parameters():
                    if parameter.dtype == torch.bfloat16:
                        parameter.data = parameter.data.to(self.dtype)
            model.config.name_or_path = model.name_or_path = str(name)
            return model

        PreTrainedModel.from_pretrained = classmethod(from_pretrained)  # type: ignore[assignment, method-assign]
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Draw the adapter too, but not over one that was loaded."""
        if self.seed is not None and has_new_adapter(model):
            draw_adapter(model, self.seed)
        elif not self.drawn:
            return
        self.checksum = checksum(model, self.dtype)  # on every rank
        if torch.cuda.is_available():  # the peak is that of the training, not of the drawing
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def seed_of(folder: Any) -> int | None:
    """The seed of the model that ``prepare`` made in ``folder``; None for anything else."""
    path = Path(folder) if isinstance(folder, str | Path) else None
    recipe = made_with(path) if path is not None and path.is_dir() else None
    return None if recipe is None else int(recipe["seed"])


def _replace(patches: ExitStack, owner: Any, name: str) -> None:
    patches.enter_context(patch.object(owner, name, lambda *_, **__: None))


def draw_base(config: PreTrainedConfig, dtype: torch.dtype | None, seed: int) -> dict[str, Tensor]:
    """The state of a model as transformers initialises it, on the GPU if there is one, and biases that are not 0.

    Of a configuration with a ``quantization_config``, what a checkpoint in that format holds.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    plain = copy.deepcopy(config)
    quantization = vars(plain).pop("quantization_config", None)
    weights = seeded_model(plain, dtype, seed, device).state_dict()
    generator = torch.Generator(device).manual_seed(seed)
    for name, tensor in weights.items():
        if name.endswith("bias"):
            tensor.normal_(std=config.initializer_range, generator=generator)
    if quantization is not None:
        gc.collect()  # the model that was just initialised may hold the weights in 16 bits
        for name in list(weights):  # one at a time, so that never all are there twice
            weights |= PACK[quantization["quant_method"]](name, weights.pop(name))
    return weights


def _as_fp8(name: str, weight: Tensor) -> dict[str, Tensor]:
    """Block-fp8 as Qwen3 and DeepSeek-V3 are published: every projection, one key per expert."""
    where, _, own = name.rpartition(".")
    if own in ("gate_up_proj", "down_proj"):
        parts = ("gate_proj", "up_proj") if own == "gate_up_proj" else (own,)
        packed = in_fp8(weight, len(parts))
        codes, scales = (tensor.unflatten(1, (len(parts), -1)) for tensor in (packed.data, packed.scales))
        return {
            f"{where}.{expert}.{part}.weight{end}": tensor[expert, place]
            for expert in range(len(weight))
            for place, part in enumerate(parts)
            for end, tensor in (("", codes), (SCALES, scales))
        }
    if name.endswith("_proj.weight"):
        packed = in_fp8(weight[None])
        return {name: packed.data[0], f"{name}{SCALES}": packed.scales[0]}
    return {name: weight}


def _as_mxfp4(name: str, weight: Tensor) -> dict[str, Tensor]:
    """mxfp4 as gpt-oss is published: the experts alone, which a model in 16 bits stores by columns."""
    if name.endswith((".gate_up_proj", ".down_proj")):
        packed = in_mxfp4(weight.mT)
        return {f"{name}{BLOCKS}": packed.data, f"{name}{MX_SCALES}": packed.scales}
    return {name: weight}


PACK: dict[str, Callable[[str, Tensor], dict[str, Tensor]]] = {"fp8": _as_fp8, "mxfp4": _as_mxfp4}


def has_new_adapter(model: torch.nn.Module) -> bool:
    """Whether there are LoRA adapters and none was trained: PEFT starts with a B of zeros."""
    factors = [factor.detach() for name, factor in model.named_parameters() if ".lora_B" in name]
    local = [factor.to_local() if isinstance(factor, DTensor) else factor for factor in factors]
    return bool(local) and not any(factor.any() for factor in local)


def draw_adapter(model: torch.nn.Module, seed: int) -> None:
    """Draw both factors of every LoRA adapter: with a B of zeros an error of A would not show at the first step.

    Axolotl's own draw depends on its version, and before 0.21 on no seed. A factor that FSDP2 has sharded gets its
    part of what one process alone would draw.
    """
    generators: dict[torch.device, torch.Generator] = {}
    for name, factor in model.named_parameters():
        if factor.requires_grad and ".lora_" in name:
            device = factor.device
            generator = generators.setdefault(device, torch.Generator(device).manual_seed(seed))
            whole = torch.empty(factor.shape, dtype=factor.dtype, device=device)
            torch.nn.init.kaiming_uniform_(whole, a=math.sqrt(5), generator=generator)
            with torch.no_grad():
                if isinstance(factor, DTensor):
                    mesh, placements = factor.device_mesh, factor.placements
                    whole = distribute_tensor(whole, mesh, placements, src_data_rank=None)
                factor.copy_(whole)


def checksum(model: torch.nn.Module, dtype: torch.dtype | None = None) -> str:
    """A short hash of the bytes of all parameters and of their names, of the whole ones where FSDP2 has sharded them.

    Then every rank must call it. Block-fp8 and mxfp4 count as what they are dequantised to in ``dtype``, one weight
    at a time: a model that keeps them has the checksum of one that was dequantised as it was loaded.
    """
    sums: dict[str, int] = {}
    for where, module in model.named_modules():
        scales = set()
        for name, parameter in module.named_parameters(where, recurse=False):
            own = name.rpartition(".")[2]
            weight = packed_weight(module, own, dtype or torch.get_default_dtype())
            scales |= {name + end for end in (SCALES, MX_SCALES) if weight is not None}
            sums[name] = int(_byte_sum(parameter.detach() if weight is None else dequantised(weight)))
        for name in scales:
            sums.pop(name, None)
    return digest(sums)


def _byte_sum(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, DTensor):
        return tensor.contiguous().view(torch.uint8).sum(dtype=torch.int64)
    total = _byte_sum(tensor.to_local())
    torch.distributed.all_reduce(total, group=tensor.device_mesh.get_group())  # FSDP2: one dimension, sharded
    return total
