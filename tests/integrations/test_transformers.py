"""The experts function inside real transformers models, against their own eager loop over experts.

The file passes on transformers 5.16.1 and on the newest release alike.
"""

from __future__ import annotations

import copy
import json
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import moe_kernels
from moe_kernels import backends
from moe_kernels.activation import PLAIN, Activation
from support import models
from support.ambient import AMBIENT, inside
from support.tiles import use_small_tiles

transformers = pytest.importorskip("transformers")
mk = pytest.importorskip("moe_kernels.integrations.transformers")

from moe_kernels.integrations.support import recipe_of  # noqa: E402

# What differs from the tiny models of tests/support: a dense layer between those with experts.
CONFIGS: dict[str, dict] = {name: {} for name in models.FAMILIES}
CONFIGS["qwen2_moe"] = {"num_hidden_layers": 3, "mlp_only_layers": [1], "num_experts_per_tok": 3}
# Layers with routed experts.
MOE_LAYERS = dict.fromkeys(CONFIGS, 2) | {"nemotron_h": 1}
FAMILIES = ("mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "nemotron_h")
TOLERANCE = {torch.float32: {"rtol": 1e-4, "atol": 1e-5}, torch.float64: {"rtol": 1e-9, "atol": 1e-10}}


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    mk.register(backend="torch")
    backends.reset_dispatch_counts()
    yield
    mk.register()


def make_model(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    return models.tiny_model(models.tiny_config(name, **CONFIGS[name])).to(dtype)


def run(model: nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    model.zero_grad(set_to_none=True)
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    return out.logits.detach(), {name: p.grad for name, p in model.named_parameters()}


def tokens() -> torch.Tensor:
    return torch.randint(0, 97, (2, 13), generator=torch.Generator().manual_seed(3))


def assert_same(a: tuple, b: tuple, dtype: torch.dtype) -> None:
    torch.testing.assert_close(a[0], b[0], **TOLERANCE[dtype])
    assert a[1].keys() == b[1].keys()
    for name, grad in a[1].items():
        if grad is None:
            assert b[1][name] is None, name
            continue
        assert grad.abs().max() > 0, f"{name} has no gradient: the comparison would prove nothing"
        torch.testing.assert_close(b[1][name], grad, msg=lambda m, n=name: f"{n}: {m}", **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_eager(name: str, dtype: torch.dtype) -> None:
    model, ids = make_model(name, dtype), tokens()
    expected = run(model, ids)
    assert backends.dispatch_counts() == {}

    model.set_experts_implementation("moe_kernels")
    assert mk.check_model(model) == MOE_LAYERS[name]
    # Nemotron-H sums its experts in the dtype of the routing weights, float32 whatever the model's.
    assert_same(expected, run(model, ids), torch.float32 if name == "nemotron_h" else dtype)
    assert backends.dispatch_counts() == {"torch": MOE_LAYERS[name]}


@pytest.mark.parametrize("activation", PLAIN)
def test_activations_equal_eager(activation: str) -> None:
    model, ids = make_model("mixtral"), tokens()
    for _, experts in mk.experts_modules(model):
        experts.act_fn = transformers.activations.ACT2FN[activation]
    expected = run(model, ids)
    model.set_experts_implementation("moe_kernels")
    assert mk.check_model(model) == 2
    assert_same(expected, run(model, ids), torch.float32)


@pytest.mark.parametrize("group_size", [64, 256, "auto"])
@pytest.mark.parametrize("persistent", [True, False])
def test_settings_reach_the_op(group_size: int | str, persistent: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict] = []
    real = moe_kernels.fused_experts
    monkeypatch.setattr(mk, "fused_experts", lambda *a, **k: seen.append(k) or real(*a, **k))
    mk.register(group_size=group_size, persistent=persistent, backend="torch")
    model = make_model("mixtral")
    model.set_experts_implementation("moe_kernels")
    model(input_ids=tokens())
    expected = {"group_size": group_size, "persistent": persistent, "backend": "torch", "recompute": False}
    layout = {"activation": Activation("silu"), "interleaved": False, "reduce": True} | {
        "gate_up_lora": None,
        "down_lora": None,
    }
    assert seen == [layout | expected] * 2


@pytest.mark.parametrize("size", [100, 64.0, True, "128"])
def test_register_refuses_bad_settings(size: object) -> None:
    with pytest.raises(ValueError, match=f"group_size={size!r} is not one of 64, 128, 256, auto"):
        mk.register(group_size=size)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_checkpointing(name: str, use_reentrant: bool) -> None:
    model, ids = make_model(name), tokens()
    expected = run(model, ids)
    model.set_experts_implementation("moe_kernels")
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.train()
    assert_same(expected, run(model, ids), torch.float32)
    assert backends.dispatch_counts() == {"torch": 2 * MOE_LAYERS[name]}, "each layer runs again in backward"


@pytest.mark.parametrize("name", FAMILIES)
def test_no_grad_and_generate(name: str) -> None:
    model, ids = make_model(name).eval(), tokens()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        model.set_experts_implementation("moe_kernels")
        torch.testing.assert_close(model(input_ids=ids).logits, expected, **TOLERANCE[torch.float32])
    backends.reset_dispatch_counts()
    model.generate(ids[:1, :4], max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert backends.dispatch_counts() == {"torch": 2 * MOE_LAYERS[name]}


@pytest.mark.parametrize("name", FAMILIES)
def test_save_and_reload(name: str, tmp_path: Path) -> None:
    model = make_model(name)
    model.save_pretrained(tmp_path / "eager")
    model.set_experts_implementation("moe_kernels")
    run(model, tokens())
    model.save_pretrained(tmp_path / "ours")

    def stored(folder: str) -> dict[str, tuple[int, ...]]:
        from safetensors import safe_open

        with safe_open(tmp_path / folder / "model.safetensors", framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118

    assert stored("ours") == stored("eager")
    config = (tmp_path / "ours" / "config.json").read_text()
    assert config == (tmp_path / "eager" / "config.json").read_text()
    assert "moe_kernels" not in config
    assert "experts_implementation" not in json.loads(config)

    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, experts_implementation="moe_kernels"
    )
    assert mk.check_model(again) == MOE_LAYERS[name]
    for key, value in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], value, rtol=0, atol=0, msg=key)


def test_frozen_experts_get_no_gradient() -> None:
    model, ids = make_model("mixtral"), tokens()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("experts" not in name)
    expected = run(model, ids)
    model.set_experts_implementation("moe_kernels")
    assert_same(expected, run(model, ids), torch.float32)


def test_fp32_tokens_with_bf16_weights() -> None:
    """PEFT keeps norms in fp32, so an experts module of a bf16 model may be given fp32 tokens."""
    torch.manual_seed(0)
    experts = experts_module("mixtral").to(torch.bfloat16)
    x, index, weights = experts_inputs(experts)
    out = experts(x, index, weights)
    assert out.dtype == torch.float32
    exact = moe_kernels.reference_experts(
        x.double(), index, weights.double(), experts.gate_up_proj.double(), experts.down_proj.double()
    )
    assert (out - exact).norm() / exact.norm() < 1e-2
    out.sum().backward()
    assert experts.gate_up_proj.grad.dtype == torch.bfloat16


def test_autocast_agrees_with_grouped_mm_in_dtype() -> None:
    model, ids = make_model("qwen2_moe"), tokens()
    exact, _ = run(model, ids)
    model.set_experts_implementation("moe_kernels")
    with torch.autocast("cpu", torch.bfloat16):
        logits, grads = run(model, ids)
    assert (logits.float() - exact).norm() / exact.norm() < 0.05
    assert all(grad.dtype == torch.float32 for grad in grads.values())


def experts_module(name: str) -> nn.Module:
    model = make_model(name)
    model.set_experts_implementation("moe_kernels")
    return mk.experts_modules(model)[0][1]


def experts_inputs(experts: nn.Module, rows: int = 11) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, models.COMMON["hidden_size"], generator=generator, requires_grad=True)
    logits = torch.randn(rows, experts.num_experts, generator=generator)
    weights, index = logits.softmax(-1).topk(2, dim=-1)
    return x, index, weights.requires_grad_()


@pytest.mark.parametrize("sentinel", [-1, "num_experts"])
def test_expert_parallel_sentinels_are_dropped(sentinel: int | str) -> None:
    experts = experts_module("mixtral")
    x, index, weights = experts_inputs(experts)
    index = index.clone()
    index[::2, 0] = experts.num_experts if sentinel == "num_experts" else sentinel
    out = experts(x, index, weights)
    kept = torch.where((index >= 0) & (index < experts.num_experts), weights, 0.0)
    expected = moe_kernels.reference_experts(
        x, index.clamp(0, experts.num_experts - 1), kept, experts.gate_up_proj, experts.down_proj
    )
    torch.testing.assert_close(out, expected, **TOLERANCE[torch.float32])


def test_called_by_keyword() -> None:
    experts = experts_module("mixtral")
    x, index, weights = experts_inputs(experts)
    by_keyword = experts(hidden_states=x, top_k_index=index, top_k_weights=weights)
    torch.testing.assert_close(by_keyword, experts(x, index, weights), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "nemotron_h"])
def test_compiles_to_one_graph(name: str) -> None:
    experts = experts_module(name)
    x, index, weights = experts_inputs(experts)
    leaves = [x, weights, *experts.parameters()]
    expected = torch.autograd.grad(experts(x, index, weights).sum(), leaves)

    torch._dynamo.reset()
    explained = torch._dynamo.explain(experts)(x, index, weights)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)

    torch._dynamo.reset()
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    backends.reset_dispatch_counts()
    got = torch.autograd.grad(compiled(x, index, weights).sum(), leaves)
    assert backends.dispatch_counts() == {"torch": 1}
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE[torch.float32])


def test_compile_before_the_check_says_so() -> None:
    """The probe cannot run inside a graph."""
    experts = experts_module("mixtral")
    torch._dynamo.reset()
    # Wrapped by dynamo, in a class of its own.
    with pytest.raises(Exception, match=r"call check_model\(model\) before torch.compile or torch.export"):
        torch.compile(experts, fullgraph=True, backend="aot_eager")(*experts_inputs(experts))


@pytest.mark.plain_memory
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "nemotron_h"])
def test_an_exported_layer_is_exact(name: str, backend: str, strict: bool, device: torch.device) -> None:
    experts = experts_module(name).to(device)
    inputs = tuple(tensor.to(device) for tensor in experts_inputs(experts))
    with pytest.raises(Exception, match=r"call check_model\(model\) before torch.compile or torch.export"):
        torch.export.export(experts, inputs, strict=strict)
    mk.register(backend=backend)
    assert mk.check_model(experts) == 1
    torch._dynamo.reset()
    exported = torch.export.export(experts, inputs, strict=strict)
    assert [node for node in exported.graph.nodes if "moe_kernels.experts_forward" in str(node.target)]
    with use_small_tiles():
        assert torch.equal(exported.module()(*inputs), experts(*inputs))
        other = [torch.roll(tensor, 1, 0) for tensor in inputs]
        # Not the first output rolled: several threads of a CPU share the rows out by their place.
        expected = experts(*other)
        backends.reset_dispatch_counts()
        assert torch.equal(exported.module()(*other), expected)
    assert backends.dispatch_counts() == {backend: 1}


# What it cannot run, and the words for it


def mish_experts() -> nn.Module:
    experts = experts_module("mixtral")
    experts.act_fn = nn.Mish()
    return experts


def patched_silu_experts() -> nn.Module:
    experts = experts_module("mixtral")
    experts.act_fn.forward = lambda z: nn.functional.silu(z).clamp(max=7.0)
    return experts


def hidden_clamp_experts() -> nn.Module:
    """A clamp that no attribute names, farther out than any value of a fresh model."""
    experts = experts_module("mixtral")
    gate = experts._apply_gate
    experts._apply_gate = lambda gate_up: gate(gate_up.clamp(max=300.0))
    return experts


def wrong_gradient_experts() -> nn.Module:
    """The right value, but no gradient into the gate."""
    experts = experts_module("mixtral")
    experts.act_fn.forward = lambda z: nn.functional.silu(z.detach())
    return experts


def mislabelled_experts() -> nn.Module:
    """The decorator says interleaved, the gate splits in halves."""
    experts = experts_module("mixtral")
    experts.is_concatenated = False
    return experts


@pytest.mark.parametrize(
    ("make", "activation"),
    [
        (mish_experts, "Mish"),
        (patched_silu_experts, "SiLUActivation"),
        (hidden_clamp_experts, "SiLUActivation"),
        (wrong_gradient_experts, "SiLUActivation"),
        (mislabelled_experts, "SiLUActivation"),
    ],
)
def test_why_not_module(make, activation: str) -> None:
    reason = mk.why_not_module(make())
    assert f"its activation {activation} computes none of clamped_glu, clamped_silu, gelu" in reason
    assert "experts_implementation: grouped_mm" in reason


class LearnedSwish(nn.Module):
    """silu as long as beta is 1."""

    def __init__(self) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.ones(()))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return z * torch.sigmoid(self.beta * z)


def test_an_activation_that_is_trained_is_refused() -> None:
    """It would keep its first value, and get no gradient, in silence."""
    experts = experts_module("mixtral")
    experts.act_fn = LearnedSwish()
    assert "its activation LearnedSwish has trained parameters" in mk.why_not_module(experts)
    experts.act_fn.beta.requires_grad_(False)
    assert mk.why_not_module(experts) is None


class DroppingSilu(nn.SiLU):
    """silu, and in training dropout behind it."""

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(super().forward(z), 0.1, self.training)


@pytest.mark.parametrize("training", [True, False])
def test_an_activation_that_is_another_in_training_is_refused(training: bool) -> None:
    """Models are checked in evaluation mode, in which from_pretrained leaves them."""
    experts = experts_module("mixtral").train(training)
    assert mk.why_not_module(experts) is None
    experts.act_fn = DroppingSilu().train(training)
    assert "its activation DroppingSilu computes something else in training" in mk.why_not_module(experts)
    assert [part.training for part in experts.modules()] == [training] * 2


# What the caller has switched on


def clamped_experts() -> nn.Module:
    experts = experts_module("gpt_oss")
    experts.limit, experts.alpha = 3.5, 1.25
    return experts


def activation_of(name: str) -> nn.Module:
    experts = experts_module("mixtral")
    experts.act_fn = transformers.activations.ACT2FN[name]
    return experts


# Three write gelu_pytorch_tanh in their own ways.
PROBED = {name: lambda name=name: activation_of(name) for name in (*PLAIN, "gelu_new", "gelu_fast", "gelu_python")}
PROBED |= {"gpt_oss": clamped_experts, "nemotron_h": lambda: experts_module("nemotron_h")}


@pytest.mark.plain_memory
@pytest.mark.parametrize("state", AMBIENT)
def test_the_probe_finds_the_same_whatever_is_switched_on(state: str) -> None:
    for name, make in PROBED.items():
        expected, experts = recipe_of(make()), make()
        found = inside(state, lambda: recipe_of(experts))  # noqa: B023 (called here)
        assert found.gate == expected.gate, name
        assert mk.why_not_module(experts) is None


@pytest.mark.plain_memory
@pytest.mark.parametrize("state", AMBIENT)
def test_what_is_refused_is_refused_whatever_is_switched_on(state: str) -> None:
    experts = hidden_clamp_experts()
    assert "SiLUActivation computes none of" in inside(state, lambda: mk.why_not_module(experts))


@pytest.mark.plain_memory
@pytest.mark.parametrize("data", [True, False], ids=["data", "no data"])
@pytest.mark.parametrize("state", AMBIENT)
def test_a_model_is_checked_whatever_is_switched_on(state: str, data: bool) -> None:
    for name in ("mixtral", "gpt_oss"):
        model = make_model(name, torch.bfloat16).to("cpu" if data else "meta")
        model.set_experts_implementation("moe_kernels")
        assert inside(state, lambda: mk.check_model(model)) == 2  # noqa: B023 (called here)
        another_number(model.model.layers[1].mlp.experts)
        with pytest.raises(mk.UnsupportedExperts, match=r"layers\.1.* num_experts=2"):
            inside(state, lambda: mk.check_model(model))  # noqa: B023


@pytest.mark.plain_memory
def test_a_model_made_of_fake_tensors_is_checked() -> None:
    with FakeTensorMode():
        model = transformers.AutoModelForCausalLM.from_config(models.tiny_config("mixtral"))
        model.set_experts_implementation("moe_kernels")
        assert mk.check_model(model) == 2


def clamped_gate(self: nn.Module, gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return nn.functional.silu(gate.clamp(max=self.limit)) * up.clamp(-self.limit, self.limit)


@pytest.mark.parametrize("change", ["act_fn", "limit", "_apply_gate"])
def test_a_change_after_the_check_is_noticed(change: str) -> None:
    """The recipe is found once; what it was found from is compared at every call."""
    experts = experts_module("mixtral")
    inputs = experts_inputs(experts)
    experts(*inputs)
    if change == "act_fn":
        experts.act_fn = nn.ReLU()
    else:
        experts.limit = 0.5
        experts._apply_gate = types.MethodType(clamped_gate, experts)
    if change == "limit":
        experts(*inputs)
        experts.limit = 0.25
    ours = experts(*inputs)
    experts.config._experts_implementation = "batched_mm"
    torch.testing.assert_close(ours, experts(*inputs), **TOLERANCE[torch.float32])


def test_served_module_has_no_objection() -> None:
    assert mk.why_not_module(experts_module("deepseek_v3")) is None


def test_unsupported_model_raises_at_check_and_at_the_first_call() -> None:
    config = models.tiny_config("mixtral", hidden_act="mish")
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="moe_kernels")
    with pytest.raises(
        mk.UnsupportedExperts,
        match=r"model\.layers\.0\.mlp\.experts \(MixtralExperts\): its activation Mish.*: grouped_mm",
    ):
        mk.check_model(model)
    with pytest.raises(mk.UnsupportedExperts, match="MixtralExperts: its activation Mish"):
        model(input_ids=tokens())


def test_replaced_experts_class_raises() -> None:
    """Liger's SwiGLU swap: the config still says moe_kernels, but nothing dispatches any more."""

    class LigerExperts(nn.Module):
        def __init__(self, experts: nn.Module) -> None:
            super().__init__()
            self.gate_up_proj, self.down_proj = experts.gate_up_proj, experts.down_proj

    model = make_model("mixtral")
    model.set_experts_implementation("moe_kernels")
    for layer in model.model.layers:
        layer.mlp.experts = LigerExperts(layer.mlp.experts)
    assert model.config._experts_implementation == "moe_kernels"
    with pytest.raises(mk.UnsupportedExperts, match=r"it has: LigerExperts.*liger_glu_activation"):
        mk.check_model(model)


@pytest.mark.parametrize("other", ["eager", "grouped_mm"])
def test_model_on_another_implementation_raises(other: str) -> None:
    model = make_model("mixtral")
    model.set_experts_implementation(other)
    with pytest.raises(mk.UnsupportedExperts, match=rf"runs experts_implementation='{other}'.*register\(\)"):
        mk.check_model(model)


def test_experts_of_another_interface_raise() -> None:
    """They look the name up where it is not registered: transformers would raise KeyError in the forward."""
    from transformers.integrations.moe import ExpertsInterface, use_experts_implementation

    other = type("OtherInterface", (ExpertsInterface,), {"_global_mapping": {}})
    model = make_model("qwen3_moe")
    model.set_experts_implementation("moe_kernels")
    experts = model.model.layers[0].mlp.experts
    cls = type("OtherExperts", (type(experts),), {})
    experts.__class__ = use_experts_implementation(experts_class=cls, experts_interface=other())
    assert not mk.is_served(experts)
    with pytest.raises(
        mk.UnsupportedExperts, match=r"layers\.0\.mlp\.experts \(OtherExperts\): its class .* in OtherInterface"
    ):
        mk.check_model(model)


# What check_model refuses because every forward would


def cut(weight: nn.Parameter, *slices: slice) -> nn.Parameter:
    return nn.Parameter(weight.detach()[slices].clone())


def another_number(experts: nn.Module) -> None:
    experts.num_experts = 2


def one_weight_cut(experts: nn.Module) -> None:
    experts.down_proj = cut(experts.down_proj, slice(3))


def half_the_up_rows(experts: nn.Module) -> None:
    """As many rows as experts without a gate have: the op alone could not tell."""
    experts.gate_up_proj = cut(experts.gate_up_proj, slice(None), slice(experts.down_proj.shape[2]))


def other_hidden_size(experts: nn.Module) -> None:
    experts.down_proj = cut(experts.down_proj, slice(None), slice(16))


def gaps(experts: nn.Module) -> None:
    wide = torch.cat([experts.down_proj.detach()] * 2, dim=2)
    experts.down_proj = nn.Parameter(wide[..., : wide.shape[2] // 2])


def two_dtypes(experts: nn.Module) -> None:
    experts.down_proj = nn.Parameter(experts.down_proj.detach().bfloat16())


def eight_bits(experts: nn.Module) -> None:
    experts.gate_up_proj = nn.Parameter(experts.gate_up_proj.detach().to(torch.float8_e5m2), requires_grad=False)


def short_bias(experts: nn.Module) -> None:
    experts.down_proj_bias = cut(experts.down_proj_bias, slice(None), slice(7))


def bias_of_fewer(experts: nn.Module) -> None:
    experts.gate_up_proj_bias = cut(experts.gate_up_proj_bias, slice(2))


def half_the_up_columns(experts: nn.Module) -> None:
    experts.gate_up_proj = cut(experts.gate_up_proj, slice(None), slice(None), slice(experts.down_proj.shape[1]))


HALF = r"its up projection gives \d+ values, its down projection takes \d+: make both agree"
MISFITS = {
    "mixtral": {
        another_number: "num_experts=2 but holds weights of 4 experts: make both agree",
        one_weight_cut: "num_experts=4 but holds weights of 3 experts: make both agree",
        half_the_up_rows: HALF,
        other_hidden_size: "sizes disagree",
        gaps: r"each expert's matrix of down must be contiguous.*strides .*: store it contiguous once",
        two_dtypes: "gate_up is torch.float32 but down is torch.bfloat16: cast one of them, or use torch.autocast",
        eight_bits: r"its weights are stored as torch\.float8_e5m2.*: grouped_mm",
    },
    "gpt_oss": {  # transposed, with biases
        half_the_up_columns: HALF,
        gaps: "each expert's matrix of down must be contiguous",
        short_bias: r"down_bias is \(4, 7\), want \(4, 40\)",
        bias_of_fewer: "num_experts=4 but holds weights of 2 experts",
    },
}


@pytest.mark.parametrize(("name", "misfit"), [(name, misfit) for name, all_ in MISFITS.items() for misfit in all_])
def test_what_every_forward_refuses_is_refused_by_check_model(
    name: str, misfit: Callable[[nn.Module], None], device: torch.device
) -> None:
    words, model = MISFITS[name][misfit], make_model(name).to(device)
    model.set_experts_implementation("moe_kernels")
    assert mk.check_model(model) == 2
    experts = model.model.layers[1].mlp.experts
    inputs = [tensor.detach().to(device) for tensor in experts_inputs(experts)]
    misfit(experts)
    with pytest.raises(mk.UnsupportedExperts, match=rf"^model\.layers\.1\.mlp\.experts \(\w+\): .*{words}"):
        mk.check_model(model)
    for backend in ("torch", "triton"):
        mk.register(backend=backend)
        with pytest.raises(ValueError, match=words):
            experts(*inputs)


def test_nothing_is_read_or_made_to_check_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("gpt_oss")
    model.set_experts_implementation("moe_kernels")
    mk.check_model(model)  # the probe, which is made once
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            seen.append((function, out))
            return out

    with Watch():
        assert mk.check_model(model) == 2
    assert seen
    assert all(out.is_meta or not out.numel() for _, out in seen if isinstance(out, torch.Tensor)), seen


def test_two_dtypes_are_right_under_autocast(device: torch.device) -> None:
    """Both are cast there: a bfloat16 model of which one weight trains in float32."""
    model = make_model("mixtral").to(device)
    model.set_experts_implementation("moe_kernels")
    for _, experts in mk.experts_modules(model):
        two_dtypes(experts)
    with torch.autocast(device.type, torch.bfloat16):
        assert mk.check_model(model) == 2
        logits, grads = run(model, tokens().to(device))
    assert logits.isfinite().all()
    assert all(grad.abs().max() > 0 for grad in grads.values())
    model.double()
    with torch.autocast(device.type, torch.bfloat16):  # which leaves float64 alone
        two_dtypes(model.model.layers[0].mlp.experts)
        with pytest.raises(mk.UnsupportedExperts, match=r"layers\.0.*gate_up is torch.float64 but down is"):
            mk.check_model(model)


@pytest.mark.parametrize(
    ("keys", "fits"),
    [({"bf16": True}, True), ({"fp16": True}, True), ({"bf16": "full"}, False), ({}, False)],
    ids=str,
)
def test_the_plugin_checks_as_the_trainer_runs(keys: dict, fits: bool) -> None:
    plugin = pytest.importorskip("axolotl.integrations.moe_kernels.plugin").MoeOptimizedPlugin()
    cfg = pytest.importorskip("axolotl.utils.dict").DictDefault({"moe_kernels": True} | keys)
    model = make_model("mixtral")
    model.set_experts_implementation("moe_kernels")
    two_dtypes(model.model.layers[1].mlp.experts)
    if fits:
        plugin.post_model_load(cfg, model)
        assert plugin.expert_layers == 2
    else:
        with pytest.raises(mk.UnsupportedExperts, match=r"layers\.1.*gate_up is torch.float32 but down is"):
            plugin.post_model_load(cfg, model)


def test_weights_in_pieces_are_left_to_the_forward() -> None:
    """ZeRO-3 and FSDP1 leave a parameter of one dimension until the layer runs."""
    model = make_model("gpt_oss")
    model.set_experts_implementation("moe_kernels")
    for parameter in model.model.layers[0].mlp.experts.parameters():
        parameter.data = torch.empty(0)
    assert mk.check_model(model) == 2


def test_local_experts_of_expert_parallelism() -> None:
    """Sharding rewrites num_experts and slices the weights; nothing may be remembered from before."""
    experts = copy.deepcopy(experts_module("mixtral"))
    x, index, weights = experts_inputs(experts)
    experts(x, index, weights)
    experts.gate_up_proj = nn.Parameter(experts.gate_up_proj.detach()[:2].clone())
    experts.down_proj = nn.Parameter(experts.down_proj.detach()[:2].clone())
    experts.num_experts = 2
    expected = moe_kernels.reference_experts(x, index, weights, experts.gate_up_proj, experts.down_proj)
    torch.testing.assert_close(experts(x, index, weights), expected, **TOLERANCE[torch.float32])


class Wrapped(torch.Tensor):
    """A weight as torchao keeps it: it says bfloat16, and has no memory of its own."""

    @staticmethod
    def __new__(cls, packed: torch.Tensor) -> Wrapped:
        return torch.Tensor._make_wrapper_subclass(cls, packed.shape, dtype=torch.bfloat16)

    def __init__(self, packed: torch.Tensor) -> None:
        self.packed = packed

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["packed"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict, *_: object) -> Wrapped:
        return Wrapped(inner["packed"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        assert function in (torch.ops.aten.detach.default, torch.ops.aten.alias.default), "nothing may be computed"
        return args[0]


def test_wrapped_weights_raise_at_check_and_in_the_forward() -> None:
    model = make_model("mixtral").to(torch.bfloat16)
    model.set_experts_implementation("moe_kernels")
    experts = model.model.layers[1].mlp.experts
    inputs = experts_inputs(experts)
    packed = experts.down_proj.detach().to(torch.float8_e4m3fn)
    experts.down_proj = nn.Parameter(Wrapped(packed), requires_grad=False)
    assert experts.down_proj.dtype == torch.bfloat16
    with pytest.raises(
        mk.UnsupportedExperts, match=r"layers\.1\.mlp\.experts \(MixtralExperts\): .* stored as Wrapped"
    ):
        mk.check_model(model)
    with pytest.raises(mk.UnsupportedExperts, match=r"stored as Wrapped.*: grouped_mm"):
        experts(*inputs)


# What wraps the weights of a model


@pytest.fixture
def one_process_mesh(tmp_path: Path) -> Iterator[torch.distributed.DeviceMesh]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_fsdp2(one_process_mesh: torch.distributed.DeviceMesh, checkpointing: bool) -> None:
    from torch.distributed.fsdp import fully_shard

    ids = tokens()
    expected = run(make_model("mixtral"), ids)
    model = make_model("mixtral")
    model.set_experts_implementation("moe_kernels")
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    for layer in model.model.layers:
        fully_shard(layer, mesh=one_process_mesh)
    fully_shard(model, mesh=one_process_mesh)
    assert mk.check_model(model) == 2
    logits, grads = run(model, ids)
    assert_same(expected, (logits, {name: grad.full_tensor() for name, grad in grads.items()}), torch.float32)
    assert backends.dispatch_counts()["torch"] == (4 if checkpointing else 2)


def test_replicated_weights_are_used_and_sharded_ones_refused(
    one_process_mesh: torch.distributed.DeviceMesh,
) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    experts = experts_module("mixtral")
    inputs = experts_inputs(experts)
    expected = experts(*inputs)
    plain = experts.gate_up_proj.detach()
    experts.gate_up_proj = nn.Parameter(distribute_tensor(plain, one_process_mesh, [Replicate()]))
    out = experts(*inputs)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    out.sum().backward()
    assert experts.gate_up_proj.grad.to_local().abs().max() > 0
    experts.gate_up_proj = nn.Parameter(distribute_tensor(plain, one_process_mesh, [Shard(0)]))
    with pytest.raises(mk.UnsupportedExperts, match="sharded in forward"):
        experts(*inputs)


@pytest.mark.parametrize(
    ("version", "sizes", "warned"),
    [
        ("5.22.0", {"ep_size": 2, "fsdp_size": 2}, True),
        ("5.23.0", {"ep_size": 2, "fsdp_size": 2}, False),
        ("5.22.0", {"ep_size": 2, "fsdp_size": 1}, False),
        ("5.22.0", {"ep_size": None, "fsdp_size": 2}, False),
        ("5.22.0", None, False),
    ],
)
def test_expert_parallelism_whose_gradients_are_too_small(version, sizes, warned, monkeypatch, caplog):
    """Their real ranks: tests/distributed/test_transformers_engines.py."""
    model = make_model("mixtral", torch.float32)
    model.set_experts_implementation("moe_kernels")
    model.config.distributed_config = sizes and types.SimpleNamespace(**sizes)
    monkeypatch.setattr(transformers, "__version__", version)
    with caplog.at_level("WARNING", "moe_kernels"):
        mk.check_model(model)
    assert ("once too often" in caplog.text) == warned


@pytest.mark.parametrize("given", [None, "Qwen/Qwen3-30B-A3B"])
def test_what_is_no_model_is_named(given):
    with pytest.raises(ValueError, match=f"takes a loaded model, not {type(given).__name__}: call from_pretrained"):
        mk.check_model(given)
