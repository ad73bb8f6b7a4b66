"""What benchmarks/telemetry_cost.py makes of step times, and that its switch really switches."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def load(name):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


telemetry_cost = load("telemetry_cost")


def times(percent, drift=0.0, steps=120):
    """Step times of 100 ms, ``percent`` more in blocks with telemetry, rising by ``drift`` ms a step."""
    return [100 + drift * n + (percent if telemetry_cost.telemetry_is_on(n) else 0) for n in range(steps)]


def test_the_cost_of_known_times():
    assert telemetry_cost.costs(times(2.0), 20) == pytest.approx([2.0] * 9)


def test_a_drift_is_no_cost():
    assert telemetry_cost.costs(times(0.0, drift=0.5), 20) == pytest.approx([0.0] * 9)


def test_steps_after_a_switch_and_outliers_do_not_count():
    slow = times(1.0)
    for start in range(0, len(slow), telemetry_cost.BLOCK):
        slow[start] = 1000.0  # the one that is left out
        slow[start + 3] = 500.0
    assert telemetry_cost.costs(slow, 20) == pytest.approx([1.0] * 9)


def test_the_warm_up_does_not_count():
    step_ms = times(1.0)
    step_ms[:20] = [5000.0] * 20
    assert telemetry_cost.costs(step_ms, 20) == pytest.approx([1.0] * 9)


def test_the_switch_counts_every_other_block():
    pytest.importorskip("axolotl")
    transformers = pytest.importorskip("transformers")
    switch_module = load("telemetry_switch")
    from axolotl.integrations.moe_kernels.telemetry import RouterCallback
    from moe_kernels.integrations.router_counter import RouterCounter

    config = transformers.MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).train()

    class Recorded(RouterCallback):
        def on_step_end(self, args, state, control, **kwargs):
            counted[state.global_step] = self.counter.take()[0].rows

    counted = {}
    trainer = type("Trainer", (), {})()
    telemetry = Recorded(trainer, RouterCounter(model), "", False)
    switch = switch_module._Switch(trainer)
    trainer.callback_handler = type("Handler", (), {"callbacks": [telemetry, switch]})()
    for step in range(40):
        state = type("State", (), {"global_step": step})()
        for callback in (telemetry, switch):
            callback.on_step_begin(None, state, None, model=model)
        model(input_ids=torch.zeros(1, 3, dtype=torch.int64))
        telemetry.on_step_end(None, state, None)
    assert counted == {step: 6 for step in range(40) if telemetry_cost.telemetry_is_on(step)}
