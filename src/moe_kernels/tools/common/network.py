"""No command uses the network unless it is told to.

Packages that ours import do: bitsandbytes, imported by transformers, looks for kernels on huggingface.co.
"""

from __future__ import annotations

import os

SWITCHES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
_set_here: set[str] = set()


def stay_offline() -> None:
    """Switch Hugging Face's libraries off the network, before they are imported; what the user has set stays."""
    for name in SWITCHES:
        if name not in os.environ:
            os.environ[name] = "1"
            _set_here.add(name)


def go_online() -> None:
    """Take that back, for a command that was asked for something on the network."""
    while _set_here:
        os.environ.pop(_set_here.pop(), None)
