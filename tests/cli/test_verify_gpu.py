"""`moe-kernels verify` on a GPU: the shipped kernels pass."""

import pytest
from typer.testing import CliRunner

from moe_kernels.tools.app import app

pytestmark = pytest.mark.gpu


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_every_configuration_is_right(dtype):
    result = CliRunner().invoke(app, ["verify", "--device", "cuda", "--dtype", dtype])
    assert result.exit_code == 0, result.output


def test_doctor_names_the_gpu_and_the_triton_backend():
    result = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "200"})
    assert "triton runs" in result.output
    assert "sm_" in result.output
