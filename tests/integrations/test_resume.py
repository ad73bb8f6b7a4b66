"""A training resumed by transformers' Trainer is the one that was never interrupted, to the bit, or is refused.

The file passes on transformers 5.16.1 and on the newest release alike.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
mk = pytest.importorskip("moe_kernels.integrations.transformers")

from support.models import COMMON, tiny_config  # noqa: E402

# Of qwen3_moe a checkpoint holds one weight per expert, of mixtral its router has another name too, of deepseek_v3
# the bias of the router is a buffer; gpt_oss is stacked in the checkpoint as in the model: nothing to convert.
FAMILIES = ("qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss")
STEPS, SAVED_AT = 4, 2


class Runs:
    """Trainings in one folder, all from the same base model and on the same data."""

    def __init__(self, folder: Path, config: Any, experts: str = "moe_kernels") -> None:
        self.folder, self.experts = folder, experts
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "base")
        ids = torch.randint(config.vocab_size, (32, 11), generator=torch.Generator().manual_seed(1))
        self.data = [{"input_ids": row, "labels": row} for row in ids]

    def model(self) -> Any:
        mk.register(backend="torch")
        model = transformers.AutoModelForCausalLM.from_pretrained(
            self.folder / "base", experts_implementation=self.experts
        )
        if self.experts == "moe_kernels":
            mk.check_model(model)
        return model

    def trainer(self, name: str, model: Any = None, **changes: Any) -> Any:
        arguments = {
            "output_dir": str(self.folder / name),
            "max_steps": STEPS,
            "save_steps": SAVED_AT,
            "logging_steps": 1,
            "per_device_train_batch_size": 2,
            "learning_rate": 0.02,
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
        }
        return transformers.Trainer(
            self.model() if model is None else model,
            transformers.TrainingArguments(**(arguments | changes)),
            train_dataset=self.data,
            eval_dataset=self.data[:4],
        )

    def train(self, name: str, resume: Path | None = None, **changes: Any) -> Any:
        trainer = self.trainer(name, **changes)
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        return trainer

    def checkpoint(self, name: str, step: int = SAVED_AT) -> Path:
        return self.folder / name / f"checkpoint-{step}"


def losses(trainer: Any) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def states(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def differing(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    assert actual.keys() == expected.keys()
    return [name for name, tensor in expected.items() if not torch.equal(actual[name], tensor)]


def assert_goes_on(resumed: Any, whole: Any) -> None:
    """Loss curve, weights and the state of the optimizer, to the bit."""
    assert losses(resumed) == losses(whole)
    assert len(losses(whole)) == STEPS
    assert not differing(states(resumed), states(whole))
    actual, expected = resumed.optimizer.state_dict(), whole.optimizer.state_dict()
    assert actual["param_groups"] == expected["param_groups"]
    assert actual["state"].keys() == expected["state"].keys()
    for index, state in expected["state"].items():
        assert not differing(actual["state"][index], state), index


@pytest.mark.parametrize("experts", ["moe_kernels", "grouped_mm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_resumed_training_is_the_uninterrupted_one(family: str, experts: str, tmp_path: Path) -> None:
    runs = Runs(tmp_path, tiny_config(family), experts)
    whole = runs.train("whole")
    assert_goes_on(runs.train("resumed", resume=runs.checkpoint("whole")), whole)
    base = runs.model().state_dict()
    moved = differing(states(whole), base)
    assert [name for name in base if "experts." in name and name not in moved and "bias" not in name] == [], (
        "a load that left experts alone would not show"
    )


@pytest.mark.parametrize("changes", [{"dtype": "bfloat16"}, {"tie_word_embeddings": True}], ids=str)
def test_bfloat16_and_tied_embeddings(changes: dict[str, Any], tmp_path: Path) -> None:
    runs = Runs(tmp_path, tiny_config("qwen3_moe", **changes))
    whole = runs.train("whole")
    assert_goes_on(runs.train("resumed", resume=runs.checkpoint("whole")), whole)


def test_a_model_that_was_never_loaded(tmp_path: Path) -> None:
    """Trained from scratch, it has no record of the conversions that its checkpoints go through."""
    runs = Runs(tmp_path, tiny_config("mixtral"))

    def fresh() -> Any:
        torch.manual_seed(5)
        return transformers.AutoModelForCausalLM.from_config(
            tiny_config("mixtral"), experts_implementation="moe_kernels"
        )

    mk.register(backend="torch")
    whole = runs.train("whole", model=fresh())
    assert_goes_on(runs.train("resumed", resume=runs.checkpoint("whole"), model=fresh()), whole)


@pytest.mark.parametrize("kind", ["shards", "bin", "bin shards"])
def test_other_files(kind: str, tmp_path: Path) -> None:
    """The experts of a layer lie in several files; and as torch's own files, of earlier releases."""
    runs = Runs(tmp_path, tiny_config("qwen3_moe"))
    whole = runs.train("whole")
    checkpoint = runs.checkpoint("whole")
    tensors = safetensors.torch.load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    save, ending = (
        (torch.save, "pytorch_model{}.bin") if "bin" in kind else (safetensors.torch.save_file, "model{}.safetensors")
    )
    if "shards" in kind:
        index = {name: ending.format(f"-{number % 3}") for number, name in enumerate(tensors)}
        for file in set(index.values()):
            save({name: tensors[name] for name in tensors if index[name] == file}, checkpoint / file)
        (checkpoint / f"{ending.format('')}.index.json").write_text(json.dumps({"weight_map": index}))
    else:
        save(tensors, checkpoint / ending.format(""))
    assert_goes_on(runs.train("resumed", resume=checkpoint), whole)


def test_the_best_model_is_loaded_whole(tmp_path: Path) -> None:
    # By the largest loss, the best checkpoint of a training that learns is the first; a smaller model learns here.
    runs = Runs(tmp_path, tiny_config("mixtral", hidden_size=32, intermediate_size=24))
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    trained = runs.train("best", eval_strategy="steps", eval_steps=SAVED_AT, **best)
    assert trained.state.best_model_checkpoint == str(runs.checkpoint("best"))
    expected = transformers.AutoModelForCausalLM.from_pretrained(runs.checkpoint("best"))
    assert not differing(states(trained), expected.state_dict())
    last = transformers.AutoModelForCausalLM.from_pretrained(runs.checkpoint("best", STEPS))
    assert differing(states(trained), last.state_dict())


def test_a_compiled_model(tmp_path: Path) -> None:
    """Trainer saves the model inside, whose names are not those of the compiled one."""
    runs = Runs(tmp_path, tiny_config("mixtral"))

    def train(name: str, resume: Path | None = None) -> Any:
        model = torch.compile(runs.model(), backend="eager")
        return runs.train(name, resume, model=model, remove_unused_columns=False)

    whole = train("whole")
    assert_goes_on(train("resumed", runs.checkpoint("whole")), whole)


def test_weights_are_written_in_place(tmp_path: Path) -> None:
    """An optimizer that the user made before holds the parameters themselves."""
    runs = Runs(tmp_path, tiny_config("qwen3_moe"))
    runs.train("whole")
    trainer = runs.trainer("resumed")
    before = dict(trainer.model.named_parameters())
    trainer._load_from_checkpoint(str(runs.checkpoint("whole")))
    after = dict(trainer.model.named_parameters())
    assert all(after[name] is parameter and parameter.requires_grad for name, parameter in before.items())
    expected = transformers.AutoModelForCausalLM.from_pretrained(runs.checkpoint("whole"))
    assert not differing(states(trainer), expected.state_dict())


def test_lora_goes_on(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    runs = Runs(tmp_path, tiny_config("qwen3_moe"))

    def adapted() -> Any:
        torch.manual_seed(7)
        lora = peft.LoraConfig(
            r=4,
            target_modules=["q_proj"],
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            init_lora_weights=False,
        )
        model = peft.get_peft_model(runs.model(), lora)
        mk.check_model(model)
        return model

    start = adapted().state_dict()
    whole = runs.train("whole", model=adapted())
    assert_goes_on(runs.train("resumed", resume=runs.checkpoint("whole"), model=adapted()), whole)
    moved = differing(states(whole), start)
    assert any("experts" in name and "lora_B" in name for name in moved)


def refused(runs: Runs, match: str, model: Any = None) -> None:
    trainer = runs.trainer("resumed", model)
    steps = []
    trainer.training_step = lambda *_, **__: steps.append(1)
    with pytest.raises(ValueError, match=match):
        trainer.train(resume_from_checkpoint=str(runs.checkpoint("whole")))
    assert not steps


GAPS = {
    "mlp.experts.3.up_proj": "experts.gate_up_proj cannot be made of model.layers.0.mlp.experts.0.gate_proj.weight",
    "mlp.experts.3.": r"experts.down_proj as \(11, 40, 24\), the model as Tensor \(12, 40, 24\)",
    "mlp.experts.": "holds nothing for 4 weights",
    "q_proj": "holds nothing for 2 weights .*model.layers.0.self_attn.q_proj.weight",
}


@pytest.mark.parametrize("lost", GAPS)
def test_a_checkpoint_with_a_gap_is_refused(lost: str, tmp_path: Path) -> None:
    runs = Runs(tmp_path, tiny_config("qwen3_moe"))
    runs.train("whole")
    file = runs.checkpoint("whole") / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    safetensors.torch.save_file({name: tensor for name, tensor in tensors.items() if lost not in name}, file)
    refused(runs, GAPS[lost])


def test_a_checkpoint_of_stacked_experts_with_a_gap_is_refused(tmp_path: Path) -> None:
    """Here nothing is converted, and Trainer would only log the gap."""
    runs = Runs(tmp_path, tiny_config("gpt_oss"))
    runs.train("whole")
    file = runs.checkpoint("whole") / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    safetensors.torch.save_file(
        {name: t for name, t in tensors.items() if "1.mlp.experts.down_proj" not in name}, file
    )
    refused(runs, "holds nothing for .*model.layers.1.mlp.experts.down_proj")


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    runs = Runs(tmp_path, tiny_config("qwen3_moe"))
    runs.train("whole")
    other = tiny_config("qwen3_moe", num_experts=6)
    refused(runs, "resume with the model", transformers.AutoModelForCausalLM.from_config(other))


def test_a_checkpoint_without_optimizer_is_refused(tmp_path: Path) -> None:
    runs = Runs(tmp_path, tiny_config("qwen3_moe"))
    runs.train("whole", save_only_model=True)
    refused(runs, r"checkpoint-2 holds no state of the optimizer .* name the folder as the model instead")


def test_an_unknown_transformers_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs(tmp_path, tiny_config("qwen3_moe"))
    runs.train("whole")
    model = runs.model()
    monkeypatch.delattr("transformers.core_model_loading.rename_source_key")
    refused(runs, "does not know how transformers .* converts", model)


def test_a_trainer_that_loads_right_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a later release of transformers will: ours on top of it gives the same."""
    runs = Runs(tmp_path, tiny_config("mixtral"))
    whole = runs.train("whole")

    def right(self: Any, resume_from_checkpoint: str, model: Any = None) -> None:
        loaded = transformers.AutoModelForCausalLM.from_pretrained(resume_from_checkpoint)
        (self.model if model is None else model).load_state_dict(loaded.state_dict())

    monkeypatch.setattr(transformers.Trainer, "_load_from_checkpoint", right)
    monkeypatch.setattr(transformers.Trainer, "_load_best_model", transformers.Trainer._load_best_model)
    mk.register(backend="torch")
    assert transformers.Trainer._load_from_checkpoint is not right
    assert_goes_on(runs.train("resumed", resume=runs.checkpoint("whole")), whole)


def test_models_without_experts_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = transformers.LlamaConfig(**COMMON)
    runs = Runs(tmp_path, dense, "eager")
    whole = runs.train("whole", save_only_model=True)
    monkeypatch.setattr("moe_kernels.integrations.resume._load", None)
    resumed = runs.train("resumed", resume=runs.checkpoint("whole"))
    assert len(losses(resumed)) == len(losses(whole))


def test_registering_again_wraps_once() -> None:
    mk.register(backend="torch")
    mended = transformers.Trainer._load_from_checkpoint
    mk.register(backend="torch", name="another")
    assert transformers.Trainer._load_from_checkpoint is mended
