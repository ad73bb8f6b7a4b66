"""The callback of the plugin: what goes into the trainer's log and into the file, and what a training survives."""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_kernels.telemetry.load import FILE_NAME, LayerLoad, Loads, read_history
from support.models import tiny_config

if importlib.util.find_spec("axolotl") is None or importlib.util.find_spec("axolotl.utils") is None:
    pytest.skip("axolotl is not installed: needs the extra [axolotl]", allow_module_level=True)

LOADS = [LayerLoad((6, 2), 8), LayerLoad((4, 0), 8)]
LOG, QUIET = SimpleNamespace(should_log=True), SimpleNamespace(should_log=False)


class FakeCounter:
    def __init__(self) -> None:
        self.layers = [SimpleNamespace(name=name, experts=2) for name in ("one", "two")]
        self.taken = 0
        self.is_open = False

    def take(self) -> Loads:
        self.taken += 1
        return Loads.of(LOADS)

    def open(self) -> None:
        self.is_open = True

    def close(self) -> None:
        self.is_open = False


class FakeTrainer:
    def __init__(self, model: Any = None) -> None:
        self.model = model
        self.metrics: list[dict[str, float]] = []

    def store_metrics(self, metrics: dict[str, float], train_eval: str) -> None:
        assert train_eval == "train"
        self.metrics.append(metrics)


def train(
    folder: Path, steps: range, trainer: Any, *, each_layer: bool = False, rank_zero: bool = True
) -> FakeCounter:
    from axolotl.integrations.moe_kernels.telemetry import RouterCallback

    counter = FakeCounter()
    callback = RouterCallback(trainer, counter, str(folder), each_layer)  # type: ignore[arg-type]
    state = SimpleNamespace(global_step=steps.start, is_world_process_zero=rank_zero)
    callback.on_train_begin(None, state, None)
    for step in steps:
        state.global_step = step + 1
        callback.on_pre_optimizer_step(None, state, None)
        callback.on_step_end(None, state, SimpleNamespace(should_log=step % 2 == 1))
    callback.on_train_end(None, state, None)
    assert not counter.is_open
    return counter


def test_reads_only_when_the_trainer_logs(tmp_path: Path) -> None:
    trainer = FakeTrainer()
    counter = train(tmp_path / "out", range(4), trainer)
    assert counter.taken == 2
    assert (
        trainer.metrics
        == [
            {
                "moe/load_imbalance": 2.0,
                "moe/load_imbalance_mean": 1.75,
                "moe/load_entropy": 0.0,
                "moe/dead_experts": 1.0,
                "moe/dropped_share": 0.25,
            }
        ]
        * 2
    )
    history = read_history(tmp_path / "out" / FILE_NAME)
    assert (history.layers, history.experts, history.steps) == (["one", "two"], [2, 2], [2, 4])
    assert [history.load(1, layer) for layer in range(2)] == LOADS


def test_the_file_is_written_while_the_device_is_busy_and_with_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from axolotl.integrations.moe_kernels import telemetry
    from axolotl.integrations.moe_kernels.telemetry import RouterCallback

    now = 100.0
    monkeypatch.setattr(telemetry, "time", SimpleNamespace(monotonic=lambda: now))
    callback = RouterCallback(FakeTrainer(), FakeCounter(), str(tmp_path), False)  # type: ignore[arg-type]
    state = SimpleNamespace(global_step=0, is_world_process_zero=True)
    steps = []
    callback.on_train_begin(None, state, None)
    for step in range(1, 7):
        callback.on_pre_optimizer_step(None, state, None)
        now += 0.4 * telemetry.SECONDS
        state.global_step = step
        callback.on_step_end(None, state, LOG)
        if step == 2:
            callback.on_save(None, state, None)
        steps.append(len(read_history(tmp_path / FILE_NAME).steps))
    assert steps == [0, 2, 2, 2, 2, 5]
    state.global_step = 7
    callback.on_step_end(None, state, LOG)
    callback.on_train_end(None, state, None)
    assert read_history(tmp_path / FILE_NAME).steps == [*range(1, 8)]


def test_a_long_training_has_few_records_and_all_rows(tmp_path: Path) -> None:
    from axolotl.integrations.moe_kernels.telemetry import RouterCallback

    trainer = FakeTrainer()
    callback = RouterCallback(trainer, FakeCounter(), str(tmp_path), False)  # type: ignore[arg-type]
    state = SimpleNamespace(global_step=0, is_world_process_zero=True)
    callback.on_train_begin(None, state, None)
    for state.global_step in range(1, 1001):
        callback.on_step_end(None, state, LOG)
        if state.global_step == 777:
            callback.on_save(None, state, None)
    callback.on_train_end(None, state, None)
    assert len(trainer.metrics) == 1000
    history = read_history(tmp_path / FILE_NAME)
    assert history.steps[:101] == [*range(1, 101), 102]
    assert 777 in history.steps
    assert history.steps[-2:] == [992, 1000], "the next would be due at 1003"
    assert len(history.steps) == 293
    assert [history.sum(layer) for layer in range(2)] == [LayerLoad((6000, 2000), 8000), LayerLoad((4000, 0), 8000)]


def test_a_save_has_its_own_record_and_the_log_covers_it(tmp_path: Path) -> None:
    """A training that resumes from step 3 finds all rows up to there, and none of them twice."""
    from axolotl.integrations.moe_kernels.telemetry import RouterCallback

    trainer = FakeTrainer()
    callback = RouterCallback(trainer, FakeCounter(), str(tmp_path), False)  # type: ignore[arg-type]
    state = SimpleNamespace(global_step=0, is_world_process_zero=True)
    callback.on_train_begin(None, state, None)
    for step, counted, log, save in (
        (1, [LayerLoad((1, 0), 1), LayerLoad((1, 1), 2)], False, False),
        (3, [LayerLoad((3, 1), 4), LayerLoad((2, 2), 4)], False, True),  # with what step 1 counted
        (4, [LayerLoad((1, 3), 4), LayerLoad((4, 0), 4)], True, True),
        (5, [LayerLoad((2, 2), 4), LayerLoad((2, 2), 4)], False, False),
    ):
        callback.counter.take = lambda counted=counted: Loads.of(counted)  # type: ignore[method-assign]
        state.global_step = step
        callback.on_step_end(None, state, LOG if log else QUIET)
        if save:
            callback.on_save(None, state, None)
            assert read_history(tmp_path / FILE_NAME).steps[-1] == step
    [logged] = trainer.metrics
    assert logged["moe/load_imbalance"] == 1.5, "(6, 2) of the second layer, (4, 4) of the first"
    callback.on_train_end(None, state, None)
    history = read_history(tmp_path / FILE_NAME)
    assert (history.steps, history.rows) == ([3, 4, 5], [[4, 4], [4, 4], [4, 4]])


def test_logging_by_epoch(tmp_path: Path) -> None:
    """The trainer then asks for a log at the end of an epoch, not of a step."""
    from axolotl.integrations.moe_kernels.telemetry import RouterCallback

    trainer = FakeTrainer()
    callback = RouterCallback(trainer, FakeCounter(), str(tmp_path), False)  # type: ignore[arg-type]
    state = SimpleNamespace(global_step=0, is_world_process_zero=True)
    callback.on_train_begin(None, state, None)
    state.global_step = 2
    callback.on_step_end(None, state, QUIET)
    callback.on_epoch_end(None, state, LOG)
    callback.on_save(None, state, None)
    assert len(trainer.metrics) == 1
    assert read_history(tmp_path / FILE_NAME).steps == [2]


def test_each_layer_on_request(tmp_path: Path) -> None:
    trainer = FakeTrainer()
    train(tmp_path, range(2), trainer, each_layer=True)
    [found] = trainer.metrics
    assert len(found) == 5 + 2 * 4
    assert found["moe/layer_00/load_imbalance"] == 1.5
    assert found["moe/layer_01/load_entropy"] == 0.0
    assert found["moe/layer_01/dead_experts"] == 1.0
    assert found["moe/layer_01/dropped_share"] == 0.5


def test_a_new_training_replaces_the_file_and_a_resumed_one_goes_on(tmp_path: Path) -> None:
    train(tmp_path, range(6), FakeTrainer())
    train(tmp_path, range(4), FakeTrainer())
    assert read_history(tmp_path / FILE_NAME).steps == [2, 4]
    train(tmp_path, range(2, 6), FakeTrainer())
    assert read_history(tmp_path / FILE_NAME).steps == [2, 4, 6]


def test_one_process_writes(tmp_path: Path) -> None:
    assert train(tmp_path, range(2), FakeTrainer(), rank_zero=False).taken == 1, "all processes take part in the sum"
    assert not (tmp_path / FILE_NAME).exists()


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    logging.getLogger("axolotl").propagate = True
    caplog.set_level(logging.INFO)
    return caplog


def test_a_full_disk_ends_the_file_and_not_the_training(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    (tmp_path / FILE_NAME).symlink_to(full)
    trainer = FakeTrainer()
    train(tmp_path, range(4), trainer)
    assert len(trainer.metrics) == 2
    assert log.text.count("is not written to") == 1


def test_a_trainer_without_metrics_gets_the_file_and_is_told(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    train(tmp_path, range(2), SimpleNamespace())
    assert read_history(tmp_path / FILE_NAME).steps == [2]
    assert "keeps no metrics of callbacks" in log.text


@pytest.mark.parametrize(
    ("config", "warns"),
    [
        ({"router_aux_loss_coef": 0.001, "output_router_logits": False}, True),
        ({"router_aux_loss_coef": 0.001, "output_router_logits": True}, False),
        ({"router_aux_loss_coef": 0.0, "output_router_logits": False}, False),
        ({"output_router_logits": False}, False),
        ({"router_aux_loss_coef": 0.001}, False),
    ],
    ids=str,
)
def test_idle_balancing_loss(config: dict[str, Any], warns: bool) -> None:
    from axolotl.integrations.moe_kernels.telemetry import idle_balancing

    inner = SimpleNamespace(**config)
    words = idle_balancing(SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: inner)))  # type: ignore[arg-type]
    assert bool(words) == warns
    if words:
        assert "overrides_of_model_config: {output_router_logits: true}" in words


def test_the_key_hooks_the_model(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    from axolotl.utils.dict import DictDefault
    from transformers import MixtralForCausalLM

    from axolotl.integrations.moe_kernels import MoeOptimizedPlugin

    config = tiny_config("mixtral", num_hidden_layers=1)
    model, plugin = MixtralForCausalLM(config).train(), MoeOptimizedPlugin()
    # Without moe_kernels: true, for it counts whatever runs the experts.
    cfg = DictDefault(moe_router_telemetry=True, output_dir=str(tmp_path))
    plugin.post_model_load(cfg | {"rl": "dpo"}, model)
    assert "load-balancing" not in log.text, "TRL adds the loss whatever the model's configuration says"
    plugin.post_model_load(cfg, model)
    plugin.post_model_load(cfg, MixtralForCausalLM(config).eval())
    assert "the load-balancing loss is not part of the training" in log.text
    trainer = FakeTrainer(model)
    [callback] = plugin.add_callbacks_post_trainer(cfg, trainer)
    for _ in range(2):  # trainer.train() twice
        state = SimpleNamespace(global_step=0, is_world_process_zero=True)
        callback.on_train_begin(None, state, None)
        model(input_ids=torch.arange(8)[None])
        state.global_step = 1
        callback.on_step_end(None, state, LOG)
        callback.on_train_end(None, state, None)
        assert read_history(tmp_path / FILE_NAME).rows == [[16]]
        assert trainer.metrics.pop()["moe/dropped_share"] == 0.0
    assert json.loads((tmp_path / FILE_NAME).read_text().splitlines()[1])["layers"] == ["model.layers.0.mlp.experts"]


def test_a_real_training_that_resumes_loses_no_row(tmp_path: Path) -> None:
    from transformers import MixtralForCausalLM, Trainer, TrainingArguments

    from axolotl.integrations.moe_kernels.telemetry import RouterCallback
    from moe_kernels.telemetry.counter import RouterCounter

    config = tiny_config("mixtral", num_hidden_layers=1)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=5, logging_steps=3, save_steps=2, per_device_train_batch_size=1, use_cpu=True,
        report_to=[], disable_tqdm=True,
    )  # fmt: skip
    data = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 8
    for start in (None, None, str(tmp_path / "checkpoint-2")):
        trainer = Trainer(MixtralForCausalLM(config), arguments, train_dataset=data)
        trainer.add_callback(RouterCallback(trainer, RouterCounter(trainer.model), str(tmp_path), False))
        trainer.train(resume_from_checkpoint=start)
        history = read_history(tmp_path / FILE_NAME)
        assert (history.steps, history.rows) == ([2, 3, 4, 5], [[32], [16], [16], [16]])
