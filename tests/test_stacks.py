"""The two stacks that are tested: which Python make takes, and that every pin lies within the project's ranges."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings the same under its old name
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
FIND = ROOT / ".ci" / "find-python"


def find(tmp_path, *versions, **programs):
    """What .ci/find-python answers where these programs are all that is on the PATH, beside the shell's own."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, body in programs.items():
        program = folder / name.replace("_", ".")
        program.write_text(f"#!/bin/sh\n{body}\n")
        program.chmod(0o755)
    (folder / "bash").symlink_to("/bin/bash")
    command = ["/bin/bash", str(FIND), *versions]
    return subprocess.run(command, env={"PATH": str(folder)}, capture_output=True, text=True, check=False)


def runs(version, path="/there/python"):
    """A program that answers as a Python of this version would; the last argument is the version that is wanted."""
    return f'for wanted; do :; done; test "$wanted" = {version} && echo {path}'


def test_a_shim_that_fails_is_passed_over(tmp_path):
    shim = "echo 'command not found' >&2; exit 127"
    found = find(tmp_path, "3.12", "3.11", python3_12=shim, python3_11=runs("3.11", "/there/eleven"))
    assert (found.returncode, found.stdout) == (0, "/there/eleven\n")


def test_the_first_version_named_wins_and_python3_may_be_it(tmp_path):
    found = find(tmp_path, "3.12", "3.11", python3_11=runs("3.11"), python3=runs("3.12", "/there/twelve"))
    assert (found.returncode, found.stdout) == (0, "/there/twelve\n")


def test_none_is_an_error_with_the_cure(tmp_path):
    found = find(tmp_path, "3.12", "3.11", python3=runs("3.9"))
    assert (found.returncode, found.stdout) == (1, "")
    assert found.stderr == "no Python of 3.12 3.11 runs here; name one with: make PYTHON=/path/to/python\n"


def make(*arguments):
    """What make would do, called from nowhere: not from the make that runs this suite."""
    outer = ("PYTHON", "MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES")
    environment = {name: value for name, value in os.environ.items() if name not in outer}
    command = ["make", "-n", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_make_refuses_a_python_that_does_not_run():
    made = make("PYTHON=/nowhere/python", "test")
    assert made.returncode != 0
    assert "PYTHON=/nowhere/python does not run" in made.stderr


def test_each_python_has_a_folder_of_its_own(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 3.10\n")
    python.chmod(0o755)
    unnamed, named = make("lint").stdout, make(f"PYTHON={python}", "lint").stdout
    assert "\n.venv/bin/python -m mypy" in f"\n{unnamed}"
    assert "\n.venv-3.10/bin/python -m mypy" in f"\n{named}"


def pins(python):
    lines = (ROOT / "constraints-cuda.txt").read_text() + (ROOT / "constraints-cpu.txt").read_text()
    found = [Requirement(line) for line in lines.splitlines() if line and line[0] not in "#-"]
    return {pin.name: pin for pin in found if pin.marker is None or pin.marker.evaluate({"python_version": python})}


@pytest.mark.parametrize(("python", "axolotl"), [("3.10", "0.19.0"), ("3.11", "0.19.0"), ("3.12", "0.21.0")])
def test_what_is_pinned_lies_in_the_ranges(python, axolotl):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] + [line for extra in project["optional-dependencies"].values() for line in extra]
    pinned = pins(python)
    assert str(pinned["axolotl"].specifier) == f"=={axolotl}"
    assert set(pinned) == {"torch", "triton", "axolotl", "numpy", "ruff"}
    for range_ in map(Requirement, lines):
        if range_.name in pinned:
            (pin,) = pinned[range_.name].specifier
            assert range_.specifier.contains(pin.version), f"{range_} without {pin.version}"


def test_the_hook_before_a_commit_is_the_ruff_of_make_lint():
    (hooks,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert hooks["rev"].removeprefix("v") == str(pins("3.12")["ruff"].specifier).removeprefix("==")
