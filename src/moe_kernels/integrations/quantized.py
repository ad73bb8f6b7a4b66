"""Frozen expert weights that bitsandbytes keeps in 4 bits (QLoRA), a block of experts at a time.

Axolotl's ``quantize_moe_experts`` with ``load_in_4bit`` puts bitsandbytes' parametrization on each weight: reading
``module.gate_up_proj`` gives all experts in 16 bits, and autograd would keep that copy for every layer. Here a block
of experts is dequantised, used and dropped, in the forward and again in the backward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_kernels.integrations.support import UnsupportedExperts

#: What one block of dequantised experts may take. More buys nothing once every multiprocessor has work.
BLOCK_BYTES = 256 * 2**20

#: Makes gate_up and down of a block.
Load = Callable[[], tuple[Tensor, Tensor]]
#: (load, (T, K) ids, further tensors of the experts by argument, keep what load gives, recompute) -> output
Experts = Callable[[Load, Tensor, dict[str, Any], bool, bool], Tensor]


@dataclass(frozen=True)
class PackedWeight:
    """A weight (E, rows, columns) in bitsandbytes' 4-bit format: ``packed`` (bytes, 1) and its quantisation state."""

    packed: Tensor
    state: Any

    @property
    def shape(self) -> torch.Size:
        return self.state.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.state.dtype

    def experts(self, first: int, last: int) -> Tensor:
        """Experts ``first`` to ``last`` (exclusive), dequantised: (last - first, rows, columns)."""
        from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise

        state, elements = self.state, self.shape[1] * self.shape[2]
        scales = state.absmax
        if state.nested:
            scales = dequantize_blockwise(scales, state.state2) + state.offset
        one = elements // state.blocksize
        part = QuantState(
            absmax=scales[first * one : last * one].float(),
            shape=torch.Size((last - first, *self.shape[1:])),
            code=state.code,
            blocksize=state.blocksize,
            quant_type=state.quant_type,
            dtype=state.dtype,
        )
        with torch.no_grad():
            return dequantize_4bit(self.packed.view(-1)[first * elements // 2 : last * elements // 2, None], part)


def packed_weight(module: Any, name: str, where: str = "") -> PackedWeight | None:
    """The weight ``name`` of ``module``, called ``where`` in errors, if bitsandbytes keeps it in 4 bits.

    Raises:
        UnsupportedExperts: its blocks of equal scale reach over the border of two experts.
    """
    chain = getattr(module, "parametrizations", {})
    if name not in chain or len(chain[name]) != 1:
        return None
    state = getattr(chain[name][0], "quant_state", None)
    if state is None:
        return None
    if state.shape[1] * state.shape[2] % state.blocksize:
        reason = f"the {state.blocksize} values of a 4-bit block do not divide an expert's {tuple(state.shape[1:])}."
        raise UnsupportedExperts.of(module, reason, where)
    return PackedWeight(chain[name].original, state)


def run_in_blocks(
    experts: Experts, ids: Tensor, gate_up: PackedWeight, down: PackedWeight, others: dict[str, Any]
) -> Tensor:
    """``experts`` as a sum over blocks of experts, in float32; ``ids`` (T, K) are what the router chose.

    ``others`` are tensors, or pairs of tensors, whose first dimension is the expert.
    """
    count = gate_up.shape[0]
    one = sum(w.shape[1] * w.shape[2] * w.dtype.itemsize for w in (gate_up, down))
    block = max(1, BLOCK_BYTES // one)
    recompute = block < count  # every block's Z has room for all rows: of several, none is kept
    total = None
    for first in range(0, count, block):
        last = min(first + block, count)
        load = functools.partial(_dequantised, gate_up, down, first, last)
        local = torch.where((ids >= first) & (ids < last), ids - first, -1)
        sliced = {name: _slice(value, first, last) for name, value in others.items()}
        out = experts(load, local, sliced, False, recompute)
        total = out.float() if total is None else total + out
    assert total is not None
    return total


def _dequantised(gate_up: PackedWeight, down: PackedWeight, first: int, last: int) -> tuple[Tensor, Tensor]:
    return gate_up.experts(first, last), down.experts(first, last)


def _slice(value: Any, first: int, last: int) -> Any:
    if value is None:
        return None
    return tuple(t[first:last] for t in value) if isinstance(value, tuple) else value[first:last]
