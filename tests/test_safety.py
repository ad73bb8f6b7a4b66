"""Nothing that is read is run, nothing is asked of the network, and no shell is ever between us and a command."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from network_guard import asked, guarded_environment

SRC = Path(__file__).parents[1] / "src"
FILES = sorted(path for path in [*SRC.rglob("*.py"), *(SRC.parent / "benchmarks").rglob("*.py")])
TREES = {str(path.relative_to(SRC.parent)): ast.parse(path.read_text()) for path in FILES}
# Each of these can run what it reads.
FORBIDDEN = {
    "eval", "exec", "os.system", "os.popen", "pickle.load", "pickle.loads", "marshal.loads", "shelve.open",
    "yaml.load", "yaml.unsafe_load", "yaml.full_load", "numpy.load", "np.load", "joblib.load", "runpy.run_path",
    "subprocess.getoutput", "subprocess.getstatusoutput",
}  # fmt: skip
SPAWN = {"subprocess.run", "subprocess.Popen", "subprocess.call", "subprocess.check_call", "subprocess.check_output"}


def calls(tree: ast.Module) -> list[tuple[str, ast.Call]]:
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def keyword(call: ast.Call, name: str) -> str | None:
    return next((ast.unparse(word.value) for word in call.keywords if word.arg == name), None)


@pytest.mark.parametrize("file", TREES)
def test_nothing_that_is_read_is_run(file: str) -> None:
    for name, call in calls(TREES[file]):
        where = f"{file}:{call.lineno}: {name}"
        assert name not in FORBIDDEN, where
        if name == "torch.load":
            assert keyword(call, "weights_only") == "True", where
        if name.endswith(".from_pretrained"):
            assert keyword(call, "trust_remote_code") in (None, "False"), where
            assert keyword(call, "local_files_only") == "True", f"{where} may ask the network"
        assert keyword(call, "trust_remote_code") != "True", where


@pytest.mark.parametrize("file", TREES)
def test_commands_are_lists(file: str) -> None:
    for name, call in calls(TREES[file]):
        if name in SPAWN:
            where = f"{file}:{call.lineno}"
            assert keyword(call, "shell") is None, where
            assert not isinstance(call.args[0], (ast.Constant, ast.JoinedStr, ast.BinOp)), where


def test_templates_escape() -> None:
    template = (SRC / "moe_kernels/tools/compare/report.html.j2").read_text()
    # The plots are our own SVG; the class is a constant.
    assert template.count("| safe") == 2
    assert "plot.svg | safe" in template
    assert "| safe if plot.wide" in template
    assert "autoescape false" not in template


@pytest.fixture
def guarded(tmp_path: Path) -> dict[str, str]:
    return guarded_environment(tmp_path)


def run(environment: dict[str, str], folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )


def test_the_guard_works(guarded: dict[str, str], tmp_path: Path) -> None:
    done = run(guarded, tmp_path, "timeit", "-n1", "-r1", "import socket; socket.getaddrinfo('huggingface.co', 443)")
    assert done.returncode != 0
    assert "huggingface.co" in asked(guarded)


@pytest.mark.slow
def test_no_command_asks_the_network(guarded: dict[str, str], tmp_path: Path) -> None:
    for command in (
        ("moe_kernels", "doctor"),
        ("moe_kernels", "prepare", "mixtral-tiny"),
        ("moe_kernels", "verify", "--shapes", "mixtral-1b", "--tokens", "8", "--device", "cpu"),
        ("moe_kernels", "compare", "mixtral", "--size", "tiny", "--dry-run"),
    ):
        done = run(guarded, tmp_path, *command)
        assert done.returncode in (0, 3), (command, done.stderr)
        assert asked(guarded) == "", command


@pytest.mark.slow
def test_a_data_set_that_is_asked_for_asks_the_network_and_says_so(guarded: dict[str, str], tmp_path: Path) -> None:
    done = run(guarded, tmp_path, "moe_kernels", "prepare", "mixtral-tiny", "--dataset", "nobody/nothing")
    assert done.returncode in (2, 3)
    assert "huggingface.co" in asked(guarded)
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "artifacts").rglob("*.jsonl"))


def test_a_model_that_brings_code_is_not_run(tmp_path: Path) -> None:
    """A config that names Python files of its own, and weights that are a pickle."""
    from moe_kernels.tools.compare.experts_bench import inspect_model

    folder, ran = tmp_path / "model", tmp_path / "ran"
    folder.mkdir()
    evil = f"open({str(ran)!r}, 'w').close()\n"
    (folder / "modeling_evil.py").write_text(evil + "from transformers import MixtralConfig as EvilConfig\n")
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "modeling_evil.EvilConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "pytorch_model.bin").write_bytes(b"cposix\nsystem\n(S'touch " + str(ran).encode() + b"'\ntR.")
    with pytest.raises(ValueError, match=r"trust_remote_code|custom code|evil"):
        inspect_model(str(folder), "evil", 8)
    assert not ran.exists()


def test_run_files_are_data(tmp_path: Path) -> None:
    from moe_kernels.tools.common.errors import UsageError
    from moe_kernels.tools.common.runfile import load_yaml

    ran = tmp_path / "ran"
    for text in (
        f"a: !!python/object/apply:os.system ['touch {ran}']",
        f"!!python/object/new:os.system ['touch {ran}']",
        textwrap.dedent(f"""
            a: !!python/object/apply:subprocess.check_output
              - [touch, {ran}]
        """),
    ):
        (tmp_path / "x.yml").write_text(text)
        with pytest.raises(UsageError, match="is not valid YAML"):
            load_yaml(tmp_path / "x.yml")
    assert not ran.exists()
