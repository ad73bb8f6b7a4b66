"""The pages name what exists: files, functions with their arguments, run files, YAML keys, commands."""

import inspect
import pkgutil
import re
import subprocess
from pathlib import Path

import pytest
import yaml

import moe_kernels
from moe_kernels.backends import Backend
from moe_kernels.shapes import FAMILIES, LAYERS
from moe_kernels.tools.app import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "src" / "moe_kernels"
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page):
    for name in re.findall(r"`([\w/]+\.py)`", page.read_text()):
        assert any(place.joinpath(name).is_file() for place in (ROOT, ROOT / "src", SOURCES)), name
    for name in re.findall(r"configs/moe/([\w.-]+\.yml)", page.read_text()):
        assert (ROOT / "configs" / "moe" / name).is_file(), name
    for link in re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)", page.read_text()):
        assert (page.parent / link).exists(), link
        assert page.parent == ROOT or "/" not in link, f"{link}: the site is made of docs alone"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_modules_and_functions_can_be_imported(page):
    text = page.read_text()
    names = set(re.findall(r"(?<![\w./:])((?:moe_kernels|axolotl\.integrations\.moe_kernels)(?:\.\w+)+)", text))
    for module, imported in re.findall(
        r"from ((?:moe_kernels|axolotl\.integrations\.moe_kernels)[.\w]*) import ([\w, ]+)", text
    ):
        names |= {f"{module}.{name.strip()}" for name in imported.split(",")}
    for name in names:
        pkgutil.resolve_name(name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_code_blocks_exist(page):
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
        for name, arguments in re.findall(r"^(?:moe-kernels) (\S+)(.*)$", block, re.MULTILINE):
            assert name in COMMANDS
            for shape in re.findall(r"--shapes (\S+)", arguments):
                assert {*shape.split(",")} <= {*LAYERS, "all", "small"}
        for target in re.findall(r"^make (\S+)", block, re.MULTILINE):
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target


def test_the_example_of_the_api_page_runs(capsys):
    example = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "api.md").read_text(), re.DOTALL)
    exec(example[1], {})
    shapes, error, *backends = capsys.readouterr().out.splitlines()
    assert shapes.startswith("torch.Size([64, 128]) torch.Size([4, 512, 128])")
    assert float(re.search(r"tensor\((\S+),", error)[1]) < 1e-4
    assert [line.partition(" ")[0] for line in backends] == ["gluon", "triton", "torch"]


def test_every_public_name_has_its_place_on_the_api_page():
    text = (ROOT / "docs" / "api.md").read_text()
    for name in moe_kernels.__all__:
        assert f"## {name}\n" in text, name


def test_the_site_lists_every_page():
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    listed = set(re.findall(r"[\w-]+\.md", str(navigation)))
    assert listed == {page.name for page in (ROOT / "docs").glob("*.md")}


def test_the_backend_page_has_every_step_with_its_arguments():
    text = (ROOT / "docs" / "add-a-backend.md").read_text()
    listed = dict(re.findall(r"^\| `(\w+)\(([^)]*)\)`", text, re.MULTILINE))
    steps = {name: step for name, step in vars(Backend).items() if inspect.isfunction(step) and name[0] != "_"}
    assert set(listed) == set(steps)
    for name, arguments in listed.items():
        assert ["self", *arguments.split(", ")] == list(inspect.signature(steps[name]).parameters), name


def test_how_it_works_follows_the_steps_in_order():
    text = (ROOT / "docs" / "how-it-works.md").read_text()
    forward, backward = text.split("| step | file | our row |")
    before, after = (SOURCES / "steps.py").read_text().split("def backward(")
    for table, source in ((forward, before), (backward, after)):
        called = set(re.findall(r"backend\.(\w+)\(", source))
        named = set(re.findall(r"`(\w+)`", "\n".join(re.findall(r"^\| ([^|]*) \|", table, re.MULTILINE))))
        assert called <= named, called - named


def test_the_axolotl_page_has_the_nine_run_files():
    text = (ROOT / "docs" / "axolotl.md").read_text()
    for family in FAMILIES.values():
        assert all(f"`{name}`" in text for name in (family.baseline, family.optimized, family.test))


@pytest.mark.parametrize("page", ["README.md", "docs/knobs.md"])
def test_the_knobs_are_the_plugins_keys(page):
    args = pytest.importorskip("axolotl.integrations.moe_kernels.args")
    keys = set(args.MoeKernelsArgs.model_fields)
    assert {key for key in keys if f"| `{key}` |" in (ROOT / page).read_text()} == keys


def test_make_help_says_that_clean_deletes_the_artifacts():
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (line,) = (line for line in shown.splitlines() if line.startswith("# make clean"))
    assert "artifacts/" in line
    assert "reports" in line
