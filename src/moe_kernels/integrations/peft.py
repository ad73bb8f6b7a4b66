"""LoRA on expert weights (PEFT's ``target_parameters``) without ever forming ``W + BA``.

    import moe_kernels.integrations.peft as mk_peft
    mk_peft.fuse_lora()                      # check_model() calls it too
    model = peft.get_peft_model(model, peft.LoraConfig(target_parameters=["mlp.experts.gate_up_proj", ...]))

PEFT's ``ParamWrapper`` adds a dense delta to the weight around every forward. Around an experts module that these
kernels serve it now hands them its two factors instead. Everything else stays PEFT's: names and packing of the
adapter, scaling, several adapters, ``disable_adapter``, merge, unmerge, and its refusals (dropout, DoRA, bias).
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

try:
    from peft.tuners.lora.layer import Linear, ParamWrapper
    from peft.tuners.lora.model import LoraModel
except ImportError as error:
    raise ImportError("moe_kernels.integrations.peft needs peft 0.20 or newer: pip install 'peft>=0.20'") from error

from moe_kernels.factors import LowRank, scaled
from moe_kernels.integrations.dispatch import is_served
from moe_kernels.integrations.fp8 import ExactFP8Linear
from moe_kernels.integrations.quantized import MX_SCALES, SCALES
from moe_kernels.integrations.support import LORA_ATTRIBUTE, UnsupportedExperts, is_sharded, local_tensor

MAX_RANK = 128  # of fused_experts
_WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")


def fuse_lora() -> None:
    """From now on, in this process, LoRA on served expert weights runs inside the kernels, and no adapter is merged
    into weights in fp8, mxfp4 or, of experts, 4 bits. Can be called again."""
    if hasattr(ParamWrapper._activate_lora, "_moe_kernels"):
        return
    original = ParamWrapper._activate_lora

    @functools.wraps(original)
    def _activate_lora(self: Any, active_adapters: list[str]) -> AbstractContextManager[None]:
        if not _is_fused(self):
            return original(self, active_adapters)
        pair = low_rank_pair(self, active_adapters)
        return nullcontext() if pair is None else _Lent(self.get_base_layer(), self.parameter_name, pair)

    _activate_lora._moe_kernels = True  # type: ignore[attr-defined]
    ParamWrapper._activate_lora = _activate_lora  # type: ignore[method-assign, assignment]
    _refuse_merge_into_packed()


def _refuse_merge_into_packed() -> None:
    """PEFT would add B A to the codes of an fp8 weight, as if its scales were 1; torch 2.14 has no such addition, and
    says nothing of a cure. To an expert weight in mxfp4 or in 4 bits it would add B A in a copy.

    Of a model all layers are asked first: those that PEFT comes to before the packed one would stay merged, and after
    merge_and_unload have lost their adapter.
    """
    merge_allowed = LoraModel._check_merge_allowed

    @functools.wraps(merge_allowed)
    def _check_merge_allowed(self: Any) -> None:
        merge_allowed(self)
        for module in self.model.modules():
            if isinstance(module, (Linear, ParamWrapper)):
                _check_merge(module)

    LoraModel._check_merge_allowed = _check_merge_allowed  # type: ignore[method-assign]
    for cls in (Linear, ParamWrapper):
        _check_before_merge(cls)


def _check_before_merge(cls: Any) -> None:
    original = cls.merge

    @functools.wraps(original)
    def merge(self: Any, *args: Any, **kwargs: Any) -> None:
        _check_merge(self)
        return original(self, *args, **kwargs)

    cls.merge = merge


def _check_merge(module: Any) -> None:
    layer, name = module.get_base_layer(), getattr(module, "parameter_name", "weight")
    stored, chain = layer._parameters.get(name), getattr(layer, "parametrizations", {})
    if stored is not None and stored.dtype == torch.float8_e4m3fn:
        kind, how = "fp8", "with FineGrainedFP8Config(dequantize=True)"
    elif name + MX_SCALES in layer._parameters:
        kind, how = "mxfp4", "with Mxfp4Config(dequantize=True)"
    elif name in chain and any(hasattr(part, "quant_state") for part in chain[name]):
        kind, how = "4 bits", "in 16 bits, without load_in_4bit"
    else:
        return
    raise ValueError(
        f"{type(layer).__name__}.{name} is in {kind}, into which PEFT cannot merge: load the model {how}, the "
        "adapter onto it, and merge there."
    )


class _Lent(AbstractContextManager[None]):
    """Inside, ``experts`` has the low-rank pair of one weight. Two nest where both weights are adapted, or where two
    wrappers adapt one weight, as Axolotl's patch of PEFT makes them for a second adapter: then both pairs count."""

    def __init__(self, experts: Any, weight: str, pair: LowRank) -> None:
        # Not vars(experts).setdefault, which torch.compile of torch 2.11 does not know.
        if not hasattr(experts, LORA_ATTRIBUTE):
            setattr(experts, LORA_ATTRIBUTE, {})
        self.pairs, self.weight, self.pair = getattr(experts, LORA_ATTRIBUTE), weight, pair

    def __enter__(self) -> None:
        self.outer = self.pairs.get(self.weight)
        self.pairs[self.weight] = self.pair if self.outer is None else _together(self.weight, self.outer, self.pair)

    def __exit__(self, *_: object) -> None:
        if self.outer is None:
            del self.pairs[self.weight]
        else:
            self.pairs[self.weight] = self.outer


def _together(weight: str, *pairs: LowRank) -> LowRank:
    """The pair whose product is the sum of the products of ``pairs``.

    The op takes one pair of a weight, as almost every training has it: several are joined by torch, in their own
    dtype, and then packed as one.
    """
    given: list[Any] = list(pairs)
    lora_bs, lora_as = zip(*((b, scaled(a, scaling)) for b, a, scaling in given), strict=True)
    rank = sum(lora_a.shape[1] for lora_a in lora_as)
    _check_limit(rank, weight, "all adapters together")
    return LowRank(torch.cat(lora_bs, dim=2), torch.cat(lora_as, dim=1))


def check_lora(model: torch.nn.Module) -> int:
    """The number of expert weights of ``model`` whose LoRA runs inside the kernels.

    Raises:
        ValueError: an adapter has a higher rank than the kernels take, factors that are no pair of this weight, are
            elsewhere or of different dtypes, or a dropout that would not happen, it is on the scales of a weight, or
            PEFT has left an adapter in the weight.
    """
    for name, module in model.named_modules():
        if isinstance(module, ParamWrapper) and module.parameter_name.endswith((SCALES, MX_SCALES)):
            weight = module.parameter_name.removesuffix(SCALES).removesuffix(MX_SCALES)
            raise ValueError(
                f"{name}: LoRA is on {module.parameter_name}, the scales of {weight}, which are no weight: write "
                f"{weight} in target_parameters (lora_target_parameters)."
            )
    # PEFT refuses dropout; Axolotl switches that off where PEFT turns target_modules into target_parameters.
    configs = getattr(model, "peft_config", {})
    wrappers: list[tuple[str, Any]] = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, ParamWrapper) and _is_fused(module)
    ]
    for name, wrapper in wrappers:
        for adapter in {**wrapper.lora_A, **wrapper.lora_B}:
            _check_pair(wrapper, adapter, name)
        for adapters in (*([one] for one in wrapper.r), wrapper.active_adapters):
            _check_rank(wrapper, adapters, f"{name}: ")
            _check_dtypes(wrapper, adapters, name)
        # 0.21.0 to 0.21.2 do so in a forward of 4-bit weights.
        chain = dict(getattr(wrapper.get_base_layer(), "parametrizations", {})).get(wrapper.parameter_name, ())
        if any(type(part).__module__.startswith("peft.") for part in chain):
            raise ValueError(
                f"{name}: PEFT has run without fuse_lora() and left its factors on {wrapper.parameter_name}, where "
                "they would count twice: load the model again and call fuse_lora() before its first forward."
            )
        dropout = max((configs[adapter].lora_dropout for adapter in wrapper.lora_A if adapter in configs), default=0)
        if dropout:
            raise ValueError(
                f"{name}: lora_dropout={dropout} cannot act on {wrapper.parameter_name}, which is a parameter, not a "
                "module, and would be left out there in silence: set lora_dropout: 0."
            )
    return sum(wrapper.parameter_name in _WEIGHTS for _, wrapper in wrappers)


def _check_pair(wrapper: Any, adapter: str, where: str) -> None:
    """Both factors are there, in PEFT's packing, for this weight, and with it. Not looked at where an engine holds
    them in pieces (ZeRO-3, FSDP1: in one dimension)."""
    what, rank, experts = f"{wrapper.parameter_name} (adapter {adapter!r})", wrapper.r[adapter], wrapper.num_experts
    missing = [name for name in ("lora_A", "lora_B") if adapter not in getattr(wrapper, name)]
    if missing:
        raise ValueError(
            f"{where}: {missing[0]} of {what} is missing: load the adapter again, or make it anew for this model."
        )
    a, b = wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight
    if a.dim() != 2 or b.dim() != 2:
        return
    wanted = (experts * rank, wrapper.in_features), (wrapper.out_features, experts * rank)
    if (a.shape, b.shape) != wanted:
        raise ValueError(
            f"{where}: lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} of {what} are no pair of rank {rank} for "
            f"its {experts} experts, which is {wanted[0]} and {wanted[1]}: load the adapter again, or make it anew "
            "for this model."
        )
    layer, name = wrapper.get_base_layer(), wrapper.parameter_name
    chain = getattr(layer, "parametrizations", {})
    stored = chain[name].original if name in chain else layer._parameters.get(name)
    weight = wrapper.get_param() if stored is None else stored  # reading one may dequantise it
    if weight.device.type != "meta" and {a.device, b.device} != {weight.device}:
        raise ValueError(
            f"{where}: lora_A of {what} is on {a.device} and lora_B on {b.device}, the weight is on {weight.device}: "
            "move the adapter there before training."
        )


def _check_rank(wrapper: Any, adapters: list[str], where: str = "") -> None:
    rank = sum(wrapper.r.get(adapter, 0) for adapter in adapters)
    _check_limit(rank, wrapper.parameter_name, " + ".join(adapters), where)


def _check_limit(rank: int, weight: str, adapters: str, where: str = "") -> None:
    if rank > MAX_RANK:
        raise ValueError(
            f"{where}LoRA of rank {rank} ({adapters}) on {weight}, the kernels take at most {MAX_RANK}: lower "
            "lora_r, activate fewer adapters, or train without moe_kernels."
        )


def _check_dtypes(wrapper: Any, adapters: list[str], where: str) -> None:
    """One factor would be rounded and the other not, and torch.cat would promote those of several adapters. PEFT may
    leave those over fp8 in fp8."""
    factors = [f[name].weight for f in (wrapper.lora_A, wrapper.lora_B) for name in adapters if name in f]
    dtypes = sorted({str(factor.dtype).removeprefix("torch.") for factor in factors})
    if len(dtypes) > 1:
        raise ValueError(
            f"{where}: the LoRA factors of {wrapper.parameter_name} are {' and '.join(dtypes)}: cast them to one "
            "dtype before training."
        )
    if any(factor.dtype.itemsize < 2 for factor in factors):
        raise ValueError(
            f"{where}: the LoRA factors of {wrapper.parameter_name} are {dtypes[0]}, which no optimizer trains: "
            "leave autocast_adapter_dtype of PEFT at True, or cast them to float32 before training."
        )


def _is_fused(wrapper: Any) -> bool:
    """Of an expert weight, or of the weight of an fp8 linear layer, to whose codes PEFT would add B A."""
    layer, weight = wrapper.get_base_layer(), wrapper.parameter_name
    return (weight in _WEIGHTS and is_served(layer)) or (weight == "weight" and isinstance(layer, ExactFP8Linear))


def low_rank_pair(wrapper: Any, adapters: list[str]) -> LowRank | None:
    """What ``adapters`` together add to a weight (E, N, K). None where no adapter has this weight.

    PEFT packs A as (E*r, K), experts slowest, and B as (N, r*E), experts fastest, whichever way the weight is stored.
    Those of one adapter are views: the op reads PEFT's own memory, and its gradients have that layout.

    Raises:
        ValueError: the adapters have a higher rank together than the kernels take.
        UnsupportedExperts: a factor is sharded, or stored in a class of its own.
    """
    adapters = [name for name in adapters if name in wrapper.lora_A]
    if not adapters:
        return None
    _check_rank(wrapper, adapters)
    experts, pairs = wrapper.num_experts, []
    for name in adapters:
        a, b = (_factor(wrapper, factors[name].weight) for factors in (wrapper.lora_A, wrapper.lora_B))
        lora_b, lora_a = b.view(b.shape[0], -1, experts).permute(2, 0, 1), a.view(experts, -1, a.shape[1])
        pairs.append(LowRank(lora_b, lora_a, float(wrapper.scaling[name])))
    return pairs[0] if len(pairs) == 1 else _together(wrapper.parameter_name, *pairs)


def _factor(wrapper: Any, weight: Any) -> torch.Tensor:
    experts = wrapper.get_base_layer()
    if is_sharded(weight):  # nothing gathers it: PEFT reads it past the forward of its linear
        raise UnsupportedExperts(
            f"{type(experts).__name__}: the LoRA factors of {wrapper.parameter_name} are sharded in forward "
            f"({weight.placements}): shard the decoder layer (fully_shard), not the linears of the adapter."
        )
    return local_tensor(experts, weight)
