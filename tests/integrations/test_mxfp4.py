"""gpt-oss checkpoints in mxfp4: loaded with their experts as they are stored, checked, trained with LoRA, saved."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_kernels import backends
from moe_kernels.kernels.triton.dequantize import dequantize
from support.lora_step import IDS, TARGETS, assert_equal, step, with_lora
from support.mxfp4 import dequantised, save_model, write_checkpoint
from support.tiles import use_small_tiles

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
mk = pytest.importorskip("moe_kernels.integrations.transformers")

from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModelForCausalLM, Mxfp4Config  # noqa: E402
from transformers.integrations.mxfp4 import Mxfp4GptOssExperts, convert_moe_packed_tensors  # noqa: E402

from moe_kernels.integrations.mxfp4 import Mxfp4Experts  # noqa: E402
from moe_kernels.integrations.quantized import packed_weight  # noqa: E402

BF16 = torch.bfloat16
EXPERTS = "model.layers.1.mlp.experts"
WEIGHTS = ["gate_up_proj", "down_proj"]
Checkpoint = tuple[Path, dict[str, Tensor]]


@pytest.fixture(autouse=True)
def _torch_backend() -> Iterator[None]:
    mk.register(backend="torch")
    backends.reset_dispatch_counts()
    yield
    mk.register()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("mxfp4")
    return folder, write_checkpoint(folder)


def load(folder: Path, **options: Any) -> Any:
    options = {"dtype": BF16, "experts_implementation": "moe_kernels", "attn_implementation": "eager"} | options
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def load_whole(folder: Path, **options: Any) -> Any:
    return load(folder, quantization_config=Mxfp4Config(dequantize=True), **options)


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 0.02 * value.norm(), name


def experts_of(model: Any) -> Any:
    return model.get_submodule(EXPERTS)


def test_lora_is_bitwise_that_over_the_dequantised_model(checkpoint: Checkpoint) -> None:
    folder, held = checkpoint
    model = with_lora(load(folder))
    served = mk.check_model(model)
    assert (served, served.lora_weights) == (2, 4)
    assert served.adapted.routed_experts > served.adapted.attention > 0
    found = step(model)
    assert backends.dispatch_counts() == {"torch": 2}
    whole = with_lora(load_whole(folder))
    mk.check_model(whole)
    expected = step(whole)
    assert len([name for name in expected if "experts" in name]) == 8
    assert_equal(found, expected)
    experts = experts_of(model.base_model.model).get_base_layer()
    for name in WEIGHTS:
        assert torch.equal(experts._parameters[name], held[f"{EXPERTS}.{name}_blocks"])
        assert torch.equal(experts._parameters[f"{name}_scales"], held[f"{EXPERTS}.{name}_scales"])


def test_the_experts_take_a_quarter_of_the_memory(checkpoint: Checkpoint) -> None:
    def size(experts: Any) -> int:
        return sum(p.nbytes for name, p in experts.named_parameters() if "bias" not in name)

    model = load(checkpoint[0])
    assert size(experts_of(model)) * 16 * 2 == size(experts_of(load_whole(checkpoint[0]))) * 17 // 2
    assert not any(p.requires_grad for name, p in experts_of(model).named_parameters() if "bias" not in name)


def test_the_kernels_run_on_the_weights_as_they_are(checkpoint: Checkpoint) -> None:
    model = with_lora(load(checkpoint[0]))
    mk.check_model(model)
    expected = step(model)
    mk.register(backend="triton")
    with use_small_tiles():
        found = step(model)
    assert backends.dispatch_counts() == {"torch": 2, "triton": 2}
    assert_close(found, expected)


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=str)
def test_values_are_bitwise_those_of_transformers(checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    """Of the torch backend, of the kernel, and of the attribute that everybody else reads."""
    folder, held = checkpoint
    experts = experts_of(load(folder, dtype=dtype))
    assert type(experts) is Mxfp4Experts
    for name in WEIGHTS:
        blocks, scales = (held[f"{EXPERTS}.{name}_{part}"] for part in ("blocks", "scales"))
        theirs = convert_moe_packed_tensors(blocks, scales)
        assert torch.equal(dequantised(blocks, scales), theirs.mT)
        assert torch.equal(getattr(experts, name), theirs)
        assert torch.equal(getattr(experts_of(load_whole(folder)), name), theirs)
        packed = packed_weight(experts, name, dtype)
        assert packed.shape == theirs.shape
        for values in (packed.experts(1, 4), dequantize(packed, 1, 4)):
            assert torch.equal(values, theirs[1:].to(dtype))


def test_another_implementation_gives_what_it_gives_on_the_dequantised_model(checkpoint: Checkpoint) -> None:
    """Slowly, each reads the weight as an attribute; PEFT's own LoRA would leave a dequantised weight behind."""
    folder, _ = checkpoint
    for implementation in ("eager", "grouped_mm"):
        logits = []
        for model in (load(folder), load_whole(folder)):
            model.set_experts_implementation(implementation)
            logits.append(model(input_ids=IDS).logits)
        torch.testing.assert_close(*logits)
    model = with_lora(load(folder))
    model.set_experts_implementation("eager")
    with pytest.raises(mk.UnsupportedExperts, match="runs experts_implementation='eager', not"):
        mk.check_model(model)
    with pytest.raises(ValueError, match=r"down_proj is in mxfp4 and stays so\. .*dequantize=True"):
        model(input_ids=IDS)


def test_what_names_another_implementation_is_loaded_as_transformers_loads_it(checkpoint: Checkpoint) -> None:
    folder, _ = checkpoint
    for options in ({"experts_implementation": "eager"}, {"experts_implementation": None}):
        experts = experts_of(load(folder, **options))
        assert (type(experts).__name__, experts.gate_up_proj.dtype) == ("GptOssExperts", BF16)
    mk.register(name="other", backend="torch")
    assert type(experts_of(load(folder, experts_implementation="other"))) is Mxfp4Experts


def test_experts_that_the_checkpoint_has_in_16_bits(tmp_path: Path) -> None:
    held = write_checkpoint(tmp_path)
    first = "model.layers.0.mlp.experts"
    for name in WEIGHTS:
        parts = (held.pop(f"{first}.{name}_{part}") for part in ("blocks", "scales"))
        held[f"{first}.{name}"] = dequantised(*parts).mT.contiguous()
    save_file(held, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["modules_to_not_convert"].append(first)
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load(tmp_path)
    assert [type(layer.mlp.experts).__name__ for layer in model.model.layers] == ["GptOssExperts", "Mxfp4Experts"]
    assert mk.check_model(with_lora(model)).lora_weights == 4


def test_a_16_bit_checkpoint_is_not_quantised(tmp_path: Path) -> None:
    save_model(tmp_path)
    assert type(experts_of(load(tmp_path))).__name__ == "GptOssExperts"
    with pytest.raises((ValueError, OSError)):  # transformers looks for a GPU, or for its kernel
        load(tmp_path, quantization_config=Mxfp4Config())


def test_saved_and_loaded_it_is_the_same_checkpoint(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder, held = checkpoint
    model = with_lora(load(folder))
    mk.check_model(model)
    logits = step(model)["logits"]
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(folder), tmp_path / "adapter")
    mk.check_model(again)
    assert torch.equal(again(input_ids=IDS).logits, logits)
    again.base_model.model.load_state_dict(again.base_model.model.state_dict())
    assert torch.equal(again(input_ids=IDS).logits, logits)
    model.unload().save_pretrained(tmp_path / "base")
    saved = load_file(tmp_path / "base" / "model.safetensors")
    assert saved.keys() == held.keys()
    for name, value in held.items():
        assert torch.equal(saved[name], value), name
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "mxfp4"
    assert "moe_kernels" not in json.dumps(config)


@pytest.mark.parametrize("way", ["merge_adapter", "merge_and_unload"])
def test_merging_into_mxfp4_is_refused(checkpoint: Checkpoint, way: str) -> None:
    """Also of a model that nobody checked: PEFT would merge into a copy, and say nothing."""
    model = with_lora(load(checkpoint[0]), TARGETS | {"target_modules": []})
    with pytest.raises(ValueError, match=r"is in mxfp4, into which PEFT cannot merge: .*Mxfp4Config\(dequantize"):
        getattr(model, way)()


@pytest.mark.parametrize("way", ["merge_adapter", "merge_and_unload"])
def test_a_refused_merge_leaves_the_model_as_it_was(checkpoint: Checkpoint, way: str) -> None:
    """PEFT comes to attention, which is in 16 bits, before it comes to the experts."""
    model = with_lora(load(checkpoint[0]))
    mk.check_model(model)
    before = step(model)
    with pytest.raises(ValueError, match="PEFT cannot merge"):
        getattr(model, way)()
    assert_equal(step(model), before)


def test_the_adapter_merges_into_the_dequantised_model(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder, _ = checkpoint
    model = with_lora(load(folder))
    mk.check_model(model)
    logits = step(model)["logits"].float()
    model.save_pretrained(tmp_path)
    merged = peft.PeftModel.from_pretrained(load_whole(folder).float(), tmp_path).merge_and_unload()
    mk.check_model(merged)
    merged.save_pretrained(tmp_path / "merged")
    again = load(tmp_path / "merged", dtype=torch.float32)
    assert not hasattr(again.config, "quantization_config")
    for model in (merged, again):
        found = model(input_ids=IDS).logits
        assert (found - logits).norm() <= 0.02 * logits.norm()


def test_a_dequantised_model_is_saved_with_its_experts(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """transformers before 5.24 writes them under keys that are patterns, the last layer's over the others'."""
    model = load_whole(checkpoint[0])
    assert mk.check_model(model) == 2
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


@pytest.mark.parametrize("adapted", [True, False])
def test_trainer_takes_the_model_with_an_adapter(checkpoint: Checkpoint, tmp_path: Path, adapted: bool) -> None:
    """transformers says "that quantization method do not support training" of its own."""
    model = with_lora(load(checkpoint[0])) if adapted else load(checkpoint[0])
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, use_cpu=True, report_to=[], learning_rate=1e-2, save_strategy="no"
    )
    data = [{"input_ids": row, "labels": row} for row in IDS]
    mk.check_model(model)
    if not adapted:
        with pytest.raises(ValueError, match="Please attach trainable adapters"):
            transformers.Trainer(model, arguments, train_dataset=data)
        return
    trainer = transformers.Trainer(model, arguments, train_dataset=data)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer.train()
    assert trainer.state.global_step == 2
    for name, value in before.items():
        assert not torch.equal(model.get_parameter(name), value), name


def part(change: Callable[[Tensor], Tensor], name: str) -> Callable[[Any], None]:
    def apply(model: Any) -> None:
        parameters = experts_of(model)._parameters
        parameters[name] = nn.Parameter(change(parameters[name].detach().clone()), requires_grad=False)

    return apply


def value(number: int) -> Callable[[Tensor], Tensor]:
    def put(tensor: Tensor) -> Tensor:
        tensor[2, 1, 0] = number
        return tensor

    return put


def in_training(model: Any) -> None:
    model.train()
    experts_of(model).down_proj_bias.requires_grad_()


WHERE = r"^model\.layers\.1\.mlp\.experts \(Mxfp4Experts\): "


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (part(lambda t: t[:3], "down_proj_scales"), r"down_proj .* scales are torch.uint8 \(3, 64, 3\), wanted"),
        (part(lambda t: t.float(), "down_proj_scales"), "down_proj .* scales are torch.float32 .* wanted uint8"),
        (part(lambda t: t.view(torch.int8), "down_proj"), "down_proj .* blocks are torch.int8 .* wanted uint8"),
        (part(lambda t: t.flatten(-2), "gate_up_proj"), r"gate_up_proj .* blocks are torch.uint8 \(4, 192, 32\)"),
        (part(lambda t: t[:, ::2].contiguous(), "gate_up_proj"), "gate_up_proj .* scales are"),
        (part(value(255), "gate_up_proj_scales"), "gate_up_proj_scales are no scales of mxfp4: one is 255, .*NaN"),
        (part(torch.zeros_like, "down_proj_scales"), r"down_proj_scales are no scales .* above 0, .* again"),
        (part(lambda t: t % 4, "down_proj_scales"), r"down_proj_scales are .* above 3, which is 2\^-124, as a cast"),
        (in_training, "down_proj_bias is to be trained .* LoRA.*dequantize=True"),
    ],
)
def test_what_is_refused_before_training(
    checkpoint: Checkpoint, spoil: Callable[[Any], None], words: str
) -> None:
    model = load(checkpoint[0])
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    spoil(model)
    with pytest.raises(mk.UnsupportedExperts, match=WHERE + words):
        mk.check_model(model)


def test_a_model_that_was_only_loaded_is_checked_and_not_trained(checkpoint: Checkpoint) -> None:
    model = load(checkpoint[0])
    assert mk.check_model(model) == 2
    assert model(input_ids=IDS).logits.isfinite().all()
    model.train()
    with pytest.raises(mk.UnsupportedExperts, match="_proj_bias is to be trained"):
        model(input_ids=IDS)
    with torch.no_grad():
        model(input_ids=IDS)


@pytest.mark.parametrize("lost", ["gate_up_proj_blocks", "down_proj_scales", "down_proj_bias"])
def test_what_the_checkpoint_lacks_is_refused_as_it_is_loaded(tmp_path: Path, lost: str) -> None:
    """transformers warns, and leaves memory as it was found."""
    held = write_checkpoint(tmp_path)
    del held[f"{EXPERTS}.{lost}"]
    save_file(held, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(mk.UnsupportedExperts, match=rf"{EXPERTS} .* has no {lost}, .*: download"):
        load(tmp_path)


def test_a_16_bit_checkpoint_that_says_mxfp4_is_refused_with_its_cure(tmp_path: Path) -> None:
    """As a model that was trained in 16 bits is, with the configuration of the published one."""
    save_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(mk.UnsupportedExperts, match=r"has no gate_up_proj_blocks.*take quantization_config"):
        load(tmp_path)
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert mk.check_model(load(tmp_path)) == 2


def test_experts_on_the_disk_are_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    places = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "lm_head"), "cpu")
    options: dict[str, Any] = {"device_map": places | {"model.layers.1": "disk"}, "offload_folder": tmp_path}
    with pytest.raises(mk.UnsupportedExperts, match=rf"{EXPERTS} .* device_map leaves them on the disk.*dequantize"):
        load(checkpoint[0], **options)
    assert load_whole(checkpoint[0], **options)(input_ids=IDS).logits.isfinite().all()


def test_offloaded_experts_are_refused(checkpoint: Checkpoint) -> None:
    """accelerate reads a weight by its name before it moves it, when its scales are moved already."""
    accelerate = pytest.importorskip("accelerate")
    with pytest.raises(mk.UnsupportedExperts, match=r"_proj is offloaded .* experts a GPU.*dequantize=True"):
        accelerate.cpu_offload(load(checkpoint[0]), torch.device("cpu"))
    whole = load_whole(checkpoint[0])
    assert mk.check_model(whole) == 2
    accelerate.cpu_offload(whole, torch.device("cpu"))
    assert whole(input_ids=IDS).logits.isfinite().all()


def test_lora_on_the_scales_is_refused(checkpoint: Checkpoint) -> None:
    model = with_lora(load(checkpoint[0]), {"target_parameters": ["mlp.experts.down_proj_scales"]})
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts: LoRA is on down_proj_scales.* write down_proj"):
        mk.check_model(model)


def test_scales_of_another_dtype_in_the_checkpoint_are_refused(tmp_path: Path) -> None:
    """transformers casts them to uint8 without a word: powers of two below one become 0."""
    held = write_checkpoint(tmp_path)
    name = f"{EXPERTS}.down_proj_scales"
    held[name] = held[name].view(torch.float8_e8m0fnu)
    save_file(held, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(mk.UnsupportedExperts, match="down_proj_scales are no scales of mxfp4: none is above 0"):
        mk.check_model(load(tmp_path))


def test_the_layout_of_transformers_own_kernels_is_refused(checkpoint: Checkpoint) -> None:
    """What transformers loads where there is a GPU and the package kernels."""
    model = load_whole(checkpoint[0])
    for layer in model.model.layers:
        layer.mlp.experts = Mxfp4GptOssExperts(model.config)
    with pytest.raises(mk.UnsupportedExperts, match=r"have no backward\. .*register\(\) and then load .*dequantize"):
        mk.check_model(model)


def test_casts_of_the_model_leave_them(checkpoint: Checkpoint) -> None:
    folder, held = checkpoint
    cast, loaded = nn.Module.float(load(folder)), load(folder, dtype=torch.float32)  # transformers' own refuses
    assert mk.check_model(cast) == 2
    assert torch.equal(cast(input_ids=IDS).logits, loaded(input_ids=IDS).logits)
    assert torch.equal(experts_of(cast)._parameters["down_proj"], held[f"{EXPERTS}.down_proj_blocks"])
    with torch.autocast("cpu", BF16):
        assert_close(step(with_lora(cast)), step(with_lora(load_whole(folder).float())))


@pytest.mark.plain_memory
def test_compiled(checkpoint: Checkpoint) -> None:
    model = with_lora(load(checkpoint[0]))
    mk.check_model(model)
    expected = step(model)
    model.base_model.model.model.layers[1].compile(backend="aot_eager", fullgraph=True)
    assert_close(step(model), expected)
