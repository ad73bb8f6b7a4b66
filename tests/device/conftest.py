"""What ran these tests goes into the file of ``python -m pytest tests/device --junitxml=FILE``."""

import sys

import pytest

from moe_kernels.tools.common.machine import environment


@pytest.fixture(scope="session", autouse=True)
def machine(record_testsuite_property):
    """GPU, versions, commit, command and date."""
    command = " ".join(["python -m pytest", *sys.argv[1:]])
    for name, value in (environment() | {"command": command}).items():
        record_testsuite_property(name, str(value))
