"""Poisoned memory must leave torch as it was."""

import pytest
import torch
from torch.utils._device import _device_constructors

from moe_kernels.tools.check.allocations import poisoned_allocations


@pytest.mark.plain_memory
def test_a_default_device_works_after_its_first_use_among_poisoned_memory():
    _device_constructors.cache_clear()
    with poisoned_allocations(), torch.device("meta"):
        torch.zeros(1)
    with torch.device("meta"):
        assert torch.empty(2).is_meta
