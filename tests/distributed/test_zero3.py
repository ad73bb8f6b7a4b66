"""DeepSpeed ZeRO-3 over two ranks: whole models, LoRA on experts, and LoRA over experts in few bits. No hang, and the
losses of transformers' own experts under the same engine."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from moe_kernels.shapes import FAMILIES

pytest.importorskip("transformers", reason="needs the extra [transformers]")
pytest.importorskip("deepspeed", reason="needs DeepSpeed: pip install deepspeed")
# DeepSpeed compiles its CPU communication the first time, which takes some minutes.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(torchrun: Callable[..., Any]) -> Any:
    return [rank["zero3"] for rank in torchrun("zero3")]


@pytest.mark.parametrize("leaves", [True, False], ids=["leaf modules", "no leaf modules"])
@pytest.mark.parametrize(
    ("family", "trained"),
    [*itertools.product(FAMILIES, ["build", "adapted"]), ("4 bits", "packed"), ("mxfp4", "packed")],
)
def test_losses_are_those_of_transformers_experts(family: str, trained: str, leaves: bool, ranks: Any) -> None:
    """Leaves make no difference: all experts are one module, which every rank runs on every step."""
    for rank in ranks:
        baseline, ours = rank[family, trained, "grouped_mm", True], rank[family, trained, "moe_kernels", leaves]
        assert ours["losses"] == pytest.approx(baseline["losses"], rel=1e-5)
        assert ours["calls"]["torch"] > 0
