"""Frozen expert weights that bitsandbytes keeps in 4 bits (QLoRA).

Axolotl's ``quantize_moe_experts`` with ``load_in_4bit`` puts bitsandbytes' parametrization on each weight: reading
``module.gate_up_proj`` gives all experts in 16 bits, and autograd would keep that copy for every layer. Here the
4 bits themselves are handed to the kernels.
"""

from __future__ import annotations

from typing import Any

from moe_kernels.integrations.support import UnsupportedExperts
from moe_kernels.packed import PackedWeight, Scales


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
    scales = Scales(state.absmax, state.blocksize)
    if state.nested:
        inner = state.state2
        scales = Scales(state.absmax, state.blocksize, inner.code, inner.absmax, inner.blocksize, state.offset)
    sizes = tuple(state.shape)
    return PackedWeight(chain[name].original.view(-1), state.code, scales, sizes, state.dtype, state.dtype)
