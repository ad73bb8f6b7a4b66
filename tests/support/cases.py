"""One kernel to compile ahead of time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moe_kernels.activation import ACTIVATIONS, Activation

# Parameters are compile-time constants; any value stands for all.
EVERY_ACTIVATION = tuple(Activation(name, (1.7, 7.0)[: len(rule.parameters)]) for name, rule in ACTIVATIONS.items())


@dataclass(frozen=True)
class CompileCase:
    """One kernel to compile.

    Attributes:
        name: unique and readable, such as "up-g128-bf16-tma".
        fn: the ``triton.jit`` function.
        types: Triton type of every run-time argument.
        constants: value of every compile-time argument.
        options: num_warps and num_stages.
        uses_dot: the kernel must contain matrix instructions.
        fp8: the matrix instructions must be those of 8-bit operands, beside those of 16 bits.
        uses_tma: the kernel must contain TMA loads.
        divisible: integer arguments are multiples of 16, as the launcher tells the compiler.
        spills: accepted number of LDL and STL instructions. The epilogue has no register to spare for clamps, biases
            and low-rank parts; it runs once per tile, outside the mainloop. Plain experts must not spill.
    """

    name: str
    fn: Any
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int]
    uses_dot: bool = True
    fp8: bool = False
    uses_tma: bool = False
    divisible: bool = True
    spills: int = 0
