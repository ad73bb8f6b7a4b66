"""Axolotl's run files (YAML): read whole, and what they say of the model and its expert layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moe_kernels.tools.common.errors import UsageError

Config = dict[str, Any]

# Keys that must be numbers here; Axolotl itself checks the others.
COUNTS = ("max_steps", "micro_batch_size", "sequence_len", "gradient_accumulation_steps")


def load_yaml(path: Path) -> Config:
    """A run file as a dictionary; UsageError where it is absent or not a mapping."""
    import yaml

    if not path.is_file():
        raise UsageError(f"There is no file {path}. Cure: name a run file (.yml) that is there.")
    try:
        config = yaml.safe_load(path.read_bytes())
    except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(config, dict):
        raise UsageError(f"{path} holds no settings: an Axolotl run file is a mapping of keys to values.")
    if not all(isinstance(key, str) for key in config):
        raise UsageError(f"{path} has a key that is no text: an Axolotl run file is a mapping of names to values.")
    if not isinstance(config.get("plugins"), (list, type(None))):
        raise UsageError(f"{path}: plugins should be a list and is {config['plugins']!r:.60}.")
    check_values(config, str(path))
    return config


def check_values(config: Config, where: str) -> None:
    """UsageError where a value is none that a run file can hold, or one of COUNTS is no number.

    ``where``: the file or the option that they are from.
    """
    for key, value in config.items():
        try:
            json.dumps(value, sort_keys=True)
        except (TypeError, ValueError, RecursionError) as error:
            raise UsageError(
                f"{where}: {key} is {value!r:.60}, and a run file holds text, numbers, lists, and mappings with keys "
                "of one kind. Cure: put what is text, such as a date, in quotes."
            ) from error
    for key in COUNTS:
        if not (config.get(key) is None or (type(config[key]) is int and 0 < config[key] < 2**40)):
            raise UsageError(f"{where}: {key} should be a number from 1 on and is {config[key]!r:.60}.")


def dump_yaml(config: Config) -> str:
    """A run file's text, keys in their order."""
    import yaml

    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True)


def tokens_per_micro_batch(config: Config) -> int:
    """Tokens an expert layer sees in one call, padding included."""
    return int(config.get("micro_batch_size") or 1) * int(config.get("sequence_len") or 512)


def precision(config: Config) -> str:
    """``"bf16"``, ``"fp16"`` or ``"fp32"``: what Axolotl trains in, by any of its spellings.

    ``auto`` counts as bf16, which it is on every GPU since Ampere.
    """
    if config.get("bf16") == "auto" and config.get("fp16"):
        return "fp16"
    if config.get("bf16") or config.get("bfloat16"):
        return "bf16"
    return "fp16" if any(config.get(key) for key in ("load_in_8bit", "fp16", "float16")) else "fp32"


def base_model(config: Config, path: Path) -> str:
    """The model that a run file names; UsageError where it names none."""
    model = config.get("base_model")
    if not isinstance(model, str) or not model:
        raise UsageError(f"{path} names no base_model.")
    return model
