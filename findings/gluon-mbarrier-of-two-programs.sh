#!/usr/bin/env bash
# Gluon on Hopper, an mbarrier that the two programs of a cluster share (MBarrierLayout.multicta(2, two_cta=True)). Two
# things that the docstrings do not say ("the initial count for the barrier", "wait until the mbarrier object completes
# its current phase"):
# - triton 3.8.0 and 3.9.0 initialise it to twice the count that `init` is given, 3.7.1 to the count. The same kernel
#   expects other arrivals after an upgrade.
# - `wait` waits in the first program of the cluster, whose memory holds the barrier; the second goes on at once. A stage
#   that both programs are to refill when the barrier says so is refilled too early by one of them.
# A barrier that each program has for itself has neither. So programs that share loads need one of each: the shared one
# before the load that is for both, which the first program issues, and an own one before every other.
#
# Compiled for sm_90 and read in the PTX; no GPU is needed. Seen with Python 3.12.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat >"$work/probe.py" <<'PY'
import re

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language.nvidia.hopper import cluster, mbarrier

if hasattr(mbarrier, "sync_cluster_init"):  # 3.7

    @gluon.jit
    def show_init():
        mbarrier.sync_cluster_init()

elif hasattr(mbarrier, "fence_init_release_cluster"):  # 3.8

    @gluon.jit
    def show_init():
        mbarrier.fence_init_release_cluster()
        cluster.barrier(relaxed=True)

else:

    @gluon.jit
    def show_init():
        cluster.barrier()


@gluon.jit
def kernel(SHARED: gl.constexpr):
    layout: gl.constexpr = mbarrier.MBarrierLayout.multicta(2, two_cta=SHARED)
    barrier = gl.allocate_shared_memory(gl.int64, [1 if SHARED else 2], layout)
    mbarrier.init(barrier, count=3)
    show_init()
    mbarrier.wait(barrier, 0)


for shared in (False, True):
    source = GluonASTSource(kernel, {"SHARED": "constexpr"}, {"SHARED": shared}, {})
    options = {"num_warps": 4, "num_ctas": 2}
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    count = re.search(r"mbarrier\.init\S* \[\S+\], (\d+);", ptx).group(1)
    skips = re.search(r"@!%p\d+ bra\S* skipWait", ptx) is not None
    kind = "shared" if shared else "own"
    print(f"{triton.__version__} {kind}: count=3 is {count}, {'some wait' if skips else 'all wait'}")
PY
python=${PYTHON:-python3.12}
for version in 3.7.1 3.8.0 3.9.0; do
	"$python" -m venv "$work/$version"
	"$work/$version/bin/python" -m pip install -q "triton==$version" numpy==2.3.5
	TRITON_CACHE_DIR="$work/cache" "$work/$version/bin/python" -W ignore "$work/probe.py" 2>/dev/null
	shared=6
	[ "$version" = 3.7.1 ] && shared=3
	printf '%s\n' "$version own: count=3 is 3, all wait" "$version shared: count=3 is $shared, some wait" >>"$work/wanted"
done | tee "$work/seen"
diff "$work/seen" "$work/wanted" || { echo "changed" >&2; exit 1; }
echo "as found: a shared mbarrier counts otherwise from 3.8 on, and only one of its programs waits"
