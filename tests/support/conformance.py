"""Every experts class of the installed transformers, built tiny and judged against its own eager forward.

Nothing here names a model: the classes are those that carry transformers' ``use_experts_implementation``, their
configs are the models' own, made small. What a class computes is what its eager forward computes in float64.
"""

from __future__ import annotations

import ast
import copy
import functools
import importlib
import inspect
import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig

from moe_kernels.activation import ACTIVATIONS
from moe_kernels.integrations.dispatch import dispatches
from moe_kernels.integrations.support import recipe_of
from moe_kernels.tools.check.routings import make_routing
from moe_kernels.tools.check.tolerances import Errors, assert_close_to_truth

#: Every expert busy; one that all tokens use; three without a token.
ROUTINGS = ("random", "one_hot_expert", "empty_first_middle_last")
#: (weights and tokens, routing weights): routers give either.
DTYPES = ((torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16))
#: What a block may call its arguments when it calls them by name.
ARGUMENTS = ("hidden_states", "top_k_index", "top_k_weights")

# What the names of config attributes mean, and their tiny value.
_EXPERTS, _HIDDEN, _INTERMEDIATE = 5, 32, 24
_TINY = {
    r"experts$": _EXPERTS,
    r"hidden_size$": _HIDDEN,
    r"intermediate_size$": _INTERMEDIATE,
}


@dataclass(frozen=True)
class ExpertsClass:
    """One decorated class: ``transformers.models.<model>`` and the class."""

    model: str
    cls: type[nn.Module]

    def __str__(self) -> str:
        return self.cls.__name__


def experts_classes() -> list[ExpertsClass]:
    """All of the installed transformers, by model and name.

    Raises:
        RuntimeError: a modeling file uses the decorator more often than classes were found in it.
    """
    found = []
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        decorated = len(re.findall(r"^@use_experts_implementation\b", path.read_text(), re.MULTILINE))
        if not decorated:
            continue
        module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
        classes = [cls for cls in vars(module).values() if _defined_in(module, cls) and dispatches(cls)]
        if len(classes) != decorated:
            raise RuntimeError(f"{path} decorates {decorated} classes, found are {classes}")
        found += [ExpertsClass(path.parent.name, cls) for cls in classes]
    return found


def _defined_in(module: ModuleType, thing: Any) -> bool:
    return isinstance(thing, type) and thing.__module__ == module.__name__


def words(experts: nn.Module) -> str:
    """Weights and activation of experts: ``gate_up, transposed | clamped_glu(alpha, limit)``.

    Raises:
        UnsupportedExperts: they are refused.
    """
    recipe = recipe_of(experts)
    gate, activation = recipe.gate, recipe.gate.activation.name
    weights = [
        "up" if not gate.gated else "interleaved gate_up" if gate.interleaved else "gate_up",
        *(word for word in ("transposed", "biased") if getattr(recipe, word)),
        *(["post-expert norm"] if recipe.post_norm else []),
    ]
    parameters = ", ".join(ACTIVATIONS[activation].parameters)
    return f"{', '.join(weights)} | {activation}" + (f"({parameters})" if parameters else "")


def distinct() -> dict[str, ExpertsClass]:
    """One class of each layout and activation, by its words."""
    return {words(build(found.cls)): found for found in reversed(experts_classes())}


def foreign_arguments(cls: type[nn.Module]) -> list[str]:
    """Calls of ``self.experts(...)`` in the modeling file of ``cls`` that our function would not understand.

    Raises:
        RuntimeError: the file calls no experts at all, so nothing was looked at.
    """
    tree = ast.parse(inspect.getsource(inspect.getmodule(cls)))  # type: ignore[arg-type]
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "experts"
    ]
    if not calls:
        raise RuntimeError(f"no block of {cls.__module__} calls self.experts(...)")
    return [
        ast.unparse(call)
        for call in calls
        if {*ARGUMENTS[: len(call.args)], *(keyword.arg for keyword in call.keywords)} != {*ARGUMENTS}
    ]


def build(cls: type[nn.Module]) -> nn.Module:
    """``cls`` with 5 experts of hidden size 32 and intermediate size 24, float32, random weights, on the CPU.

    Raises:
        RuntimeError: no config class of the model has what the experts class reads.
    """
    problems = []
    for config_class in _config_classes(cls):
        try:
            tiny = _Tiny(config_class())
            with torch.device("meta"):
                cls(tiny, **_sizes(cls))
        except (AttributeError, TypeError) as error:
            problems.append(f"{config_class.__name__}: {error}")
            continue
        config = tiny.config
        for name, value in tiny.read.items():
            setattr(config, name, value)
        config._experts_implementation = "eager"
        experts = cls(config, **_sizes(cls))
        _fill(experts)
        _tighten(experts)
        return experts
    raise RuntimeError(f"no config builds {cls.__name__}: {'; '.join(problems)}")


class _Tiny:
    """A config that gives tiny sizes, and remembers which of its attributes were read for them."""

    def __init__(self, config: PreTrainedConfig) -> None:
        self.config, self.read = config, dict[str, Any]()

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.config, name)
        tiny = next((tiny for pattern, tiny in _TINY.items() if re.search(pattern, name)), None)
        if tiny is None:
            return value
        self.read[name] = tiny
        return tiny


def _config_classes(cls: type[nn.Module]) -> list[type[PreTrainedConfig]]:
    """Those of the model, the most alike in name first."""
    modeling = importlib.import_module(cls.__module__)
    configuration = importlib.import_module(cls.__module__.replace(".modeling_", ".configuration_"))
    classes = {
        thing
        for module in (modeling, configuration)
        for thing in vars(module).values()
        if isinstance(thing, type) and issubclass(thing, PreTrainedConfig) and thing is not PreTrainedConfig
    }

    def unlike(config_class: type) -> tuple[int, int, str]:
        name = config_class.__name__
        common = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(name, cls.__name__, strict=False))
        return -len(list(common)), len(name), name

    return sorted(classes, key=unlike)


def _sizes(cls: type[nn.Module]) -> dict[str, int]:
    """Sizes that the class takes beside the config."""
    names = list(inspect.signature(cls.__init__).parameters)
    return {name: _INTERMEDIATE for name in names if name == "intermediate_size"}


def _fill(experts: nn.Module) -> None:
    """Unit variance in and out of each projection; biases and norm weights too, so that none can hide."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in experts.parameters():
            scale = (parameter.shape[-1] * parameter.shape[-2]) ** -0.25 if parameter.dim() == 3 else 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def _tighten(experts: nn.Module) -> None:
    """Clamps and caps so low that many values pass them, each another, wherever their values come from.

    A clamp's gradient jumps at its bound: 1.375, because there bfloat16 rounds none of these values across it.
    """
    for number, part in enumerate(experts.modules()):
        for name in vars(part):
            if re.search(r"(limit|softcap)$", name):
                setattr(part, name, 1.375 + 0.25 * number)


@dataclass(frozen=True)
class Inputs:
    """Tokens (T, hidden), routing (T, K) and the gradient of the loss with respect to the output (T, hidden)."""

    hidden_states: Tensor
    top_k_index: Tensor
    top_k_weights: Tensor
    grad: Tensor


def make_inputs(routing: str, dtype: torch.dtype, weights_dtype: torch.dtype, device: torch.device) -> Inputs:
    """17 tokens of 2 experts each."""
    generator = torch.Generator().manual_seed(1)
    hidden_states, grad = (torch.randn(17, _HIDDEN, generator=generator).to(dtype) for _ in range(2))
    index, weights = make_routing(routing, 17, 2, _EXPERTS, seed=2)
    return Inputs(hidden_states.to(device), index.to(device), weights.to(device, weights_dtype), grad.to(device))


def run(experts: Any, inputs: Inputs, implementation: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Output and every gradient of a copy of ``experts`` under ``implementation``, in another dtype if given."""
    experts = copy.deepcopy(experts)
    experts.config._experts_implementation = implementation
    if dtype:
        experts = experts.to(dtype)
    x, weights = (
        tensor.detach().to(dtype or tensor.dtype, copy=True).requires_grad_()
        for tensor in (inputs.hidden_states, inputs.top_k_weights)
    )
    out = experts(x, inputs.top_k_index, weights)
    out.backward(inputs.grad.to(out.dtype))
    gradients = {f"d{name}": parameter.grad for name, parameter in experts.named_parameters()}
    return {"out": out.detach(), "dhidden_states": x.grad, "dtop_k_weights": weights.grad} | gradients


def check(
    experts: nn.Module,
    routing: str,
    dtype: torch.dtype,
    weights_dtype: torch.dtype,
    device: str | torch.device = "cpu",
    implementation: str = "moe_kernels",
) -> dict[str, Errors]:
    """Judge ``implementation`` against the module's eager forward in float64, by the error of transformers' own.

    Transformers' own is the eager loop or its batched_mm, whichever errs more: one eager loop computes in float32
    whatever the dtype, which no grouped GEMM does.

    Raises:
        AssertionError: naming the class, the tensor and the limit it broke.
    """
    experts = copy.deepcopy(experts).to(device, dtype)
    inputs = make_inputs(routing, dtype, weights_dtype, torch.device(device))
    truth = run(experts, inputs, "eager", torch.float64)
    actual, eager, batched = (run(experts, inputs, name) for name in (implementation, "eager", "batched_mm"))
    measured = {}
    for name, value in actual.items():
        label = f"{type(experts).__name__} {routing} {name}"
        assert truth[name].count_nonzero(), f"{label}: the truth is zero everywhere, nothing would be compared"
        own = max((eager[name], batched[name]), key=functools.partial(_distance, truth[name]))
        measured[name] = assert_close_to_truth(value, truth[name], own, label, compute_dtype=dtype)
    return measured


def _distance(truth: Tensor, other: Tensor) -> float:
    return (other.double() - truth.double()).norm().item()


def check_all(experts: nn.Module, device: str | torch.device = "cpu", implementation: str = "moe_kernels") -> None:
    """:func:`check` with every routing and dtype."""
    for routing in ROUTINGS:
        for dtype, weights_dtype in DTYPES:
            check(experts, routing, dtype, weights_dtype, device, implementation)
