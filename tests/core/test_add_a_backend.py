"""docs/add-a-backend.md does what it says: its module, added without a change to the package."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_kernels import backends, fused_experts, registry
from moe_kernels.backends import Backend
from moe_kernels.backends.torch import TorchBackend
from moe_kernels.kernels.launch import launch, replay
from moe_kernels.routing import TokenRows
from moe_kernels.settings import ExpertsSettings
from moe_kernels.tools.check.problems import Case, make_inputs

PAGE = (Path(__file__).parents[2] / "docs" / "add-a-backend.md").read_text()
MODULE, USE = re.findall(r"```python\n(.*?)```", PAGE, re.S)[:2]
CASE = Case(tokens=37, top_k=2, experts=5, hidden=32, intermediate=24, dtype=torch.float32, routing="sentinels")


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The page's module, registered for one test as the page says."""
    (tmp_path / "my_backend.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "registered", {})
    names = {}
    exec(USE.partition("out = ")[0], names)
    yield names["MyBackend"]
    for cache in (backends.load, backends.select, backends._backend_of):
        cache.cache_clear()
    sys.modules.pop("my_backend", None)


def arguments():
    inputs = make_inputs(CASE, torch.device("cpu"))
    tensors = [inputs.x, inputs.topk_ids, inputs.topk_weights, inputs.gate_up, inputs.down]
    return [t.detach().clone().requires_grad_(t.is_floating_point()) for t in tensors]


def results(call):
    given = arguments()
    out = call(*given)
    out.backward(torch.linspace(-1, 1, out.numel()).view_as(out))
    return [out.detach(), *(t.grad for t in given if t.requires_grad)]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_the_pages_backend_runs(mine, compiled):
    def call(*given):
        return fused_experts(*given, backend="mine")

    backends.reset_dispatch_counts()
    ours = results(torch.compile(call, backend="aot_eager", fullgraph=True) if compiled else call)
    assert backends.dispatch_counts() == {"mine": 1}
    for one, other in zip(ours, results(lambda *given: fused_experts(*given, backend="torch")), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_it_runs_where_launches_are_replayed(mine, monkeypatch):
    """What plain torch does cannot be replayed: it runs as it is, in every call."""
    for place, name, value in (
        (replay, "_on_gpu", lambda tensor: True),
        (launch, "launcher", lambda: "replay"),
        (launch, "refusal", lambda: None),
        (launch, "_watched", lambda: False),
        (launch, "_current_device", lambda: -1),
    ):
        monkeypatch.setattr(place, name, value)
    monkeypatch.setattr(replay, "_programs", {})
    first, *others = [results(lambda *given: fused_experts(*given, backend="mine")) for _ in range(6)]
    assert all(not isinstance(program, replay._Program) for program in replay._programs.values())
    assert len(replay._programs) == 2
    for again in others:
        assert all(torch.equal(one, other) for one, other in zip(again, first, strict=True))


def test_its_step_is_the_one_that_ran(mine, monkeypatch):
    sevens = torch.full((CASE.tokens, CASE.hidden), 7.0)
    monkeypatch.setattr(mine, "combine", lambda self, y, topk_weights, plan: sevens)
    assert (fused_experts(*arguments(), backend="mine") == 7.0).all()


def test_three_gradients_in_a_plain_tuple_will_do(mine, monkeypatch):
    expected = results(lambda *given: fused_experts(*given, backend="mine"))
    monkeypatch.setattr(mine, "down_grad", lambda self, *given: tuple(TorchBackend.down_grad(self, *given))[:3])
    found = results(lambda *given: fused_experts(*given, backend="mine"))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("by_columns", [False, True])
def test_it_may_gather_rows_itself(mine, monkeypatch, by_columns):
    def call(x, ids, weights, gate_up, down):
        if by_columns:
            gate_up, down = (t.mT.contiguous().mT for t in (gate_up, down))
        return fused_experts(x, ids, weights, gate_up, down, backend="mine")

    expected = results(call)
    monkeypatch.setattr(mine, "x_rows", lambda self, x, gate_up, plan: TokenRows(x, plan.top_k))
    monkeypatch.setattr(mine, "dout_rows", lambda self, dout, down, plan, gate: TokenRows(dout, plan.top_k))
    copied = []
    monkeypatch.setattr(mine, "gather", lambda self, x, plan: copied.append(x) or TorchBackend.gather(self, x, plan))
    for one, other in zip(results(call), expected, strict=True):
        assert torch.equal(one, other)
    assert len(copied) == 4, "up, down_grad, and the gradients of both weights"


def test_it_refuses_and_is_explained(mine):
    given = [t.double() if t.is_floating_point() else t for t in arguments()]
    with pytest.raises(backends.UnsupportedProblem, match=r"mine.*float64 is not float32: use backend='torch'"):
        fused_experts(*given, backend="mine")
    assert dict(backends.explain(backends.Problem.of(given[4], 2)))["mine"].startswith("dtype torch.float64")
    assert ExpertsSettings(backend="mine").backend == "mine"


def test_auto_never_takes_it(mine):
    assert backends.select(backends.Problem.of(arguments()[4], 2))[0] == "torch"


@pytest.mark.parametrize("name", ["auto", "torch", "mine"])
def test_a_name_that_is_taken(mine, name):
    other = type("Other", (mine,), {"name": name})
    with pytest.raises(ValueError, match=f"backend '{name}' is .* already: take another name"):
        backends.register_backend(other)
    backends.register_backend(mine)  # again, the same


HALF = {"wgrad": Backend.wgrad, "up": None}
# No subclass of Backend, whose steps for LoRA would be its own.
APART = {"name": "x", **vars(TorchBackend), "dout_rows": Backend.dout_rows, "x_rows": Backend.x_rows}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda mine: type("Broken", (mine,), HALF), "Broken has no wgrad, up: write them"),
        (lambda mine: type("Broken", (mine,), {"name": None}), 'Broken has no name: write name = "..."'),
        (lambda mine: type("Broken", (Backend,), {}), "Broken has no name"),
        (lambda mine: type("Broken", (), {"name": "x", **vars(TorchBackend), "dout_rows": None}), "has no dout_rows"),
        (lambda mine: type("Broken", (), APART), "Broken has no experts_last, pack_factors: write them"),
        (lambda mine: type("Broken", (mine,), {"__init__": lambda self, size: None}), "made without arguments, and"),
        (lambda mine: mine(), "is no class"),
        (lambda mine: "my_backend", "is no class"),
    ],
)
def test_what_is_none_is_refused_where_it_is_registered(mine, make, message):
    with pytest.raises(ValueError, match=message):
        backends.register_backend(make(mine))
    assert registry.names()[-1] == "mine"


def test_an_entry_point_that_leads_to_none(mine, monkeypatch):
    monkeypatch.setattr(registry, "registered", {})
    monkeypatch.setattr(registry, "_declared", lambda: dict.fromkeys(["mine", "other"], "my_backend:MyBackend"))
    with pytest.raises(ValueError, match="MyBackend has the name 'mine'; they must be the same"):
        fused_experts(*arguments(), backend="other")


def test_a_successor_takes_its_place(mine):
    """As in a notebook, where the cell of a class runs again."""
    before = fused_experts(*arguments(), backend="mine")
    twice = type("MyBackend", (mine,), {"combine": lambda self, *args: mine.combine(self, *args) * 2})
    twice.__module__, twice.__qualname__ = mine.__module__, mine.__qualname__
    backends.register_backend(twice)
    torch.testing.assert_close(fused_experts(*arguments(), backend="mine"), 2 * before)


ENTRY = """
import torch
from moe_kernels import fused_experts
out = fused_experts(torch.ones(3, 16), torch.tensor([[0], [1], [0]]), torch.ones(3, 1), torch.ones(2, 32, 16),
                    torch.ones(2, 16, 16), backend=NAME)
print(out.shape)
"""


@pytest.mark.parametrize(("name", "ending"), [("mine", "torch.Size([3, 16])"), ("torch", "which there is already")])
def test_an_installed_package_declares_it(tmp_path, name, ending):
    (tmp_path / "my_backend.py").write_text(MODULE)
    info = tmp_path / "mine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[moe_kernels.backends]\n{name} = my_backend:MyBackend\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); NAME = {name!r}\n{ENTRY}"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ending in ran.stdout + ran.stderr, ran.stderr
