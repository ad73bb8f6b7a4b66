"""Runs one training as a subprocess of the real ``axolotl train``, watches it, and keeps what it left."""

from __future__ import annotations

import ctypes
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moe_kernels.telemetry.load import FILE_NAME, RouterHistory, read_history, thinned
from moe_kernels.tools.common.errors import UsageError
from moe_kernels.tools.common.files import locked, read_json, write_json
from moe_kernels.tools.common.network import SWITCHES
from moe_kernels.tools.common.runfile import COUNTS, dump_yaml
from moe_kernels.tools.compare.decode import Misfit, Number, decode
from moe_kernels.tools.compare.environment import NOT_FOR_OURS, NOT_FOR_STOCK, cpu_name, inputs, token_inputs
from moe_kernels.tools.compare.gpu import Gpu, Samples, sampled
from moe_kernels.tools.compare.pair import ROLES, Pair, RunSpec, digest

TRAINER: tuple[str, ...] = (sys.executable, "-m", "moe_kernels.tools.compare.trainer", "train")
OFFLINE = dict.fromkeys((*SWITCHES, "AXOLOTL_DO_NOT_TRACK", "DO_NOT_TRACK", "PYTHONUNBUFFERED"), "1")
OFFLINE |= {"TOKENIZERS_PARALLELISM": "false"}
# The same allocator for every run; expandable segments keep fragmentation out of the memory figures.
ALLOCATOR = "expandable_segments:True"
# Folder of the tokenised data within a comparison's folder.
TOKENISED = "prepared"
# What the trainer keeps of a run, in the run's folder.
RECORD = "record.jsonl"
POLL_S = 0.1
KILL_AFTER_S = 10.0
PR_SET_PDEATHSIG = 1
TAIL_LINES = 40
# Records of a router's history that a report keeps: more than a screen can show.
ROUTER_RECORDS = 240

FINISHED, FAILED = "finished", "failed"
Row = dict[str, Any]
# What is read from the rows of the trainer's log: numbers.
LOGGED = {
    "train/loss",
    "train/grad_norm",
    "train/tokens/trainable",
    "train/tokens/train_per_sec_per_gpu",
    "train/memory/max_allocated (GiB)",
    "train/memory/max_active (GiB)",
    "train/memory/device_reserved (GiB)",
    "train/moe/expert_calls",
}

_STEP = re.compile(r"\{'loss': '?([-+.\w]+)'?")
_TRAINER_STARTED = "Starting trainer"
# Words of the log and the phase that begins with them.
_PHASES = {
    _TRAINER_STARTED: "compiling and first step",
    "Loading dataset": "tokenising",
    "Loading raw datasets": "tokenising",
    "Loading model": "loading the model",
    "Loading weights": "loading the model",
    "loaders.model": "loading the model",
    "Training completed": "saving",
}
_PLUGIN_LINE = re.compile(r"moe_kernels: backend=.*")
_ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_ERROR = re.compile(
    r"^(\w+\.)*\w*(Error|Exception|Interrupt|Exit)\b.*|.*\b(CUDA out of memory|Killed)\b.*|.*\[ERROR\].*"
)


@dataclass
class RunResult:
    """One training as it was run, raw: nothing is judged or averaged here."""

    run_id: str
    role: str
    status: str  # FINISHED or FAILED
    command: list[str]
    source: str  # the user's YAML file, ``overrides`` what differs from it, and ``config`` the result
    config: dict[str, Any]
    overrides: dict[str, Any]
    uses_kernels: bool
    log: str
    started_at: Number = 0.0  # Unix seconds, as the two below
    trainer_started_at: Number | None = None
    ended_at: Number = 0.0
    exit_code: int | None = None  # None where it was stopped by the time limit
    rows: list[Row] = field(default_factory=list)  # what was logged of each step, under W&B's names
    samples: Samples = field(default_factory=Samples)
    wandb: dict[str, str] = field(default_factory=dict)  # project, id, name and file of the offline run
    plugin_line: str = ""  # what the plugin said about the first step; empty for stock kernels
    experts: str = ""  # what ran the experts in the first step, if the trainer recorded it
    weights: str = ""  # a checksum of what the training started from, where the trainer drew it
    frozen: dict[str, int] = field(default_factory=dict)  # bytes of the frozen experts by dtype, the most first
    error: str = ""  # of a failed run the last meaningful line, and ``tail`` the end of its log
    tail: list[str] = field(default_factory=list)
    fingerprint: str = ""  # hash of all that the run depended on
    versions: dict[str, str] = field(default_factory=dict)
    router: RouterHistory = field(default_factory=RouterHistory)  # empty without the plugin's telemetry

    def check(self) -> None:
        """Raise Misfit where parts contradict each other."""
        if self.role not in ROLES or self.status not in (FINISHED, FAILED):
            raise Misfit(f"{self.run_id} has the role {self.role!r:.40} and the status {self.status!r:.40}")
        if self.status == FINISHED and not self.rows:
            raise Misfit(f"{self.run_id} finished without a step")
        self.samples.check()
        self.router.check()
        before = -math.inf
        needed = ("_timestamp", "train/loss") if self.status == FINISHED else ("_timestamp",)
        for index, row in enumerate(self.rows):
            where = f"{self.run_id}: rows[{index}]"
            found = decode(dict[str, Number], {key: row.get(key) for key in needed}, where)
            decode(dict[str, Number | None], {key: row[key] for key in LOGGED & row.keys()}, where)
            if not before < found["_timestamp"] < math.inf:
                raise Misfit(f"{where}._timestamp does not rise")
            before = found["_timestamp"]
        decode(dict[str, int | None], {key: self.config.get(key) for key in COUNTS}, f"{self.run_id}: config")


@dataclass
class LogReader:
    """Follows a growing log: which step, which phase, what the plugin said."""

    phase: str = "starting"
    step: int = 0
    loss: str = ""  # as it was printed
    trainer_started_at: float | None = None  # Unix seconds
    plugin_line: str = ""
    rest: str = ""  # a line that has not ended

    def feed(self, text: str) -> None:
        """Take in new text; progress bars end their lines with a carriage return."""
        *lines, self.rest = re.split(r"[\r\n]", self.rest + text)
        for line in lines:
            self._line(_ESCAPES.sub("", line))

    def _line(self, line: str) -> None:
        if _TRAINER_STARTED in line:
            self.trainer_started_at = self.trainer_started_at or time.time()
        self.phase = next((phase for words, phase in _PHASES.items() if words in line), self.phase)
        if match := _STEP.search(line):
            self.step, self.loss, self.phase = self.step + 1, match.group(1), "training"
        if match := _PLUGIN_LINE.search(line):
            self.plugin_line = self.plugin_line or match.group(0).strip()


@dataclass(frozen=True)
class Machine:
    """What every run of a comparison shares."""

    device: str | None  # names one GPU, and ``gpu`` says what it is; None: the trainer takes what it sees
    versions: dict[str, str]
    gpu: Gpu | None = None
    cpu: str = field(default_factory=cpu_name)
    wandb: str = "offline"
    timeout_s: float = 1800.0
    keep_weights: bool = False
    trainer: Sequence[str] = TRAINER
    launcher: Sequence[str] = ("--launcher", "python")  # how Axolotl starts processes

    def identity(self, ignored: Sequence[str]) -> list[Any]:
        """What a measurement here depends on, except the versions ``ignored``."""
        versions = {name: version for name, version in self.versions.items() if name not in ignored}
        return [versions, asdict(self.gpu) if self.gpu else self.device, self.cpu]


def fingerprint(run: RunSpec, machine: Machine) -> str:
    """Hash of what a run depends on; versions of our kernels count only for a run that uses them."""
    ignored = NOT_FOR_OURS if run.uses_kernels else NOT_FOR_STOCK
    return digest(run.config, machine.identity(ignored), inputs(run.config))


def finished_result(run: RunSpec, machine: Machine) -> RunResult | None:
    """The stored result of this run, or None where it must be run (again)."""
    path = run.folder / "result.json"
    if not path.is_file():
        return None
    try:
        result = decode(RunResult, read_json(path))
        result.check()
    except ValueError:
        # Of another version, or damaged.
        return None
    return result if result.fingerprint == fingerprint(run, machine) else None


def environment(run: RunSpec, machine: Machine) -> dict[str, str]:
    """The environment of the trainer: the caller's, offline, with W&B inside the run's folder, and one GPU."""
    env = {"PYTORCH_ALLOC_CONF": ALLOCATOR, **os.environ, **OFFLINE}
    env |= {"WANDB_MODE": machine.wandb, "WANDB_DIR": str(run.folder.resolve())}
    if machine.wandb == "offline":
        env["WANDB_SILENT"] = "true"
    if machine.device is not None:
        # With several GPUs visible, one process would split the model over them.
        env["CUDA_VISIBLE_DEVICES"] = machine.device
    return env


def run_training(run: RunSpec, machine: Machine, show: Callable[[LogReader], None]) -> RunResult:
    """Run one training and return what it left; ``result.json`` is written last, and only on success.

    Ctrl-C ends the child and is raised again. A failing trainer is a result with ``status == "failed"``.
    """
    if run.folder.exists():
        shutil.rmtree(run.folder)
    run.folder.mkdir(parents=True)
    derived, log = run.folder / "derived.yml", run.folder / "train.log"
    prepared = tokens_folder(run, machine)
    _drop_half_tokenised(prepared)
    own = {"dataset_prepared_path": str(prepared)}
    config = {**run.config, **own}
    derived.write_text(dump_yaml(config))
    command = [*machine.trainer, str(derived), *machine.launcher]
    result = RunResult(
        run_id=run.run_id,
        role=run.role,
        status=FAILED,
        command=["python" if part == sys.executable else part for part in command],
        source=str(run.source),
        config=config,
        overrides={**run.overrides, **own},
        uses_kernels=run.uses_kernels,
        log=str(log),
        fingerprint=fingerprint(run, machine),
        versions=machine.versions,
    )
    reader = LogReader()

    def feed(text: str) -> None:
        reader.feed(text)
        show(reader)

    result.started_at = time.time()
    with sampled(machine.device) as result.samples:
        result.exit_code = run_command(command, environment(run, machine), log, machine.timeout_s, feed)
    result.ended_at = time.time()
    result.trainer_started_at, result.plugin_line = reader.trainer_started_at, reader.plugin_line
    _collect(run, result, machine)
    if not machine.keep_weights:
        for weights in (run.folder / "output").rglob("*.safetensors"):
            weights.unlink()
    if result.status == FINISHED:
        write_json(run.folder / "result.json", asdict(result))
    return result


def tokens_folder(run: RunSpec, machine: Machine) -> Path:
    """The folder of a run's tokenised data, inside its comparison's folder; runs with the same data share it.

    Axolotl itself finds tokens by names and settings, even if the files have changed since.
    """
    tools = [machine.versions.get(name) for name in ("axolotl", "transformers")]
    return run.folder.parent / TOKENISED / digest(token_inputs(run.config), tools)


def drop_old_tokens(pair: Pair, machine: Machine) -> None:
    """Remove what this comparison tokenised from other data or with other settings."""
    wanted = {tokens_folder(run, machine) for run in pair.runs}
    for folder in set((pair.folder / TOKENISED).glob("*")) - wanted:
        shutil.rmtree(folder)


def _drop_half_tokenised(prepared: Path) -> None:
    """Remove tokenised data that a killed run left half written, which Axolotl would use as if complete.

    `datasets` writes dataset_info.json last.
    """
    for arrow in {path.parent for path in prepared.glob("*/*.arrow")}:
        if not (arrow / "dataset_info.json").is_file():
            shutil.rmtree(arrow)


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keep other processes of this command out of a folder of runs.

    Raises:
        UsageError: another one is at work there.
    """

    def refuse() -> None:
        raise UsageError(
            f"Another `moe-kernels compare` is at work in {folder}. "
            "Cure: wait until it has ended, or start this one from another current directory."
        )

    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside the folder, so that removing the folder leaves the lock.
    with locked(folder.with_name(f".{folder.name}.lock"), refuse):
        yield


def run_command(
    command: Sequence[str], env: dict[str, str], log: Path, timeout_s: float, feed: Callable[[str], object]
) -> int | None:
    """Run a command until it ends or its time is up (None); its output goes to ``log`` and, as it comes, to ``feed``.

    Whatever ends this process, or is raised here, ends the command too.
    """
    end = time.monotonic() + timeout_s
    with log.open("wb") as sink, log.open("rb") as source:
        # A session of its own, so that the trainer's own children end with it.
        child = subprocess.Popen(
            command, stdout=sink, stderr=sink, env=env, start_new_session=True, preexec_fn=end_with_parent
        )
        try:
            while child.poll() is None and time.monotonic() < end:
                time.sleep(POLL_S)
                feed(source.read().decode(errors="replace"))
            stopped = child.poll() is None
        finally:
            _end(child)
        feed(source.read().decode(errors="replace") + "\n")
    return None if stopped else child.returncode


def end_with_parent() -> None:
    """In a child: have Linux kill it when its parent is killed, so that no training is left behind."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _end(child: subprocess.Popen[bytes]) -> None:
    """End the child and the processes it started, unless it has ended by itself."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        if child.poll() is not None:
            return
        os.killpg(child.pid, sign)
        with suppress(subprocess.TimeoutExpired):
            child.wait(KILL_AFTER_S)


def _collect(run: RunSpec, result: RunResult, machine: Machine) -> None:
    """Read the training's results, decide whether it finished, and keep the end of its log if not."""
    try:
        _read_record(run, result)
        telemetry = Path(run.config["output_dir"], FILE_NAME)
        if telemetry.is_file():
            result.router = thinned(read_history(telemetry), ROUTER_RECORDS)
    except (OSError, ValueError) as error:
        result.error = str(error)
    tail = log_tail(Path(result.log))
    if result.exit_code != 0:
        result.error = why_ended("the trainer", result.exit_code, tail, machine)
    elif not result.error and len(result.rows) < run.steps:
        result.error = (
            f"the trainer logged {len(result.rows)} of {run.steps} steps. Cure: the YAML file needs logging_steps: 1."
        )
    result.status, result.tail = (FAILED, tail) if result.error else (FINISHED, [])


def _read_record(run: RunSpec, result: RunResult) -> None:
    """Take over what the trainer kept of the run, if it came that far; Misfit where that is damaged."""
    file = run.folder / RECORD
    if not file.is_file():
        return
    try:
        first, *rows = (decode(Row, json.loads(line)) for line in file.read_bytes().splitlines())
        found = decode(RunResult, {**asdict(result), **first, "rows": rows})
        found.check()
    except (ValueError, RecursionError) as error:
        raise Misfit(f"{file} is damaged: {error}") from error
    vars(result).update(vars(found))
    result.wandb["file"] = str(next(run.folder.rglob("run-*.wandb"), ""))


def why_ended(what: str, exit_code: int | None, tail: Sequence[str], machine: Machine) -> str:
    """Why a command of :func:`run_command` did not end with exit code 0."""
    if exit_code is None:
        return f"stopped after the time limit of {machine.timeout_s:.0f} s (--timeout sets it)"
    if exit_code < 0:
        return f"{what} was ended by {signal.Signals(-exit_code).name}, as the system does where memory runs out"
    return last_error(tail) or f"{what} ended with exit code {exit_code}"


def log_tail(log: Path) -> list[str]:
    """The last lines of a log."""
    text = _ESCAPES.sub("", log.read_text(errors="replace"))
    return [line for line in re.split(r"[\r\n]+", text) if line.strip()][-TAIL_LINES:]


def last_error(tail: Sequence[str]) -> str:
    """The last line of a log that names an error, or nothing."""
    return next((line.strip() for line in reversed(tail) if _ERROR.match(line)), "")
