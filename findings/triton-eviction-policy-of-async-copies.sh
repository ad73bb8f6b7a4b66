#!/usr/bin/env bash
# triton 3.6.0, 3.7.1 and 3.8.0: the eviction_policy of a load is lost, without a word, where the load becomes a cp.async.
# tl.load(..., eviction_policy="evict_last") outside of a pipeline gets an L2 policy (createpolicy and a cache hint in its
# PTX). The same load in a loop of num_stages=3 that feeds tl.dot is pipelined into cp.async instructions without any.
# So is Gluon's async copy, which takes the argument itself, while gl.load keeps it. Who tunes L2 residency of a GEMM's
# operands by this argument measures nothing: look into the PTX.
#
# Compiled for sm_80 and sm_90; no GPU is needed. Seen with Python 3.12.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat >"$work/probe.py" <<'PY'
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language.nvidia.ampere import async_copy

copy = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
LAYOUT = gl.constexpr(gl.BlockedLayout([8], [32], [4], [0]))
SHARED = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def gluon_load(source, out):
    at = gl.arange(0, 1024, LAYOUT)
    gl.store(out + at, gl.load(source + at, eviction_policy="evict_last"))


@gluon.jit
def gluon_copy(source, out):
    at = gl.arange(0, 1024, LAYOUT)
    buffer = gl.allocate_shared_memory(gl.float16, [1024], SHARED)
    copy(buffer, source + at, eviction_policy="evict_last")
    async_copy.commit_group()
    async_copy.wait_group(0)
    gl.store(out + at, buffer.load(LAYOUT))


@triton.jit
def product(a_ptr, b_ptr, out_ptr, K, STAGES: tl.constexpr):
    m, k = tl.arange(0, 64), tl.arange(0, 64)
    acc = tl.zeros((64, 64), tl.float32)
    for k0 in tl.range(0, K, 64, num_stages=STAGES):
        a = tl.load(a_ptr + m[:, None] * 4096 + (k0 + k)[None, :], eviction_policy="evict_last")
        b = tl.load(b_ptr + (k0 + k)[:, None] * 64 + m[None, :], eviction_policy="evict_last")
        acc = tl.dot(a, b, acc)
    tl.store(out_ptr + m[:, None] * 64 + m[None, :], acc)


def show(name, language, kernel, constants, *kinds):
    names = kernel.arg_names
    signature = dict(zip(names, [*kinds, *["constexpr"] * len(constants)]))
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(kinds))}
    source = language(kernel, signature, constants, aligned)
    ptx = triton.compile(source, target=GPUTarget("cuda", arch, 32)).asm["ptx"]
    loads = "cp.async" if "cp.async.c" in ptx else "ld.global"
    print(f"{triton.__version__} sm_{arch} {name}: {loads}, evict_last {'evict_last' in ptx}")


for arch in (80, 90):
    show("gl.load", GluonASTSource, gluon_load, {}, "*fp16", "*fp16")
    show("gluon's async copy", GluonASTSource, gluon_copy, {}, "*fp16", "*fp16")
    for stages in (1, 3):
        show(f"tl.load, {stages} stages", ASTSource, product, {"STAGES": stages}, "*fp16", "*fp16", "*fp32", "i32")
PY
python=${PYTHON:-python3.12}
for version in 3.6.0 3.7.1 3.8.0; do
	"$python" -m venv "$work/$version"
	"$work/$version/bin/python" -m pip install -q "triton==$version"
	TRITON_CACHE_DIR="$work/cache" "$work/$version/bin/python" "$work/probe.py"
	for arch in 80 90; do
		cat <<-WANTED >>"$work/wanted"
			$version sm_$arch gl.load: ld.global, evict_last True
			$version sm_$arch gluon's async copy: cp.async, evict_last False
			$version sm_$arch tl.load, 1 stages: ld.global, evict_last True
			$version sm_$arch tl.load, 3 stages: cp.async, evict_last False
		WANTED
	done
done | tee "$work/seen"
diff "$work/seen" "$work/wanted" || { echo "changed" >&2; exit 1; }
echo "as found: cp.async drops the eviction policy"
