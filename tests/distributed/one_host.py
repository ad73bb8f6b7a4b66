"""One rank of test_one_host.py: ``torchrun one_host.py FOLDER SCENARIO`` writes ``FOLDER/SCENARIO.pt`` on rank 0.

FSDP2 over NCCL with the kernels of this GPU where there are two GPUs, else over gloo with plain torch.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from workers import BASELINE, OURS, build, gradients, load, save, shard

import moe_kernels.integrations.transformers as mk
from moe_kernels import backends

CUDA = torch.cuda.device_count() > 1
TIMEOUT_S = 20 if CUDA else 45  # of a collective
STEPS, SAVED = 6, 4
SEQUENCES, TOKENS = 4, 256 if CUDA else 12  # of a step, whatever the number of ranks
FAMILY = "qwen2-moe"
PRECISION = {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)} if CUDA else {}


def model_of(experts: str) -> Any:
    """Sharded over all ranks; on GPUs of the 1B model's width, which takes the kernels that it takes."""
    return shard(build(FAMILY, experts, **({"size": "1b", "layers": 2} if CUDA else {})).to(place()), **PRECISION)


def place() -> torch.device:
    return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if CUDA else torch.device("cpu")


def train(
    model: Any, optimizer: torch.optim.Optimizer, first: int = 0, folder: Path | None = None, fate: str = ""
) -> list[float]:
    """Losses of the steps from ``first`` on, over two batches in turn. With a folder, what step ``SAVED`` begins with
    is saved there; then rank 1 meets its fate."""
    generator = torch.Generator().manual_seed(5)
    data = torch.randint(128, (2, SEQUENCES, TOKENS), generator=generator).to(place())
    losses = []
    for step in range(first, STEPS):
        if folder is not None and step == SAVED:
            save(folder, model, optimizer)
            if dist.get_rank() == 1:
                meet(fate)
        ids = data[step % 2].chunk(dist.get_world_size())[dist.get_rank()]
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(float(mean) / dist.get_world_size())
    return losses


def meet(fate: str) -> None:
    if fate == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fate == "stuck":
        time.sleep(600)


def optimizer_of(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def whole(folder: Path) -> dict[str, Any]:
    """Stock experts and ours to the end, and a sparse block of which rank 1 gets no token."""
    found: dict[str, Any] = {}
    for experts in (BASELINE, OURS):
        backends.reset_dispatch_counts()
        model = model_of(experts)
        found[experts] = {"losses": train(model, optimizer_of(model)), "calls": backends.dispatch_counts()}
        found["idle", experts] = idle_rank(experts)
    return found


def idle_rank(experts: str) -> dict[str, Any]:
    """Ours sharded, and all tokens on rank 0; stock experts whole, on every rank."""
    model = build(FAMILY, experts, **({"size": "1b", "layers": 2} if CUDA else {})).to(place())
    block = model.model.layers[-1].mlp
    x = torch.randn(1, TOKENS, model.config.hidden_size, generator=torch.Generator().manual_seed(3)).to(place())
    if experts == OURS:
        fully_shard(block)
        x = x[:, : TOKENS if dist.get_rank() == 0 else 0]
    x.requires_grad_()
    block(x).square().sum().backward()
    return {"dx": x.grad, "grads": gradients(block)}


def killed(folder: Path) -> dict[str, Any]:
    model = model_of(OURS)
    train(model, optimizer_of(model), folder=folder / "killed", fate="killed")
    return {}


def stuck(folder: Path) -> dict[str, Any]:
    model = model_of(OURS)
    train(model, optimizer_of(model), folder=folder / "stuck", fate="stuck")
    return {}


def resumed(folder: Path) -> dict[str, Any]:
    """What the killed run saved, on however many ranks there are now."""
    model = model_of(OURS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # what is not in the checkpoint cannot come back
    optimizer = optimizer_of(model)
    load(folder / "killed", model, optimizer)
    return {"losses": train(model, optimizer, first=SAVED)}


def main() -> None:
    if CUDA:
        torch.cuda.set_device(place())
    dist.init_process_group("cpu:gloo,cuda:nccl" if CUDA else "gloo", timeout=timedelta(seconds=TIMEOUT_S))
    torch.set_num_threads(1)
    mk.register(backend="auto" if CUDA else "torch")
    folder, scenario = Path(sys.argv[1]), sys.argv[2]
    found = {function.__name__: function for function in (whole, killed, stuck, resumed)}[scenario](folder)
    if dist.get_rank() == 0:
        torch.save(found, folder / f"{scenario}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
