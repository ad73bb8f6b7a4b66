"""What an experts module of transformers computes, in the terms of ``fused_experts``, or why it is refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from moe_kernels.activation import ACTIVATIONS, PLAIN, Activation, Gate
from moe_kernels.integrations.probe import probe_context, probe_device
from moe_kernels.layer import Matrix

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# Attributes that transformers' decorator sets (5.16.1 not yet the last), and their default.
_LAYOUT = {
    "has_gate": True,
    "is_concatenated": True,
    "is_transposed": False,
    "has_bias": False,
    "has_post_expert_norm": False,
}
# Attributes of the decorated classes that their _apply_gate reads.
_LIMITS = ("limit", "swiglu_limit", "alpha", "swiglu_alpha")
# Where integrations.peft leaves the low-rank pairs of a module during its forward, by name of the weight.
LORA_ATTRIBUTE = "_moe_kernels_lora"


class UnsupportedExperts(ValueError):
    """These kernels cannot run an experts module; the message names the module, the reason and the cure."""

    @classmethod
    def of(cls, module: Any, reason: str, name: str = "") -> UnsupportedExperts:
        """Where transformers' own implementations are the cure."""
        cure = "Train it with experts_implementation: grouped_mm and without moe_kernels."
        return cls.mended(module, f"{reason} {cure}", name)

    @classmethod
    def mended(cls, module: Any, reason_and_cure: str, name: str = "") -> UnsupportedExperts:
        """Where the cure is a change to the module itself."""
        where = f"{name} ({type(module).__name__})" if name else type(module).__name__
        return cls(f"{where}: {reason_and_cure}")


@dataclass(frozen=True)
class Recipe:
    """How to call ``fused_experts`` for one module.

    Attributes:
        gate: activation with its parameters, whether there is a gate, whether gate and up are interleaved.
        transposed: weights are stored (E, H, 2I) and (E, I, H).
        biased: there are gate_up_proj_bias and down_proj_bias.
        post_norm: each expert's output is normalised before it is weighted.
        source: what the module looked like when this was found out; see :func:`source`.
    """

    gate: Gate
    transposed: bool
    biased: bool
    post_norm: bool
    source: tuple[Any, ...]

    @property
    def up_name(self) -> str:
        """The weight of the up projection; that of the down projection is always ``down_proj``."""
        return "gate_up_proj" if self.gate.gated else "up_proj"


def recipe_of(module: Any, name: str = "") -> Recipe:
    """The recipe of ``module``, called ``name`` in errors: found by a numeric probe, again only after a change.

    Raises:
        UnsupportedExperts: no activation of these kernels reproduces what the module computes.
    """
    known = getattr(module, "_moe_kernels_recipe", None)
    now = source(module)
    if known is not None and known.source == now:
        return known
    if torch.compiler.is_compiling():
        raise UnsupportedExperts(
            f"{type(module).__name__} was not looked at yet: call check_model(model) before torch.compile or "
            "torch.export."
        )
    gated, concatenated, transposed, biased, post_norm = now[: len(_LAYOUT)]
    theirs = module._apply_gate if gated else module.act_fn
    device, found, trained = probe_device(module), [], False
    for training in (module.training, not module.training):
        with probe_context(device), _in_mode(module, training):
            found.append(_find_activation(theirs, gated, not concatenated, _numbers(module), device))
            trained |= theirs(torch.ones(1, 2, dtype=torch.float32, device=device)).requires_grad
    activation, other = found
    shown = type(module.act_fn).__name__ if hasattr(module, "act_fn") else "_apply_gate"
    if trained:  # it may compute one of ours now, and something else after a step
        reason = f"its activation {shown} has trained parameters, which would get no gradient."
        raise UnsupportedExperts.of(module, reason, name)
    if activation != other:
        reason = f"its activation {shown} computes something else in training than in evaluation."
        raise UnsupportedExperts.of(module, reason, name)
    if activation is None:
        have = ACTIVATIONS if gated else PLAIN
        reason = f"its activation {shown} computes none of {', '.join(sorted(have))}."
        raise UnsupportedExperts.of(module, reason, name)
    gate = Gate(activation, gated=gated, interleaved=gated and not concatenated)
    module._moe_kernels_recipe = Recipe(gate, transposed, biased, post_norm, now)
    return module._moe_kernels_recipe


@contextmanager
def _in_mode(module: Any, training: bool) -> Iterator[None]:
    """Inside, ``module`` and its activation are in training or in evaluation mode. Not a copy of it: a method that
    was put on the instance would run that instance."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        for part, _ in modes:
            part.training = training
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def source(module: Any) -> tuple[Any, ...]:
    """What decides the recipe; cheap enough to compare at every call, and torch.compile traces it."""
    return (
        *(getattr(module, name, default) for name, default in _LAYOUT.items()),
        *(getattr(module, name, None) for name in _LIMITS),
        getattr(module, "act_fn", None),
        type(module)._apply_gate,
    )


def why_not_module(module: Any) -> str | None:
    """None if these kernels compute what ``module``, an experts module, computes; else reason and cure."""
    try:
        recipe_of(module)
    except UnsupportedExperts as error:
        return str(error)
    return None


def _find_activation(
    theirs: Callable[[torch.Tensor], torch.Tensor],
    gated: bool,
    interleaved: bool,
    numbers: list[float],
    device: torch.device,
) -> Activation | None:
    """The first activation, with parameters from ``numbers``, of equal value and gradient on the probe."""
    points = _probe_points(numbers, device)
    shape = Gate(Activation("silu"), gated, interleaved)
    gate, up = torch.cartesian_prod(points, points + 0.0078).unbind(-1) if gated else (points, points)
    z = shape.join(gate, up)[None]
    expected = _value_and_gradient(theirs, z)
    # Rounding of float32 where a value or slope vanishes, relative to what is multiplied.
    slack = 1e-6 * (1 + gate.abs()) * (1 + up.abs())
    slacks = (slack, shape.join(slack, slack))
    for name, rule in ACTIVATIONS.items():
        if not gated and rule.parameters:
            continue
        for parameters in itertools.product(numbers, repeat=len(rule.parameters)):
            candidate = Activation(name, parameters)
            ours = _value_and_gradient(Gate(candidate, gated, interleaved).value, z)
            pairs = zip(ours, expected, slacks, strict=True)
            if all(((a - b).abs() <= 1e-4 * b.abs() + c).all() for a, b, c in pairs):
                return candidate
    return None


def _value_and_gradient(
    function: Callable[[torch.Tensor], torch.Tensor], z: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    z = z.clone().requires_grad_()
    value = function(z.clone())  # global hooks of modules, such as FlopCounterMode's, take no leaf
    return value.detach(), torch.autograd.grad(value.sum(), z)[0]


def _probe_points(numbers: list[float], device: torch.device) -> torch.Tensor:
    """Both sides of zero and of every number the module holds, and far past any clamp, in float32."""
    near = [n / 4 + 0.0123 for n in range(-32, 33)]
    far = [12.0, 23.0, 60.0, 150.0, 700.0]
    limits = [n * by for n in numbers if 0 < n < 1e3 for by in (0.45, 0.95, 1.05, 2.1)]
    points = [*near, *far, *(-n for n in far), *limits, *(-n for n in limits)]
    return torch.tensor(points, dtype=torch.float32, device=device)


def _numbers(module: Any) -> list[float]:
    """Every positive number among the attributes of ``module`` and its sub-modules (act_fn), each once."""
    values = [value for part in module.modules() for value in vars(part).values()]
    numbers = (v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool) and v > 0)
    return list(dict.fromkeys(map(float, numbers)))


def plain_weight(module: Any, weight: Any) -> torch.Tensor:
    """``weight`` of ``module`` as the plain tensor of all its experts that the op takes.

    Raises:
        UnsupportedExperts: sharded, quantised, or of another number of experts than the module routes to.
    """
    if is_sharded(weight):
        raise UnsupportedExperts.of(module, f"its weights are sharded in forward ({weight.placements}).")
    weight = local_tensor(module, weight)
    check_weight(module, weight)
    return weight


def check_weight(module: Any, weight: torch.Tensor, name: str = "") -> None:
    """Raise UnsupportedExperts of a weight, or of a tensor on meta like it, that ``module`` cannot run on."""
    if weight.dtype not in _DTYPES:
        raise UnsupportedExperts.of(module, f"its weights are stored as {weight.dtype}.", name)
    said, held = module.num_experts, weight.shape[0]
    if held != said:
        raise UnsupportedExperts.mended(
            module, f"it says num_experts={said} but holds weights of {held} experts: make both agree.", name
        )


def check_pair(module: Any, gate_up: Matrix, down: Matrix, gated: bool, name: str = "") -> None:
    """Raise UnsupportedExperts where the two weights of ``module``, (E, 2I or I, H) and (E, H, I), do not fit.

    The op takes half the rows for experts without a gate, which nothing but the module can tell from a mistake.
    """
    given, wanted = gate_up.shape[-2], (2 if gated else 1) * down.shape[-1]
    if given != wanted:
        raise UnsupportedExperts.mended(
            module,
            f"its up projection gives {given} values, its down projection takes {wanted}: make both agree.",
            name,
        )


def is_sharded(tensor: Any) -> bool:
    """Whether this process has a part of ``tensor`` only; plain FSDP2 hands whole parameters to forward."""
    return not all(placement.is_replicate() for placement in getattr(tensor, "placements", ()))


def local_tensor(module: Any, tensor: Any, name: str = "") -> torch.Tensor:
    """The plain tensor that this process holds of ``tensor``, a parameter of ``module``.

    Raises:
        UnsupportedExperts: a tensor subclass wraps the memory (torchao's quantised weights claim to be bfloat16).
    """
    tensor = tensor.to_local() if hasattr(tensor, "placements") else tensor
    if is_traceable_wrapper_subclass(tensor):
        raise UnsupportedExperts.mended(
            module,
            f"its weights are stored as {type(tensor).__name__}, which is not read here: leave the experts out of "
            "the quantisation, or train with experts_implementation: grouped_mm and without moe_kernels.",
            name,
        )
    return tensor
