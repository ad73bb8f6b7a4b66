"""Weights that no file holds: the same bits in every run, whatever the kernels and the state of the generators."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import builders
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config, PreTrainedModel

import moe_kernels.integrations.transformers as mk
from moe_kernels.shapes import FAMILIES, REAL_FAMILIES
from moe_kernels.tools.compare.comparison import Analysis
from moe_kernels.tools.compare.held import frozen
from moe_kernels.tools.compare.weights import DrawnWeights, checksum, draw_adapter, seed_of
from moe_kernels.tools.prepare import prepare_model
from support import fp8, mxfp4

each_family = pytest.mark.parametrize("family", REAL_FAMILIES)
BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn")
    for family in REAL_FAMILIES:
        prepare_model(family, "tiny", folder)
        prepare_model(family, "tiny", folder, packed=True)
    prepare_model("mixtral", "tiny", folder)
    return folder


@pytest.fixture
def drawn() -> Iterator[DrawnWeights]:
    before = PreTrainedModel.__dict__["from_pretrained"]
    mk.register(backend="torch")
    yield DrawnWeights().installed()
    mk.register()
    PreTrainedModel.from_pretrained = before  # type: ignore[method-assign]


def load(root: Path, family: str, packed: bool = False, **settings: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder(root, family, packed), **settings)


def load_whole(root: Path, family: str, **settings: Any) -> Any:
    """As the baseline over a checkpoint in few bits does."""
    config = {"qwen3-moe": FineGrainedFP8Config, "gpt-oss": Mxfp4Config}[family]
    return load(root, family, True, quantization_config=config(dequantize=True), **settings)


def folder(root: Path, family: str, packed: bool = False) -> Path:
    return root / "artifacts" / "models" / REAL_FAMILIES.get(family, FAMILIES["mixtral"]).model("tiny", packed)


@each_family
def test_prepare_writes_no_weights(root: Path, family: str) -> None:
    names = {path.name for path in folder(root, family).iterdir()}
    assert names == {"config.json", "tokenizer.json", "tokenizer_config.json", "moe_kernels.json"}
    before = {path.name: path.stat().st_mtime_ns for path in folder(root, family).iterdir()}
    prepare_model(family, "tiny", root)
    assert before == {path.name: path.stat().st_mtime_ns for path in folder(root, family).iterdir()}


@each_family
def test_the_same_bits_each_time(root: Path, family: str, drawn: DrawnWeights) -> None:
    sums = set()
    for number, experts in enumerate(("grouped_mm", "eager", "grouped_mm")):
        torch.manual_seed(number)
        state = torch.get_rng_state()
        model = load(root, family, experts_implementation=experts, dtype=torch.bfloat16)
        assert torch.equal(state, torch.get_rng_state())
        assert model.dtype == torch.bfloat16
        assert model.config._experts_implementation == experts
        assert model.name_or_path == str(folder(root, family))
        sums.add(checksum(model))
    assert drawn.seed == 0
    assert len(sums) == 1
    # The embedding is as the configuration says, and no bias is 0: that would hide a fault.
    assert model.get_input_embeddings().weight.std().item() == pytest.approx(0.1, rel=0.05)
    assert all(bool(bias.any()) for name, bias in model.named_parameters() if name.endswith("bias"))
    assert all(bool(norm.eq(1).all()) for name, norm in model.named_parameters() if name.endswith("norm.weight"))


def test_another_seed_gives_other_weights(root: Path, drawn: DrawnWeights, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    prepare_model("qwen3-moe", "tiny", tmp_path, seed=1)
    assert seed_of(folder(tmp_path, "qwen3-moe")) == 1
    assert checksum(load(tmp_path, "qwen3-moe")) != checksum(load(root, "qwen3-moe"))


def test_a_model_with_weights_loads_as_ever(root: Path, drawn: DrawnWeights, tmp_path: Path) -> None:
    stored = load_file(folder(root, "mixtral") / "model.safetensors")
    assert torch.equal(load(root, "mixtral").lm_head.weight, stored["lm_head.weight"])
    assert (drawn.seed, drawn.drawn) == (0, False)
    assert seed_of("Qwen/Qwen3-30B-A3B") is None
    with pytest.raises(OSError, match="nowhere"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "nowhere")


def test_both_factors_of_the_adapter_are_drawn(root: Path, drawn: DrawnWeights) -> None:
    peft = pytest.importorskip("peft")
    sums = set()
    for number in range(2):
        torch.manual_seed(number)  # which is what PEFT's own draw depends on
        targets = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}
        model = peft.get_peft_model(load(root, "gpt-oss"), peft.LoraConfig(r=4, **targets))
        fresh = checksum(model)
        draw_adapter(model, 0)
        assert checksum(model) != fresh
        factors = {name: factor for name, factor in model.named_parameters() if factor.requires_grad}
        assert len(factors) == 2 * 2 * 2, "A and B of two weights in two layers"
        assert all(bool(factor.any()) for factor in factors.values())
        sums.add(checksum(model))
    assert len(sums) == 1


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
def test_a_new_adapter_is_drawn_and_a_trained_one_is_not(root: Path, family: str, drawn: DrawnWeights) -> None:
    peft = pytest.importorskip("peft")
    starts = []
    for number in range(2):
        torch.manual_seed(number)
        model = peft.get_peft_model(load(root, family), peft.LoraConfig(r=4, target_modules=["q_proj"]))
        drawn.on_train_begin(None, None, None, model=model)
        assert drawn.checksum == checksum(model)
        starts.append(drawn.checksum)
    assert starts[0] == starts[1]
    drawn.on_train_begin(None, None, None, model=model)
    assert checksum(model) == starts[0]
    weight = next(factor for name, factor in model.named_parameters() if "lora_B" in name)
    weight.data += 1
    trained = checksum(model)
    drawn.on_train_begin(None, None, None, model=model)
    assert checksum(model) == trained


def test_a_full_training_of_a_written_model_is_left_alone(root: Path, drawn: DrawnWeights) -> None:
    model = load(root, "mixtral")
    drawn.on_train_begin(None, None, None, model=model)
    assert drawn.checksum == ""


def test_the_checksum_sees_one_bit(root: Path, drawn: DrawnWeights) -> None:
    model = load(root, "gpt-oss", dtype=torch.bfloat16)
    before = checksum(model)
    bits = model.model.layers[1].mlp.experts.down_proj.data.view(torch.int16)
    bits[3, 5, 7] ^= 1
    assert checksum(model) != before


@each_family
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_a_base_in_few_bits_is_the_same_on_both_sides(
    root: Path, family: str, dtype: torch.dtype, drawn: DrawnWeights
) -> None:
    """Ours keeps it, transformers dequantises it for the baseline, and the checksum is of the same numbers."""
    ours = load(root, family, True, dtype=dtype, experts_implementation="moe_kernels")
    assert mk.check_model(ours) == 2
    baseline, plain = load_whole(root, family, dtype=dtype), load(root, family, dtype=dtype)
    assert {parameter.dtype for parameter in baseline.parameters()} == {dtype}
    assert checksum(ours, dtype) == checksum(baseline, dtype) != checksum(plain, dtype)
    # An expert's codes and scales, of gpt-oss biases too, against 4 bytes a value.
    packed, whole = {
        "qwen3-moe": (80 * 64 + 64 * 40 + 3 * 4, 4 * (80 * 64 + 64 * 40)),
        "gpt-oss": ((64 * 96 + 96 * 32) * 17 / 32 + 160 * dtype.itemsize, 4 * (64 * 96 + 96 * 32 + 160)),
    }[family]
    held, wide = sum(frozen(freeze(ours)).values()), sum(frozen(freeze(plain.float())).values())
    assert held / wide == pytest.approx(packed / whole)
    # What was drawn, rounded: each value by its own block.
    for name, value in baseline.state_dict().items():
        drawn_value = plain.state_dict()[name].float()
        if not name.endswith("_proj.weight") and not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            assert torch.equal(value.float(), drawn_value), name
        elif family == "qwen3-moe" or "experts" in name:
            apart = (value.float() - drawn_value).norm() / drawn_value.norm()
            assert (0.01 < apart < 0.04) if family == "qwen3-moe" else (0.05 < apart < 0.2), name


@each_family
def test_adapters_over_a_base_in_few_bits_start_alike(root: Path, family: str, drawn: DrawnWeights) -> None:
    """PEFT makes a factor in the dtype of its weight, which is fp8 on one side and bfloat16 on the other."""
    peft = pytest.importorskip("peft")
    sums = set()
    for model in (
        load(root, family, True, dtype=BF16, experts_implementation="moe_kernels"),
        load_whole(root, family, dtype=BF16),
    ):
        targets = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, **targets))
        draw_adapter(adapted, 0)
        factors = [factor for factor in adapted.parameters() if factor.requires_grad]
        assert {factor.dtype for factor in factors} == {torch.float32}
        sums.add(checksum(adapted, BF16))
    assert len(sums) == 1


def test_codes_and_scales_are_those_of_a_checkpoint(root: Path, drawn: DrawnWeights) -> None:
    """Quantised here and by the tests' own code."""
    plain, ours = load(root, "qwen3-moe"), load(root, "qwen3-moe", True, experts_implementation="moe_kernels")
    for layer, held in zip(plain.model.layers, ours.model.layers, strict=True):
        q_proj = held.self_attn.q_proj
        pairs = [(layer.self_attn.q_proj.weight, q_proj.weight, q_proj.weight_scale_inv)]
        for expert in range(16):
            gate, up = layer.mlp.experts.gate_up_proj[expert].chunk(2)
            codes, scales = held.mlp.experts.gate_up_proj[expert], held.mlp.experts.gate_up_proj_scale_inv[expert]
            pairs += [(gate, codes[:40], scales[:1]), (up, codes[40:], scales[1:])]
        for weight, codes, scales in pairs:
            wanted = fp8.quantised(weight.detach())
            assert torch.equal(codes.view(torch.uint8), wanted[0].view(torch.uint8))
            assert torch.equal(scales, wanted[1])
    plain, ours = load(root, "gpt-oss"), load(root, "gpt-oss", True, experts_implementation="moe_kernels")
    for name in ("gate_up_proj", "down_proj"):
        blocks, scales = mxfp4.quantised(getattr(plain.model.layers[1].mlp.experts, name).detach().mT)
        held = ours.model.layers[1].mlp.experts._parameters
        values = mxfp4.dequantised(held[name], held[f"{name}_scales"])
        assert torch.equal(values, mxfp4.dequantised(blocks, scales))  # a value halfway has two codes


@pytest.mark.parametrize(("family", "scale"), [("qwen3-moe", "down_proj_scale_inv"), ("gpt-oss", "down_proj_scales")])
def test_the_checksum_sees_a_scale(root: Path, family: str, scale: str, drawn: DrawnWeights) -> None:
    model = load(root, family, True, experts_implementation="moe_kernels")
    before = checksum(model)
    model.model.layers[1].mlp.experts._parameters[scale].data[3] += 1
    assert checksum(model) != before


def freeze(model: torch.nn.Module) -> torch.nn.Module:
    return model.requires_grad_(False)


def test_what_the_frozen_experts_take(root: Path, drawn: DrawnWeights) -> None:
    model = load(root, "gpt-oss", dtype=BF16)
    assert frozen(model) == {}, "they get gradients"
    experts = 2 * 8 * (64 * 96 + 96 * 32 + 64 + 96)  # two layers, with biases
    assert frozen(freeze(model)) == {"bfloat16": 2 * experts}
    model = freeze(load(root, "gpt-oss", True, dtype=BF16, experts_implementation="moe_kernels"))
    assert frozen(model) == {"uint8": 2 * 8 * (64 * 96 + 96 * 32) * 17 // 32, "bfloat16": 2 * 2 * 8 * (64 + 96)}


def test_runs_that_started_from_other_weights_are_no_comparison() -> None:
    def faults(*weights: str) -> list[str]:
        roles = ("baseline-1", "optimized-1", "baseline-2")
        runs = [
            builders.run(role, 100.0, calls=10 if "optimized" in role else None, weights=weight)
            for role, weight in zip(roles, weights, strict=True)
        ]
        return Analysis(builders.comparison(runs=runs)).faults

    assert faults("a", "a", "a") == faults("", "", "") == []
    assert faults("a", "b", "a") == ["the runs did not start from the same weights"]
