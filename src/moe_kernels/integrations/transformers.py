"""``experts_implementation="moe_kernels"`` for transformers.

    import moe_kernels.integrations.transformers as mk
    mk.register()
    model = AutoModelForCausalLM.from_pretrained(..., experts_implementation="moe_kernels")
    mk.check_model(model)

The routing stays in the model; only the body of its experts class is replaced. Parameter names and shapes are
those of transformers, and the saved config.json holds no trace of the choice.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Collection
from typing import Any, NoReturn

import torch

from moe_kernels.checks import check_weights
from moe_kernels.install import pip_install
from moe_kernels.layer import Matrix
from moe_kernels.moe import fused_experts
from moe_kernels.settings import DEFAULT_GROUP_SIZE, ExpertsSettings, GroupSize

try:
    import transformers
    from packaging.version import Version  # which transformers needs
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS, FP8Experts
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    from moe_kernels.integrations.adapters import Adapted, adapted, doubts
    from moe_kernels.integrations.dispatch import dispatches, experts_modules, is_served, registered, runs_on
    from moe_kernels.integrations.fp8 import check_fp8_activations, gather_uncast, multiplied_in_fp8, train_fp8
    from moe_kernels.integrations.mxfp4 import keep_mxfp4, keep_names
    from moe_kernels.integrations.probe import probe_device
    from moe_kernels.integrations.quantized import check_frozen, check_scales, packed_weight
    from moe_kernels.integrations.resume import mend_trainer
    from moe_kernels.integrations.support import (
        LORA_ATTRIBUTE,
        Recipe,
        UnsupportedExperts,
        check_pair,
        check_weight,
        is_sharded,
        local_tensor,
        plain_weight,
        recipe_of,
        why_not_module,
    )
except ImportError as error:
    raise ImportError(
        f"moe_kernels.integrations.transformers needs transformers 5.16.1 or newer: {pip_install('transformers')}"
    ) from error

logger = logging.getLogger("moe_kernels")

# Whether an implementation was registered with fp8_activations, by its name.
_in_fp8: dict[str, bool] = {}

__all__ = ["UnsupportedExperts", "check_model", "experts_modules", "register", "why_not_module"]

def register(
    *,
    group_size: GroupSize = DEFAULT_GROUP_SIZE,
    persistent: bool = True,
    recompute: bool = False,
    fp8_activations: bool = False,
    backend: str = "auto",
    name: str = "moe_kernels",
) -> None:
    """Make ``experts_implementation=name`` run :func:`moe_kernels.fused_experts` with these settings.

    Calling it again with the same name replaces the settings, also for models already loaded under it. From here on
    transformers' Trainer loads the expert layers of its checkpoints (integrations.resume), and a checkpoint in mxfp4
    that is loaded with ``experts_implementation=name`` keeps its experts in 4 bits (integrations.mxfp4).

    ``fp8_activations``: multiply frozen block-fp8 experts in fp8, with rows rounded to e4m3 (:mod:`moe_kernels.fp8`),
    instead of dequantising them ahead of each GEMM. For models with such experts alone.

    Raises:
        ValueError: a setting is invalid; the message lists the valid ones.
    """
    settings = dataclasses.asdict(ExpertsSettings(group_size, persistent, backend, recompute))
    if not isinstance(fp8_activations, bool):
        raise ValueError(f"fp8_activations={fp8_activations!r} must be true or false")

    # Models may call it by keyword, so the parameter names are transformers' own.
    def experts_forward(
        self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        return run_experts(self, hidden_states, top_k_index, top_k_weights, fp8_activations, **settings)

    for interface in (ALL_EXPERTS_FUNCTIONS, ALL_FP8_EXPERTS_FUNCTIONS):
        interface.register(name, experts_forward)
    # transformers 5.16 loads fp8 experts under the implementations that are in here alone; under none (None) Axolotl
    # 0.19 loads a model, to name one afterwards.
    for implementation in (name, None):
        getattr(FP8Experts, "_impl_tp_layer_overrides", {}).setdefault(implementation, {})
    registered[name] = experts_forward
    _in_fp8[name] = fp8_activations
    keep_mxfp4(name)
    mend_trainer(lambda model: bool(experts_modules(model)))


def run_experts(
    module: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    fp8_activations: bool = False,
    **settings: Any,
) -> torch.Tensor:
    """What the eager forward of ``module`` computes, by :func:`moe_kernels.fused_experts`.

    Args:
        module: an experts module whose class transformers' ``use_experts_implementation`` decorates.
        hidden_states: (T, H).
        top_k_index: (T, K); ids outside [0, E) are dropped.
        top_k_weights: (T, K).
        fp8_activations: see :func:`register`.
        settings: further arguments of ``fused_experts``, such as ``backend`` and ``gate_up_lora``.

    Raises:
        UnsupportedExperts: these kernels do not compute what the module computes, or not from such weights.
    """
    # Every time: expert parallelism, PEFT and weight swaps change the module between calls.
    recipe = recipe_of(module)
    up_name = recipe.up_name
    lora = vars(module).get(LORA_ATTRIBUTE, {})
    others = {"gate_up_lora": lora.get(up_name), "down_lora": lora.get("down_proj")}
    if recipe.biased:
        others["gate_up_bias"] = plain_weight(module, getattr(module, f"{up_name}_bias"))
        others["down_bias"] = plain_weight(module, module.down_proj_bias)

    gate_up, down = (
        _weight(module, name, hidden_states.dtype, fp8_activations) for name in (up_name, "down_proj")
    )
    _check_frozen(module, up_name)
    if recipe.transposed:
        gate_up, down = gate_up.mT, down.mT
    check_pair(module, gate_up, down, recipe.gate.gated)
    out = fused_experts(
        hidden_states,
        top_k_index,
        None if recipe.post_norm else top_k_weights,
        gate_up,
        down,
        activation=recipe.gate.activation,
        interleaved=recipe.gate.interleaved,
        reduce=not recipe.post_norm,
        **others,
        **settings,
    )
    if not recipe.post_norm:
        return out
    # The order of transformers' grouped_mm; a dropped slot stays zero whatever the norm makes of zeros.
    kept = (top_k_index >= 0) & (top_k_index < module.num_experts)
    weighted = module.post_expert_norm(out) * torch.where(kept, top_k_weights, 0.0).unsqueeze(-1)
    return weighted.sum(dim=1).to(hidden_states.dtype)


def _weight(module: Any, name: str, dtype: torch.dtype, fp8_activations: bool) -> Matrix:
    """The weight ``name``, read once: PEFT merges, quantised parametrisations dequantise, on every access."""
    weight = packed_weight(module, name, dtype) or plain_weight(module, getattr(module, name))
    return multiplied_in_fp8(module, name, weight) if fp8_activations else weight


class Served(int):
    """The number of expert layers that these kernels serve.

    Attributes:
        adapted: what LoRA trains, by the part of the model; None without PEFT.
        lora_weights: expert weights whose LoRA runs inside the kernels.
    """

    adapted: Adapted | None = None
    lora_weights: int = 0


def check_model(model: torch.nn.Module, targets: Collection[str] | None = None) -> Served:
    """The number of expert layers of ``model``, all of them served by these kernels, and what LoRA trains.

    Where PEFT is in use, LoRA on expert weights runs inside the kernels from here on (integrations.peft). A warning
    says where no routed expert is adapted although expert projections are named, and where the router is adapted but
    not named in ``targets``, what the user wrote as target_modules and target_parameters.

    The modules are asked, not the config: where another plugin replaced the experts class, the config still
    names our implementation although it is never called.

    What every forward would refuse is refused here, from the shapes, dtypes and strides of the weights: they are not
    read, but for the scales of fp8 weights. Two dtypes in one module are fine under ``torch.autocast``: where you
    train under it, check under it.

    Where experts are in fp8, the model's fp8 linear layers run on dequantised weights from here on, and Trainer takes
    the model (integrations.fp8). A model that transformers dequantised from mxfp4 is saved with its experts, which
    transformers before 5.24 loses (integrations.mxfp4).

    Raises:
        UnsupportedExperts: a module, or every one, would not be served; names the module, reason and cure.
        ValueError: what is given is no model, or has an adapter on expert weights that the kernels cannot run; see
            integrations.peft.check_lora.
    """
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"check_model takes a loaded model, not {type(model).__name__}: call from_pretrained first")
    modules = experts_modules(model)
    if not modules:
        _refuse_without_experts(model)
    for name, module in modules:
        if not is_served(module):
            _refuse_other_implementation(module, name)
        recipe = recipe_of(module, name)
        for parameter in module.parameters(recurse=False):  # not by attribute, which may dequantise it
            local_tensor(module, parameter, name)
        _check_weights(module, recipe, name)
    train_fp8(model)
    gather_uncast(model)
    keep_names(model)
    served = Served(len(modules))
    if hasattr(sys.modules.get("peft.tuners.lora.layer"), "ParamWrapper"):
        from moe_kernels.integrations.peft import check_lora, fuse_lora

        fuse_lora()
        served.lora_weights = check_lora(model)
        served.adapted = adapted(model)
        for doubt in doubts(model, targets):
            logger.warning(doubt)
    _warn_of_small_gradients(model)
    return served


def _refuse_without_experts(model: torch.nn.Module) -> NoReturn:
    others = {type(m).__name__ for m in model.modules() if hasattr(m, "gate_up_proj")}
    if "Mxfp4GptOssExperts" in others:
        raise UnsupportedExperts(
            f"{type(model).__name__} has experts in mxfp4 in the layout of transformers' kernels, which have no "
            "backward. To train LoRA over mxfp4, call register() and then load the model with "
            "experts_implementation='moe_kernels' (Axolotl: moe_kernels: true and adapter: lora do both); for 16-bit "
            "weights, load it with Mxfp4Config(dequantize=True)."
        )
    raise UnsupportedExperts(
        f"{type(model).__name__} has no experts module that dispatches through transformers' experts "
        f"interface (it has: {', '.join(sorted(others)) or 'no experts'}). Switch off what replaced the "
        "experts class (Liger: liger_glu_activation), or train this model without moe_kernels."
    )


def _refuse_other_implementation(module: Any, name: str) -> NoReturn:
    interface = dispatches(type(module))
    if not any(interface is known for known in (ALL_EXPERTS_FUNCTIONS, ALL_FP8_EXPERTS_FUNCTIONS)):
        raise UnsupportedExperts.of(
            module,
            f"its class looks for the implementation in {type(interface).__name__}, where moe_kernels has none.",
            name,
        )
    raise UnsupportedExperts(
        f"{name} ({type(module).__name__}) runs "
        f"experts_implementation={module.config._experts_implementation!r}, not "
        "moe_kernels: call register() and load the model with experts_implementation='moe_kernels'."
    )


def _warn_of_small_gradients(model: torch.nn.Module) -> None:
    """transformers 5.19 to 5.22, whatever runs the experts: see findings/transformers-ep-expert-gradients.sh."""
    parallel = getattr(getattr(model, "config", None), "distributed_config", None)
    experts, data = (getattr(parallel, size, None) or 1 for size in ("ep_size", "fsdp_size"))
    if experts > 1 and data > 1 and Version(transformers.__version__) < Version("5.23"):
        logger.warning(
            "expert parallelism of transformers %s divides the gradients of the experts by the number of ranks once "
            "too often, with any experts_implementation: train with transformers 5.23 or newer, or with ep_size=1",
            transformers.__version__,
        )


def _check_frozen(module: Any, up_name: str, name: str = "") -> None:
    """A model is loaded with requires_grad on its fp8 weights, so only one in training is asked."""
    if module.training and torch.is_grad_enabled():
        for weight in (up_name, "down_proj"):
            check_frozen(module, weight, name)


def _check_weights(module: Any, recipe: Recipe, name: str) -> None:
    """Raise UnsupportedExperts where a forward would, whatever its tokens, or on wrong scales; no weight is read."""
    _check_frozen(module, recipe.up_name, name)
    if _in_fp8.get(runs_on(module)):
        check_fp8_activations(module, recipe, name, probe_device(module))
    biases = (f"{recipe.up_name}_bias", "down_proj_bias") if recipe.biased else ()
    weights = [_stand_in(module, weight, name) for weight in (recipe.up_name, "down_proj", *biases)]
    for weight_name in (recipe.up_name, "down_proj"):
        check_scales(module, weight_name, name)
    known = [weight for weight in weights if weight is not None]
    for weight in known:
        check_weight(module, weight, name)
    if len(known) < len(weights):
        return
    gate_up, down, *others = (weight.mT if recipe.transposed and weight.dim() == 3 else weight for weight in known)
    check_pair(module, gate_up, down, recipe.gate.gated, name)
    gate_up_bias, down_bias = others or (None, None)
    gate = recipe.gate
    try:
        check_weights(gate_up, down, gate_up_bias, down_bias, gate.activation, gate.interleaved, probe_device(module))
    except ValueError as error:
        raise UnsupportedExperts.mended(module, str(error), name) from error


def _stand_in(module: Any, weight: str, name: str) -> torch.Tensor | None:
    """A tensor on meta that looks as the weight will in a forward; None where only reading it would tell.

    That is behind a parametrization, and where an engine holds it in pieces until then: ZeRO-3 and FSDP1 in one
    dimension, others as a DTensor, of which FSDP2 hands over the whole and expert parallelism this process's part.
    """
    packed = packed_weight(module, weight, torch.bfloat16, name)
    if packed is not None:
        return torch.empty(packed.shape, dtype=packed.dtype, device="meta")
    parameter = module._parameters.get(weight)
    if parameter is None or parameter.dim() == 1 or is_sharded(parameter):
        return None
    return torch.empty_strided(parameter.shape, parameter.stride(), dtype=parameter.dtype, device="meta")
