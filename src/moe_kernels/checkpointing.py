"""What gradient checkpointing does around an expert layer, as far as the layer can help it.

With ``use_reentrant=False`` saved-tensor hooks keep nothing of what is saved, and the backward computes the region
again up to the last tensor that it saved. Selective checkpointing besides keeps the outputs of chosen operators, as a
dispatch mode sees them.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
)
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext

_modes = torch._C._len_torch_dispatch_stack
_KEEP = True, CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_SAVE


def saves_through_hooks() -> bool:
    """Whether hooks take what autograd saves now: those of checkpointing, or of offloading.

    torch has no public way to ask; it asks itself like this. The argument: hooks do not count while torch traces.
    """
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def selective_modes() -> list[TorchDispatchMode]:
    """The active dispatch modes of selective checkpointing: torch's, and those with which Axolotl offloads.

    They have no public class in common. Each has a ``storage``, by operator, of what it keeps.
    """
    if not _modes():
        return []
    return [mode for mode in _get_current_dispatch_mode_stack() if hasattr(mode, "storage")]


_ANSWER = "moe_kernels keeps"


def keeps(modes: list[TorchDispatchMode], op: torch._ops.OpOverload, arguments: tuple[Any, ...]) -> bool:
    """Whether one of ``modes`` keeps what ``op`` returns.

    One answer for a whole region, and the same when it is computed again: the modes count an operator's calls. So it
    is left in the storage, which both modes of a region share: the second one has no policy, or, up to torch 2.12 and
    where Axolotl offloads, one that may answer otherwise by then.
    """
    for mode in modes:
        storage = mode.storage  # type: ignore[attr-defined]
        if _ANSWER not in storage:
            storage[_ANSWER] = _wanted(mode, op, arguments)
    return any(mode.storage[_ANSWER] for mode in modes)  # type: ignore[attr-defined]


def _wanted(mode: TorchDispatchMode, op: torch._ops.OpOverload, arguments: tuple[Any, ...]) -> bool:
    """What the policy says."""
    policy = getattr(mode, "policy_fn", None)
    return policy is not None and policy(SelectiveCheckpointContext(is_recompute=False), op, *arguments) in _KEEP


def unseen() -> contextlib.AbstractContextManager[Any]:
    """Inside, no dispatch mode sees what runs.

    Selective checkpointing wants to see the same operators when a region is computed again, and a replay allocates by
    others than the steps.
    """
    return _disable_current_modes()
