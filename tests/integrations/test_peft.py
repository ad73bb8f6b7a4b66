"""LoRA on expert weights inside the kernels, against PEFT's own way: the weight with its delta added, run eagerly."""

from __future__ import annotations

import copy
import importlib
import logging
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moe_kernels import backends
from moe_kernels.factors import LowRank
from support.models import tiny_config, tiny_model
from support.tiles import use_small_tiles

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
mk = pytest.importorskip("moe_kernels.integrations.transformers")
mk_peft = pytest.importorskip("moe_kernels.integrations.peft")

VOCAB, EXPERTS = 53, 4
SIZES = {"vocab_size": VOCAB, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
# Name of the first weight.
MODELS = {"mixtral": "gate_up_proj", "gpt_oss": "gate_up_proj", "nemotron_h": "up_proj"}
LAYERS = 2
CLOSE = {"rtol": 2e-4, "atol": 2e-5}


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    mk.register(backend="torch")
    mk_peft.fuse_lora()
    backends.reset_dispatch_counts()
    yield
    mk.register()


def lora(name: str, targets: str = "both", **changes) -> peft.LoraConfig:
    weights = {"both": [MODELS[name], "down_proj"], "first": [MODELS[name]], "down": ["down_proj"]}[targets]
    settings = {"r": 5, "lora_alpha": 3, "init_lora_weights": False, "target_modules": ["q_proj"]}
    return peft.LoraConfig(target_parameters=[f"experts.{weight}" for weight in weights], **settings | changes)


def fill(model: nn.Module) -> None:
    """A generator of their own, so that a second adapter differs from the first."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                size = 0.3 if "lora" in name else 0.25
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)


def stock(name: str) -> nn.Module:
    blocks = {"num_hidden_layers": 3, "layers_block_type": ["full_attention", "moe", "moe"]}
    return tiny_model(tiny_config(name, **SIZES, **(blocks if name == "nemotron_h" else {})))


def adapted(name: str, config: peft.LoraConfig | None = None) -> peft.PeftModel:
    model = stock(name)
    model = peft.get_peft_model(model, config or lora(name))
    fill(model)
    return model


def ours(model: peft.PeftModel) -> peft.PeftModel:
    """A copy on our kernels."""
    model = copy.deepcopy(model)
    model.get_base_model().set_experts_implementation("moe_kernels")
    assert mk.check_model(model) == LAYERS
    return model


def run(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    ids = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(3))
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    return out.logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def assert_same(actual: tuple, expected: tuple) -> None:
    torch.testing.assert_close(actual[0], expected[0], **CLOSE)
    assert actual[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        if grad is None:
            assert actual[1][name] is None, name
            continue
        assert grad.abs().max() > 0, f"{name} has no gradient: the comparison would prove nothing"
        torch.testing.assert_close(actual[1][name], grad, msg=lambda m, n=name: f"{n}: {m}", **CLOSE)


@pytest.fixture
def no_delta(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Called after the reference ran: from then on a dense delta is an error."""

    def forbid() -> None:
        def formed(*_: object) -> None:
            raise AssertionError("the dense delta BA was formed")

        monkeypatch.setattr(mk_peft.ParamWrapper, "get_delta_weight", formed)
        monkeypatch.setattr(
            mk_peft.ParamWrapper, "get_delta_factors", formed, raising=False
        )  # PEFT 0.21: one baddbmm

    return forbid


@pytest.mark.parametrize("targets", ["both", "first", "down"])
@pytest.mark.parametrize("name", MODELS)
def test_equals_peft(name: str, targets: str, no_delta: Callable) -> None:
    model = adapted(name, lora(name, targets))
    expected = run(model)
    assert any("experts" in key for key in expected[1])
    assert not any("gate_up_proj" in key or "down_proj" in key for key in expected[1]), "the base is frozen"
    no_delta()
    assert_same(run(ours(model)), expected)
    assert backends.dispatch_counts() == {"torch": LAYERS}


def test_without_fuse_lora_the_delta_is_formed(no_delta: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests above rest on: PEFT's own way does call one of them."""
    model = ours(adapted("mixtral"))
    unfused = mk_peft.ParamWrapper._activate_lora.__wrapped__
    monkeypatch.setattr(mk_peft.ParamWrapper, "_activate_lora", unfused)
    no_delta()
    with pytest.raises(AssertionError, match="was formed"):
        run(model)


def test_other_implementations_keep_pefts_way() -> None:
    model = adapted("mixtral")
    expected = run(model)
    model.get_base_model().set_experts_implementation("batched_mm")
    assert_same(run(model), expected)
    assert backends.dispatch_counts() == {}


@pytest.mark.parametrize("changes", [{"r": 1}, {"r": 16}, {"use_rslora": True}, {"lora_alpha": 40}], ids=str)
def test_rank_and_scaling(changes: dict, no_delta: Callable) -> None:
    model = adapted("mixtral", lora("mixtral", **changes))
    expected = run(model)
    no_delta()
    assert_same(run(ours(model)), expected)


@pytest.mark.parametrize("name", MODELS)
def test_several_adapters(name: str, no_delta: Callable) -> None:
    model = adapted(name)
    model.add_adapter("second", lora(name, r=3, lora_alpha=7))
    fill(model)
    expected = {}
    for active in ("default", "second"):
        model.set_adapter(active)
        expected[active] = run(model)
    model.base_model.set_adapter(["default", "second"])
    expected["both"] = run(model)
    assert not torch.allclose(expected["default"][0], expected["second"][0], atol=1e-2)
    no_delta()
    fused = ours(model)
    assert_same(run(fused), expected["both"])
    for active in ("second", "default"):
        fused.set_adapter(active)
        assert_same(run(fused), expected[active])


def test_adapter_of_one_weight_only_beside_one_of_none(no_delta: Callable) -> None:
    """An adapter without this weight adds nothing to it."""
    model = adapted("mixtral")
    model.add_adapter("attention", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    fill(model)
    model.set_adapter("attention")
    expected = run(model)
    no_delta()
    assert_same(run(ours(model)), expected)


def test_disable_adapter() -> None:
    model = adapted("gpt_oss")
    fused = ours(model)
    with model.disable_adapter(), fused.disable_adapter(), torch.no_grad():
        ids = torch.arange(12)[None]
        torch.testing.assert_close(fused(ids).logits, model(ids).logits, **CLOSE)
    with torch.no_grad():
        enabled = model(ids).logits
        torch.testing.assert_close(fused(ids).logits, enabled, **CLOSE)
        with model.disable_adapter():
            assert not torch.allclose(model(ids).logits, enabled, atol=1e-2)


@pytest.mark.parametrize("name", MODELS)
def test_merge_and_unmerge(name: str) -> None:
    model = adapted(name).eval()
    fused, ids = ours(model), torch.arange(12)[None]
    with torch.no_grad():
        expected = model(ids).logits
        fused.merge_adapter()
        torch.testing.assert_close(fused(ids).logits, expected, **CLOSE)
        fused.unmerge_adapter()
        torch.testing.assert_close(fused(ids).logits, expected, **CLOSE)
        merged = fused.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, expected, **CLOSE)
    assert set(merged.state_dict()) == set(model.unload().state_dict())


def test_saved_adapter_loads_anywhere(tmp_path: Path) -> None:
    model = adapted("gpt_oss").eval()
    base = copy.deepcopy(model).unload()
    fused, ids = ours(model), torch.arange(12)[None]
    run(fused)
    fused.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        assert base.config._experts_implementation == "eager"
        torch.testing.assert_close(again(ids).logits, fused(ids).logits, **CLOSE)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant: bool, no_delta: Callable) -> None:
    model = adapted("mixtral")
    expected = run(model)
    no_delta()
    fused = ours(model)
    fused.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    fused.enable_input_require_grads()
    fused.train()
    assert_same(run(fused), expected)
    assert backends.dispatch_counts() == {"torch": 2 * LAYERS}


def outer_wrapper(model: nn.Module) -> nn.Module:
    """The outermost wrapper of the last experts module."""
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, mk_peft.ParamWrapper) and not name.endswith("base_layer")
    ][-1]


def through(wrapper: nn.Module, device: torch.device) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Output and gradients of one layer, with a routing that no rounding changes."""
    wrapper.zero_grad(set_to_none=True)
    generator = torch.Generator().manual_seed(5)
    x, grad = (torch.randn(11, 40, generator=generator).to(device) for _ in range(2))
    weights, index = torch.randn(11, EXPERTS, generator=generator).softmax(-1).topk(2)
    out = wrapper(x.to(wrapper.get_param().dtype), index.to(device), weights.to(device))
    out.backward(grad.to(out.dtype))
    return out.detach(), {name: p.grad for name, p in wrapper.named_parameters() if p.requires_grad}


def with_float32_adapters(name: str, config: peft.LoraConfig | None = None) -> peft.PeftModel:
    """PEFT keeps adapters of a 16-bit model in float32."""
    model = adapted(name, config).to(torch.bfloat16)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_float32_adapters_of_a_bfloat16_model(backend: str, compiled: bool, device: torch.device) -> None:
    """Their gradients are float32 numbers, which bfloat16 does not have."""
    mk.register(backend=backend)
    model = with_float32_adapters("mixtral").to(device)
    wrapper = outer_wrapper(ours(model))
    if compiled:
        torch._dynamo.reset()
        wrapper.forward = torch.compile(wrapper.forward, fullgraph=True, backend="aot_eager")
    out, grads = through(wrapper, device)
    exact, exact_grads = through(outer_wrapper(model.float()), device)
    assert out.dtype == torch.bfloat16
    assert (out.float() - exact).norm() / exact.norm() < 0.01
    for name, grad in grads.items():
        assert grad.dtype == torch.float32
        assert (grad - exact_grads[name]).norm() / exact_grads[name].norm() < 0.02, name
        assert (grad == grad.bfloat16()).float().mean() < 0.5, f"{name} was rounded to bfloat16"


def test_the_op_reads_one_adapter_where_it_is() -> None:
    """No copy, no cast and no scaling by torch: views of the parameters, and the scaling as a number."""
    wrapper = outer_wrapper(with_float32_adapters("mixtral"))
    pair = mk_peft.low_rank_pair(wrapper, ["default"])
    assert pair.scaling == wrapper.scaling["default"] == 3 / 5
    for factor, linears in ((pair.lora_b, wrapper.lora_B), (pair.lora_a, wrapper.lora_A)):
        assert factor.data_ptr() == linears["default"].weight.data_ptr()
        assert factor.dtype == torch.float32


def test_a_targeted_bias_is_left_to_peft() -> None:
    config = lora("gpt_oss")
    config.target_parameters = [*config.target_parameters, "experts.gate_up_proj_bias"]
    model = adapted("gpt_oss", config)
    expected = run(model)
    assert_same(run(ours(model)), expected)


def test_nothing_stays_behind_a_failed_call() -> None:
    fused = ours(adapted("mixtral"))
    [(_, experts), _] = mk.experts_modules(fused)
    wrapper = fused.base_model.model.model.layers[0].mlp.experts
    with pytest.raises(ValueError, match="topk_ids"):
        wrapper(torch.randn(3, 40), torch.zeros(2, 2, dtype=torch.int64), torch.rand(2, 2))
    assert not vars(experts)[mk_peft.LORA_ATTRIBUTE]


@pytest.mark.parametrize(
    ("changes", "reason"), [({"lora_dropout": 0.1}, "lora_dropout"), ({"use_dora": True}, "DoRA|use_dora")]
)
def test_what_peft_refuses(changes: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        adapted("mixtral", lora("mixtral", **changes))


def test_check_model_turns_it_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mk_peft.ParamWrapper, "_activate_lora", mk_peft.ParamWrapper._activate_lora.__wrapped__)
    model = adapted("mixtral")
    model.get_base_model().set_experts_implementation("moe_kernels")
    mk.check_model(model)
    patched = mk_peft.ParamWrapper._activate_lora
    assert patched._moe_kernels
    mk_peft.fuse_lora()
    assert mk_peft.ParamWrapper._activate_lora is patched


def test_check_lora() -> None:
    model = adapted("mixtral")
    assert mk_peft.check_lora(model) == 0, "nothing is served"
    assert mk_peft.check_lora(ours(model)) == 2 * LAYERS
    words = r"layers\.0\..*rank 129 \(default\) on down_proj, .* at most 128: lower lora_r"
    with pytest.raises(ValueError, match=words):
        ours(adapted("mixtral", lora("mixtral", r=129)))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_too_high_a_rank_is_refused_by_check_model_and_in_the_forward(backend: str, device: torch.device) -> None:
    mk.register(backend=backend)
    model = adapted("mixtral", lora("mixtral", r=200)).to(device)
    model.get_base_model().set_experts_implementation("moe_kernels")
    with pytest.raises(ValueError, match=r"^base_model\.model.*layers\.0.*: LoRA of rank 200 .* at most 128"):
        mk.check_model(model)
    with pytest.raises(ValueError, match=r"^LoRA of rank 200 .* at most 128"):
        through(outer_wrapper(model), device)


def test_active_adapters_of_too_high_a_rank_together() -> None:
    model = adapted("mixtral", lora("mixtral", r=96))
    model.add_adapter("second", lora("mixtral", r=96))
    fused = ours(model)
    assert mk.check_model(fused) == LAYERS, "one is active"
    fused.base_model.set_adapter(["default", "second"])
    words = r"LoRA of rank 192 \(default \+ second\) on down_proj, .* activate fewer adapters"
    with pytest.raises(ValueError, match=rf"layers\.0.*: {words}"):
        mk.check_model(fused)
    with pytest.raises(ValueError, match=f"^{words}"):
        run(fused)


def test_two_wrappers_of_one_weight_count_both() -> None:
    """As Axolotl's patch of PEFT makes them for a second adapter."""
    from moe_kernels.integrations.peft import _Lent
    from moe_kernels.integrations.support import LORA_ATTRIBUTE

    def pair(rank: int, scaling: float = 1.0) -> LowRank:
        return LowRank(torch.randn(4, 6, rank), torch.randn(4, rank, 5), scaling)

    experts, one, two = torch.nn.Module(), pair(2, 0.5), pair(3, 2.0)
    lent = _Lent(experts, "down_proj", one)
    pairs = vars(experts)[LORA_ATTRIBUTE]
    with lent:
        with _Lent(experts, "down_proj", two):
            lora_b, lora_a, scaling = pairs["down_proj"]
            assert scaling == 1.0
            expected = 0.5 * one.lora_b @ one.lora_a + 2.0 * two.lora_b @ two.lora_a
            torch.testing.assert_close(lora_b @ lora_a, expected)
        assert pairs["down_proj"] is one
        too_much = _Lent(experts, "down_proj", pair(127))
        with pytest.raises(ValueError, match=r"LoRA of rank 129 \(all adapters together\) on down_proj"), too_much:
            pass
    assert not pairs


def resized(wrapper: nn.Module, **sizes: tuple[int, int]) -> None:
    for name, (rows, columns) in sizes.items():
        getattr(wrapper, name)["default"].weight = nn.Parameter(torch.randn(rows, columns))


# What is done to the outer wrapper of the last layer, and what check_model says of it. E = 4, r = 5; down_proj is
# (4, 40, 24), gpt_oss stores (4, 24, 40).
BROKEN: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "ranks": (
        lambda w: resized(w, lora_B=(40, 12)),
        "lora_A (20, 24) and lora_B (40, 12) of down_proj (adapter 'default') are no pair of rank 5 for its 4 "
        "experts, which is (20, 24) and (40, 20): load the adapter again, or make it anew for this model.",
    ),
    "both of another rank": (lambda w: resized(w, lora_A=(12, 24), lora_B=(40, 12)), "are no pair of rank 5"),
    "of one expert": (
        lambda w: resized(w, lora_A=(5, 24), lora_B=(40, 5)),
        "are no pair of rank 5 for its 4 experts",
    ),
    "orientation": (lambda w: resized(w, lora_A=(24, 20), lora_B=(20, 40)), "which is (20, 24) and (40, 20)"),
    "of the other weight": (lambda w: resized(w, lora_A=(20, 40), lora_B=(48, 20)), "which is (20, 24) and (40, 20)"),
    "no lora_A": (lambda w: w.lora_A.pop("default"), "lora_A of down_proj (adapter 'default') is missing: load the"),
    "no lora_B": (lambda w: w.lora_B.pop("default"), "lora_B of down_proj (adapter 'default') is missing: load the"),
    "device": (
        lambda w: w.lora_B.to("meta"),
        "lora_A of down_proj (adapter 'default') is on cpu and lora_B on meta, the weight is on cpu: move the",
    ),
}


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_factors_that_are_no_pair_are_refused(name: str, broken: str) -> None:
    model = ours(adapted(name, lora(name, "down")))
    change, words = BROKEN[broken]
    change(outer_wrapper(model))
    with pytest.raises(ValueError, match=r"^base_model\.model\.model\.layers\.1\..*experts: ") as refused:
        mk.check_model(model)
    assert words in str(refused.value)


def test_factors_on_the_device_of_the_weight_are_taken_wherever_that_is() -> None:
    with torch.device("meta"):
        model = stock("mixtral")
        model = peft.get_peft_model(model, lora("mixtral"))
    model.get_base_model().set_experts_implementation("moe_kernels")
    assert mk.check_model(model) == LAYERS


def test_factors_of_different_dtypes_are_refused() -> None:
    model = ours(adapted("mixtral"))
    assert mk.check_model(model) == LAYERS
    outer_wrapper(model).lora_B["default"].to(torch.bfloat16)
    words = r"the LoRA factors of \w+ are bfloat16 and float32: cast them to one dtype before training"
    with pytest.raises(ValueError, match=rf"layers\.\d.*: {words}"):
        mk.check_model(model)


def test_replicated_factors_are_used_and_sharded_ones_refused(tmp_path: Path) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    wrapper, cpu = outer_wrapper(ours(adapted("mixtral"))), torch.device("cpu")
    expected = through(wrapper, cpu)
    factors = wrapper.lora_A["default"]
    plain = factors.weight.detach()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        factors.weight = nn.Parameter(distribute_tensor(plain, mesh, [Replicate()]))
        out, grads = through(wrapper, cpu)
        assert_same((out, {name: getattr(g, "to_local", lambda g=g: g)() for name, g in grads.items()}), expected)
        factors.weight = nn.Parameter(distribute_tensor(plain, mesh, [Shard(0)]))
        with pytest.raises(
            mk.UnsupportedExperts, match=r"LoRA factors of .* are sharded .*: shard the decoder layer"
        ):
            through(wrapper, cpu)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", MODELS)
def test_compiles_to_one_graph(name: str) -> None:
    """PEFT's own way breaks the graph: it registers a parametrisation in each forward."""
    wrapper, cpu = outer_wrapper(ours(adapted(name))), torch.device("cpu")
    expected = through(wrapper, cpu)
    torch._dynamo.reset()
    wrapper.forward = torch.compile(wrapper.forward, fullgraph=True, backend="aot_eager")
    assert_same(through(wrapper, cpu), expected)


@pytest.mark.parametrize("name", MODELS)
def test_triton_backend(name: str, no_delta: Callable, device: torch.device) -> None:
    wrapper = outer_wrapper(adapted(name).to(device))
    expected = through(wrapper, device)
    no_delta()
    mk.register(backend="triton")
    wrapper.get_base_layer().config._experts_implementation = "moe_kernels"
    with use_small_tiles():
        assert_same(through(wrapper, device), expected)
    assert backends.dispatch_counts() == {"triton": 1}


def loaded_by_axolotl(monkeypatch: pytest.MonkeyPatch, dropout: float) -> peft.PeftModel:
    """target_modules that PEFT makes into parameters, loaded as `axolotl train` does it."""
    adapter = importlib.import_module("axolotl.loaders.adapter")
    dictionary = importlib.import_module("axolotl.utils.dict")
    for name in ("__init__", "_axolotl_dropout_patched"):  # put back what Axolotl patches
        monkeypatch.setattr(mk_peft.ParamWrapper, name, getattr(mk_peft.ParamWrapper, name, False), raising=False)
    model = stock("mixtral")
    cfg = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_dropout": dropout}
    return adapter.load_lora(model, dictionary.DictDefault(cfg | {"lora_target_modules": ["w1", "w2", "w3"]}))[0]


def test_dropout_that_axolotl_would_leave_out_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("axolotl.loaders.adapter")
    plugin = importlib.import_module("axolotl.integrations.moe_kernels.plugin").MoeOptimizedPlugin()
    dictionary = importlib.import_module("axolotl.utils.dict")
    cfg = dictionary.DictDefault({"moe_kernels": True, "adapter": "lora"})
    model = ours(loaded_by_axolotl(monkeypatch, 0.0))
    plugin.post_model_load(cfg, model)
    assert mk_peft.check_lora(model) == 2 * LAYERS
    model = loaded_by_axolotl(monkeypatch, 0.05)
    model.get_base_model().set_experts_implementation("moe_kernels")
    with pytest.raises(ValueError, match=r"lora_dropout=0\.05 cannot act on .*: set lora_dropout: 0"):
        plugin.post_model_load(cfg, model)


def test_an_adapter_of_the_trainer_is_checked_before_training(caplog: pytest.LogCaptureFixture) -> None:
    """With rl: dpo, ipo and kto Axolotl loads the model without it, and TRL's trainer puts it on."""
    pytest.importorskip("axolotl.loaders.adapter")
    plugin = importlib.import_module("axolotl.integrations.moe_kernels.plugin").MoeOptimizedPlugin()
    cfg = importlib.import_module("axolotl.utils.dict").DictDefault(
        {"moe_kernels": True, "adapter": "lora", "rl": "dpo", "lora_target_modules": ["q_proj", "up_proj"]}
    )
    logging.getLogger("axolotl").propagate = True
    caplog.set_level(logging.INFO)

    def prepared(**lora: Any) -> Any:
        model = stock("qwen2_moe")
        model.set_experts_implementation("moe_kernels")
        plugin.post_model_load(cfg, model)
        assert "it trains" not in caplog.text, "there is no adapter yet"
        return types.SimpleNamespace(model=peft.get_peft_model(model, peft.LoraConfig(**lora)))

    plugin.post_trainer_create(cfg, prepared(r=4, target_modules=["q_proj", "up_proj"]))
    assert "LoRA of 0 expert weights runs inside the kernels; it trains (parameters): shared expert" in caplog.text
    assert "LoRA adapts no routed expert, though expert projections are named (up_proj)" in caplog.text
    caplog.clear()
    with pytest.raises(ValueError, match=r"experts.*: LoRA of rank 129 .* lower lora_r"):
        plugin.post_trainer_create(cfg, prepared(r=129, target_parameters=["mlp.experts.down_proj"]))
    cfg.lora_model_dir = "an adapter that Axolotl would not load"
    with pytest.raises(ValueError, match=r"rl: dpo, .* leave the adapter in lora_model_dir out: .* Merge it first"):
        prepared()


def test_relora_over_experts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Axolotl 0.19 and 0.21 end at the first restart: 'ParamWrapper' object has no attribute 'weight'."""
    pytest.importorskip("axolotl.loaders.adapter")
    plugin = importlib.import_module("axolotl.integrations.moe_kernels.plugin").MoeOptimizedPlugin()
    dictionary = importlib.import_module("axolotl.utils.dict")
    cfg = dictionary.DictDefault({"moe_kernels": True, "adapter": "lora", "relora": True})
    with pytest.raises(ValueError, match=r"relora: true ends at its first restart .* Set relora: false"):
        plugin.post_model_load(cfg, ours(loaded_by_axolotl(monkeypatch, 0.0)))
    attention = peft.get_peft_model(stock("mixtral"), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    plugin.post_model_load(cfg, ours(attention))
