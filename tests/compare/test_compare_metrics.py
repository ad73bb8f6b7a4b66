"""From synthetic rows to numbers that can be worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
from builders import STEPS, WARMUP, comparison, experts, run

from moe_kernels.tools.compare.comparison import Analysis
from moe_kernels.tools.compare.metrics import expert_calls, run_metrics
from moe_kernels.tools.compare.report import problems


def test_times_leave_the_warm_up_out() -> None:
    metrics = run_metrics(run("baseline-1", 187.0), WARMUP)
    assert metrics.steps == STEPS
    # A pause of 5 s before the last warm-up log must not show.
    assert metrics.timed_steps == len(metrics.step_ms) == STEPS - WARMUP
    assert metrics.step_ms == pytest.approx([187.0] * 30, abs=0.01)
    assert metrics.tokens_per_step == 1000
    assert metrics.tokens_per_s == pytest.approx([1e6 / 187.0] * 30)
    assert (metrics.startup_s, metrics.first_step_s, metrics.total_s) == (20, 10, 60)


def test_memory_is_the_highest_of_the_whole_log() -> None:
    metrics = run_metrics(run("baseline-1", 187.0), WARMUP)
    assert (metrics.peak_allocated_gib, metrics.peak_active_gib) == (20.0, 21.0)


def test_nvml_samples_count_inside_the_timed_steps_only() -> None:
    metrics = run_metrics(run("optimized-1", 150.0, calls=10), WARMUP)
    assert (metrics.gpu_busy, metrics.power_w, metrics.tensor_active) == (95.0, 500.0, 40.0)


def test_a_cpu_run_has_no_gpu_numbers() -> None:
    result = run("baseline-1", 187.0, memory=0.0)
    for row in result.rows:
        row["train/memory/max_allocated (GiB)"] = row["train/memory/max_active (GiB)"] = 0
    samples = result.samples
    for series in (samples.t, samples.busy, samples.memory, samples.power, samples.counters_t):
        series.clear()
    for series in (samples.sm_active, samples.tensor_active, samples.dram_active):
        series.clear()
    metrics = run_metrics(result, WARMUP)
    assert metrics.peak_allocated_gib is metrics.gpu_busy is metrics.power_w is metrics.device_memory_gib is None


def test_a_run_that_logged_nothing_gives_no_numbers() -> None:
    metrics = run_metrics(run("baseline-1", 187.0, losses=[], status="failed"), WARMUP)
    assert metrics.steps == metrics.timed_steps == 0
    assert metrics.step_ms == []
    assert metrics.tokens_per_step is None


@pytest.mark.parametrize(("calls", "expected"), [(10, 10 * STEPS), (0, 0)])
def test_expert_calls_are_summed_over_the_run(calls: int, expected: int) -> None:
    assert expert_calls(run("optimized-1", 150.0, calls=calls)) == expected


def test_expert_calls_fall_back_to_the_plugins_line() -> None:
    result = run("optimized-1", 150.0)
    assert expert_calls(result) is None
    result.plugin_line = "moe_kernels: backend=triton (x), 12 expert calls dispatched in step 1, group_size=128"
    assert expert_calls(result) == 12


def test_the_experts_share_and_its_limit() -> None:
    analysis = Analysis(comparison())
    before, after = analysis.shares["baseline"], analysis.shares["optimized"]
    # 10 layers x 7.7 ms of 187 ms; 10 x 3.9 of 150.
    assert before.experts_ms == pytest.approx(77.0)
    assert before.fraction == pytest.approx(77 / 187, abs=1e-4)
    assert before.limit == pytest.approx(187 / 110, abs=1e-3)
    assert after.experts_ms == pytest.approx(39.0)
    assert analysis.expected_step_ms == pytest.approx(187 - 77 + 39, abs=0.01)
    assert analysis.speedup == pytest.approx(187 / 150, abs=1e-4)


def test_the_share_counts_micro_batches_and_recomputation() -> None:
    config = {"bf16": True, "gradient_accumulation_steps": 2, "gradient_checkpointing": True}
    analysis = Analysis(comparison(runs=[run("baseline-1", 400.0, config=config)]))
    assert analysis.shares["baseline"].experts_ms == pytest.approx(10 * 2 * (7.7 + 3.0))


def test_a_share_above_one_has_no_limit() -> None:
    analysis = Analysis(comparison(runs=[run("baseline-1", 50.0)]))
    assert analysis.shares["baseline"].fraction > 1
    assert analysis.shares["baseline"].limit is None


def test_the_baseline_runs_on_what_transformers_picks_unless_the_file_says() -> None:
    named = run("baseline-1", 187.0, config={"bf16": True, "experts_implementation": "eager"})
    assert Analysis(comparison()).implementation["baseline"] == "grouped_mm"
    analysis = Analysis(comparison(runs=[named]))
    assert analysis.implementation["baseline"] == "eager"
    assert analysis.shares["baseline"].experts_ms == pytest.approx(107.0)
    # The plugin selects our kernels itself: the run file need not name them.
    ours = run("optimized-1", 150.0, calls=10, config={"bf16": True, "moe_kernels": True})
    assert Analysis(comparison(runs=[named, ours])).implementation["optimized"] == "moe_kernels"
    assert Analysis(comparison(experts={"error": "crashed"})).implementation["baseline"] == "unknown"
    assert experts()["default"] == "grouped_mm"


KERNELS_PLUGIN = {"bf16": True, "plugins": ["axolotl.integrations.kernels.KernelsPlugin"]}


@pytest.mark.parametrize(
    ("config", "recorded", "ran", "words"),
    [
        ({"bf16": True}, "", "grouped_mm", None),
        ({"bf16": True}, "grouped_mm", "grouped_mm", None),
        # What the trainer found counts, whatever the run file says.
        ({"bf16": True}, "LigerExperts", "LigerExperts", "ran on LigerExperts, not on grouped_mm, which"),
        ({"bf16": True, "experts_implementation": "grouped_mm"}, "eager", "eager", "which its run file names"),
        # Axolotl's KernelsPlugin without a kernel pins the eager loop, also in reports that did not record it.
        (KERNELS_PLUGIN, "eager", "eager", "KernelsPlugin, listed without a kernel, sets that. Cure: take it out"),
        (KERNELS_PLUGIN, "", "eager", "set experts_implementation: grouped_mm"),
        (KERNELS_PLUGIN | {"experts_implementation": "grouped_mm"}, "", "grouped_mm", None),
        (KERNELS_PLUGIN | {"experts_implementation": "eager"}, "eager", "eager", None),
        (KERNELS_PLUGIN | {"use_scattermoe": True}, "scattermoe", "scattermoe", None),
        (KERNELS_PLUGIN | {"expert_backend": "sonicmoe"}, "sonicmoe", "sonicmoe", None),
    ],
)
def test_the_baseline_says_what_its_experts_ran_on(
    config: dict[str, Any], recorded: str, ran: str, words: str | None
) -> None:
    baseline = run("baseline-1", 187.0, config=config, experts=recorded)
    ours = run("optimized-1", 150.0, calls=10, experts="moe_kernels" if recorded else "")
    analysis = Analysis(comparison(runs=[baseline, ours]))
    assert analysis.implementation == {"baseline": ran, "optimized": "moe_kernels"}
    assert (analysis.other_baseline is None) is (words is None)
    if words:
        assert words in str(analysis.other_baseline)
        assert f"mixtral: {analysis.other_baseline}" in problems(analysis)
