"""What runs the experts of a model that is trained, and what the frozen ones are kept in."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

from moe_kernels.integrations.dispatch import dispatches, runs_on
from moe_kernels.integrations.fp8 import copied_bytes


def implementation(module: Any) -> str | None:
    """What runs ``module`` if it holds the weights of all experts of a layer, else None."""
    if dispatches(type(module)) is not None:
        return runs_on(module)
    weights = [module._parameters.get(name) for name in ("gate_up_proj", "up_proj")]
    return type(module).__name__ if any(weight is not None and weight.dim() == 3 for weight in weights) else None


def frozen(model: nn.Module) -> dict[str, int]:
    """Bytes that the experts take which get no gradient, by dtype, with scales and whatever else is kept of them."""
    held: Counter[str] = Counter()
    for module in model.modules():
        if implementation(module) is None or any(weight.requires_grad for weight in module.parameters()):
            continue
        for tensor in module.state_dict().values():  # of weights in 4 bits, their scales too
            held[str(tensor.dtype).removeprefix("torch.")] += tensor.nbytes
        held["float8_e4m3fn transposed"] += copied_bytes(module)
    return {dtype: size for dtype, size in held.most_common() if size}
