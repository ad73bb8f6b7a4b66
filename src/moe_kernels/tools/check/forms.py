"""The forms in which people train an expert layer, by name."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from moe_kernels.tools.check.problems import Case


@dataclass(frozen=True)
class Form:
    """How a layer is trained.

    Attributes:
        frozen: the base gets no gradient.
        rank: of the LoRA factors of both weights; 0 without.
        packed: the base is kept in "4 bits", with nested scales, in block "fp8" or in "mxfp4"; empty: in 16 bits.
            "fp8 activations" is block fp8 that is multiplied in fp8, which GPUs of compute capability 8.9 do.
        gpt_oss: weights stored by columns, gate and up interleaved, clamped activation.
    """

    frozen: bool = False
    rank: int = 0
    packed: str = ""
    biases: bool = False
    gpt_oss: bool = False
    gated: bool = True
    activation: str = "silu"

    def of(self, case: Case) -> Case:
        """A problem of the sizes and the data of ``case`` in this form."""
        from moe_kernels.activation import Activation

        return replace(
            case,
            activation=Activation("clamped_glu", (1.702, 7.0)) if self.gpt_oss else self.activation,
            gated=self.gated,
            interleaved=self.gpt_oss,
            transposed=self.gpt_oss,
            bias=self.biases,
            lora_rank=self.rank,
            frozen=self.frozen,
            packed=self.packed,
        )


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


PLAIN = "plain"
FORMS = {
    PLAIN: Form(),
    "frozen": Form(frozen=True),
    "lora-16": Form(frozen=True, rank=16),
    "lora-64": Form(frozen=True, rank=64),
    "qlora-16": Form(frozen=True, rank=16, packed="4 bits"),
    "fp8-lora-16": Form(frozen=True, rank=16, packed="fp8"),
    "fp8-activations-lora-16": Form(frozen=True, rank=16, packed="fp8 activations"),
    "biases": Form(biases=True),
    "gpt-oss": Form(biases=True, gpt_oss=True),
    "gpt-oss-lora-16": Form(frozen=True, rank=16, biases=True, gpt_oss=True),
    "mxfp4-lora-16": Form(frozen=True, rank=16, packed="mxfp4", biases=True, gpt_oss=True),
    "no-gate": Form(gated=False, activation="relu2"),
}
