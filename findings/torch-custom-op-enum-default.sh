#!/usr/bin/env bash
# torch.library.custom_op, a parameter annotated int whose default is an IntEnum: what the function gets is not what the
# caller passed. If this argument and all behind it equal their defaults, torch drops them and Python fills in the default,
# an IntEnum, even where the caller passed a plain int. If one behind it differs, it arrives as a plain int, even where the
# caller passed the IntEnum. Equal values, of two types: keys made of pickle or repr differ, and whatever is cached under
# them is made twice. quack-kernels 0.6.1, SonicMoE's GEMMs, has such a default (rounding_mode) in front of others
# (concat_layout) and keeps its compiled kernels under a hash of the pickled arguments.
#
# Seen with torch 2.13.0 and 2.14.1, on a CPU.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat >"$work/probe.py" <<'PY'
import enum
import hashlib
import pickle
from typing import Optional

import torch


class Rounding(enum.IntEnum):
    NEAREST = 0
    STOCHASTIC = 1


got = []


@torch.library.custom_op("probe::product", mutates_args=("out",))
def product(x: torch.Tensor, out: torch.Tensor, rounding: int = Rounding.NEAREST, layout: Optional[str] = None) -> None:
    got.append(rounding)


x = torch.ones(2)
for call in ({}, {"rounding": 0}, {"rounding": Rounding.NEAREST, "layout": "B"}, {"layout": "B"}):
    product(x, torch.ones(2), **call)
    key = hashlib.sha256(pickle.dumps((got[-1],))).hexdigest()[:8]
    print(f"{call or 'nothing'}: {type(got[-1]).__name__}, key {key}")
same = len({int(value) for value in got}) == 1
print(f"torch {torch.__version__.split('+')[0]}: one value {same}, {len({pickle.dumps((value,)) for value in got})} keys")
PY
"${PYTHON:-python3.12}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -q torch==2.14.1 numpy
"$work/venv/bin/python" -W ignore "$work/probe.py" | tee "$work/seen"
types=$(sed -n 's/.*: \(Rounding\|int\), key .*/\1/p' "$work/seen" | tr '\n' ' ')
[ "$types" = "Rounding Rounding int int " ] && grep -qx "torch 2.14.1: one value True, 2 keys" "$work/seen" ||
	{ echo "changed" >&2; exit 1; }
"$work/venv/bin/python" -m pip download -q --no-deps -d "$work" quack-kernels==0.6.1
"$work/venv/bin/python" -m zipfile -e "$work"/quack_kernels-*.whl "$work/quack"
gemm=$work/quack/quack/gemm_interface.py
grep -q "rounding_mode: int = RoundingMode.RN" "$gemm" && grep -q "class RoundingMode(IntEnum)" "$work/quack/quack/rounding.py" &&
	grep -q "sha256(pickle.dumps(key))" "$work/quack/quack/cache/jit.py" || { echo "quack changed" >&2; exit 1; }
echo "as found: the type of an argument depends on the arguments behind it, and quack-kernels hashes it"
