#!/usr/bin/env bash
# Gluon on Hopper, warpgroup_mma(..., is_async=True) in both branches of an `if`: ptxas can wait after every single wgmma
# of the kernel, in the loops as well. Results are right, the tensor cores idle between products. ptxas remarks on it
# without being asked (C7515, "potential performance loss"), and triton does not pass that on. Seen here if the products of
# both branches are in flight where these meet; and if both branches add to the same two sums, even where each waits for
# its own products. If one branch leaves a sum out and each waits for its own, wgmmas are in groups, as written.
#
# Compiled for sm_90 and read in the SASS; no GPU is needed. A wgmma that ends a group has gsb0. Seen with triton 3.7.1,
# 3.8.0 and 3.9.0, each with the ptxas that it brings, and Python 3.12.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat >"$work/probe.py" <<'PY'
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait


@gluon.jit
def kernel(out, n, EARLY: gl.constexpr, SAME: gl.constexpr):
    operand: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    a = gl.allocate_shared_memory(gl.bfloat16, [64, 64], operand)
    b = gl.allocate_shared_memory(gl.bfloat16, [64, 128], operand)
    x = gl.zeros((64, 128), gl.float32, layout)
    y = gl.zeros((64, 128), gl.float32, layout)
    if n > 1:
        for _ in range(n):
            x = warpgroup_mma(a, b, x, is_async=True)
            y = warpgroup_mma(a, b, y, is_async=True)
            x, y = warpgroup_mma_wait(2, deps=(x, y))
        if EARLY:
            x, y = warpgroup_mma_wait(0, deps=(x, y))
    else:
        for _ in range(2, n + 9):
            x = warpgroup_mma(a, b, x, is_async=True)
            if SAME:
                y = warpgroup_mma(a, b, y, is_async=True)
                x, y = warpgroup_mma_wait(2, deps=(x, y))
            else:
                x = warpgroup_mma_wait(1, deps=(x,))
        if EARLY:
            if SAME:
                x, y = warpgroup_mma_wait(0, deps=(x, y))
            else:
                x = warpgroup_mma_wait(0, deps=(x,))
    x, y = warpgroup_mma_wait(0, deps=(x, y))
    rows, cols = gl.arange(0, 64, gl.SliceLayout(1, layout)), gl.arange(0, 128, gl.SliceLayout(0, layout))
    gl.store(out + rows[:, None] * 128 + cols[None, :], x + y)


tools = Path(triton.__file__).parent / "backends/nvidia/bin"
for early, same in ((True, False), (False, False), (True, True)):
    signature = {"out": "*fp32", "n": "i32", "EARLY": "constexpr", "SAME": "constexpr"}
    source = GluonASTSource(kernel, signature, {"EARLY": early, "SAME": same}, {})
    cubin = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["cubin"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
    products = re.findall(r"\bHGMMA\.[^;]*", sass)
    alone = sum("gsb0" in product for product in products) == len(products)
    sums = "the same sums" if same else "a sum left out"
    where = "in each branch" if early else "after both"
    print(f"triton {triton.__version__}, {sums}, waited for {where}: {'every wgmma alone' if alone else 'in groups'}")
PY
python=${PYTHON:-python3.12}
for version in 3.7.1 3.8.0 3.9.0; do
	"$python" -m venv "$work/$version"
	"$work/$version/bin/python" -m pip install -q "triton==$version" numpy==2.3.5
	TRITON_CACHE_DIR="$work/cache" "$work/$version/bin/python" -W ignore "$work/probe.py" 2>"$work/log" || { cat "$work/log" >&2; exit 1; }
	! grep -i "wgmma\|seriali" "$work/log" || { echo "triton says it" >&2; exit 1; }
	printf '%s\n' "triton $version, a sum left out, waited for in each branch: in groups" \
		"triton $version, a sum left out, waited for after both: every wgmma alone" \
		"triton $version, the same sums, waited for in each branch: every wgmma alone" >>"$work/wanted"
done | tee "$work/seen"
diff "$work/seen" "$work/wanted" || { echo "changed" >&2; exit 1; }
echo "as found: products in two branches can put every product of the kernel in series, and triton says nothing"
