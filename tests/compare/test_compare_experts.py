"""Measuring the expert layer: the one that is trained, stored until something changes, ended with us."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import builders
import pytest
import yaml
from test_compare_runner import BASE, machine, make_pair

pytest.importorskip("transformers", reason="needs the extra [transformers]")
from transformers import AutoConfig

from moe_kernels.tools.bench import experts as bench
from moe_kernels.tools.common.layers import read_target
from moe_kernels.tools.compare import experts_bench
from moe_kernels.tools.compare.environment import BENCH, SOURCES
from moe_kernels.tools.compare.experts_bench import _answer, inspect_model, measure_experts
from moe_kernels.tools.compare.gpu import Gpu

SIZES = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}


@pytest.fixture(autouse=True)
def _inside_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def model(kind: str = "mixtral", **changes: Any) -> None:
    AutoConfig.for_model(kind, **(SIZES | changes)).save_pretrained("model")


def test_the_layer_of_a_model() -> None:
    model()
    found = inspect_model("model", "", 512)
    assert found["layer"] == {
        "name": "mixtral", "tokens": 512, "hidden": 64, "intermediate": 48, "experts": 4, "top_k": 2
    }  # fmt: skip
    assert (found["moe_layers"], found["default"], found["note"]) == (3, "grouped_mm", "")


def test_what_a_run_file_changes_in_the_model_is_measured() -> None:
    model()
    config = {**BASE, "overrides_of_model_config": {"num_local_experts": 8}, "bfloat16": True, "bf16": False}
    Path("a.yml").write_text(yaml.safe_dump(config))
    target = read_target(Path("a.yml"))
    assert target.dtype == "bf16"
    found = inspect_model(target.model, "", target.tokens, target.overrides)
    assert found["layer"]["experts"] == 8


def test_a_layer_that_the_benchmark_has_not_is_not_measured_and_its_sizes_are_right() -> None:
    model("gpt_oss", head_dim=32)
    found = inspect_model("model", "", 512)
    assert (found["layer"]["hidden"], found["layer"]["intermediate"]) == (64, 48)
    assert "no experts like this model's: bias, interleaved, transposed, clamped_glu" in found["note"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"hidden_act": "mish"}, "MishActivation computes none of"), ({"num_hidden_layers": 0}, "has no expert layers")],
)
def test_what_cannot_be_measured_says_why(changes: dict[str, Any], words: str) -> None:
    model(**changes)
    answer = _answer(request())
    assert words in answer["note"]
    assert answer["measurements"] == []


def request(**changes: Any) -> dict[str, Any]:
    found = {"model": "model", "overrides": {}, "name": "", "tokens": 8, "group_size": 64, "persistent": True}
    found |= {"recompute": False, "device": "cpu", "dtype": "float32", "repeats": 1, "frozen": False}
    return found | changes


def test_recomputation_is_measured_where_it_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(bench, "measure", lambda shape, **options: asked.append(options) or [])
    model()
    for recompute in (True, False):
        assert _answer(request(recompute=recompute))["note"] == ""
        assert asked[-1]["recompute"] == (recompute,)
    assert "the weights are frozen" in _answer(request(frozen=True))["note"]


def measured(monkeypatch: pytest.MonkeyPatch, base: dict[str, Any] | None = None, **changes: Any) -> bool:
    """Whether the layer was measured anew."""
    ran: list[Sequence[str]] = []

    def run(command: Sequence[str], *_: Any) -> int:
        ran.append(command)
        Path(command[-1]).write_text(json.dumps(builders.experts()))
        return 0

    monkeypatch.setattr(experts_bench, "run_command", run)
    found = measure_experts(make_pair(base=base), machine(**changes), False, lambda line: None)
    assert found["moe_layers"] == 10
    return bool(ran)


def test_the_measurement_is_taken_from_the_store_until_something_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    model()
    known = {"torch": "2", "triton": "3", "transformers": "5", SOURCES: "s", BENCH: "b", "moe-kernels": "1"}
    assert measured(monkeypatch, versions=known)
    assert not measured(monkeypatch, versions=known)
    assert not measured(monkeypatch, versions=known | {"moe-kernels": "2"})
    for name in (*known,)[:5]:
        assert measured(monkeypatch, versions=known | {name: "new"}), name
    for name in ("H100", "H200"):
        assert measured(monkeypatch, versions=known, device="0", gpu=Gpu(name, "580", 80.0))
    assert measured(monkeypatch, versions=known)
    assert measured(monkeypatch, base={"moe_recompute": True}, versions=known)
    assert measured(monkeypatch, base={"bfloat16": True}, versions=known)
    model(num_local_experts=8)
    assert measured(monkeypatch, base={"bfloat16": True}, versions=known)


def test_a_measurement_that_fails_says_why() -> None:
    (Path("model")).mkdir()
    found = measure_experts(make_pair(), machine(), False, lambda line: None)
    assert "model cannot be read here" in found["error"] or "cannot be used" in found["error"]
    assert found["measurements"] == []


def test_a_terminated_command_leaves_no_measurement_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    make_pair()
    here = str(Path(__file__).parent)
    script = f"""
        import sys; sys.path.insert(0, {here!r})
        from functools import partial
        from test_compare_runner import FAKE
        from moe_kernels.tools.compare import command, experts_bench
        hang = "import os, time; print(os.getpid(), flush=True); time.sleep(120)"
        real = experts_bench.run_command
        experts_bench.run_command = lambda command, *rest: real([sys.executable, "-c", hang], *rest)
        command.Machine = partial(command.Machine, trainer=FAKE)
        command.compare(targets=["a.yml", "b.yml"], warmup_steps=2, noise=False, out=None)
    """
    log = Path("artifacts/runs/compare/a-vs-b-own/experts/bench.log")
    env = {**os.environ, "PYTHONPATH": ""}
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], env=env, stdout=subprocess.DEVNULL)
    for _ in range(600):
        if log.is_file() and log.read_text().endswith("\n"):
            break
        time.sleep(0.1)
    child.send_signal(signal.SIGTERM)
    child.wait(30)
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text()), 0)
