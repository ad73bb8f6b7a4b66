"""Stands in for `axolotl train`: `python fake_trainer.py derived.yml --launcher python`.

Reads how to behave from the run file's key `fake`, prints what Axolotl prints, leaves an offline W&B run.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).parent))
from wandb_files import write_run


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
    print(f"moe-kernels compare: the experts run on {'moe_kernels' if ours else 'grouped_mm'}")
    if ours:
        print(
            "moe_kernels: backend=torch (no GPU), 2 expert calls dispatched in step 1, group_size=128, "
            "persistent=True, 2 expert layers"
        )
    rows = []
    for step in range(1, config["max_steps"] + 1):
        loss = 7.0 - 0.1 * step
        print(
            f"\r 10%|#  | {step}/{config['max_steps']} [00:01]  {{'loss': '{loss:.4g}', 'grad_norm': '1.0'}}",
            flush=True,
        )
        rows.append(
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
        rows = rows[:2]
    rows.append({"train/epoch": 0.1, "_timestamp": time.time()})
    write_run(Path(os.environ["WANDB_DIR"]), config["wandb_project"], config["wandb_name"], rows)
    output = Path(config["output_dir"])
    output.mkdir(parents=True)
    (output / "model.safetensors").write_bytes(b"weights")
    return 0


if __name__ == "__main__":
    sys.exit(main())
