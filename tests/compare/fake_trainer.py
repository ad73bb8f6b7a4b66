"""Stands in for `axolotl train`: `python fake_trainer.py derived.yml --launcher python`.

Reads how to behave from the run file's key `fake`, prints what Axolotl prints, leaves the record of a run.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import yaml


def main() -> int:
    config = yaml.safe_load(Path(sys.argv[1]).read_text())
    fake = config.get("fake", "train")
    print("[INFO] [axolotl.train] Starting trainer...", flush=True)
    if fake == "fail":
        print("Traceback (most recent call last):\n  File x\nRuntimeError: the fake GPU melted", file=sys.stderr)
        return 3
    if fake == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fake == "hang":
        Path(config["output_dir"]).parent.joinpath("pid").write_text(str(os.getpid()))
        time.sleep(120)
    ours = bool(config.get("moe_kernels")) and fake != "no-dispatch"
    if ours:
        print(
            "moe_kernels: backend=torch (no GPU), 2 expert calls dispatched in step 1, group_size=128, "
            "persistent=True, 2 expert layers"
        )
    wandb = {"project": config["wandb_project"], "id": "abc123", "name": config["wandb_name"]}
    experts = "moe_kernels" if ours else "grouped_mm"
    entries = [{"experts": experts, "frozen": {}, "weights": "", "wandb": wandb}]
    for step in range(1, config["max_steps"] + 1):
        loss = 7.0 - 0.1 * step
        print(
            f"\r 10%|#  | {step}/{config['max_steps']} [00:01]  {{'loss': '{loss:.4g}', 'grad_norm': '1.0'}}",
            flush=True,
        )
        entries.append(
            {
                "train/loss": loss,
                "train/grad_norm": 1.0,
                "train/tokens/train_per_sec_per_gpu": 5000.0,
                "train/tokens/trainable": 512 * step,
                "_timestamp": time.time() - 100 + 0.1 * step,
                **({"train/moe/expert_calls": 2.0} if ours else {}),
            }
        )
    if fake == "short":
        entries = entries[:3]
    if fake == "damaged":
        entries[2]["_timestamp"] = "noon"
    Path(sys.argv[1]).with_name("record.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    output = Path(config["output_dir"])
    output.mkdir(parents=True)
    (output / "model.safetensors").write_bytes(b"weights")
    return 0


if __name__ == "__main__":
    sys.exit(main())
