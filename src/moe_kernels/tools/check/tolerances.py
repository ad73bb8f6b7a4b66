"""How close is close enough, judged against a float64 truth and against plain PyTorch in the same dtype.

A fixed ``atol`` hides a scale error of half a percent behind bf16 noise. Here a result passes when its error is
no larger than the error plain PyTorch makes in the same dtype on the same data, when it has no bias (slope),
and when NaN and infinity stand exactly where the truth has them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

RMS_FACTOR = 1.25
MAX_FACTOR = 2.0
SLOPE_LIMIT = 1e-3
# Slack in units of the dtype's epsilon, for data on which plain PyTorch happens to be exact. In float32 the order
# of summation decides: torch.mm has an rms error of 2 epsilons. Sequential sums of K products in one accumulator
# have 2.9 at K=352, 4.9 at K=1024 and 12.6 at K=7168; blocks of 32, as the kernels sum them, have 1.0, 1.2 and 2.4.
# In 16 bits the final rounding dominates and needs less.
_RMS_GRAIN = {torch.bfloat16: 0.1, torch.float16: 0.1, torch.float32: 2.0, torch.float64: 8.0}
_MAX_GRAIN = {torch.bfloat16: 0.5, torch.float16: 0.5, torch.float32: 8.0, torch.float64: 32.0}


def _rms(t: Tensor) -> float:
    return t.square().mean().sqrt().item() if t.numel() else 0.0


def _peak(t: Tensor) -> float:
    return t.abs().max().item() if t.numel() else 0.0


class Errors(NamedTuple):
    """How far values are from the truth, or the limits of that, or (first two) how often further than others."""

    rms: float
    largest: float
    slope: float  # relative: what all values are too large by

    @classmethod
    def of(cls, values: Tensor, truth: Tensor) -> Errors:
        square = truth.square().sum().item()
        slope = (values * truth).sum().item() / square - 1.0 if square else 0.0
        return cls(_rms(values - truth), _peak(values - truth), slope)

    def over(self, eager: Errors) -> Errors:
        """As multiples of ``eager``'s, the slope apart: 1.0 means equally accurate."""
        rms = self.rms / eager.rms if eager.rms else float(self.rms > 0)
        largest = self.largest / eager.largest if eager.largest else float(self.largest > 0)
        return Errors(rms, largest, self.slope)


def _limits(eager: Errors, truth: Tensor, dtype: torch.dtype, step: float, independent: int | None) -> Errors:
    """What the errors of a result in ``dtype`` may be where those of plain PyTorch are ``eager``."""
    epsilon, scale = torch.finfo(dtype).eps, _rms(truth)
    # Statistics of few elements are noisy (plain PyTorch may be exact by luck): widen by the standard error.
    count = max(1, min(truth.numel(), independent or truth.numel()))
    luck = 4 / count**0.5
    # The slope is a mean over the elements that are not small: a gradient is zero but for the experts in use.
    astray = luck * step
    carrying = (truth.square().sum() ** 2 / truth.pow(4).sum()).item() if scale else 1.0
    noise = 4 * max(eager.rms / scale if scale else 0.0, 0.3 * epsilon, astray) / min(carrying, count) ** 0.5
    return Errors(
        RMS_FACTOR * eager.rms * (1 + luck) + ((_RMS_GRAIN[dtype] + luck) * epsilon + astray) * scale,
        MAX_FACTOR * max(eager.largest, 2 * eager.rms)
        + ((_MAX_GRAIN[dtype] + luck) * epsilon + astray) * _peak(truth),
        SLOPE_LIMIT + 2 * abs(eager.slope) + noise,
    )


def _same_pattern(actual: Tensor, expected: Tensor, name: str) -> None:
    for what, test in (("NaN", torch.isnan), ("infinity", torch.isinf)):
        ours, truth = test(actual), test(expected)
        if not torch.equal(ours, truth):
            extra, lost = int((ours & ~truth).sum()), int((truth & ~ours).sum())
            first = (ours != truth).nonzero()[0].tolist()
            raise AssertionError(f"{name}: {what} at {extra} places where the truth has none, and none at {lost} "
                                 f"places where it has; first at {first}")  # fmt: skip


def _worst(errors: Tensor, finite: Tensor, actual: Tensor, truth: Tensor) -> str:
    at = torch.zeros_like(truth)
    at[finite] = errors
    index = tuple(int(i) for i in torch.unravel_index(at.argmax(), at.shape))
    return f"; worst at {index}: {actual[index].item():.6g}, truth {truth[index].item():.6g}"


def assert_close_to_truth(
    actual: Tensor,
    truth_fp64: Tensor,
    eager_same_dtype: Tensor,
    name: str,
    *,
    compute_dtype: torch.dtype | None = None,
    step: float = 0.0,
    independent: int | None = None,
) -> Errors:
    """Fail unless ``actual`` is as close to the truth as plain PyTorch in the same dtype, and unbiased.

    Args:
        actual: the tensor under test, any floating dtype.
        truth_fp64: same shape, float64, computed from the same (already rounded) inputs.
        eager_same_dtype: same shape and dtype as ``actual``, computed by plain PyTorch.
        name: used in the message.
        compute_dtype: dtype of the arithmetic when it is narrower than the result's (the float32 gradient of routing
            weights in a bfloat16 layer); default the result's own.
        step: of a coarse rounding on the way, relative: a number near the middle between two of them may go to
            either. In many elements as many of the yardstick's go astray; where there are few, luck decides.
        independent: how many rounded numbers decide all elements, if fewer: a matrix of low rank has few.

    Returns:
        The errors over those of plain PyTorch, so that drift can be recorded before it fails.

    Raises:
        AssertionError: naming every limit that was exceeded, with both numbers.
    """
    assert actual.shape == truth_fp64.shape, f"{name}: shape {tuple(actual.shape)}, truth {tuple(truth_fp64.shape)}"
    assert actual.dtype == eager_same_dtype.dtype, f"{name}: dtype {actual.dtype}, eager {eager_same_dtype.dtype}"
    dtype = actual.dtype
    truth_fp64 = truth_fp64.detach().double()
    # The pattern is judged after rounding: a float64 truth beyond float16's range is an infinity there.
    _same_pattern(actual, truth_fp64.to(dtype), name)
    finite = torch.isfinite(truth_fp64.to(dtype)) & torch.isfinite(eager_same_dtype)
    all_finite = bool(finite.all())  # selecting takes longer than all the rest
    truth, ours, eager = (
        values.flatten() if all_finite else values[finite]
        for values in (truth_fp64, actual.detach().double(), eager_same_dtype.detach().double())
    )
    errors, eager_errors = Errors.of(ours, truth), Errors.of(eager, truth)
    limits = _limits(eager_errors, truth, compute_dtype or dtype, step, independent)
    complaints = [
        f"{what} error {abs(value):.3e} > {limit:.3e}"
        for what, value, limit in zip(("rms", "max", "slope"), errors, limits, strict=True)
        if abs(value) > limit
    ]
    if complaints:
        if truth.numel():
            complaints[-1] += _worst((ours - truth).abs(), finite, actual, truth_fp64)
        raise AssertionError(f"{name} ({dtype}): " + ", ".join(complaints))
    return errors.over(eager_errors)
