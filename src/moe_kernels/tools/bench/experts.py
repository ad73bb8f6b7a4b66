"""Measure one expert layer: every implementation in one process, on the same tensors, correctness first."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch

from moe_kernels.settings import DEFAULT_GROUP_SIZE, GroupSize
from moe_kernels.shapes import LayerShape
from moe_kernels.tools.bench.accuracy import relative_errors, what_is_wrong
from moe_kernels.tools.bench.layer import (
    OURS,
    Experts,
    Layer,
    make_layer,
    op_experts,
    our_settings,
    our_variants,
    transformers_experts,
)
from moe_kernels.tools.bench.peers import PEER_FAILURES, PEERS, failure, why_not_form
from moe_kernels.tools.bench.timing import MIB, Call, Clock, Spread, Times, count_launches, peak_bytes, saved_bytes
from moe_kernels.tools.check.forms import PLAIN

DENSE = "dense"
Progress = Callable[[str], object]


@dataclass(frozen=True)
class Measurement:
    """One row of the benchmark. Times in ms, memory in MiB, rates in TFLOP/s; None where not measured."""

    # A peer, moe_kernels, moe_kernels[g=..,p=..], or dense, the ceiling: the same six GEMMs with R = T*K rows and one
    # weight matrix through torch.mm.
    implementation: str
    shape: str
    tokens: int
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    routing: str
    imbalance: float  # rows of the busiest expert over the mean
    dtype: str
    device: str
    ok: bool  # the errors are finite and at most three times those of grouped_mm (or eager)
    available: bool = True  # it could be tried
    note: str = ""  # why it is not available or not ok
    forward_ms: Spread | None = None  # from the start of the call to the end of its last kernel
    forward_backward_ms: Spread | None = None
    # GPU time alone, launches queued ahead. A call that waits for the GPU inside (eager does) has the times above.
    forward_queued_ms: Spread | None = None
    forward_backward_queued_ms: Spread | None = None
    forward_host_ms: Spread | None = None  # until the call returns, without synchronising
    forward_backward_host_ms: Spread | None = None
    forward_tflops: float | None = None
    forward_backward_tflops: float | None = None
    dense_fraction_forward: float | None = None  # time of dense over that of this row
    dense_fraction: float | None = None  # the same, forward and backward
    launches_forward: int | None = None  # kernels in one call
    launches_forward_backward: int | None = None
    copies_forward: int | None = None  # memcpy and memset
    copies_forward_backward: int | None = None
    saved_mb: float | None = None  # distinct storages kept for the backward, x included, weights not
    # Highest in forward and backward above inputs, weights and their gradients, the output freed before the backward.
    peak_mb: float | None = None
    # Relative L2 error of out, dx, dw, and of the gradient of all that is trained, against float32 (of float32:
    # float64).
    rel_error: dict[str, float] = field(default_factory=dict)
    form: str = PLAIN  # how the layer is trained; a frozen one has no gradients of weights, here and in dense

    def to_json(self) -> dict[str, object]:
        """Plain JSON values; a spread becomes {median, p20, p80}."""
        return asdict(self)


def measure(
    shape: LayerShape,
    *,
    implementations: tuple[str, ...] = ("eager", "grouped_mm", OURS),
    device: torch.device | str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    repeats: int = 20,
    routing: str = "mild",
    group_sizes: tuple[GroupSize, ...] = (DEFAULT_GROUP_SIZE,),
    persistent: tuple[bool, ...] = (True,),
    recompute: tuple[bool, ...] = (False,),
    seed: int = 0,
    form: str = PLAIN,
    progress: Progress = lambda message: None,
) -> list[Measurement]:
    """Measure ``implementations`` and the dense ceiling on ``shape``.

    Args:
        shape: sizes of the layer and the number of tokens.
        implementations: names of :data:`moe_kernels.tools.bench.peers.PEERS`, and moe_kernels.
        device, dtype: where, and the dtype of x and the weights.
        repeats: timed calls of each implementation; medians are of these.
        routing: balanced, mild or heavy.
        group_sizes, persistent, recompute: knobs of moe_kernels; each combination becomes a row.
        seed: of the random tensors.
        form: a name of :data:`moe_kernels.tools.check.forms.FORMS`.
        progress: called with what is being done.

    Returns:
        One measurement for each implementation, in the order given, then ``dense``. One that is wrong, fails or is
        not available has ``ok=False`` and the reason in ``note``, and is not timed.

    Raises:
        ValueError: an unknown implementation.
    """
    unknown = sorted(set(implementations) - {*PEERS, OURS})
    if unknown:
        raise ValueError(f"unknown implementation {', '.join(unknown)}: choose from {', '.join((*PEERS, OURS))}")
    progress(f"{shape.name}: making tensors")
    layer = make_layer(shape, routing, torch.device(device), dtype, seed, form)
    ours = _ours(layer, form, group_sizes, persistent, recompute) if OURS in implementations else {}
    rows = [row for name in implementations for row in (ours if name == OURS else (name,))]
    runners, absent = _set_up(layer, rows, ours)
    errors, faults = _check(layer, runners, progress)
    good = {row: runner for row, runner in runners.items() if row not in faults}
    timed = _time(layer, good, repeats, progress)
    dense = timed[DENSE]
    results = []
    for row in rows:
        values: dict[str, Any] = {"form": form}
        if row in absent:
            values |= {"ok": False, "available": False, "note": absent[row]}
        elif row in faults:
            values |= {"ok": False, "note": faults[row], "rel_error": errors.get(row, {})}
        else:
            progress(f"{shape.name}: launches and memory of {row}")
            values |= _counts(layer, runners[row]) | _rates(layer, timed[row], dense) | {"rel_error": errors[row]}
        results.append(_measurement(layer, row, **values))
    note = f"{'four' if layer.case.frozen else 'six'} GEMMs of R rows, torch.mm"
    return [*results, _measurement(layer, DENSE, form=form, note=note, **_rates(layer, dense, dense))]


def _ours(
    layer: Layer,
    form: str,
    group_sizes: tuple[GroupSize, ...],
    persistent: tuple[bool, ...],
    recompute: tuple[bool, ...],
) -> dict[str, Callable[[], Experts]]:
    """{row: what makes that which runs it}. In transformers' module where that holds the form's weights."""
    if form == PLAIN:
        names = our_variants(group_sizes, persistent, recompute=recompute)
        return {row: partial(transformers_experts, layer, name) for row, name in names.items()}
    settings = our_settings(group_sizes, persistent, recompute)
    return {row: partial(op_experts, layer, **knobs) for row, knobs in settings.items()}


def _set_up(
    layer: Layer, rows: list[str], ours: dict[str, Callable[[], Experts]]
) -> tuple[dict[str, Experts], dict[str, str]]:
    """({row: what runs it}, {row: why it cannot run here})."""
    runners: dict[str, Experts] = {}
    absent: dict[str, str] = {}
    for row in rows:
        if row in ours:
            runners[row] = ours[row]()
            continue
        reason = why_not_form(row, layer.case) or PEERS[row].why_not(layer.shape, layer.x.device, layer.x.dtype)
        if reason is not None:
            absent[row] = reason
            continue
        try:
            runners[row] = PEERS[row].experts(layer)
        except PEER_FAILURES as error:
            absent[row] = f"it cannot be set up: {failure(error)}"
    return runners, absent


def _check(
    layer: Layer, runners: dict[str, Experts], progress: Progress
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """({row: relative error of each tensor}, {row: what is wrong with it})."""
    errors: dict[str, dict[str, float]] = {}
    faults: dict[str, str] = {}
    for row, runner in runners.items():
        progress(f"{layer.shape.name}: checking {row}")
        try:
            errors[row] = relative_errors(layer, runner)
        except torch.OutOfMemoryError:
            faults[row] = "out of GPU memory"
        except PEER_FAILURES as error:
            if row not in PEERS:
                raise
            faults[row] = f"it failed: {failure(error)}"
        if row in faults:
            layer.clear_gradients()
            torch.cuda.empty_cache()
    yardstick = errors.get("grouped_mm") or errors.get("eager") or {}
    floor = torch.finfo(layer.x.dtype).eps
    if layer.case.packed == "fp8 activations":  # one in 16 numbers that differ by eps is rounded 1/16 apart
        floor = (floor / 16) ** 0.5
    for row, found in errors.items():
        if fault := what_is_wrong(found, yardstick, floor):
            faults[row] = fault
    return errors, faults


def _forward(layer: Layer, experts: Experts) -> Call:
    return lambda: experts(layer.x, layer.topk_ids, layer.topk_weights)


def _forward_backward(layer: Layer, experts: Experts) -> Call:
    return lambda: experts(layer.x, layer.topk_ids, layer.topk_weights).backward(layer.grad_out)


class _Loss(torch.autograd.Function):
    """A loss whose gradient is ``grad_out`` and that does not keep ``out``: in a model nothing holds it either."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, grad_out: torch.Tensor) -> torch.Tensor:
        ctx.grad_out = grad_out
        return out.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _one: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.grad_out, None


def dense_calls(layer: Layer) -> tuple[Call, Call]:
    """The GEMMs of the layer with R rows and one expert's weights: 2 forward, 6 forward and backward; 4 if frozen."""
    shape = layer.shape
    like: dict[str, Any] = {"device": layer.x.device, "dtype": layer.x.dtype}
    rows = torch.randn(shape.rows, shape.hidden, **like)
    wide = torch.randn(shape.rows, layer.gate_up.shape[1], **like)
    narrow = torch.randn(shape.rows, shape.intermediate, **like)
    first, second = (weight[0].detach().contiguous() for weight in (layer.gate_up, layer.down))

    def forward() -> None:
        torch.mm(rows, first.T)
        torch.mm(narrow, second.T)

    def forward_backward() -> None:
        forward()
        torch.mm(rows, second)
        torch.mm(wide, first)
        if not layer.case.frozen:
            torch.mm(rows.T, narrow)
            torch.mm(wide.T, rows)

    return forward, forward_backward


def _time(
    layer: Layer, runners: dict[str, Experts], repeats: int, progress: Progress
) -> dict[str, tuple[Times, Times]]:
    """(forward, forward + backward) of every runner and of the dense GEMMs."""
    dense_forward, dense_both = dense_calls(layer)
    forward = {row: _forward(layer, runner) for row, runner in runners.items()} | {DENSE: dense_forward}
    both = {row: _forward_backward(layer, runner) for row, runner in runners.items()} | {DENSE: dense_both}
    clock = Clock(layer.x.device)

    def times(what: str, calls: dict[str, Call]) -> dict[str, Times]:
        progress(f"{layer.shape.name}: warming up {what}")
        for call in [*calls.values()] * 2:
            call()
            layer.clear_gradients()
        rounds = itertools.count(1)
        return clock.compare(
            calls,
            repeats,
            layer.clear_gradients,
            lambda: progress(f"{layer.shape.name}: timing {what}, round {next(rounds)} of {repeats}"),
        )

    forward_times, both_times = times("forward", forward), times("forward + backward", both)
    return {row: (forward_times[row], both_times[row]) for row in forward}


def _rates(layer: Layer, times: tuple[Times, Times], dense: tuple[Times, Times]) -> dict[str, Any]:
    forward, both = times
    return {
        "forward_ms": forward.total,
        "forward_backward_ms": both.total,
        "forward_queued_ms": forward.queued,
        "forward_backward_queued_ms": both.queued,
        "forward_host_ms": forward.host,
        "forward_backward_host_ms": both.host,
        "forward_tflops": layer.forward_flops / forward.total.median * 1e-9,
        "forward_backward_tflops": layer.forward_backward_flops / both.total.median * 1e-9,
        "dense_fraction_forward": dense[0].total.median / forward.total.median,
        "dense_fraction": dense[1].total.median / both.total.median,
    }


def _counts(layer: Layer, experts: Experts) -> dict[str, Any]:
    calls = {"forward": _forward(layer, experts), "forward_backward": _forward_backward(layer, experts)}
    weights = [t for w in (layer.gate_up, layer.down) for t in ([w] if isinstance(w, torch.Tensor) else w.parts())]
    tensors = [tensor for tensor in weights if isinstance(tensor, torch.Tensor)]
    found: dict[str, Any] = {"saved_mb": saved_bytes(calls["forward"], tensors) / MIB}
    if layer.x.device.type != "cuda":
        return found

    def loss_backward() -> None:
        _Loss.apply(calls["forward"](), layer.grad_out).backward()

    layer.clear_gradients()
    gradients = sum(w.nbytes for w in (layer.gate_up, layer.down) if w.requires_grad)
    found["peak_mb"] = (peak_bytes(loss_backward) - gradients) / MIB
    layer.clear_gradients()
    for what, call in calls.items():
        if launches := count_launches(call):
            found |= {f"launches_{what}": launches.kernels, f"copies_{what}": launches.copies}
    layer.clear_gradients()
    return found


def _measurement(layer: Layer, row: str, *, ok: bool = True, **values: Any) -> Measurement:
    sizes, device = asdict(layer.shape), layer.x.device
    return Measurement(
        implementation=row,
        shape=sizes.pop("name"),
        **sizes,
        routing=layer.routing,
        imbalance=layer.imbalance(),
        dtype=str(layer.x.dtype).removeprefix("torch."),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        ok=ok,
        **values,
    )
