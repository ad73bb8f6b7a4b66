"""`moe-kernels verify RUN.yml` and `verify MODEL`: the layers of the model, as it computes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

pytest.importorskip("transformers", reason="needs the extra [transformers]")
from transformers import AutoConfig

from moe_kernels.backends.torch import TorchBackend
from moe_kernels.tools.app import app
from moe_kernels.tools.check.forms import called
from moe_kernels.tools.common.layers import expert_layers, read_target

CONFIGS = Path(__file__).parents[2] / "configs" / "moe"
MIXTRAL = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}
MIXTRAL |= {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}


def model(folder: Path, kind: str = "mixtral", **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    AutoConfig.for_model(kind, **(MIXTRAL | changes)).save_pretrained(folder)
    return folder


def run_file(tmp_path: Path, folder: Path, **keys: Any) -> Path:
    config = {"base_model": str(folder), "bf16": True, "sequence_len": 32, **keys}
    (tmp_path / "x.yml").write_text(yaml.safe_dump(config))
    return tmp_path / "x.yml"


def test_a_run_file_gives_model_tokens_and_dtype() -> None:
    found = read_target(CONFIGS / "mixtral-8x7b-moe-optimized.yml")
    assert (found.model, found.tokens, found.dtype) == ("artifacts/models/mixtral-1b", 16384, "bf16")
    assert not found.config.get("adapter")


LORA = {"adapter": "lora", "lora_r": 8, "lora_alpha": 32, "lora_target_modules": ["q_proj"]}
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
QWEN3 = {"moe_intermediate_size": 48, "num_experts": 4}
QLORA = {"adapter": "qlora", "load_in_4bit": True, "quantize_moe_experts": True, "lora_target_parameters": BOTH}
EXPERTS = {"lora_target_parameters": BOTH}


@pytest.mark.parametrize(
    ("kind", "changes", "keys", "form"),
    [
        ("mixtral", {}, {}, "plain"),
        ("mixtral", {}, {"lora_r": 8, "lora_target_parameters": BOTH}, "plain"),
        ("mixtral", {}, LORA, "frozen"),
        ("mixtral", {}, LORA | EXPERTS, "lora-8"),
        ("mixtral", {}, LORA | {"lora_target_parameters": BOTH[1:]}, "lora-8-down"),
        ("mixtral", {}, LORA | EXPERTS | {"lora_rank_pattern": {"down_proj": 2}}, "lora-8-gate_up-2-down"),
        ("mixtral", {}, LORA | QLORA, "qlora-8"),
        ("mixtral", {}, LORA | EXPERTS | {"load_in_4bit": True}, "lora-8"),
        ("mixtral", {"quantization_config": FP8}, LORA | EXPERTS, "fp8-lora-8"),
        (
            "mixtral",
            {"quantization_config": FP8},
            LORA | EXPERTS | {"moe_fp8_activations": True},
            "fp8-activations-lora-8",
        ),
        (
            "mixtral",
            {"quantization_config": FP8},
            LORA | EXPERTS | {"model_quantization_config_kwargs": {"dequantize": True}},
            "lora-8",
        ),
        (
            "mixtral",
            {"quantization_config": FP8 | {"modules_to_not_convert": ["mlp.experts"]}},
            LORA | EXPERTS,
            "lora-8",
        ),
        ("gpt_oss", {"head_dim": 32, "quantization_config": {"quant_method": "mxfp4"}}, LORA, "mxfp4-frozen"),
        # PEFT takes these names for the routed experts of the one and not of the other; gate and up have a rank each.
        (
            "qwen3_moe",
            QWEN3,
            LORA | {"lora_target_modules": ["gate_proj", "up_proj", "down_proj"]},
            "lora-16-gate_up-8-down",
        ),
        ("gpt_oss", {"head_dim": 32}, LORA | {"lora_target_linear": True}, "frozen"),
    ],
)
def test_the_form_is_that_of_the_run_file(
    tmp_path: Path, kind: str, changes: dict[str, Any], keys: dict[str, Any], form: str
) -> None:
    pytest.importorskip("peft")
    changes = {"intermediate_size": 64, "hidden_size": 64} | changes
    path = run_file(tmp_path, model(tmp_path / "m", kind, **changes), **keys)
    [(_, case)] = expert_layers(read_target(path))
    assert called(case) == form
    assert case.frozen == (form != "plain")
    assert case.scalings[0] == (32 / case.lora_rank if case.lora_rank and kind == "mixtral" else case.scalings[0])


@pytest.mark.parametrize(
    ("changes", "keys", "words"),
    [
        ({}, LORA | {"lora_r": "many"}, "lora_r should be a number"),
        ({}, LORA | {"lora_r": 256} | EXPERTS, "LoRA of rank 256 on experts; the kernels take 128 at most"),
        ({}, LORA | {"adapter": "prompt"}, "adapter should be lora or qlora and is 'prompt'"),
        ({}, LORA | {"lora_target_modules": ["nonesuch"]}, "PEFT makes no adapter of the run file's keys"),
        ({}, LORA | EXPERTS | {"moe_fp8_activations": True}, "multiplies experts in block-fp8"),
        ({"quantization_config": FP8}, {}, "Experts in fp8 are frozen: write adapter: lora"),
        ({"quantization_config": FP8 | {"weight_block_size": [64, 64]}}, LORA, "which is not known here"),
        ({"quantization_config": {"quant_method": "gptq"}}, LORA, "are in gptq"),
        ({"quantization_config": FP8 | {"modules_to_not_convert": 5}}, LORA, "The quantization_config of"),
        ({"quantization_config": FP8 | {"modules_to_not_convert": ["("]}}, LORA, "The quantization_config of"),
        ({}, LORA | {"lora_target_modules": "("}, "PEFT makes no adapter"),
        ({}, LORA | {"lora_target_modules": 5, "lora_target_linear": True}, "PEFT makes no adapter"),
        ({"intermediate_size": 44}, LORA | QLORA, "intermediate size 44 do not divide into the blocks of 4 bits"),
    ],
)
def test_forms_that_cannot_be_trained_are_said(
    tmp_path: Path, changes: dict[str, Any], keys: dict[str, Any], words: str
) -> None:
    pytest.importorskip("peft")
    path = run_file(tmp_path, model(tmp_path / "m", **changes), **keys)
    result = CliRunner().invoke(app, ["verify", str(path), "--device", "cpu"])
    assert result.exit_code == 2, result.output
    assert words in " ".join(result.output.split())


def test_the_adapters_of_a_run_file_are_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    command = ["verify", str(run_file(tmp_path, model(tmp_path / "m"), **LORA, **EXPERTS)), "--device", "cpu"]
    ranks = set()
    right = TorchBackend.lora_a_grad

    def seen(self: Any, low: Any, rows: Any, plan: Any, lora_a: Any, scaling: float = 1.0) -> Any:
        ranks.add(lora_a.shape[1])
        return right(self, low, rows, plan, lora_a, scaling)

    monkeypatch.setattr(TorchBackend, "lora_a_grad", seen)
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "lora-8" in result.output
    assert ranks == {8}
    monkeypatch.setattr(TorchBackend, "lora_a_grad", lambda *args: right(*args) * 1.02)
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    assert "ddown_lora_a" in result.output


@pytest.mark.parametrize("base", [{}, {"quantization_config": FP8}], ids=["bf16", "fp8"])
def test_factors_are_those_that_axolotl_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: dict[str, Any]
) -> None:
    """In float32, unless the run file tells PEFT to leave them in the weight's dtype; an error in reading float32
    alone must be found."""
    pytest.importorskip("peft")
    right = TorchBackend.pack_factors

    def wrong(self: Any, parts: Any, dtype: torch.dtype) -> Any:
        by = 1.02 if parts[0].lora_a.dtype == torch.float32 else 1.0
        return right(self, [part._replace(scaling=by * part.scaling) for part in parts], dtype)

    for cast, code in ((None, 1), (True, 1), (False, 0)):
        keys = LORA | EXPERTS | {"peft_autocast_adapter_dtype": cast}
        path = run_file(tmp_path, model(tmp_path / "m", **base), **keys)
        for pack, expected in ((right, 0), (wrong, code)):
            monkeypatch.setattr(TorchBackend, "pack_factors", pack)
            result = CliRunner().invoke(app, ["verify", str(path), "--device", "cpu"])
            assert result.exit_code == expected, (cast, pack, result.output)


def test_layers_are_those_of_the_model_each_kind_once(tmp_path: Path) -> None:
    [(name, case)] = expert_layers(read_target(model(tmp_path / "m") / "config.json"))
    assert name == "layers.0.mlp.experts"
    assert (case.hidden, case.intermediate, case.experts, case.top_k, case.gated) == (64, 48, 4, 2, True)


def test_gpt_oss_is_verified_as_it_computes(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", "gpt_oss", head_dim=32)
    [(_, case)] = expert_layers(read_target(folder))
    assert (case.hidden, case.intermediate) == (64, 48)
    assert (case.transposed, case.interleaved, case.bias) == (True, True, True)
    assert "clamped_glu" in str(case)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_act": "mish"}, "MishActivation computes none of"),
        ({"hidden_act": "nonesuch"}, "cannot be used"),
        ({"pad_token_id": -1000000}, "cannot be used: Padding_idx must be within num_embeddings"),
        ({"num_hidden_layers": 0}, "has no expert layers"),
        ({"num_local_experts": "four"}, "cannot be used"),
    ],
)
def test_what_cannot_be_verified_is_said(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    folder = model(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    result = CliRunner().invoke(app, ["verify", str(folder), "--device", "cpu"])
    assert result.exit_code == 2, result.output
    assert words in " ".join(result.output.split())


def test_neither_run_file_nor_model(tmp_path: Path) -> None:
    both = [str(tmp_path), "--shapes", "small"], [str(tmp_path), "--form", "lora-16"]
    for arguments in ([str(tmp_path)], [str(tmp_path / "no.yml")], *both):
        result = CliRunner().invoke(app, ["verify", *arguments])
        assert result.exit_code == 2, result.output
    (tmp_path / "x.yml").write_text("base_model: nobody/nothing\n")
    result = CliRunner().invoke(app, ["verify", str(tmp_path / "x.yml"), "--device", "cpu"])
    assert result.exit_code == 3
    assert "Cure:" in result.output


def test_the_command_verifies_and_notices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model(tmp_path / "m")
    (tmp_path / "x.yml").write_text(yaml.safe_dump({"base_model": str(folder), "bf16": True, "sequence_len": 32}))
    command = ["verify", str(tmp_path / "x.yml"), "--device", "cpu"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "layers.0.mlp.experts" in result.output
    right = TorchBackend.combine
    monkeypatch.setattr(TorchBackend, "combine", lambda *args, **kwargs: right(*args, **kwargs) * 1.005)
    assert CliRunner().invoke(app, command).exit_code == 1
