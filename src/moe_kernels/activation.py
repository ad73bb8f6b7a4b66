"""The table of gate activations: value, derivative and torch reference of each, side by side.

An expert computes ``A = act(Z_gate) * Z_up``. This is the only place an activation is defined; kernels call
:func:`gate_value` and :func:`gate_value_and_derivative` with the activation's name as a compile-time constant.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@triton.jit
def _sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def gate_value_and_derivative(z, ACTIVATION: tl.constexpr):
    """(act(z), act'(z)), elementwise in float32."""
    if ACTIVATION == "silu":
        s = _sigmoid(z)
        value = z * s
        derivative = s + value * (1.0 - s)
    elif ACTIVATION == "gelu":
        normal_cdf = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        value = z * normal_cdf
        derivative = normal_cdf + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    elif ACTIVATION == "gelu_pytorch_tanh":
        # 0.5 (1 + tanh(u)) is sigmoid(2u), with u = sqrt(2 / pi) (z + 0.044715 z^3)
        s = _sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        value = z * s
        derivative = s + value * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * z * z)
    else:
        tl.static_assert(ACTIVATION == "relu", "activation without device code")
        value = tl.where(z <= 0.0, 0.0, z)  # this way round NaN stays NaN
        derivative = tl.where(z <= 0.0, 0.0, 1.0)
    return value, derivative


@triton.jit
def gate_value(z, ACTIVATION: tl.constexpr):
    """act(z), elementwise in float32; the compiler drops the derivative."""
    value, _ = gate_value_and_derivative(z, ACTIVATION)
    return value


def _silu_derivative(z: torch.Tensor) -> torch.Tensor:
    s = torch.sigmoid(z)
    return s + z * s * (1.0 - s)


def _gelu_derivative(z: torch.Tensor) -> torch.Tensor:
    return torch.special.ndtr(z) + z * torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)


def _gelu_tanh(z: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(z, approximate="tanh")


def _gelu_tanh_derivative(z: torch.Tensor) -> torch.Tensor:
    slope = math.sqrt(2 / math.pi)
    t = torch.tanh(slope * (z + 0.044715 * z**3))
    return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * slope * (1 + 3 * 0.044715 * z * z)


def _relu_derivative(z: torch.Tensor) -> torch.Tensor:
    return (z > 0).to(z.dtype)


@dataclass(frozen=True)
class Activation:
    """One gate activation in plain torch; the device code of the same name is above.

    Attributes:
        value: act(z), elementwise.
        derivative: act'(z), elementwise.
    """

    value: Callable[[torch.Tensor], torch.Tensor]
    derivative: Callable[[torch.Tensor], torch.Tensor]


# Keys are transformers' own names (ACT2FN).
ACTIVATIONS: dict[str, Activation] = {
    # SwiGLU (Shazeer 2020, arXiv 2002.05202): silu(z) = z * sigmoid(z).
    "silu": Activation(value=torch.nn.functional.silu, derivative=_silu_derivative),
    # GeGLU, same paper, with the exact normal distribution function and with its tanh approximation.
    "gelu": Activation(value=torch.nn.functional.gelu, derivative=_gelu_derivative),
    "gelu_pytorch_tanh": Activation(value=_gelu_tanh, derivative=_gelu_tanh_derivative),
    # ReGLU, same paper.
    "relu": Activation(value=torch.nn.functional.relu, derivative=_relu_derivative),
}
