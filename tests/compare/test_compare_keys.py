"""`compare --set` of keys that Axolotl's schema does not have, as Axolotl itself says."""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path

import pytest
import yaml
from test_compare_runner import BASE, FAKE
from typer.testing import CliRunner

from moe_kernels.tools.app import app
from moe_kernels.tools.compare import command
from moe_kernels.tools.compare.keys import unknown_keys
from moe_kernels.tools.compare.pair import LIGER_PLUGIN, PLUGIN
from moe_kernels.tools.compare.runner import Machine

if importlib.util.find_spec("axolotl") is None or importlib.util.find_spec("axolotl.utils") is None:
    pytest.skip("axolotl is not installed: needs the extra [axolotl]", allow_module_level=True)

pytestmark = pytest.mark.slow


def test_what_axolotl_knows() -> None:
    known = {
        "sequence_len": 64,
        "model_type": "AutoModelForCausalLM",  # an alias of a field
        "gradient_checkpointing_kwargs": {"use_reentrant": True, "whatever": 1},  # handed on
        "trl": {"beta": 0.1},
        "fsdp_config": {"version": 2},  # one of two names that a field is given by
        "selective_checkpointing": True,
        "datasets": [{"path": "x", "type": "completion"}],
    }
    plugins = {"liger_rope": True, "moe_group_size": 64}
    misspelt = {"sequence_length": 64, "trl": {"betta": 0.1}, "datasets": [{"path": "x", "tpye": "y"}], "zzzz": 1}
    asked = [([], known), ([LIGER_PLUGIN, PLUGIN], plugins), ([PLUGIN], {"liger_rope": True}), ([], misspelt)]
    found = unknown_keys(asked)
    assert found[:2] == [[], []]
    assert [key for key, _ in found[2]] == ["liger_rope"]
    assert found[3] == [
        ("sequence_length", "sequence_len"),
        ("trl.betta", "trl.beta"),
        ("datasets.tpye", "datasets.type"),
        ("zzzz", ""),
    ]


def test_nothing_is_trained_without_a_key_that_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "Machine", partial(Machine, trainer=FAKE))
    monkeypatch.setattr(command, "visible_gpu", lambda: None)
    Path("a.yml").write_text(yaml.safe_dump(BASE))
    Path("b.yml").write_text(yaml.safe_dump({**BASE, "moe_kernels": True, "plugins": [PLUGIN]}))
    arguments = ["compare", "a.yml", "b.yml", "--warmup-steps", "2", "--set", "seed=1", "--set", "trl.betta=2"]
    result = CliRunner().invoke(app, arguments)
    said = " ".join(result.output.split())
    assert result.exit_code == 2, said
    assert "--set trl.betta: with the plugins of a.yml, axolotl" in said
    assert "would train without it. Cure: the nearest that it has is trl.beta;" in said
    assert not Path("artifacts").exists()
