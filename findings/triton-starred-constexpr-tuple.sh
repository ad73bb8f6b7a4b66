#!/usr/bin/env bash
# triton 3.6.0 and 3.7.1: a tuple that is annotated tl.constexpr cannot be unpacked into a call. `pair: tl.constexpr =
# (A, B)` and then `add(x, *pair)` ends in a CompilationError whose whole reason is "AssertionError()", at the line of the
# call. Without the annotation, or with pair[0], pair[1], the same kernel compiles. triton 3.8.0 takes all three, and so
# does the interpreter (TRITON_INTERPRET=1): what was written and tested there fails on a machine with an older triton.
#
# Compiled for sm_90; no GPU is needed. Seen with Python 3.12.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat >"$work/probe.py" <<'PY'
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def add(x, A: tl.constexpr, B: tl.constexpr):
    return x * A + B


@triton.jit
def annotated(ptr, A: tl.constexpr, B: tl.constexpr):
    pair: tl.constexpr = (A, B)
    tl.store(ptr, add(tl.load(ptr), *pair))


@triton.jit
def plain(ptr, A: tl.constexpr, B: tl.constexpr):
    pair = (A, B)
    tl.store(ptr, add(tl.load(ptr), *pair))


@triton.jit
def by_place(ptr, A: tl.constexpr, B: tl.constexpr):
    pair: tl.constexpr = (A, B)
    tl.store(ptr, add(tl.load(ptr), pair[0], pair[1]))


for kernel in (annotated, plain, by_place):
    source = ASTSource(kernel, {"ptr": "*fp32", "A": "constexpr", "B": "constexpr"}, {"A": 2.0, "B": 3.0})
    try:
        triton.compile(source, target=GPUTarget("cuda", 90, 32))
        said = "compiles"
    except triton.CompilationError as error:
        said = f"{type(error).__name__}, {str(error).splitlines()[-1]}"
    print(f"{triton.__version__} {kernel.fn.__name__}: {said}")
PY
python=${PYTHON:-python3.12}
for version in 3.6.0 3.7.1 3.8.0; do
	"$python" -m venv "$work/$version"
	"$work/$version/bin/python" -m pip install -q "triton==$version"
	TRITON_CACHE_DIR="$work/cache" "$work/$version/bin/python" "$work/probe.py"
	first="compiles"
	[ "$version" = 3.8.0 ] || first="CompilationError, AssertionError()"
	printf '%s\n' "$version annotated: $first" "$version plain: compiles" "$version by_place: compiles" >>"$work/wanted"
done | tee "$work/seen"
diff "$work/seen" "$work/wanted" || { echo "changed" >&2; exit 1; }
echo "as found: before 3.8 an annotated tuple is not unpacked into a call"
