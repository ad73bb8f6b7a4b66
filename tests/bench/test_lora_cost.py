"""benchmarks/lora_cost.py on a CPU: every way is right, absent ones say why, and a wrong one is not timed."""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from moe_kernels.integrations import peft as mk_peft
from moe_kernels.tools.bench.timing import Spread, Times

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "lora_cost.py"
spec = importlib.util.spec_from_file_location("lora_cost", SCRIPT)
lora_cost = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = lora_cost
spec.loader.exec_module(lora_cost)


@pytest.fixture(autouse=True)
def _peft_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """The script applies Axolotl's corrections to PEFT, for a process of its own: here they end with the test."""
    from peft.tuners.lora.layer import ParamWrapper
    from peft.tuners.tuners_utils import BaseTuner

    for owner, name in (
        (ParamWrapper, "_activate_lora"),
        (BaseTuner, "_inject_parameters"),
        (BaseTuner, "_check_target_module_exists"),
    ):
        monkeypatch.setattr(owner, name, vars(owner)[name])  # as it stands there: some are static
    if importlib.util.find_spec("axolotl") is not None:
        from axolotl.monkeypatch.moe_quant import patch_peft_target_parameters_matching as patch

        monkeypatch.setattr(patch, "_axolotl_patched", False, raising=False)


EVERY = {"out", "dx", "dw", "dA_gate_up_proj", "dB_gate_up_proj", "dA_down_proj", "dB_down_proj"}


def bench(tmp_path: Path, *variants: tuple[str, str]):
    args = argparse.Namespace(
        device="cpu",
        shape=None,
        tokens=None,
        rank=4,
        repeats=1,
        jobs=0,
        patience=1.0,
        without=False,
        out=tmp_path / "lora.json",
    )
    made = lora_cost.Bench(args)
    made.run(list(variants))
    return made


def test_every_way_is_right_or_says_why_not(tmp_path, capsys):
    made = bench(tmp_path, ("bf16", "float32"), ("bf16", "bfloat16"))
    assert len(made.rows) == 8
    for row in made.rows:
        if row.implementation == "scattermoe":
            assert not row.ok
            assert "needs an NVIDIA GPU" in row.note
            continue
        assert row.ok, row.note
        assert set(row.rel_error) == EVERY
        assert 1e-4 < min(row.rel_error.values()) < max(row.rel_error.values()) < 0.02
        assert (row.forward_backward is None) == (row.implementation == "peft_eager")
    ours, merged = made.rows[0], made.rows[1]
    assert ours.saved_mb < merged.saved_mb, "the merged weights are saved"
    written = json.loads((tmp_path / "lora.json").read_text())
    assert len(written["rows"]) == 8
    assert written["environment"]["command"].startswith("python benchmarks/lora_cost.py")
    assert {bar["ok"] for bar in written["bars"]} == {None, True}, "a CPU proves errors only"
    made.show()
    shown = capsys.readouterr().out
    assert "not measured bf16 base, float32 adapters: speed, scattermoe" in shown
    assert "pass         bf16 base, float32 adapters: error, moe_kernels over peft_eager" in shown


def dequantised(monkeypatch):
    """The number of experts that are dequantised at a time, a list that grows."""
    from bitsandbytes import functional

    theirs, ours, seen = functional.dequantize_4bit, lora_cost.PackedWeight.experts, []

    def dequantize_4bit(packed, state, *args, **kwargs):
        seen.append(state.shape[0])
        return theirs(packed, state, *args, **kwargs)

    def experts(weight, first, last):
        seen.append(last - first)
        return ours(weight, first, last)

    monkeypatch.setattr(functional, "dequantize_4bit", dequantize_4bit)
    monkeypatch.setattr(lora_cost.PackedWeight, "experts", experts)
    return seen


def test_4_bit_base(tmp_path):
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("axolotl")
    rows = {row.implementation: row for row in bench(tmp_path, ("nf4", "float32")).rows}
    for name in ("moe_kernels", "peft_grouped_mm", "peft_eager"):
        assert rows[name].ok, rows[name].note
        assert max(rows[name].rel_error.values()) < 0.02
        assert (rows[name].forward_backward is None) == (name == "peft_eager")
    packed = lora_cost.TINY.experts * 3 * 64 * 64 / 2 / 2**20
    assert packed < rows["moe_kernels"].weights_mb < 1.1 * packed, "the scales count, a 16-bit copy is not there"
    assert rows["moe_kernels"].saved_mb < rows["peft_grouped_mm"].saved_mb


def test_what_is_dequantised_at_a_time(tmp_path, monkeypatch):
    """Ours one of the eight experts on a CPU, whatever ran before in the same wrappers; the others all of them."""
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("axolotl")
    made = bench(tmp_path)
    for name in ("moe_kernels", "peft_grouped_mm"):
        assert lora_cost.why_not(name, "nf4", made.shape, made.device) is None
    layer = lora_cost._frozen(lora_cost.make_layer(made.shape, "mild", made.device, torch.bfloat16))
    adapted = lora_cost.Adapted(layer, 4, torch.float32, True)
    seen = dequantised(monkeypatch)
    for name in ("moe_kernels", "peft_grouped_mm", "moe_kernels"):
        forward = adapted.call(made._implementation(name), True)
        out = forward()
        in_forward = len(seen)
        out.backward(layer.grad_out)
        assert set(seen) == {{"moe_kernels": 1, "peft_grouped_mm": 8}[name]}, name
        assert (len(seen) > in_forward) == (name != "peft_grouped_mm"), "its copy is kept instead"
        seen.clear()


def test_ours_on_weights_that_it_reads_whole_is_not_timed(tmp_path, monkeypatch):
    """As PEFT 0.21.0 leaves them."""
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("axolotl")

    def one_more(self):
        for chain in getattr(self.experts, "parametrizations", {}).values():
            if len(chain) == 1:
                chain.append(torch.nn.Identity())

    monkeypatch.setattr(lora_cost.Adapted, "take_off_proxies", one_more)
    rows = {row.implementation: row for row in bench(tmp_path, ("nf4", "float32")).rows}
    assert not rows["moe_kernels"].ok
    assert "parametrised once more" in rows["moe_kernels"].note
    assert rows["moe_kernels"].forward is None


@pytest.mark.parametrize("side", [0, 1])
def test_a_wrong_factor_is_seen_and_not_timed(tmp_path, monkeypatch, side):
    real = mk_peft.low_rank_pair

    def swapped(*args):
        """Experts paired with the wrong factors, as other kernels did it."""
        pair = list(real(*args))
        pair[side] = pair[side].roll(1, 0)
        return tuple(pair)

    monkeypatch.setattr(mk_peft, "low_rank_pair", swapped)
    made = bench(tmp_path, ("bf16", "bfloat16"))
    assert not made.rows[0].ok
    assert "wrong" in made.rows[0].note
    assert made.rows[0].forward is None
    assert made.rows[1].ok


def test_goals(tmp_path):
    made = bench(tmp_path)
    made.device = torch.device("cuda")

    def times(ms):
        return Times(*(Spread(ms, ms, ms),) * 3)

    for name, ms, peak in (("moe_kernels", 4.0, 10.0), ("peft_grouped_mm", 5.9, 30.0), ("scattermoe", 4.5, 9.0)):
        error = {"out": 1e-3}
        row = lora_cost.Row("bf16", "float32", name, forward_backward=times(ms), peak_mb=peak, rel_error=error)
        made.rows.append(row)
    made.rows.append(lora_cost.Row("bf16", "float32", "peft_eager", rel_error={"out": 7e-4}))
    verdicts = {bar["what"]: bar["ok"] for bar in made.bars()}
    assert verdicts == {
        "speed, peft_grouped_mm over moe_kernels": False,
        "speed, scattermoe over moe_kernels": True,
        "memory, peft_grouped_mm over moe_kernels": True,
        "memory, scattermoe over moe_kernels": False,
        "error, moe_kernels over peft_eager, the worst": False,
    }
