"""`moe-kernels verify RUN.yml` and `verify MODEL`: the layers of the model, as it computes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

pytest.importorskip("transformers", reason="needs the extra [transformers]")
from transformers import AutoConfig

from moe_kernels.backends.torch import TorchBackend
from moe_kernels.tools.app import app
from moe_kernels.tools.common.errors import UsageError
from moe_kernels.tools.common.layers import Target, expert_layers, read_target

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


def test_a_run_file_gives_model_tokens_and_dtype() -> None:
    found = read_target(CONFIGS / "mixtral-8x7b-moe-optimized.yml")
    assert found == Target("artifacts/models/mixtral-1b", 16384, "bf16", 0)


def test_lora_on_the_experts_is_verified_too(tmp_path: Path) -> None:
    config = {"base_model": "m", "lora_r": 16, "lora_target_parameters": ["mlp.experts.gate_up_proj"]}
    (tmp_path / "x.yml").write_text(yaml.safe_dump(config))
    assert read_target(tmp_path / "x.yml").lora_rank == 16
    (tmp_path / "x.yml").write_text(yaml.safe_dump(config | {"lora_r": "many"}))
    with pytest.raises(UsageError, match="lora_r should be a number"):
        read_target(tmp_path / "x.yml")
    (tmp_path / "x.yml").write_text(yaml.safe_dump(config | {"lora_target_parameters": ["q_proj"]}))
    assert read_target(tmp_path / "x.yml").lora_rank == 0


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
    for arguments in ([str(tmp_path)], [str(tmp_path / "no.yml")], [str(tmp_path), "--shapes", "small"]):
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
