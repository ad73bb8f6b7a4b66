"""Axolotl integration of moe-kernels; see README.md beside this file."""

from .args import MoeKernelsArgs
from .plugin import MoeOptimizedPlugin

__all__ = ["MoeKernelsArgs", "MoeOptimizedPlugin"]
