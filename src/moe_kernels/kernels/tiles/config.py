"""Which tile a kernel uses: what ``tuned.py`` has for the sizes at hand, or else the table.

Nothing is searched or timed while a model trains.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import torch

from moe_kernels.kernels.tiles import tuned
from moe_kernels.kernels.tiles.table import KERNELS, GemmConfig, table
from moe_kernels.problem import device_capability

Choice = TypeVar("Choice")
# Called when the same sizes may get other kernels than before.
on_change: list[Callable[[], None]] = []


def changed() -> None:
    """Tell everyone who remembers what was chosen."""
    for forget in on_change:
        forget()


class Override(Generic[Choice]):
    """A choice made from outside, in place of the package's own: for measuring and for tests, not for training.

    Attributes:
        choice: None outside :meth:`use`.
    """

    choice: Choice | None = None

    @contextlib.contextmanager
    def use(self, choice: Choice) -> Iterator[None]:
        """Within this context ``choice`` is made."""
        previous, self.choice = self.choice, choice
        changed()
        try:
            yield
        finally:
            self.choice = previous
            changed()


_overrides: dict[str, Override[GemmConfig]] = {kernel: Override() for kernel in KERNELS}


def use_config(kernel: str, config: GemmConfig) -> contextlib.AbstractContextManager[None]:
    """Within this context ``kernel`` uses ``config``: for measuring candidates and for tests, not for training."""
    return _overrides[kernel].use(config)


@functools.lru_cache(maxsize=4096)
def select_config(
    kernel: str,
    device: torch.device,
    dtype: torch.dtype,
    group_size: int | None,
    tma: bool,
    sizes: tuple[int, int, int] | None,
) -> GemmConfig:
    """The tile that ``kernel``, one of :data:`KERNELS`, uses.

    Args:
        kernel: name of the kernel.
        device, dtype: of the weights.
        group_size: rows per tile; None for wgrad.
        tma: loads by TMA.
        sizes: rows per expert, columns of the result, length of the inner products: see ``tuned.Sizes``. None for a
            kernel with a bias, a low-rank part or weights stored by columns: tiles are tuned without, and what fits
            a multiprocessor without need not fit with.

    Raises:
        TunedTilesError: the file of tuned tiles for this GPU cannot be used.
    """
    if (chosen := _overrides[kernel].choice) is not None:
        return chosen
    if sizes is not None and dtype != torch.float32:  # tiles are tuned in 16 bits
        key = tuned.Key(kernel, group_size, "tma" if tma else "pointer", tuned.bucket(tuned.Sizes(*sizes)))
        if (found := tuned.tiles_of(device).get(key)) is not None:
            return found
    return table(device_capability(device), dtype, tma)[kernel, group_size]


on_change.append(select_config.cache_clear)


def forget_tuned_tiles() -> None:
    """Read the file of tuned tiles again at the next launch."""
    tuned.tiles_of.cache_clear()
    changed()
