"""A training of two ranks that Trainer resumes is the uninterrupted one, in each way in which it saves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate", reason="needs the extra [axolotl]")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(torchrun: Callable[..., Any]) -> Any:
    return torchrun("resume")


@pytest.mark.parametrize(
    ("way", "file"),
    [("ddp", "model.safetensors"), ("full", "pytorch_model_fsdp.bin"), ("sharded", "pytorch_model_fsdp_0")],
)
def test_it_goes_on_to_the_bit(way: str, file: str, ranks: Any) -> None:
    for rank in ranks:
        whole, resumed, files = (rank["resume"][way][key] for key in ("whole", "resumed", "files"))
        assert file in files
        assert whole["sharded"] == resumed["sharded"] == (way != "ddp")
        assert resumed["losses"] == whole["losses"]
        for kind in ("weights", "optimizer"):
            assert resumed[kind].keys() == whole[kind].keys()
            assert [name for name, value in whole[kind].items() if not torch.equal(resumed[kind][name], value)] == []
        assert any("experts" in name for name in whole["weights"])
