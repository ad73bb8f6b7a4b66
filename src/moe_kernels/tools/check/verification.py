"""Verify a kernel configuration: output and every gradient, hostile routings, poisoned memory, two runs equal.

Used by ``moe-kernels verify`` and by ``moe-kernels tune``, which accepts no tile that fails here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from moe_kernels import backends
from moe_kernels.fp8 import Fp8Weight, check_fp8
from moe_kernels.kernels.launch.compile import compiling_only
from moe_kernels.moe import fused_experts
from moe_kernels.settings import DEFAULT_GROUP_SIZE, TILE_ROWS, GroupSize
from moe_kernels.tools.check.allocations import poisoned_allocations
from moe_kernels.tools.check.forms import PLAIN
from moe_kernels.tools.check.problems import Case, Experts, Inputs, call, eager, make_inputs, rerouted, run, truth
from moe_kernels.tools.check.tolerances import assert_close_to_truth

#: The plain-torch backend has neither tiles nor programs: it has one configuration.
TRITON_CONFIGURATIONS: tuple[tuple[GroupSize, bool], ...] = tuple(
    (size, persistent) for size in TILE_ROWS for persistent in (True, False)
)
TORCH_CONFIGURATIONS: tuple[tuple[GroupSize, bool], ...] = ((DEFAULT_GROUP_SIZE, True),)


@dataclass
class Verdict:
    """What one configuration did on one shape: the worst over all routings and tensors."""

    shape: str
    dtype: str
    backend: str  # what ran
    group_size: GroupSize
    persistent: bool
    form: str = PLAIN  # how the layer is trained
    routings: int = 0
    rms_ratio: float = 0.0  # error over that of plain PyTorch in the same dtype, both against float64
    max_ratio: float = 0.0
    slope_error: float = 0.0  # largest relative scale error
    repeatable: bool = True  # two runs gave bitwise equal output and gradients
    failures: list[str] = field(default_factory=list)  # sentences; empty when the configuration is right

    @property
    def ok(self) -> bool:
        """Right on every routing, and repeatable."""
        return not self.failures


def verify_case(
    case: Case,
    name: str,
    *,
    device: torch.device,
    routings: Sequence[str],
    configurations: Sequence[tuple[GroupSize, bool]] = TRITON_CONFIGURATIONS,
    backend: str = "auto",
    form: str = PLAIN,
    progress: Callable[[str], object] = lambda message: None,
) -> list[Verdict]:
    """Judge the output and every gradient of every (group_size, persistent) on every routing.

    The truth is the reference in float64, the yardstick the reference in the dtype of ``case``, the rule that of
    :mod:`moe_kernels.tools.check.tolerances`. What the package allocates without filling is NaN meanwhile. The
    verdicts call what ``case`` trains ``form``.
    """
    dtype = str(case.dtype).removeprefix("torch.")
    verdicts = [Verdict(name, dtype, backend, *configuration, form) for configuration in configurations]
    inputs = make_inputs(case, device)
    supported = [verdict for verdict in verdicts if _select(verdict, inputs, backend)]
    progress(f"{name}, compiling")
    # All at once: compiling one configuration after the other would take most of the time of a check.
    with compiling_only(device):
        for verdict in supported:
            compile_variants(_ours(verdict), verdict.backend, inputs)
    for routing in routings:
        inputs = rerouted(inputs, replace(case, routing=routing))
        expected, plain = truth(inputs), eager(inputs)
        for verdict in supported:
            progress(f"{name}, {routing}, group_size={verdict.group_size}, persistent={verdict.persistent}")
            verdict.routings += 1
            for variant, chosen in variants(verdict.backend).items():
                with chosen:
                    _judge(verdict, routing + variant, inputs, expected, plain)
    return verdicts


def _select(verdict: Verdict, inputs: Inputs, backend: str) -> bool:
    """Whether a backend can run this. Writes which one, or why none, into ``verdict``."""
    top_k, (group_size, persistent) = inputs.topk_ids.shape[1], (verdict.group_size, verdict.persistent)
    problem = backends.Problem.of(inputs.down, top_k, group_size=group_size, persistent=persistent)
    try:
        verdict.backend, _ = backends.select(problem, backend)
        gated = inputs.gate_up.shape[1] != inputs.down.shape[2]
        check_fp8(inputs.gate_up, gated, bool(inputs.options.get("interleaved")), inputs.x.device)
        check_fp8(inputs.down, False, False, inputs.x.device)
    except backends.UnsupportedProblem as error:
        verdict.failures = [str(error)]
    return verdict.ok


def compile_variants(ours: Experts, backend: str, inputs: Inputs) -> None:
    """Compile in parallel, without a launch, all that ``ours`` needs on ``backend`` for ``inputs``."""
    # Triton's interpreter compiles nothing.
    if not backends.launches_only(backends.load(backend)) or not inputs.x.is_cuda:
        return
    leaves = inputs.with_own_leaves()
    with compiling_only(inputs.x.device), backends.uncounted():
        for chosen in variants(backend).values():
            with chosen:
                call(ours, leaves)


def variants(backend: str) -> dict[str, AbstractContextManager[None]]:
    """What a backend chooses by sizes and GPU, each choice forced: {suffix of the routing's name: how}."""
    if backend != "gluon":
        return {"": nullcontext()}
    from moe_kernels.kernels.hopper.ring import COOPERATIVE, PING_PONG

    return {
        ", cooperative tiles, groups within experts, rows of dO and X gathered": _hopper(COOPERATIVE, 1, True, False),
        ", ping-pong tiles, two k blocks at a time": _hopper(PING_PONG, 2, False, True),
    }


@contextmanager
def _hopper(schedule: Any, together: int, gathered: bool, in_load: bool) -> Iterator[None]:
    from moe_kernels.backends.gluon import use_gathered
    from moe_kernels.kernels.hopper.dequantizing import use_dequantizing
    from moe_kernels.kernels.hopper.mainloop import use_k_blocks_per_wait
    from moe_kernels.kernels.hopper.ring import use_schedule, use_within_experts

    with (
        use_schedule("down", schedule),
        use_schedule("dgrad", schedule),
        use_k_blocks_per_wait(together),
        use_gathered(gathered),
        use_within_experts(gathered),
        use_dequantizing(in_load),
    ):
        yield


def _judge(
    verdict: Verdict,
    routing: str,
    inputs: Inputs,
    expected: dict[str, torch.Tensor],
    plain: dict[str, torch.Tensor],
) -> None:
    ours = _ours(verdict)
    step = torch.finfo(torch.float8_e4m3fn).eps if isinstance(inputs.gate_up, Fp8Weight) else 0.0
    before = backends.dispatch_counts().get(verdict.backend, 0)
    with poisoned_allocations():
        first, second = run(ours, inputs), run(ours, inputs)
    if backends.dispatch_counts().get(verdict.backend, 0) != before + 2:
        verdict.failures.append(f"{routing}: backend {verdict.backend} was asked for and did not run")
    for name, right in expected.items():
        value, again = first[name], second[name]
        if value is None or again is None:
            verdict.failures.append(f"{routing}: {name} is missing")
            continue
        if not torch.equal(value, again):
            verdict.repeatable = False
            verdict.failures.append(f"{routing}: {name} differs between two runs on the same input")
        # The gradient of a factor: products of the rows of a narrow matrix, one for each slot.
        narrow = value.shape[2 if name.endswith("b") else 1] if "_lora_" in name else None
        try:
            close = assert_close_to_truth(
                value,
                right,
                plain[name],
                f"{routing}: {name}",
                compute_dtype=inputs.x.dtype,
                step=step,
                independent=narrow and narrow * inputs.topk_ids.numel(),
            )
        except AssertionError as error:
            verdict.failures.append(str(error))
            continue
        verdict.rms_ratio = max(verdict.rms_ratio, close.rms)
        verdict.max_ratio = max(verdict.max_ratio, close.largest)
        verdict.slope_error = max(verdict.slope_error, abs(close.slope))


def _ours(verdict: Verdict) -> Experts:
    settings: Any = {"group_size": verdict.group_size, "persistent": verdict.persistent, "backend": verdict.backend}
    return partial(fused_experts, **settings)
