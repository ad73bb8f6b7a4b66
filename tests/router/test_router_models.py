"""The fused router inside real models of transformers, the model's own router as the truth, and what is refused."""

import copy
import pickle
import types

import pytest
import torch
from torch import nn
from torch.nn import functional

from moe_kernels import router

transformers = pytest.importorskip("transformers")
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter  # noqa: E402
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter  # noqa: E402

import moe_kernels.integrations.transformers as mk  # noqa: E402
from moe_kernels.integrations.router import (  # noqa: E402
    RouterForm,
    UnsupportedRouter,
    install_fused_router,
    recognise,
    router_modules,
)
from moe_kernels.integrations.support import recipe_of  # noqa: E402
from support.ambient import AMBIENT, inside  # noqa: E402
from support.models import tiny_config, tiny_model  # noqa: E402

# No number of experts fills a block of the kernel.
MODELS = {
    "mixtral": {"num_local_experts": 9, "output_router_logits": True},
    "qwen2_moe": {"num_experts": 12, "output_router_logits": True},
    "qwen3_moe": {"num_experts": 17, "output_router_logits": True},
    "deepseek_v3": {"n_routed_experts": 24, "first_k_dense_replace": 0, "num_hidden_layers": 2},
}
IDS = torch.randint(0, 96, (2, 19), generator=torch.Generator().manual_seed(3))


def make_model(name):
    model = tiny_model(tiny_config(name, num_experts_per_tok=3, **MODELS[name]))
    with torch.no_grad():
        for _, module in router_modules(model):
            if hasattr(module, "e_score_correction_bias"):
                module.e_score_correction_bias.normal_(0.0, 0.1)
    return model


def run(model):
    """(results that must agree, gradients)."""
    model.zero_grad(set_to_none=True)
    out = model(input_ids=IDS, labels=IDS)
    out.loss.backward()
    results = {"logits": out.logits, "loss": out.loss, "aux_loss": getattr(out, "aux_loss", None)}
    for n, logits in enumerate(getattr(out, "router_logits", None) or ()):
        results[f"router_logits {n}"] = logits
    return results, {name: p.grad for name, p in model.named_parameters()}


@pytest.fixture(params=["torch", "triton"])
def backend(request, monkeypatch):
    monkeypatch.setattr(router, "_backend", lambda logits, _: request.param)
    return request.param


@pytest.mark.parametrize("name", MODELS)
def test_a_model_trains_as_with_its_own_router(name, backend):
    model = make_model(name)
    expected, expected_grads = run(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    assert install_fused_router(model) == 2
    actual, grads = run(model)
    # Logits, loss, auxiliary loss, and the logits of both routers: DeepSeek-V3 has no auxiliary loss.
    assert len(expected) == len(actual) == (3 if name == "deepseek_v3" else 5)
    for key, value in expected.items():
        if value is not None:
            torch.testing.assert_close(actual[key], value, rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")
    assert sum(key.endswith("mlp.gate.weight") for key in grads) == 2
    for key, grad in grads.items():
        assert expected_grads[key].abs().max() > 0, key
        assert (grad - expected_grads[key]).norm() < 1e-5 * expected_grads[key].norm(), key
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_changed_weight_and_a_changed_bias_are_seen():
    model = make_model("deepseek_v3")
    install_fused_router(model)
    before = run(model)[0]["logits"]
    gate = router_modules(model)[0][1]
    with torch.no_grad():
        gate.e_score_correction_bias.neg_()
        expected = DeepseekV3TopkRouter.forward(gate, torch.ones(1, 40))
    assert torch.equal(gate(torch.ones(1, 40))[2].sort().values, expected[2].sort().values)
    assert not torch.equal(run(model)[0]["logits"], before)


@pytest.mark.plain_memory
def test_a_compiled_router_is_one_graph(backend):
    gate = build("deepseek_v3", "DeepseekV3TopkRouter", {})
    install_fused_router(holder(gate))
    nn.init.normal_(gate.weight)
    compiled = torch.compile(gate, fullgraph=True, backend="aot_eager")
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(1))
    for ours, eager in zip(compiled(x), gate(x), strict=True):
        torch.testing.assert_close(ours, eager)


@pytest.mark.plain_memory
@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_router_is_exact(strict, backend):
    gate = build("deepseek_v3", "DeepseekV3TopkRouter", {})
    install_fused_router(holder(gate))
    nn.init.normal_(gate.weight)
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(1))
    torch._dynamo.reset()
    exported = torch.export.export(gate, (torch.zeros(7, 32),), strict=strict)
    named = [node for node in exported.graph.nodes if "moe_kernels.route_forward" in str(node.target)]
    assert bool(named) == (backend == "triton"), "plain torch is its own graph"
    for ours, eager in zip(exported.module()(x), gate(x), strict=True):
        assert torch.equal(ours, eager)


def test_checkpointed_layers_give_the_same_gradients(backend):
    model = make_model("qwen3_moe")
    install_fused_router(model)
    model.train()
    _, expected = run(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    calls = []
    gate = router_modules(model)[0][1]
    gate.register_forward_hook(lambda *_: calls.append(1))
    _, grads = run(model)
    assert len(calls) == 2, "the layer was not computed again"
    for key, grad in grads.items():
        torch.testing.assert_close(grad, expected[key], msg=lambda m, k=key: f"{k}: {m}")


def assert_fused_copy(twin, model):
    """The routers of ``twin`` run the fused forward with their own weights, and compute what ``model``'s do."""
    x = torch.randn(7, 40, generator=torch.Generator().manual_seed(1))
    pairs = list(zip(router_modules(twin), router_modules(model), strict=True))
    assert len(pairs) == 2
    for (_, gate), (_, theirs) in pairs:
        assert gate is not theirs
        assert gate.forward.args[1] is gate
        assert recognise(gate) == recognise(theirs) == gate.forward.args[0]
        assert all(torch.equal(ours, other) for ours, other in zip(gate(x), theirs(x), strict=True))
        with torch.no_grad():
            gate.weight.neg_()
        assert torch.equal(gate(x)[0], -theirs(x)[0])


def test_installing_twice_and_copying():
    model = make_model("mixtral")
    assert install_fused_router(model) == install_fused_router(model) == 2
    assert_fused_copy(copy.deepcopy(model), model)


def picklable(model):
    """The model, or its MoE blocks: transformers' rotary embeddings cannot always be pickled."""
    if model.config.model_type == "deepseek_v3":
        return model
    return nn.ModuleList([layer.mlp for layer in model.model.layers])


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_comes_back_fused(name, tmp_path, backend):
    mk.register(backend="torch")
    model = make_model(name)
    model.set_experts_implementation("moe_kernels")
    assert mk.check_model(model) == install_fused_router(model) == 2
    part = picklable(model)
    torch.save(part, tmp_path / "model.pt")
    twin = torch.load(tmp_path / "model.pt", weights_only=False)
    for _, experts in mk.experts_modules(twin):
        assert mk.is_served(experts)
        assert vars(experts)["_moe_kernels_recipe"] is recipe_of(experts), "the probe need not run again"
    assert_fused_copy(twin, part)
    assert_fused_copy(pickle.loads(pickle.dumps(copy.deepcopy(part))), part)


def in_another_process(_, model, inputs, results):
    """A process of its own, without anything that this one did beside making the model."""
    gate = model.gate
    results["fused"] = gate.forward.func is RouterForm.forward and gate.forward.args[1] is gate
    results["logits"] = gate(inputs)[0].detach()


def test_a_spawned_process_gets_a_fused_model():
    model = holder(build("deepseek_v3", "DeepseekV3TopkRouter", {}))
    nn.init.normal_(model.gate.weight)
    install_fused_router(model)
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(1))
    with torch.multiprocessing.get_context("spawn").Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(in_another_process, (model, x, results))
        assert results["fused"]
        assert torch.equal(results["logits"], model.gate(x)[0])


def test_what_wrapped_a_fused_router_stays_when_it_is_installed_again():
    """As accelerate wraps a forward, to move the weights of an offloaded module."""
    accelerate = pytest.importorskip("accelerate")
    model = holder(build("mixtral", "MixtralTopKRouter", {}))
    install_fused_router(model)
    accelerate.hooks.add_hook_to_module(model.gate, accelerate.hooks.ModelHook())
    wrapped = model.gate.forward
    assert install_fused_router(model) == 1
    assert model.gate.forward is wrapped


# Wrappers that pass on the attributes of what they wrap


class Seen(nn.Module):
    """As torch.compile's, activation checkpointing's and FSDP1's wrappers do it."""

    def __init__(self, module):
        super().__init__()
        self.wrapped = module

    def forward(self, *args):
        return self.wrapped(*args)

    def __getattr__(self, name):
        return super().__getattr__(name) if name == "wrapped" else getattr(self.wrapped, name)


def test_wrappers_are_seen_through():
    model = make_model("qwen3_moe")
    expected, expected_grads = run(model)
    for layer in model.model.layers:
        layer.mlp.gate = Seen(Seen(layer.mlp.gate))
    assert install_fused_router(model) == 2
    gates = [layer.mlp.gate.wrapped.wrapped for layer in model.model.layers]
    assert [gate for _, gate in router_modules(model)] == gates
    assert all(isinstance(gate.forward.args[0], RouterForm) for gate in gates)
    assert not any("forward" in vars(layer.mlp.gate) for layer in model.model.layers)
    actual, grads = run(model)
    torch.testing.assert_close(actual["logits"], expected["logits"], rtol=1e-4, atol=1e-5)
    for grad, theirs in zip(grads.values(), expected_grads.values(), strict=True):
        assert (grad - theirs).norm() < 1e-5 * theirs.norm()


@pytest.mark.parametrize("before", [True, False], ids=["installed first", "installed after PEFT"])
@pytest.mark.parametrize("name", MODELS)
def test_a_router_that_peft_trains_whole(name, before, backend):
    peft = pytest.importorskip("peft")
    targets, calls = ["q_proj", "q_a_proj"], []
    lora = peft.LoraConfig(r=2, target_modules=targets, modules_to_save=["gate"], init_lora_weights=False)

    def trained(model):
        torch.manual_seed(5)
        model = peft.get_peft_model(model, lora)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "modules_to_save" in key:
                    parameter.mul_(1.5)  # apart from the one that it was copied from
        return model

    expected, expected_grads = run(trained(make_model(name)))
    model = make_model(name)
    if before:
        assert install_fused_router(model) == 2
        model = trained(model)
    else:
        model = trained(model)
        assert install_fused_router(model) == 2
    for key, module in model.named_modules():
        if key.endswith("mlp.gate.modules_to_save.default"):
            module.register_forward_hook(lambda module, *_: calls.append(module.forward.args))
    actual, grads = run(model)
    assert len(calls) == 2
    assert all(isinstance(form, RouterForm) for form, _ in calls), "the one that trains is the fused one"
    torch.testing.assert_close(actual["logits"], expected["logits"], rtol=1e-4, atol=1e-5)
    moving = [key for key, grad in expected_grads.items() if grad is not None]
    assert sum("mlp.gate.modules_to_save.default.weight" in key for key in moving) == 2
    for key in moving:
        assert expected_grads[key].abs().max() > 0, key
        assert (grads[key] - expected_grads[key]).norm() < 2e-5 * expected_grads[key].norm(), key
    # The reference of preference learning runs the router as it was, fused too.
    with model.disable_adapter():
        assert len([gate for _, gate in router_modules(model) if recognise(gate) == gate.forward.args[0]]) == 4
        without = run(make_model(name))[0]["logits"]
        torch.testing.assert_close(model(input_ids=IDS).logits, without, rtol=1e-4, atol=1e-5)


def test_a_replica_of_data_parallel_has_its_own_weights():
    gate = build("mixtral", "MixtralTopKRouter", {})
    install_fused_router(holder(gate))
    nn.init.normal_(gate.weight)
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(1))
    replica = gate._replicate_for_data_parallel()
    replica.weight = 2 * gate.weight  # as nn.DataParallel sets it, on another device
    torch.testing.assert_close(replica(x)[0], 2 * gate(x)[0])


def config(**changes):
    settings = {"num_experts_per_tok": 3, "num_local_experts": 12, "num_experts": 12, "hidden_size": 32,
                "routed_scaling_factor": 2.5, "n_group": 4, "topk_group": 2, "norm_topk_prob": True}  # fmt: skip
    return types.SimpleNamespace(**settings | changes)


def holder(module):
    model = nn.Module()
    model.add_module("gate", module)
    return model


FORMS = [
    ("mixtral", "MixtralTopKRouter", {}, RouterForm("softmax", True, False, True)),
    ("qwen2_moe", "Qwen2MoeTopKRouter", {"norm_topk_prob": False}, RouterForm("softmax", False, False, False)),
    ("qwen3_moe", "Qwen3MoeTopKRouter", {}, RouterForm("softmax", True, False, False)),
    ("gpt_oss", "GptOssTopKRouter", {}, RouterForm("softmax", True, False, False)),
    ("deepseek_v2", "DeepseekV2TopkRouter", {"topk_method": "greedy"}, RouterForm("softmax", False, True, True)),
    ("deepseek_v3", "DeepseekV3TopkRouter", {}, RouterForm("sigmoid", True, True, False)),
    ("glm4_moe", "Glm4MoeTopkRouter", {"norm_topk_prob": False}, RouterForm("sigmoid", False, True, False)),
    ("step3p7", "Step3p7TopKRouter", {}, RouterForm("sigmoid", True, False, True)),
]


def build(family, name, changes):
    module = __import__(f"transformers.models.{family}.modeling_{family}", fromlist=[name])
    return getattr(module, name)(config(**changes))


@pytest.mark.parametrize(("family", "name", "changes", "form"), FORMS, ids=[form[0] for form in FORMS])
def test_routers_are_recognised_by_what_they_compute(family, name, changes, form):
    assert recognise(build(family, name, changes)) == form


@pytest.mark.plain_memory
@pytest.mark.parametrize("state", AMBIENT)
def test_the_probe_finds_the_same_whatever_is_switched_on(state):
    for family, name, changes, form in FORMS:
        gate = build(family, name, changes)
        assert inside(state, lambda: recognise(gate)) == form, name  # noqa: B023 (called here)
    other = REFUSED["another scale"]
    assert "computes something else" in inside(state, lambda: recognise(other))


@pytest.mark.parametrize("condition", ["bfloat16", "autocast"])
@pytest.mark.parametrize(("family", "name", "changes", "form"), FORMS, ids=[form[0] for form in FORMS])
def test_low_precision_is_the_models_own(family, name, changes, form, condition, backend):
    """The same dtypes and choices where nothing ties; the weights rounded once instead of at every step."""
    gate = build(family, name, {"hidden_size": 12, **changes})
    x = torch.stack([torch.randperm(12, generator=torch.Generator().manual_seed(n)) for n in range(20)]) / 8 - 0.7
    with torch.no_grad():
        gate.weight.copy_(torch.eye(12))
        if form.scoring == "sigmoid":
            gate.e_score_correction_bias.normal_(0.0, 0.1)  # the sums of evenly spaced scores would tie
        if condition == "bfloat16":
            gate.weight.data = gate.weight.data.bfloat16()
            x = x.bfloat16()
            if hasattr(gate, "bias"):
                gate.bias.data = gate.bias.data.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=condition == "autocast"):
        logits, weights, ids = type(gate).forward(gate, x)
        install_fused_router(holder(gate))
        ours = gate(x)
    assert torch.equal(ours[0], logits)
    assert (ours[0].dtype, ours[1].dtype) == (logits.dtype, weights.dtype)
    order, our_order = ids.argsort(-1), ours[2].argsort(-1)
    assert torch.equal(ids.gather(-1, order), ours[2].gather(-1, our_order))
    rounding = 1e-6 if weights.dtype == torch.float32 else 1e-2
    torch.testing.assert_close(ours[1].gather(-1, our_order), weights.gather(-1, order), rtol=rounding, atol=0)


def sabotaged(change):
    class Router(MixtralTopKRouter):
        def forward(self, hidden_states):
            return change(*super().forward(hidden_states))

    return Router(config())


def capped(logits, weights, ids):
    """Another choice for some tokens, as a router with a capacity makes."""
    return logits, weights, torch.where(logits[:, :1] > 1, (ids + 1) % logits.shape[1], ids)


class Noisy(MixtralTopKRouter):
    def forward(self, hidden_states):
        if self.training:
            hidden_states = hidden_states * torch.empty_like(hidden_states).uniform_(0.9, 1.1)
        return super().forward(hidden_states)


class Straight(MixtralTopKRouter):
    """The right values, and no gradient through the weights."""

    def forward(self, hidden_states):
        logits, weights, ids = super().forward(hidden_states)
        return logits, weights.detach() + 0 * logits.sum(), ids


REFUSED = {
    "another scale": sabotaged(lambda logits, weights, ids: (logits, weights * 1.001, ids)),
    "weights rounded to the logits' dtype": sabotaged(
        lambda logits, weights, ids: (logits, weights.to(logits.dtype).float(), ids)
    ),
    "another order of results": sabotaged(lambda logits, weights, ids: (ids, weights, logits)),
    "another choice for some tokens": sabotaged(capped),
    "two results": sabotaged(lambda logits, weights, ids: (weights, ids)),
    "other logits": sabotaged(lambda logits, weights, ids: (logits * 2, weights, ids)),
    "the smallest": sabotaged(
        lambda logits, weights, ids: (logits, *functional.softmax(logits, -1).topk(3, largest=False))
    ),
    "noise in training": Noisy(config()),
    "no gradient": Straight(config()),
    "zero instead of excluded groups": build("axk2", "AXK2TopkRouter", {}),
    "groups of a softmax": build("mistral4", "Mistral4TopkRouter", {}),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_router_that_computes_something_else_is_refused(reason):
    state = torch.get_rng_state()
    with pytest.raises(UnsupportedRouter, match=r"^gate \(\w+\): on random data .* Set moe_fused_router: false"):
        install_fused_router(holder(REFUSED[reason]))
    assert torch.equal(torch.get_rng_state(), state), "a probe must not move the random state of a training"
    assert "forward" not in vars(REFUSED[reason])


def test_what_cannot_be_probed_is_refused():
    with pytest.raises(UnsupportedRouter, match=r"its forward takes \(hidden_states, e_score_correction_bias\)"):
        install_fused_router(holder(build("minimax_m2", "MiniMaxM2TopKRouter", {})))
    patched = MixtralTopKRouter(config())
    patched.forward = lambda hidden_states: MixtralTopKRouter.forward(patched, hidden_states)
    with pytest.raises(UnsupportedRouter, match="already replaced by something else"):
        install_fused_router(holder(patched))
    sharded = MixtralTopKRouter(config())
    sharded.weight = nn.Parameter(torch.empty(0))
    with pytest.raises(UnsupportedRouter, match=r"its weight has shape \(0,\): it is sharded"):
        install_fused_router(holder(sharded))
    scaled = build("deepseek_v3", "DeepseekV3TopkRouter", {})
    scaled.routed_scaling_factor = nn.Parameter(torch.tensor(2.5))
    with pytest.raises(UnsupportedRouter, match="its routed_scaling_factor is no number, and gets no gradient"):
        install_fused_router(holder(scaled))
    with pytest.raises(UnsupportedRouter, match="Linear has no router module"):
        install_fused_router(nn.Linear(2, 2))


def test_nothing_is_replaced_when_one_is_refused():
    model = holder(MixtralTopKRouter(config()))
    model.add_module("other", REFUSED["another scale"])
    with pytest.raises(UnsupportedRouter, match=r"^other "):
        install_fused_router(model)
    assert "forward" not in vars(model.gate)


def test_modules_of_one_kind_are_probed_once(monkeypatch):
    from moe_kernels.integrations import router as integration

    probed = []
    real = integration.recognise
    monkeypatch.setattr(integration, "recognise", lambda module: probed.append(module) or real(module))
    model = nn.ModuleList([MixtralTopKRouter(config()) for _ in range(3)])
    model.append(MixtralTopKRouter(config(num_experts_per_tok=2)))
    assert install_fused_router(model) == 4
    assert len(probed) == 2


@pytest.mark.plain_memory
def test_a_model_without_data_is_probed_on_the_cpu():
    with torch.device("meta"):
        model = holder(MixtralTopKRouter(config()))
    assert model.gate.weight.is_meta
    assert install_fused_router(model) == 1
