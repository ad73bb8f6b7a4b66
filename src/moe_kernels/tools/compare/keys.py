"""Whether Axolotl knows the keys of ``--set``: one that its schema does not have it drops, and says nothing.

Run as ``python -m moe_kernels.tools.compare.keys`` with what to look up on its standard input, in a process of its
own: this one should not pay for Axolotl's imports, nor load the plugins of the run files.
"""

from __future__ import annotations

import difflib
import json
import os
import subprocess
import sys
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from moe_kernels.tools.common.errors import CommandError, UsageError
from moe_kernels.tools.common.machine import installed_version
from moe_kernels.tools.compare.pair import Pair, settings_of
from moe_kernels.tools.compare.runner import OFFLINE, last_error

# Begins the line of the answer among what Axolotl prints.
ANSWER = "moe-kernels compare: keys that Axolotl does not know: "


def check_settings(pairs: Sequence[Pair], settings: Sequence[str]) -> None:
    """Raise UsageError where a run of ``pairs`` would train without one of ``settings`` (KEY=VALUE)."""
    if not settings:
        return
    runs = {(str(run.config.get("plugins")), run.uses_kernels): run for pair in pairs for run in pair.runs}.values()
    asked = [(run.config.get("plugins") or [], settings_of(settings, {}, run.uses_kernels)) for run in runs]
    for run, found in zip(runs, unknown_keys(asked), strict=True):
        for key, nearest in found:
            hint = f"the nearest that it has is {nearest}; " if nearest else ""
            raise UsageError(
                f"--set {key}: with the plugins of {run.source}, axolotl {installed_version('axolotl')} has no such "
                f"key, and would train without it. Cure: {hint}a plugin's key needs that plugin in plugins."
            )


def unknown_keys(asked: Sequence[tuple[list[str], dict[str, Any]]]) -> list[list[tuple[str, str]]]:
    """Of each (plugins, keys of a run file) the keys that Axolotl does not know with these plugins.

    Returns:
        For each the unknown keys, dotted, with the nearest that it knows, or "".

    Raises:
        CommandError: Axolotl cannot be asked here.
    """
    command = [sys.executable, "-m", __spec__.name]
    done = subprocess.run(
        command, input=json.dumps(asked), env={**os.environ, **OFFLINE}, capture_output=True, text=True, check=False
    )
    line = next((line for line in done.stdout.splitlines() if line.startswith(ANSWER)), None)
    if line is None:
        lines = done.stderr.splitlines()
        reason = last_error(lines) or (lines or [f"exit code {done.returncode}"])[-1]
        raise CommandError(f"Axolotl cannot say whether it knows the keys of --set: {reason}. Cure: mend that first.")
    return [[(key, nearest) for key, nearest in found] for found in json.loads(line.removeprefix(ANSWER))]


def _schema(plugins: Sequence[str]) -> list[Any]:
    """The classes of pydantic whose fields are the keys of a run file that lists ``plugins``."""
    import pkgutil

    from axolotl.integrations.base import PluginManager, load_plugin
    from axolotl.utils.schemas.config import AxolotlInputConfig

    # From 0.21 on it loads some that no run file lists. None is registered: some start servers there.
    loaded = [*PluginManager.get_instance().plugins.values(), *map(load_plugin, plugins)]
    arguments = [plugin.get_input_args() for plugin in loaded]
    return [AxolotlInputConfig, *(pkgutil.resolve_name(name) for name in arguments if name)]


def _unknown(schema: Sequence[Any], given: Any, above: str = "") -> Iterator[tuple[str, str]]:
    """The keys of ``given``, and of mappings and lists inside, that no class of ``schema`` has, and the nearest."""
    if isinstance(given, list):
        for entry in given:
            yield from _unknown(schema, entry, above)
    classes = [kind for kind in schema if hasattr(kind, "model_fields")]
    if not (isinstance(given, dict) and classes) or any(map(_takes_any, schema)):
        return
    fields: dict[str, list[Any]] = {}
    for name, field in (pair for kind in classes for pair in kind.model_fields.items()):
        for spelt in {name, *_aliases(field)}:
            fields.setdefault(spelt, []).extend(_kinds(field.annotation))
    for key, value in given.items():
        if key in fields:
            yield from _unknown(fields[key], value, f"{above}{key}.")
        else:
            nearest = difflib.get_close_matches(key, fields, 1)
            yield f"{above}{key}", f"{above}{nearest[0]}" if nearest else ""


def _aliases(field: Any) -> Iterator[str]:
    """Other names that a field of pydantic is given by."""
    for alias in (field.alias, field.validation_alias):
        yield from (name for name in getattr(alias, "choices", [alias]) if isinstance(name, str))


def _kinds(annotation: Any) -> list[Any]:
    """The parts of a type such as ``list[Model] | bool | None``."""
    parts = typing.get_args(annotation)
    if not parts or typing.get_origin(annotation) is dict:
        return [annotation]
    return [kind for part in parts for kind in _kinds(part)]


def _takes_any(kind: Any) -> bool:
    """Whether a mapping of this type is handed on with whatever keys it has."""
    extra = getattr(kind, "model_config", {}).get("extra")
    return kind is Any or extra == "allow" or (typing.get_origin(kind) or kind) is dict


if __name__ == "__main__":
    requests = json.load(sys.stdin)
    answer = [list(_unknown(_schema(plugins), given)) for plugins, given in requests]
    print(ANSWER + json.dumps(answer), flush=True)
