"""``axolotl merge-lora`` must not lose the experts' part of an adapter, or not in silence.

Its default method goes through the files of the base model one by one. Where those hold one weight per expert, it
leaves the adapter of the stacked weights out: Axolotl 0.19 for every model tried, 0.21 for those whose names in the
files are others (Mixtral's ``w1``), behind a warning and with exit code 0. ``merge_method: legacy`` does as PEFT.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_kernels.integrations.resume import Readers

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
CURE = (
    "Set merge_method: legacy in the run file, which merges as PEFT does, with the whole model in memory; for a "
    "base model in mxfp4 also model_quantization_config: Mxfp4Config and its kwargs {dequantize: true}."
)


def refuse_lossy_merge(cfg: Any) -> None:
    """Refuse, before anything is merged, a method that would lose the experts' part: for Axolotl 0.19.

    Raises:
        ValueError: the adapter has factors of expert weights, and the base model's files one weight per expert, or
            blocks of mxfp4.
    """
    adapter = cfg.get("lora_model_dir") or cfg.get("output_dir")
    if cfg.get("merge_method") == "legacy" or not adapter or not _expert_layers(Path(adapter)):
        return
    if any(re.search(r"\bexperts\.(\d+\.|\w+_blocks$)", name) for name in _base_weights(cfg)):
        raise ValueError(
            f"axolotl merge-lora would leave the experts' part of the adapter in {adapter} out: the files of "
            f"{cfg.get('base_model')} hold one weight per expert, or blocks of mxfp4. {CURE}"
        )


def check_merge(cfg: Any, adapter: str, merged: str) -> None:
    """Compare what was merged with the base model: for Axolotl 0.21, whose default method knows some models' names.

    Raises:
        ValueError: the experts of a layer that the adapter trained are those of the base model still.
    """
    from moe_kernels.integrations.resume import stored_weights

    layers = _expert_layers(Path(adapter))
    if cfg.get("merge_method") == "legacy" or not layers:
        return
    base, after = _base_weights(cfg), stored_weights(Path(merged))
    experts = [name for name in base if re.search(r"\bexperts\.", name) and name in after]
    for layer in sorted(layers):
        names = [name for name in experts if re.search(rf"\blayers\.{layer}\.", name)]
        if names and all(_equal(base[name](), after[name]()) for name in names):
            raise ValueError(
                f"axolotl merge-lora left the experts' part of the adapter in {adapter} out of layer {layer} of "
                f"{merged}, which is the base model's there. {CURE}"
            )


def _expert_layers(adapter: Path) -> set[int]:
    """Layers whose experts an adapter changes: one of its factors B is not zero."""
    from moe_kernels.integrations.resume import stored_weights

    found = set()
    for name, read in stored_weights(adapter, ADAPTER_FILES).items():
        layer = re.search(r"\blayers\.(\d+)\..*\bexperts\.(base_layer\.)*lora_B\b", name)
        if layer and int(layer[1]) not in found and read().any():
            found.add(int(layer[1]))
    return found


def _base_weights(cfg: Any) -> Readers:
    """Those of the files that Axolotl's default method reads, from where it reads them."""
    from huggingface_hub import snapshot_download

    from moe_kernels.integrations.resume import stored_weights

    name = str(cfg.get("base_model"))
    folder = (
        Path(name) if Path(name).is_dir() else Path(snapshot_download(name, revision=cfg.get("revision_of_model")))
    )
    return stored_weights(folder)


def _equal(a: Any, b: Any) -> bool:
    return bool(a.shape == b.shape and a.dtype == b.dtype and (a == b).all())
