#!/usr/bin/env bash
# A kernel registered as a custom op with a backward (torch.library.custom_op and register_autograd), and without a
# forward-mode formula, which that interface has no place for: forward-mode derivatives treat it as a constant. The
# tangent through it is dropped, nothing is raised, eagerly and under torch.compile. torch.autograd.Function, and the
# same op where its input requires grad, raise NotImplementedError for the same request.
#
# Seen with torch 2.13.0 (CPU build), Python 3.11, and by hand the same with 2.14.1, of f(x) = op(x) + x, op(x) = 2x:
#   torch.func.jvp, eager and compiled: tangent (1, 10) for v = (1, 10); right is (3, 30)
#   torch.func.jacfwd: the identity; right is 3 times the identity
#   forward_ad.dual_level, input without requires_grad: (1, 10); with it: NotImplementedError
#   torch.autograd.Function without jvp: NotImplementedError
# So a Jacobian, a Hessian-vector product or a sensitivity computed in forward mode through such kernels is wrong.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat >"$work/probe.py" <<'PY'
import torch
import torch.autograd.forward_ad as forward_ad


@torch.library.custom_op("probe::double", mutates_args=())
def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


double.register_fake(torch.empty_like)
double.register_autograd(lambda ctx, grad: grad * 2, setup_context=lambda ctx, inputs, output: None)


class Double(torch.autograd.Function):
    forward = staticmethod(lambda x: x * 2)
    setup_context = staticmethod(lambda ctx, inputs, output: None)
    backward = staticmethod(lambda ctx, grad: grad * 2)


def tangent(op, x, v):
    return torch.func.jvp(lambda x: op(x) + x, (x,), (v,))[1]


def dual(x, v):
    with forward_ad.dual_level():
        x = forward_ad.make_dual(x, v)
        return forward_ad.unpack_dual(double(x) + x).tangent


def raises(call):
    try:
        return call().tolist()
    except NotImplementedError:
        return "NotImplementedError"


x, v = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 10.0])
gradient = torch.autograd.grad((double(xg := x.clone().requires_grad_()) + xg).sum(), xg)[0]
seen = {
    "backward (right)": gradient.tolist(),
    "jvp": tangent(double, x, v).tolist(),
    "jvp compiled": torch.compile(lambda x, v: tangent(double, x, v), backend="aot_eager", fullgraph=True)(x, v).tolist(),
    "jacfwd": torch.func.jacfwd(lambda x: double(x) + x)(x).tolist(),
    "dual": dual(x, v).tolist(),
    "dual, requires grad": raises(lambda: dual(x.clone().requires_grad_(), v)),
    "autograd.Function": raises(lambda: tangent(Double.apply, x, v)),
}
print("torch", torch.__version__.partition("+")[0])
for what, value in seen.items():
    print(f"{what}: {value}")
PY
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -q torch==2.13.0 "numpy<2.4"
"$work/venv/bin/python" -W ignore "$work/probe.py" | tee "$work/seen"
diff "$work/seen" - <<'WANTED' || { echo "changed" >&2; exit 1; }
torch 2.13.0
backward (right): [3.0, 3.0]
jvp: [1.0, 10.0]
jvp compiled: [1.0, 10.0]
jacfwd: [[1.0, 0.0], [0.0, 1.0]]
dual: [1.0, 10.0]
dual, requires grad: NotImplementedError
autograd.Function: NotImplementedError
WANTED
echo "as found: forward mode drops the tangent through a custom op in silence"
