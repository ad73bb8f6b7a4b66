"""The command line's frame: help, version, exit codes, and no traceback for an expected failure."""

import errno
import importlib
import re
import resource
import subprocess
import sys
import typing
from pathlib import Path

import pytest
from typer.models import ArgumentInfo
from typer.testing import CliRunner

import moe_kernels
from moe_kernels.backends import UnsupportedProblem
from moe_kernels.install import pip_install
from moe_kernels.tools import app as cli
from moe_kernels.tools.common.errors import CommandError, MissingDependency, UsageError, missing_module

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings the same under its old name
    import tomli as tomllib


@pytest.fixture
def runner():
    return CliRunner()


def test_overview_names_every_command_and_the_exit_codes(runner):
    result = runner.invoke(cli.app, ["--help"])
    assert result.exit_code == 0
    for name in ("compare", "prepare", "bench", "doctor", "verify", "Exit codes"):
        assert name in result.output


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_each_command_has_help_with_examples(runner, name):
    result = runner.invoke(cli.app, [name, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "Examples:" in result.output
    for example in cli.COMMANDS[name].examples:
        assert example in result.output


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_what_a_command_takes_is_told_whatever_typer_makes_of_arguments(runner, name):
    """click 8.5 with typer 0.25 shows no help of an argument, and typer breaks lines where the source does."""
    module, _, function = cli.COMMANDS[name].body.partition(":")
    body = getattr(importlib.import_module(module), function)
    shown = runner.invoke(cli.app, [name, "--help"], env={"COLUMNS": "3000"}).output
    for paragraph in body.__doc__.split("\n\n"):
        assert " ".join(paragraph.split()) in shown
    for argument, kind in typing.get_type_hints(body, include_extras=True).items():
        if any(isinstance(extra, ArgumentInfo) for extra in getattr(kind, "__metadata__", ())):
            assert f"{argument.upper()} " in body.__doc__


def test_overview_and_version_import_no_torch():
    code = (
        "import sys\n"
        "from moe_kernels.tools.app import app\n"
        "for args in (['--help'], ['--version']):\n"
        "    try: app(args)\n"
        "    except SystemExit as end: assert end.code == 0\n"
        "assert not {'torch', 'triton', 'transformers', 'axolotl'} & set(sys.modules), 'heavy import'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


def test_overview_is_quick():
    """In seconds of the processor: what else the machine does takes the clock's."""

    def used() -> float:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return children.ru_utime + children.ru_stime

    before = used()
    subprocess.run([sys.executable, "-m", "moe_kernels", "--help"], check=True, capture_output=True, timeout=60)
    assert used() - before < 0.8


def test_version(runner):
    result = runner.invoke(cli.app, ["--version"])
    assert result.exit_code == 0
    assert moe_kernels.__version__ in result.output


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (CommandError("the check failed"), 1),
        (UsageError("no such shape"), 2),
        (UnsupportedProblem("no backend runs it"), 2),
        (MissingDependency("no GPU; cure: buy one"), 3),
        (ModuleNotFoundError("No module named 'axolotl'", name="axolotl"), 3),
        (FileExistsError(errno.EEXIST, "File exists", "afile"), 2),
        (OSError(errno.EIO, "Input/output error", "afile"), 2),
        (OSError(errno.ENOSPC, "No space left on device"), 3),
    ],
)
def test_expected_failures_become_a_sentence_and_a_code(runner, monkeypatch, error, code):
    monkeypatch.setattr("moe_kernels.tools.doctor.examine", _raiser(error))
    result = runner.invoke(cli.app, ["doctor"])
    assert result.exit_code == code
    assert "Traceback" not in result.output
    assert str(error) in result.output or pip_install("axolotl") in result.output


@pytest.mark.parametrize(
    "error", [ValueError("a bug"), KeyError("a bug"), OSError("a bug"), ModuleNotFoundError("x", name="nonesuch")]
)
def test_bugs_keep_their_traceback(runner, monkeypatch, error):
    monkeypatch.setattr("moe_kernels.tools.doctor.examine", _raiser(error))
    result = runner.invoke(cli.app, ["doctor"])
    assert result.exception is error


def test_unknown_command_and_option(runner):
    assert runner.invoke(cli.app, ["nonesuch"]).exit_code == 2
    assert runner.invoke(cli.app, ["doctor", "--nonesuch"]).exit_code == 2


def test_missing_module_names_the_extra():
    for package, extra in (("jinja2", "report"), ("transformers", "transformers")):
        found = missing_module(ModuleNotFoundError("gone", name=f"{package}.sub"))
        assert found is not None
        assert str(found).endswith(pip_install(extra))


def test_no_hint_names_a_package_or_an_address_that_is_not_this_project():
    """moe-kernels on PyPI is another project, and nothing is known to be at github.com under that name."""
    assert pip_install("report") == "pip install -e '.[report]' in a clone of this project"
    assert pip_install() == "pip install -e '.' in a clone of this project"
    foreign = re.compile("pip" + r" install \S*moe.kernels|github\.com/" + "moe-kernels")
    root = Path(__file__).parents[2]
    listed = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True, check=True).stdout
    texts = [
        root / name for name in listed.splitlines() if Path(name).suffix in {".py", ".md", ".toml", ".yml", ".j2"}
    ]
    assert len(texts) > 150
    assert [str(file) for file in texts if foreign.search(file.read_text())] == []


def test_no_extra_needs_a_package_of_this_projects_name():
    """The name is free, not taken: until it is released, whoever takes it would be installed."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert project["name"] == "moe-training-kernels"
    assert not [line for lines in [project["dependencies"], *extras.values()] for line in lines if "moe" in line]
    assert set(extras["report"]) < set(extras["axolotl"])


def _raiser(error):
    def raise_it(*args, **kwargs):
        raise error

    return raise_it
