"""Draws the weights of a model that is too large to be written, and those of its adapter, where a training starts.

`moe-kernels prepare` writes the configuration, the tokenizer and a seed of such a model. Seed, configuration, dtype
and kind of device alone decide what is drawn: two trainings start from the same bits, with whatever kernels. The
weights go through ``from_pretrained`` as those of a checkpoint do, and so into 4 bits as those do.
"""

from __future__ import annotations

import gc
import math
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedConfig, PreTrainedModel, TrainerCallback, modeling_utils

from moe_kernels.tools.compare.lines import WEIGHTS_LINE
from moe_kernels.tools.compare.pair import digest
from moe_kernels.tools.prepare.cache import made_with
from moe_kernels.tools.prepare.models import seeded_model


class DrawnWeights(TrainerCallback):
    """Once :meth:`installed`, draws what a folder of ``prepare`` leaves out; anything else loads as ever."""

    seed: int | None = None  # of the model that was loaded; None: it has weights of its own

    def installed(self) -> DrawnWeights:
        """Have ``PreTrainedModel.from_pretrained`` draw the weights of a folder that has none."""
        load: Any = PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]

        @wraps(load)
        def from_pretrained(cls: Any, name: Any = None, *arguments: Any, **settings: Any) -> Any:
            seed = drawn_seed(name)
            if seed is None:
                return load(cls, name, *arguments, **settings)
            self.seed = seed
            weights = draw_base(settings["config"], settings.get("dtype") or settings.get("torch_dtype"), seed)
            # "auto" would divide what is left beside the weights just drawn, and Axolotl's map of several processes
            # names a GPU by its number even where there is none.
            settings["device_map"] = {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}
            # The weights are on the device already: room for them a second time would show as the peak.
            with patch.object(modeling_utils, "caching_allocator_warmup", lambda *_, **__: None):
                model = load(cls, None, *arguments, state_dict=weights, **settings)
            model.config.name_or_path = model.name_or_path = str(name)
            return model

        PreTrainedModel.from_pretrained = classmethod(from_pretrained)  # type: ignore[assignment, method-assign]
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Draw the adapter too, and say what the training starts from."""
        if self.seed is None:
            return
        draw_adapter(model, self.seed)
        start = checksum(model)  # on every rank
        if state.is_world_process_zero:
            print(WEIGHTS_LINE + start, flush=True)
        if torch.cuda.is_available():  # the peak is that of the training, not of the drawing
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def drawn_seed(folder: Any) -> int | None:
    """The seed of the weights that ``prepare`` did not write into ``folder``; None for anything else."""
    path = Path(folder) if isinstance(folder, str | Path) else None
    recipe = made_with(path) if path is not None and path.is_dir() else None
    return None if path is None or recipe is None or any(path.glob("*.safetensors")) else int(recipe["seed"])


def draw_base(config: PreTrainedConfig, dtype: torch.dtype | None, seed: int) -> dict[str, torch.Tensor]:
    """The state of a model as transformers initialises it, on the GPU if there is one, and biases that are not 0."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weights = seeded_model(config, dtype, seed, device).state_dict()
    generator = torch.Generator(device).manual_seed(seed)
    for name, tensor in weights.items():
        if name.endswith("bias"):
            tensor.normal_(std=config.initializer_range, generator=generator)
    return weights


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


def checksum(model: torch.nn.Module) -> str:
    """A short hash of the bytes of all parameters and of their names, of the whole ones where FSDP2 has sharded them.

    Then every rank must call it.
    """
    sums = [_byte_sum(tensor.detach()).cpu() for tensor in model.parameters()]
    return digest([name for name, _ in model.named_parameters()], [int(total) for total in sums])


def _byte_sum(tensor: torch.Tensor) -> torch.Tensor:
    if not isinstance(tensor, DTensor):
        return tensor.contiguous().view(torch.uint8).sum(dtype=torch.int64)
    total = _byte_sum(tensor.to_local())
    torch.distributed.all_reduce(total, group=tensor.device_mesh.get_group())  # FSDP2: one dimension, sharded
    return total
