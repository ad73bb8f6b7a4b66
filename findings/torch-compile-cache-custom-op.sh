#!/usr/bin/env bash
# torch 2.13.0 and 2.14.1: torch.compile's cache on disk knows a custom op by its name, not by its schema. A package whose
# next release saves one tensor more for the backward of an op, under the same name, meets graphs that the release before
# compiled: the forward is of the new release, the cached backward calls the op with the arguments of the old one, and
# raises "expected at most ... argument(s)" or "missing value for argument". With an empty cache both releases work.
# A name that changes with the schema avoids it.
#
# Seen with torch 2.13.0, Python 3.11, a C++ compiler; torch 2.14.1 with Python 3.12 does the same.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat >"$work/probe.py" <<'PY'
import sys

import torch

SAVED = int(sys.argv[1])  # tensors that the backward of this release of the op takes besides the gradient
lib = torch.library.Library("probe", "DEF")
kept = ", ".join(f"Tensor s{i}" for i in range(SAVED))
lib.define(f"forward(Tensor x) -> ({', '.join(['Tensor'] * (1 + SAVED))})")
lib.define(f"backward(Tensor dout, {kept}) -> Tensor")
for key in ("CPU", "Meta"):
    lib.impl("forward", lambda x: (x * 2, *(x.clone() for _ in range(SAVED))), key)
    lib.impl("backward", lambda dout, *saved: dout * 2, key)
torch.library.register_autograd(
    "probe::forward",
    lambda ctx, dout, *_: torch.ops.probe.backward(dout, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*output[1:]),
)
x = torch.ones(4, requires_grad=True)
call = torch.compile(lambda x: torch.ops.probe.forward(x)[0].sin())
try:
    call(x).sum().backward()
    print(SAVED, "saved: gradient", x.grad[0].item() == 2 * torch.tensor(2.0).cos().item())
except RuntimeError as error:
    print(SAVED, "saved:", type(error).__name__, "expects" if "xpected" in str(error) or "missing" in str(error) else error)
PY
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -q torch==2.13.0 numpy
for saved in 1 2 1; do # two releases of the op, and the first once more, with one cache
	TORCHINDUCTOR_CACHE_DIR="$work/cache" "$work/venv/bin/python" -W ignore "$work/probe.py" $saved
done 2>"$work/log" | tee "$work/seen" || { cat "$work/log" >&2; exit 1; }
TORCHINDUCTOR_CACHE_DIR="$work/empty" "$work/venv/bin/python" -W ignore "$work/probe.py" 2 2>>"$work/log" | tee -a "$work/seen"
diff "$work/seen" - <<'WANTED' || { echo "changed" >&2; cat "$work/log" >&2; exit 1; }
1 saved: gradient True
2 saved: RuntimeError expects
1 saved: gradient True
2 saved: gradient True
WANTED
echo "as found: a graph compiled for another schema of an op is taken from the cache"
