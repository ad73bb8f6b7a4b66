"""Loading gpt-oss checkpoints in mxfp4 with their experts as they are stored, so that LoRA trains over them.

transformers gives two kinds of model for such a checkpoint: one dequantised to 16 bits (``dequantize=True``, or by
itself where a GPU or the package ``kernels`` is missing), and one of ``Mxfp4GptOssExperts``, whose weights lie in the
layout of a kernel without a backward. :func:`keep_mxfp4` adds a third, for models whose implementation of experts is
ours: transformers' own experts module, with the checkpoint's blocks and scales in the place of its weights.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.mxfp4 import Mxfp4Dequantize
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_mxfp4 import Mxfp4HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from moe_kernels.integrations.quantized import BLOCKS, MX_SCALES, dequantised, is_loaded, packed_weight
from moe_kernels.integrations.support import UnsupportedExperts, is_sharded
from moe_kernels.packed import MX_BLOCK

_WEIGHTS = ("gate_up_proj", "down_proj")


class Mxfp4Experts(GptOssExperts):
    """gpt-oss's experts, frozen, with their weights in mxfp4.

    Parameters: of each weight its blocks under the weight's own name (E, N, K / 32, 16) uint8, and its scales
    (E, N, K / 32) uint8. The state dict has these names, by which torch's sharded checkpoints look for parameters;
    ``save_pretrained`` writes those of the checkpoint. Read as an attribute, a weight is what transformers makes of
    it when it dequantises the checkpoint: (E, K, N) bfloat16, a new tensor each time. Where FSDP2 holds the module in
    pieces, it is this process's blocks.
    """

    gate_up_proj = property(lambda self: _whole(self, "gate_up_proj"))
    down_proj = property(lambda self: _whole(self, "down_proj"))

    def __delattr__(self, name: str) -> None:
        if name in _WEIGHTS:  # torch's parametrizations do, and PEFT's own LoRA is one
            raise ValueError(
                f"{type(self).__name__}: {name} is in mxfp4 and stays so. LoRA on it runs with "
                "experts_implementation='moe_kernels', after check_model(model); else load the model with "
                "Mxfp4Config(dequantize=True)."
            )
        super().__delattr__(name)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        for name in _WEIGHTS:
            if f"{prefix}{name}{BLOCKS}" in state_dict:
                state_dict[f"{prefix}{name}"] = state_dict.pop(f"{prefix}{name}{BLOCKS}")
        super()._load_from_state_dict(state_dict, prefix, *others)


def _whole(module: Any, name: str) -> Tensor:
    weight = packed_weight(module, name, torch.bfloat16)
    return module._parameters[name] if weight is None else dequantised(weight)


class KeptMxfp4Quantizer(Mxfp4HfQuantizer):
    """transformers' quantizer of mxfp4, which keeps the experts of a model that runs them on our implementation."""

    #: Names of ``experts_implementation`` that read mxfp4.
    implementations: Collection[str] = ()
    kept = False

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Later: transformers asks before it says whose experts run, and has no kernels to find for ours."""
        self._asked = args, kwargs

    def _process_model_before_weight_loading(self, model: Any, use_kernels: bool = False, **kwargs: Any) -> Any:
        config = self.quantization_config
        ours = model.config._experts_implementation in self.implementations
        experts = [
            module
            for name, module in model.named_modules()
            if type(module) is GptOssExperts and should_convert_module(name, config.modules_to_not_convert)
        ]
        self.kept = ours and self.pre_quantized and not config.dequantize and bool(experts)
        if not self.kept:
            super().validate_environment(*self._asked[0], **self._asked[1])
            return super()._process_model_before_weight_loading(model, use_kernels, **kwargs)
        for module in experts:
            _pack(module)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if not self.kept:
            return super()._process_model_after_weight_loading(model, **kwargs)
        for where, module in model.named_modules():
            if type(module) is GptOssExperts and f"gate_up_proj{BLOCKS}" in module._parameters:
                _check_loaded(module, where)
                for name in _WEIGHTS:
                    module._parameters[name] = module._parameters.pop(f"{name}{BLOCKS}")
                module.__class__ = Mxfp4Experts
        if importlib.util.find_spec("peft"):  # PEFT's merge would change a copy of the weight, and be lost
            from moe_kernels.integrations.peft import fuse_lora

            fuse_lora()
        return model

    def get_weight_conversions(self) -> list[Any]:
        return [] if self.kept else super().get_weight_conversions()

    def get_state_dict_and_metadata(self, model: Any) -> Any:
        if not self.kept:
            return super().get_state_dict_and_metadata(model)
        experts = {where: module for where, module in model.named_modules() if isinstance(module, Mxfp4Experts)}
        for where, module in experts.items():
            if is_sharded(module._parameters["down_proj"]):
                raise UnsupportedExperts.mended(
                    module,
                    "FSDP2 holds them in pieces, of which save_pretrained makes no checkpoint. They are frozen: save "
                    "the adapter, or the model before it is sharded.",
                    where,
                )
        state = model.state_dict()
        for name in (f"{where}.{weight}" for where in experts for weight in _WEIGHTS):
            state[f"{name}{BLOCKS}"] = state.pop(name)
        return state, {}

    @property
    def is_trainable(self) -> bool:
        return self.kept or super().is_trainable


def _pack(experts: Any) -> None:
    """Make room on meta for the tensors of the checkpoint, under their names there."""
    for name in _WEIGHTS:
        every, columns, rows = experts._parameters.pop(name).shape
        grid = every, rows, columns // MX_BLOCK
        for end, shape in ((BLOCKS, (*grid, MX_BLOCK // 2)), (MX_SCALES, grid)):
            empty = torch.empty(shape, dtype=torch.uint8, device="meta")
            experts.register_parameter(f"{name}{end}", nn.Parameter(empty, requires_grad=False))
    experts._is_hf_initialized = True  # what the checkpoint lacks is refused, not drawn


def _check_loaded(experts: Any, where: str) -> None:
    """transformers warns of what the checkpoint lacks, and leaves it as memory was found."""
    parts = dict(experts.named_parameters(recurse=False))
    if any(part.is_meta for part in parts.values()):
        raise UnsupportedExperts.mended(
            experts,
            "device_map leaves them on the disk, from where mxfp4 is not read: give them a device, or load 16-bit "
            "weights, with Mxfp4Config(dequantize=True).",
            where,
        )
    missing = [name for name, part in parts.items() if not is_loaded(part)]
    if missing:
        raise UnsupportedExperts.mended(
            experts,
            f"the checkpoint has no {', '.join(missing)}, which experts in mxfp4 have: download it again, or if its "
            "experts are in 16 bits take quantization_config out of its config.json.",
            where,
        )


def keep_names(model: nn.Module) -> None:
    """Let ``save_pretrained`` write the experts that transformers dequantised under their own names, as 5.24 does.

    transformers before it applies the conversion of the load backwards to 16-bit weights: 5.16 and 5.20 write the
    experts of all layers under the keys "gate_up_proj$" and "down_proj$", so that one layer's are left, and 5.23
    writes them as blocks without scales. Nothing is said, and from such a file experts are drawn at random.
    """
    parts: Any = model.modules()
    for module in parts:
        conversions = vars(module).get("_weight_conversions")
        if conversions:
            module._weight_conversions = [
                conversion
                for conversion in conversions
                if not any(isinstance(step, Mxfp4Dequantize) for step in getattr(conversion, "operations", ()))
            ]


def keep_mxfp4(implementation: str) -> None:
    """From now on, in this process, a model that is loaded from mxfp4 with ``experts_implementation=implementation``
    keeps its experts as they are stored; with ``Mxfp4Config(dequantize=True)`` they are dequantised as before.

    Models of other implementations are loaded as transformers loads them.
    """
    KeptMxfp4Quantizer.implementations = {*KeptMxfp4Quantizer.implementations, implementation}
    AUTO_QUANTIZER_MAPPING["mxfp4"] = KeptMxfp4Quantizer
