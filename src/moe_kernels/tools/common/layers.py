"""The expert layers that a run file or a model folder stands for: read from its configuration, nothing is loaded."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_kernels.tools.common.errors import MissingDependency, UsageError
from moe_kernels.tools.common.runfile import base_model, load_yaml, precision, tokens_per_micro_batch

if TYPE_CHECKING:
    from moe_kernels.tools.check.problems import Case

_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k", "top_k")
DEFAULT_TOKENS = 4096
OVERRIDES = "overrides_of_model_config"
# What transformers and torch raise for a configuration whose values make no sense.
NONSENSE = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, RuntimeError)


@dataclass(frozen=True)
class Target:
    """The expert layers of a run file, or of a model alone."""

    model: str  # its folder, or its name in the local Hugging Face cache
    tokens: int = DEFAULT_TOKENS  # of one micro-batch
    dtype: str = "bf16"  # or "fp16", "fp32"
    lora_rank: int = 0  # of the adapters of the expert weights; 0 without
    overrides: Mapping[str, Any] = field(default_factory=dict)  # of the model's configuration, by the run file


def read_target(path: Path) -> Target:
    """A run file (.yml, .yaml), a model's folder, or its config.json.

    Raises:
        UsageError: it is none of these, or names no model.
    """
    if path.suffix in (".yml", ".yaml"):
        config = load_yaml(path)
        return Target(
            base_model(config, path),
            tokens_per_micro_batch(config),
            precision(config),
            _lora_rank(config, path),
            config.get(OVERRIDES) or {},
        )
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
    from moe_kernels.integrations.support import recipe_of
    from moe_kernels.integrations.transformers import experts_modules
    from moe_kernels.tools.check.problems import Case

    text = model.config.get_text_config()
    top_k = next((value for key in _TOP_K if isinstance(value := getattr(text, key, None), int)), 2)
    kinds: dict[Case, list[str]] = {}
    for name, module in experts_modules(model):
        recipe = recipe_of(module, name)
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
            lora_rank=target.lora_rank,
            reduce=not recipe.post_norm,
        )
        kinds.setdefault(case, []).append(name.removeprefix("model."))
    if not kinds:
        raise UsageError(f"{target.model} has no expert layers that these kernels could run.")
    if any(min(case.hidden, case.intermediate, case.top_k, case.experts) < 1 for case in kinds):
        raise UsageError(f"The configuration of {target.model} has an expert layer without rows, columns or experts.")
    return kinds


def _lora_rank(config: dict[str, Any], path: Path) -> int:
    names = config.get("lora_target_parameters")
    if not isinstance(names, list) or not any("experts" in str(name) for name in names):
        return 0
    rank = config.get("lora_r")
    if type(rank) is not int or not 0 < rank < 2**16:
        raise UsageError(f"{path}: lora_r should be a number from 1 on and is {rank!r:.60}.")
    return rank


def _first_line(error: Exception) -> str:
    return next(itertools.chain(str(error).strip().splitlines(), [type(error).__name__]))[:300]
