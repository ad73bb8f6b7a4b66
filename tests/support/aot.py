"""Compile kernels for any GPU on a machine without one, and read what the compiler made of them.

Needs ``TRITON_INTERPRET`` unset when the kernels are imported. ``PYTHONPATH=tests python -m support.aot 90`` prints
registers, spills, shared memory and matrix instructions of every shipped configuration for sm_90.
"""

from __future__ import annotations

import collections
import inspect
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

if TYPE_CHECKING:
    from support.cases import CompileCase

#: Dynamic shared memory one program may use, in bytes, by architecture (CUDA programming guide, table of limits).
SHARED_MEMORY_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
#: The instruction that feeds the tensor cores with 16-bit operands.
MATRIX_INSTRUCTION = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
#: The same for fp8 operands.
FP8_INSTRUCTION = {89: "QMMA", 90: "QGMMA", 100: "UTCQMMA"}
TMA_LOAD = "UTMALDG"
_WGMMA = re.compile(r"\b[HQ]GMMA\.[^;]*")
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_OPCODE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", re.MULTILINE)


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel uses.

    Attributes:
        registers: per thread.
        stack: bytes of local memory per thread; more than zero means spills.
        spills: instructions that move registers to or from local memory (LDL, STL).
        shared: bytes of dynamic shared memory per program.
        warps: warps the kernel really starts, with those warp specialisation adds.
        opcodes: how often each SASS instruction occurs, without its suffixes.
        in_series: each wgmma is waited for before the next. ptxas makes it so where it cannot prove that the sums of
            one in flight are left alone, as at the end of a branch, and triton does not pass on its remark.
        seconds: compile time (near zero from Triton's cache).
    """

    registers: int
    stack: int
    spills: int
    shared: int
    warps: int
    opcodes: dict[str, int]
    in_series: bool
    seconds: float

    def problems(self, arch: int) -> list[str]:
        """Why this kernel should not ship for ``arch``; empty when it may."""
        found = []
        if self.stack or self.spills:
            found.append(f"spills: {self.stack} bytes of stack, {self.spills} LDL/STL")
        if self.shared > SHARED_MEMORY_LIMIT[arch]:
            found.append(f"{self.shared} bytes of shared memory, the limit is {SHARED_MEMORY_LIMIT[arch]}")
        return found


def _run(tool: str, *args: str) -> str:
    return subprocess.run([str(_TOOLS / tool), *args], capture_output=True, text=True, check=True).stdout


def _attributes(case: CompileCase) -> dict[tuple[int, ...], list[list[Any]]]:
    """What the launcher would tell the compiler: pointers, and divisible sizes, are multiples of 16."""
    plain = set(getattr(case.fn, "do_not_specialize", None) or ())
    names = list(inspect.signature(case.fn.fn).parameters)
    return {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in case.types.items()
        if kind.startswith("*") or (case.divisible and kind == "i32" and name not in plain)
    }


def compiled(case: CompileCase, arch: int) -> Any:
    """Triton's compiled kernel of ``case`` for sm_<arch>.

    Args:
        case: kernel, types of its run-time arguments, values of its constants, num_warps and num_stages.
        arch: 80, 86, 89, 90, 100, 120.

    Raises:
        Exception: whatever Triton or ptxas raise, among them "ptxas error" for registers or shared memory.
    """
    if not isinstance(case.fn, triton.JITFunction):
        raise RuntimeError(f"{case.name}: kernels were imported for the interpreter; unset TRITON_INTERPRET")
    signature = {name: case.types.get(name, "constexpr") for name in inspect.signature(case.fn.fn).parameters}
    language = GluonASTSource if case.fn.is_gluon() else ASTSource
    source = language(case.fn, signature, case.constants, _attributes(case))
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(case.options))


def compile_case(case: CompileCase, arch: int) -> Resources:
    """Compile ``case`` as :func:`compiled` does and read the cubin."""
    started = time.perf_counter()
    kernel = compiled(case, arch)
    seconds = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage = _run("cuobjdump", "-res-usage", str(cubin))
        sass = _run("nvdisasm", "-c", str(cubin))
    opcodes = collections.Counter(_OPCODE.findall(sass))
    wgmmas = _WGMMA.findall(sass)
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    return Resources(
        registers=numbers["REG"],
        stack=numbers["STACK"],
        spills=opcodes["LDL"] + opcodes["STL"],
        shared=kernel.metadata.shared,
        warps=getattr(kernel.metadata, "num_warps", case.options["num_warps"]),
        opcodes=dict(opcodes),
        in_series=len(wgmmas) > 1 and all("gsb0" in wgmma for wgmma in wgmmas),
        seconds=seconds,
    )


def compile_all(arch: int) -> Iterator[tuple[CompileCase, Resources]]:
    """Every shipped configuration for sm_<arch>."""
    from support.catalog import compile_cases

    for case in compile_cases(divmod(arch, 10)):
        yield case, compile_case(case, arch)


def main() -> None:
    """Print the table for the architectures given as arguments (default 90)."""
    print(f"{'kernel':44}   sm  regs  stack spills   shared  matrix  tma     s")
    for arch in [int(a) for a in sys.argv[1:]] or [90]:
        for case, r in compile_all(arch):
            instructions = {*MATRIX_INSTRUCTION.values(), *FP8_INSTRUCTION.values()}
            matrix = sum(r.opcodes.get(op, 0) for op in instructions)
            numbers = f"{arch:4} {r.registers:5} {r.stack:6} {r.spills:6} {r.shared:8} {matrix:7}"
            numbers += f" {r.opcodes.get(TMA_LOAD, 0):4} {r.seconds:5.1f}"
            print(f"{case.name:44} {numbers}  {'; '.join(r.problems(arch))}", flush=True)


if __name__ == "__main__":
    main()
