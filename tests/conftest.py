"""Decides, before any kernel is imported, how this process runs kernels: on the GPU, or in Triton's interpreter.

``TRITON_INTERPRET`` is read when a kernel is decorated. Ahead-of-time tests need it unset and run in a process of
their own (``MOE_KERNELS_AOT=1``, see tests/aot).
"""

import os

import pytest
import torch
from hypothesis import settings

AOT = os.environ.get("MOE_KERNELS_AOT") == "1"
if AOT:
    os.environ.pop("TRITON_INTERPRET", None)
elif not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# float32 means float32: references on a GPU must not be TF32.
torch.backends.cuda.matmul.allow_tf32 = False
torch.backends.cudnn.allow_tf32 = False

if INTERPRETED:
    from support import interpreter

    interpreter.install()

# The same problems each time, so that a run is red because of a change; MOE_KERNELS_FUZZ (make fuzz) tries new ones.
settings.register_profile("suite", deadline=None, database=None, derandomize="MOE_KERNELS_FUZZ" not in os.environ)
settings.load_profile("suite")


def pytest_configure(config):
    config.addinivalue_line("markers", "plain_memory: keep torch.empty as it is (under torch.compile)")
    if INTERPRETED:
        for message in ("Conversion of an array", "invalid value encountered", "overflow encountered"):
            config.addinivalue_line("filterwarnings", f"ignore:{message}")


def pytest_collection_modifyitems(items):
    why = None
    if not torch.cuda.is_available():
        why = "needs an NVIDIA GPU: torch.cuda.is_available() is false here"
    elif INTERPRETED:
        why = "needs compiled kernels: unset TRITON_INTERPRET"
    for item in items:
        if why and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(scope="session")
def device():
    """Where kernels run in this process."""
    return torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")


@pytest.fixture(autouse=True)
def poisoned_memory(request):
    """What the package allocates without filling is NaN or a huge integer, never an accidental zero."""
    from moe_kernels.tools.check.allocations import poisoned_allocations

    if request.node.get_closest_marker("plain_memory"):
        # Dynamo's table of torch's functions is built again after destroy_process_group: where a test with poisoned
        # memory did so, torch's own are not in it.
        torch._dynamo.trace_rules.clear_lru_cache()
        yield
        return
    with poisoned_allocations():
        yield
