"""The fused router in the models of transformers: ``install_fused_router(model)``.

A router module of transformers holds the weight of a linear and returns ``(logits, topk_weights, topk_ids)``. Its
``forward`` is replaced on the instance, so parameters, buffers, checkpoints and the hooks that record the logits for
the auxiliary loss stay as they are. A module is recognised by what it computes, not by its name: its own code and the
fused one run on the same random data, and logits, weights, choices and gradients must agree.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from moe_kernels.integrations.probe import probe_context, probe_device
from moe_kernels.router import Scoring, route

#: (logits, topk_weights, topk_ids), as the router modules of transformers return them.
Routing = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
_TOKENS = 256  # of a probe
# dtype of the probe's tensors, whether it runs under autocast to bfloat16 as the Trainer does, and the mean of the
# correction bias: far below zero it tells a router that excludes groups from one that sets their scores to zero.
_CONDITIONS = (
    (torch.float32, False, 0.0),
    (torch.float32, False, -2.0),
    (torch.bfloat16, False, 0.0),
    (torch.float32, True, 0.0),
)
# Largest relative difference, by the coarsest rounding on the way: the model's own arithmetic is that far off, too.
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
_CURE = "Set moe_fused_router: false to train with the model's own router."


class UnsupportedRouter(ValueError):
    """The fused router does not compute what a router module computes; names the module, the reason and the cure."""


@dataclass(frozen=True)
class RouterForm:
    """What a router module does between the hidden states and its results, apart from sizes.

    Attributes:
        scoring, normalize: see :func:`moe_kernels.router.route`.
        float32_linear: the linear runs on float32 copies.
        float32_weights: the weights are float32 whatever the logits are.
    """

    scoring: Scoring
    normalize: bool
    float32_linear: bool
    float32_weights: bool

    def forward(self, module: Any, hidden_states: torch.Tensor) -> Routing:
        """(logits, topk_weights, topk_ids) of ``module``, whose attributes are read at every call."""
        weight, bias = module.weight, getattr(module, "bias", None)
        x = hidden_states.reshape(-1, weight.shape[-1])
        if self.float32_linear:
            x, weight = x.float(), weight.float()
        logits = functional.linear(x, weight, bias)
        sigmoid = self.scoring == "sigmoid"
        topk_weights, topk_ids = route(
            logits,
            module.top_k,
            scoring=self.scoring,
            normalize=self.normalize,
            correction_bias=getattr(module, "e_score_correction_bias", None),
            groups=(sigmoid and getattr(module, "num_group", None)) or 1,
            top_groups=(sigmoid and getattr(module, "topk_group", None)) or 1,
            scale=getattr(module, "routed_scaling_factor", 1.0),
            weights_dtype=torch.float32 if self.float32_weights else None,
        )
        return logits, topk_weights, topk_ids


def install_fused_router(model: torch.nn.Module) -> int:
    """Replace the forward of every router of ``model`` by the fused one, and return the number of layers.

    Copies, pickled, spawned or replicated, are fused as well. Where PEFT trains a copy of a router, both are.

    Raises:
        UnsupportedRouter: a router, or every one, would not compute the same; nothing is replaced then.
    """
    routers = router_modules(model)
    if not routers:
        raise UnsupportedRouter(
            f"{type(model).__name__} has no router module with a top_k and a weight of its own. {_CURE}"
        )
    known: dict[Any, RouterForm | str] = {}
    forms = []
    for name, module in routers:
        kind = _kind(module)
        if kind not in known:
            known[kind] = recognise(module)
        form = known[kind]
        if isinstance(form, str):
            raise UnsupportedRouter(f"{name} ({type(module).__name__}): {form} {_CURE}")
        forms.append(form)
    for (_, module), form in zip(routers, forms, strict=True):
        if _installed(module) is None:  # what wrapped a fused forward since then stays
            module.forward = functools.partial(RouterForm.forward, form, module)
            module._replicate_for_data_parallel = functools.partial(_replica, form, module)
    alike = [module for _, module in _look_alikes(model)]
    inside = {id(part) for module in alike for part in module.modules() if part is not module}
    return sum(id(module) not in inside for module in alike)


def _replica(form: RouterForm, module: Any) -> Any:
    """A replica of nn.DataParallel, which would run the forward of ``module`` itself, with its weights."""
    replica = type(module)._replicate_for_data_parallel(module)
    replica.forward = functools.partial(RouterForm.forward, form, replica)
    return replica


def router_modules(model: torch.nn.Module) -> list[tuple[str, Any]]:
    """``(name, module)`` of every router module: it has a ``top_k`` and a ``weight``, and nothing inside it has.

    A wrapper that passes on the attributes of what it wraps looks like a router and is none: PEFT's
    ``modules_to_save`` holds two, the one that it trains and the one that runs with the adapter switched off.
    """
    return [(name, module) for name, module in _look_alikes(model) if len(_look_alikes(module)) == 1]


def _look_alikes(model: torch.nn.Module) -> list[tuple[str, Any]]:
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "top_k", None), int)
        and isinstance(getattr(module, "weight", None), torch.Tensor)
    ]


def _installed(module: Any) -> RouterForm | None:
    """The form that a module's forward was replaced by; hooks of accelerate may have wrapped it since then."""
    forward = inspect.unwrap(vars(module).get("forward"))
    fused = isinstance(forward, functools.partial) and forward.func is RouterForm.forward
    return forward.args[0] if fused else None


def recognise(module: Any) -> RouterForm | str:
    """The form of a router module, or why it has none."""
    installed = _installed(module)
    if installed is not None:
        return installed
    if "forward" in vars(module):
        return "its forward was already replaced by something else."
    if module.weight.dim() != 2:
        return f"its weight has shape {tuple(module.weight.shape)}: it is sharded, or no linear over experts."
    arguments = list(inspect.signature(type(module).forward).parameters.values())[1:]
    if [argument.default is argument.empty for argument in arguments] != [True]:
        return f"its forward takes ({', '.join(a.name for a in arguments)}), not the hidden states alone."
    if not isinstance(getattr(module, "routed_scaling_factor", 1.0), (int, float)):
        return "its routed_scaling_factor is no number, and gets no gradient in the fused router."
    scoring: Scoring = "softmax" if getattr(module, "e_score_correction_bias", None) is None else "sigmoid"
    for normalize, float32_linear, float32_weights in itertools.product((True, False), (False, True), (False, True)):
        form = RouterForm(scoring, normalize, float32_linear, float32_weights)
        with probe_context(probe_device(module)):
            if all(_agrees(module, form, *c, training) for c in _CONDITIONS for training in (True, False)):
                return form
    return f"on random data it computes something else than a {scoring} top-{module.top_k} of its logits."


def _kind(module: Any) -> Any:
    """Modules of one kind are probed once: the same class, attributes and sizes."""
    simple = {k: v for k, v in vars(module).items() if isinstance(v, (bool, int, float, str)) and k != "training"}
    replaced = vars(module).get("forward")
    return type(module), tuple(sorted(simple.items())), module.weight.device, tuple(module.weight.shape), replaced


def _agrees(module: Any, form: RouterForm, dtype: torch.dtype, autocast: bool, bias: float, training: bool) -> bool:
    """Whether the code of ``module`` and ``form`` give the same on random weights and hidden states."""
    device = probe_device(module)
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=torch.float32) * scale

    experts, hidden = module.weight.shape
    probe = copy.copy(module)
    probe.training = training

    def fresh(name: str, tensor: torch.Tensor) -> torch.Tensor:
        # Biases large enough to change a choice. The correction bias stays float32 whatever the model's dtype.
        if name == "e_score_correction_bias":
            return normal(*tensor.shape, scale=0.2) + bias
        return normal(*tensor.shape, scale=0.2 if tensor.dim() == 1 else hidden**-0.5).to(dtype)

    probe._parameters = {
        n: p if p is None else torch.nn.Parameter(fresh(n, p)) for n, p in module._parameters.items()
    }
    probe._buffers = {n: b if b is None else fresh(n, b) for n, b in module._buffers.items()}
    x = normal(_TOKENS, hidden).to(dtype).requires_grad_()
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch.autocast(device.type, torch.bfloat16, enabled=autocast),
    ):
        # A router may write into its input (jitter), so each gets a copy.
        theirs, ours = type(module).forward(probe, x.clone()), form.forward(probe, x.clone())
        return _is_like(theirs, ours) and _same(theirs, ours, probe, x, normal(_TOKENS, experts))


def _is_like(theirs: Any, ours: Routing) -> bool:
    """Whether ``theirs`` are three tensors of the same shapes and dtypes, and the logits equal."""
    return (
        isinstance(theirs, tuple)
        and len(theirs) == 3
        and all(isinstance(a, torch.Tensor) and a.shape == b.shape for a, b in zip(theirs, ours, strict=True))
        and all(a.dtype == b.dtype for a, b in zip(theirs, ours, strict=True))
        and torch.equal(theirs[0], ours[0])
    )


def _same(theirs: Routing, ours: Routing, probe: Any, x: torch.Tensor, grad: torch.Tensor) -> bool:
    """Whether choices, weights and gradients agree. Where values tie, two choices may differ and both be right."""
    logits, weights, ids = ours
    alike = (ids.sort(-1).values == theirs[2].sort(-1).values).all(-1)
    choice = logits.detach().float()
    bias = getattr(probe, "e_score_correction_bias", None)
    if bias is not None:
        choice = choice.sigmoid().to(weights.dtype).float() + bias
    value, their_value = (choice.gather(-1, chosen).sort(-1).values for chosen in (ids, theirs[2]))
    if alike.float().mean() < 0.5 or not torch.allclose(value, their_value, rtol=1e-6, atol=1e-6):
        return False
    tables, gradients = [], []
    for _, w, chosen in (theirs, ours):
        table = torch.zeros_like(grad).scatter(-1, chosen, w.float()) * alike[:, None]
        tables.append(table.detach())
        gradients.append(torch.autograd.grad((table * grad).sum(), (x, probe.weight)))
    coarsest = torch.bfloat16 if torch.bfloat16 in (x.dtype, logits.dtype, weights.dtype) else torch.float32
    return _close(tables[0], tables[1], weights.dtype) and all(
        _close(a, b, coarsest) for a, b in zip(*gradients, strict=True)
    )


def _close(theirs: torch.Tensor, ours: torch.Tensor, rounding: torch.dtype) -> bool:
    return float((ours - theirs).norm()) <= _TOLERANCE[rounding] * float(theirs.norm())
