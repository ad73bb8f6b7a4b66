"""What benchmarks/telemetry_cost.py makes of step times, and that its switch really switches."""

import json
import math
import random
import statistics
from types import SimpleNamespace

import pytest
import torch

import telemetry_cost


def times(percent, drift=0.0, steps=120):
    """Step times of 100 ms, ``percent`` more with telemetry, rising by ``drift`` ms a step."""
    return [100 + drift * n + (percent if telemetry_cost.telemetry_is_on(n) else 0) for n in range(steps)]


def test_the_cost_of_known_times():
    assert telemetry_cost.costs(times(2.0), 20) == pytest.approx([2.0] * 25)


def test_a_drift_is_no_cost():
    assert telemetry_cost.costs(times(0.0, drift=0.5), 20) == pytest.approx([0.0] * 25)


def test_the_warm_up_and_an_unfinished_group_do_not_count():
    step_ms = times(1.0, steps=119)
    step_ms[:18] = [5000.0] * 18
    step_ms[116:] = [5000.0] * 3
    assert telemetry_cost.costs(step_ms, 18) == pytest.approx([1.0] * 24)


@pytest.mark.parametrize("every", range(2, 13))
def test_what_comes_every_so_many_steps_is_no_cost(every):
    """Half the steps are with telemetry, in an order of no period, so that others' work falls on both alike."""
    on = [telemetry_cost.telemetry_is_on(step) for step in range(420)]
    assert sum(on) == 210
    for phase in range(every):
        assert 0.3 < sum(on[phase::every]) / len(on[phase::every]) < 0.7


def test_outliers_do_not_move_it():
    slow = times(1.0, steps=420)
    slow[::9] = [400.0] * len(slow[::9])
    assert abs(statistics.median(telemetry_cost.costs(slow, 20)) - 1.0) < 0.1


def test_the_file_counts_with_its_mean_though_it_is_seldom_written():
    on = [step for step in range(120) if telemetry_cost.telemetry_is_on(step)]
    step_ms = times(1.0)
    write_ms = [0.0] * 60
    for index in range(20, 60, 10):  # 4 of the 50 that count
        write_ms[index] = 25.0
        step_ms[on[index]] += 25.0
    raw = {"hooks_ms": [0.25] * 60, "log_ms": [0.5] * 60, "write_ms": write_ms}
    raw |= {"step_ms": step_ms[:119], "read_at": [step + 1 for step in on]}
    found = telemetry_cost.summary(raw, 20)
    assert found["cost_percent"] == pytest.approx(1.0 + 2.0)
    assert found["own_host_ms"] == {"hooks_ms": 0.25, "log_ms": 0.5, "write_ms": 2.0}
    assert found["interval_percent"] == pytest.approx([3.0, 3.0])


def test_the_interval_holds_the_median_as_often_as_it_says():
    draw, held = random.Random(0), 0
    for _ in range(1000):
        low, high = telemetry_cost.median_interval([draw.expovariate(1.0) for _ in range(40)])
        held += low <= math.log(2) <= high
    assert 950 <= held <= 985
    assert telemetry_cost.median_interval(range(1, 11)) == (2, 9), "as in tables of the sign test"


def test_the_switch_counts_and_times_half_the_steps(tmp_path):
    pytest.importorskip("axolotl.integrations.base", reason="needs the extra [axolotl]")
    import telemetry_switch
    from axolotl.integrations.moe_kernels.telemetry import RouterCallback
    from moe_kernels.telemetry.counter import RouterCounter
    from support.models import tiny_config, tiny_model

    model = tiny_model(tiny_config("mixtral", num_hidden_layers=1)).train()

    class Recorded(RouterCallback):
        def on_step_end(self, args, state, control, **kwargs):
            counted[state.global_step] = int(self.counter.take().rows[0])

    counted = {}
    trainer = type("Trainer", (), {})()
    telemetry = Recorded(trainer, RouterCounter(model), "", False)
    switch = telemetry_switch._Switch(trainer)
    trainer.callback_handler = type("Handler", (), {"callbacks": [telemetry, switch]})()
    for step in range(41):
        state = type("State", (), {"global_step": step})()
        for callback in (telemetry, switch):
            callback.on_step_begin(None, state, None, model=model)
        model(input_ids=torch.zeros(1, 3, dtype=torch.int64))
        telemetry.on_pre_optimizer_step(None, state, None)
        telemetry.on_step_end(None, state, None)
    assert not telemetry_cost.telemetry_is_on(40)
    telemetry._read(SimpleNamespace(global_step=41))
    assert telemetry.unwritten == [], "the end of a training without telemetry was counted"
    switch.on_train_end(SimpleNamespace(output_dir=tmp_path), None, None)
    assert counted == {step: 6 for step in range(41) if telemetry_cost.telemetry_is_on(step)}
    found = json.loads((tmp_path / telemetry_cost.TIMES).read_text())
    assert found.pop("read_at") == [*counted]
    assert {name: len(values) for name, values in found.items()} == {"step_ms": 40} | dict.fromkeys(
        telemetry_cost.PARTS, 20
    )
    assert all(value > 0 for values in found.values() for value in values)
