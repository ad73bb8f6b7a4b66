#!/usr/bin/env bash
# triton 3.9.0's interpreter (TRITON_INTERPRET=1) ends a kernel whose mask joins a comparison of a block with one of a
# scalar, `mask=(columns < n) & (row < rows)`: "mask has unsupported dtype". The compiler takes it, and so do the
# interpreters of 3.6 and 3.8, with the right result. Two comparisons of blocks, or the scalar one put into the block by
# tl.full, are taken by 3.9.0 too.
#
# In all of them a comparison keeps the type of what it compared, int32 here, over numpy's bool. Widening the scalar one
# to the block makes int32 of it, and int32 & bool is int32: 3.8 converts such a mask where it stores, 3.9.0 refuses it.
# Whoever tests kernels on a CPU meets it at the upgrade to torch 2.15, which brings triton 3.9.0.
#
# Seen with triton 3.8.0 and 3.9.0, torch 2.13.0 (CPU) for the tensors, numpy 2.3.5, Python 3.11.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat >"$work/probe.py" <<'PY'
import torch
import triton
import triton.language as tl


@triton.jit
def store_row(out, rows_ptr, n, JOIN: tl.constexpr):
    columns = tl.arange(0, 8)
    rows = tl.load(rows_ptr)
    for row in range(2):
        if JOIN == "scalar":
            mask = (columns < n) & (row < rows)
        else:
            mask = (columns < n) & (tl.full((8,), row, tl.int32) < rows)
        tl.store(out + row * 8 + columns, columns + 1, mask=mask)


for join in ("block", "scalar"):
    out = torch.zeros(16, dtype=torch.int32)
    try:
        store_row[(1,)](out, torch.tensor([1], dtype=torch.int32), 3, join)
        end = out.tolist()
    except triton.runtime.errors.InterpreterError as error:
        end = str(error)
    print(f"triton {triton.__version__}, {join}: {end}")
PY
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -q torch==2.13.0 numpy==2.3.5
for version in 3.8.0 3.9.0; do
	"$work/venv/bin/python" -m pip install -q --no-deps --target "$work/$version" "triton==$version"
	PYTHONPATH="$work/$version" TRITON_INTERPRET=1 "$work/venv/bin/python" -W ignore "$work/probe.py"
done | tee "$work/seen"
diff "$work/seen" - <<'WANTED' || { echo "changed" >&2; exit 1; }
triton 3.8.0, block: [1, 2, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
triton 3.8.0, scalar: [1, 2, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
triton 3.9.0, block: [1, 2, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
triton 3.9.0, scalar: ValueError('mask has unsupported dtype')
WANTED
echo "as found: a scalar comparison in a mask ends triton 3.9.0's interpreter"
