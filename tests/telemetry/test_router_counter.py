"""Counting the routing of a model: the numbers against a plain count, once for each token, without waiting."""

from __future__ import annotations

import copy
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_kernels.integrations.transformers import experts_modules
from moe_kernels.telemetry.counter import _MOST, RouterCounter, _Layer, _layer
from moe_kernels.telemetry.load import LayerLoad, Loads
from support.models import tiny_config, tiny_model

E, K, LAYERS = 4, 2, 3


@pytest.fixture
def model(device: torch.device) -> Any:
    return tiny_model(tiny_config("mixtral", num_hidden_layers=LAYERS)).to(device).train()


def seen_ids(model: Any) -> list[list[torch.Tensor]]:
    """What each router chose, noted by hooks of its own on the experts modules, all calls."""
    noted: list[list[torch.Tensor]] = []
    for _, module in experts_modules(model):
        calls: list[torch.Tensor] = []
        noted.append(calls)
        module.register_forward_pre_hook(lambda module, args, calls=calls: calls.append(args[1].detach().cpu()))
    return noted


def plain_count(calls: list[torch.Tensor]) -> tuple[int, ...]:
    counted = Counter(int(one) for ids in calls for one in ids.flatten().tolist())
    return tuple(counted[expert] for expert in range(E))


def step(model: Any, tokens: int = 12) -> None:
    ids = torch.randint(0, 64, (2, tokens), device=model.device)
    model(input_ids=ids, labels=ids).loss.backward()


def test_counts_are_those_of_a_plain_count(model: Any) -> None:
    counter, noted = RouterCounter(model), seen_ids(model)
    step(model)
    step(model, 7)
    loads = counter.take().layers()
    assert [layer.name for layer in counter.layers] == [f"model.layers.{n}.mlp.experts" for n in range(LAYERS)]
    for load, calls in zip(loads, noted, strict=True):
        assert load == LayerLoad(plain_count(calls), 2 * (12 + 7) * K)
    assert [load.rows for load in counter.take().layers()] == [0] * LAYERS, "reading starts again"


def test_a_copy_of_the_model_does_not_count(model: Any) -> None:
    """It has the hooks of the model that it was copied from."""
    counter = RouterCounter(model)
    step(copy.deepcopy(model))
    assert [load.rows for load in counter.take().layers()] == [0] * LAYERS
    step(model)
    assert [load.rows for load in counter.take().layers()] == [2 * 12 * K] * LAYERS


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputed_forward_is_not_counted_again(model: Any, reentrant: bool) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    counter, noted = RouterCounter(model), seen_ids(model)
    step(model)
    assert [len(calls) for calls in noted] == [2] * LAYERS, "the layers must have been recomputed"
    assert counter.take().layers() == [LayerLoad(plain_count(calls[:1]), 2 * 12 * K) for calls in noted]


@pytest.mark.parametrize("checkpointing", [None, "reentrant", "other"])
def test_a_pass_without_gradients_is_not_counted(model: Any, checkpointing: str | None) -> None:
    """The reference pass of DPO: the same model in training mode, after the pass that is trained on or before it."""
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    counter, noted = RouterCounter(model), seen_ids(model)
    calls_of_one = 2 if checkpointing else 1
    for reading in range(2):
        trained: list[list[torch.Tensor]] = [[] for _ in range(LAYERS)]
        for reference_first in (True, False, True):  # accumulated gradients, each of another length
            ids = torch.randint(0, 64, (2, 5 + reading + 2 * reference_first), device=model.device)
            other = torch.randint(0, 64, (1, 9), device=model.device)
            if reference_first:
                with torch.no_grad():
                    model(input_ids=other)
            loss = model(input_ids=ids, labels=ids).loss
            if not reference_first:
                with torch.no_grad():
                    model(input_ids=other)
            with torch.inference_mode():
                model(input_ids=other)
            loss.backward()
            for kept, calls in zip(trained, noted, strict=True):
                own = [call for call in calls if call.shape[0] == ids.numel()]
                assert len(own) == calls_of_one
                kept.append(own[0])
                calls.clear()
        assert counter.take().layers() == [
            LayerLoad(plain_count(calls), sum(call.numel() for call in calls)) for calls in trained
        ]


def test_evaluation_is_not_counted(model: Any) -> None:
    counter = RouterCounter(model)
    model.eval()
    step(model)
    assert [load.rows for load in counter.take().layers()] == [0] * LAYERS


def test_closed_counter_counts_nothing(model: Any) -> None:
    counter = RouterCounter(model)
    counter.close()
    step(model)
    assert [load.rows for load in counter.take().layers()] == [0] * LAYERS
    counter.open()
    step(model)
    counter.open()  # what a training that broke had counted is forgotten
    counter.open()
    step(model)
    assert [load.rows for load in counter.take().layers()] == [2 * 12 * K] * LAYERS


def test_what_peft_keeps_beside_its_copy_is_no_layer(model: Any) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["experts"]))
    counter = RouterCounter(model)
    assert len(counter.layers) == LAYERS
    step(model)
    assert [load.rows for load in counter.take().layers()] == [2 * 12 * K] * LAYERS


def test_models_without_experts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Linear has no experts module .* moe_router_telemetry: false"):
        RouterCounter(torch.nn.Linear(1, 1))


@pytest.mark.parametrize("experts", [1, 2, 3, 8, 60, 256, 4096])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_every_id_lands_in_its_own_counter(experts: int, dtype: torch.dtype, device: torch.device) -> None:
    outside = [-1, -7, experts, experts + 1, 2**31 - 1, -(2**31)]
    outside += [2**40, -(2**62)] if dtype == torch.int64 else []
    ids = torch.tensor([*range(experts), experts - 1, *outside], dtype=dtype, device=device)
    counter = _counter_of(_Layer("", experts, experts))
    counter.count(0, ids)
    counter.count(0, ids[: experts + 1].expand(2, -1))
    assert counter.take().layers() == [LayerLoad((3,) * (experts - 1) + (6,), ids.numel() + 2 * (experts + 1))]


def test_many_calls_between_two_readings_keep_few_histograms(device: torch.device) -> None:
    counter = _counter_of(_Layer("", 3, 3), _Layer("never called", 2, 2))
    for call in range(3 * _MOST):
        counter.count(0, torch.tensor([call % 3, 2], device=device))
        assert all(len(histograms) <= _MOST for histograms in counter._histograms.values())
    assert counter.take().layers() == [LayerLoad((_MOST, _MOST, 4 * _MOST), 6 * _MOST), LayerLoad((0, 0), 0)]
    assert counter.take().layers() == [LayerLoad((0, 0, 0), 0), LayerLoad((0, 0), 0)]


def test_layers_of_different_shapes_and_experts(device: torch.device) -> None:
    """Layers that are alike are counted together, the others beside them; a layer that is left out has nothing."""
    counter = _counter_of(*(_Layer("", experts, experts) for experts in (3, 5, 3, 4, 3)))
    chosen = {0: [0, 2], 1: [4, 4], 2: [2, 3], 4: [1, 1, -1]}
    for number, ids in chosen.items():
        counter.count(number, torch.tensor(ids, device=device))
    assert [load.tokens for load in counter.take().layers()] == [
        (1, 0, 1), (0, 0, 0, 0, 2), (0, 0, 1), (0, 0, 0, 0), (0, 2, 0),
    ]  # fmt: skip


def test_a_forward_pass_that_ends_early_counts_once(device: torch.device) -> None:
    counter = _counter_of(_Layer("", 2, 2), _Layer("", 2, 2))
    for _ in range(3):
        counter.count(0, torch.tensor([0, 1], device=device))
    assert counter.take().layers() == [LayerLoad((3, 3), 6), LayerLoad((0, 0), 0)]


def test_ids_that_change_in_place_are_refused(device: torch.device) -> None:
    counter = _counter_of(_Layer("model.experts", 2, 2), _Layer("", 2, 2))
    ids = torch.tensor([0, 1], device=device)
    counter.count(0, ids)
    ids.clamp_(max=0)
    with pytest.raises(
        RuntimeError, match=r"model.experts changes its expert ids in place.* moe_router_telemetry: false"
    ):
        counter.count(1, torch.tensor([0, 1], device=device))


@pytest.mark.gpu
def test_counting_waits_for_nothing() -> None:
    counter = _counter_of(_Layer("", 8, 8), _Layer("", 8, 8))
    ids = torch.randint(0, 8, (4096, 2), device="cuda")
    counter.count(0, ids)
    counter.count(1, ids)  # what is made once is made here
    torch.cuda.set_sync_debug_mode("error")
    try:
        for call in range(4 * _MOST):
            counter.count(call % 2, ids)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_under_compile(model: Any) -> None:
    counter, noted = RouterCounter(model), seen_ids(model)
    compiled = torch.compile(model, backend="eager")
    ids = torch.randint(0, 64, (2, 12), device=model.device)
    compiled(input_ids=ids, labels=ids).loss.backward()
    assert counter.take().layers() == [LayerLoad(plain_count(calls), 2 * 12 * K) for calls in noted]


def _counter_of(*layers: _Layer) -> RouterCounter:
    counter = RouterCounter.__new__(RouterCounter)
    counter._begin([*layers])
    return counter


def _counter_of_rank(rank: int) -> RouterCounter:
    """Two experts a rank, parallel over two ranks, twice; beside a layer that every rank holds whole."""
    counter = _counter_of(_Layer("parallel", 4, 2), _Layer("whole", 3, 3), _Layer("never called", 4, 2))
    local = torch.tensor([[0, 1], [0, 3], [0, 2]]) - 2 * (rank % 2)
    counter.count(0, torch.where((local < 0) | (local > 1), 2, local))
    counter.count(1, torch.full((1, 2), rank % 3))
    return counter


def test_ranks_are_added_up_and_local_ids_put_in_their_place(monkeypatch: pytest.MonkeyPatch) -> None:
    total = torch.zeros(4 + 3 + 4 + 3, dtype=torch.int64)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", total.add_)
    for rank in range(4):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        _counter_of_rank(rank).take()
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda mine: mine.copy_(total))
    loads = _counter_of_rank(3).take()
    # Two replicas saw three tokens each; the four ranks of the whole layer one token each.
    assert loads.layers() == [LayerLoad((6, 2, 2, 2), 12), LayerLoad((4, 2, 2), 8), LayerLoad((0,) * 4, 0)]
    assert loads.numbers().dropped_share[0] == 0.0


def test_ranks_of_tensor_parallelism_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four ranks, two of them with the same tokens; beside a layer whose experts those two share."""
    total = torch.zeros(3 + 1 + 4 + 1, dtype=torch.int64)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)

    def counted(rank: int) -> RouterCounter:
        counter = RouterCounter.__new__(RouterCounter)
        counter._begin([_Layer("whole", 3, 3), _Layer("shared", 4, 2)], tensor_parallel=2)
        counter.count(0, torch.tensor([[rank // 2, 2]]))
        counter.count(1, torch.tensor([[0, 2]] if rank % 2 else [[2, 1]]))
        return counter

    for rank in range(4):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(torch.distributed, "all_reduce", total.add_)
        counted(rank).take()
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda mine: mine.copy_(total))
    assert counted(3).take().layers() == [LayerLoad((1, 1, 2), 4), LayerLoad((0, 2, 2, 0), 4)]


def test_tensor_parallelism_is_read_from_the_model(model: Any) -> None:
    assert RouterCounter(model)._tensor_parallel == 1
    distributed = pytest.importorskip("transformers.distributed")
    model.config.distributed_config = distributed.DistributedConfig(tp_size=2)  # as from_pretrained leaves it
    assert RouterCounter(model)._tensor_parallel == 2


def test_which_ids_a_module_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SimpleNamespace(n_routed_experts=8)
    module = SimpleNamespace(num_experts=2, config=config)
    assert _layer("alone", module) == _Layer("alone", 2, 2)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert _layer("transformers", module) == _Layer("transformers", 8, 2)
    assert _layer("whole", SimpleNamespace(num_experts=8, config=config)) == _Layer("whole", 8, 8)
    module.num_experts_global = 8
    assert _layer("axolotl", module) == _Layer("axolotl", 8, 8)


def test_numbers_of_layers() -> None:
    layers = [((5, 5, 5, 5), 20), ((0, 20, 0, 0), 40), ((10, 10, 0, 0), 20), ((0, 0), 0)]
    numbers = Loads.of([LayerLoad(*layer) for layer in layers]).numbers()
    assert numbers.imbalance == [1.0, 4.0, 2.0, 1.0]
    assert numbers.entropy == pytest.approx([1.0, 0.0, 0.5, 1.0])
    assert numbers.dead == [0, 3, 2, 2]
    assert numbers.dropped_share == [0.0, 0.5, 0.0, 0.0]
