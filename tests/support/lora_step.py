"""One step of LoRA on a tiny model of transformers, and what must be the same to the bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

TARGETS: dict[str, Any] = {
    "target_modules": ["q_proj", "v_proj"],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}
IDS = torch.arange(24).view(2, 12) * 5 % 128


def with_lora(model: Any, targets: dict[str, Any] = TARGETS, **changes: Any) -> Any:
    """B is not zero, so that both factors have gradients."""
    import peft

    torch.manual_seed(0)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, **targets), **changes)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = (torch.randn(parameter.shape) * 0.05).to(parameter.dtype)
    return model


def step(model: nn.Module) -> dict[str, Tensor]:
    """Loss, logits and every gradient of one training step."""
    model.train()
    model.zero_grad(set_to_none=True)
    out = model(input_ids=IDS, labels=IDS)
    out.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"loss": out.loss.detach(), "logits": out.logits.detach()} | grads


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same names and bits, and nothing is zero."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.abs().max() > 0, name
        assert torch.equal(found[name], value), name
