"""What the ranks of tests/distributed run: ``torchrun workers.py FOLDER SCENARIO...`` writes ``FOLDER/rank<r>.pt``.

Every scenario trains the tiny model of each family on ranks that talk gloo, and the same model whole, in this
process and on transformers' own experts; the test compares what both report.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

import moe_kernels.integrations.transformers as mk
from moe_kernels import backends
from moe_kernels.shapes import FAMILIES
from moe_kernels.telemetry.counter import RouterCounter
from moe_kernels.tools.check.allocations import poisoned_allocations
from moe_kernels.tools.compare.weights import checksum, draw_adapter
from moe_kernels.tools.prepare.models import model_config

STEPS = 4
BASELINE, OURS = "grouped_mm", "moe_kernels"
GPT_OSS = "gpt-oss"
Batch = torch.Tensor


def build(family: str, experts: str, size: str = "tiny", layers: int | None = None) -> Any:
    """The model, on every rank with the same weights; large enough that a wrong expert shows in the loss."""
    config = gpt_oss() if family == GPT_OSS else model_config(family, size)
    config.vocab_size = 128
    config.num_hidden_layers = layers or config.num_hidden_layers
    torch.manual_seed(11)
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation=experts)
    std = 0.15 if size == "tiny" else 0.15 * (64 / config.hidden_size) ** 0.5
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, std) if parameter.dim() > 1 else parameter.uniform_(0.5, 1.5)
    if experts == OURS:
        mk.check_model(model)
    return model


def gpt_oss() -> Any:
    """Experts with biases, stored transposed, gate and up interleaved: the kernels take views of the weights."""
    return transformers.GptOssConfig(
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=2,
        num_local_experts=8,
        num_experts_per_tok=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )


def batches(steps: int = STEPS) -> list[Batch]:
    """(rank, sequence, token) ids of each step."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(128, (dist.get_world_size(), 2, 12), generator=generator) for _ in range(steps)]


def loss_of(model: Any, ids: Batch) -> torch.Tensor:
    return model(input_ids=ids, labels=ids).loss


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """Whole gradients by the parameter's name in the plain model; every rank must call this."""
    grads = {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {n: (g.full_tensor() if isinstance(g, DTensor) else g).detach().clone() for n, g in grads.items()}


def train(
    model: Any,
    data: list[Batch],
    optimizer: torch.optim.Optimizer | None = None,
    own: Callable[[Batch], Batch] | None = None,
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The loss of each step, averaged over ranks, and the whole gradients of the first one.

    ``own`` picks what this rank sees of a step's batch; None: all of it.
    """
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses: list[float] = []
    grads: dict[str, torch.Tensor] = {}
    for ids in data:
        optimizer.zero_grad()
        loss = loss_of(model, own(ids) if own else ids.flatten(0, 1))
        loss.backward()
        grads = grads or gradients(model)
        optimizer.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(float(mean) / dist.get_world_size())
    return losses, grads


def own_half(ids: Batch) -> Batch:
    return ids[dist.get_rank()]


def shard(model: Any, **options: Any) -> Any:
    """FSDP2 as accelerate applies it for TRANSFORMER_BASED_WRAP: each decoder layer, then the rest."""
    for layer in model.model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def summary(result: tuple[list[float], dict[str, torch.Tensor]]) -> dict[str, Any]:
    return {"losses": result[0], "grads": result[1], "calls": backends.dispatch_counts()}


def data_parallel(folder: Path) -> dict[str, Any]:
    """FSDP2, its bf16 policy, save and resume, and DDP, each against the whole model on one process."""
    results: dict[str, Any] = {}
    results[GPT_OSS, "whole"] = summary(train(build(GPT_OSS, BASELINE), batches()))
    results[GPT_OSS, "fsdp2"] = summary(train(shard(build(GPT_OSS, OURS)), batches(), own=own_half))
    for family in FAMILIES:
        data = batches()
        results[family, "whole"] = summary(train(build(family, BASELINE), data))

        backends.reset_dispatch_counts()
        sharded = shard(build(family, OURS))
        optimizer = torch.optim.AdamW(sharded.parameters(), lr=3e-3)
        before, grads = train(sharded, data[:2], optimizer, own_half)
        save(folder / f"{family}-checkpoint", sharded, optimizer)
        after, later_grads = train(sharded, data[2:], optimizer, own_half)
        results[family, "fsdp2"] = summary((before + after, grads))
        results[family, "not interrupted"] = summary((after, later_grads))

        resumed = shard(build(family, OURS))
        with torch.no_grad():
            for parameter in resumed.parameters():
                parameter.zero_()  # what is not in the checkpoint cannot come back
        optimizer = torch.optim.AdamW(resumed.parameters(), lr=3e-3)
        load(folder / f"{family}-checkpoint", resumed, optimizer)
        results[family, "resumed"] = summary(train(resumed, data[2:], optimizer, own_half))

        wrapped = torch.nn.parallel.DistributedDataParallel(build(family, OURS))
        results[family, "ddp"] = summary(train(wrapped, data, own=own_half))

        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for experts in (BASELINE, OURS):
            mixed = shard(build(family, experts), mp_policy=policy)
            results[family, "bf16", experts] = summary(train(mixed, data, own=own_half))
    return results


def save(folder: Path, model: Any, optimizer: torch.optim.Optimizer) -> None:
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)


def load(folder: Path, model: Any, optimizer: torch.optim.Optimizer) -> None:
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)


def no_tokens(folder: Path) -> dict[str, Any]:
    """Rank 1 gets no token: it must still take part in every collective, and add nothing.

    One sparse block, not a model: transformers' attention cannot reshape an empty batch.
    """
    results: dict[str, Any] = {}
    for family in FAMILIES:
        for name, experts in (("whole", BASELINE), ("fsdp2", OURS)):
            model = build(family, experts)
            block = model.model.layers[-1].mlp
            if experts == OURS:
                fully_shard(block)
            x = torch.randn(1, 24, model.config.hidden_size, generator=torch.Generator().manual_seed(3))
            x = (x if name == "whole" or dist.get_rank() == 0 else x[:, :0]).requires_grad_()
            block(x).square().sum().backward()
            results[family, name] = {"dx": x.grad, "grads": gradients(block)}
    return results


def expert_parallel(folder: Path) -> dict[str, Any]:
    """transformers' own expert parallelism with our experts and with its own, in each layout this version has."""
    results: dict[str, Any] = {}
    data = batches()
    for family in FAMILIES:
        path = folder / family
        whole = build(family, BASELINE)
        if dist.get_rank() == 0:
            whole.save_pretrained(path)
        dist.barrier()
        counter = RouterCounter(whole)
        results[family, "whole"] = summary(train(whole, data)) | {"routed": counter.take().tokens.tolist()}
        for layout, config, own in layouts():
            for experts in (BASELINE, OURS):
                backends.reset_dispatch_counts()
                model = from_pretrained(path, experts, config)
                held = {tuple(local(e.gate_up_proj).shape) for _, e in mk.experts_modules(model)}
                counter = RouterCounter(model.train())  # it counts what is trained
                with every_row_written():
                    found = summary(train(model, data, own=own))
                routed = counter.take().tokens.tolist()
                results[family, layout, experts] = found | {"held": held, "routed": routed}
        results[family, "starved"] = starved(path)
    return results


def every_row_written() -> AbstractContextManager[object]:
    """Before 5.19 transformers multiplies by zero what torch's grouped GEMM leaves unwritten of absent experts.

    That is NaN in the router's gradient, now and then. transformers' own fallback writes every row.
    """
    if has_ep_size():
        return nullcontext()
    return mock.patch("transformers.integrations.moe._can_use_grouped_mm", return_value=False)


def layouts() -> list[tuple[str, dict[str, Any], Callable[[Batch], Batch] | None]]:
    """(name, DistributedConfig, what a rank sees of a batch) of the ways to put experts on two ranks."""
    # Every rank holds all experts, and half of each one's width.
    tensor_parallel = ("tensor parallel", {"tp_size": 2, "tp_plan": "auto"}, None)
    if not has_ep_size():
        shared = {"tp_size": 2, "tp_plan": "auto", "enable_expert_parallel": True}
        return [tensor_parallel, ("shared batch", shared, None)]
    return [
        tensor_parallel,
        ("shared batch", {"tp_size": 2, "ep_size": 2}, None),
        ("own batch", {"fsdp_size": 2, "ep_size": 2}, own_half),
    ]


def has_ep_size() -> bool:
    """transformers 5.19 and later: tokens travel to the experts, and Trainer takes models that it sharded."""
    return "ep_size" in {field.name for field in dataclasses.fields(DistributedConfig)}


def from_pretrained(path: Path, experts: str, config: dict[str, Any] | None) -> Any:
    sharded = {"distributed_config": DistributedConfig(**config)} if config else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, experts_implementation=experts, dtype=torch.float32, **sharded
    )
    if experts == OURS:
        mk.check_model(model)
    return model


def starved(path: Path) -> dict[str, Any]:
    """A router that sends every token to the experts of rank 0: gradients of rank 1's experts, per layer."""
    _, config, own = layouts()[-1]
    model = from_pretrained(path, OURS, config)
    gate_up = [e.gate_up_proj for _, e in mk.experts_modules(model)]
    for module in model.modules():
        if hasattr(module, "gate") and hasattr(module, "experts"):
            with torch.no_grad():
                for parameter in module.gate.parameters():
                    parameter.zero_()  # equal scores: the top k are the first experts
    losses, _ = train(model, batches(1), own=own)
    return {"losses": losses, "nonzero": [int(torch.count_nonzero(local(p.grad))) for p in gate_up]}


def trainer(folder: Path) -> dict[str, Any]:
    """transformers' Trainer: DDP, and where this version trains models that it sharded itself, FSDP2 and EP."""
    layouts_here: dict[str, dict[str, Any] | None] = {"ddp": None}
    if has_ep_size():
        layouts_here |= {"fsdp2": {"fsdp_size": 2}, "ep": {"fsdp_size": 2, "ep_size": 2}}
    data = [{"input_ids": row, "labels": row} for ids in batches() for row in ids.flatten(0, 1)]
    results: dict[str, Any] = {}
    for family in FAMILIES:
        path = folder / f"{family}-trainer"
        if dist.get_rank() == 0:
            build(family, BASELINE).save_pretrained(path)
        dist.barrier()
        for layout, config in layouts_here.items():
            for experts in (BASELINE, OURS):
                backends.reset_dispatch_counts()
                losses = trainer_losses(from_pretrained(path, experts, config), data, folder)
                results[family, layout, experts] = {"losses": losses, "calls": backends.dispatch_counts()}
    return results


def trainer_losses(model: Any, data: list[Any], output: Path) -> list[float]:
    """The logged losses of a run of STEPS steps, with activation checkpointing and gradient accumulation."""
    arguments = transformers.TrainingArguments(
        output_dir=str(output),
        use_cpu=True,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        gradient_checkpointing=True,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=1,
    )
    run = transformers.Trainer(model, arguments, train_dataset=data)
    run.train()
    return [float(row["loss"]) for row in run.state.log_history if "loss" in row]


def resume(folder: Path) -> dict[str, Any]:
    """transformers' Trainer through Accelerate, stopped half-way: what it writes in each way, and reads again."""
    data = [{"input_ids": row, "labels": row} for ids in batches() for row in ids.flatten(0, 1)]
    base = folder / "resume"
    if dist.get_rank() == 0:
        build("mixtral", BASELINE).save_pretrained(base)  # its router has another name in the checkpoint as well
    dist.barrier()
    results: dict[str, Any] = {}
    for way in ("ddp", "full", "sharded"):
        whole = resumable(base, data, way, folder / way / "whole")
        checkpoint = folder / way / "whole" / f"checkpoint-{STEPS // 2}"
        resumed = resumable(base, data, way, folder / way / "resumed", checkpoint)
        results[way] = {
            "whole": whole,
            "resumed": resumed,
            "files": sorted(file.name for file in checkpoint.iterdir()),
        }
    return results


def resumable(base: Path, data: list[Any], way: str, output: Path, checkpoint: Path | None = None) -> dict[str, Any]:
    """Losses, weights and state of the optimizer after a run that is saved half-way."""
    from accelerate.state import AcceleratorState, DistributedType, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)
    sharding = {
        "version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": ["MixtralDecoderLayer"],
        "state_dict_type": f"{way.upper()}_STATE_DICT",
    }
    arguments = transformers.TrainingArguments(
        output_dir=str(output),
        use_cpu=True,
        per_device_train_batch_size=1,
        max_steps=STEPS,
        save_steps=STEPS // 2,
        learning_rate=3e-3,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        seed=1,
        **({} if way == "ddp" else {"fsdp": True, "fsdp_config": sharding}),
    )
    if way != "ddp":  # Accelerate shards where it sees several GPUs alone
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    # Accelerate's name for the CPU of a rank is "cpu:0", and torch.load knows no such place.
    with mock.patch.object(transformers.TrainingArguments, "device", torch.device("cpu")):
        run = transformers.Trainer(from_pretrained(base, OURS, None), arguments, train_dataset=data)
        run.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    state = run.optimizer.state_dict()["state"]
    return {
        "losses": [float(row["loss"]) for row in run.state.log_history if "loss" in row],
        "weights": {name: local(tensor).clone() for name, tensor in run.model.state_dict().items()},
        "optimizer": {f"{i} {name}": local(value).clone() for i in state for name, value in state[i].items()},
        "sharded": run.is_fsdp_enabled,
    }


def zero3(folder: Path) -> dict[str, Any]:
    """DeepSpeed ZeRO-3, with the sparse blocks as leaves (as Axolotl sets them) and without: of whole models, of
    adapters, and of adapters over experts in few bits."""
    import packed_ranks

    results: dict[str, Any] = {}
    for experts, leaves in ((BASELINE, True), (OURS, True), (OURS, False)):
        for family, make in itertools.product(FAMILIES, (build, adapted)):
            results[family, make.__name__, experts, leaves] = zero3_losses(make(family, experts), leaves)
    packed_ranks.write_checkpoints(folder)
    for kind in ("4 bits", "mxfp4"):  # gloo gathers no fp8
        results[kind, "packed", BASELINE, True] = zero3_losses(packed_ranks.in_float32(folder, kind), True)
        for leaves in (True, False):
            results[kind, "packed", OURS, leaves] = zero3_losses(packed_ranks.packed(folder, kind), leaves)
    return results


def zero3_losses(model: Any, leaves: bool) -> dict[str, Any]:
    import deepspeed
    from deepspeed.utils import set_z3_leaf_modules

    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    if leaves:
        set_z3_leaf_modules(model, [type(base.model.layers[-1].mlp)])
    backends.reset_dispatch_counts()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    ours = base.config._experts_implementation == OURS
    losses = []
    with no_delta() if ours else nullcontext():
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        for ids in batches():
            loss = loss_of(engine, own_half(ids))
            engine.backward(loss)
            engine.step()
            mean = loss.detach().clone()
            dist.all_reduce(mean)
            losses.append(float(mean) / dist.get_world_size())
    return {"losses": losses, "calls": backends.dispatch_counts()}


def lora(folder: Path) -> dict[str, Any]:
    """An adapter on attention and experts, the base frozen: FSDP2, its bf16 policy and DDP against PEFT's own way."""
    results: dict[str, Any] = {}
    for family in (*FAMILIES, GPT_OSS):
        data = batches()
        results[family, "whole"] = summary(train(adapted(family, BASELINE), data))
        backends.reset_dispatch_counts()
        with no_delta():
            results[family, "fsdp2"] = summary(train(shard_adapted(adapted(family, OURS)), data, own=own_half))
            wrapped = torch.nn.parallel.DistributedDataParallel(adapted(family, OURS))
            results[family, "ddp"] = summary(train(wrapped, data, own=own_half))
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for experts in (BASELINE, OURS):
            mixed = shard_adapted(adapted(family, experts), mp_policy=policy)
            results[family, "bf16", experts] = summary(train(mixed, data, own=own_half))
        results[family, "idle"] = one_idle_rank(family)
    results["drawn"] = drawn_adapters()
    return results


def drawn_adapters() -> dict[str, Any]:
    """Adapters drawn where a training starts, whole and sharded: their weights, and the checksum of the model."""
    found = {}
    for name in ("whole", "sharded"):
        model = adapted("mixtral", OURS)
        model = model if name == "whole" else shard_adapted(model)
        draw_adapter(model, seed=3)
        weights = {key: value for key, value in model.state_dict().items() if "lora_" in key}
        whole = {key: w.full_tensor() if isinstance(w, DTensor) else w for key, w in weights.items()}
        found[name] = {"weights": whole, "sum": checksum(model)}
    return found


def adapted(family: str, experts: str) -> Any:
    """The tiny model with an adapter, on every rank the same."""
    import peft

    settings = peft.LoraConfig(
        r=4,
        target_modules=["q_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        init_lora_weights=False,
    )
    model = peft.get_peft_model(build(family, BASELINE), settings)
    torch.manual_seed(12)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.15)
    model.get_base_model().set_experts_implementation(experts)
    if experts == OURS:
        mk.check_model(model)
    return model


def shard_adapted(model: Any, **options: Any) -> Any:
    """As Axolotl does it: factors of attention weights by themselves, those of experts with their decoder layer."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper

    for module in model.modules():
        if isinstance(module, LoraLayer) and not isinstance(module, ParamWrapper):
            fully_shard(module.lora_A["default"], **options)
            fully_shard(module.lora_B["default"], **options)
    shard(model.get_base_model(), **options)
    return fully_shard(model, **options)


@contextmanager
def no_delta() -> Iterator[None]:
    """Inside, forming the dense product of an adapter is an error."""
    from peft.tuners.lora.layer import ParamWrapper

    def formed(*_: Any) -> None:
        raise AssertionError("the dense delta BA was formed")

    names = [name for name in ("get_delta_weight", "get_delta_factors") if hasattr(ParamWrapper, name)]  # 0.20, 0.21
    real = {name: getattr(ParamWrapper, name) for name in names}
    try:
        for name in names:
            setattr(ParamWrapper, name, formed)
        yield
    finally:
        for name in names:
            setattr(ParamWrapper, name, real[name])


def one_idle_rank(family: str) -> dict[str, Any]:
    """One sparse block, rank 1 without a token: gradients of its adapter, by FSDP2 and whole."""
    found = {}
    for name, experts in (("whole", BASELINE), ("fsdp2", OURS)):
        model = adapted(family, experts)
        block = model.get_base_model().model.layers[-1].mlp
        if experts == OURS:
            fully_shard(block)
        hidden = model.get_base_model().config.hidden_size
        x = torch.randn(1, 24, hidden, generator=torch.Generator().manual_seed(3))
        x = (x if name == "whole" or dist.get_rank() == 0 else x[:, :0]).requires_grad_()
        out = block(x)
        (out[0] if isinstance(out, tuple) else out).square().sum().backward()
        found[name] = gradients(block)
    return found


def axolotl(folder: Path) -> dict[str, Any]:
    """Axolotl's expert parallelism, which has a file of its own: importing Axolotl takes many seconds."""
    import axolotl_ranks

    return axolotl_ranks.run(folder)


def packed(folder: Path) -> dict[str, Any]:
    """LoRA over experts in few bits, which has a file of its own too."""
    import packed_ranks

    return packed_ranks.run(folder)


SCENARIOS = {
    scenario.__name__: scenario
    for scenario in (data_parallel, no_tokens, expert_parallel, trainer, resume, zero3, lora, axolotl, packed)
}


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    mk.register(backend="torch")
    folder = Path(sys.argv[1])
    with poisoned_allocations():
        results = {name: SCENARIOS[name](folder) for name in sys.argv[2:]}
    torch.save(results, folder / f"rank{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
