"""``experts_implementation="moe_kernels"`` for transformers: registration, and what it can and cannot serve.

    import moe_kernels.integrations.transformers as mk
    mk.register()
    model = AutoModelForCausalLM.from_pretrained(..., experts_implementation="moe_kernels")
    mk.check_model(model)

The routing stays in the model; only the body of its experts class is replaced. Parameter names and shapes are
those of transformers, and the saved config.json holds no trace of the choice.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from moe_kernels.activation import ACTIVATIONS
from moe_kernels.moe import fused_experts
from moe_kernels.settings import ExpertsSettings, GroupSize

try:
    from transformers.activations import ACT2FN
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface, _default_apply_gate
except ImportError as error:
    raise ImportError(
        "moe_kernels.integrations.transformers needs transformers 5.16.1 or newer: "
        "pip install 'moe-kernels[transformers]'"
    ) from error

if torch.distributed.is_available():
    from torch.distributed.tensor import DTensor

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_ACTIVATION_OF_TYPE = {torch.nn.SiLU: "silu"} | {type(ACT2FN[name]): name for name in ACTIVATIONS if name in ACT2FN}
_CURE = "Train this model with experts_implementation: grouped_mm and without moe_kernels."
# What register() put under each name, to tell later whether a name still leads here.
_registered: dict[str, Callable[..., torch.Tensor]] = {}


class UnsupportedExperts(ValueError):
    """These kernels cannot run an experts module; the message names the module, the reason and the cure."""


def register(
    *, group_size: GroupSize = 128, persistent: bool = True, backend: str = "auto", name: str = "moe_kernels"
) -> None:
    """Make ``experts_implementation=name`` run :func:`moe_kernels.fused_experts` with these settings.

    Calling it again with the same name replaces the settings, also for models already loaded under it.

    Raises:
        ValueError: a setting is invalid; the message lists the valid ones.
    """
    settings = ExpertsSettings(group_size=group_size, persistent=persistent, backend=backend)

    def experts_forward(
        self: torch.nn.Module,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        # Cheap, and every time: expert parallelism, PEFT and weight swaps change the module between calls.
        reason = _structure_problem(self)
        if reason is not None:
            raise UnsupportedExperts(f"{type(self).__name__}: {reason} {_CURE}")
        # One read each: PEFT merges, and a quantised parametrisation dequantises, on every attribute access.
        gate_up, down = _plain(self.gate_up_proj), _plain(self.down_proj)
        if gate_up.shape[0] != self.num_experts:
            raise UnsupportedExperts(
                f"{type(self).__name__} says num_experts={self.num_experts} but holds weights of "
                f"{gate_up.shape[0]} experts. Switch off what sharded them, or train without moe_kernels."
            )
        return fused_experts(
            hidden_states,
            top_k_index,
            top_k_weights,
            gate_up,
            down,
            activation=_ACTIVATION_OF_TYPE[type(self.act_fn)],
            group_size=settings.group_size,
            persistent=settings.persistent,
            backend=settings.backend,
        )

    ALL_EXPERTS_FUNCTIONS.register(name, experts_forward)
    _registered[name] = experts_forward


def experts_modules(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """``(name, module)`` of every module that dispatches through transformers' experts interface."""
    return [(name, module) for name, module in model.named_modules() if _dispatches(type(module))]


def why_not_module(module: torch.nn.Module) -> str | None:
    """None if these kernels compute what ``module`` (an experts module) computes, else the reason in one sentence."""
    reason = _structure_problem(module)
    if reason is not None:
        return reason
    activation = _ACTIVATION_OF_TYPE[type(module.act_fn)]
    # The type may lie (a patched forward, a clamp hidden in a subclass): compare values, far past any clamp.
    device = module.down_proj.device
    gate = torch.linspace(-60, 60, 241, device="cpu" if device.type == "meta" else device)
    up = gate.flip(0) + 0.25
    with torch.no_grad():
        ours = ACTIVATIONS[activation].value(gate) * up
        theirs = module._apply_gate(torch.cat([gate, up]).unsqueeze(0))[0]
    if not torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4):
        return f"its gate does not compute {activation}(gate) * up: act_fn was changed."
    return None


def check_model(model: torch.nn.Module) -> int:
    """The number of expert layers that these kernels serve in ``model``.

    The modules are asked, not the config: another plugin may have replaced the experts class, and then the config
    still names our implementation although it is never called.

    Raises:
        UnsupportedExperts: no module would be served, or one cannot be; names the module, the reason and the cure.
    """
    modules = experts_modules(model)
    if not modules:
        others = sorted({type(m).__name__ for m in model.modules() if getattr(m, "gate_up_proj", None) is not None})
        found = f"; it has {', '.join(others)}" if others else ""
        raise UnsupportedExperts(
            f"{type(model).__name__} has no experts module that dispatches through transformers' experts "
            f"interface{found}. Switch off what replaced the experts class (Liger: liger_glu_activation), or train "
            "this model without moe_kernels."
        )
    for name, module in modules:
        implementation = module.config._experts_implementation
        function = ALL_EXPERTS_FUNCTIONS.get(implementation)
        if function is None or function is not _registered.get(implementation):
            raise UnsupportedExperts(
                f"{name} ({type(module).__name__}) runs experts_implementation={implementation!r}, not moe_kernels: "
                "call register() and load the model with experts_implementation='moe_kernels'."
            )
        reason = why_not_module(module)
        if reason is not None:
            raise UnsupportedExperts(f"{name} ({type(module).__name__}): {reason} {_CURE}")
    return len(modules)


def _dispatches(cls: type) -> bool:
    """Whether ``cls.forward`` is the one made by transformers' ``use_experts_implementation`` (maybe wrapped again)."""
    forward = getattr(cls, "forward", None)
    while forward is not None:
        cells = getattr(forward, "__closure__", None) or ()
        if any(isinstance(cell.cell_contents, ExpertsInterface) for cell in cells):
            return True
        forward = getattr(forward, "__wrapped__", None)
    return False


def _structure_problem(module: torch.nn.Module) -> str | None:
    """What the attributes of an experts module say against it; torch.compile traces this."""
    if not module.has_gate:
        return "its experts have no gate (up_proj instead of gate_up_proj)."
    if module.is_transposed:
        return "its weights are stored transposed, (E, H, 2I)."
    if not module.is_concatenated:
        return "its gate and up rows are interleaved."
    if module.has_bias:
        return "its experts have biases."
    if getattr(module, "has_post_expert_norm", False):
        return "it normalises the output of each expert."
    if getattr(type(module), "_apply_gate", None) is not _default_apply_gate:
        return "it has a gate of its own (_apply_gate: a clamp or a scale)."
    if type(module.act_fn) not in _ACTIVATION_OF_TYPE:
        return f"its activation {type(module.act_fn).__name__} is not one of {', '.join(sorted(ACTIVATIONS))}."
    return None


def _plain(weight: torch.Tensor) -> torch.Tensor:
    """``weight`` as a plain tensor of a dtype that the op computes in."""
    if torch.distributed.is_available() and isinstance(weight, DTensor):
        if not all(placement.is_replicate() for placement in weight.placements):
            raise UnsupportedExperts(
                f"expert weights are still sharded ({weight.placements}) in forward. Let FSDP2 wrap the decoder "
                "layer (transformer_layer_cls_to_wrap), or train without moe_kernels."
            )
        weight = weight.to_local()
    if weight.dtype not in _DTYPES:
        raise UnsupportedExperts(f"expert weights are stored as {weight.dtype}. {_CURE}")
    return weight
