"""Write the tables of YAML keys from the plugin's schema, between the markers of three pages.

    python benchmarks/make_knob_tables.py            rewrite the tables
    python benchmarks/make_knob_tables.py --check    exit with 1 if they are out of date
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable
from typing import Any, Literal, get_args, get_origin

import pages
from moe_kernels.registry import names
from moe_kernels.settings import ExpertsSettings

PLUGIN = "src/axolotl/integrations/moe_kernels"
#: The keys that are also arguments of `register` and `fused_experts`.
ARGUMENTS = {"moe_group_size": "group_size", "moe_persistent_kernel": "persistent", "moe_recompute": "recompute"}


def schema() -> Any:
    """The plugin's ``MoeKernelsArgs``, from its file: Axolotl takes long to import and may not be installed."""
    spec = importlib.util.spec_from_file_location("moe_kernels_args", pages.ROOT / PLUGIN / "args.py")
    assert spec
    assert spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # pydantic looks the annotations up there
    spec.loader.exec_module(module)
    return module.MoeKernelsArgs


def values(kind: Any) -> list[str]:
    """What a key may be, from its annotation."""
    if get_origin(kind) is Literal:
        return [str(value) for value in get_args(kind)]
    if get_origin(kind) is list:
        return ["list of model types"]
    if kind is bool:
        return ["true", "false"]
    return [value for part in get_args(kind) for value in values(part)]


def meaning(key: str, field: Any) -> tuple[str, str]:
    """The description of a key without its default, and the default."""
    found = re.fullmatch(r"(.+\.) Default: (.+)\.", field.description or "")
    if not found:
        raise SystemExit(f'{key} needs a description that ends with "Default: value." in {PLUGIN}/args.py')
    return found[1].replace("|", "\\|"), found[2]


def meanings(fields: dict[str, Any]) -> str:
    """What each key does."""
    rows = [(f"`{key}`", meaning(key, field)[0]) for key, field in fields.items()]
    return pages.table(("YAML key", "meaning"), rows)


def choices(fields: dict[str, Any]) -> str:
    """The values and the default of each key, and its argument in Python."""
    rows = [
        (f"`{key}`", f"`{ARGUMENTS[key]}`" if key in ARGUMENTS else "", ", ".join(values(field.annotation)),
         meaning(key, field)[1])
        for key, field in fields.items()
    ]  # fmt: skip
    rows.append(("", "`backend`", ", ".join(names()), ExpertsSettings.backend))
    return pages.table(("YAML key", "argument of `register` and `fused_experts`", "values", "default"), rows)


def whole(fields: dict[str, Any]) -> str:
    """Meaning, values and default of each key."""
    rows = []
    for key, field in fields.items():
        text, default = meaning(key, field)
        rows.append((f"`{key}`", text, ", ".join(values(field.annotation)), default))
    return pages.table(("Key", "Meaning", "Values", "Default"), rows)


DOCUMENTS: dict[str, Callable[[dict[str, Any]], str]] = {
    "README.md": meanings, "docs/knobs.md": choices, f"{PLUGIN}/README.md": whole,
}  # fmt: skip


if __name__ == "__main__":
    fields = schema().model_fields
    raise SystemExit(
        pages.main(__doc__, "knobs", lambda root: {page: table(fields) for page, table in DOCUMENTS.items()})
    )
