"""The choices a user makes for the expert layers, validated in one place."""

from __future__ import annotations

from dataclasses import dataclass

from moe_kernels import registry

GroupSize = int | str

TILE_ROWS: tuple[int, ...] = (64, 128, 256)
GROUP_SIZES: tuple[GroupSize, ...] = (*TILE_ROWS, "auto")
DEFAULT_GROUP_SIZE = 128


def check_settings(group_size: GroupSize, backend: str, backends: tuple[str, ...], **switches: bool) -> None:
    """Raise ValueError naming the valid values if a setting is not one of them."""
    if type(group_size) not in (int, str) or group_size not in GROUP_SIZES:  # 64.0 and True are equal to some
        raise ValueError(f"group_size={group_size!r} is not one of {', '.join(map(str, GROUP_SIZES))}")
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name}={value!r} must be true or false")
    if backend not in backends:
        raise ValueError(f"backend={backend!r} is not one of {', '.join(backends)}")


@dataclass(frozen=True)
class ExpertsSettings:
    """How expert layers run. Every field changes what runs; none changes the result beyond rounding.

    Attributes:
        group_size: rows per tile of the grouped GEMMs. Each tile of that many sorted rows belongs to one
            expert. ``"auto"`` picks from the mean number of rows per expert.
        persistent: one program per multiprocessor loops over all tiles, instead of one program per tile.
        backend: ``"auto"``, ``"gluon"``, ``"triton"``, ``"torch"``, or one that was added (moe_kernels.registry).
        recompute: keep X but not Z for the backward, which runs the up projection once more.
    """

    group_size: GroupSize = DEFAULT_GROUP_SIZE
    persistent: bool = True
    backend: str = "auto"
    recompute: bool = False

    def __post_init__(self) -> None:
        check_settings(
            self.group_size, self.backend, registry.names(), persistent=self.persistent, recompute=self.recompute
        )
