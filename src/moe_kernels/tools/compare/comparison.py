"""One comparison as it is stored: raw results, from which every verdict is computed again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, NonNegativeInt

from moe_kernels.tools.common.errors import UsageError
from moe_kernels.tools.common.files import read_json, write_json
from moe_kernels.tools.common.runfile import precision
from moe_kernels.tools.compare.decode import Misfit, decode
from moe_kernels.tools.compare.experts_bench import check_experts
from moe_kernels.tools.compare.gpu import Gpu
from moe_kernels.tools.compare.judge import CONFIRMED, NOT_CONFIRMED, Claim, judge_claims, judge_loss, kernels_ran
from moe_kernels.tools.compare.metrics import OURS, experts_by_name, run_metrics, share, side_metrics
from moe_kernels.tools.compare.pair import (
    BASELINE,
    EAGER,
    OPTIMIZED,
    chosen_experts,
    label,
    lists_kernels_plugin,
    why_no_name,
)
from moe_kernels.tools.compare.runner import FINISHED, RunResult

SCHEMA = "moe-kernels compare 1"
# Ids of the page that no comparison may take.
RESERVED = ("how",)


@dataclass
class Comparison:
    """Everything one comparison measured, raw."""

    name: str
    size: str
    warmup_steps: NonNegativeInt
    yaml_diff: str
    files: Annotated[list[str], Field(min_length=2, max_length=2)]  # the two YAML files
    planned: list[str]  # run ids that were to be
    command: str  # what the user typed
    created: str  # ISO 8601 in UTC
    versions: dict[str, str]  # Python, packages, commit and hash of our sources
    gpu: Gpu | None  # None on a CPU
    cpu: str
    runs: list[RunResult] = field(default_factory=list)  # those that failed too
    experts: dict[str, Any] = field(default_factory=dict)  # the layer's own measurement (see experts_bench)

    def check(self) -> None:
        """Raise Misfit where parts contradict each other."""
        if len({run.run_id for run in self.runs}) < len(self.runs):
            raise Misfit("two runs have the same run_id")
        for name in (self.name, self.size):
            if (reason := why_no_name(name)) is not None:
                raise Misfit(reason)
        if not {BASELINE, OPTIMIZED} <= {run_id.rpartition("-")[0] for run_id in self.planned}:
            raise Misfit("no run of the baseline, or none with moe-kernels, was planned")
        for run in self.runs:
            if run.run_id not in self.planned or run.run_id.rpartition("-")[0] != run.role:
                raise Misfit(f"the run {run.run_id!r:.40} of role {run.role!r:.40} was not planned")
            run.check()
        check_experts(self.experts)

    @property
    def label(self) -> str:
        """Its name in a report, and of its file."""
        return label(self.name, self.size)

    def to_json(self) -> dict[str, Any]:
        """Plain values: the raw part, and under ``judged`` what :class:`Analysis` makes of it."""
        return {"schema": SCHEMA, **asdict(self), "judged": Analysis(self).to_json()}


def save(comparison: Comparison, path: Path) -> None:
    """Write one comparison as JSON."""
    write_json(path, comparison.to_json())


def number_names(comparisons: Sequence[Comparison]) -> None:
    """Number comparisons whose name in the report, or whose id in its page, is taken."""
    taken: set[str] = set(RESERVED)
    for comparison in comparisons:
        name, number = comparison.name, 1
        while slug(comparison.label) in taken:
            number += 1
            comparison.name = f"{name}-{number}"
        taken.add(slug(comparison.label))


def slug(text: str) -> str:
    """A text as an id in the page."""
    return "".join(letter if letter.isalnum() else "-" for letter in text.lower())


def load(path: Path) -> list[Comparison]:
    """The comparisons in a JSON file, or in all JSON files of a folder.

    Raises:
        UsageError: there is none, or a file of another kind.
    """
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise UsageError(f"There is no report JSON at {path}. Name a folder that `moe-kernels compare` wrote.")
    comparisons = []
    for file in files:
        data = read_json(file)
        if not isinstance(data, dict) or data.pop("schema", None) != SCHEMA:
            raise UsageError(f"{file} is not a report of this version of `moe-kernels compare` ({SCHEMA}).")
        data.pop("judged", None)
        try:
            comparisons.append(decode(Comparison, data))
            comparisons[-1].check()
        except ValueError as error:
            raise UsageError(f"{file} is damaged: {error}. Cure: run the comparison again.") from error
    return comparisons


class Analysis:
    """Everything that is computed from the raw results of one comparison."""

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison
        self.on_gpu = comparison.gpu is not None
        self.runs = [run_metrics(run, comparison.warmup_steps) for run in comparison.runs]
        roles = [BASELINE, OPTIMIZED, *([EAGER] if any(run.role == EAGER for run in comparison.runs) else [])]
        self.sides = {role: side_metrics(self.runs, role) for role in roles}
        self.layer = experts_by_name(comparison.experts)
        self.implementation = {role: self._implementation(role) for role in roles}
        self.frozen = {role: self._frozen(role) for role in roles}
        layers = comparison.experts.get("moe_layers")
        shares = {
            role: share(side, self.layer.get(self.implementation[role]), layers, self._config(role))
            for role, side in self.sides.items()
        }
        self.shares = {role: found for role, found in shares.items() if found is not None}
        self.loss = judge_loss(self.runs, precision(self._config(BASELINE)))
        self.fault = kernels_ran(self.runs, {run.run_id: run.uses_kernels for run in comparison.runs})
        self.failed = [run for run in comparison.runs if run.status != FINISHED]
        self.missing = sorted(set(comparison.planned) - {run.run_id for run in comparison.runs})
        note = comparison.experts.get("note", "")
        self.claims = judge_claims(self.sides, self.layer, self.loss, self.on_gpu, self.fault, note)

    @property
    def speedup(self) -> float | None:
        """Baseline's median step over the optimised one; None where a side is missing or invalid."""
        one, two = self.sides[BASELINE].step_ms, self.sides[OPTIMIZED].step_ms
        return one.median / two.median if one and two and not self.fault else None

    @property
    def expected_step_ms(self) -> float | None:
        """The baseline's step minus the time that the kernels save by the layer's measurement: a check of both."""
        if BASELINE not in self.shares or OPTIMIZED not in self.shares:
            return None
        before, after = self.shares[BASELINE], self.shares[OPTIMIZED]
        return before.step_ms - before.experts_ms + after.experts_ms

    @property
    def sound(self) -> bool:
        """All planned trainings finished with the right kernels, and losses and layer are correct."""
        return not (self.failed or self.missing or self.faults) and self.loss.verdict == CONFIRMED

    @property
    def faults(self) -> list[str]:
        """What makes the numbers wrong or incomplete, beyond a training that failed."""
        ours = self.layer.get(OURS, {"ok": True})
        error = self.comparison.experts.get("error")
        drawn = {run.weights for run in self.comparison.runs if run.weights}
        return [
            *([self.fault] if self.fault else []),
            *(["the runs did not start from the same weights"] if len(drawn) > 1 else []),
            *(["moe-kernels' frozen experts are in 16 bits, as the baseline's"] if self._unpacked() else []),
            *([f"the expert layer was not measured: {error}"] if error else []),
            *([] if ours["ok"] else [f"moe-kernels' expert layer is wrong here: {ours['note']}"]),
        ]

    @property
    def other_baseline(self) -> str | None:
        """A warning where the baseline's experts ran on what neither its run file nor transformers chose."""
        config, ran = self._config(BASELINE), self.implementation[BASELINE]
        expected = chosen_experts(config) or self.comparison.experts.get("default")
        if not expected or ran == expected:
            return None
        cure = ""
        if lists_kernels_plugin(config):
            cure = (
                ": Axolotl's KernelsPlugin, listed without a kernel, sets that. Cure: take it out of the plugins, or "
                f"set experts_implementation: {expected}"
            )
        source = "its run file names" if chosen_experts(config) else "transformers picks by itself"
        return f"the baseline's experts ran on {ran}, not on {expected}, which {source}{cure}"

    @property
    def unconfirmed(self) -> list[Claim]:
        """Claims that this machine contradicts."""
        return [claim for claim in self.claims if claim.verdict == NOT_CONFIRMED]

    def ratio(self, stock: str, key: str) -> float | None:
        """How many times as fast as ``stock`` our layer is; ``key`` is forward_ms or forward_backward_ms."""
        theirs, ours = (self.layer.get(name, {}).get(key) for name in (stock, OURS))
        return theirs / ours if theirs and ours else None

    def to_json(self) -> dict[str, Any]:
        """Plain values of everything computed here."""
        return {
            "speedup": self.speedup,
            "expected_step_ms": self.expected_step_ms,
            "runs": [asdict(run) for run in self.runs],
            "sides": {role: asdict(side) for role, side in self.sides.items()},
            "implementation": self.implementation,
            "frozen": self.frozen,
            "shares": {role: asdict(found) for role, found in self.shares.items()},
            "loss": asdict(self.loss),
            "claims": [asdict(claim) for claim in self.claims],
            "fault": self.fault,
            "sound": self.sound,
        }

    def _config(self, role: str) -> dict[str, Any]:
        return next((run.config for run in self.comparison.runs if run.role == role), {})

    def _implementation(self, role: str) -> str:
        """What ran the experts: as the trainer recorded it, else as it follows from the run file."""
        runs, config = [run for run in self.comparison.runs if run.role == role], self._config(role)
        if recorded := next((run.experts for run in runs if run.experts), None):
            return recorded
        if any(run.uses_kernels for run in runs):
            return OURS  # the plugin selects them, whether or not the run file names them
        pinned = "eager" if lists_kernels_plugin(config) else None
        return str(chosen_experts(config) or pinned or self.comparison.experts.get("default") or "unknown")

    def _frozen(self, role: str) -> str:
        """What the frozen experts of a side are kept in, and how they are read; empty where none are frozen."""
        run = next((run for run in self.comparison.runs if run.role == role and run.frozen), None)
        if run is None:
            return ""
        kept, quantizer = " + ".join(run.frozen), run.config.get("model_quantization_config")
        if quantizer and not run.uses_kernels:
            return f"{kept}, dequantised as it was loaded ({quantizer})"
        if run.config.get("moe_fp8_activations"):
            return f"{kept}, multiplied in fp8 with rows rounded to it"
        packed = next(iter(run.frozen)) in ("float8_e4m3fn", "uint8")
        return f"{kept}, dequantised ahead of each GEMM" if packed and run.uses_kernels else kept

    def _unpacked(self) -> bool:
        """Whether our side trained what the baseline had dequantised, and should have kept it."""
        frozen = {run.role: run.frozen for run in self.comparison.runs if run.frozen}
        dequantised = self._config(BASELINE).get("model_quantization_config")
        return bool(dequantised and OPTIMIZED in frozen and frozen[OPTIMIZED] == frozen.get(BASELINE))
