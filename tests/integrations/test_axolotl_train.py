"""A real ``axolotl train`` of each tiny pair, and of the ways in which a run must fail loudly."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from moe_kernels.shapes import FAMILIES, ModelShape
from moe_kernels.telemetry.load import FILE_NAME, RouterHistory, read_history
from moe_kernels.tools.compare import runner
from support.axolotl_cli import axolotl

if importlib.util.find_spec("axolotl") is None or importlib.util.find_spec("axolotl.utils") is None:
    pytest.skip("axolotl is not installed: needs the extra [axolotl]", allow_module_level=True)

pytestmark = [pytest.mark.axolotl, pytest.mark.slow]

REPOSITORY = Path(__file__).parents[2]
STEPS = 5
# Axolotl loads the plugins of installed packages by itself.
ENTRY_POINTS = tuple(map(int, importlib.metadata.version("axolotl").split(".")[:2])) >= (0, 21)
OFFLINE = runner.OFFLINE | {"WANDB_MODE": "offline"}


@dataclass
class Training:
    """One finished ``axolotl train``."""

    returncode: int
    log: str
    project: str
    rows: list[dict[str, Any]]

    @property
    def losses(self) -> list[float]:
        return [row["train/loss"] for row in self.rows]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``moe-kernels prepare`` makes, in a directory of the tests' own."""
    from moe_kernels.tools.prepare import prepare_data, prepare_model

    root = tmp_path_factory.mktemp("train")
    prepare_data(root)
    for family in FAMILIES:
        prepare_model(family, "tiny", root)
    return root


def load_config(name: str) -> dict[str, Any]:
    import yaml

    return yaml.safe_load((REPOSITORY / "configs" / "moe" / name).read_text())


def train(
    folder: Path, name: str, config: dict[str, Any], *, command: bool = False, variables: dict[str, str] | None = None
) -> Training:
    """``axolotl train``: with ``command`` or ``variables`` of the environment as a user starts it, else forked."""
    import yaml

    from support.wandb_file import read_run

    run_folder = folder / "runs" / name
    run_folder.mkdir(parents=True)
    config = config | {
        "output_dir": str(run_folder / "out"),
        "dataset_prepared_path": str(folder / "prepared"),
    }
    (run_folder / "config.yml").write_text(yaml.safe_dump(config, sort_keys=False))
    environment = os.environ | OFFLINE | {"WANDB_DIR": str(run_folder), "HF_HOME": str(run_folder / "hf")}
    # Set by the tests for kernels under the interpreter; a user has it unset.
    environment.pop("TRITON_INTERPRET", None)
    arguments = ["train", str(run_folder / "config.yml"), "--launcher", "python"]
    if command or variables:
        done = subprocess.run(
            [sys.executable, "-m", "axolotl.cli.main", *arguments],
            cwd=folder,
            env=environment | (variables or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
        )
    else:
        done = axolotl(arguments, folder, environment)
    project, history = read_run(run_folder)
    return Training(done.returncode, done.stdout, project, [row for row in history if "train/loss" in row])


def train_all(folder: Path, configs: dict[str, dict[str, Any]]) -> list[Training]:
    """``axolotl train`` of each, side by side: all of its steps, without an error."""
    with ThreadPoolExecutor() as pool:
        trainings = list(pool.map(partial(train, folder), configs.keys(), configs.values()))
    for training in trainings:
        assert training.returncode == 0, training.log[-4000:]
        assert len(training.losses) == STEPS
    return trainings


def tiny(name: str, family: str) -> dict[str, Any]:
    from moe_kernels.tools.prepare import tiny_overrides

    return load_config(name) | tiny_overrides(family) | {"max_steps": STEPS}


@pytest.mark.parametrize("family", FAMILIES)
def test_pair(family: str, folder: Path) -> None:
    shape = FAMILIES[family].sizes["tiny"]
    configs = {
        f"{family}-baseline": tiny(FAMILIES[family].baseline, family),
        # A size other than the file's, to see that the key reaches the kernels.
        f"{family}-optimized": tiny(FAMILIES[family].optimized, family)
        | {"moe_group_size": 64, "moe_router_telemetry": "layers", "moe_fused_router": True},
    }
    with ThreadPoolExecutor() as pool:
        run = partial(train, folder, command=family == "mixtral")
        baseline, optimized = pool.map(run, configs.keys(), configs.values())
    for training in (baseline, optimized):
        assert training.returncode == 0, training.log[-4000:]

    assert (baseline.project, optimized.project) == ("moe-baseline", "moe-kernels")
    assert len(baseline.losses) == len(optimized.losses) == STEPS
    assert all(math.isfinite(loss) for loss in baseline.losses + optimized.losses)
    assert baseline.losses[-1] < baseline.losses[0]

    calls = float(shape.moe_layers)
    assert [row["train/moe/expert_calls"] for row in optimized.rows] == [calls] * STEPS
    assert not any("train/moe/expert_calls" in row for row in baseline.rows)
    check_router(optimized, read_history(folder / "runs" / f"{family}-optimized" / "out" / FILE_NAME), shape)
    assert "moe_kernels:" not in baseline.log
    assert (
        f"), {shape.moe_layers} expert calls dispatched in step 1, group_size=64, persistent=True, "
        f"{shape.moe_layers} expert layers"
    ) in optimized.log
    assert optimized.log.count("dispatched in step") == 1
    assert f"fused router in {shape.moe_layers} layers" in optimized.log

    # The same float32 arithmetic in another order of summation: within two units in the last place of a loss
    # near 8 at first. Scaling the experts' output by 0.98 moves these losses by 1e-4.
    differences = [abs(a - b) for a, b in zip(baseline.losses, optimized.losses, strict=True)]
    assert differences[0] < 2e-6, differences
    assert max(differences) < 2e-5, differences


def test_packing_accumulation_and_checkpointing(folder: Path) -> None:
    """Documents packed into one sequence, two micro-batches a step, every layer run again in the backward pass."""
    shape = FAMILIES["mixtral"].sizes["tiny"]
    together = {"sample_packing": True, "gradient_accumulation_steps": 2, "gradient_checkpointing": True}
    configs = {
        f"packed-{kind}": tiny(name, "mixtral") | together
        for kind, name in (("baseline", FAMILIES["mixtral"].baseline), ("optimized", FAMILIES["mixtral"].optimized))
    }
    baseline, optimized = train_all(folder, configs)
    assert optimized.losses == pytest.approx(baseline.losses, abs=2e-5)
    assert [row["train/moe/expert_calls"] for row in optimized.rows] == [2 * 2 * shape.moe_layers] * STEPS


def test_selective_checkpointing_keeps_the_experts(folder: Path) -> None:
    """By the line of docs/axolotl.md: the router counts, and the experts run, once a step."""
    family = FAMILIES["mixtral"]
    configs = {
        "kept-off": tiny(family.optimized, "mixtral") | {"gradient_checkpointing": False},
        "kept-on": tiny(family.optimized, "mixtral")
        | {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
            "selective_checkpointing": {"save": ["attention", "moe_kernels::experts_forward"]},
            "moe_router_telemetry": True,
        },
    }
    off, on = train_all(folder, configs)
    assert on.losses == off.losses
    assert [row["train/moe/expert_calls"] for row in on.rows] == [family.sizes["tiny"].moe_layers] * STEPS
    assert "saving `moe_kernels::experts_forward_" in on.log
    assert "no op matched" not in on.log


def check_router(training: Training, history: RouterHistory, shape: ModelShape) -> None:
    """The file accounts for every token of the training, and the trainer's log says the same."""
    assert history.steps == [*range(1, STEPS + 1)]
    assert history.experts == [shape.experts] * shape.moe_layers
    for index, row in enumerate(training.rows):
        loads = [history.load(index, layer) for layer in range(shape.moe_layers)]
        assert {load.rows for load in loads} == {2 * 256 * shape.top_k}, "micro_batch_size x sequence_len x K"
        assert {sum(load.tokens) for load in loads} == {2 * 256 * shape.top_k}
        numbers = history.numbers(index, index + 1)
        assert row["train/moe/dropped_share"] == 0.0
        assert row["train/moe/dead_experts"] == sum(numbers.dead)
        assert row["train/moe/load_imbalance"] == pytest.approx(max(numbers.imbalance), abs=1e-4)
        assert row["train/moe/load_entropy"] == pytest.approx(min(numbers.entropy), abs=1e-4)
        for number, imbalance in enumerate(numbers.imbalance):
            assert row[f"train/moe/layer_{number:02d}/load_imbalance"] == pytest.approx(imbalance, abs=1e-4)
    idle = "the load-balancing loss is not part of the training" in training.log
    assert idle == (shape.name != "deepseek-v3-tiny"), "DeepSeek-V3 has no such loss"


def small_config(kind: str, vocab: int) -> Any:
    """A tiny model of another layout than the three families'."""
    import transformers

    common = {
        "vocab_size": vocab,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if kind.startswith("qwen3-moe"):
        return transformers.Qwen3MoeConfig(
            **common, intermediate_size=96, moe_intermediate_size=48, num_hidden_layers=2, num_experts=8
        )
    if kind.startswith("gpt-oss"):  # stored transposed and interleaved, biases, a clamp
        return transformers.GptOssConfig(
            **common,
            intermediate_size=64,
            num_hidden_layers=2,
            num_local_experts=8,
            layer_types=["sliding_attention", "full_attention"],
        )
    return transformers.NemotronHConfig(  # no gate
        **common,
        layers_block_type=["full_attention", "moe", "full_attention", "moe"],
        moe_intermediate_size=48,
        moe_shared_expert_intermediate_size=48,
        n_routed_experts=8,
        n_group=1,
        topk_group=1,
    )


def small_model(folder: Path, kind: str) -> str:
    import torch
    import transformers

    source, target = folder / "artifacts" / "models" / "mixtral-tiny", folder / "artifacts" / "models" / kind
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(small_config(kind, len(tokenizer)))
    with torch.no_grad():  # freshly drawn, the experts add next to nothing to the loss
        for name, parameter in model.named_parameters():
            if "experts." in name:
                parameter.normal_(0.0, 0.2)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return f"artifacts/models/{kind}"


def small_adapter(folder: Path, config: dict[str, Any]) -> str:
    """Axolotl draws a new adapter before any seed is set, and its B is zero: two runs start from this one instead."""
    import peft
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder / config["base_model"])
    torch.manual_seed(1)
    lora = peft.LoraConfig(
        r=config["lora_r"],
        lora_alpha=config["lora_alpha"],
        target_modules=config["lora_target_modules"],
        target_parameters=config["lora_target_parameters"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    peft.get_peft_model(model, lora).save_pretrained(folder / "adapter")
    return str(folder / "adapter")


KERNEL_KEYS = ("plugins", "moe_kernels", "moe_group_size", "moe_persistent_kernel", "experts_implementation")
SMALL = {
    "qwen3-moe": "qwen3-30b-a3b-lora.yml",
    "gpt-oss": FAMILIES["mixtral"].optimized,
    "nemotron-h": FAMILIES["mixtral"].optimized,
}


@pytest.mark.parametrize("kind", SMALL)
def test_other_layouts_and_lora(kind: str, folder: Path) -> None:
    """The same losses as transformers' own experts, and PEFT's merged weights, give."""
    optimized = tiny(SMALL[kind], "mixtral") | {
        "base_model": small_model(folder, kind),
        "attn_implementation": "eager",
    }
    lora = "lora_target_parameters" in optimized
    if lora:
        optimized |= {"lora_model_dir": small_adapter(folder, optimized)}
    baseline = {key: value for key, value in optimized.items() if key not in KERNEL_KEYS}
    configs = {f"{kind}-baseline": baseline, f"{kind}-optimized": optimized}
    expected, actual = train_all(folder, configs)
    calls = 4 if optimized["gradient_checkpointing"] else 2
    assert [row["train/moe/expert_calls"] for row in actual.rows] == [calls] * STEPS
    assert ("LoRA of 4 expert weights runs inside the kernels" in actual.log) == lora
    assert ("it trains (parameters): routed experts" in actual.log) == lora
    assert "adapts no routed expert" not in actual.log
    differences = [abs(a - b) for a, b in zip(expected.losses, actual.losses, strict=True)]
    assert differences[0] < 4e-6, differences
    assert max(differences) < 1e-4, differences
    if lora:
        saved = [keys_of(folder / "runs" / name / "out" / "adapter_model.safetensors") for name in configs]
        assert saved[0] == saved[1]
        assert any("experts" in key for key in saved[0])


def test_lora_by_preference_learning(folder: Path) -> None:
    """Axolotl loads the model plain, and TRL's trainer makes the adapter: it is said and checked after that."""
    words = ["def", "class", "return", "import", "value", "yield", "raise"]
    rows = [{"prompt": a, "chosen": f"{b} {a}", "rejected": f"{a} {a}"} for a in words for b in words]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {f"field_{name}": name for name in rows[0]} | {f"{name}_format": f"{{{name}}}" for name in rows[0]}
    data = {"path": "pairs.jsonl", "ds_type": "json", "split": "train", "type": fields}
    optimized = tiny("qwen3-30b-a3b-lora.yml", "mixtral") | {
        "base_model": small_model(folder, "qwen3-moe-pairs"),
        "attn_implementation": "eager",
        "rl": "dpo",
        "datasets": [data],
    }
    baseline = {key: value for key, value in optimized.items() if key not in KERNEL_KEYS}
    expected, actual = train_all(folder, {"pairs-baseline": baseline, "pairs-optimized": optimized})
    assert actual.losses == pytest.approx(expected.losses, abs=1e-4)
    assert actual.log.count("LoRA of 4 expert weights runs inside the kernels; it trains (parameters): routed") == 1
    assert "it trains (parameters): nothing" not in actual.log


def test_qlora(folder: Path) -> None:
    """Experts in 4 bits: the losses of stock experts over the same. Axolotl loads 4 bits onto a GPU unless told."""
    pytest.importorskip("bitsandbytes")
    optimized = tiny("qwen3-30b-a3b-qlora.yml", "mixtral") | {
        "base_model": small_model(folder, "qwen3-moe-qlora"),
        "attn_implementation": "eager",
        "device_map": "cpu",
        "lora_qkv_kernel": False,
        "lora_o_kernel": False,
    }
    optimized |= {"lora_model_dir": small_adapter(folder, optimized)}
    baseline = {key: value for key, value in optimized.items() if key not in KERNEL_KEYS}
    whole = optimized | {"adapter": "lora", "load_in_4bit": False, "quantize_moe_experts": False}
    configs = {"qlora-baseline": baseline, "qlora-optimized": optimized, "qlora-whole": whole}
    expected, actual, in_16_bits = train_all(folder, configs)
    assert "LoRA of 4 expert weights runs inside the kernels" in actual.log
    assert [row["train/moe/expert_calls"] for row in actual.rows] == [4] * STEPS
    differences = [abs(a - b) for a, b in zip(expected.losses, actual.losses, strict=True)]
    assert max(differences) < 1e-4, differences
    assert abs(in_16_bits.losses[0] - actual.losses[0]) > 1e-3, "4 bits are others"


#: transformers gives 16-bit weights where no GPU multiplies fp8: a machine without one needs this to keep them.
KEEP_FP8 = """
from axolotl.integrations.base import BasePlugin
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

class KeepFp8(BasePlugin):
    def register(self, cfg):
        FineGrainedFP8HfQuantizer.validate_environment = lambda self, *args, **kwargs: None
"""


@pytest.mark.skipif(not ENTRY_POINTS, reason="transformers 5.16, which axolotl 0.19 pins, loads no such baseline")
def test_lora_over_an_fp8_checkpoint(folder: Path) -> None:
    """The losses that the same checkpoint gives where transformers dequantises it as it loads it; the run file names
    the checkpoint and no more."""
    from support.fp8 import quantise_checkpoint

    base = folder / small_model(folder, "qwen3-moe-fp8")
    quantise_checkpoint(base)
    (folder / "keep_fp8.py").write_text(KEEP_FP8)
    optimized = tiny("qwen3-30b-a3b-lora.yml", "mixtral") | {
        "base_model": str(base.relative_to(folder)),
        "attn_implementation": "eager",
        # Axolotl's fused LoRA of attention dequantises fp8 by itself, to bfloat16 whatever the model runs in.
        "lora_qkv_kernel": False,
        "lora_o_kernel": False,
    }
    optimized |= {"lora_model_dir": small_adapter(folder, optimized)}
    baseline = {key: value for key, value in optimized.items() if key not in KERNEL_KEYS}
    optimized["plugins"] = ["keep_fp8.KeepFp8", *optimized["plugins"]]
    configs = {"fp8-baseline": baseline, "fp8-optimized": optimized}
    configs["fp8-activations"] = optimized | {"moe_fp8_activations": True}
    expected, actual, rounded = train_all(folder, configs)
    assert "default to dequantizing" in expected.log
    assert "default to dequantizing" not in actual.log
    assert "LoRA of 4 expert weights runs inside the kernels" in actual.log
    for training in (actual, rounded):
        assert [row["train/moe/expert_calls"] for row in training.rows] == [4] * STEPS
    differences = [abs(a - b) for a, b in zip(expected.losses, actual.losses, strict=True)]
    assert differences[0] < 4e-6, differences
    assert max(differences) < 1e-4, differences
    differences = [abs(a - b) for a, b in zip(expected.losses, rounded.losses, strict=True)]
    assert 4e-6 < max(differences) < 0.02, differences


@pytest.mark.skipif(not ENTRY_POINTS, reason="once is enough: nothing here is asked of axolotl alone")
def test_lora_over_an_mxfp4_checkpoint(folder: Path) -> None:
    """The losses that the same values give in 32 bits; the run file names the checkpoint and no more. transformers
    5.20 dequantises to bfloat16 whatever is asked for, to which PEFT's own LoRA is rounded then."""
    from support.mxfp4 import dequantise_checkpoint, quantise_checkpoint

    base, whole = (folder / small_model(folder, f"gpt-oss-{kind}") for kind in ("mxfp4", "whole"))
    for checkpoint in (base, whole):
        quantise_checkpoint(checkpoint)
    dequantise_checkpoint(whole)
    optimized = tiny("gpt-oss-20b-lora.yml", "mixtral") | {
        "base_model": str(base.relative_to(folder)),
        "attn_implementation": "eager",
    }
    optimized |= {"lora_model_dir": small_adapter(folder, optimized)}
    baseline = {key: value for key, value in optimized.items() if key not in KERNEL_KEYS}
    baseline |= {"base_model": str(whole.relative_to(folder))}
    configs = {"mxfp4-baseline": baseline, "mxfp4-optimized": optimized}
    expected, actual = train_all(folder, configs)
    assert "default to dequantizing" not in actual.log
    assert "LoRA of 4 expert weights runs inside the kernels" in actual.log
    assert [row["train/moe/expert_calls"] for row in actual.rows] == [4] * STEPS
    differences = [abs(a - b) for a, b in zip(expected.losses, actual.losses, strict=True)]
    assert differences[0] < 4e-6, differences
    assert max(differences) < 1e-4, differences


def test_a_fused_router_that_lora_trains_whole(folder: Path) -> None:
    """PEFT wraps the router before the plugin sees it: the copy that trains is the fused one."""
    from safetensors import safe_open

    lora = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "lora_target_modules": ["q_proj"]}
    own = tiny(FAMILIES["mixtral"].optimized, "mixtral") | lora | {"lora_modules_to_save": ["gate"]}
    configs = {"gate-own": own, "gate-fused": own | {"moe_fused_router": True}}
    expected, actual = train_all(folder, configs)
    layers = FAMILIES["mixtral"].sizes["tiny"].moe_layers
    assert f"fused router in {layers} layers of PeftModel" in actual.log
    # Later ones differ by the adapter that Axolotl draws before any seed is set.
    assert abs(expected.losses[0] - actual.losses[0]) < 2e-6

    def gates(path: Path) -> list[Any]:
        with safe_open(path, framework="pt") as file:
            return [file.get_tensor(key) for key in sorted(file.keys()) if key.endswith("gate.weight")]

    before = gates(folder / own["base_model"] / "model.safetensors")
    after = gates(folder / "runs" / "gate-fused" / "out" / "adapter_model.safetensors")
    assert len(before) == len(after) == layers
    assert all((a - b).abs().max() > 1e-4 for a, b in zip(before, after, strict=True))


def keys_of(path: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118


def test_the_saved_model_names_no_kernels(folder: Path) -> None:
    config = json.loads((folder / "runs" / "mixtral-optimized" / "out" / "config.json").read_text())
    assert "moe_kernels" not in json.dumps(config)


def failing(folder: Path, name: str, **changes: Any) -> str:
    config = tiny(FAMILIES["mixtral"].optimized, "mixtral") | {"max_steps": 1} | changes
    training = train(folder, name, config)
    assert training.returncode != 0, training.log[-4000:]
    assert training.losses == [], "it must fail before training"
    return training.log


def test_bad_value_fails(folder: Path) -> None:
    log = failing(folder, "bad-value", moe_group_size=100)
    assert "moe_group_size" in log
    assert "64, 128, 256 or 'auto'" in log


def test_missing_model_fails(folder: Path) -> None:
    log = failing(folder, "missing-model", base_model="artifacts/models/nowhere")
    assert "artifacts/models/nowhere" in log


def test_unsupported_activation_fails(folder: Path) -> None:
    source, mish = folder / "artifacts" / "models" / "mixtral-tiny", folder / "mish"
    shutil.copytree(source, mish)
    config = json.loads((mish / "config.json").read_text())
    (mish / "config.json").write_text(json.dumps(config | {"hidden_act": "mish"}))
    log = failing(folder, "mish", base_model=str(mish))
    assert (
        "model.layers.0.mlp.experts (MixtralExperts): its activation MishActivation computes none of clamped_glu"
        in log
    )
    assert "experts_implementation: grouped_mm" in log


@pytest.mark.skipif(ENTRY_POINTS, reason="axolotl from 0.21 on finds the plugin of an installed package by itself")
def test_missing_plugin_fails(folder: Path) -> None:
    """Who has the YAML but not the package sees this; without the guard, the baseline trains in silence."""
    log = failing(folder, "no-plugin", plugins=[])
    assert 'experts_implementation="moe_kernels"` is not supported' in log


@pytest.mark.skipif(not ENTRY_POINTS, reason="axolotl before 0.21 reads plugins: alone")
def test_installed_it_needs_no_line_in_plugins(folder: Path, installed: Path) -> None:
    """Its keys work, and a run without them is left alone."""
    configs = {}
    for kind, name in (("baseline", FAMILIES["mixtral"].baseline), ("optimized", FAMILIES["mixtral"].optimized)):
        configs[f"entry-{kind}"] = {k: v for k, v in tiny(name, "mixtral").items() if k != "plugins"}
    run = partial(train, folder, variables={"PYTHONPATH": str(installed)})
    with ThreadPoolExecutor() as pool:
        baseline, optimized = pool.map(run, configs.keys(), configs.values())
    for training in (baseline, optimized):
        assert training.returncode == 0, training.log[-4000:]
        assert "Plugin loaded successfully: axolotl.integrations.moe_kernels.plugin" in training.log
    assert "moe_kernels:" not in baseline.log
    assert optimized.log.count("expert calls dispatched in step 1") == 1
    assert optimized.losses == pytest.approx(baseline.losses, abs=2e-5)


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a wheel of this repository installs."""
    tmp_path = tmp_path_factory.mktemp("wheel")
    source, wheels = tmp_path / "source", tmp_path / "wheels"
    leave = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(REPOSITORY / "src", source / "src", ignore=leave)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*pip, "-w", str(wheels), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [wheel] = wheels.glob("moe_training_kernels-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    return tmp_path / "installed"


def test_wheel_adds_one_package_to_axolotl(tmp_path: Path, installed: Path) -> None:
    names = {path.relative_to(installed).as_posix() for path in installed.rglob("*") if path.is_file()}
    [points] = installed.glob("*.dist-info/entry_points.txt")
    target = "axolotl.integrations.moe_kernels.plugin:MoeOptimizedPlugin"
    assert f"[axolotl.plugins]\nmoe-kernels = {target}" in points.read_text()
    plugin = "axolotl/integrations/moe_kernels"
    assert {f"{plugin}/{file}" for file in ("__init__.py", "plugin.py", "args.py", "README.md")} <= names
    # Either of these would take the place of Axolotl's own.
    assert not names & {"axolotl/__init__.py", "axolotl/integrations/__init__.py"}
    assert {"moe_kernels/py.typed", "moe_kernels/moe.py", f"{plugin}/telemetry.py", f"{plugin}/callback.py"} <= names
    assert {f"moe_kernels/tools/compare/report.{kind}" for kind in ("html.j2", "md.j2", "css")} <= names
    source_files = {path.relative_to(REPOSITORY / "src").as_posix() for path in (REPOSITORY / "src").rglob("*.py")}
    assert source_files <= names
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "configs"))]

    code = "import axolotl.integrations.moe_kernels as m, axolotl.train; print(m.MoeOptimizedPlugin, m.__file__)"
    environment = os.environ | OFFLINE | {"PYTHONPATH": str(installed)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(installed / plugin) in done.stdout
    # A command whose templates are read from the package, and whose answer needs no GPU.
    report = [sys.executable, "-m", "moe_kernels", "compare", "--report-only", "--out", str(tmp_path / "report")]
    result = REPOSITORY / "benchmarks" / "results" / "compare-h200" / "mixtral.json"
    done = subprocess.run([*report, str(result)], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "mixtral" in (tmp_path / "report" / "report.html").read_text()
