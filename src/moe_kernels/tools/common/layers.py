"""The expert layers that a run file or a model folder stands for: read from its configuration, nothing is loaded."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_kernels.packed import SIDE
from moe_kernels.tools.common.errors import MissingDependency, UsageError
from moe_kernels.tools.common.runfile import base_model, load_yaml, precision, tokens_per_micro_batch

if TYPE_CHECKING:
    from torch import nn

    from moe_kernels.tools.check.problems import Case

_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k", "top_k")
DEFAULT_TOKENS = 4096
OVERRIDES = "overrides_of_model_config"
#: What a checkpoint's quant_method makes of experts, as moe_kernels.tools.check.packing names it.
FORMATS = {"fp8": "fp8", "mxfp4": "mxfp4", "bitsandbytes": ""}
# What transformers and torch raise for a configuration whose values make no sense.
NONSENSE = (
    ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, RuntimeError, re.error,
)  # fmt: skip


@dataclass(frozen=True)
class Target:
    """The expert layers of a run file, or of a model alone."""

    model: str  # its folder, or its name in the local Hugging Face cache
    tokens: int = DEFAULT_TOKENS  # of one micro-batch
    dtype: str = "bf16"  # or "fp16", "fp32"
    overrides: Mapping[str, Any] = field(default_factory=dict)  # of the model's configuration, by the run file
    config: Mapping[str, Any] = field(default_factory=dict)  # the run file, of which adapter and formats are read


def read_target(path: Path) -> Target:
    """A run file (.yml, .yaml), a model's folder, or its config.json.

    Raises:
        UsageError: it is none of these, or names no model.
    """
    if path.suffix in (".yml", ".yaml"):
        config = load_yaml(path)
        _check_adapter(config, path)
        overrides = config.get(OVERRIDES) or {}
        return Target(base_model(config, path), tokens_per_micro_batch(config), precision(config), overrides, config)
    folder = path.parent if path.name == "config.json" else path
    if not (folder / "config.json").is_file():
        raise UsageError(f"{path} is no run file (.yml) and no model: there is no {folder / 'config.json'}.")
    return Target(str(folder))


def expert_layers(target: Target) -> list[tuple[str, Case]]:
    """Each kind of expert layer of the model once, under the name of the first; tokens as in the target.

    Raises:
        UsageError: the model cannot be read, or has no expert layers.
        UnsupportedExperts: the kernels do not compute what a layer computes.
    """
    return [(names[0], case) for case, names in kinds_of_layers(build(target), target).items()]


def build(target: Target) -> Any:
    """The model of transformers, without memory for its weights.

    Raises:
        UsageError: its configuration cannot be used.
        MissingDependency: it is not on this machine.
    """
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(target.model, local_files_only=True, trust_remote_code=False)
        for key, value in target.overrides.items():
            setattr(config, key, value)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except OSError as error:
        raise MissingDependency(
            f"{target.model} cannot be read here: {_first_line(error)} Cure: `moe-kernels prepare`, or download it."
        ) from error
    except (StrictDataclassError, *NONSENSE) as error:
        raise UsageError(f"The configuration of {target.model} cannot be used: {_first_line(error)}") from error


def kinds_of_layers(model: Any, target: Target) -> dict[Case, list[str]]:
    """The expert layers of a model that :func:`build` returned: the names of all that are alike, by what they are.

    Raises:
        UsageError: it has none that these kernels could run.
        UnsupportedExperts: the kernels do not compute what a layer computes.
    """
    import torch

    from moe_kernels.integrations.support import recipe_of
    from moe_kernels.integrations.transformers import experts_modules
    from moe_kernels.tools.check.problems import Case

    text = model.config.get_text_config()
    top_k = next((value for key in _TOP_K if isinstance(value := getattr(text, key, None), int)), 2)
    kinds: dict[Case, list[str]] = {}
    modules = experts_modules(model)
    factors = _factors(model, target)
    for name, module in modules:
        recipe = recipe_of(module, name)
        adapted = factors.get(module, {})
        low = [adapted.get(weight, (0, 1.0)) for weight in (recipe.up_name, "down_proj")]
        packed = _format(model, target, name)
        experts, *sides = module.down_proj.shape
        hidden, intermediate = reversed(sides) if recipe.transposed else sides
        case = Case(
            tokens=target.tokens,
            top_k=min(top_k, experts),
            experts=experts,
            hidden=hidden,
            intermediate=intermediate,
            activation=recipe.gate.activation,
            gated=recipe.gate.gated,
            interleaved=recipe.gate.interleaved,
            transposed=recipe.transposed,
            bias=recipe.biased,
            lora_rank=low[0][0],
            down_rank=low[1][0],
            scalings=(low[0][1], low[1][1]),
            # PEFT's default; else it takes the weight's, and Axolotl the training's for a weight in fp8.
            lora_dtype=None if target.config.get("peft_autocast_adapter_dtype") is False else torch.float32,
            reduce=not recipe.post_norm,
            frozen=bool(packed or target.config.get("adapter")),
            packed=packed,
        )
        kinds.setdefault(case, []).append(name.removeprefix("model."))
    if not kinds:
        raise UsageError(f"{target.model} has no expert layers that these kernels could run.")
    if any(min(case.hidden, case.intermediate, case.top_k, case.experts) < 1 for case in kinds):
        raise UsageError(f"The configuration of {target.model} has an expert layer without rows, columns or experts.")
    if misfits := [case for case in kinds if case.fitting() != case]:
        raise UsageError(
            f"Experts of hidden size {misfits[0].hidden} and intermediate size {misfits[0].intermediate} do not "
            f"divide into the blocks of {misfits[0].packed}: train them in 16 bits."
        )
    return kinds


def _check_adapter(config: Mapping[str, Any], path: Path) -> None:
    adapter, rank = config.get("adapter"), config.get("lora_r")
    if adapter not in (None, "", "lora", "qlora"):
        raise UsageError(f"{path}: adapter should be lora or qlora and is {adapter!r:.60}.")
    if adapter and (type(rank) is not int or not 0 < rank < 2**16):
        raise UsageError(f"{path}: lora_r should be a number from 1 on and is {rank!r:.60}.")


def _factors(model: Any, target: Target) -> dict[nn.Module, dict[str, tuple[int, float]]]:
    """Of each experts module that the run file adapts: rank and scaling of LoRA on its weights, by name.

    PEFT decides: it takes the same lora_target_modules for the routed experts of one model and not of another.
    """
    config = target.config
    if not config.get("adapter"):
        return {}
    import peft
    from torch import nn

    from moe_kernels.integrations.peft import MAX_RANK

    named: Any = config.get("lora_target_modules") or []
    try:
        if config.get("lora_target_linear"):
            linears = {name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, nn.Linear)}
            named = [*([named] if isinstance(named, str) else named), *sorted(linears - {"lm_head"})]
        settings = peft.LoraConfig(
            r=config["lora_r"],
            lora_alpha=config.get("lora_alpha") or 8,  # PEFT's own default
            use_rslora=bool(config.get("peft_use_rslora")),
            target_modules=named,
            target_parameters=config.get("lora_target_parameters") or [],
            rank_pattern=config.get("lora_rank_pattern") or {},
            alpha_pattern=config.get("lora_alpha_pattern") or {},
        )
        adapted: Any = peft.get_peft_model(model, settings, low_cpu_mem_usage=True)
    except NONSENSE as error:
        raise UsageError(f"PEFT makes no adapter of the run file's keys: {_first_line(error)}") from error
    found: dict[nn.Module, dict[str, tuple[int, float]]] = {}
    for part in adapted.modules():
        if hasattr(part, "parameter_name"):
            rank = part.r["default"]
            if rank > MAX_RANK:
                raise UsageError(f"LoRA of rank {rank} on experts; the kernels take {MAX_RANK} at most: lower it.")
            found.setdefault(part.get_base_layer(), {})[part.parameter_name] = rank, part.scaling["default"]
    return found


def _format(model: Any, target: Target, name: str) -> str:
    """How the weights of the experts module ``name`` are kept; empty: in 16 bits."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    config = target.config
    asked: Any = config.get("model_quantization_config_kwargs") or {}
    stored: Any = getattr(model.config, "quantization_config", None) or {}
    try:
        if not stored and config.get("model_quantization_config") == "FineGrainedFP8Config":
            stored = {"quant_method": "fp8", **asked}
        method, dequantised = stored.get("quant_method"), asked.get("dequantize")
        converted = not dequantised and should_convert_module(name, stored.get("modules_to_not_convert"))
    except NONSENSE as error:
        raise UsageError(f"The quantization_config of {target.model} cannot be used: {_first_line(error)}") from error
    if method not in (None, *FORMATS) or stored.get("weight_block_size") not in (None, [SIDE, SIDE], (SIDE, SIDE)):
        raise UsageError(
            f"The experts of {target.model} are in {method} {stored.get('weight_block_size') or ''}, which is not "
            f"known here; {', '.join(FORMATS)} in blocks of {SIDE} are. Name a 16-bit model."
        )
    packed = FORMATS.get(method, "") if converted else ""
    if not packed and config.get("load_in_4bit") and config.get("quantize_moe_experts"):
        packed = "4 bits"
    if packed and config and not config.get("adapter"):
        raise UsageError(f"Experts in {packed} are frozen: write adapter: lora, or name a 16-bit base_model.")
    if not config.get("moe_fp8_activations"):
        return packed
    if packed != "fp8":
        raise UsageError(f"moe_fp8_activations multiplies experts in block-fp8, and {name} has none: leave it out.")
    return "fp8 activations"


def _first_line(error: Exception) -> str:
    return next(itertools.chain(str(error).strip().splitlines(), [type(error).__name__]))[:300]
