"""The forms in which people train an expert layer, by name."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from moe_kernels.tools.check.problems import Case

PLAIN = "plain"
_LORA = {"frozen": True, "lora_rank": 16}
_GPT_OSS = {"bias": True, "interleaved": True, "transposed": True, "activation": "clamped_glu"}
#: What each form changes in a plain layer, as fields of :class:`moe_kernels.tools.check.problems.Case`.
FORMS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "frozen": {"frozen": True},
    "lora-16": _LORA,
    "lora-64": {"frozen": True, "lora_rank": 64},
    "qlora-16": {**_LORA, "packed": "4 bits"},
    "fp8-frozen": {"frozen": True, "packed": "fp8"},
    "fp8-lora-16": {**_LORA, "packed": "fp8"},
    "fp8-activations-lora-16": {**_LORA, "packed": "fp8 activations"},
    "biases": {"bias": True},
    "gpt-oss": _GPT_OSS,
    "gpt-oss-lora-16": {**_LORA, **_GPT_OSS},
    "mxfp4-lora-16": {**_LORA, **_GPT_OSS, "packed": "mxfp4"},
    "no-gate": {"gated": False, "activation": "relu2"},
}


def in_form(case: Case, form: str) -> Case:
    """A problem of the sizes and the data of ``case``, which is a plain one, in a form of :data:`FORMS`."""
    from moe_kernels.activation import Activation

    changes = dict(FORMS[form])
    if changes.get("activation") == "clamped_glu":
        changes["activation"] = Activation("clamped_glu", (1.702, 7.0))  # gpt-oss's own parameters
    return replace(case, **changes)


def called(case: Case) -> str:
    """The form of a problem in the words of :data:`FORMS`, with its own rank, without what the model decides."""
    if not case.frozen:
        return PLAIN
    ranks = case.ranks
    each = [f"{rank}-{name}" for name, rank in ranks.items()]
    alike = len(ranks) == 2 and len({*ranks.values()}) == 1
    adapter = "-".join(["lora", str(case.lora_rank)] if alike else ["lora", *each] if ranks else ["frozen"])
    return f"q{adapter}" if ranks and case.packed == "4 bits" else "-".join([*case.packed.split(), adapter])


def why_not(packed: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why layers whose weights are so ``packed`` cannot be checked here, with the cure; None if they can."""
    if packed != "fp8 activations":
        return None
    import torch

    from moe_kernels import fp8
    from moe_kernels.tools.check.packing import in_fp8

    if dtype == torch.float32:
        return (
            "in float32 a single element that is rounded to the other one of two numbers of e4m3 outweighs every "
            "other error, and nothing is left to judge by: use --dtype bf16 or fp16."
        )
    return fp8.why_not(in_fp8(torch.ones(1, 1, 1)), False, False, device)
