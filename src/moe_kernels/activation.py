"""The table of gate activations: value, derivative and torch reference of each, side by side.

An expert computes ``A = act(Z_gate) * Z_up``. This is the only place an activation is defined; kernels call
:func:`gate_value` and :func:`gate_value_and_derivative` with the activation's name as a compile-time constant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@triton.jit
def _sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def gate_value(z, ACTIVATION: tl.constexpr):
    """act(z), elementwise in float32."""
    tl.static_assert(ACTIVATION == "silu", "activation without device code")
    return z * _sigmoid(z)


@triton.jit
def gate_value_and_derivative(z, ACTIVATION: tl.constexpr):
    """(act(z), act'(z)), elementwise in float32."""
    tl.static_assert(ACTIVATION == "silu", "activation without device code")
    s = _sigmoid(z)
    value = z * s
    return value, s + value * (1.0 - s)


def _silu_derivative(z: torch.Tensor) -> torch.Tensor:
    s = torch.sigmoid(z)
    return s + z * s * (1.0 - s)


@dataclass(frozen=True)
class Activation:
    """One gate activation in plain torch; the device code of the same name is above.

    Attributes:
        value: act(z), elementwise.
        derivative: act'(z), elementwise.
    """

    value: Callable[[torch.Tensor], torch.Tensor]
    derivative: Callable[[torch.Tensor], torch.Tensor]


ACTIVATIONS: dict[str, Activation] = {
    # SwiGLU (Shazeer 2020, arXiv 2002.05202): silu(z) = z * sigmoid(z).
    "silu": Activation(value=torch.nn.functional.silu, derivative=_silu_derivative),
}
