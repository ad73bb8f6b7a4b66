"""Makes the adapter that every run of a LoRA comparison starts from, in a process of its own.

Run as ``python -m moe_kernels.tools.compare.adapter CONFIG.json``: the settings of a run, of which ``base_model``
and the keys of :func:`moe_kernels.tools.compare.pair.lora_overrides` are read. The adapter is PEFT's own, seeded. B
is random too: a B of zeros would hide errors at the first step.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from moe_kernels.tools.common.files import read_json
from moe_kernels.tools.common.runfile import Config
from moe_kernels.tools.compare.pair import ADAPTER_FOLDER
from moe_kernels.tools.prepare.cache import in_turn, replacing


def adapter_made(config: Config) -> bool:
    """Whether the adapter that a run starts from exists."""
    return (Path(config["lora_model_dir"]) / "adapter_config.json").is_file()


def make_adapter(config: Config) -> None:
    """Write ``lora_model_dir``: an adapter of ``base_model`` as the other keys describe it, unless it exists."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    if adapter_made(config):  # another comparison made it while this one waited for the lock
        return
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(
        config["base_model"], dtype=torch.float32, local_files_only=True
    )
    settings = peft.LoraConfig(
        r=config["lora_r"],
        lora_alpha=config["lora_alpha"],
        lora_dropout=config["lora_dropout"],
        target_modules=config["lora_target_modules"],
        target_parameters=config["lora_target_parameters"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    with replacing(Path(config["lora_model_dir"])) as folder:
        peft.get_peft_model(model, settings).save_pretrained(str(folder))


if __name__ == "__main__":
    with in_turn(ADAPTER_FOLDER, print):
        make_adapter(read_json(Path(sys.argv[1])))
