"""benchmarks/fp8_peers.py on a CPU: ours is right; theirs runs with a kernel in torch, and a wrong kernel shows."""

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.integrations import finegrained_fp8

from moe_kernels import fp8
from moe_kernels.packed import BlockFp8
from moe_kernels.tools.bench.layer import make_layer

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "fp8_peers.py"
GRADIENTS = {"out", "x", "topk_weights"}
newest = pytest.mark.skipif(
    not hasattr(finegrained_fp8, "FP8GroupedMatmulFunction"), reason="transformers trains fp8 experts since 5.23"
)


def measured(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """The rows of the tiny layer by implementation."""
    out = folder / "fp8-peers.json"
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--device", "cpu", "--repeats", "1", "--out", str(out)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    return {row["implementation"]: row for row in json.loads(out.read_text())["rows"]}


def grouped_matmul(
    rows: Tensor, codes: Tensor, scales: Tensor, offsets: Tensor, tokens_per_expert: Tensor, block_size: list[int]
) -> Tensor:
    """What the hub's kernel computes, in torch."""
    sizes: Any = tuple(codes.shape)
    weights = BlockFp8(sizes, torch.float32, codes, scales).experts(0, len(codes))
    parts = fp8.rounded(rows).tensor_split(offsets[:-1].tolist())
    return torch.cat([part @ weight.T for part, weight in zip(parts, weights, strict=True)]).to(rows.dtype)


def test_ours_and_why_theirs_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = measured(tmp_path, monkeypatch)
    for name, least, most in (("exact", 1e-3, 1e-2), ("fp8 activations", 2e-2, 8e-2)):
        assert rows[name]["rel_error"].keys() == GRADIENTS
        assert all(least < error < most for error in rows[name]["rel_error"].values()), rows[name]
        assert rows[name]["forward_backward_gpu_ms"]["median"] > 0
    theirs = rows["transformers"]
    assert "transformers>=5.23" in theirs["note"] or "kernel cannot be loaded" in theirs["note"]
    assert "forward_gpu_ms" not in theirs
    assert "forward_gpu_ms" in rows["dense"]


def test_the_truth_is_the_same_by_blocks_of_experts() -> None:
    names = runpy.run_path(str(SCRIPT))
    layer = make_layer(names["TINY"], "mild", torch.device("cpu"), torch.bfloat16, form="fp8-frozen")
    inputs = names["first_tokens"](layer.inputs())
    whole, by_blocks = names["exactly"](inputs), names["exactly"](inputs, block=3)
    assert {"out", "dx", "dtopk_weights"} == whole.keys()
    for name, value in whole.items():
        torch.testing.assert_close(by_blocks[name], value, rtol=1e-12, atol=1e-12)


@newest
@pytest.mark.parametrize("factor", [1.0, 1.3])
def test_theirs_on_the_same_weights(factor: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = SimpleNamespace(grouped_matmul=lambda *args, **kwargs: grouped_matmul(*args, **kwargs) * factor)
    monkeypatch.setattr(finegrained_fp8, "load_finegrained_fp8_kernel", lambda: kernel)
    row = measured(tmp_path, monkeypatch)["transformers"]
    assert row["note"] == ""
    assert row["rel_error"].keys() == GRADIENTS
    assert row["forward_backward_gpu_ms"]["median"] > 0
    assert row["saved_mb"] > 0
    # Its backward has no rounding to e4m3 of its own, but gets the forward's values.
    assert all((1e-3 < error < 8e-2) == (factor == 1.0) for error in row["rel_error"].values()), row


@newest
def test_a_kernel_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: object, **kwargs: object) -> Tensor:
        raise RuntimeError("no GPU")

    monkeypatch.setattr(
        finegrained_fp8, "load_finegrained_fp8_kernel", lambda: SimpleNamespace(grouped_matmul=failing)
    )
    rows = measured(tmp_path, monkeypatch)
    assert rows["transformers"]["note"] == "it failed: RuntimeError: no GPU"
    assert "forward_gpu_ms" in rows["exact"]
