"""Every refusal of an input of the op, before anything runs."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_kernels.activation import Activation
from moe_kernels.kernels.operands import by_rows
from moe_kernels.layer import Tensors
from moe_kernels.packed import PackedWeight

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

def check_weights(
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: Activation,
    interleaved: bool,
    device: torch.device,
) -> None:
    """Raise what :func:`fused_experts` would on ``device`` of these weights, whatever the tokens are.

    The weights can be on ``meta``: their data is not looked at.
    """
    x = torch.empty(0, gate_up.shape[-1], dtype=torch.float32, device=device)
    check_inputs(x, torch.empty(0, 1, dtype=torch.int64, device=device), None, gate_up, down, reduce=False)
    check_experts(gate_up, down, gate_up_bias, down_bias, activation, interleaved)
    check_layouts(gate_up, down)
    compute_dtype(x, gate_up, down)


def autocast_dtype(device: str) -> torch.dtype | None:
    """What autocast computes in on that type of device; None where it is off. torch knows none of meta."""
    on = device != "meta" and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else None


def compute_dtype(x: Tensor, gate_up: Tensor, down: Tensor) -> torch.dtype:
    """What the layer runs in: the weights' dtype, or autocast's. Autocast leaves float64 alone, and meta tensors."""
    dtype, cast = gate_up.dtype, autocast_dtype(x.device.type)
    if cast is not None and torch.float64 not in (dtype, down.dtype):
        return cast
    if dtype != down.dtype:
        raise ValueError(f"gate_up is {dtype} but down is {down.dtype}: cast one of them, or use torch.autocast")
    return dtype


def check_inputs(
    x: Tensor, topk_ids: Tensor, topk_weights: Tensor | None, gate_up: Tensor, down: Tensor, reduce: bool
) -> None:
    if x.dim() != 2 or gate_up.dim() != 3 or down.dim() != 3:
        raise ValueError(
            "fused_experts wants x (T, H), gate_up (E, 2I, H) or (E, I, H), down (E, H, I); "
            f"got {tuple(x.shape)}, {tuple(gate_up.shape)}, {tuple(down.shape)}"
        )
    experts, rows, hidden = gate_up.shape
    intermediate = down.shape[2]
    if x.shape[1] != hidden or down.shape[:2] != (experts, hidden) or rows not in (intermediate, 2 * intermediate):
        raise ValueError(
            f"sizes disagree: x {tuple(x.shape)}, gate_up {tuple(gate_up.shape)}, down {tuple(down.shape)}; "
            "want (T, H), (E, 2I, H) or (E, I, H), (E, H, I)"
        )
    if reduce != (topk_weights is not None):
        raise ValueError("topk_weights belong to the sum: pass them with reduce=True, and None with reduce=False")
    if topk_ids.dim() != 2 or topk_ids.shape[0] != x.shape[0]:
        raise ValueError(f"topk_ids {tuple(topk_ids.shape)} must be (T, K) with T={x.shape[0]}")
    if experts == 0 or topk_ids.shape[1] == 0:
        raise ValueError(f"there is nothing to route to: {experts} experts, topk_ids {tuple(topk_ids.shape)}")
    if topk_weights is not None and topk_ids.shape != topk_weights.shape:
        raise ValueError(
            f"topk_ids {tuple(topk_ids.shape)} and topk_weights {tuple(topk_weights.shape)} must both be "
            f"(T, K) with T={x.shape[0]}"
        )
    if topk_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"topk_ids must be int64 or int32, not {topk_ids.dtype}")
    for name, tensor in (("x", x), ("topk_weights", topk_weights), ("gate_up", gate_up), ("down", down)):
        _check_dtype(name, tensor)


def check_devices(tensors: Tensors) -> None:
    """Raise ValueError where a tensor is not with the weights."""
    device = tensors.gate_up.device
    for tensor in tensors:
        if tensor is not None and tensor.device != device:
            raise ValueError(f"the expert weights are on {device}, another tensor on {tensor.device}: move it there")


def check_experts(
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: Activation,
    interleaved: bool,
) -> None:
    for name, bias, wanted in (
        ("gate_up_bias", gate_up_bias, gate_up.shape[:2]),
        ("down_bias", down_bias, down.shape[:2]),
    ):
        _check_dtype(name, bias)
        if bias is not None and bias.shape != wanted:
            raise ValueError(f"{name} is {tuple(bias.shape)}, want {tuple(wanted)}")
    if gate_up.shape[1] == down.shape[2] and (interleaved or activation.parameters):
        raise ValueError(
            f"experts without a gate (gate_up {tuple(gate_up.shape)}, down {tuple(down.shape)}) take "
            f"interleaved=False and a plain activation, not {activation.name!r}"
        )


def check_layouts(gate_up: Tensor, down: Tensor) -> None:
    for name, tensor in (("gate_up", gate_up), ("down", down)):
        if not (by_rows(tensor) or by_rows(tensor.mT)):
            raise ValueError(
                f"each expert's matrix of {name} must be contiguous, by rows or by columns, got strides "
                f"{tuple(tensor.stride())}: store it contiguous once, before training"
            )


def check_low_rank(name: str, weight: Tensor, pair: object) -> None:
    if pair is None:
        return
    parts = tuple(pair) if isinstance(pair, (tuple, list)) else (pair,)
    if len(parts) > 1 and parts[0] is None and parts[1] is None:
        return
    if len(parts) not in (2, 3) or not all(isinstance(factor, Tensor) for factor in parts[:2]):
        shown = ", ".join(type(part).__name__ for part in parts) or "empty"
        raise ValueError(
            f"{name}_lora should be (lora_b, lora_a), two tensors, with or without a scaling as third, and is {shown}"
        )
    if len(parts) == 3 and not isinstance(parts[2], (int, float)):
        raise ValueError(
            f"{name}_lora has a {type(parts[2]).__name__} as its scaling, which is a number of the host and gets no "
            "gradient: pass a float, and multiply lora_a with a scaling that is trained"
        )
    (experts, rows, cols), (lora_b, lora_a) = weight.shape, parts[:2]
    rank = lora_b.shape[-1] if lora_b.dim() == 3 else 0
    _check_dtype(f"{name}_lora", lora_b)
    _check_dtype(f"{name}_lora", lora_a)
    if lora_b.shape != (experts, rows, rank) or lora_a.shape != (experts, rank, cols) or not 1 <= rank <= 128:
        raise ValueError(
            f"{name}_lora is {tuple(lora_b.shape)}, {tuple(lora_a.shape)}; want ({experts}, {rows}, r), "
            f"({experts}, r, {cols}) with r from 1 to 128"
        )


def check_tensors(given: dict[str, object], **optional: object) -> None:
    """Raise ValueError where an argument is a list, an array, a module or None; the ``optional`` ones can be None."""
    given = given | {name: value for name, value in optional.items() if value is not None}
    for name, value in given.items():
        if not isinstance(value, (Tensor, PackedWeight)):
            raise ValueError(
                f"{name} must be a tensor, not {type(value).__name__}: torch.as_tensor makes one of lists and arrays"
            )


def _check_dtype(name: str, tensor: Tensor | None) -> None:
    if tensor is not None and tensor.dtype not in DTYPES:
        check_tensors({name: tensor})  # an array has a dtype too
        wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(f"{name} must be a floating dtype ({wanted}), not {tensor.dtype}")
