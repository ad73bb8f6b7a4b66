"""The kernels for Hopper with random delays around their barriers: no warp that comes late may change a result.

Producer and consumer warps hand each other stages of shared memory through barriers. A barrier that is missing or
waited for too early can go unseen for years, because the timing of a GPU hardly varies. Here it does: before and
after each operation on a barrier every warp sleeps for up to 16 microseconds, most often not at all.
``PYTHONPATH=tests python -m support.delays`` runs some problems so for a while, on a Hopper GPU, and compares: with
float64, and all runs to the bit. A kernel that does not end is ended with the process, exit code 1. Such a kernel
takes the GPU from all other processes, so that several of these compile at the same time but run one after the other.
"""

from __future__ import annotations

import argparse
import faulthandler
import functools
import json
import os
import sys
import tempfile
import time
import types
from pathlib import Path

import torch
from filelock import FileLock
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

import moe_kernels
from moe_kernels.kernels.hopper import dequantizing, down_grad, fp8, mainloop, ring, wgrad
from moe_kernels.tools.check.problems import Case, make_inputs, run, truth
from moe_kernels.tools.check.verification import compile_variants, variants
from moe_kernels.tools.common.machine import environment
from support.judge import check
from support.patches import patches

# 16 bits from the clock and the warp's place: the lower byte are nanoseconds, times 64 if six of the upper
# bits are zero; 60 and less are not slept.
_SLEEP = gl.constexpr("""{
    .reg .u32 time, mixed;
    .reg .pred sleeps;
    mov.u32 time, %clock;
    mov.u32 mixed, %warpid;
    mad.lo.u32 time, mixed, 0x9E3779B1, time;
    mul.lo.u32 time, time, 0x85EBCA6B;
    shr.u32 mixed, time, 13;
    xor.b32 time, time, mixed;
    mul.lo.u32 time, time, 0xC2B2AE35;
    shr.u32 time, time, 16;
    and.b32 mixed, time, 0x3f00;
    and.b32 time, time, 0xff;
    setp.eq.u32 sleeps, mixed, 0;
    @sleeps shl.b32 time, time, 6;
    setp.gt.u32 sleeps, time, 60;
    @sleeps nanosleep.u32 time;
    mov.u32 $0, time;
}""")
#: Programs of a persistent grid: few, so that each walks many tiles.
PROGRAMS = 3
#: Seconds that a problem may take beyond its share of the time: some milliseconds are enough, all is compiled before.
PATIENCE = 20.0
#: Of the user's processes here, one at a time runs.
LOCK = Path(tempfile.gettempdir(), f"moe-kernels-delays-{os.getuid()}.lock")
BF16 = torch.bfloat16
CASES = (
    Case(301, 3, 5, 192, 320, BF16, "sentinels"),
    Case(67, 2, 9, 64, 128, torch.float16, "one_token_each"),
    Case(700, 4, 9, 512, 192, BF16, "zipf"),
    Case(500, 2, 5, 448, 704, BF16, "balanced"),
    Case(700, 4, 9, 384, 256, BF16, "zipf"),  # gathered, down_grad on tiles of 256 columns
    Case(600, 3, 5, 384, 512, BF16, "zipf", lora_rank=16, frozen=True, packed="fp8 activations"),
    Case(600, 3, 5, 384, 512, BF16, "zipf", lora_rank=16, frozen=True, packed="fp8"),
)


@gluon.jit
def _sleep():
    gl.inline_asm_elementwise(_SLEEP, "=r,r", [gl.to_tensor(0)], gl.int32, is_pure=False, pack=1)


@gluon.jit
def _wait(barrier, phase):
    _sleep()
    mbarrier.wait(barrier, phase)
    _sleep()


@gluon.jit
def _arrive(barrier, count: gl.constexpr):
    _sleep()
    mbarrier.arrive(barrier, count=count)


@gluon.jit
def _expect(barrier, nbytes: gl.constexpr):
    _sleep()
    mbarrier.expect(barrier, nbytes)
    _sleep()


def install() -> None:
    """From here on, and until this process ends, kernels for Hopper are compiled with delays."""
    delayed = types.ModuleType("delayed_mbarrier")
    vars(delayed).update(init=mbarrier.init, MBarrierLayout=mbarrier.MBarrierLayout)
    vars(delayed).update(wait=_wait, arrive=_arrive, expect=_expect)
    for module in (ring, mainloop, wgrad, down_grad, fp8, dequantizing):
        module.mbarrier = delayed  # type: ignore[attr-defined]


def main() -> int:
    """Run every case in every variant for its share of the time."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=30.0, help="for all cases together, compiling left out")
    parser.add_argument("--json", type=Path, help="write what was run and how often")
    wanted = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        parser.error("needs an NVIDIA Hopper GPU (H100, H200): other GPUs run no kernels with barriers")
    install()
    for patch in patches("multiprocessors", lambda *_: PROGRAMS):
        patch.start()
    gluon_backend = functools.partial(moe_kernels.fused_experts, backend="gluon")
    todo = []
    for case in CASES:
        inputs = make_inputs(case, "cuda")
        truth(inputs)  # torch loads what it needs
        compile_variants(gluon_backend, "gluon", inputs)
        todo += [(case, inputs, *way) for way in variants("gluon").items()]
    results = []
    with FileLock(LOCK):
        for case, inputs, name, chosen in todo:
            share = wanted.seconds / len(todo)
            faulthandler.dump_traceback_later(PATIENCE + share, exit=True)
            with chosen:
                check(gluon_backend, inputs, str(case))  # against float64
                first, runs, wrong = run(gluon_backend, inputs), 0, 0
                end = time.monotonic() + share
                while time.monotonic() < end:
                    again = run(gluon_backend, inputs)
                    wrong += any(not torch.equal(first[key], again[key]) for key in first)  # type: ignore[arg-type]
                    runs += 1
            print(f"{case}{name}: {runs} runs, {wrong} that differ", flush=True)
            results.append({"problem": f"{case}{name}", "runs": runs, "differ": wrong})
            if wanted.json:
                command = " ".join(["PYTHONPATH=tests python -m support.delays", *sys.argv[1:]])
                report = environment() | {"command": command, "results": results}
                wanted.json.write_text(json.dumps(report, indent=1) + "\n")
        faulthandler.cancel_dump_traceback_later()
    return int(any(result["differ"] for result in results))


if __name__ == "__main__":
    sys.exit(main())
