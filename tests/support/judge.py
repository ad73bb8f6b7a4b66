"""Judges an implementation of the whole layer on one problem, and of one GEMM."""

from __future__ import annotations

from torch import Tensor

from moe_kernels.tools.check.problems import Experts, Inputs, eager, run, truth
from moe_kernels.tools.check.tolerances import Errors, assert_close_to_truth


def check(implementation: Experts, inputs: Inputs, label: str = "") -> dict[str, Errors]:
    """Judge the output and every gradient of ``implementation``. Returns what was measured, by tensor name.

    Raises:
        AssertionError: naming the tensor and the limit it broke.
    """
    expected, plain, actual = truth(inputs), eager(inputs), run(implementation, inputs)
    measured = {}
    for name, value in actual.items():
        assert value is not None, f"{label} {name}: no gradient"
        measured[name] = assert_close_to_truth(
            value, expected[name], plain[name].to(value.dtype), f"{label} {name}", compute_dtype=inputs.gate_up.dtype
        )
    return measured


def assert_one_gemm(ours: Tensor, truth: Tensor, eager: Tensor, name: str, share: float = 0.9) -> None:
    """:func:`assert_close_to_truth`, and a ``share`` of the elements equals the rounded truth.

    That is so of one GEMM, not across roundings.
    """
    assert_close_to_truth(ours, truth, eager, name)
    exact = (ours == truth.to(ours.dtype)).double().mean().item() if ours.numel() else 1.0
    assert exact >= share, f"{name}: only {exact:.1%} of elements equal the rounded truth (at least {share:.0%})"
