"""One rank of an Axolotl training.

    torchrun ... axolotl_rank.py FOLDER STEPS WARMUP train RUN.yml --launcher python

``axolotl`` as :mod:`moe_kernels.tools.compare.trainer` runs it, in a process that torchrun started, and watched
(:mod:`several_gpus.watch`). What was trained is not saved: of 30 B parameters that takes longer than the steps.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import axolotl.train
import torch

from moe_kernels.tools.compare.runner import end_with_parent
from moe_kernels.tools.compare.trainer import train

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from several_gpus.watch import Watch

if __name__ == "__main__":
    end_with_parent()  # torchrun, which starts each rank in a session of its own
    folder, steps, warmup = sys.argv[1:4]
    sys.argv[1:4] = []
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # where the weights of a large model are drawn
    axolotl.train.save_trained_model = lambda *_: None
    train(Watch(Path(folder), int(steps), int(warmup), rank, ranks))
