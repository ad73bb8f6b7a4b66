"""benchmarks/sanitize.py: reads the tools' reports, and no failure of a tool passes for a clean run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import sanitize

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "sanitize.py"
OURS = {"up_kernel", "gather_kernel"}

MEMCHECK = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 2 bytes
=========     at up_kernel+0x9a0 in up.py:75
=========     by thread (12,0,0) in block (3,0,0)
=========     Access at 0x7f00 is out of bounds
=========
========= Invalid __global__ read of size 4 bytes
=========     at void at::native::vectorized_gather_kernel<(int)16>(char *)+0x10
=========     by thread (0,0,0) in block (0,0,0)
=========
========= ERROR SUMMARY: 2 errors
"""
RACECHECK = """\
========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at gather_kernel+0x150 in combine.py:70
=========     and Read access at gather_kernel+0x160 in combine.py:71 [32 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
SYNCCHECK = """\
========= COMPUTE-SANITIZER
========= Barrier error detected. Divergent thread(s) in warp.
=========     at up_kernel+0x1b0 in up.py:90
=========     by thread (1,0,0) in block (0,0,0)
=========
========= ERROR SUMMARY: 1 error
"""
INITCHECK = """\
========= COMPUTE-SANITIZER
========= Uninitialized __global__ memory read of size 4 bytes
=========     at 0x70 in up_kernel
=========     by thread (31,0,0) in block (1,0,0)
=========
========= Uninitialized __global__ memory read of size 4 bytes
=========     at void at::native::elementwise_kernel<(int)128>(int)+0x70
=========
========= ERROR SUMMARY: 2 errors
"""
CLEAN = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"


@pytest.mark.parametrize(
    ("text", "ours", "others"),
    [
        (MEMCHECK, {"up_kernel: Invalid __global__ read": 1}, 1),
        (RACECHECK, {"gather_kernel: Error: Race reported between Write access": 1}, 0),
        (SYNCCHECK, {"up_kernel: Barrier error detected. Divergent thread(s) in warp.": 1}, 0),
        (INITCHECK, {"up_kernel: Uninitialized __global__ memory read": 1}, 1),
        (CLEAN, {}, 0),
    ],
    ids=["memcheck", "racecheck", "synccheck", "initcheck", "clean"],
)
def test_a_report_belongs_to_the_kernel_it_names(text, ours, others):
    log = sanitize.read_log(text, OURS)
    assert (log.finished, dict(log.ours), log.others.total(), log.broken) == (True, ours, others, [])
    assert set(log.samples) == set(ours)


def test_a_log_without_an_end_is_not_clean():
    assert not sanitize.read_log("========= COMPUTE-SANITIZER\n", OURS).finished
    assert sanitize.read_log("========= Internal Sanitizer Error: no memory\n" + CLEAN, OURS).broken


def test_every_kernel_is_known():
    kernels = sanitize.package_kernels("cpu")
    assert {"up_kernel", "grouped_gemm_kernel", "wgrad_kernel", "route_kernel"} <= kernels
    assert not any("hopper" in kernel for kernel in kernels)


def test_on_hopper_its_own_kernels_must_run(monkeypatch):
    monkeypatch.setattr(sanitize.torch.cuda, "get_device_capability", lambda: (9, 0))
    assert "hopper_gemm_kernel" in sanitize.package_kernels("cuda")
    assert all(sanitize.runs_on(name, "cuda") for name in sanitize.NAMES)


FAKE = """#!{python}
import subprocess, sys
arguments = sys.argv[1:]
if arguments == ["--version"]:
    print("Version {version}")
    sys.exit()
code = subprocess.call(arguments[arguments.index(sys.executable):])
with open(arguments[arguments.index("--log-file") + 1], "w") as log:
    log.write({logs!r}[arguments[arguments.index("--tool") + 1]])
sys.exit(code)
"""
FAULT = MEMCHECK.replace("up_kernel", "route_kernel")


def paper(folder, version, logs):
    """A compute-sanitizer of paper."""
    tool = folder / "compute-sanitizer"
    tool.write_text(FAKE.format(python=sys.executable, version=version, logs=logs))
    tool.chmod(0o755)
    return tool


@pytest.mark.parametrize(
    ("logs", "exit_code"), [({"memcheck": CLEAN}, 0), ({"memcheck": CLEAN, "racecheck": FAULT, "initcheck": ""}, 1)]
)
def test_the_whole_way_with_a_tool_of_paper(tmp_path, logs, exit_code):
    result = tmp_path / "sanitize.json"
    ran = subprocess.run(
        [sys.executable, SCRIPT, "--device", "cpu", "--only", "router-softmax", "--tools", ",".join(logs),
         "--jobs", "2", "--json", result, "--program", paper(tmp_path, "2026.4.0.0", logs)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert ran.returncode == exit_code, ran.stdout + ran.stderr
    assert "memcheck: clean: 0 reports of 2 kernels" in ran.stdout
    report = json.loads(result.read_text())
    assert report["compute_sanitizer"] == "2026.4.0.0"
    found = report["tools"]
    assert all(set(found[name]["kernels"]) == {"route_kernel", "route_grad_kernel"} for name in logs)
    assert not found["memcheck"]["problems"]
    if exit_code:
        assert found["racecheck"]["problems"] == ["1 reports of route_kernel: Invalid __global__ read"]
        assert "without a summary" in found["initcheck"]["problems"][0]


def test_without_a_gpu_it_says_what_is_missing():
    ran = subprocess.run([sys.executable, SCRIPT], env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
                         capture_output=True, text=True, timeout=300, check=False)  # fmt: skip
    assert ran.returncode == 3
    assert "compute-sanitizer" in ran.stdout


def call(tmp_path, *arguments):
    return subprocess.run(
        [sys.executable, SCRIPT, "--device", "cpu", "--only", "router-softmax", "--tools", "memcheck", "--jobs", "1",
         "--program", paper(tmp_path, "2026.4.0.0", {"memcheck": CLEAN}), *arguments],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def test_what_the_time_limit_left_out_is_said(tmp_path):
    ran = call(tmp_path, "--limit", "0")
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert "FAILED without a tool: alone-0: not started within --limit" in ran.stdout
    assert "router-softmax did not end" in ran.stdout


def test_logs_of_an_earlier_call_are_not_taken_for_those_of_this_one(tmp_path):
    logs = tmp_path / "logs"
    (logs / "alone-0").mkdir(parents=True)
    for taken in (logs, paper(tmp_path, "", {})):
        ran = call(tmp_path, "--logs", str(taken))
        assert ran.returncode == 2
        assert "name a folder that is new or empty" in ran.stderr


def test_an_old_tool_is_refused(tmp_path):
    ran = subprocess.run(
        [sys.executable, SCRIPT, "--device", "cpu", "--program", paper(tmp_path, "2025.3.1.0", {})],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert ran.returncode == 3
    assert "version 2025.3; 2026.4 is needed: pip install nvidia-cuda-sanitizer-api" in ran.stdout
