#!/usr/bin/env bash
# triton 3.9.0 assembles kernels for Hopper (sm_90) with `ptxas-blackwell`, so that TRITON_PTXAS_PATH, by which people
# point triton at the ptxas of their CUDA toolkit, no longer acts on an H100 or H200, and nothing is said.
#
# Seen with triton 3.8.0 and 3.9.0, Python 3.12, no GPU (kernels are compiled ahead of time for a named target):
#   3.8.0: TRITON_PTXAS_PATH assembles sm_80 and sm_90; ptxas-blackwell sm_100.
#   3.9.0: TRITON_PTXAS_PATH assembles sm_80 alone; TRITON_PTXAS_BLACKWELL_PATH sm_90 and sm_100.
# Whoever pinned an assembler for Hopper by the old variable, or trimmed ptxas-blackwell from an image because the
# machine has no Blackwell GPU, gets another assembler, or "Cannot find ptxas-blackwell", after the upgrade.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat >"$work/probe.py" <<'PY'
import os, stat, sys
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

folder = Path(sys.argv[1])
tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
for variable, tool in (("TRITON_PTXAS_PATH", "ptxas"), ("TRITON_PTXAS_BLACKWELL_PATH", "ptxas-blackwell")):
    wrapper = folder / f"wrapped-{tool}"
    wrapper.write_text(f'#!/bin/sh\ncase " $* " in *" --version "*) ;; *) echo {tool} >>"{folder}/used" ;; esac\n'
                       f'exec "{tools / tool}" "$@"\n')
    wrapper.chmod(wrapper.stat().st_mode | stat.S_IXUSR)
    os.environ[variable] = str(wrapper)


@triton.jit
def add_one(x, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(x + at, tl.load(x + at) + 1.0)


seen = []
for arch in (80, 90, 100):
    (folder / "used").write_text("")
    source = ASTSource(add_one, {"x": "*fp32", "N": "constexpr"}, {"N": 128})
    triton.compile(source, target=GPUTarget("cuda", arch, 32))
    seen.append(f"sm_{arch} by {'+'.join(sorted(set((folder / 'used').read_text().split())))}")
print(f"triton {triton.__version__}:", ", ".join(seen))
PY
wanted() {
	case $1 in
	3.8.0) echo "triton 3.8.0: sm_80 by ptxas, sm_90 by ptxas, sm_100 by ptxas-blackwell" ;;
	3.9.0) echo "triton 3.9.0: sm_80 by ptxas, sm_90 by ptxas-blackwell, sm_100 by ptxas-blackwell" ;;
	esac
}
for version in 3.8.0 3.9.0; do
	"${PYTHON:-python3.12}" -m venv "$work/$version"
	"$work/$version/bin/python" -m pip install -q "triton==$version"
	mkdir "$work/run-$version"
	seen=$(TRITON_CACHE_DIR="$work/cache-$version" "$work/$version/bin/python" "$work/probe.py" "$work/run-$version" 2>"$work/log" | grep "^triton ") ||
		{ cat "$work/log" >&2; exit 1; }
	echo "$seen"
	[ "$seen" = "$(wanted "$version")" ] || { echo "changed: expected $(wanted "$version")" >&2; exit 1; }
done
echo "as found: TRITON_PTXAS_PATH does not act on Hopper with triton 3.9.0"
