"""Expert weights in bitsandbytes' 4 bits, a block of experts at a time, against the whole weight dequantised."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from moe_kernels import backends
from moe_kernels import packed as packed_weights
from moe_kernels.integrations.quantized import packed_weight
from moe_kernels.kernels.triton import dequantize
from support.lora_step import IDS
from support.models import tiny_config, tiny_model
from support.tiles import use_small_tiles

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
parametrize = pytest.importorskip("bitsandbytes.nn.parametrize")
mk = pytest.importorskip("moe_kernels.integrations.transformers")
conformance = pytest.importorskip("support.conformance")

HIDDEN, INTERMEDIATE = 64, 128
DISTINCT = conformance.distinct()


@pytest.fixture(autouse=True)
def _two_experts_a_block(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """5 experts of a gated up projection make three blocks, the last of one expert; of half the size, two.

    Sizes are multiples of 64: on a CPU, bitsandbytes dequantises rows that are shorter than a block wrongly.
    """
    mk.register(backend="torch")
    backends.reset_dispatch_counts()
    monkeypatch.setattr(conformance, "_HIDDEN", HIDDEN)
    monkeypatch.setitem(conformance._TINY, r"hidden_size$", HIDDEN)
    monkeypatch.setitem(conformance._TINY, r"intermediate_size$", INTERMEDIATE)
    monkeypatch.setattr(packed_weights, "BLOCK_BYTES", 4 * HIDDEN * INTERMEDIATE * 4)
    yield
    mk.register()


def in_4_bits(experts: nn.Module, nested: bool = True) -> nn.Module:
    """As Axolotl's quantize_moe_experts does it at load."""
    experts = copy.deepcopy(experts)
    for name in ("gate_up_proj", "up_proj", "down_proj"):
        if hasattr(experts, name):
            parametrize.replace_parameter_4bit(experts, name, compress_statistics=nested, quant_type="nf4")
    for parameter in experts.parameters():
        parameter.requires_grad_(False)
    return experts


def dequantised(packed: nn.Module) -> nn.Module:
    """The same values in a plain module."""
    [cls] = {found.cls for found in DISTINCT.values() if isinstance(packed, found.cls)}
    plain = conformance.build(cls)
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(False).copy_(getattr(packed, name) if "." not in name else parameter)
    return plain


def run(experts: nn.Module, implementation: str, routing: str = "random") -> dict[str, torch.Tensor]:
    experts.config._experts_implementation = implementation
    inputs = conformance.make_inputs(routing, torch.float32, torch.float32, torch.device("cpu"))
    x, weights = inputs.hidden_states.requires_grad_(), inputs.top_k_weights.requires_grad_()
    out = experts(x, inputs.top_k_index, weights)
    out.backward(inputs.grad)
    gradients = {name: p.grad for name, p in experts.named_parameters() if p.requires_grad}
    return {"out": out.detach(), "dx": x.grad, "dweights": weights.grad} | gradients


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, value in expected.items():
        assert value.abs().max() > 0, name
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


class Int8(nn.Module):
    """Rows of 8 bits, as Axolotl keeps them with load_in_8bit."""

    def __init__(self, scales: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("scales", scales)

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        return codes * self.scales


def test_integers_in_another_form_are_refused() -> None:
    """Read as an attribute they would be served, with all experts dequantised and kept for every layer."""
    experts = conformance.build(DISTINCT["gate_up | silu"].cls)
    scales = experts.down_proj.detach().abs().amax(-1, keepdim=True) / 127
    codes = nn.Parameter((experts.down_proj.detach() / scales).round().to(torch.int8), requires_grad=False)
    experts.down_proj = codes
    nn.utils.parametrize.register_parametrization(experts, "down_proj", Int8(scales), unsafe=True)
    said = r"down_proj is in torch.int8, packed by Int8, .* nf4_backend: bitsandbytes"
    with pytest.raises(mk.UnsupportedExperts, match=said):
        run(experts, "moe_kernels")
    with pytest.raises(mk.UnsupportedExperts, match=f"^experts .*{said}"):
        mk.check_model(nn.ModuleDict({"experts": experts}))


def test_what_axolotl_packs_on_the_cpu_is_read_or_refused() -> None:
    """0.21's qlora_sharded_model_loading and nf4_backend: torchao."""
    nf4 = pytest.importorskip("axolotl.utils.nf4", reason="Axolotl before 0.21")
    whole = conformance.build(DISTINCT["gate_up | silu"].cls).requires_grad_(False)
    staged, others = copy.deepcopy(whole), copy.deepcopy(whole)
    for name in ("gate_up_proj", "down_proj"):
        data, state = nf4.quantize_bnb_4bit(getattr(whole, name).data, device="cpu", storage_device="cpu")
        packs = [(staged, data, nf4.BnbNF4Parametrization(state))]
        packs += [(others, *nf4.quantize_torchao_nf4(getattr(whole, name).data))]
        for experts, codes, transform in packs:
            setattr(experts, name, nn.Parameter(codes, requires_grad=False))
            nn.utils.parametrize.register_parametrization(experts, name, transform, unsafe=True)
    assert packed_weight(staged, "down_proj", torch.float32) is not None
    assert_same(run(staged, "moe_kernels"), run(dequantised(staged), "batched_mm"))
    staged.config._experts_implementation = "moe_kernels"
    assert mk.check_model(nn.ModuleDict({"experts": staged.to("meta")})) == 1  # as ranks but the first have it
    with pytest.raises(mk.UnsupportedExperts, match=r"uint8, packed by TorchaoNF4Parametrization, .* load_in_4bit"):
        run(others, "moe_kernels")


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("kind", DISTINCT)
def test_equals_the_whole_weight(kind: str, nested: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = in_4_bits(conformance.build(DISTINCT[kind].cls), nested)
    expected = run(dequantised(packed), "batched_mm" if "post" not in kind else "eager")

    def whole(*_: object) -> None:
        raise AssertionError("the whole weight was dequantised")

    monkeypatch.setattr(parametrize.Bnb4bitParametrization, "forward", whole)
    assert mk.why_not_module(packed) is None
    assert_same(run(packed, "moe_kernels"), expected)


@pytest.mark.plain_memory
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
def test_compiles_to_one_graph(nested: bool) -> None:
    experts = in_4_bits(conformance.build(next(iter(DISTINCT.values())).cls), nested)
    expected = run(experts, "moe_kernels")
    torch._dynamo.reset()
    experts.compile(fullgraph=True, backend="aot_eager")
    assert_same(run(experts, "moe_kernels"), expected)


@pytest.mark.parametrize("routing", ["one_hot_expert", "all_to_last", "empty_first_middle_last"])
def test_blocks_without_a_token(routing: str) -> None:
    packed = in_4_bits(conformance.build(DISTINCT["gate_up | silu"].cls))
    assert_same(run(packed, "moe_kernels", routing), run(dequantised(packed), "batched_mm", routing))


Seen = list[tuple[tuple[int, int], weakref.ref]]


def watched(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Grows by (first, last) and a weak reference whenever a block of a weight is dequantised."""
    in_torch, in_triton, seen = packed_weights.PackedWeight.experts, dequantize.dequantize, []

    def watch(real: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def experts(weight: packed_weights.PackedWeight, first: int, last: int) -> torch.Tensor:
            assert [alive for _, alive in seen if alive() is not None] == [], "two blocks at a time"
            out = real(weight, first, last)
            seen.append(((first, last), weakref.ref(out if out._base is None else out._base)))
            return out

        return experts

    monkeypatch.setattr(packed_weights.PackedWeight, "experts", watch(in_torch))
    monkeypatch.setattr(dequantize, "dequantize", watch(in_triton))
    return seen


def test_a_block_is_dequantised_once_more_in_the_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """... and never two at a time."""
    mk.register(backend="triton")
    seen = watched(monkeypatch)
    with use_small_tiles():
        run(in_4_bits(conformance.build(DISTINCT["gate_up | silu"].cls)), "moe_kernels")
    up, down = [(0, 2), (2, 4), (4, 5)], [(0, 3), (3, 5)]
    assert [block for block, _ in seen] == [*up, *down, *down, *up]
    assert backends.dispatch_counts() == {"triton": 1}


@pytest.mark.parametrize("kind", [k for k in DISTINCT if k.startswith(("gate_up | silu", "interleaved", "up"))])
def test_nothing_dequantised_outlives_the_forward(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = in_4_bits(conformance.build(DISTINCT[kind].cls))
    expected = run(dequantised(packed), "batched_mm")
    packed.config._experts_implementation = "moe_kernels"
    inputs = conformance.make_inputs("random", torch.float32, torch.float32, torch.device("cpu"))
    x, weights = inputs.hidden_states.requires_grad_(), inputs.top_k_weights.requires_grad_()
    seen = watched(monkeypatch)
    out = packed(x, inputs.top_k_index, weights)
    assert len(seen) >= 2
    assert [alive for _, alive in seen if alive() is not None] == []
    for _ in range(2):  # the graph can be walked again
        x.grad = weights.grad = None
        out.backward(inputs.grad, retain_graph=True)
        assert_same({"out": out, "dx": x.grad, "dweights": weights.grad}, expected | {})


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_values_are_bitwise_those_of_bitsandbytes(quant_type: str, nested: bool, dtype: torch.dtype) -> None:
    from bitsandbytes.functional import dequantize_4bit

    holder = nn.Module()
    torch.manual_seed(0)
    holder.weight = nn.Parameter(torch.randn(5, 6, 64, dtype=dtype), requires_grad=False)
    parametrize.replace_parameter_4bit(holder, "weight", compress_statistics=nested, quant_type=quant_type)
    packed = packed_weight(holder, "weight", torch.bfloat16)
    chain = holder.parametrizations["weight"]
    expected = dequantize_4bit(chain.original, chain[0].quant_state).view(5, 6, 64)
    assert torch.equal(packed.experts(0, 5), expected)
    assert torch.equal(packed[3], expected[3])
    assert torch.equal(packed.mT.experts(2, 4), expected[2:4].mT)
    assert torch.equal(dequantize.dequantize(packed, 1, 4), expected[1:4])
    assert torch.equal(dequantize.dequantize(packed.to(torch.float32), 0, 5), expected.float())


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_around_a_layer(use_reentrant: bool) -> None:
    packed = in_4_bits(conformance.build(DISTINCT["gate_up | silu"].cls))
    expected = run(packed, "moe_kernels")
    inputs = conformance.make_inputs("random", torch.float32, torch.float32, torch.device("cpu"))
    x, weights = inputs.hidden_states.requires_grad_(), inputs.top_k_weights.requires_grad_()
    backends.reset_dispatch_counts()
    out = checkpoint(packed, x, inputs.top_k_index, weights, use_reentrant=use_reentrant)
    out.backward(inputs.grad)
    assert_same({"out": out, "dx": x.grad, "dweights": weights.grad}, expected)
    assert backends.dispatch_counts() == {"torch": 2}


def model_of(experts: nn.Module) -> nn.Module:
    experts.config._experts_implementation = "moe_kernels"
    model = nn.Module()
    model.mlp = nn.Module()
    model.mlp.experts = experts
    return model


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_blocks_across_experts_are_refused(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mk.register(backend=backend)
    monkeypatch.setattr(conformance, "_HIDDEN", 20)
    monkeypatch.setitem(conformance._TINY, r"hidden_size$", 20)
    monkeypatch.setitem(conformance._TINY, r"intermediate_size$", 36)
    packed = in_4_bits(conformance.build(DISTINCT["gate_up | silu"].cls))
    words = r"the 64 values of a 4-bit block do not divide an expert's \(72, 20\)"
    with pytest.raises(mk.UnsupportedExperts, match=rf"^mlp\.experts \(\w+\): gate_up_proj .*{words}"):
        mk.check_model(model_of(packed))
    with pytest.raises(mk.UnsupportedExperts, match=words):
        run(packed, "moe_kernels")


def test_check_model_does_not_dequantise(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watched(monkeypatch)

    def whole(*_: object) -> None:
        raise AssertionError("the whole weight was dequantised")

    monkeypatch.setattr(parametrize.Bnb4bitParametrization, "forward", whole)
    for found in DISTINCT.values():
        packed = in_4_bits(conformance.build(found.cls))
        assert mk.check_model(model_of(packed)) == 1
        packed.num_experts -= 1
        with pytest.raises(mk.UnsupportedExperts, match=r"^mlp\.experts .* holds weights of 5 experts"):
            mk.check_model(model_of(packed))
    assert seen == []


def test_without_gradients() -> None:
    packed = in_4_bits(conformance.build(DISTINCT["gate_up | silu"].cls))
    expected = run(packed, "moe_kernels")["out"]
    inputs = conformance.make_inputs("random", torch.float32, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        out = packed(inputs.hidden_states, inputs.top_k_index, inputs.top_k_weights)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("kind", [k for k in DISTINCT if k.startswith(("gate_up | silu", "interleaved", "up"))])
def test_lora_of_a_4_bit_base(kind: str) -> None:
    """QLoRA: the factors are cut into the same blocks."""
    from moe_kernels.integrations.peft import fuse_lora

    fuse_lora()

    class Model(nn.Module):
        def __init__(self, experts: nn.Module) -> None:
            super().__init__()
            self.mlp = nn.Module()
            self.mlp.experts = experts

    packed = in_4_bits(conformance.build(DISTINCT[kind].cls))
    plain = dequantised(packed)
    first = "up_proj" if kind.startswith("up") else "gate_up_proj"
    config = peft.LoraConfig(
        r=4,
        target_modules=[],
        target_parameters=[f"experts.{first}", "experts.down_proj"],
        init_lora_weights=False,
    )
    torch.manual_seed(0)
    wrapper = peft.get_peft_model(Model(plain), config).base_model.model.mlp.experts
    wrapper.get_base_layer().config._experts_implementation = "moe_kernels"
    inputs = conformance.make_inputs("random", torch.float32, torch.float32, torch.device("cpu"))

    def through() -> dict[str, torch.Tensor]:
        wrapper.zero_grad(set_to_none=True)
        out = wrapper(inputs.hidden_states, inputs.top_k_index, inputs.top_k_weights)
        out.backward(inputs.grad)
        return {"out": out.detach()} | {name: p.grad for name, p in wrapper.named_parameters() if p.requires_grad}

    expected = through()
    # The same adapters over the packed weights: only what they wrap is exchanged.
    inner = wrapper
    while isinstance(inner.base_layer, type(wrapper)):
        inner = inner.base_layer
    inner.base_layer = packed
    packed.config._experts_implementation = "moe_kernels"
    backends.reset_dispatch_counts()
    assert_same(through(), expected)
    assert backends.dispatch_counts() == {"torch": 1}


def test_factors_that_peft_left_in_a_weight_are_refused() -> None:
    """PEFT 0.21.0 does so in a forward of 4-bit weights without fuse_lora."""
    mk_peft = pytest.importorskip("moe_kernels.integrations.peft")

    class Left(nn.Identity):
        __module__ = "peft.tuners.lora.layer"

    holder = nn.Module()
    holder.experts = in_4_bits(conformance.build(DISTINCT["gate_up | silu"].cls))
    holder.experts.config._experts_implementation = "moe_kernels"
    config = peft.LoraConfig(r=4, target_modules=[], target_parameters=["experts.gate_up_proj"])
    plain = conformance.build(DISTINCT["gate_up | silu"].cls)
    packed, holder.experts = holder.experts, plain
    model = peft.get_peft_model(holder, config)
    wrapper = model.base_model.model.experts
    wrapper.base_layer = packed
    assert mk_peft.check_lora(model) == 1
    packed.parametrizations["gate_up_proj"].append(Left())
    with pytest.raises(ValueError, match=r"left its factors on gate_up_proj.*load the model again"):
        mk_peft.check_lora(model)


def qlora_model() -> Any:
    """Of two layers, with factors on both expert weights, which PEFT finds by their whole names alone."""
    config = tiny_config("qwen3_moe", hidden_size=HIDDEN, moe_intermediate_size=64)
    model = tiny_model(config, "moe_kernels")
    for name, experts in list(mk.experts_modules(model)):
        model.set_submodule(name, in_4_bits(experts))
    weights = [f"{n}.{w}" for n, _ in mk.experts_modules(model) for w in ("gate_up_proj", "down_proj")]
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj"], target_parameters=weights, init_lora_weights=False)
    model = peft.get_peft_model(model, lora).eval()
    assert mk.check_model(model).lora_weights == 4
    return model


@pytest.mark.parametrize("way", ["merge_adapter", "merge_and_unload"])
def test_merging_into_4_bits_is_refused(way: str) -> None:
    """PEFT would merge attention, and the experts into a copy: the logits would be those without their adapter."""
    model = qlora_model()
    before = model(IDS % 97).logits
    with pytest.raises(ValueError, match=r"is in 4 bits, into which PEFT cannot merge: load the model in 16 bits"):
        getattr(model, way)()
    assert torch.equal(model(IDS % 97).logits, before)


def test_an_adapter_over_4_bits_merges_into_the_plain_model(tmp_path: Path) -> None:
    """As docs/lora.md has it: PEFT gives the two adapters of a layer each other's names."""
    model = qlora_model()
    expected = model(IDS % 97).logits
    model.save_pretrained(tmp_path)
    plain = tiny_model(tiny_config("qwen3_moe", hidden_size=HIDDEN, moe_intermediate_size=64), "eager")
    held = dict(mk.experts_modules(model.unload()))
    for name, experts in mk.experts_modules(plain):
        for weight in ("gate_up_proj", "down_proj"):
            getattr(experts, weight).data.copy_(getattr(held[name], weight))
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)

    inner, outer = ".experts.base_layer.lora_", ".experts.lora_"

    def swapped(name: str) -> str:
        return name.replace(inner, outer) if inner in name else name.replace(outer, inner)

    file = tmp_path / "adapter_model.safetensors"
    save_file({swapped(name): factor for name, factor in load_file(file).items()}, file)
    merged = peft.PeftModel.from_pretrained(plain, tmp_path).merge_and_unload().eval()
    torch.testing.assert_close(merged(IDS % 97).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [k for k in DISTINCT if k.startswith(("gate_up | silu", "interleaved", "up"))])
@pytest.mark.parametrize("routing", ["random", "empty_first_middle_last", "all_to_last"])
def test_triton_backend(kind: str, routing: str) -> None:
    mk.register(backend="triton")
    packed = in_4_bits(conformance.build(DISTINCT[kind].cls))
    expected = run(dequantised(packed), "batched_mm", routing)
    with use_small_tiles():
        assert_same(run(packed, "moe_kernels", routing), expected)
