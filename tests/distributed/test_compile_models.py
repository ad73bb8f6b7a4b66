"""torch.compile over whole decoder layers: one graph, no break, no recompilation for another number of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from moe_kernels import backends
from moe_kernels.shapes import FAMILIES
from moe_kernels.tools.prepare.models import model_config

transformers = pytest.importorskip("transformers", reason="needs the extra [transformers]")
mk = pytest.importorskip("moe_kernels.integrations.transformers")

pytestmark = pytest.mark.plain_memory  # torch.compile must not trace the poisoned allocations
each_family = pytest.mark.parametrize("family", FAMILIES)
LENGTHS = (12, 17, 9, 31)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    mk.register(backend="torch")
    torch._dynamo.reset()
    counters.clear()
    backends.reset_dispatch_counts()
    yield
    mk.register()


class Layer(torch.nn.Module):
    """The last decoder layer of a tiny model, attention and all, called as the model calls it."""

    def __init__(self, family: str) -> None:
        super().__init__()
        torch.manual_seed(2)
        config = model_config(family, "tiny")
        model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="moe_kernels")
        self.layer = model.model.layers[-1]
        self.rotary = model.model.rotary_emb
        self.hidden = config.hidden_size
        assert mk.check_model(self) == 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(x.shape[1], device=x.device)[None]
        out = self.layer(x, position_ids=positions, position_embeddings=self.rotary(x, positions))
        return out[0] if isinstance(out, tuple) else out


def inputs(layer: Layer, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, length, layer.hidden, generator=torch.Generator().manual_seed(seed))


def run(layer: torch.nn.Module, call: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output and every gradient."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    out = call(x)
    out.square().mean().backward()
    grads = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "dx": x.grad} | grads


def assert_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@each_family
def test_one_graph_whatever_the_number_of_tokens(family: str) -> None:
    layer = Layer(family)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in LENGTHS:
        x = inputs(layer, length)
        once = run(layer, compiled, x)
        assert_close(once, run(layer, layer, x))
        for name, value in run(layer, compiled, x).items():
            assert torch.equal(value, once[name]), f"{name} of two equal runs"
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert backends.dispatch_counts() == {"torch": 3 * len(LENGTHS)}


def test_as_torch_compile_comes() -> None:
    """dynamic=None: the first new length makes a second graph, and that is the last."""
    layer = Layer("mixtral")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    graphs = []
    for length in LENGTHS:
        run(layer, compiled, inputs(layer, length))
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [1, 2, 2, 2]


@each_family
def test_a_compiled_layer_under_activation_checkpointing(family: str) -> None:
    layer = Layer(family)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    x = inputs(layer, 12)
    expected = run(layer, layer, x)
    for reentrant in (True, False):
        backends.reset_dispatch_counts()
        assert_close(run(layer, lambda y, r=reentrant: checkpoint(compiled, y, use_reentrant=r), x), expected)
        assert backends.dispatch_counts() == {"torch": 2}, "forward, and again in backward"
    assert not counters["graph_break"]


@each_family
def test_two_runs_are_bitwise_equal(family: str) -> None:
    layer = Layer(family)
    x = inputs(layer, 21)
    first, second = run(layer, layer, x), run(layer, layer, x)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@each_family
def test_micro_batches_add_up(family: str) -> None:
    """Gradients accumulated over two micro-batches are the sum of their gradients, bitwise."""
    layer = Layer(family)
    batches = [inputs(layer, 12, seed) for seed in (1, 2)]
    one, two = (run(layer, layer, x) for x in batches)
    layer.zero_grad()
    for x in batches:
        layer(x).square().mean().backward()
    for name, parameter in layer.named_parameters():
        if parameter.grad is not None:
            assert torch.equal(parameter.grad, one[name] + two[name]), name


@pytest.mark.slow
def test_inductor() -> None:
    """The compiler that torch_compile: true uses, which generates C++ here."""
    layer = Layer("mixtral")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    x = inputs(layer, 12)
    assert_close(run(layer, compiled, x), run(layer, layer, x))
    assert not counters["graph_break"]
