"""What LoRA trains: the parts of a model that its adapters are on, and a warning where that is hardly meant.

PEFT takes the same ``target_modules`` for the routed experts of one model and only for the shared expert of another;
``all-linear`` adapts some routers, and of DeepSeek-V3 the shared expert's names mean the routed experts
(findings/peft-deepseek-shared-expert.sh). It says nothing of it.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch.nn.utils.parametrize import is_parametrized

from moe_kernels.integrations.dispatch import experts_modules

#: Names of expert projections, in target_modules and in target_parameters.
PROJECTIONS = ("gate_proj", "up_proj", "gate_up_proj", "down_proj", "w1", "w2", "w3")
_STACKED = ("gate_up_proj", "down_proj")
_CHOOSING = ("layers_to_transform", "exclude_modules")  # of PEFT; Axolotl's begin with peft_ and lora_
_WRAPPING = ("base_model", "model", "base_layer", "module", "_fsdp_wrapped_module", "_orig_mod")


class Adapted(NamedTuple):
    """Trainable elements of LoRA's factors, by the part of the model that they adapt.

    Attributes:
        whole_weights: those that are no factors, beside some: PEFT's modules_to_save.
    """

    routed_experts: int
    shared_expert: int
    router: int
    attention: int
    rest: int
    whole_weights: int = 0

    def __str__(self) -> str:
        parts = (f"{name.replace('_', ' ')} {count:,}" for name, count in self._asdict().items() if count)
        return ", ".join(parts) or "nothing"


def adapted(model: torch.nn.Module) -> Adapted:
    """What LoRA trains in ``model``; the parts are told apart by where they stand beside the experts modules."""
    found = _counted(_factors(model))
    if not sum(found):
        return found
    trained = sum(_elements(parameter) for parameter in model.parameters() if parameter.requires_grad)
    return found._replace(whole_weights=trained - sum(found))


def doubts(model: torch.nn.Module, targets: Collection[str] | None = None) -> list[str]:
    """Sentences about adapters that are hardly meant, each with the line to write instead.

    targets: what the user named, as modules and parameters. None: what PEFT's configuration holds, where
    ``all-linear`` stands as the names that it led to, so that a router that was named is doubted too.
    """
    found = _factors(model)
    if not found:
        return []
    trained = _counted(found)
    lists = [targets] if targets else _configured(model, "target_modules", "target_parameters")
    named = {name.rpartition(".")[2] for names in lists for name in ([names] if isinstance(names, str) else names)}
    said = []
    projections = named & {*PROJECTIONS, "all-linear"}
    if other := _of_another_adapter(model, targets):
        said.append(
            f"LoRA is not on {', '.join(other)}, though that is named: an adapter that is loaded keeps the weights "
            "that it was made for. To train them start a new one, without lora_model_dir (PeftModel.from_pretrained)."
        )
    elif projections and not _counted(_factors(model, frozen=True)).routed_experts:
        said.append(
            "LoRA adapts no routed expert, though expert projections are named "
            f"({', '.join(sorted(projections))}): {_why_no_expert(model)}"
        )
    elif nowhere := _nowhere(model, targets):
        said.append(f"LoRA trains no parameter of the name {' or '.join(nowhere)}: {_why_no_expert(model)}")
    if unknown := _unknown(model, targets):
        linears = {place[-1] for place in _linears(model)}
        said.append(
            f"LoRA trains no module of the name {' or '.join(unknown)}: this model has none. Its linear layers are "
            f"{', '.join(sorted(linears))} (lora_target_modules, target_modules of PEFT)."
        )
    modules = {name.rpartition(".")[2] for name in targets or () if ".experts." not in f".{name}"}
    left_out = _left_out(model, {place for _, place, _ in found}, modules)
    if trained.routed_experts and left_out:
        said.append(
            f"LoRA adapts the routed experts and not {', '.join(left_out)}: PEFT takes these names for the routed "
            "experts of this model. To train both add to lora_target_parameters (target_parameters of PEFT): "
            f"[{', '.join(f'{name}.weight' for name in left_out)}]."
        )
    chosen, spared = _chosen(model)
    beyond = {place for part, place, _ in found if part == "routed_experts"} & spared
    if beyond:
        cure = "leave them out of lora_target_parameters and lora_target_modules (of PEFT without lora_)"
        if chosen:
            cure = f"write lora_target_parameters (target_parameters of PEFT): [{', '.join(chosen)}]"
        said.append(
            f"LoRA adapts routed experts that {_choosing(model)} leaves out (layers: {len(beyond)}): PEFT heeds it "
            f"for target_modules alone. To train those that are chosen {cure}."
        )
    routers = {place[-1] for part, place, _ in found if part == "router"}
    if routers and (targets is None or not routers <= named):
        others = sorted({place[-1] for part, place, _ in found if part not in ("router", "routed_experts")})
        said.append(
            f"LoRA trains the router ({', '.join(sorted(routers))}), {trained.router:,} parameters: if that is not "
            f"meant, write lora_target_modules: [{', '.join(others)}] (target_modules of PEFT)."
        )
    return said


def _of_another_adapter(model: torch.nn.Module, targets: Collection[str] | None) -> list[str]:
    """The expert weights that the user wrote and that no configuration of PEFT names, as an adapter has it that was
    made with other names. Nothing where a configuration is a pattern."""
    configured = _configured(model, "target_modules", "target_parameters")
    if targets is None or any(isinstance(names, str) for names in configured):
        return []
    heard = {name.rpartition(".")[2] for names in configured for name in names}
    # Of other projections PEFT makes these two.
    return sorted(n for n in targets if (end := n.rpartition(".")[2]) in _STACKED and end not in heard)


def _chosen(model: torch.nn.Module) -> tuple[list[str], set[tuple[str, ...]]]:
    """Routed experts as layers_to_transform and exclude_modules choose them: the weights of those that an adapter is
    meant for, by names that only they have, and the places of the others."""
    chosen, spared = [], set()
    for name, module in experts_modules(model):
        key, place = name.removeprefix("base_model.model.").replace(".base_layer", ""), _place(name)
        number = next((n for n, part in enumerate(place) if part.isdigit()), 0)
        if all(_leaves_out(config, key, place[number]) for config in _configs(model)):
            spared.add(place)
        else:
            chosen += [".".join((*place[max(number - 1, 0) :], weight)) for weight in _weights(module)]
    return chosen, spared


def _leaves_out(config: Any, key: str, layer: str) -> bool:
    """Whether PEFT would put no adapter on a module of this name, in the layer of this number, for these keys."""
    layers, excluded = (getattr(config, name, None) for name in _CHOOSING)
    if isinstance(excluded, str):
        spared = re.fullmatch(excluded, key) is not None
    else:
        spared = any(f".{key}".endswith(f".{name}") for name in excluded or ())
    chosen = {layers} if isinstance(layers, int) else {*(layers or ())}
    return spared or bool(chosen and not any(layer == str(number) for number in chosen))


def _choosing(model: torch.nn.Module) -> str:
    """Those of the two that are set."""
    return " or ".join(name for name in _CHOOSING if any(getattr(c, name, None) is not None for c in _configs(model)))


def _configs(model: torch.nn.Module) -> list[Any]:
    return list(getattr(model, "peft_config", {}).values())


def _why_no_expert(model: torch.nn.Module) -> str:
    """Why PEFT adapts no expert weight, and the line with which it does."""
    from peft.tuners.tuners_utils import BaseTuner

    modules = experts_modules(model)
    name, module = modules[0]
    # PEFT 0.20 to 0.21.2; Axolotl replaces what looks for them.
    if is_parametrized(module) and BaseTuner._inject_parameters.__module__.startswith("peft."):
        path = name.removeprefix("base_model.model.")
        whole = [f"{path}.{weight}" for weight in module.parametrizations]
        return (
            "PEFT finds weights in 4 bits, or behind any other parametrization, by their whole names alone. To train "
            f"them write target_parameters=[{', '.join(map(repr, whole))}, ...], with every layer's names."
        )
    weights = {f"{'.'.join(_place(name)[-2:])}.{weight}" for name, module in modules for weight in _weights(module)}
    return (
        "the routed experts of this model are parameters, not modules. To train them write "
        f"lora_target_parameters: [{', '.join(sorted(weights))}] (target_parameters of PEFT)."
    )


def _left_out(model: torch.nn.Module, places: set[tuple[str, ...]], named: set[str]) -> list[str]:
    """Projections outside routed experts that are ``named`` and no adapter is on, by the last two parts of their
    names."""
    wanted = {*PROJECTIONS} if "all-linear" in named else {*PROJECTIONS} & named
    return sorted({".".join(place[-2:]) for place in _linears(model) if place[-1] in wanted and place not in places})


def _linears(model: torch.nn.Module) -> set[tuple[str, ...]]:
    """Names of the linear layers, less those of LoRA's factors."""
    places = {_place(name) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    return {place for place in places if not {"lora_A", "lora_B"} & {*place}}


def _unknown(model: torch.nn.Module, targets: Collection[str] | None) -> list[str]:
    """The target_modules, of those that the user wrote, that no module is called: PEFT says so if none is.

    Not names of expert projections, which PEFT turns into parameters where the experts are no modules.
    """
    ends = _ends({_place(name) for name, _ in model.named_modules()})
    unknown = {name for name in _written(model, "target_modules", targets) if _place(name) not in ends}
    return sorted(name for name in unknown if name.rpartition(".")[2] not in PROJECTIONS)


def _nowhere(model: torch.nn.Module, targets: Collection[str] | None) -> list[str]:
    """The target_parameters, of those that the user wrote, that PEFT found nothing for: it says so if that is all."""
    wrapped = {
        (*_place(name), module.parameter_name)
        for name, module in model.named_modules()
        if hasattr(module, "parameter_name")
    }
    ends = _ends(wrapped)
    return sorted(name for name in _written(model, "target_parameters", targets) if _place(name) not in ends)


def _written(model: torch.nn.Module, key: str, targets: Collection[str] | None) -> set[str]:
    """The names under ``key`` of PEFT's configurations, of those that the user wrote; a pattern is none."""
    names = {name for names in _configured(model, key) if not isinstance(names, str) for name in names}
    return names if targets is None else names & {*targets}


def _configured(model: torch.nn.Module, *keys: str) -> list[Any]:
    """What each of PEFT's configurations has under these keys: names, or one pattern."""
    configs = getattr(model, "peft_config", {}).values()
    return [getattr(config, key, None) or () for config in configs for key in keys]


def _ends(places: Collection[tuple[str, ...]]) -> set[tuple[str, ...]]:
    """The places, and what is left of each from any of its parts on."""
    return {place[n:] for place in places for n in range(len(place))}


def _place(name: str) -> tuple[str, ...]:
    """A module's name in parts, without what wrapping adds."""
    return tuple(part for part in name.split(".") if part not in _WRAPPING)


def _weights(experts: Any) -> list[str]:
    """Names of the weights of an experts module."""
    return [w for w in PROJECTIONS if w in experts._parameters or w in getattr(experts, "parametrizations", ())]


def _counted(factors: list[tuple[str, tuple[str, ...], int]]) -> Adapted:
    counts = dict.fromkeys(Adapted._fields, 0)
    for part, _, size in factors:
        counts[part] += size
    return Adapted(**counts)


def _factors(model: torch.nn.Module, frozen: bool = False) -> list[tuple[str, tuple[str, ...], int]]:
    """(part, place of the adapted module, elements) of every trainable factor, and with ``frozen`` of the others."""
    experts = {_place(name) for name, _ in experts_modules(model)}
    blocks = {place[:-1] for place in experts}
    found = []
    for name, parameter in model.named_parameters():
        parts = _place(name)
        first = next((n for n, part in enumerate(parts) if part.startswith("lora_")), None)
        if first is not None and (frozen or parameter.requires_grad):
            place = parts[:first]
            found.append((_part(place, experts, blocks), place, _elements(parameter)))
    return found


def _elements(parameter: torch.nn.Parameter) -> int:
    """Of the whole, where ZeRO-3 keeps a part."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _part(place: tuple[str, ...], experts: set[tuple[str, ...]], blocks: set[tuple[str, ...]]) -> str:
    above = {place[:length] for length in range(len(place) + 1)}
    if above & experts:
        return "routed_experts"
    if beside := above & blocks:
        inside = place[len(max(beside, key=len))]
        return "shared_expert" if inside.startswith("shared") else "router"
    return "attention" if any("attn" in part or "attention" in part for part in place) else "rest"
