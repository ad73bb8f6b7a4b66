"""The parts of the benchmark that only a GPU has: events, queued time, launches, memory."""

import pytest
import torch

from moe_kernels.shapes import LayerShape
from moe_kernels.tools.bench import ceilings, experts, layer, peers, timing

pytestmark = pytest.mark.gpu
SHAPE = LayerShape("gpu-tiny", 512, 256, 192, 8, 2)


@pytest.fixture(scope="module")
def rows():
    pytest.importorskip("transformers")
    return {row.implementation: row for row in experts.measure(SHAPE, device="cuda", repeats=5)}


def test_every_implementation_is_right_and_timed(rows):
    for row in rows.values():
        assert row.ok, row.note
        assert row.forward_queued_ms.p20 > 0
        assert row.forward_backward_ms.median > row.forward_ms.p20
    # The launches of a small layer cost more than its kernels, so queueing them ahead must show.
    grouped = rows["grouped_mm"]
    assert grouped.forward_backward_queued_ms.median < 1.1 * grouped.forward_backward_ms.median


def test_every_peer_is_right_or_says_why():
    """One that runs must be right; one that fails or is not installed has a sentence."""
    pytest.importorskip("transformers")
    for row in experts.measure(SHAPE, implementations=(*peers.PEERS, "moe_kernels"), device="cuda", repeats=2):
        assert row.ok or row.note, row.implementation
        assert not row.note.startswith("wrong"), f"{row.implementation}: {row.note}"


def test_ceilings_are_those_of_a_gpu():
    found = ceilings.measure_ceilings(torch.device("cuda"), torch.bfloat16)
    assert found.matmul_tflops > 50
    assert 0.3 < found.copy_tbs < 20


def test_launches_are_counted(rows):
    assert rows["moe_kernels"].launches_forward >= 5
    assert rows["moe_kernels"].launches_forward < rows["grouped_mm"].launches_forward
    assert rows["grouped_mm"].launches_forward < rows["eager"].launches_forward
    assert rows["moe_kernels"].launches_forward_backward > rows["moe_kernels"].launches_forward


def test_memory_is_measured(rows):
    saved = {name: rows[name].saved_mb for name in ("moe_kernels", "grouped_mm")}
    assert 0 < saved["moe_kernels"] < saved["grouped_mm"]
    assert all(rows[name].peak_mb > saved[name] * 0.5 for name in saved)


def test_a_known_call_is_counted_exactly():
    x = torch.randn(64, 64, device="cuda")

    def call():
        y = x + 1
        y = y * 2
        return y.cpu()

    call()
    found = timing.count_launches(call)
    assert found is not None
    assert found.kernels == 2
    assert found.copies == 1


def test_queued_time_leaves_the_host_out():
    x = torch.randn(256, 256, device="cuda")

    def many_launches():
        y = x
        for _ in range(200):
            y = y + 1
        return y

    clock = timing.Clock(torch.device("cuda"))
    times = clock.compare({"many": many_launches}, 5, lambda: None, lambda: None)["many"]
    assert times.queued is not None
    assert times.queued.median < times.total.median * 1.05
    assert times.host.median > 0


def test_peak_is_what_was_allocated():
    def call():
        held = torch.empty(32 * timing.MIB, dtype=torch.uint8, device="cuda")
        del held

    assert timing.peak_bytes(call) == 32 * timing.MIB


def test_layers_on_the_gpu_are_seeded():
    device = torch.device("cuda")
    first, second = (layer.make_layer(SHAPE, "heavy", device, torch.bfloat16) for _ in range(2))
    assert torch.equal(first.down, second.down)
    assert torch.equal(first.topk_ids, second.topk_ids)
