"""Trainings by transformers' Trainer on a model that transformers itself spreads over the ranks.

    torchrun ... trainer_runs.py REQUEST.json      # one rank; rows() writes the request and starts the ranks

One start trains every layout with either kind of experts, so that a start's seconds are paid once.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moe_kernels.tools.common.files import read_json, write_json
from moe_kernels.tools.common.runfile import tokens_per_micro_batch as tokens_of
from moe_kernels.tools.compare.runner import OFFLINE, end_with_parent
from several_gpus.axolotl_runs import one_gpu_specs
from several_gpus.report import cell, times
from several_gpus.setting import LAYOUTS, OURS, RUNS, STOCK, Row, Setting, cuda, python_path
from several_gpus.watch import PROFILED, Watch, seen

# torchrun gives its ranks 30 s before it kills them.
STOP_S = 40.0
KEPT = ("peak_gib", "startup_s", "losses", "ran", "settings", "held")


def rows(family: str, engines: Sequence[str], setting: Setting) -> Iterator[Row]:
    """Both kinds of experts under each of ``engines``, which want the same number of ranks."""
    spec = one_gpu_specs(family, setting)[STOCK]
    (ranks,) = {setting.ranks(engine) for engine in engines}
    folder = RUNS / f"{family}-{setting.size(family)}-trainer-{ranks}"
    folder.mkdir(parents=True, exist_ok=True)
    request, answer, log = folder / "request.json", folder / "answer.json", folder / "train.log"
    answer.unlink(missing_ok=True)
    write_json(request, {"config": spec.config, "steps": setting.steps, "warmup": setting.warmup,
                         "engines": {engine: dict.fromkeys(LAYOUTS[engine], ranks) for engine in engines},
                         "answer": str(answer), "started_at": time.time()})  # fmt: skip
    env = {**os.environ, **OFFLINE, "PYTHONPATH": python_path(setting.newest)}
    if not cuda():
        env["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, __file__, str(request)]
    if ranks == 1:
        env["CUDA_VISIBLE_DEVICES"] = "0"  # else Trainer would divide each batch over the GPUs it sees
    else:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    with log.open("wb") as sink:
        problem = torchrun(command, env, sink, 2 * len(engines) * setting.timeout_s)
    done = read_json(answer) if answer.is_file() else {}
    tail = log.read_text(errors="replace").splitlines()[-60:]
    shown = ["python", *(os.path.relpath(part) if part == __file__ else part for part in command[1:])]
    for engine in engines:
        for experts in (STOCK, OURS):
            row = {**cell(family, engine, experts, ranks), "source": os.path.relpath(spec.source), "command": shown}
            found = done.get(engine, {}).get(experts)
            if found is None:
                yield {**row, "ok": False, "error": problem or "no answer", "tail": tail}
                continue
            timed = found["step_ms"][setting.warmup : -PROFILED]
            yield {
                **row,
                "ok": True,
                "error": "",
                **times(timed, tokens_of(spec.config)),
                **{key: found[key] for key in KEPT},
                **seen(watched(answer, engine, experts)),
            }


def watched(answer: Path, engine: str, experts: str) -> Path:
    """The folder that Watch writes into."""
    return answer.parent / engine.replace(" ", "-") / experts


def torchrun(command: Sequence[str], env: dict[str, str], sink: IO[bytes], timeout_s: float) -> str:
    """Run the ranks; what went wrong, or nothing.

    Each rank is a session of its own, which on some systems outlives torchrun and would slow what is measured next:
    torchrun is asked to end, and ends them.
    """
    child = subprocess.Popen(command, env=env, stdout=sink, stderr=subprocess.STDOUT)
    try:
        code = child.wait(timeout_s)
        return f"exit code {code}" if code else ""
    except subprocess.TimeoutExpired:
        return f"stopped after {timeout_s:.0f} s"
    finally:
        if child.poll() is None:
            child.terminate()
            try:
                child.wait(STOP_S)
            except subprocess.TimeoutExpired:
                child.kill()


def work(request: Row) -> None:
    """One rank: train every layout with either kind of experts, and let rank 0 write what was seen after each."""
    import torch
    import torch.distributed as dist

    import moe_kernels.integrations.transformers as mk

    end_with_parent()
    rank, ranks = place()
    if cuda():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if ranks > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda() else "gloo")
    mk.register(backend="auto" if cuda() else "torch")
    config, steps = request["config"], request["steps"]
    data = token_blocks(config, steps * ranks * int(config["micro_batch_size"]))
    answer: Row = {}
    for engine, layout in request["engines"].items():
        for experts in (STOCK, OURS):
            answer.setdefault(engine, {})[experts] = train(request, engine, layout, experts, data)
            if rank == 0:
                write_json(Path(request["answer"]), answer)
            gc.collect()
            if cuda():
                torch.cuda.empty_cache()
            if ranks > 1:
                dist.barrier()
    if ranks > 1:
        dist.destroy_process_group()


def place() -> tuple[int, int]:
    """This process's rank, and the number of ranks."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def train(request: Row, engine: str, layout: dict[str, int], experts: str, data: list[Row]) -> Row:
    """One training, and what was seen of it."""
    import torch
    import torch.distributed as dist
    import transformers
    from transformers.distributed import DistributedConfig

    import moe_kernels.integrations.transformers as mk
    from moe_kernels import backends

    class Clock(transformers.TrainerCallback):
        def __init__(self) -> None:
            self.at: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if cuda():
                torch.cuda.synchronize()
            self.at.append(time.perf_counter())

    config, steps = request["config"], request["steps"]
    backends.reset_dispatch_counts()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        config["base_model"],
        local_files_only=True,
        experts_implementation=experts,
        dtype=torch.bfloat16 if config.get("bf16") else torch.float32,
        attn_implementation=config.get("attn_implementation", "sdpa"),
        **({"distributed_config": DistributedConfig(**layout)} if layout else {}),
    )
    if experts == OURS:
        mk.check_model(model)
    # Asked inside a forward pass: at rest FSDP alone has spread the experts just the same.
    held: set[int] = set()

    def look(module: Any, _: Any) -> None:
        weight = module.gate_up_proj
        held.add(int((weight.to_local() if hasattr(weight, "to_local") else weight).shape[0]))

    _, first = next(iter(mk.experts_modules(model)))
    first.register_forward_pre_hook(look)
    folder = watched(Path(request["answer"]), engine, experts)
    clock = Clock()
    watch = Watch(folder, steps, request["warmup"], *place())
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "output"),
        use_cpu=not cuda(),
        bf16=bool(config.get("bf16")),
        per_device_train_batch_size=int(config["micro_batch_size"]),
        gradient_accumulation_steps=int(config.get("gradient_accumulation_steps") or 1),
        max_steps=steps,
        learning_rate=float(config["learning_rate"]),
        lr_scheduler_type=config["lr_scheduler"],
        warmup_steps=int(config.get("warmup_steps") or 0),
        weight_decay=float(config["weight_decay"]),
        max_grad_norm=float(config["max_grad_norm"]),
        optim=config["optimizer"],
        seed=int(config["seed"]),
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    if cuda():
        torch.cuda.reset_peak_memory_stats()
    # The second kind of experts starts in ranks that are already there: no start-up to compare.
    at_start = engine == next(iter(request["engines"])) and experts == STOCK
    startup = time.time() - request["started_at"] if at_start else None
    trainer = transformers.Trainer(model, arguments, train_dataset=data, callbacks=[clock, watch])
    trainer.train()
    peak = torch.tensor(float(torch.cuda.max_memory_allocated()) if cuda() else 0.0)
    if dist.is_initialized():
        dist.all_reduce(peak, dist.ReduceOp.MAX)
    return {
        # The distance to the step before; the first has none.
        "step_ms": [1000 * (b - a) for a, b in zip(clock.at[:-1], clock.at[1:], strict=True)],
        "peak_gib": float(peak) / 2**30 or None,
        "startup_s": startup,
        "losses": [float(row["loss"]) for row in trainer.state.log_history if "loss" in row],
        "ran": f"{backends.dispatch_counts()}" if experts == OURS else "stock experts",
        "settings": {"DistributedConfig": layout, "Trainer": "bf16" if config.get("bf16") else "float32"},
        "held": f"{', '.join(map(str, sorted(held)))} of {config_experts(model)} experts in a forward pass",
    }


def config_experts(model: Any) -> int:
    """E, whatever the family calls it."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    return int(next(getattr(model.config, name) for name in names if getattr(model.config, name, None)))


def token_blocks(config: Row, count: int) -> list[Row]:
    """``count`` sequences of the run file's length, cut from its text end to end."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(config["base_model"], local_files_only=True)
    length, ids = int(config["sequence_len"]), []
    with Path(config["datasets"][0]["path"]).open(encoding="utf-8") as lines:
        for line in lines:
            ids += tokenizer(json.loads(line)["text"])["input_ids"]
            if len(ids) >= count * length:
                break
    while len(ids) < count * length:
        ids += ids
    blocks = torch.tensor(ids[: count * length]).view(count, length)
    return [{"input_ids": block, "labels": block} for block in blocks]


if __name__ == "__main__":
    work(read_json(Path(sys.argv[1])))
