"""The mutants of mutations.py fit the kernels as they are, and what it makes of a test run is right."""

import ast
import json
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import mutations
import pytest
from mutations import Mutant, Suite, barrier_suite, gpu_suite, interpreted_suite, verdict

SUITES = {"interpreted": interpreted_suite(), "gpu": gpu_suite(), "barriers": barrier_suite()}
EVERY = [pytest.param(m, id=f"{suite}-{m.title}") for suite, made in SUITES.items() for m in made.mutants]


def names(tree):
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


@pytest.mark.parametrize("mutant", EVERY)
def test_a_mutant_is_another_program(mutant):
    source = (mutations.ROOT / mutant.file).resolve().read_text()
    planted = mutant.plant(source)
    assert planted is not None, f"{source.count(mutant.text)} times in {mutant.file}, not {mutant.times}"
    before, after = ast.parse(source), ast.parse(planted)
    assert ast.dump(before) != ast.dump(after)
    assert names(after) <= names(before), "a name that the file does not know"


@pytest.mark.parametrize("suite", SUITES)
def test_titles_are_unique(suite):
    titles = [mutant.title for mutant in SUITES[suite].mutants]
    assert len(set(titles)) == len(titles)


#: The synchronisation of warps: a warp that waits for what never comes stops the GPU.
BARRIERS = (
    "mbarrier.", "await_", "pass_turn", "free_before", "range(tile.start", "range(0, K", "range(first",
    "range(k_begin", "step", "pid",
)  # fmt: skip


@pytest.mark.parametrize("mutant", SUITES["gpu"].mutants, ids=lambda mutant: mutant.title)
def test_no_mutant_can_stop_the_gpu(mutant):
    assert mutant.times == 1
    source = (mutations.ROOT / mutant.file).resolve().read_text()
    planted = mutant.plant(source)

    def waiting(text):
        return [line for line in text.splitlines() if any(part in line for part in BARRIERS)]

    assert waiting(source) == waiting(planted)


def test_the_chosen_tests_are_there():
    """In one process of its own, where none of this one's plugins and options count."""
    selections = sorted({mutant.tests for suite in ("gpu", "barriers") for mutant in SUITES[suite].mutants})
    collect = "[int(pytest.main(['--collect-only', '-qq', *tests])) for tests in json.load(sys.stdin)]"
    script = f"import json, pytest, sys; print({collect})"
    done = subprocess.run(
        [sys.executable, "-c", script], input=json.dumps(selections), text=True, capture_output=True, check=True,
        cwd=mutations.ROOT,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == str([0] * len(selections)), done.stdout


@pytest.mark.parametrize(
    ("code", "last", "noticed"),
    [
        (1, "FAILED tests/a.py::test_b[in turn-up] - AssertionError: out: relative error 3.1", True),
        (1, "FAILED tests/a.py::test_b - assert tensor(False)", True),
        (1, "FAILED tests/a.py::test_b - torch.AcceleratorError: CUDA error: an illegal memory access", True),
        (1, "FAILED tests/a.py::test_b - triton.compiler.errors.CompilationError: at 3:1: NameError('k')", False),
        (1, "FAILED tests/a.py::test_b - AssertionError: Timeout (0:02:02)!", True),
        (1, "FAILED tests/a.py::test_b - RuntimeError: PassManager::run failed", False),
        (
            1,
            "FAILED tests/a.py::test_b - triton.runtime.errors.OutOfResources: out of resource: shared memory",
            False,
        ),
        (1, "ERROR tests/a.py - NameError: name 'k' is not defined", False),
        (-11, "Fatal Python error", True),
        (-9, "", False),
        (0, "3 passed", False),
        (2, "ERROR tests/a.py", False),
        (5, "no tests ran", False),
        (None, "", False),
    ],
)
def test_what_counts_as_noticed(code, last, noticed):
    found, note = verdict(code, f"...F\n=== short test summary info ===\n{last}\n1 failed")
    assert found is noticed
    assert note


# A package of one number, and a "pytest" that says whether it is 4 and notes down what it was given.
TESTER = """
import os, sys, time
from pathlib import Path
value = eval(Path("src/kernels.py").read_text())
cache, records = Path(os.environ["TRITON_CACHE_DIR"]), Path(sys.argv[1])
cache.mkdir(exist_ok=True)
warm = (cache / "compiled-4").exists()
(cache / f"compiled-{value}").touch()
name = f"{os.getpid()}-{value}-{warm}-{os.environ.get('TRITON_INTERPRET')}"
(records / name).write_text(os.getcwd() + os.linesep + os.environ['PYTHONPATH'])
time.sleep(30 if value == 7 else 0.5)
if value == 6:
    raise SystemExit("FAILED t.py::t - CompilationError: at 1:1") from None
if value != 4:
    print(f"FAILED t.py::t - AssertionError: {value}")
    sys.exit(1)
print("1 passed" if "-k" in sys.argv else "1 skipped")
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """(suite of mutants of "2 + 2", folder of what each test run was given)."""
    root, records = tmp_path / "root", tmp_path / "records"
    for folder in (root / "src", root / "tests", records):
        folder.mkdir(parents=True)
    (root / "src/kernels.py").write_text("2 + 2")
    (root / "pyproject.toml").touch()
    tester = tmp_path / "tester.py"
    tester.write_text(textwrap.dedent(TESTER))
    monkeypatch.setattr(mutations, "ROOT", root)
    planted = {"noticed": "2 + 3", "alive": "2 * 2", "invalid": "2 * 3", "endless": "3 + 4"}
    mutants = [Mutant(title, "src/kernels.py", "2 + 2", text, ("-k", "t")) for title, text in planted.items()]
    mutants.append(Mutant("gone", "src/kernels.py", "2 - 2", "0", ("-k", "t")))
    command = (sys.executable, str(tester), str(records))
    return Suite(mutants, False, 5, command), records


def test_mutants_run_side_by_side_in_copies_of_their_own(fake):
    suite, records = fake
    began = time.monotonic()
    results = {result["mutant"]: result for result in mutations.run_suite(suite, 3)}
    assert {title: result["killed"] for title, result in results.items()} == {
        "noticed": True, "alive": False, "invalid": False, "endless": False, "gone": False,
    }  # fmt: skip
    assert results["noticed"]["note"] == "AssertionError: 5"
    assert "in time" in results["endless"]["note"]
    assert "0 times" in results["gone"]["note"]
    assert time.monotonic() - began < 12, "the endless one is stopped, the others do not wait for it"
    runs = {path.name.split("-", 1)[1]: path.read_text().splitlines()[0] for path in records.iterdir()}
    # First the unbroken kernels, with an empty cache; then each mutant with that cache, and nobody else's.
    assert set(runs) == {"4-False-None", "5-True-None", "4-True-None", "6-True-None", "7-True-None"}
    assert not any(Path(folder).exists() for folder in runs.values())
    assert (mutations.ROOT / "src/kernels.py").read_text() == "2 + 2", "the sources themselves are never touched"


def test_another_triton_on_the_path_stays_there(fake, monkeypatch):
    suite, records = fake
    monkeypatch.setenv("PYTHONPATH", "/another/triton")
    list(mutations.run_suite(Suite(suite.mutants[:1], False, 5, suite.command), 1))
    for record in records.iterdir():
        folder, path = record.read_text().splitlines()
        assert path == f"{folder}/src:/another/triton"


def test_failing_or_skipped_tests_prove_nothing(fake):
    suite, _ = fake
    (mutations.ROOT / "src/kernels.py").write_text("2 + 1")
    with pytest.raises(SystemExit, match="fails without any mutant"):
        list(mutations.run_suite(suite, 1))
    (mutations.ROOT / "src/kernels.py").write_text("2 + 2")
    skipped = Suite([Mutant("m", "src/kernels.py", "2 + 2", "5", ())], False, 5, suite.command)
    with pytest.raises(SystemExit, match="runs no test"):
        list(mutations.run_suite(skipped, 1))


def test_the_report(fake, tmp_path, monkeypatch, capsys):
    suite, _ = fake
    monkeypatch.setattr(mutations, "interpreted_suite", lambda: Suite(suite.mutants[:2], True, 5, suite.command))
    written = tmp_path / "mutants.json"
    assert mutations.main(["--jobs", "2", "--json", str(written)]) == 1
    report = json.loads(written.read_text())
    assert (report["mutants"], {r["mutant"]: r["killed"] for r in report["results"]}) == (
        2, {"noticed": True, "alive": False},
    )  # fmt: skip
    assert "ALIVE  alive: survived" in capsys.readouterr().out
    monkeypatch.setattr(mutations, "interpreted_suite", lambda: Suite(suite.mutants[:1], True, 5, suite.command))
    assert mutations.main(["--jobs", "1"]) == 0


@pytest.mark.skipif(mutations.why_no_gpu() is None, reason="this machine has a Hopper GPU")
@pytest.mark.parametrize("suite", ["--gpu", "--barriers"])
def test_without_a_gpu(suite, capsys):
    assert mutations.main([suite]) == 2
    assert f"{suite} needs an NVIDIA Hopper GPU" in capsys.readouterr().out
