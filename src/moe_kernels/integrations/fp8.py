"""What else a block-fp8 model of transformers needs to train LoRA: its linear layers, Trainer's consent, and with
fp8_activations a transposed copy of the experts' codes.

The experts are read in place (:mod:`moe_kernels.integrations.quantized`). Attention and shared experts of such a
model are ``FP8Linear``, which before transformers 5.23 has no backward, needs a kernel from the hub, and rounds its
input to fp8. Here they run as the experts do: the weight as it is stored, dequantised ahead of each GEMM, in the
backward once more. Scales of activations (activation_scheme="static") are not used: no activation is rounded.
"""

from __future__ import annotations

import functools
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers.integrations.finegrained_fp8 import FP8Experts, FP8Linear
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

from moe_kernels.checks import autocast_dtype
from moe_kernels.factors import scaled
from moe_kernels.fp8 import CURE, Fp8Weight, check_fp8, transposed
from moe_kernels.integrations.quantized import SCALES, check_frozen, check_scales, dequantised, packed_weight
from moe_kernels.integrations.support import LORA_ATTRIBUTE, Recipe, UnsupportedExperts
from moe_kernels.kernels.device import interpreting
from moe_kernels.layer import Matrix
from moe_kernels.packed import BlockFp8, PackedWeight
from moe_kernels.problem import UnsupportedProblem

# By the memory of codes and the part of it that they are: where it was, how often they had been written, and the
# transposed copy of them. Codes that leave a device leave that memory, and their copy goes with it.
_copies: Any = WeakIdKeyDictionary()
# Modules whose weights FSDP2 holds in pieces, and gathers for a forward and again for its backward.
_gathered: WeakSet[nn.Module] = WeakSet()


def multiplied_in_fp8(module: Any, name: str, weight: Matrix | None, where: str = "") -> Fp8Weight:
    """The weight ``name`` of ``module``, called ``where`` in errors, for ``fp8_activations``.

    Where a GPU's backward may follow it has the transposed codes, which are made at the first such call and kept:
    with them the weight takes as many bytes as in 16 bits. Under FSDP2 they are made at each call, and kept for its
    backward alone: whole copies of all layers would be what sharding is to save.

    Raises:
        UnsupportedExperts: it is not in block-fp8.
    """
    if not isinstance(weight, BlockFp8):
        kind = "packed otherwise" if isinstance(weight, PackedWeight) else f"in {getattr(weight, 'dtype', 'pieces')}"
        raise UnsupportedExperts.mended(
            module,
            f"fp8_activations multiplies block-fp8 weights, and {name} is {kind} (transformers dequantises a "
            f"checkpoint where no GPU multiplies fp8: compute capability 8.9 and later): {CURE}",
            where,
        )
    copied = torch.is_grad_enabled() and (weight.device.type == "cuda" or interpreting())
    if copied and module in _gathered:
        return Fp8Weight.of(weight, transposed(module._parameters[name].detach()))
    return Fp8Weight.of(weight, _transposed(module._parameters[name]) if copied else None)


def _transposed(parameter: Tensor) -> Tensor:
    codes = parameter.detach()
    state = codes.data_ptr(), codes._version
    copies = _copies.setdefault(codes.untyped_storage(), {})
    known = copies.get(_part(codes))
    if known is None or known[0] != state:
        known = copies[_part(codes)] = state, transposed(codes)
    copy: Tensor = known[1]
    return copy


def _part(codes: Tensor) -> tuple[Any, ...]:
    return codes.storage_offset(), *codes.shape


def copied_bytes(module: nn.Module) -> int:
    """Bytes of the transposed codes that are kept of the weights of ``module`` itself."""
    parts = [(p.untyped_storage(), _part(p)) for p in module.parameters(recurse=False)]
    return sum(_copies[memory][part][1].nbytes for memory, part in parts if part in _copies.get(memory, {}))


def check_fp8_activations(module: Any, recipe: Recipe, where: str, device: torch.device) -> None:
    """Raise UnsupportedExperts where a forward of ``module`` with ``fp8_activations`` would; nothing is copied.

    Copies from before are made again: a write through ``.data`` changes neither address nor version of a parameter.
    """
    for name in (recipe.up_name, "down_proj"):
        if name in module._parameters:
            _copies.pop(module._parameters[name].untyped_storage(), None)
        weight = packed_weight(module, name, torch.bfloat16, where)
        found = weight if weight is not None else module._parameters.get(name)
        with torch.no_grad():
            fp8 = multiplied_in_fp8(module, name, found, where)
        gated = recipe.gate.gated and name == recipe.up_name
        try:
            check_fp8(fp8.mT if recipe.transposed else fp8, gated, recipe.gate.interleaved, device)
        except UnsupportedProblem as error:
            raise UnsupportedExperts.mended(module, f"{name}: {error}", where) from error


class ExactFP8Linear(FP8Linear):
    """A frozen ``FP8Linear`` that does not round its input; the same parameters, and the same state dict."""

    def forward(self, input: Tensor) -> Tensor:  # transformers' own name
        """(..., in_features) -> (..., out_features), in the dtype of ``input`` or autocast's."""
        dtype = autocast_dtype(input.device.type) or input.dtype
        if self.training and torch.is_grad_enabled():
            check_frozen(self, "weight")
        weight = packed_weight(self, "weight", dtype)
        if weight is None:  # not converted, in 16 bits
            return super().forward(input)
        x, bias = input.to(dtype), None if self.bias is None else self.bias.to(dtype)
        if torch.compiler.is_compiling():
            out = nn.functional.linear(x, weight[0], bias)
        else:
            out = _FrozenLinear.apply(x, weight, bias)
        # An adapter on the weight as a parameter; one on the module is beside it.
        for lora_b, lora_a, scaling in vars(self).get(LORA_ATTRIBUTE, {}).values():
            low = nn.functional.linear(x, scaled(lora_a[0], scaling).to(dtype))
            out = out + nn.functional.linear(low, lora_b[0].to(dtype))
        return out


class _FrozenLinear(torch.autograd.Function):
    """``F.linear`` that keeps the packed weight for the backward, and not the dequantised one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
        ctx.weight, ctx.versions = weight, weight.versions()
        return nn.functional.linear(x, _matrix(weight), bias)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, Tensor | None]:
        dbias = dout.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return dout @ _matrix(ctx.weight.unwritten(ctx.versions)), None, dbias


def _matrix(weight: PackedWeight) -> Tensor:
    return dequantised(weight)[0]


class TrainableFP8Quantizer(FineGrainedFP8HfQuantizer):
    """The quantizer of a model whose fp8 layers all have a backward. transformers before 5.23 has none for its own,
    and its Trainer asks here."""

    @property
    def is_trainable(self) -> bool:
        return True


def train_fp8(model: nn.Module) -> None:
    """Let LoRA train over ``model``, if its experts are in fp8: its linear layers become :class:`ExactFP8Linear`, and
    Trainer takes it. No parameter is touched.

    Raises:
        UnsupportedExperts: an fp8 linear layer is in no form that is read here.
    """
    if not any(isinstance(module, FP8Experts) for module in model.modules()):
        return
    quantizer: Any = getattr(model, "hf_quantizer", None)
    has_backward = bool(getattr(quantizer, "is_trainable", False))
    for name, module in model.named_modules():
        if type(module) is FP8Linear:
            packed_weight(module, "weight", torch.bfloat16, name)
            check_scales(module, "weight", name)
            if module.training:
                check_frozen(module, "weight", name)
            module.__class__ = ExactFP8Linear
        elif isinstance(module, FP8Linear) and type(module) is not ExactFP8Linear and not has_backward:
            raise UnsupportedExperts.mended(
                module, "this form of fp8 has no backward before transformers 5.23: install that or newer.", name
            )
    if type(quantizer) is FineGrainedFP8HfQuantizer and not has_backward:
        quantizer.__class__ = TrainableFP8Quantizer


def gather_uncast(model: nn.Module) -> None:
    """If ``model`` has weights in few bits, make FSDP2 gather such weights and scales of fp8 as they are stored.

    Its mixed precision (``bf16: true`` of a run file) casts what it gathers: codes of fp8, which then look like a
    weight and lack their scales, float32 scales, which would be rounded, and with torch 2.11 codes in uint8. No
    public option spares one parameter. A second call changes nothing.
    """
    if not torch.distributed.is_available() or all(p.dtype.itemsize > 1 for p in model.parameters()):
        return
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

    real = FSDPParam.init_dtype_attrs
    if hasattr(real, "moe_kernels"):
        return

    @functools.wraps(real)
    def init_dtype_attrs(self: Any, mp_policy: Any) -> None:
        real(self, mp_policy)
        module, name = self._module_info.module, self._module_info.param_name
        in_fp8 = isinstance(module, (FP8Experts, FP8Linear))
        if self.orig_dtype.itemsize == 1 or (in_fp8 and name.endswith(SCALES)):
            self.param_dtype = None
        if in_fp8:
            _gathered.add(module)

    init_dtype_attrs.moe_kernels = True  # type: ignore[attr-defined]
    FSDPParam.init_dtype_attrs = init_dtype_attrs  # type: ignore[method-assign]
