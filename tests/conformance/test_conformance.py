"""Every experts class of the installed transformers on our kernels, against its own eager forward.

The file passes on transformers 5.16.1 and on the newest release alike.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
mk = pytest.importorskip("moe_kernels.integrations.transformers")
conformance = pytest.importorskip("support.conformance")
support_table = pytest.importorskip("support.support_table")

from moe_kernels import backends  # noqa: E402
from support.tiles import use_small_tiles  # noqa: E402

TABLE = Path(__file__).parents[2] / "docs" / "support.md"
CLASSES = conformance.experts_classes()
DISTINCT = list(conformance.distinct().values())


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Matrices of this size are slower on two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    mk.register()


def test_the_scan_finds_what_is_known() -> None:
    """Names of every layout, from the oldest family to one that only came with 5.16."""
    names = {str(found) for found in CLASSES}
    assert {"MixtralExperts", "GptOssExperts", "NemotronHExperts", "DeepseekV4Experts", "Gemma4TextExperts"} <= names
    assert len(CLASSES) >= 53


@functools.cache
def verdict(found) -> str:
    mk.register(backend="torch")
    return support_table.verdict(found)


@pytest.mark.parametrize("found", CLASSES, ids=str)
def test_torch_backend_equals_eager(found) -> None:
    """No class is refused today; one that is must be named here with its reason."""
    assert verdict(found) == support_table.PASSED


def test_it_is_our_kernels_that_run() -> None:
    mk.register(backend="torch")
    backends.reset_dispatch_counts()
    conformance.check_all(conformance.build(CLASSES[0].cls))
    assert backends.dispatch_counts() == {"torch": len(conformance.ROUTINGS) * len(conformance.DTYPES)}


def test_the_support_table_is_of_this_run() -> None:
    columns = support_table.parse(TABLE.read_text())
    assert support_table.render(columns) == TABLE.read_text()
    if transformers.__version__ not in columns:
        pytest.skip(f"docs/support.md has no column of transformers {transformers.__version__}")
    ours = {support_table.row_of(found): verdict(found) for found in CLASSES}
    assert columns[transformers.__version__] == ours, f"write it again: {support_table.__doc__}"


@pytest.mark.parametrize("found", CLASSES, ids=str)
def test_blocks_call_it_by_names_we_take(found) -> None:
    assert conformance.foreign_arguments(found.cls) == []


@pytest.mark.parametrize("found", DISTINCT, ids=str)
def test_triton_backend_equals_eager(found, device: torch.device) -> None:
    mk.register(backend="triton")
    backends.reset_dispatch_counts()
    experts = conformance.build(found.cls)
    with use_small_tiles():
        for routing in ("one_hot_expert", "empty_first_middle_last"):
            conformance.check(experts, routing, torch.float32, torch.float32, device)
        conformance.check(experts, "random", torch.bfloat16, torch.float32, device)
    assert backends.dispatch_counts() == {"triton": 3}


@pytest.mark.parametrize("found", DISTINCT, ids=str)
def test_trained_saved_and_reloaded(found, tmp_path: Path) -> None:
    """One step of training on our kernels, through save_pretrained, on transformers' own again."""
    experts = conformance.build(found.cls)

    class Holder(transformers.PreTrainedModel):
        config_class = type(experts.config)
        base_model_prefix = ""

        def __init__(self, config: transformers.PreTrainedConfig) -> None:
            super().__init__(config)
            self.mlp = torch.nn.Module()
            self.mlp.experts = found.cls(config)
            self.post_init()

        def _init_weights(self, module: torch.nn.Module) -> None:
            """The weights come from the file."""

    mk.register(backend="torch")
    model = Holder(experts.config)
    model.mlp.experts.load_state_dict(experts.state_dict())
    model.config._experts_implementation = "moe_kernels"
    inputs = conformance.make_inputs("random", torch.float32, torch.float32, torch.device("cpu"))
    arguments = (inputs.hidden_states, inputs.top_k_index, inputs.top_k_weights)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.mlp.experts(*arguments).backward(inputs.grad)
    optimizer.step()
    model.save_pretrained(tmp_path)

    again = Holder.from_pretrained(tmp_path, dtype=torch.float32)
    for name, tensor in model.state_dict().items():
        assert not torch.equal(tensor, experts.state_dict()[name.removeprefix("mlp.experts.")]), "nothing was trained"
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert "moe_kernels" not in (tmp_path / "config.json").read_text()


# The suite must be able to fail: what a class computes is changed by a little, and it notices.


@pytest.mark.parametrize("found", DISTINCT, ids=str)
@pytest.mark.parametrize("tensor", ["first weight", "last parameter", "routing weights"])
def test_one_wrong_element_is_noticed(found, tensor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mk.register(backend="torch")
    real = mk.fused_experts

    def off(weight: torch.Tensor) -> torch.Tensor:
        """Every other row of one expert is 5 % too large: a norm would hide a factor on all of them."""
        factor = torch.ones_like(weight)
        factor[1, ::2] = 1.05
        return weight * factor

    def wrong(x, ids, weights, gate_up, down, **settings):
        if tensor == "routing weights" and weights is not None:
            weights = weights * 1.01
        elif tensor == "last parameter" and settings.get("down_bias") is not None:
            settings["down_bias"] = off(settings["down_bias"])
        elif tensor == "last parameter":
            down = off(down)
        else:
            gate_up = off(gate_up)
        return real(x, ids, weights, gate_up, down, **settings)

    monkeypatch.setattr(mk, "fused_experts", wrong)
    experts = conformance.build(found.cls)
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(AssertionError, match=f"{found} random .*(error|slope)"):
            conformance.check(experts, "random", dtype, torch.float32)
