"""The YAML keys of the plugin, validated before anything is loaded.

Only pydantic is imported here: Axolotl merely logs an ImportError of a plugin, and then trains without it.
"""

from __future__ import annotations

import difflib
import importlib.util
from typing import Any, Literal

from pydantic import BaseModel, Field, StrictBool, StrictStr, field_validator, model_validator

OWN_KEYS = (
    "moe_kernels",
    "moe_group_size",
    "moe_persistent_kernel",
    "moe_recompute",
    "moe_fp8_activations",
    "moe_kernel_models",
    "moe_router_telemetry",
    "moe_fused_router",
)
# Those that say how the kernels run: without the kernels they mean nothing.
KNOBS = ("moe_group_size", "moe_persistent_kernel", "moe_recompute", "moe_fp8_activations", "moe_kernel_models")
# Keys of Axolotl's KernelsPlugin that share the prefix.
FOREIGN_KEYS = ("moe_grouped_backend", "moe_dequant_chunk_size", "moe_bnb_fast")
# Each of these makes something else run the experts, so these kernels would be bypassed.
CONFLICTS = {
    "use_scattermoe": "remove it",
    "use_sonicmoe": "remove it",
    "expert_backend": "remove it",
    "liger_glu_activation": "set it to false: Liger replaces the experts class (its other keys are fine)",
    "liger_swiglu": "set it to false: Liger replaces the experts class (its other keys are fine)",
}


def lists(data: Any, package: str) -> bool:
    """Whether ``plugins`` names one of a package's: every plugin of Axolotl can be named by more than one path."""
    plugins = data.get("plugins")
    return isinstance(plugins, list) and any(f"integrations.{package}" in str(name) for name in plugins)


def mentioned(data: Any) -> bool:
    """Whether a config (anything with ``get``) says anything about this plugin, which Axolotl from 0.21 on loads for
    every run of an environment that has the package."""
    return (
        any(data.get(key) is not None for key in OWN_KEYS)
        or data.get("experts_implementation") == "moe_kernels"
        or lists(data, "moe_kernels")
    )


def shards_experts(data: Any) -> bool:
    """Whether a config asks for Axolotl's expert parallelism."""
    return (data.get("expert_parallel_size") or 1) != 1


def wraps_any_experts() -> bool:
    """Whether this Axolotl's expert parallelism runs whatever implementation is registered. 0.19's has a list."""
    return importlib.util.find_spec("axolotl.integrations.expert_parallel.torch_dispatch") is not None


# The one source of the tables of keys in the documents: each description ends with "Default: value.", and
# benchmarks/make_knob_tables.py writes the tables. The values of moe_group_size are those of moe_kernels.settings,
# written again because a config that is refused must not import the kernels; a test compares them.
class MoeKernelsArgs(BaseModel):
    """Keys of ``axolotl.integrations.moe_kernels.plugin.MoeOptimizedPlugin``."""

    moe_kernels: StrictBool | None = Field(
        default=None,
        description="Run the routed experts on moe-kernels. Default: false.",
    )
    moe_group_size: Literal[64, 128, 256, "auto"] | None = Field(
        default=None,
        description=(
            "Rows per tile of the grouped GEMMs (every tile of that many routed rows belongs to one expert); `auto` "
            "chooses from the rows per expert. Default: 128."
        ),
    )
    moe_persistent_kernel: StrictBool | None = Field(
        default=None,
        description=(
            "One program per multiprocessor loops over all tiles of a grouped GEMM, instead of one "
            "program per tile. Default: true."
        ),
    )
    moe_recompute: StrictBool | None = Field(
        default=None,
        description=(
            "Keep only the tokens of an expert layer for the backward pass, not the output of its up "
            "projection, which is computed again: less memory, more time. Default: false."
        ),
    )
    moe_fp8_activations: StrictBool | None = Field(
        default=None,
        description=(
            "Multiply the frozen experts of a block-fp8 checkpoint in fp8, with activations and their gradients "
            "rounded to e4m3, instead of dequantising the weights exactly ahead of each GEMM. Default: false."
        ),
    )
    moe_kernel_models: list[StrictStr] | None = Field(
        default=None,
        min_length=1,
        description=(
            "Allow-list of model types (`model_type` of the model's `config.json`, such as "
            "`mixtral`); any other model fails before training. Default: all whose experts are supported."
        ),
    )
    moe_router_telemetry: StrictBool | Literal["layers"] | None = Field(
        default=None,
        description=(
            "Log how evenly the routers load the experts (`train/moe/load_imbalance` and four more), and write the "
            "load of every expert to `moe_router.jsonl` in `output_dir`; `layers` logs each layer too. Works without "
            "`moe_kernels`. Default: false."
        ),
    )
    moe_fused_router: StrictBool | None = Field(
        default=None,
        description=(
            "Choose the experts in one kernel launch a layer instead of the model's own dozen; a "
            "router that computes something else is refused when the model is loaded. Works without `moe_kernels`. "
            "Default: false."
        ),
    )

    @field_validator("moe_group_size", mode="before")
    @classmethod
    def check_group_size(cls, value: Any) -> Any:
        """Refuse 64.0, which a Literal takes for 64."""
        if isinstance(value, float):
            raise ValueError("Input should be 64, 128, 256 or 'auto'")
        return value

    @model_validator(mode="before")
    @classmethod
    def check_fp8_activations(cls, data: Any) -> Any:
        """Refuse what would take the experts' weights dequantised."""
        if isinstance(data, dict) and data.get("moe_fp8_activations") and data.get("torch_compile"):
            raise ValueError(
                "moe_fp8_activations: true cannot be combined with torch_compile, which would take the weights "
                "dequantised: remove one of them."
            )
        return data

    @model_validator(mode="before")
    @classmethod
    def check_moe_kernels(cls, data: Any) -> Any:
        """Refuse misspelt keys and whatever would bypass the kernels, each with its cure."""
        if not isinstance(data, dict):
            return data
        # model_fields: `cls` is Axolotl's config class with the keys of all listed plugins.
        known = {*OWN_KEYS, *FOREIGN_KEYS, *cls.model_fields}
        ours = mentioned(data)
        for key in data:
            if not isinstance(key, str) or not key.startswith("moe_") or key in known:
                continue
            if ours or difflib.get_close_matches(key, OWN_KEYS, cutoff=0.8):
                raise ValueError(f"unknown key {key!r}: the keys of moe-kernels are {', '.join(OWN_KEYS)}")

        experts = data.get("experts_implementation")
        switch = data.get("moe_kernels")
        if not switch:
            if experts == "moe_kernels":
                raise ValueError(
                    "experts_implementation: moe_kernels needs moe_kernels: true. Set it, or remove "
                    "experts_implementation to train with transformers' own experts."
                )
            lonely = [key for key in KNOBS if data.get(key) is not None]
            if switch is None and lonely:
                raise ValueError(
                    f"{', '.join(lonely)} without moe_kernels does nothing: add moe_kernels: true (or false "
                    "to switch the kernels off on purpose)."
                )
            return data

        for key, cure in CONFLICTS.items():
            if data.get(key):
                raise ValueError(f"moe_kernels: true cannot be combined with {key}: {cure}.")
        read = data.get("load_in_4bit") and data.get("nf4_backend") in (None, "bitsandbytes")
        if data.get("quantize_moe_experts") and not read:
            raise ValueError(
                "moe_kernels: true with quantize_moe_experts needs load_in_4bit: true, and nf4_backend: bitsandbytes "
                "or none; expert weights of 8 bits and torchao's of 4 are not read."
            )
        if data.get("moe_recompute") and data.get("gradient_checkpointing"):
            raise ValueError(
                "moe_recompute: true does again what gradient_checkpointing already does: remove one of them."
            )
        # Or it has its keys in Axolotl's config class, whose validators then run with ours.
        if lists(data, "kernels") or "use_scattermoe" in cls.model_fields:
            raise ValueError(
                "moe_kernels: true cannot be combined with Axolotl's KernelsPlugin, which sets its own "
                "experts_implementation: remove it from plugins."
            )
        if experts not in (None, "moe_kernels"):
            raise ValueError(
                f"moe_kernels: true contradicts experts_implementation: {experts}. Set that to moe_kernels, "
                "or remove it."
            )
        if shards_experts(data) and not wraps_any_experts():
            raise ValueError(
                "moe_kernels: true cannot be combined with expert_parallel_size: this Axolotl picks the kernel from "
                "a fixed list of its own. Install axolotl 0.21, or set expert_parallel_size: 1 and shard with "
                "fsdp_version: 2."
            )
        return data
