"""Every kernel under NVIDIA's compute-sanitizer, in all four tools: the evidence behind docs/checks.md.

    python benchmarks/sanitize.py --json benchmarks/results/sanitize.json

Small problems of every kind of experts, forward and backward, on hostile routings, through TMA and pointer loads,
and the fused router. First all of them without a tool, which compiles the kernels and must pass; then under
memcheck, racecheck, initcheck and synccheck, in processes side by side. torch's caching allocator is off, so that
each tensor is an allocation of its own with exactly its size.

A tool that reports nothing proves something only if it sees a fault: each first runs a kernel with a planted one, and
not finding that is a failure. Reports count where they name one of this package's kernels; those of other kernels,
torch's above all, are listed apart. So is what initcheck cannot follow in the kernels for Hopper, and why: see
``NOT_FOLLOWED``. The exit code is 0 if every tool finished, found its planted fault and reported
none of our kernels, and if every kernel of the package ran under every tool; 1 if not; 3 without an NVIDIA GPU or
without a compute-sanitizer that is new enough: ``pip install nvidia-cuda-sanitizer-api`` brings it.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import pkgutil
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.runtime.jit import KernelInterface
from triton.tools.tensor_descriptor import TensorDescriptor

import moe_kernels.kernels
from moe_kernels import router
from moe_kernels.activation import Activation
from moe_kernels.kernels.device import interpreting
from moe_kernels.moe import fused_experts
from moe_kernels.tools.check.problems import Case, make_inputs, run
from moe_kernels.tools.check.verification import variants
from moe_kernels.tools.common.machine import environment
from moe_kernels.tools.common.options import ensure_writable

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from support import interpreter
from support.patches import patches

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CLAMPED, SILU_CLAMPED = Activation("clamped_glu", (1.702, 0.7)), Activation("clamped_silu", (0.5,))
TOOLS: dict[str, tuple[str, ...]] = {
    "memcheck": ("--padding", "4096"),
    "racecheck": ("--racecheck-report", "analysis"),
    "initcheck": (),
    "synccheck": (),
}
#: Programs of a persistent grid: few, so that each walks several tiles of these small problems.
PROGRAMS = 3
#: Of each expert layer: the launcher follows the second call of a signature and replays it from the third on.
CALLS = 3


# ------------------------------------------------------------------------------------------------- what is run
@dataclass(frozen=True)
class Job:
    """One expert layer, forward and backward. ``pointers``: no TMA loads even where the GPU has them."""

    case: Case
    settings: dict[str, Any] = field(default_factory=dict)
    pointers: bool = False
    backend: str = "triton"


#: Sizes that are multiples of 16 load by TMA on Hopper and later; the odd ones and float32 by pointers.
JOBS: dict[str, Job] = {
    "whole-tiles": Job(Case(256, 2, 3, 128, 256, BF16, "balanced"), {"group_size": 64}),
    "tails": Job(Case(131, 3, 5, 80, 48, BF16, "sentinels"), {"group_size": 128}),
    "tails-pointers": Job(Case(131, 3, 5, 80, 48, BF16, "sentinels"), {"group_size": 128}, pointers=True),
    "largest-group": Job(Case(301, 2, 3, 144, 272, BF16, "one_hot_expert"), {"group_size": 256}),
    "one-tile-a-program": Job(Case(131, 3, 5, 144, 176, BF16, "zipf"), {"persistent": False}),
    "whole-tiles-pointers": Job(Case(256, 2, 3, 128, 256, BF16, "balanced"), {"group_size": 64}, pointers=True),
    "odd-sizes": Job(Case(67, 3, 7, 37, 21, BF16, "empty_first_middle_last"), {"group_size": 64}),
    "float16": Job(Case(97, 2, 4, 96, 80, FP16, "duplicated_ids"), {"group_size": 64}),
    "float32": Job(Case(67, 2, 3, 35, 19, FP32, "zipf"), {"group_size": 64}),
    "everything-dropped": Job(Case(33, 2, 4, 64, 32, BF16, "all_sentinels"), {"group_size": 64}),
    "one-token-many-experts": Job(Case(1, 4, 64, 64, 32, BF16), {"group_size": "auto"}),
    "recompute": Job(Case(131, 2, 3, 64, 48, BF16, "sentinels"), {"group_size": 64, "recompute": True}),
    "unreduced": Job(Case(67, 2, 3, 64, 48, BF16, "sentinels", reduce=False), {"group_size": 64}),
    "gateless": Job(Case(67, 2, 3, 64, 48, BF16, "zipf", gated=False, activation="relu2", bias=True)),
    "gpt-oss": Job(Case(131, 2, 4, 80, 48, BF16, "sentinels", bias=True, transposed=True, interleaved=True,
                        activation=CLAMPED)),
    "gpt-oss-pointers": Job(Case(67, 3, 5, 37, 21, BF16, "zipf", bias=True, transposed=True, interleaved=True,
                                 activation=CLAMPED), {"group_size": 64}),
    "privacy-filter": Job(Case(131, 2, 4, 80, 48, BF16, "zipf", bias=True, transposed=True, activation=CLAMPED)),
    "lora": Job(Case(131, 2, 4, 80, 48, BF16, "sentinels", lora_rank=8)),
    "lora-pointers": Job(Case(67, 3, 5, 37, 21, BF16, "zipf", lora_rank=4), {"group_size": 64}),
    "gpt-oss-lora": Job(Case(67, 2, 4, 64, 48, BF16, "zipf", bias=True, transposed=True, interleaved=True,
                             activation=CLAMPED, lora_rank=16)),
}  # fmt: skip

JOBS |= {
    f"hopper-{name}": Job(case, settings, backend="gluon")
    for name, case, settings in (
        ("whole-tiles", Case(512, 2, 2, 128, 256, BF16, "balanced"), {}),
        ("tails", Case(301, 3, 5, 192, 320, BF16, "sentinels"), {}),
        ("one-expert", Case(333, 2, 3, 128, 64, BF16, "one_hot_expert"), {}),
        ("float16", Case(67, 2, 9, 64, 128, FP16, "one_token_each", activation=SILU_CLAMPED), {}),
        ("dropped", Case(33, 2, 4, 64, 64, BF16, "all_sentinels"), {}),
        ("recompute", Case(131, 2, 3, 64, 64, BF16, "zipf"), {"recompute": True}),
        ("unreduced", Case(131, 2, 3, 64, 64, BF16, "sentinels", reduce=False), {}),
        ("bias", Case(131, 2, 3, 64, 64, BF16, "zipf", bias=True), {}),
        ("lora", Case(131, 2, 3, 64, 64, BF16, "zipf", lora_rank=8), {}),
    )
}

#: tokens, experts, top_k, and the arguments of router.route.
ROUTERS: dict[str, tuple[int, int, int, dict[str, Any]]] = {
    "router-softmax": (131, 60, 4, {}),
    "router-sigmoid": (67, 128, 8, {"scoring": "sigmoid", "groups": 8, "top_groups": 4, "scale": 2.5}),
}
NAMES = (*JOBS, *ROUTERS)
#: The kernels for Hopper alone.
HOPPER = "moe_kernels.kernels.hopper."


def runs_on(name: str, device: str) -> bool:
    """Whether this machine can run that entry of :data:`NAMES`."""
    hopper = device == "cuda" and torch.cuda.get_device_capability()[0] == 9
    return hopper or name in ROUTERS or JOBS[name].backend != "gluon"


def run_job(name: str, device: torch.device) -> None:
    """Forward and backward of one entry of :data:`NAMES`, layers CALLS times; waits for the device."""
    if name in ROUTERS:
        tokens, experts, top_k, options = ROUTERS[name]
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(tokens, experts, generator=generator).to(device).requires_grad_()
        bias = torch.randn(experts, generator=generator).to(device) if options else None
        weights, _ = router.route(logits, top_k, correction_bias=bias, backend="triton", **options)
        weights.backward(torch.ones(weights.shape).to(device))
    else:
        job = JOBS[name]
        with ExitStack() as stack:
            for patch in patches("multiprocessors", lambda *_: PROGRAMS):
                stack.enter_context(patch)
            if job.pointers:
                for patch in patches("tma_fits", lambda *_: False):
                    stack.enter_context(patch)
            inputs = make_inputs(job.case, device)
            for chosen in variants(job.backend).values():  # what sizes and card choose otherwise
                with chosen:
                    for _ in range(CALLS):
                        run(functools.partial(fused_experts, backend=job.backend, **job.settings), inputs)
    if device.type == "cuda":
        torch.cuda.synchronize()


def package_kernels(device: str) -> set[str]:
    """Every kernel of the package that this machine can run, by the name that a tool reports."""
    found = set()
    for module in pkgutil.walk_packages(moe_kernels.kernels.__path__, "moe_kernels.kernels."):
        if module.name.startswith(HOPPER) and not any(runs_on(name, device) for name in JOBS if name[:6] == "hopper"):
            continue
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, KernelInterface) and value.__name__.endswith("_kernel"):
                found.add(value.__name__)
    return found


# ------------------------------------------------------------------------------------------------- planted faults
# Every thread writes one shared word and reads it back, without a barrier.
RACE = tl.constexpr("""{
    .reg .u32 word;
    mov.u32 word, global_smem;
    st.shared.u32 [word], $1;
    ld.shared.u32 $0, [word];
}""")
# Half of each warp waits at a barrier to which the other half never comes.
WAIT = tl.constexpr("""{
    .reg .u32 thread;
    .reg .pred waits;
    mov.u32 thread, %tid.x;
    and.b32 thread, thread, 31;
    setp.lt.u32 waits, thread, 16;
    @waits bar.sync 1;
    mov.u32 $0, $1;
}""")


@triton.jit
def planted_memcheck(data, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(data + at + 1))  # one element behind the allocation


@triton.jit
def planted_initcheck(data, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(data + at) + 1)  # of memory that nobody wrote


@triton.jit
def planted_racecheck(data, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    values = tl.load(data + at)
    total = tl.sum(values)  # across warps: takes shared memory
    tl.store(out + at, tl.inline_asm_elementwise(RACE, "=r,r", [values], tl.int32, is_pure=False, pack=1) + total)


@triton.jit
def planted_synccheck(data, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    values = tl.load(data + at)
    tl.store(out + at, tl.inline_asm_elementwise(WAIT, "=r,r", [values], tl.int32, is_pure=False, pack=1))


# ------------------------------------------------------------------------------------ what initcheck cannot follow
#: It reports this though nothing is wrong. A control shows that the tool on this machine does so.
NOT_FOLLOWED = (
    "memory that a TMA store wrote stays uninitialised for initcheck. Reports of problems that run on the "
    "kernels for Hopper are set aside if the control is reported too; moe-kernels verify runs the same kernels on "
    "memory filled with NaN."
)


@triton.jit
def _write_by_tma(descriptor, BLOCK: tl.constexpr):
    descriptor.store([0, 0], tl.full((BLOCK, BLOCK), 1, tl.int32))


@triton.jit
def control_initcheck(data, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK * BLOCK)
    tl.store(out + at, tl.load(data + at))


def run_control() -> None:
    """Launch what is right and what initcheck may report nevertheless."""
    data, out = (torch.empty(32, 32, dtype=torch.int32, device="cuda") for _ in range(2))
    _write_by_tma[(1,)](TensorDescriptor(data, [32, 32], [32, 1], [32, 32]), BLOCK=32)
    control_initcheck[(1,)](data, out, BLOCK=32)
    torch.cuda.synchronize()


PLANTED = {
    "memcheck": planted_memcheck,
    "racecheck": planted_racecheck,
    "initcheck": planted_initcheck,
    "synccheck": planted_synccheck,
}
THREADS = 128


def run_planted(tool: str) -> None:
    """Launch the kernel with the fault that ``tool`` must find; CUDA may fail after it."""
    data = torch.empty(THREADS, dtype=torch.int32, device="cuda")
    if tool != "initcheck":
        data.copy_(torch.arange(THREADS, dtype=torch.int32))
    out = torch.zeros(THREADS, dtype=torch.int32).to("cuda")
    PLANTED[tool][(1,)](data, out, BLOCK=THREADS, num_warps=4)
    torch.cuda.synchronize()


# ------------------------------------------------------------------------------------------------- in the processes
def work(names: list[str], device: str, seen: Path) -> int:
    """Run the named jobs in this process; ``seen`` says which ended and which kernels were loaded for them."""
    kernels: Counter[str] = Counter()

    def loaded(module: Any, function: Any, name: str, *_: Any) -> None:
        """When a kernel is launched first: one call for each compiled variant."""
        kernels.update([name])

    triton.knobs.runtime.kernel_load_end_hook.add(loaded)
    if interpreting():
        interpreter.install()
    done, failed = [], False
    for name in names:
        with interpreter.recorded_launches() as launches:  # of the interpreter, which loads none
            try:
                run_job(name, torch.device(device))
            except (RuntimeError, ValueError, TypeError, triton.TritonError) as error:
                print(f"{name}: {error}", flush=True)
                failed = True
            else:
                done.append(name)
            kernels.update(set(launches))
        seen.write_text(json.dumps({"done": done, "kernels": kernels}))
    return int(failed)


# ------------------------------------------------------------------------------------------------- reading a log
_SUMMARY = re.compile(r"(ERROR|RACECHECK) SUMMARY: (\d+)")
_NO_REPORT = ("COMPUTE-SANITIZER", "ERROR SUMMARY", "RACECHECK SUMMARY", "LEAK SUMMARY", "Target application")
_TOOL_FAILED = ("Internal Sanitizer Error", "Error: No attachable process", "Error: Target application terminated")


@dataclass
class Log:
    """What compute-sanitizer wrote about one process.

    Attributes:
        finished: the summary line is there.
        ours, others: number of reports by "kernel: kind" and by the report's first lines.
        broken: lines in which the tool says that it failed itself.
        samples: the first report of each kind that names one of our kernels, in full.
    """

    finished: bool
    ours: Counter[str] = field(default_factory=Counter)
    others: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)
    samples: dict[str, str] = field(default_factory=dict)


def read_log(text: str, kernels: set[str]) -> Log:
    """Sort the reports in ``text`` into those that name one of ``kernels`` and the rest.

    A report is a line that begins with nine equal signs and one space, and the lines after it that are indented more.
    """
    lines = [line for line in text.splitlines() if line.startswith("=========")]
    log = Log(any(_SUMMARY.search(line) for line in lines))
    named = re.compile(r"(?<![\w:])(" + "|".join(map(re.escape, sorted(kernels))) + r")(?!\w)")
    blocks: list[list[str]] = []
    for line in lines:
        body = line[9:]
        if body.strip() and not body.startswith("  ") and not body.strip().startswith(_NO_REPORT):
            blocks.append([body.strip()])
        elif body.startswith("  ") and blocks:
            blocks[-1].append(body.strip())
    for block in blocks:
        text = "\n".join(block)
        found = named.search(text)
        if block[0].startswith(_TOOL_FAILED):
            log.broken.append(block[0])
        elif found is not None:
            kind = f"{found[1]}: {_kind(block[0])}"
            log.ours[kind] += 1
            log.samples.setdefault(kind, text)
        else:
            log.others["; ".join([_kind(block[0]), *block[1:2]])] += 1
    return log


def _kind(line: str) -> str:
    """The head of a report without what differs from one to the next."""
    return re.sub(r" (at|of size) .*", "", line)


# ------------------------------------------------------------------------------------------------- running it all
@dataclass
class Process:
    """One process and what became of it; ``tool`` is empty without one."""

    name: str
    tool: str
    command: list[str]
    folder: Path
    started: float = 0.0
    seconds: float = 0.0
    exit_code: int | None = None
    popen: subprocess.Popen[bytes] | None = None

    @property
    def seen(self) -> dict[str, Any]:
        """Which jobs ended in it and which kernels it loaded."""
        file = self.folder / "seen.json"
        return json.loads(file.read_text()) if file.exists() else {"done": [], "kernels": {}}

    @property
    def log(self) -> str:
        """What the tool wrote."""
        file = self.folder / "tool.log"
        return file.read_text(errors="replace") if file.exists() else ""

    @property
    def output(self) -> str:
        """The end of what the process printed."""
        file = self.folder / "output.log"
        return file.read_text(errors="replace")[-2000:] if file.exists() else "not started within --limit"

    def start(self) -> None:
        """Start it as the leader of a group of its own, so that it can be ended with its children."""
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1"}
        self.started = time.monotonic()
        with (self.folder / "output.log").open("wb") as output:
            self.popen = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment,
                start_new_session=True,
            )  # fmt: skip

    def ended(self, deadline: float) -> bool:
        """True once it ended by itself or was ended at ``deadline``."""
        assert self.popen is not None
        self.exit_code = self.popen.poll()
        if self.exit_code is None and time.monotonic() > deadline:
            os.killpg(self.popen.pid, signal.SIGKILL)
            self.popen.wait()
            self.exit_code = -signal.SIGKILL
        self.seconds = round(time.monotonic() - self.started, 1)
        return self.exit_code is not None


def run_side_by_side(processes: list[Process], jobs: int, deadline: float) -> None:
    """Run all, ``jobs`` at a time; what runs at ``deadline`` (time.monotonic) is ended, the rest is not started."""
    waiting, running = list(processes), list[Process]()
    while waiting or running:
        while waiting and len(running) < jobs and time.monotonic() < deadline:
            running.append(waiting.pop(0))
            running[-1].start()
        if not running:
            return
        for process in [p for p in running if p.ended(deadline)]:
            running.remove(process)
            print(f"  {process.name}: exit code {process.exit_code} after {process.seconds} s", flush=True)
        time.sleep(0.1)


#: Older ones report races in kernels of specialised warps that are none (NVIDIA's release notes, 2026.1 and 2026.3),
#: and memcheck does not follow TMA loads (2026.2). This one was tried.
OLDEST = (2026, 4)
PACKAGE = "nvidia-cuda-sanitizer-api"


def sanitizer() -> str | None:
    """Path of compute-sanitizer: that of the Python package, on the PATH, or in CUDA's folder."""
    with suppress(metadata.PackageNotFoundError):
        files = metadata.files(PACKAGE) or []
        return next((str(file.locate()) for file in files if file.name == "compute-sanitizer"), None)
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "compute-sanitizer")
    return shutil.which("compute-sanitizer") or (str(toolkit) if toolkit.exists() else None)


def version_of(program: str) -> tuple[int, ...]:
    """The version that compute-sanitizer says it has."""
    text = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    return tuple(map(int, re.findall(r"Version ([\d.]+)", text)[0].split(".")))


def make_process(folder: Path, name: str, tool: str, program: str | None, arguments: list[str]) -> Process:
    """A process that runs this file with ``arguments``, under ``tool`` of ``program`` if there is one."""
    place = folder / name
    place.mkdir(parents=True)
    command = [sys.executable, str(Path(__file__).resolve()), *arguments, "--seen", str(place / "seen.json")]
    if program is not None:
        options = ["--tool", tool, *TOOLS[tool], "--log-file", str(place / "tool.log"), "--show-backtrace", "no",
                   "--print-limit", "100000", "--report-api-errors", "no", "--launch-timeout", "0",
                   "--target-processes", "application-only"]  # fmt: skip
        command = [program, *options, *command]
    return Process(name, tool, command, place)


def judge(
    tool: str, special: dict[str, Process], processes: list[Process], names: list[str], kernels: set[str], every: bool
) -> dict[str, Any]:
    """The verdict on one tool, as plain JSON values; ``problems`` is empty if all is well.

    ``special``: the processes with the planted fault and with the control. ``every``: all jobs were asked for, so
    that each of ``kernels`` must have run.
    """
    problems: list[str] = []
    ours, others, unfollowed = Counter[str](), Counter[str](), Counter[str]()
    seen, done = Counter[str](), list[str]()
    samples: dict[str, str] = {}
    control = read_log(special["control"].log, {"control_initcheck"}).ours if "control" in special else Counter[str]()
    for process in processes:
        log = read_log(process.log, kernels)
        if control and process.name.startswith("initcheck-hopper"):
            unfollowed += log.ours
        else:
            ours += log.ours
            samples = log.samples | samples
        others += log.others
        seen.update(process.seen["kernels"])
        done += process.seen["done"]
        problems += [f"{process.name}: {line}" for line in log.broken]
        if not log.finished or process.exit_code != 0:
            summary = "and a summary" if log.finished else "without a summary"
            problems.append(f"{process.name}: exit code {process.exit_code}, {summary}: {process.output[-500:]}")
    found = None
    if "planted" in special:
        planted = special["planted"]
        found = dict(read_log(planted.log, {PLANTED[tool].__name__}).ours)
        if not found:
            problems.append(f"the planted fault was not found: {planted.log[-500:]} {planted.output[-500:]}")
    problems += [f"{count} reports of {kind}" for kind, count in ours.items()]
    problems += [f"{name} did not end" for name in names if name not in done]
    if every:
        problems += [f"{kernel} did not run" for kernel in sorted(kernels - set(seen))]
    return {
        "problems": problems,
        "reports": ours,
        "samples": samples,
        "reports_of_other_kernels": others,
        "not_followed": unfollowed,
        "not_followed_because": NOT_FOLLOWED if unfollowed else "",
        "control": control,
        "planted_fault": found,
        "kernels": dict(sorted(seen.items())),
        "jobs": sorted(done),
        "seconds": max((p.seconds for p in processes), default=0.0),
        "command": shlex.join(processes[0].command) if processes else "",
    }


def main() -> int:
    """Run everything and print one line for each tool."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tools", default=",".join(TOOLS))
    parser.add_argument("--only", default=",".join(NAMES), help="comma-separated names of problems")
    parser.add_argument("--jobs", type=int, default=min(20, (os.cpu_count() or 2) + 4), help="processes at a time")
    parser.add_argument("--limit", type=float, default=140.0, help="seconds after which everything is ended")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--logs", type=Path, help="keep what the tools wrote in this folder")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu with TRITON_INTERPRET=1 to test this program")
    parser.add_argument("--program", help="compute-sanitizer, if not the Python package's, the PATH's or CUDA's")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--plant", help=argparse.SUPPRESS)
    parser.add_argument("--control", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--seen", type=Path, help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    if wanted.plant or wanted.control:
        run_planted(wanted.plant) if wanted.plant else run_control()
        return 0
    names = (wanted.work or wanted.only).split(",")
    unknown = [name for name in (*names, *wanted.tools.split(",")) if name not in (*NAMES, *TOOLS)]
    if unknown:
        parser.error(f"{', '.join(unknown)}: not one of {', '.join((*NAMES, *TOOLS))}")
    if wanted.work:
        return work(names, wanted.device, wanted.seen)
    if wanted.logs is not None and wanted.logs.exists() and (wanted.logs.is_file() or any(wanted.logs.iterdir())):
        parser.error(f"--logs {wanted.logs} is taken, perhaps by an earlier call: name a folder that is new or empty")
    ensure_writable(wanted.json)
    program = wanted.program or sanitizer()
    if program is None or (wanted.device == "cuda" and not torch.cuda.is_available()):
        print(f"needs an NVIDIA GPU and compute-sanitizer: pip install {PACKAGE}")
        return 3
    version = version_of(program)
    if version < OLDEST:
        have, needed = (".".join(map(str, numbers[:2])) for numbers in (version, OLDEST))
        print(f"{program} is version {have}; {needed} is needed: pip install {PACKAGE}")
        return 3
    names = [name for name in names if runs_on(name, wanted.device)]
    with tempfile.TemporaryDirectory() as temporary:
        return run_tools(wanted, names, program, ".".join(map(str, version)), wanted.logs or Path(temporary))


def run_tools(wanted: argparse.Namespace, names: list[str], program: str, version: str, folder: Path) -> int:
    """The body of :func:`main`, once everything is there."""
    begun = time.monotonic()
    deadline = begun + wanted.limit
    tools, kernels = wanted.tools.split(","), package_kernels(wanted.device)

    def shards(count: int, names: list[str] = names) -> list[str]:
        return [",".join(part) for part in (names[i::count] for i in range(count)) if part]

    print(f"{len(names)} problems without a tool: compiling", flush=True)
    device = ["--device", wanted.device]
    alone = [make_process(folder, f"alone-{i}", "", None, ["--work", part, *device])
             for i, part in enumerate(shards(wanted.jobs))]  # fmt: skip
    run_side_by_side(alone, wanted.jobs, deadline)
    failed = [p for p in alone if p.exit_code != 0]
    for process in failed:
        print(f"FAILED without a tool: {process.name}: {process.output}", flush=True)

    hopper = [name for name in names if name.startswith("hopper")]
    others = [name for name in names if name not in hopper]
    count = max(1, wanted.jobs // (len(tools) + 1) - 1)
    under: dict[str, list[Process]] = {tool: [] for tool in tools}
    special: dict[str, dict[str, Process]] = {tool: {} for tool in tools}
    for tool in tools:
        parts = [(str(i), part) for i, part in enumerate(shards(count, others))]
        parts += [(f"hopper-{i}", part) for i, part in enumerate(shards(2, hopper))]
        for name, part in parts:
            under[tool].append(make_process(folder, f"{tool}-{name}", tool, program, ["--work", part, *device]))
        if wanted.device == "cuda":
            special[tool]["planted"] = make_process(folder, f"{tool}-planted", tool, program, ["--plant", tool])
            if hopper and tool == "initcheck":
                special[tool]["control"] = make_process(folder, "initcheck-control", tool, program, ["--control"])
    print(f"under {', '.join(tools)}", flush=True)
    interleaved = [p for group in zip(*under.values(), strict=True) for p in group]
    interleaved += [p for processes in special.values() for p in processes.values()]
    run_side_by_side(interleaved, wanted.jobs, deadline)

    every = set(names) == {name for name in NAMES if runs_on(name, wanted.device)}
    verdicts = {tool: judge(tool, special[tool], under[tool], names, kernels, every) for tool in tools}
    for tool, verdict in verdicts.items():
        state = "clean" if not verdict["problems"] else "FAILED"
        print(
            f"{tool}: {state}: {sum(verdict['reports'].values())} reports of {len(verdict['kernels'])} kernels in "
            f"{sum(verdict['kernels'].values())} variants, {sum(verdict['reports_of_other_kernels'].values())} of "
            f"other kernels; planted fault: {verdict['planted_fault']}"
        )
        for problem in verdict["problems"]:
            print(f"  {problem}")
        if verdict["not_followed"]:
            print(f"  not followed: {dict(verdict['not_followed'])}; the control: {dict(verdict['control'])}")
            print(f"  {verdict['not_followed_because']}")
        for sample in verdict["samples"].values():
            print("    " + sample.replace("\n", "\n    "))
        for kind, count in verdict["reports_of_other_kernels"].most_common(5):
            print(f"  other kernels, {count} times: {kind}")
    if wanted.json:
        report = environment() | {
            "command": shlex.join(["python", "benchmarks/sanitize.py", *sys.argv[1:]]),
            "compute_sanitizer": version,
            "seconds": round(time.monotonic() - begun, 1),
            "problems_run": {name: asdict(JOBS[name]) if name in JOBS else ROUTERS[name] for name in names},
            "failed_without_a_tool": [p.output for p in failed],
            "tools": verdicts,
        }
        wanted.json.write_text(json.dumps(report, indent=1, default=str) + "\n")
    print(f"{time.monotonic() - begun:.0f} s")
    return int(bool(failed) or any(verdict["problems"] for verdict in verdicts.values()))


if __name__ == "__main__":
    sys.exit(main())
