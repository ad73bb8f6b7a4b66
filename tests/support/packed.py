"""Experts in 4 bits without the library that quantises them."""

import torch

from moe_kernels.packed import PackedWeight, Scales


def packed(
    experts: int,
    rows: int,
    columns: int,
    device: torch.device,
    nested: bool = True,
    dtype: torch.dtype = torch.float32,
    blocksize: int = 32,
    seed: int = 0,
) -> PackedWeight:
    """A weight of random bytes, about as large as a layer's."""
    generator = torch.Generator().manual_seed(seed)
    elements = experts * rows * columns
    data = torch.randint(0, 256, (elements // 2,), generator=generator, dtype=torch.uint8)
    scales = torch.rand(elements // blocksize, generator=generator) * columns**-0.5 + 0.01
    found = Scales(scales.to(device), blocksize)
    if nested:
        places = torch.randint(0, 256, scales.shape, generator=generator, dtype=torch.uint8)
        table, outer = torch.linspace(-1, 1, 256), torch.rand(len(scales) // 4 + 1, generator=generator) * 0.1
        parts = (t.to(device) for t in (places, table, outer))
        values, table, outer = parts
        found = Scales(values, blocksize, table, outer, 4, torch.tensor(0.3, device=device))
    table = torch.linspace(-1, 1, 16)
    return PackedWeight(data.to(device), table.to(device), found, (experts, rows, columns), dtype, dtype)
