"""A resumed training goes on with the experts of its checkpoint.

``save_pretrained`` writes the names of the Hub (one weight per expert, for most models), and ``from_pretrained``
stacks them again. ``Trainer`` of transformers 5 does not when it loads a checkpoint: it matches names alone, leaves
the experts (and some routers) as the base model has them, and says so in one line of its log. Here its two loads go
through the conversion of ``from_pretrained``, and no weight of a model with expert layers may stay unread.

FSDP, DeepSpeed and PEFT load in ways of their own, which keep the names of the model; those are left alone.
"""

from __future__ import annotations

import copy
import functools
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger("moe_kernels")

Tensors = dict[str, torch.Tensor]
#: How to read each weight of a checkpoint.
Readers = dict[str, Callable[[], torch.Tensor]]
#: For each weight of the model, what it is made of: (name in the checkpoint, pattern of the converter or None).
Origins = dict[str, list[tuple[str, str | None]]]

# In Trainer's order of preference.
FILES = ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "pytorch_model.bin.index.json")


def mend_trainer(has_experts: Callable[[Any], bool]) -> None:
    """Make ``transformers.Trainer`` load checkpoints of models with expert layers as they were saved, or raise.

    A second call changes nothing. Models without expert layers load as they always did.

    Args:
        has_experts: whether a model has expert layers.
    """
    try:
        from transformers.trainer import Trainer
    except ImportError:  # something that Trainer needs is missing: nobody resumes with it
        return
    stock_resume, stock_best = Trainer._load_from_checkpoint, Trainer._load_best_model
    if hasattr(stock_resume, "moe_kernels"):
        return

    @functools.wraps(stock_resume)
    def load_from_checkpoint(self: Any, resume_from_checkpoint: str, model: Any = None) -> None:
        target = self.model if model is None else model
        if has_experts(target):
            _check_optimizer_state(Path(resume_from_checkpoint))
            if _load(self, target, Path(resume_from_checkpoint)):
                return
        stock_resume(self, resume_from_checkpoint, model)

    @functools.wraps(stock_best)
    def load_best_model(self: Any) -> None:
        if not (has_experts(self.model) and _load(self, self.model, Path(self.state.best_model_checkpoint))):
            stock_best(self)

    load_from_checkpoint.moe_kernels = True  # type: ignore[attr-defined]
    Trainer._load_from_checkpoint = load_from_checkpoint  # type: ignore[method-assign]
    Trainer._load_best_model = load_best_model  # type: ignore[method-assign]


def _check_optimizer_state(checkpoint: Path) -> None:
    """Raise where Trainer would start the optimizer anew and say nothing."""
    names = os.listdir(checkpoint) if checkpoint.is_dir() else []
    optimizer = any(name.startswith("optimizer") for name in names)
    if "trainer_state.json" in names and not (optimizer and "scheduler.pt" in names):
        raise ValueError(
            f"{checkpoint} holds no state of the optimizer and the scheduler (save_only_model leaves it out), so no "
            "training can go on from it. To start a new one from its weights, name the folder as the model instead "
            "(in Axolotl: base_model, for an adapter lora_model_dir)."
        )


def _load(trainer: Any, model: Any, checkpoint: Path) -> bool:
    """Load the checkpoint as ``from_pretrained`` would; False, and nothing done, where Trainer's own way is right.

    Raises:
        ValueError: a weight of the model is not in the checkpoint, or is there in another shape.
    """
    from transformers import PreTrainedModel
    from transformers.utils import is_sagemaker_mp_enabled

    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or is_sagemaker_mp_enabled():
        return False
    core = trainer.accelerator.unwrap_model(model, keep_torch_compile=False)
    stored = stored_weights(checkpoint)
    if not stored or not isinstance(core, PreTrainedModel):  # an adapter, or nothing: Trainer says which
        return False
    state = {name: tensor for name, tensor in core.state_dict().items() if isinstance(tensor, torch.Tensor)}
    converters, origins = _origins(core, state, stored)
    # The names of a compiled model are not those of the model inside.
    if core is model and all(sources == [(target, None)] for target, sources in origins.items()):
        _check_complete(core, checkpoint, state, origins)
        return False
    loaded = []
    for target, value in _converted(core, origins, converters, stored):
        weight = state[target]
        if weight.shape != value.shape or hasattr(weight, "device_mesh"):
            raise ValueError(
                f"{checkpoint} holds {target} as {tuple(value.shape)}, the model as {type(weight).__name__} "
                f"{tuple(weight.shape)}: resume with the model and the number of ranks that wrote it, and without "
                "tensor or expert parallelism."
            )
        weight.copy_(value)
        loaded.append(target)
    _check_complete(core, checkpoint, state, loaded)
    logger.info("moe_kernels: loaded %d weights of %s, converted as by from_pretrained", len(loaded), checkpoint)
    return True


def stored_weights(checkpoint: Path, files: tuple[str, ...] = FILES) -> Readers:
    """What a folder holds, in the first of these files that is there; nothing where there is none."""
    import safetensors

    name = next((name for name in files if (checkpoint / name).is_file()), None)
    if name is None:
        return {}
    parts = [name]
    if name.endswith(".json"):
        parts = sorted(set(json.loads((checkpoint / name).read_text())["weight_map"].values()))
    readers: Readers = {}
    for file in parts:
        if file.endswith(".safetensors"):
            opened = safetensors.safe_open(checkpoint / file, framework="pt")
            readers |= {key: functools.partial(opened.get_tensor, key) for key in opened.keys()}  # noqa: SIM118
        else:
            tensors = torch.load(checkpoint / file, map_location="cpu", weights_only=True, mmap=True)
            readers |= {key: functools.partial(tensors.__getitem__, key) for key in tensors}
    return readers


def _origins(core: Any, state: Tensors, stored: Iterable[str]) -> tuple[dict[str, Any], Origins]:
    """The converters by pattern, and what each weight of the model is made of, by transformers' own rules."""
    try:
        from transformers import core_model_loading as loading
        from transformers.conversion_mapping import get_model_conversion_mapping

        rename, natural_order = loading.rename_source_key, loading.dot_natural_key
        renaming_class, converter_class = loading.WeightRenaming, loading.WeightConverter
    except (ImportError, AttributeError) as error:
        import transformers

        raise ValueError(
            f"moe_kernels does not know how transformers {transformers.__version__} converts the weights of a "
            "checkpoint: resume with transformers 5.16.1 to 5.24, or with what wrote the checkpoint."
        ) from error

    # What the model was loaded through is what its checkpoints were written through. Renamings keep state: a copy.
    mapping = copy.deepcopy(getattr(core, "_weight_conversions", None)) or get_model_conversion_mapping(core)
    renamings = [entry for entry in mapping if isinstance(entry, renaming_class)]
    converters = [entry for entry in mapping if isinstance(entry, converter_class)]
    origins: Origins = {}
    foreign = []
    for name in sorted(stored, key=natural_order):
        bare = name.removeprefix("_orig_mod.")  # Trainer's name for what it saves of a compiled model
        target, pattern = rename(bare, renamings, converters, core.base_model_prefix, state)
        if target not in state and bare in state:
            target, pattern = bare, None
        if target in state:
            origins.setdefault(target, []).append((name, pattern))
        else:
            foreign.append(name)
    if foreign:
        logger.warning(
            "moe_kernels: %s has no use for %d weights of the checkpoint (%s, ...)",
            type(core).__name__,
            len(foreign),
            foreign[0],
        )
    return {pattern: entry for entry in converters for pattern in entry.source_patterns}, origins


def _converted(
    core: Any, origins: Origins, converters: dict[str, Any], stored: Readers
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, value) of each weight, converted by transformers; one at a time, for they may not all fit in memory."""
    for target, sources in origins.items():
        pattern = sources[0][1]
        if pattern is None:
            yield target, stored[sources[-1][0]]()
            continue
        converter = copy.deepcopy(converters[pattern])
        for name, pattern in sources:
            converter.add_tensor(target, name, pattern or name, stored[name]())
        try:
            converted = converter.convert(target, model=core, config=core.config)
        except RuntimeError as error:
            raise ValueError(
                f"{target} cannot be made of {sources[0][0]}, ... of the checkpoint ({error}): resume with the model "
                "that wrote it."
            ) from error
        for name, value in converted.items():
            yield name, value[0] if isinstance(value, list) else value


def _check_complete(core: Any, checkpoint: Path, state: Tensors, loaded: Iterable[str]) -> None:
    """Raise if a weight was not loaded and is neither tied to one that was nor left out of checkpoints on purpose."""
    loaded = set(loaded)
    shared = {state[name].data_ptr() for name in loaded}
    optional = [*(core._keys_to_ignore_on_save or ()), *(core._keys_to_ignore_on_load_missing or ())]
    missing = [
        name
        for name, weight in state.items()
        if name not in loaded
        and (weight.numel() and weight.data_ptr() not in shared)
        and not any(re.search(pattern, name) for pattern in optional)
    ]
    if missing:
        raise ValueError(
            f"{checkpoint} holds nothing for {len(missing)} weights of {type(core).__name__} ({missing[0]}, ...): "
            "they would keep the base model's values. Resume with the model that wrote the checkpoint."
        )
