"""Rules of the source tree that no type checker knows."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src"
PACKAGE = SRC / "moe_kernels"
FILES = sorted(p for p in SRC.rglob("*.py") if "egg-info" not in str(p))
PYTHON = {str(p.relative_to(SRC)): ast.parse(p.read_text(), str(p)) for p in FILES}

#: The tools stand on the core; the core knows none of them.
TOOLS = ("integrations", "telemetry", "tools")
HEAVY = ("transformers", "axolotl", "wandb", "matplotlib", "jinja2", "peft", "trl", "datasets")


def imported(tree, *, at_import_time=False):
    """Names of the modules a file imports; with at_import_time, not those inside functions or TYPE_CHECKING."""
    nodes = list(tree.body) if at_import_time else list(ast.walk(tree))
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif at_import_time and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            nodes += node.orelse
        elif at_import_time and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            nodes += [n for n in ast.iter_child_nodes(node) if isinstance(n, ast.stmt)]


def is_tool(path):
    return path.startswith("axolotl/") or any(
        path.startswith(f"moe_kernels/{tool}/") or path == f"moe_kernels/{tool}.py" for tool in TOOLS
    )


CORE = [p for p in PYTHON if not is_tool(p) and p != "moe_kernels/__main__.py"]


@pytest.mark.parametrize("path", CORE)
def test_the_core_imports_no_tool(path):
    assert not {n for n in imported(PYTHON[path]) for t in TOOLS if f"{n}.".startswith(f"moe_kernels.{t}.")}


@pytest.mark.parametrize("path", CORE)
def test_the_core_needs_torch_and_triton_alone(path):
    allowed = {*sys.stdlib_module_names, "torch", "triton", "moe_kernels", "numpy", "filelock", "__future__"}
    assert {n.split(".")[0] for n in imported(PYTHON[path])} <= allowed


def room(path):
    """The folder of a file; a file of the package itself is a room of its own."""
    folder = str(Path(path).parent)
    return path if folder == "moe_kernels" else folder


@pytest.mark.parametrize("unit", [str, room], ids=["files", "folders"])
def test_nothing_imports_in_a_circle(unit):
    places = {path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): path for path in PYTHON}
    graph = {}
    for path, tree in PYTHON.items():
        for name in {name for name in imported(tree) if name in places and places[name] != "moe_kernels/__init__.py"}:
            graph.setdefault(unit(path), set()).add(unit(places[name]))
    for one, others in graph.items():
        others.discard(one)
    assert list(graphlib.TopologicalSorter(graph).static_order())  # a CycleError names the circle


def test_kernels_do_not_import_the_op():
    above = ("moe_kernels.moe", "moe_kernels.steps", "moe_kernels.autograd", "moe_kernels.backends")
    for path in (p for p in PYTHON if p.startswith("moe_kernels/kernels/")):
        assert not set(imported(PYTHON[path])) & set(above), path


def test_what_only_tests_use_does_not_ship():
    """It is in tests/support."""
    from moe_kernels.trial import CHECK

    used = {name for tree in PYTHON.values() for name in imported(tree)} | {CHECK}
    shipped = {path[:-3].replace("/", ".") for path in PYTHON if path.startswith("moe_kernels/tools/check/")}
    assert shipped - used == {"moe_kernels.tools.check.__init__"}
    nodes = [node for tree in PYTHON.values() for node in ast.walk(tree)]
    called = {node.id for node in nodes if isinstance(node, ast.Name)}
    called |= {node.name for node in nodes if isinstance(node, ast.alias)}
    parts = [node for path in PYTHON if path.startswith("moe_kernels/tools/check/") for node in PYTHON[path].body]
    assert {node.name for node in parts if isinstance(node, ast.FunctionDef)} <= called
    assert not {name for name in used if name.split(".")[0] == "support"}


def test_the_plugin_shell_imports_no_kernel_at_the_top():
    """Axolotl swallows an ImportError there and trains the baseline with exit code 0."""
    for name in ("__init__", "args"):
        tree = PYTHON[f"axolotl/integrations/moe_kernels/{name}.py"]
        names = set(imported(tree, at_import_time=True))
        assert not {n for n in names if n.split(".")[0] in ("triton", "torch") or n.startswith("moe_kernels.kernels")}


def test_a_sub_package_of_axolotl_and_no_more():
    for folder in (SRC / "axolotl", SRC / "axolotl" / "integrations"):
        assert not (folder / "__init__.py").exists(), "would shadow Axolotl itself"


@pytest.mark.parametrize("path", PYTHON)
def test_nothing_is_swallowed(path):
    for node in ast.walk(PYTHON[path]):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            assert caught not in ("everything", "Exception", "BaseException"), f"{path}:{node.lineno}: {caught}"


def calls(tree, name):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == name:
            yield node


@pytest.mark.parametrize("path", [p for p in PYTHON if p.startswith("moe_kernels/kernels/")])
def test_every_masked_load_says_what_masked_lanes_read(path):
    for call in calls(PYTHON[path], "tl.load"):
        given = {k.arg for k in call.keywords}
        assert len(call.args) == 1, f"{path}:{call.lineno}: mask and other by keyword"
        assert ("mask" in given) == ("other" in given), f"{path}:{call.lineno}: mask= without other="


def functions(tree):
    return (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


@pytest.mark.parametrize("path", PYTHON)
def test_functions_are_short(path):
    """Device code is one loop with its epilogue; the op's door and the commands are mostly what they document."""
    from moe_kernels.tools.app import COMMANDS

    doors = {"moe_kernels.moe:fused_experts", *(entry.body for entry in COMMANDS.values())}
    for node in functions(PYTHON[path]):
        device_code = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
        if not device_code and f"{path.removesuffix('.py').replace('/', '.')}:{node.name}" not in doors:
            arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            assert node.end_lineno - node.lineno < 60, f"{path}:{node.lineno}"
            assert len(arguments) <= 12, f"{path}:{node.lineno}"


def test_no_machine_paths():
    for path in PYTHON:
        text = (SRC / path).read_text()
        assert "/home/" not in text, path
        assert "/root/" not in text, path


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_importing_the_package_is_light_and_touches_no_gpu():
    result = python(
        "import sys, moe_kernels, torch\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules])\n"
        "print(torch.cuda.is_initialized())"
    )
    assert result.stdout.splitlines() == ["[]", "False"], result.stderr


def test_at_most_ten_public_names():
    import moe_kernels

    assert len(moe_kernels.__all__) <= 10
    assert all(hasattr(moe_kernels, name) for name in moe_kernels.__all__)


def test_the_map_of_the_tests_has_each_of_them():
    page = (ROOT / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| (`tests/.*?) \|", page, re.MULTILINE)
    mapped = set(re.findall(r"`(tests/[\w./]+)`", " ".join(rows)))
    files = {path.relative_to(ROOT) for path in (ROOT / "tests").rglob("test_*.py")}
    assert mapped == {"/".join(path.parts[:2]) for path in files}


def test_no_two_test_files_have_one_name():
    """pytest imports them by their names alone, and refuses the second of one run."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names)), sorted(name for name in set(names) if names.count(name) > 1)
