"""Frozen weights that a module keeps in few bits: bitsandbytes' 4 bits (QLoRA), and those of checkpoints in block-fp8
and in mxfp4.

Axolotl's ``quantize_moe_experts`` with ``load_in_4bit`` puts bitsandbytes' parametrization on each weight: reading
``module.gate_up_proj`` gives all experts in 16 bits, and autograd would keep that copy for every layer. transformers
keeps an fp8 weight beside its scales, ``gate_up_proj_scale_inv``, and multiplies it with activations rounded to fp8;
mxfp4 stays so in modules of :mod:`moe_kernels.integrations.mxfp4`. Here the weights as they are stored are handed to
the kernels.
"""

from __future__ import annotations

from typing import Any

import torch

from moe_kernels.integrations.support import UnsupportedExperts, is_sharded
from moe_kernels.kernels.triton.dequantize import dequantize
from moe_kernels.packed import MX_BLOCK, SIDE, BlockFp8, FourBit, Mxfp4, PackedWeight, Scales, scale_grid, whole

#: Added to the name of a weight: the name of its scales.
SCALES = "_scale_inv"
#: The cure where a module's fp8 weights cannot be read.
DEQUANTIZE = "Load the model with FineGrainedFP8Config(dequantize=True), which gives 16-bit weights."
#: What transformers' modules of fp8 may hold in its place.
_OTHERS = (torch.int8, torch.uint8, torch.float8_e5m2, torch.float4_e2m1fn_x2)
#: In an mxfp4 checkpoint, added to the name of a weight.
BLOCKS, MX_SCALES = "_blocks", "_scales"
#: What no mxfp4 weight's largest scale is below: 2^-63.
SMALLEST_CODE = 64


def packed_weight(module: Any, name: str, dtype: torch.dtype, where: str = "") -> PackedWeight | None:
    """The weight ``name`` of ``module``, called ``where`` in errors, if it is kept in few bits.

    Args:
        module: its weights are (E, N, K), or (N, K) of a linear layer, which is read as one expert.
        name: of the parameter.
        dtype: what it is used in, where the format does not say.
        where: the module's name.

    Raises:
        UnsupportedExperts: the parts of the weight do not fit together, or are in no form that is read here.
    """
    try:
        four_bit = _four_bit(module, name, where)
        return four_bit or _block_fp8(module, name, dtype, where) or _mxfp4(module, name, dtype, where)
    except ValueError as error:
        if isinstance(error, UnsupportedExperts):
            raise
        raise UnsupportedExperts.of(module, f"{name} is not what its library makes: {error}.", where) from error


def dequantised(weight: PackedWeight) -> torch.Tensor:
    """All of ``weight`` (E, N, K), a new tensor: by its kernel on a GPU, elsewhere by torch."""
    return dequantize(weight, 0, weight.shape[0]) if weight.device.type == "cuda" else whole(weight)


def _four_bit(module: Any, name: str, where: str) -> PackedWeight | None:
    chain = getattr(module, "parametrizations", {})
    if name not in chain or len(chain[name]) != 1:
        return None
    state = getattr(chain[name][0], "quant_state", None)
    if state is None:
        _check_floating(module, name, where)
        return None
    scales = Scales(state.absmax, state.blocksize)
    if state.nested:
        inner = state.state2
        scales = Scales(state.absmax, state.blocksize, inner.code, inner.absmax, inner.blocksize, state.offset)
    sizes = tuple(state.shape)
    return FourBit(sizes, state.dtype, chain[name].original.view(-1), state.code, scales, state.dtype)


def _check_floating(module: Any, name: str, where: str) -> None:
    """Raise UnsupportedExperts for integers in a form that is not read here. Read as an attribute such a weight is
    dequantised whole, and autograd keeps that copy for every layer."""
    stored = getattr(module.parametrizations[name], "original", None)  # there may be several
    if stored is not None and not stored.is_floating_point():
        kind = type(module.parametrizations[name][0]).__name__
        raise UnsupportedExperts.mended(
            module,
            f"{name} is in {stored.dtype}, packed by {kind}, and read are the 4 bits of bitsandbytes: in a YAML of "
            "Axolotl set load_in_4bit with quantize_moe_experts, and nf4_backend: bitsandbytes.",
            where,
        )


def _block_fp8(module: Any, name: str, dtype: torch.dtype, where: str) -> PackedWeight | None:
    _check_codes(module, name, where)
    data, scales = _fp8_parts(module, name)
    if data is None or is_sharded(data) or data.dim() == 1:  # pieces of it
        return None
    if scales is None:
        raise UnsupportedExperts.mended(
            module, f"{name} is float8_e4m3fn without its scales {name}{SCALES}. {DEQUANTIZE}", where
        )
    if scales.dtype == torch.float8_e8m0fnu:  # powers of two
        scales = scales.float()
    data, scales = (tensor.detach() if tensor.dim() == 3 else tensor.detach()[None] for tensor in (data, scales))
    # Checkpoints hold gate and up apart, so a block of scales ends where up begins.
    stacked = 2 if name == "gate_up_proj" else 1
    sizes = experts, rows, columns = data.shape
    grid = experts, *scale_grid(rows, columns, stacked)
    size = getattr(module, "block_size", None)
    fits = tuple(scales.shape) == grid and scales.dtype in (torch.float32, torch.bfloat16)
    if not fits or size is None or tuple(size) != (SIDE, SIDE):
        raise UnsupportedExperts.mended(
            module,
            f"{name} {tuple(sizes)} has scales {scales.dtype} {tuple(scales.shape)} in blocks of {size}; read are "
            f"float32, bfloat16 or float8_e8m0fnu {grid}, one for each {SIDE} x {SIDE}. {DEQUANTIZE}",
            where,
        )
    # stacked by name: by position torch.compile of torch 2.11 would pass it twice.
    return BlockFp8((experts, rows, columns), dtype, data, scales, stacked=stacked)


def _mxfp4(module: Any, name: str, dtype: torch.dtype, where: str) -> PackedWeight | None:
    data, scales = module._parameters.get(name), module._parameters.get(name + MX_SCALES)
    if scales is None or is_sharded(data) or data.dim() == 1:  # pieces of it
        return None
    if data.is_meta != scales.is_meta:  # accelerate moves them one by one, and reads the weight before it moves that
        raise UnsupportedExperts.mended(
            module,
            f"{name} is offloaded (cpu_offload of accelerate, or a device_map with cpu beside a GPU), from where "
            "mxfp4 is not read: give the experts a GPU, or load 16-bit weights, with Mxfp4Config(dequantize=True).",
            where,
        )
    experts, rows, blocks = data.shape[:3]
    # Beside the transposes that the module's own weights are.
    sizes = experts, rows, blocks * MX_BLOCK
    return Mxfp4(sizes, dtype, data.detach(), scales.detach(), by_columns=True)


def _fp8_parts(module: Any, name: str) -> tuple[Any, Any]:
    """The parameter ``name`` and its scales; None for what is not there, twice if the parameter is not in e4m3."""
    data = module._parameters.get(name)
    if data is None or data.dtype != torch.float8_e4m3fn:
        return None, None
    return data, module._parameters.get(name + SCALES)


def _check_codes(module: Any, name: str, where: str) -> None:
    """Raise UnsupportedExperts where something else than e4m3 lies beside scales of fp8.

    In DeepSeek-V4, two codes of e2m1 in an int8, whose columns PEFT would take for half as many inputs. Or codes that
    model.to(dtype) has cast, which transformers takes for weights; a weight with a scale that was not loaded may have
    been in 16 bits.
    """
    data, scales = module._parameters.get(name), module._parameters.get(name + SCALES)
    if name + SCALES not in module._parameters:
        return
    if name in getattr(module, "parametrizations", {}):
        raise UnsupportedExperts.mended(
            module,
            f"{name} is in fp8 and PEFT adds its LoRA to the codes, where it has no effect: call check_model(model) "
            "before the first forward, after which it runs inside the kernels.",
            where,
        )
    if data is None:
        return
    if data.dtype in _OTHERS:
        raise UnsupportedExperts.mended(
            module, f"{name} is {data.dtype} beside scales of fp8; float8_e4m3fn alone is read. {DEQUANTIZE}", where
        )
    if scales is None or data.dtype.itemsize < 2 or (is_loaded(data) and not is_loaded(scales)):
        return
    raise UnsupportedExperts.mended(
        module,
        f"{name} is {data.dtype} beside the scales {name}{SCALES} of fp8: the codes were cast without their scales, "
        "after loading (model.to(dtype)) or by FSDP2's mixed precision in a forward before check_model(model). Load "
        "the model again, with FineGrainedFP8Config(dequantize=True) for 16-bit weights, and call check_model first.",
        where,
    )


def is_loaded(parameter: Any) -> bool:
    """Whether from_pretrained found it in the checkpoint; what it did not find is memory without a value."""
    return getattr(parameter, "_is_hf_initialized", False)


def check_scales(module: Any, name: str, where: str = "") -> None:
    """Read the scales of an fp8 or mxfp4 weight, before training: a GPU waits for that.

    Raises:
        UnsupportedExperts: they were not in the checkpoint, or one is not a positive finite number.
    """
    _check_mx_scales(module, name, where)
    data, scales = _fp8_parts(module, name)
    if scales is None or scales.is_meta or is_sharded(scales):
        return
    if is_loaded(data) and not is_loaded(scales):
        raise UnsupportedExperts.mended(
            module,
            f"{name}{SCALES} is not in the checkpoint. If {name} is in 16 bits there, name the module in "
            "modules_to_not_convert (quantization_config of config.json); else download it, or quantise it, again.",
            where,
        )
    values = scales.detach().float()
    wrong = ~(values.isfinite() & (values > 0))
    if wrong.any():
        place = wrong.nonzero()[0].tolist()
        raise UnsupportedExperts.mended(
            module,
            f"{name}{SCALES}{place} is {values[tuple(place)].item()}, and a scale is a positive finite number: the "
            "checkpoint is broken. Download it, or quantise it, again.",
            where,
        )


def _check_mx_scales(module: Any, name: str, where: str) -> None:
    scales = module._parameters.get(name + MX_SCALES)
    if scales is None or scales.is_meta or is_sharded(scales):
        return
    most = int(scales.detach().max())
    if most == 255 or most < SMALLEST_CODE:
        small = f"none is above {most}, which is 2^{most - 127}, as a cast to uint8 makes them of other dtypes"
        what = "one is 255, which is NaN" if most == 255 else small
        raise UnsupportedExperts.mended(
            module,
            f"{name}{MX_SCALES} are no scales of mxfp4: {what}. Download the checkpoint, or quantise it, again; its "
            "scales are the codes of e8m0 in uint8.",
            where,
        )


def check_frozen(module: Any, name: str, where: str = "") -> None:
    """Raise UnsupportedExperts where training would go on without the gradient of an fp8 or mxfp4 weight."""
    bias = module._parameters.get(f"{name}_bias")
    if name + MX_SCALES in module._parameters and bias is not None and bias.requires_grad:
        raise UnsupportedExperts.mended(
            module,
            f"{name}_bias is to be trained (requires_grad), and {name} beside it, in mxfp4, gets no gradient. Train "
            "LoRA (peft.get_peft_model freezes both), or for full fine-tuning load 16-bit weights, with "
            "Mxfp4Config(dequantize=True).",
            where,
        )
    if any(part is not None and part.requires_grad for part in _fp8_parts(module, name)):
        raise UnsupportedExperts.mended(
            module,
            f"{name} is to be trained (requires_grad), and fp8 weights get no gradient here. Train LoRA on them "
            "(peft.get_peft_model freezes them), or for full fine-tuning load 16-bit weights, with "
            "FineGrainedFP8Config(dequantize=True).",
            where,
        )
