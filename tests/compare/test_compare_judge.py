"""Verdicts on synthetic numbers: each kind must be reachable."""

from __future__ import annotations

import math

import pytest
from builders import comparison, experts, losses, run

from moe_kernels.tools.compare.comparison import Analysis
from moe_kernels.tools.compare.gpu import GIB
from moe_kernels.tools.compare.judge import CONFIRMED, NOT_CONFIRMED, NOT_JUDGED, smooth
from moe_kernels.tools.compare.report import layer_table, problems


def verdicts(analysis: Analysis) -> dict[str, str]:
    return {claim.title: claim.verdict for claim in analysis.claims}


def test_every_claim_confirmed() -> None:
    analysis = Analysis(comparison())
    assert set(verdicts(analysis).values()) == {CONFIRMED}, analysis.claims
    assert analysis.sound
    assert not analysis.unconfirmed


def test_nothing_is_hidden_where_nothing_is_better() -> None:
    same = [run("baseline-1", 187.0), run("optimized-1", 187.0, calls=10), run("baseline-2", 187.0)]
    for result in same:
        result.samples.tensor_active = [30.0] * 600
    stock = experts()
    stock["measurements"] = [
        dict(row, forward_ms={"median": 3.0}, launches_forward_backward=60) for row in stock["measurements"]
    ]
    analysis = Analysis(comparison(runs=same, experts=stock))
    found = verdicts(analysis)
    assert found.pop("The same loss curve") == CONFIRMED
    assert set(found.values()) == {NOT_CONFIRMED}, found
    # A slow kernel is a finding, not a failure of the comparison.
    assert analysis.sound
    assert len(analysis.unconfirmed) == 6


def test_a_cpu_judges_the_loss_alone() -> None:
    found = verdicts(Analysis(comparison(gpu=None)))
    assert found.pop("The same loss curve") == CONFIRMED
    assert set(found.values()) == {NOT_JUDGED}


def test_a_step_within_the_spread_is_not_confirmed() -> None:
    near = [run("baseline-1", 151.0), run("optimized-1", 150.0, calls=10)]
    for result, wobble in zip(near, (5.0, -5.0), strict=True):
        for i, row in enumerate(result.rows):
            row["_timestamp"] += (i % 2) * wobble / 1000
    analysis = Analysis(comparison(runs=near))
    claim = next(claim for claim in analysis.claims if claim.title == "A faster training step")
    assert claim.verdict == NOT_CONFIRMED
    assert "overlap" in claim.evidence


def test_a_loss_that_drifts_beyond_the_noise_is_named() -> None:
    drifting = [loss + 0.02 * i for i, loss in enumerate(losses())]
    analysis = Analysis(
        comparison(runs=[run("baseline-1", 187.0), run("optimized-1", 150.0, calls=10, losses=drifting)])
    )
    assert analysis.loss.verdict == NOT_CONFIRMED
    assert "on average, more than" in analysis.loss.words
    assert "at worst, more than" in analysis.loss.words
    assert not analysis.sound


def test_noise_of_the_baseline_widens_the_tolerance() -> None:
    off = losses(0.15)
    pair = [run("baseline-1", 187.0), run("optimized-1", 150.0, calls=10, losses=off)]
    assert Analysis(comparison(runs=pair)).loss.verdict == NOT_CONFIRMED
    noisy = run("baseline-2", 187.0, losses=losses(-0.1))
    loss = Analysis(comparison(runs=[*pair, noisy])).loss
    assert loss.verdict == CONFIRMED
    assert loss.tolerance == pytest.approx(0.3)
    assert loss.noise_mean == pytest.approx(0.1)


def test_every_optimised_run_is_judged_and_the_worst_is_reported() -> None:
    runs = [*comparison().runs, run("optimized-2", 150.0, calls=10, losses=losses(3.0))]
    analysis = Analysis(comparison(runs=runs))
    assert analysis.loss.verdict == NOT_CONFIRMED
    assert analysis.loss.words.startswith("optimized-2, the furthest off of 2: the first step differs by 3")
    assert analysis.loss.differences == pytest.approx([3.0] * 40)
    runs[3] = run("optimized-2", 150.0, calls=10, losses=losses(), first_norm=2.2)
    assert "optimized-2, the furthest off of 2: the first gradient norm" in Analysis(comparison(runs=runs)).loss.words


def test_noise_is_that_of_the_baselines_furthest_apart() -> None:
    runs = [
        run("baseline-1", 187.0),
        run("optimized-1", 150.0, calls=10, losses=losses(0.2)),
        run("baseline-2", 187.0, losses=losses(0.05)),
        run("baseline-3", 187.0, losses=losses(-0.05)),
    ]
    loss = Analysis(comparison(runs=runs)).loss
    assert loss.noise_mean == pytest.approx(0.1)
    assert loss.verdict == CONFIRMED


@pytest.mark.parametrize(("off", "verdict"), [(2.0, NOT_JUDGED), (0.0, NOT_JUDGED), (4.0, NOT_CONFIRMED)])
def test_noise_that_hides_every_fault_confirms_nothing(off: float, verdict: str) -> None:
    runs = [
        run("baseline-1", 187.0),
        run("optimized-1", 150.0, calls=10, losses=losses(off)),
        run("baseline-2", 187.0, losses=losses(1.0)),
    ]
    analysis = Analysis(comparison(runs=runs))
    assert analysis.loss.verdict == verdict
    assert not analysis.sound
    [problem] = problems(analysis)
    assert ("cannot be judged: two equal baseline runs differ by so much" in problem) == (verdict == NOT_JUDGED)


def test_negative_losses_have_tolerances_too() -> None:
    runs = comparison().runs
    for result in runs:
        for row in result.rows:
            row["train/loss"] = -row["train/loss"]
    loss = Analysis(comparison(runs=runs)).loss
    assert loss.verdict == CONFIRMED
    assert loss.tolerance > 0
    assert loss.first_tolerance > 0


def test_a_gradient_where_the_baseline_has_none_is_a_fault() -> None:
    runs = [run("baseline-1", 187.0, first_norm=0.0), run("optimized-1", 150.0, calls=10)]
    assert Analysis(comparison(runs=runs)).loss.verdict == NOT_CONFIRMED


def test_the_first_step_is_judged_more_tightly() -> None:
    values = losses()
    values[0] += 0.05
    loss = Analysis(
        comparison(runs=[run("baseline-1", 187.0), run("optimized-1", 150.0, calls=10, losses=values)])
    ).loss
    assert loss.verdict == NOT_CONFIRMED
    assert "the first step differs by 0.05" in loss.words
    assert loss.mean < loss.tolerance


def test_a_wrong_gradient_shows_at_the_first_norm() -> None:
    wrong = run("optimized-1", 150.0, calls=10, first_norm=2.2)
    loss = Analysis(comparison(runs=[run("baseline-1", 187.0), wrong])).loss
    assert loss.verdict == NOT_CONFIRMED
    assert "first gradient norm differs by 10" in loss.words


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_fails(bad: float) -> None:
    values = losses()
    values[4] = bad
    analysis = Analysis(
        comparison(runs=[run("baseline-1", 187.0), run("optimized-1", 150.0, calls=10, losses=values)])
    )
    assert analysis.loss.verdict == NOT_CONFIRMED
    assert analysis.loss.words == f"the loss of optimized-1 is {bad} at step 5"
    assert not analysis.sound


def test_fp32_is_judged_more_tightly_than_bf16() -> None:
    off = losses(0.02)
    runs = [run("baseline-1", 187.0), run("optimized-1", 150.0, calls=10, losses=off)]
    assert Analysis(comparison(runs=runs)).loss.verdict == CONFIRMED
    for result in runs:
        result.config = {"bf16": False}
    assert Analysis(comparison(runs=runs)).loss.verdict == NOT_CONFIRMED


@pytest.mark.parametrize("calls", [None, 0])
def test_no_dispatch_is_the_only_verdict(calls: int | None) -> None:
    analysis = Analysis(comparison(runs=[run("baseline-1", 187.0), run("optimized-1", 150.0, calls=calls)]))
    assert [claim.verdict for claim in analysis.claims] == [NOT_CONFIRMED]
    assert "optimized-1 did not use the kernels" in analysis.claims[0].evidence
    assert analysis.speedup is None
    assert not analysis.sound


@pytest.mark.parametrize("calls", [0, None, "nan"])
def test_a_step_without_a_call_is_not_our_kernels(calls: object) -> None:
    runs = comparison().runs
    runs[1].rows[7]["train/moe/expert_calls"] = calls
    analysis = Analysis(comparison(runs=runs))
    assert "optimized-1 did not use the kernels at step 8" in (analysis.fault or "")


def test_any_spelling_of_a_precision_decides_the_tolerance() -> None:
    runs = [run("baseline-1", 187.0), run("optimized-1", 150.0, calls=10, losses=losses(0.02))]
    for result in runs:
        result.config = {"bfloat16": True}
    assert Analysis(comparison(runs=runs)).loss.verdict == CONFIRMED


def test_a_baseline_on_our_kernels_is_no_baseline() -> None:
    analysis = Analysis(comparison(runs=[run("baseline-1", 187.0, calls=10), run("optimized-1", 150.0, calls=10)]))
    assert "baseline-1 should show the stock kernels" in (analysis.fault or "")


def test_a_failed_and_a_missing_run() -> None:
    failed = run("optimized-1", 150.0, calls=10, losses=losses()[:3], status="failed", error="out of memory")
    analysis = Analysis(
        comparison(runs=[run("baseline-1", 187.0), failed], planned=["baseline-1", "optimized-1", "baseline-2"])
    )
    assert analysis.loss.verdict == NOT_JUDGED
    assert "no finished optimised run" in analysis.loss.words
    assert [result.run_id for result in analysis.failed] == ["optimized-1"]
    assert analysis.missing == ["baseline-2"]
    assert not analysis.sound
    assert analysis.speedup is None
    assert Analysis(comparison(runs=[])).loss.verdict == NOT_JUDGED


def test_a_failed_run_beside_a_good_pair_is_a_failure_all_the_same() -> None:
    failed = run("eager-1", 300.0, losses=[], status="failed", error="out of memory")
    analysis = Analysis(comparison(runs=[*comparison().runs, failed]))
    assert analysis.loss.verdict == CONFIRMED
    assert analysis.speedup is not None
    assert not analysis.sound


def test_an_implementation_that_is_wrong_is_not_compared() -> None:
    broken = experts()
    broken["measurements"][2] = {"implementation": "moe_kernels", "ok": False, "note": "dx is off by 0.3"}
    found = {claim.title: claim for claim in Analysis(comparison(experts=broken)).claims}
    claim = found["Expert forward at least 2x as fast as eager"]
    assert (claim.verdict, claim.evidence) == (NOT_JUDGED, "moe_kernels: dx is off by 0.3")
    analysis = Analysis(comparison(experts=broken))
    assert analysis.faults == ["moe-kernels' expert layer is wrong here: dx is off by 0.3"]
    assert not analysis.sound


def test_a_layer_that_could_not_be_measured_is_a_fault() -> None:
    analysis = Analysis(comparison(experts={"error": "out of memory", "measurements": []}))
    assert analysis.faults == ["the expert layer was not measured: out of memory"]
    assert not analysis.sound


def test_a_layer_that_the_benchmark_cannot_run_is_no_fault_and_is_said() -> None:
    analysis = Analysis(comparison(experts={"error": "", "note": "it has a bias", "measurements": []}))
    assert analysis.sound
    evidence = [claim.evidence for claim in analysis.claims]
    assert evidence.count("the expert layer was not measured: it has a bias") == 3
    assert layer_table(analysis).rows == (("not measured", "it has a bias"),)


def test_smoothing_is_a_running_mean() -> None:
    assert smooth([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == [1.0, 1.5, 2.0, 2.5, 3.0, 4.0]


def test_a_base_that_our_side_did_not_keep_is_no_comparison() -> None:
    def analysis(quantizer: str, ours: dict[str, int], **config: bool) -> Analysis:
        baseline = {"bf16": True, "model_quantization_config": quantizer}
        changes = {"baseline": {"frozen": {"bfloat16": 4 * GIB}, "config": baseline if quantizer else {"bf16": True}}}
        changes["optimized"] = {"frozen": ours, "config": {"bf16": True, **config}, "calls": 10}
        runs = [run(f"{role}-1", 100.0, **values) for role, values in changes.items()]
        return Analysis(comparison(runs=runs))

    kept = {"float8_e4m3fn": 2 * GIB, "float32": 1000}
    found = analysis("FineGrainedFP8Config", kept)
    assert found.faults == []
    assert found.frozen == {
        "baseline": "bfloat16, dequantised as it was loaded (FineGrainedFP8Config)",
        "optimized": "float8_e4m3fn + float32, dequantised ahead of each GEMM",
    }
    assert [round(side.frozen_gib or 0, 3) for side in found.sides.values()] == [4.0, 2.0]
    rounded = analysis("FineGrainedFP8Config", kept, moe_fp8_activations=True).frozen["optimized"]
    assert rounded == "float8_e4m3fn + float32, multiplied in fp8 with rows rounded to it"
    assert analysis("", {"bfloat16": 4 * GIB}).faults == [], "an ordinary pair"
    [fault] = analysis("FineGrainedFP8Config", {"bfloat16": 4 * GIB}).faults
    assert fault == "moe-kernels' frozen experts are in 16 bits, as the baseline's"
