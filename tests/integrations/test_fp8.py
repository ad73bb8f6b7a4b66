"""Block-fp8 checkpoints of transformers: loaded, checked, trained with LoRA, saved."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn

from moe_kernels import backends, fp8
from moe_kernels.kernels.triton.dequantize import dequantize
from moe_kernels.problem import UnsupportedProblem
from support.fp8 import dequantised, save_model, write_checkpoint
from support.lora_step import IDS, assert_equal, step, with_lora
from support.tiles import use_small_tiles

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
mk = pytest.importorskip("moe_kernels.integrations.transformers")

from transformers import AutoModelForCausalLM, FineGrainedFP8Config  # noqa: E402
from transformers.integrations import finegrained_fp8  # noqa: E402
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer  # noqa: E402

from moe_kernels.integrations import fp8 as integration  # noqa: E402
from moe_kernels.integrations.fp8 import ExactFP8Linear  # noqa: E402
from moe_kernels.integrations.quantized import packed_weight  # noqa: E402

BF16 = torch.bfloat16
EXPERTS = "model.layers.1.mlp.experts"
NEWER = Version(transformers.__version__) >= Version("5.23")
Checkpoint = tuple[Path, dict[str, Tensor]]


@pytest.fixture(autouse=True)
def _without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """transformers dequantises the model where there is no GPU that multiplies fp8; here nothing does."""
    monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda *_, **__: None)
    mk.register(backend="torch")
    backends.reset_dispatch_counts()
    yield
    mk.register()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("fp8")
    return folder, write_checkpoint(folder, scales=BF16)  # as Qwen3's are published


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=BF16, experts_implementation="moe_kernels", **options)


def bytes_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone().view(torch.uint8) for name, p in model.named_parameters() if "lora_" not in name}


def test_lora_is_bitwise_that_over_the_dequantised_model(checkpoint: Checkpoint) -> None:
    folder, _ = checkpoint
    model = with_lora(load(folder))
    held = bytes_of(model)
    served = mk.check_model(model)
    assert (served, served.lora_weights) == (2, 4)
    assert served.adapted.routed_experts > served.adapted.attention > 0
    found = step(model)
    assert backends.dispatch_counts() == {"torch": 2}
    whole = with_lora(load(folder, quantization_config=FineGrainedFP8Config(dequantize=True)))
    mk.check_model(whole)
    expected = step(whole)
    assert len([name for name in expected if "experts" in name]) == 8
    assert_equal(found, expected)
    for name, value in bytes_of(model).items():
        assert torch.equal(value, held[name]), name


@pytest.mark.parametrize("weight", ["mlp.experts.down_proj", "self_attn.q_proj.weight"])
def test_lora_on_the_scales_is_refused(checkpoint: Checkpoint, weight: str) -> None:
    model = with_lora(load(checkpoint[0]), {"target_parameters": [f"{weight}_scale_inv"]})
    name = weight.rpartition(".")[2]
    with pytest.raises(ValueError, match=rf"LoRA is on {name}_scale_inv, the scales.* write {name} in target_param"):
        mk.check_model(model)


def test_the_implementation_can_be_named_after_loading(checkpoint: Checkpoint) -> None:
    """As Axolotl 0.19 does."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint[0], dtype=BF16)
    model.set_experts_implementation("moe_kernels")
    assert mk.check_model(model) == 2
    named = load(checkpoint[0])
    mk.check_model(named)
    assert torch.equal(model(input_ids=IDS).logits, named(input_ids=IDS).logits)


def test_another_implementation_is_refused_with_its_cure(checkpoint: Checkpoint) -> None:
    model = load(checkpoint[0])
    model.set_experts_implementation("eager")
    with pytest.raises(mk.UnsupportedExperts, match=r"runs experts_implementation='eager', .* load the model with"):
        mk.check_model(model)


def test_the_kernels_run_on_the_weights_as_they_are(checkpoint: Checkpoint) -> None:
    folder, _ = checkpoint
    model = with_lora(load(folder))
    mk.check_model(model)
    expected = step(model)
    mk.register(backend="triton")
    with use_small_tiles():
        found = step(model)
    assert backends.dispatch_counts() == {"torch": 2, "triton": 2}
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 0.02 * value.norm(), name


@pytest.mark.parametrize(
    ("intermediate", "scale_dtype"), [(256, torch.float32), (192, BF16), (224, BF16), (64, BF16)]
)
def test_values_are_bitwise_those_of_the_checkpoint(
    tmp_path: Path, intermediate: int, scale_dtype: torch.dtype
) -> None:
    """Sizes that are no multiple of 128 too: gate and up have blocks of their own. transformers' own dequantisation
    spreads the scales of such sizes evenly, which is wrong."""
    held = write_checkpoint(tmp_path, intermediate, scale_dtype)
    if intermediate == 192 and NEWER:  # four scales in a column, and they want the three of 384 rows
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            load(tmp_path)
        return
    experts = experts_of(load(tmp_path))
    for expert in range(4):
        gate, up, down = (
            dequantised(held[key], held[f"{key}_scale_inv"])
            for key in (f"{EXPERTS}.{expert}.{name}_proj.weight" for name in ("gate", "up", "down"))
        )
        for name, value in (("gate_up_proj", torch.cat([gate, up])), ("down_proj", down)):
            packed = packed_weight(experts, name, BF16)
            assert torch.equal(packed[expert], value)
            assert torch.equal(dequantize(packed, expert, expert + 1)[0], value)


@pytest.mark.parametrize("intermediate", [256, 192])
def test_a_model_that_is_quantised_as_it_is_loaded(tmp_path: Path, intermediate: int) -> None:
    """Of sizes that are no multiple of 128, transformers quantises gate and up together, so that a block lies in
    both, and 5.20 casts the down projection to e4m3 without a scale."""
    save_model(tmp_path, intermediate)
    model = load(tmp_path, quantization_config=FineGrainedFP8Config(modules_to_not_convert=["lm_head", "mlp.gate"]))
    experts = experts_of(model)
    assert experts.gate_up_proj.dtype == torch.float8_e4m3fn
    if intermediate % 128:
        with pytest.raises(mk.UnsupportedExperts, match=r"gate_up_proj \(4, 384, 256\) has scales .*\(4, 3, 2\)"):
            mk.check_model(model)
        return
    for name in ("gate_up_proj", "down_proj"):
        packed = packed_weight(experts, name, BF16)
        for expert in range(4):
            parts = (getattr(experts, f"{name}{end}")[expert].detach() for end in ("", "_scale_inv"))
            assert torch.equal(packed[expert], dequantised(*parts))
    assert mk.check_model(with_lora(model)).lora_weights == 4


@pytest.mark.parametrize("scheme", ["dynamic", "static"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ["silu", "gelu", "relu2", "swiglu_oai"])
def test_activations(activation: str, gated: bool, scheme: str) -> None:
    """FP8Experts has an _apply_gate of its own, found out by the same probe as every other's. Scales of activations
    are not used."""
    if activation == "swiglu_oai" and not gated:
        pytest.skip("it is a gate")
    up = "gate_up_proj" if gated else "up_proj"
    config = transformers.Qwen3MoeConfig(hidden_size=64, moe_intermediate_size=48, num_experts=5, hidden_act="silu")
    if activation == "swiglu_oai":
        config.swiglu_alpha, config.swiglu_limit = 1.702, 7.0
    else:
        config.hidden_act = activation
    cls = transformers.integrations.moe.use_experts_implementation(
        experts_class=type("Experts", (finegrained_fp8.FP8Experts,), {}),
        experts_interface=finegrained_fp8.ALL_FP8_EXPERTS_FUNCTIONS,
        has_gate=gated,
    )
    experts = cls(config, block_size=(128, 128), activation_scheme=scheme, has_gate=gated)
    torch.manual_seed(0)
    for name, parameter in experts.named_parameters():
        values = torch.rand(parameter.shape) * 0.01 if "scale" in name else torch.randn(parameter.shape) * 16
        parameter.requires_grad_(False).copy_(values.to(parameter.dtype))
    plain = copy.deepcopy(experts)
    for name in (up, "down_proj"):
        setattr(plain, name, nn.Parameter(packed_weight(experts, name, torch.float32).experts(0, 5), False))
    index, weights = torch.randint(0, 5, (11, 2)), torch.rand(11, 2)
    found = []
    for module, implementation in ((experts, "moe_kernels"), (plain, "eager")):  # which multiplies 16 and 32 bits
        module.config = copy.deepcopy(config)
        module.config._experts_implementation = implementation
        torch.manual_seed(1)
        x = torch.randn(11, 64, requires_grad=True)
        out = module(x, index, weights)
        out.backward(torch.randn(11, 64))
        found.append((out.detach(), x.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, BF16], ids=["codes", "codes as FSDP2 casts them"])
def test_lora_without_check_model_is_refused(
    dtype: torch.dtype, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT's own way: an adapter without effect, and beside codes in bfloat16 experts without scales."""
    wrapper = peft.tuners.lora.layer.ParamWrapper
    if hasattr(wrapper._activate_lora, "_moe_kernels"):  # by another test
        monkeypatch.setattr(wrapper, "_activate_lora", wrapper._activate_lora.__wrapped__)
    model = with_lora(load(checkpoint[0]))
    experts = model.get_submodule(f"base_model.model.{EXPERTS}")
    for _, module in mk.experts_modules(model):
        for name in ("gate_up_proj", "down_proj"):
            module._parameters[name].data = module._parameters[name].data.to(dtype)
    x, index = torch.randn(5, 256, dtype=BF16), torch.arange(10).view(5, 2) % 4
    with pytest.raises(mk.UnsupportedExperts, match=r"in fp8 and PEFT adds its LoRA to the codes.*call check_model"):
        experts(x, index, torch.ones(5, 2, dtype=BF16))


def test_an_adapter_on_the_weight_of_a_linear_layer(checkpoint: Checkpoint) -> None:
    """PEFT's own way adds B A to the codes. For the shared expert of DeepSeek-V3 it is the only way to name it."""
    names = {"target_modules": [], "target_parameters": ["mlp.experts.down_proj", "k_proj.weight", "o_proj.weight"]}
    found, expected = [], []
    for steps, options in ((found, {}), (expected, {"quantization_config": FineGrainedFP8Config(dequantize=True)})):
        model = with_lora(load(checkpoint[0], **options), names)
        served = mk.check_model(model)
        assert (served.lora_weights, served.adapted.attention) == (2, 4 * (256 + 128) * 2 + 4 * 512 * 2)
        steps.append(step(model))
        with model.disable_adapter():
            steps.append({"logits": model(input_ids=IDS).logits.detach()})
    assert_equal(found[1], expected[1])
    for name, value in expected[0].items():
        assert (found[0][name] - value).norm() <= 0.03 * value.norm(), name


def test_saved_and_loaded_it_is_the_same_checkpoint(checkpoint: Checkpoint, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder, held = checkpoint
    model = with_lora(load(folder))
    mk.check_model(model)
    logits = step(model)["logits"]
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(folder), tmp_path / "adapter")
    mk.check_model(again)
    assert torch.equal(again(input_ids=IDS).logits, logits)
    model.unload().save_pretrained(tmp_path / "base")
    saved = load_file(tmp_path / "base" / "model.safetensors")
    assert saved.keys() == held.keys()
    for name, value in held.items():
        assert torch.equal(saved[name].to(value.dtype).view(torch.uint8), value.view(torch.uint8)), name


@pytest.mark.parametrize("way", ["merge_adapter", "merge_and_unload"])
def test_merging_into_fp8_is_refused(checkpoint: Checkpoint, way: str) -> None:
    model = with_lora(load(checkpoint[0]))
    mk.check_model(model)
    held = bytes_of(model)
    with pytest.raises(ValueError, match=r"is in fp8, into which PEFT cannot merge: .*dequantize=True"):
        getattr(model, way)()
    for name, value in bytes_of(model).items():
        assert torch.equal(value, held[name]), name


def test_the_adapter_merges_into_the_dequantised_model(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder, _ = checkpoint
    model = with_lora(load(folder))
    mk.check_model(model)
    logits = step(model)["logits"].float()
    model.save_pretrained(tmp_path)
    whole = load(folder, quantization_config=FineGrainedFP8Config(dequantize=True)).float()
    merged = peft.PeftModel.from_pretrained(whole, tmp_path).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged", save_original_format=False)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert not hasattr(again.config, "quantization_config")
    for model in (merged, again):
        found = model(input_ids=IDS).logits
        assert (found - logits).norm() <= 0.02 * logits.norm()


def test_trainer_takes_the_model(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """transformers before 5.23 says "that quantization method do not support training"."""
    model = with_lora(load(checkpoint[0]))
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, use_cpu=True, report_to=[], learning_rate=1e-2, save_strategy="no"
    )
    data = [{"input_ids": row, "labels": row} for row in IDS]
    mk.check_model(model)
    trainer = transformers.Trainer(model, arguments, train_dataset=data)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer.train()
    assert trainer.state.global_step == 2
    for name, value in before.items():
        assert not torch.equal(model.get_parameter(name), value), name


# ----------------------------------------------------------------------------------------- activations in fp8 too
def test_activations_in_fp8(checkpoint: Checkpoint) -> None:
    """Near the exact mode and not equal; the checkpoint untouched."""
    folder, _ = checkpoint
    exact = with_lora(load(folder))
    mk.check_model(exact)
    expected = step(exact)
    mk.register(backend="torch", fp8_activations=True)
    model = with_lora(load(folder))
    held = bytes_of(model)
    assert mk.check_model(model) == 2
    found = step(model)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name] - value).float().norm() / value.float().norm()
        assert error < 0.1, name
        assert error > 0 or name == "loss", name
    for name, value in bytes_of(model).items():
        assert torch.equal(value, held[name]), name
    mk.register(backend="triton", fp8_activations=True)
    with use_small_tiles():
        kernels = step(model)
    assert backends.dispatch_counts() == {"torch": 4, "triton": 2}
    for name, value in found.items():  # A rounded to bfloat16 or not may be another number of e4m3
        assert (kernels[name] - value).norm() <= 0.05 * value.norm(), name


def test_the_transposed_codes_are_made_once(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(integration, "transposed", lambda codes: made.append(codes.shape) or fp8.transposed(codes))
    monkeypatch.setattr(integration, "interpreting", lambda: True)
    mk.register(backend="torch", fp8_activations=True)
    model = with_lora(load(checkpoint[0]))
    mk.check_model(model)
    assert made == []
    with torch.no_grad():
        model(input_ids=IDS)
    assert made == []
    step(model)
    step(model)
    sizes = 2 * [torch.Size((4, 512, 256)), torch.Size((4, 256, 256))]
    assert made == sizes
    [weight] = [p for name, p in model.named_parameters() if "layers.1" in name and name.endswith("down_proj")]
    with torch.no_grad():
        weight.view(torch.uint8)[0, 0, 1] = 3
    step(model)
    assert made == [*sizes, weight.shape]
    [(_, copy)] = integration._copies[weight.untyped_storage()].values()
    assert torch.equal(copy.float(), weight.detach().float().mT)
    weight.data.view(torch.uint8)[0, 0, 2] = 3  # torch counts no write through .data
    mk.check_model(model)
    step(model)
    [(_, copy)] = integration._copies[weight.untyped_storage()].values()
    assert torch.equal(copy.float(), weight.detach().float().mT)
    before = len(integration._copies)
    del model, weight, _
    gc.collect()
    assert len(integration._copies) == before - 4


def test_the_transposed_codes_leave_a_device_with_the_codes(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`model.to("cpu")` puts other memory behind the same parameters."""
    monkeypatch.setattr(integration, "interpreting", lambda: True)
    mk.register(backend="torch", fp8_activations=True)
    model = with_lora(load(checkpoint[0]))
    mk.check_model(model)
    before = step(model)
    experts = [module for _, module in mk.experts_modules(model)]
    codes = [module._parameters[name] for module in experts for name in ("gate_up_proj", "down_proj")]
    assert sum(map(integration.copied_bytes, experts)) == sum(weight.nbytes for weight in codes)
    copies = [weakref.ref(integration._transposed(weight)) for weight in codes]
    for weight in codes:
        weight.data = weight.data.clone()
    gc.collect()
    assert [copy() for copy in copies] == [None] * 4
    assert sum(map(integration.copied_bytes, experts)) == 0
    assert_equal(step(model), before)


def test_activations_in_fp8_need_experts_in_fp8(checkpoint: Checkpoint) -> None:
    mk.register(backend="torch", fp8_activations=True)
    model = load(checkpoint[0], quantization_config=FineGrainedFP8Config(dequantize=True))
    said = r"gate_up_proj is in torch.bfloat16 \(.*8\.9 .*\): leave fp8_activations \(moe_fp8_activations in YAML\)"
    with pytest.raises(mk.UnsupportedExperts, match=r"^model\.layers\.0\.mlp\.experts \(.*" + said):
        mk.check_model(model)
    with pytest.raises(mk.UnsupportedExperts, match=said):
        model(input_ids=IDS)
    with pytest.raises(ValueError, match="fp8_activations=1 must be true or false"):
        mk.register(fp8_activations=1)


def test_activations_in_fp8_need_a_gpu_that_multiplies_it(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    mk.register(backend="torch", fp8_activations=True)
    model = load(checkpoint[0]).eval()
    monkeypatch.setattr(fp8, "device_capability", lambda device: (8, 0))
    said = r"a GPU of compute capability \(8, 0\) does not multiply fp8, .*: leave fp8_activations"
    with pytest.raises(mk.UnsupportedExperts, match=r"experts \(.*gate_up_proj: " + said):
        mk.check_model(model)
    ids = torch.tensor([[0, 1]] * 3)
    with pytest.raises(UnsupportedProblem, match=said), torch.no_grad():
        experts_of(model)(torch.randn(3, 256, dtype=BF16), ids, torch.ones(3, 2, dtype=BF16))


@pytest.mark.plain_memory
def test_activations_in_fp8_are_not_compiled(checkpoint: Checkpoint) -> None:
    mk.register(backend="torch", fp8_activations=True)
    model = load(checkpoint[0]).eval()
    mk.check_model(model)
    experts = experts_of(model)
    x, ids, weights = torch.randn(3, 256, dtype=BF16), torch.tensor([[0, 1]] * 3), torch.ones(3, 2, dtype=BF16)
    compiled = torch.compile(lambda: experts(x, ids, weights), backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match=r"torch\.compile would take the weights dequantised"), torch.no_grad():
        compiled()


def experts_of(model: Any) -> Any:
    return model.get_submodule(EXPERTS)


def without_scales(model: Any) -> None:
    experts_of(model).down_proj_scale_inv = None


def scales(change: Callable[[Tensor], Tensor], name: str = "down_proj") -> Callable[[Any], None]:
    def apply(model: Any) -> None:
        loaded = getattr(experts_of(model), f"{name}_scale_inv")  # what transformers has loaded it marks
        loaded.data = change(loaded.detach().clone())

    return apply


def weights(dtype: torch.dtype) -> Callable[[Any], None]:
    def apply(model: Any) -> None:
        experts = experts_of(model)
        experts.down_proj = nn.Parameter(experts.down_proj.detach().float().to(dtype), False)

    return apply


def value(number: float) -> Callable[[Tensor], Tensor]:
    def put(tensor: Tensor) -> Tensor:
        tensor[2, 1, 0] = number
        return tensor

    return put


def smaller_blocks(model: Any) -> None:
    experts_of(model).block_size = [64, 64]


def in_training(model: Any) -> None:
    model.train()
    experts_of(model).down_proj.requires_grad_()


def linear_in_training(model: Any) -> None:
    model.train()
    model.get_submodule("model.layers.0.self_attn.q_proj").weight.requires_grad_()


def one_linear(model: Any) -> None:
    linear = model.get_submodule("model.layers.0.self_attn.q_proj")
    linear.weight_scale_inv.data.zero_()


@pytest.mark.skipif(NEWER, reason="there they have a backward of their own")
def test_grouped_linear_layers_are_refused(checkpoint: Checkpoint) -> None:
    """DeepSeek-V4's."""
    model = load(checkpoint[0])
    model.get_submodule("model.layers.0.self_attn.q_proj").__class__ = finegrained_fp8.FP8GroupedLinear
    with pytest.raises(mk.UnsupportedExperts, match=r"q_proj \(FP8GroupedLinear\): .* 5\.23: install that"):
        mk.check_model(model)


WHERE = r"^model\.layers\.1\.mlp\.experts \(FP8Experts\): "


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (without_scales, WHERE + "down_proj is float8_e4m3fn without its scales.*dequantize=True"),
        (scales(lambda t: t[:3]), WHERE + r"down_proj .* \(3, 2, 2\) .* read are .* \(4, 2, 2\),.*dequantize=True"),
        (scales(lambda t: t.repeat_interleave(2, 1)), WHERE + r"down_proj .*\(4, 4, 2\).*dequantize=True"),
        (scales(lambda t: t[:, :1, :1]), WHERE + "down_proj.*dequantize=True"),
        (scales(lambda t: t.half()), WHERE + "down_proj .* torch.float16.*dequantize=True"),
        (smaller_blocks, WHERE + r"gate_up_proj .* blocks of \[64, 64\]; .* 128 x 128.*dequantize=True"),
        (scales(value(float("nan"))), WHERE + r"down_proj_scale_inv\[2, 1, 0\] is nan, .* again"),
        (scales(value(0.0)), WHERE + r"down_proj_scale_inv\[2, 1, 0\] is 0.0, .* again"),
        (scales(value(-1.0), "gate_up_proj"), WHERE + r"gate_up_proj_scale_inv\[2, 1, 0\] is -1.0"),
        (scales(value(float("inf"))), WHERE + r"down_proj_scale_inv\[2, 1, 0\] is inf"),
        (scales(value(float("-inf"))), WHERE + r"down_proj_scale_inv\[2, 1, 0\] is -inf"),
        (weights(torch.float8_e5m2), WHERE + "down_proj is torch.float8_e5m2 beside scales of fp8.*dequantize=True"),
        (weights(torch.int8), WHERE + "down_proj is torch.int8 beside scales of fp8.*dequantize=True"),
        (in_training, WHERE + r"down_proj is to be trained .* LoRA.*dequantize=True"),
        (linear_in_training, r"^model\.layers\.0\.self_attn\.q_proj \(FP8Linear\): weight is to be trained"),
        (one_linear, r"^model\.layers\.0\.self_attn\.q_proj \(FP8Linear\): weight_scale_inv\[0, 0\] is 0.0"),
    ],
)
def test_what_is_refused_before_training(
    checkpoint: Checkpoint, spoil: Callable[[Any], None], words: str
) -> None:
    model = load(checkpoint[0])
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    spoil(model)
    with pytest.raises(mk.UnsupportedExperts, match=words):
        mk.check_model(model)


@pytest.mark.parametrize("garbage", [1.0, float("nan")])
@pytest.mark.parametrize("module", ["model.layers.1.self_attn.q_proj", EXPERTS])
def test_scales_that_the_checkpoint_lacks_are_refused(tmp_path: Path, module: str, garbage: float) -> None:
    """transformers leaves them as memory was found: a scale may be any number."""
    from safetensors.torch import save_file

    held = write_checkpoint(tmp_path)
    kept = {name: held[name] for name in held if not (name.startswith(module) and name.endswith("_scale_inv"))}
    assert len(held) - len(kept) == (12 if module == EXPERTS else 1)
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    model = load(tmp_path)
    for name, parameter in model.get_submodule(module).named_parameters(recurse=False):
        if name.endswith("_scale_inv"):
            parameter.data.fill_(garbage)
    with pytest.raises(mk.UnsupportedExperts, match=r"_scale_inv is not in the checkpoint.*modules_to_not_convert"):
        mk.check_model(model)


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("part", ["", "model.layers.0.self_attn.q_proj", EXPERTS])
def test_codes_that_were_cast_are_refused(checkpoint: Checkpoint, part: str, checked: bool) -> None:
    """model.to(torch.bfloat16) makes weights of the codes, up to 448, and leaves their scales out."""
    model = load(checkpoint[0])
    if checked:
        mk.check_model(model)
    model.get_submodule(part).to(BF16)
    with pytest.raises(mk.UnsupportedExperts, match=r"is torch.bfloat16 beside the scales .*dequantize=True"):
        model(input_ids=IDS) if checked else mk.check_model(model)


def test_a_model_that_was_only_loaded_is_checked_and_not_trained(checkpoint: Checkpoint) -> None:
    """from_pretrained leaves requires_grad on fp8 weights."""
    model = load(checkpoint[0])
    assert experts_of(model).down_proj.requires_grad
    assert mk.check_model(model) == 2
    assert model(input_ids=IDS).logits.isfinite().all()
    model.train()
    with pytest.raises(mk.UnsupportedExperts, match="is to be trained"):
        model(input_ids=IDS)
    with torch.no_grad():
        model(input_ids=IDS)


def test_experts_in_4_bits_are_refused_with_a_cure_that_works(tmp_path: Path) -> None:
    """DeepSeek-V4's: mxfp4, in transformers' module for fp8."""
    import json

    from safetensors.torch import save_file

    from support import mxfp4

    held = write_checkpoint(tmp_path)
    for name in [name for name in held if ".experts." in name and name.endswith(".weight")]:
        codes, powers = mxfp4.quantised(dequantised(held[name], held[f"{name}_scale_inv"])[None])
        held[name], held[f"{name}_scale_inv"] = codes[0].flatten(-2).view(torch.int8), powers[0]
        held[f"{name}_scale_inv"] = held[f"{name}_scale_inv"].view(torch.float8_e8m0fnu)
    save_file(held, tmp_path / "model.safetensors", {"format": "pt"})
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["expert_dtype"] = "fp4"
    config["quantization_config"] |= {"scale_fmt": "ue8m0", "expert_dtype": "fp4"}  # 5.24 looks for it there
    path.write_text(json.dumps(config))
    with pytest.raises(mk.UnsupportedExperts, match=r"gate_up_proj is torch.int8 beside scales .*dequantize=True"):
        mk.check_model(load(tmp_path))
    whole = load(tmp_path, quantization_config=FineGrainedFP8Config(dequantize=True))
    assert mk.check_model(whole) == 2
    for expert in range(4):
        key = f"{EXPERTS}.{expert}.down_proj.weight"
        parts = held[key].view(torch.uint8).unflatten(-1, (-1, 16)), held[f"{key}_scale_inv"].view(torch.uint8)
        assert torch.equal(experts_of(whole).down_proj[expert], mxfp4.dequantised(*parts))


def test_powers_of_two_as_scales(checkpoint: Checkpoint) -> None:
    """scale_fmt="ue8m0", DeepSeek-V4's."""
    model = load(checkpoint[0])
    before = scales(lambda t: t.float().log2().ceil().exp2())
    before(model)
    expected = packed_weight(experts_of(model), "down_proj", BF16).experts(0, 4)
    scales(lambda t: t.to(torch.float8_e8m0fnu))(model)
    assert torch.equal(packed_weight(experts_of(model), "down_proj", BF16).experts(0, 4), expected)
    assert mk.check_model(model) == 2


def test_factors_in_fp8_are_refused(checkpoint: Checkpoint) -> None:
    """PEFT makes them in the dtype of the weight where it is asked not to cast them."""
    model = with_lora(load(checkpoint[0]), autocast_adapter_dtype=False)
    with pytest.raises(ValueError, match=r"factors of \w+ are float8_e4m3fn, .* float32"):
        mk.check_model(model)


def test_the_linear_layers_keep_no_dequantised_weight(checkpoint: Checkpoint) -> None:
    model = load(checkpoint[0])
    mk.check_model(model)
    linear = model.get_submodule("model.layers.0.self_attn.q_proj")
    assert type(linear) is ExactFP8Linear
    x, grad = torch.randn(3, 5, 256, dtype=BF16, requires_grad=True), torch.randn(3, 5, 256, dtype=BF16)
    weight = dequantised(linear.weight.detach(), linear.weight_scale_inv.detach())
    [expected_dx] = torch.autograd.grad(expected := nn.functional.linear(x, weight), x, grad)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = linear(x)
    assert saved == []
    [dx] = torch.autograd.grad(out, x, grad)
    assert torch.equal(out, expected)
    assert torch.equal(dx, expected_dx)
    with torch.autocast("cpu", BF16):
        assert torch.equal(linear(x.float()), expected)
    out = linear(x)
    linear.load_state_dict(linear.state_dict())
    with pytest.raises(RuntimeError, match="was written to between forward and backward"):
        out.backward(grad)


def test_shapes_on_meta(checkpoint: Checkpoint) -> None:
    model = load(checkpoint[0])
    mk.check_model(model)
    assert type(model.get_submodule("model.layers.0.self_attn.q_proj")) is ExactFP8Linear
    for autocast in (False, True):
        with torch.autocast("cpu", BF16, enabled=autocast):
            logits = model.to("meta")(input_ids=IDS.to("meta")).logits
        assert (logits.shape, logits.dtype, logits.device.type) == ((*IDS.shape, 128), BF16, "meta")


@pytest.mark.plain_memory
def test_compiled(checkpoint: Checkpoint) -> None:
    model = with_lora(load(checkpoint[0]))
    mk.check_model(model)
    expected = step(model)
    layer = model.base_model.model.model.layers[1]
    layer.compile(backend="aot_eager", fullgraph=True)
    found = step(model)
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 0.02 * value.norm(), name
