"""Experts in few bits without the libraries that quantise them."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moe_kernels import fused_experts
from moe_kernels.packed import BlockFp8, FourBit, Mxfp4, PackedWeight, Scales, scale_grid
from moe_kernels.tools.check.problems import Inputs, call


def results(
    inputs: Inputs, gate_up: Tensor | PackedWeight, down: Tensor | PackedWeight, backend: str, **options: Any
) -> dict[str, Tensor]:
    """Output and gradients of ``inputs``, with these frozen weights in the place of its own."""
    own = inputs.with_own_leaves()
    settings = own.options | options | {"backend": backend}
    weights: dict[str, Any] = {"gate_up": gate_up, "down": down}
    out = call(fused_experts, replace(own, **weights, options=settings))
    out.backward(inputs.grad)
    return {"out": out.detach()} | {name: t.grad for name, t in own.leaves().items() if t.grad is not None}


def packed(
    experts: int,
    rows: int,
    columns: int,
    device: torch.device,
    nested: bool = True,
    dtype: torch.dtype = torch.float32,
    blocksize: int = 32,
    seed: int = 0,
) -> FourBit:
    """A weight of random bytes, about as large as a layer's."""
    generator = torch.Generator().manual_seed(seed)
    elements = experts * rows * columns
    data = torch.randint(0, 256, (elements // 2,), generator=generator, dtype=torch.uint8)
    scales = torch.rand(elements // blocksize, generator=generator) * columns**-0.5 + 0.01
    found = Scales(scales.to(device), blocksize)
    if nested:
        places = torch.randint(0, 256, scales.shape, generator=generator, dtype=torch.uint8)
        table, outer = torch.linspace(-1, 1, 256), torch.rand(-(-len(scales) // 4), generator=generator) * 0.1
        parts = (t.to(device) for t in (places, table, outer))
        values, table, outer = parts
        found = Scales(values, blocksize, table, outer, 4, torch.tensor(0.3, device=device))
    table = torch.linspace(-1, 1, 16)
    return FourBit((experts, rows, columns), dtype, data.to(device), table.to(device), found, dtype)


def block_fp8(
    experts: int,
    rows: int,
    columns: int,
    device: torch.device,
    stacked: int = 1,
    dtype: torch.dtype = torch.float32,
    scale_dtype: torch.dtype = torch.float32,
    seed: int = 0,
    codes: torch.Tensor | None = None,
) -> BlockFp8:
    """A weight of random codes that are not NaN, about as large as a layer's; or of ``codes``, uint8."""
    generator = torch.Generator().manual_seed(seed)
    if codes is None:
        codes = torch.randint(0, 127, (experts, rows, columns), generator=generator, dtype=torch.uint8)
        codes += 128 * torch.randint(0, 2, codes.shape, generator=generator, dtype=torch.uint8)
    grid = experts, *scale_grid(rows, columns, stacked)
    scales = ((torch.rand(grid, generator=generator) + 0.1) * columns**-0.5 / 64).to(scale_dtype)
    data = codes.to(device).view(torch.float8_e4m3fn)
    return BlockFp8((experts, rows, columns), dtype, data, scales.to(device), stacked)


def mxfp4(
    experts: int,
    rows: int,
    columns: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Mxfp4:
    """A weight of random codes, about as large as a layer's."""
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 256, (experts, rows, columns // 32, 16), generator=generator, dtype=torch.uint8)
    around = 125 - (columns.bit_length() // 2)  # of 3 / sqrt(columns)
    scales = torch.randint(around - 2, around + 2, data.shape[:-1], generator=generator, dtype=torch.uint8)
    return Mxfp4((experts, rows, columns), dtype, data.to(device), scales.to(device))
