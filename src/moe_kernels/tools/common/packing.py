"""Rounds weights to the formats of published checkpoints: block-fp8 and mxfp4."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_kernels.packed import E2M1, MX_BLOCK, SIDE, BlockFp8, Mxfp4


def in_fp8(weight: Tensor, stacked: int = 1) -> BlockFp8:
    """``weight`` (E, N, K) in e4m3 with a scale for each 128 x 128 of its ``stacked`` parts, as in checkpoints."""
    sizes: Any = tuple(weight.shape)
    weight = weight.unflatten(1, (stacked, -1)).flatten(0, 1)
    _, rows, columns = weight.shape
    values = torch.nn.functional.pad(weight.float(), (0, -columns % SIDE, 0, -rows % SIDE))
    values = values.unflatten(2, (-1, SIDE)).unflatten(1, (-1, SIDE))
    scales = values.abs().amax((2, 4)) / torch.finfo(torch.float8_e4m3fn).max
    codes = (values / scales[:, :, None, :, None]).to(torch.float8_e4m3fn).flatten(3).flatten(1, 2)
    data = codes[:, :rows, :columns].reshape(sizes).contiguous()
    return BlockFp8(sizes, weight.dtype, data, scales.unflatten(0, (-1, stacked)).flatten(1, 2), stacked)


def in_mxfp4(weight: Tensor) -> Mxfp4:
    """``weight`` (E, N, K) in mxfp4, stored by rows as gpt-oss's checkpoints have it."""
    experts, rows, columns = weight.shape
    values = weight.float().contiguous().unflatten(2, (-1, MX_BLOCK))
    exponents = values.abs().amax(3, keepdim=True).log2().floor() - 2
    sizes = torch.tensor(E2M1[: len(E2M1) // 2], device=weight.device)
    codes = torch.bucketize(values.abs() / exponents.exp2(), (sizes[1:] + sizes[:-1]) / 2).to(torch.uint8)
    codes |= (values < 0).to(torch.uint8) << 3
    data, scales = codes[..., ::2] | codes[..., 1::2] << 4, (exponents + 127).squeeze(3).to(torch.uint8)
    return Mxfp4((experts, rows, columns), weight.dtype, data, scales)
