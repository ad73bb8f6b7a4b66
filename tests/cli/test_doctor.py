"""`moe-kernels doctor`: what it finds, and that it notices what is missing."""

import json
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from moe_kernels.backends.triton import TritonBackend
from moe_kernels.tools import doctor
from moe_kernels.tools.app import app

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings the same under its old name
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]


def findings_of(result):
    return {finding["what"]: finding for finding in json.loads(result.stdout)["findings"]}


@pytest.fixture
def run():
    pytest.importorskip(doctor.PLUGIN)  # now: what Axolotl logs when it is first imported is not the report
    return lambda: CliRunner().invoke(app, ["doctor", "--json"])


def test_reports_every_part(run):
    result = run()
    found = findings_of(result)
    assert result.exit_code == 0, result.output
    for family in ("mixtral", "qwen2-moe", "deepseek-v3"):
        assert "runs" in found[f"experts of {family}"]["detail"]
    assert found["torch"]["detail"] == torch.__version__.partition("+")[0] or "+" in found["torch"]["detail"]
    assert found["Axolotl plugin"]["status"] == "ok"
    if not torch.cuda.is_available():
        assert found["GPU"]["status"] == "note"
        assert found["GPU"]["cure"]


def test_says_why_a_backend_does_not_run(run, monkeypatch):
    monkeypatch.setattr(TritonBackend, "why_not", lambda self, problem: "the moon is full.")
    detail = findings_of(run())["experts of qwen2-moe"]["detail"]
    assert "triton does not: the moon is full" in detail
    assert ".;" not in detail


def test_plain_output_shows_cures():
    result = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "160"})
    assert result.exit_code == 0
    assert "experts of mixtral" in result.output
    if not torch.cuda.is_available():
        assert "cure:" in result.output


def test_a_narrow_terminal_cuts_no_cell():
    narrow, usual = (CliRunner().invoke(app, ["doctor"], env={"COLUMNS": columns}).output for columns in ("30", "80"))
    assert narrow == usual, "lines wrap in the terminal; columns of it were left out"


def test_a_missing_requirement_is_broken(run, monkeypatch):
    monkeypatch.setattr(doctor, "installed_version", lambda name: None if name == "triton" else "2.13.0")
    result = run()
    assert result.exit_code == 1
    assert findings_of(result)["triton"] == {
        "what": "triton", "status": "broken", "detail": "not installed", "cure": doctor.CURES["triton"],
    }  # fmt: skip


def test_a_plugin_that_does_not_import_is_broken(run, monkeypatch):
    monkeypatch.setitem(sys.modules, doctor.PLUGIN, None)
    result = run()
    assert result.exit_code == 1
    assert findings_of(result)["Axolotl plugin"]["status"] == "broken"


def test_an_unsupported_problem_is_broken(run, monkeypatch):
    monkeypatch.setattr("moe_kernels.backends.select", _refuse)
    result = run()
    assert result.exit_code == 1
    assert findings_of(result)["experts of mixtral"]["status"] == "broken"


@pytest.mark.parametrize(
    ("installed", "status"), [("2.13.0", "ok"), ("2.9.1", "note"), ("2.16.0", "note"), (None, "broken")]
)
def test_versions_are_judged_by_number(monkeypatch, installed, status):
    monkeypatch.setattr(doctor, "installed_version", lambda name: installed)
    assert doctor._version("torch").status == status


def test_tested_ranges_are_those_of_the_project_file():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] + [line for extra in project["optional-dependencies"].values() for line in extra]
    for package, (first, last) in doctor.TESTED.items():
        assert any(line.startswith(f"{package}>={first},<{last}") for line in lines), package


def _refuse(problem, name="auto"):
    from moe_kernels.backends import UnsupportedProblem

    raise UnsupportedProblem("nothing runs this")
