"""Judges an implementation of the whole layer on one problem."""

from __future__ import annotations

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
