"""Whole models under torch.func, differentiated twice, and without data: what works with their own experts works."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
mk = pytest.importorskip("moe_kernels.integrations.transformers")

from support.models import tiny_config, tiny_model  # noqa: E402

FAMILIES = ("mixtral", "gpt_oss")
VOCAB = 31
@pytest.fixture(autouse=True, params=["torch", "triton"])
def _registered(request: pytest.FixtureRequest) -> Iterator[None]:
    mk.register(backend=request.param)
    yield
    mk.register()


def models(name: str) -> tuple[nn.Module, nn.Module]:
    """(the model with its own experts, the same with ours)"""
    sizes = {"vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 20, "num_attention_heads": 2}
    config = tiny_config(name, **sizes, attn_implementation="eager")
    stock, ours = (tiny_model(config, implementation, 0.3).eval() for implementation in ("eager", "moe_kernels"))
    mk.check_model(ours)
    return stock, ours


SENTENCES = torch.arange(18).view(3, 6) * 7 % VOCAB


def call(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Logits. Mask and positions are given, which transformers else looks for in the data."""
    shape = ids.shape
    mask = torch.zeros(shape[0], 1, shape[1], shape[1], device=ids.device)
    if model.config.model_type == "gpt_oss":
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
@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_of_each_sentence(name: str, vmap: bool) -> None:
    stock, ours = models(name)
    wanted, found = gradients(stock, False), gradients(ours, vmap)
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-5, msg=lambda m, n=key: f"{n}: {m}")


@pytest.mark.parametrize("name", FAMILIES)
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


@pytest.mark.parametrize("name", FAMILIES)
def test_shapes_on_meta(name: str) -> None:
    _, ours = models(name)
    ours = ours.to("meta")
    logits = call(ours, SENTENCES.to("meta"))
    logits.sum().backward()
    assert logits.shape == (*SENTENCES.shape, VOCAB)
    for key, parameter in ours.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.shape == parameter.shape, key
