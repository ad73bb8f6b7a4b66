"""Whole models under torch.func, differentiated twice, and without data: what works with their own experts works."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
mk = pytest.importorskip("moe_kernels.integrations.transformers")

COMMON = {
    "vocab_size": 31,
    "hidden_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
    "max_position_embeddings": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
CONFIGS = {
    "mixtral": lambda: transformers.MixtralConfig(**COMMON, intermediate_size=20),
    # Stored transposed and interleaved, with biases and a clamp.
    "gpt_oss": lambda: transformers.GptOssConfig(
        **COMMON, head_dim=12, intermediate_size=20, layer_types=["full_attention"] * 2
    ),
}


@pytest.fixture(autouse=True, params=["torch", "triton"])
def _registered(request: pytest.FixtureRequest) -> Iterator[None]:
    mk.register(backend=request.param)
    yield
    mk.register()


def models(name: str) -> tuple[nn.Module, nn.Module]:
    """(the model with its own experts, the same with ours)"""
    pair = []
    for implementation in ("eager", "moe_kernels"):
        torch.manual_seed(7)
        pair.append(
            transformers.AutoModelForCausalLM.from_config(
                CONFIGS[name](), experts_implementation=implementation, attn_implementation="eager"
            ).eval()
        )
        with torch.no_grad():
            for parameter in pair[-1].parameters():
                parameter.normal_(0.0, 0.3)
    mk.check_model(pair[1])
    return pair[0], pair[1]


SENTENCES = torch.arange(18).view(3, 6) * 7 % 31


def call(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Logits. Mask and positions are given, which transformers else looks for in the data."""
    shape = ids.shape
    mask = torch.zeros(shape[0], 1, shape[1], shape[1], device=ids.device)
    if isinstance(model.config, transformers.GptOssConfig):
        mask = {"full_attention": mask}
    positions = torch.arange(shape[1], device=ids.device).expand(shape)
    return model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False).logits


def gradients(model: nn.Module, vmap: bool) -> dict[str, torch.Tensor]:
    """Of each sentence."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return call(self.model, ids[None]).sin().mean()

    loss = Loss()

    def of(p: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(loss, {f"model.{name}": t for name, t in p.items()}, (ids,))

    grad = torch.func.grad(of)
    if vmap:
        return torch.func.vmap(grad, in_dims=(None, 0))(parameters, SENTENCES)
    each = [grad(parameters, ids) for ids in SENTENCES]
    return {name: torch.stack([grads[name] for grads in each]) for name in parameters}


@pytest.mark.parametrize("vmap", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_of_each_sentence(name: str, vmap: bool) -> None:
    stock, ours = models(name)
    wanted, found = gradients(stock, False), gradients(ours, vmap)
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-5, msg=lambda m, n=key: f"{n}: {m}")


@pytest.mark.parametrize("name", CONFIGS)
def test_hessian_vector_product(name: str) -> None:
    products = []
    for model in models(name):
        parameters = list(model.parameters())
        first = torch.autograd.grad(call(model, SENTENCES).sin().mean(), parameters, create_graph=True)
        loss = sum((g * p.cos()).sum() for g, p in zip(first, parameters, strict=True))
        products.append(torch.autograd.grad(loss, parameters, allow_unused=True))
    for wanted, found in zip(*products, strict=True):
        if wanted is None:  # a parameter that the loss is linear in
            continue
        assert found is not None
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_shapes_on_meta(name: str) -> None:
    _, ours = models(name)
    ours = ours.to("meta")
    logits = call(ours, SENTENCES.to("meta"))
    logits.sum().backward()
    assert logits.shape == (*SENTENCES.shape, COMMON["vocab_size"])
    for key, parameter in ours.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.shape == parameter.shape, key
