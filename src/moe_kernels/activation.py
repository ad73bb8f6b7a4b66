"""The table of activations: value, partial derivatives and torch reference of each, side by side.

An expert with a gate turns Z into ``A = f(gate, up)``, mostly ``act(gate) * up``; one without into ``A = act(Z)``,
which is the same formula with ``up = 1``. This is the only place an activation is defined; kernels call
:func:`value` and :func:`value_and_partials` with the activation's name and parameters as compile-time constants.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl

# ------------------------------------------------------------------------------------------------- device code
# Triton's interpreter has no inline assembly.
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")
# At its bound a clamp has no derivative: torch takes 1 until 2.13 and 0 from 2.14 on, and so do we. In bfloat16 many
# values lie exactly there.
CLAMP_PASSES_AT_ITS_BOUND = torch.__version__ < "2.14"  # compared as versions
_PASSES_AT_BOUND = tl.constexpr(CLAMP_PASSES_AT_ITS_BOUND)


@triton.jit
def _sigmoid(z):
    """1 / (1 + exp(-z)) to two units in the last place: five instructions, a third of what the plain formula takes.

    It is most of the arithmetic in the epilogues. Results below 2^-126 are zero.
    """
    if _INTERPRETED:
        s = 1.0 / (1.0 + tl.exp(-z))
    else:
        s = tl.inline_asm_elementwise(
            """{
            .reg .f32 t;
            mul.ftz.f32 t, $1, 0fBFB8AA3B;
            ex2.approx.ftz.f32 t, t;
            add.ftz.f32 t, t, 0f3F800000;
            rcp.approx.ftz.f32 $0, t;
            }""",  # the first factor is -log2(e)
            "=f,f",
            [z],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    return s


@triton.jit
def _tanh(z):
    # Near zero the difference of 2 sigmoid(2z) - 1 loses its digits: there the Taylor series, exact to float32.
    s = z * z
    series = z * (1.0 - s * (0.3333333333333333 - s * (0.13333333333333333 - s * 0.05396825396825397)))
    return tl.where(tl.abs(z) < 0.1, series, 2.0 * _sigmoid(2.0 * z) - 1.0)


# Each way is written as it spills least in the epilogue of down_grad, with the tritons that come with its torches.
@triton.jit
def _clamp_above(z, high):
    """(z but for what exceeds high, whether the gradient passes): NaN stays NaN."""
    if _PASSES_AT_BOUND:
        passes = (z >= float("-inf")) & (z <= high)
    else:
        passes = z < high
    return tl.where(z > high, high, z), passes


@triton.jit
def _clamp_both(z, limit):
    """(z within -limit and limit, whether the gradient passes): NaN stays NaN."""
    if _PASSES_AT_BOUND:
        clamped = tl.where(z > limit, limit, tl.where(z < -limit, -limit, z))
        passes = (z >= -limit) & (z <= limit)
    else:
        clamped = tl.where(z < -limit, -limit, tl.where(z > limit, limit, z))
        passes = (-z < limit) & (z < limit)
    return clamped, passes


@triton.jit
def _gate_value_and_derivative(z, ACTIVATION: tl.constexpr):
    """(act(z), act'(z)), elementwise in float32, of the activations without parameters."""
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
    elif ACTIVATION == "quick_gelu":
        s = _sigmoid(1.702 * z)
        value = z * s
        derivative = s + 1.702 * value * (1.0 - s)
    elif ACTIVATION == "relu2":
        value = tl.where(z <= 0.0, 0.0, z * z)  # this way round NaN stays NaN
        derivative = tl.where(z <= 0.0, 0.0, 2.0 * z)
    elif ACTIVATION == "identity":
        value = z
        derivative = z * 0.0 + 1.0
    else:
        tl.static_assert(ACTIVATION == "relu", "activation without device code")
        value = tl.where(z <= 0.0, 0.0, z)
        derivative = tl.where(z <= 0.0, 0.0, 1.0)
    return value, derivative


@triton.jit
def value_and_partials(gate, up, ACTIVATION: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr):
    """(A, dA/dgate, dA/dup), elementwise in float32. P0 and P1 are the activation's parameters."""
    if ACTIVATION == "clamped_silu":
        g, passes_g = _clamp_above(gate, P0)
        u, passes_u = _clamp_both(up, P0)
        act, derivative = _gate_value_and_derivative(g, "silu")
        a = act * u
        d_gate = tl.where(passes_g, derivative * u, 0.0)
        d_up = tl.where(passes_u, act, 0.0)
    elif ACTIVATION == "clamped_glu":
        g, passes_g = _clamp_above(gate, P1)
        u, passes_u = _clamp_both(up, P1)
        s = _sigmoid(P0 * g)
        act = g * s
        a = act * (u + 1.0)
        d_gate = tl.where(passes_g, (s + P0 * act * (1.0 - s)) * (u + 1.0), 0.0)
        d_up = tl.where(passes_u, act, 0.0)
    elif ACTIVATION == "softcapped_silu":
        t_gate, t_up, s = _tanh(gate / P0), _tanh(up / P1), _sigmoid(gate)
        act, u = P0 * t_gate * s, P1 * t_up
        a = act * u
        d_gate = ((1.0 - t_gate * t_gate) * s + act * (1.0 - s)) * u
        d_up = act * (1.0 - t_up * t_up)
    else:
        act, derivative = _gate_value_and_derivative(gate, ACTIVATION)
        a = act * up
        d_gate = derivative * up
        d_up = act
    return a, d_gate, d_up


@triton.jit
def value(gate, up, ACTIVATION: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr):
    """A, elementwise in float32; the compiler drops the derivatives."""
    a, _, _ = value_and_partials(gate, up, ACTIVATION, P0, P1)
    return a


# ------------------------------------------------------------------------------------------------- plain torch
@dataclass(frozen=True)
class Rule:
    """One activation in plain torch; the device code of the same name is above.

    Attributes:
        value: ``(gate, up, *parameters) -> A``, elementwise and differentiable. ``up`` is 1.0 without a gate.
        partials: ``(gate, up, *parameters) -> (dA/dgate, dA/dup)``.
        parameters: names of the parameters.
    """

    value: Callable[..., torch.Tensor]
    partials: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    parameters: tuple[str, ...] = ()


def _rule(act: Callable[[torch.Tensor], torch.Tensor], derivative: Callable[[torch.Tensor], torch.Tensor]) -> Rule:
    return Rule(value=lambda z, up: act(z) * up, partials=lambda z, up: (derivative(z) * up, act(z)))


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


def _quick_gelu_derivative(z: torch.Tensor) -> torch.Tensor:
    s = torch.sigmoid(1.702 * z)
    return s + 1.702 * z * s * (1 - s)


def _passes(z: torch.Tensor, high: float) -> torch.Tensor:
    """The derivative of clamp(z, max=high)."""
    return (z <= high if CLAMP_PASSES_AT_ITS_BOUND else z < high).to(z.dtype)


def _clamped_glu(gate: torch.Tensor, up: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)


def _clamped_glu_partials(
    gate: torch.Tensor, up: torch.Tensor, alpha: float, limit: float
) -> tuple[torch.Tensor, torch.Tensor]:
    g, u = gate.clamp(max=limit), up.clamp(-limit, limit)
    s = torch.sigmoid(alpha * g)
    d_gate = (s + alpha * g * s * (1 - s)) * (u + 1) * _passes(gate, limit)
    return d_gate, g * s * _passes(up, limit) * _passes(-up, limit)


def _clamped_silu(gate: torch.Tensor, up: torch.Tensor, limit: float) -> torch.Tensor:
    return torch.nn.functional.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)


def _clamped_silu_partials(gate: torch.Tensor, up: torch.Tensor, limit: float) -> tuple[torch.Tensor, torch.Tensor]:
    g = gate.clamp(max=limit)
    d_gate = _silu_derivative(g) * up.clamp(-limit, limit) * _passes(gate, limit)
    return d_gate, torch.nn.functional.silu(g) * _passes(up, limit) * _passes(-up, limit)


def _softcapped_silu(gate: torch.Tensor, up: torch.Tensor, gate_cap: float, up_cap: float) -> torch.Tensor:
    return gate_cap * torch.tanh(gate / gate_cap) * torch.sigmoid(gate) * up_cap * torch.tanh(up / up_cap)


def _softcapped_silu_partials(
    gate: torch.Tensor, up: torch.Tensor, gate_cap: float, up_cap: float
) -> tuple[torch.Tensor, torch.Tensor]:
    t_gate, t_up, s = torch.tanh(gate / gate_cap), torch.tanh(up / up_cap), torch.sigmoid(gate)
    act = gate_cap * t_gate * s
    return ((1 - t_gate**2) * s + act * (1 - s)) * up_cap * t_up, act * (1 - t_up**2)


# Keys of activations without parameters are transformers' own names (ACT2FN).
ACTIVATIONS: dict[str, Rule] = {
    # SwiGLU (Shazeer 2020, arXiv 2002.05202): silu(z) = z * sigmoid(z).
    "silu": _rule(torch.nn.functional.silu, _silu_derivative),
    # GeGLU, same paper, with the exact normal distribution function, its tanh and its sigmoid approximation.
    "gelu": _rule(torch.nn.functional.gelu, _gelu_derivative),
    "gelu_pytorch_tanh": _rule(_gelu_tanh, _gelu_tanh_derivative),
    "quick_gelu": _rule(lambda z: z * torch.sigmoid(1.702 * z), _quick_gelu_derivative),
    # ReGLU, same paper, and its square (So et al. 2021, arXiv 2109.08668).
    "relu": _rule(torch.nn.functional.relu, lambda z: (z > 0).to(z.dtype)),
    "relu2": _rule(lambda z: torch.nn.functional.relu(z) ** 2, lambda z: 2 * torch.nn.functional.relu(z)),
    # gpt-oss: min(g, limit) sigmoid(alpha min(g, limit)) (clamp(u, -limit, limit) + 1).
    "clamped_glu": Rule(_clamped_glu, _clamped_glu_partials, ("alpha", "limit")),
    # DeepSeek-V4: silu(min(g, limit)) clamp(u, -limit, limit).
    "clamped_silu": Rule(_clamped_silu, _clamped_silu_partials, ("limit",)),
    # Inkling2: cap_g tanh(g / cap_g) sigmoid(g) cap_u tanh(u / cap_u).
    "softcapped_silu": Rule(_softcapped_silu, _softcapped_silu_partials, ("gate_cap", "up_cap")),
}
PLAIN = tuple(name for name, rule in ACTIVATIONS.items() if not rule.parameters)  # these need no gate


@dataclass(frozen=True)
class Activation:
    """A choice from :data:`ACTIVATIONS` with its parameters, such as ``Activation("clamped_silu", (7.0,))``."""

    name: str
    parameters: tuple[float, ...] = field(default=())

    def __post_init__(self) -> None:
        if self.name not in ACTIVATIONS:
            raise ValueError(
                f"activation={self.name!r} is not supported; valid: {', '.join(sorted(ACTIVATIONS))}. "
                "Train this model with experts_implementation='grouped_mm' instead."
            )
        wanted = ACTIVATIONS[self.name].parameters
        if len(self.parameters) != len(wanted):
            raise ValueError(
                f"activation {self.name!r} takes the parameters ({', '.join(wanted)}), got {self.parameters}: "
                f"pass Activation({self.name!r}, (...))."
            )
        if not all(isinstance(value, (int, float)) and value > 0 for value in self.parameters):
            raise ValueError(
                f"activation {self.name!r} takes positive numbers for ({', '.join(wanted)}), got {self.parameters}."
            )

    @classmethod
    def of(cls, activation: str | Activation) -> Activation:
        """The activation itself, or the one without parameters of that name."""
        return activation if isinstance(activation, cls) else cls(str(activation))


@dataclass(frozen=True)
class Gate:
    """How the rows of Z become rows of A: what the up projection and its backward need to know.

    Attributes:
        activation: name and parameters.
        gated: Z holds gate and up, (R, 2I); otherwise Z is (R, I) and ``A = act(Z)``.
        interleaved: columns of Z are ``[g0, u0, g1, u1, ...]`` instead of ``[gate; up]``.
    """

    activation: Activation
    gated: bool = True
    interleaved: bool = False

    def split(self, z: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """(gate, up) of Z in plain torch; up is 1.0 without a gate."""
        if not self.gated:
            return z, 1.0
        if self.interleaved:
            return z[..., ::2], z[..., 1::2]
        gate, up = z.chunk(2, dim=-1)
        return gate, up

    def value(self, z: torch.Tensor) -> torch.Tensor:
        """A (R, I) from Z in plain torch, differentiable."""
        return ACTIVATIONS[self.activation.name].value(*self.split(z), *self.activation.parameters)

    def partials(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(dA/dgate, dA/dup), each (R, I), in plain torch."""
        return ACTIVATIONS[self.activation.name].partials(*self.split(z), *self.activation.parameters)

    def join(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """The inverse of ``split`` for a pair of gradients; ``up`` is dropped without a gate."""
        if not self.gated:
            return gate
        return torch.stack([gate, up], dim=-1).flatten(-2) if self.interleaved else torch.cat([gate, up], dim=-1)

    def constants(self) -> dict[str, Any]:
        """The compile-time arguments of a kernel."""
        p0, p1 = (*self.activation.parameters, 0.0, 0.0)[:2]
        return {
            "ACTIVATION": self.activation.name,
            "P0": float(p0),
            "P1": float(p1),
            "GATED": self.gated,
            "INTERLEAVED": self.interleaved,
        }
