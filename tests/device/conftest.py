"""What ran these tests goes into the file of ``python -m pytest tests/device --junitxml=FILE``."""

import pytest

from moe_kernels.bench.environment import environment


@pytest.fixture(scope="session", autouse=True)
def machine(record_testsuite_property):
    """GPU, versions, commit and date."""
    for name, value in environment().items():
        record_testsuite_property(name, str(value))
