"""Custom ops by names that torch.compile's cache cannot confuse."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch


def custom_ops(**ops: tuple[Callable[..., Any], str]) -> list[torch.library.CustomOpDef]:
    """The ops of one layer, each of ``name=(function, schema)``: named so, with a digest of all the schemas.

    torch.compile keeps compiled graphs on disk and knows an op by its name alone: under the same name it would call
    the op of this release as that of another one.
    """
    digest = zlib.crc32("".join(schema for _, schema in ops.values()).encode())
    return [
        torch.library.custom_op(f"moe_kernels::{name}_{digest:08x}", function, mutates_args=(), schema=schema)
        for name, (function, schema) in ops.items()
    ]
