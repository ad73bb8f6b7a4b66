"""What LoRA trains is said before training: the same targets reach different parts of different models."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
mk = pytest.importorskip("moe_kernels.integrations.transformers")

from moe_kernels.integrations.adapters import Adapted, adapted, doubts  # noqa: E402
from support.models import tiny_config, tiny_model  # noqa: E402

SIZES = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24}
FAMILIES = {
    "mixtral": {},
    "qwen2_moe": {"shared_expert_intermediate_size": 24, "num_experts": 4},
    "qwen3_moe": {"num_experts": 4},
    "gpt_oss": {},
}
DEEPSEEK = {"num_hidden_layers": 2, "num_key_value_heads": 2, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
PROJECTIONS = ["gate_proj", "up_proj", "down_proj"]
WEIGHTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
R = 4
# Both factors of both weights, E = 4, H = 32, I = 24, two layers.
EXPERTS = 2 * R * 4 * ((48 + 32) + (32 + 24))
SHARED = 2 * R * 3 * (32 + 24)


def base(name: str) -> torch.nn.Module:
    return tiny_model(tiny_config(name, **(SIZES | FAMILIES.get(name, DEEPSEEK))), "moe_kernels")


def model(name: str, modules: list[str] | str, weights: list[str] | None = None) -> torch.nn.Module:
    mk.register(backend="torch")
    return peft.get_peft_model(base(name), peft.LoraConfig(r=R, target_modules=modules, target_parameters=weights))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_part_is_counted(name: str) -> None:
    found = adapted(model(name, ATTENTION, WEIGHTS))
    assert found.routed_experts == EXPERTS
    assert found.attention > 0
    assert found[1:3] == (0, 0)
    assert doubts(model(name, ATTENTION, WEIGHTS)) == []
    assert adapted(model(name, ATTENTION)) == found._replace(routed_experts=0)
    whole = model(name, ATTENTION, WEIGHTS)
    assert sum(found) == sum(p.numel() for p in whole.parameters() if p.requires_grad)


def test_weights_that_are_trained_whole() -> None:
    mk.register(backend="torch")
    config = peft.LoraConfig(r=R, target_modules=ATTENTION, modules_to_save=["experts", "lm_head"])
    found = adapted(peft.get_peft_model(base("mixtral"), config))
    experts = 2 * 4 * (48 * 32 + 32 * 24)
    assert found.whole_weights == experts + base("mixtral").lm_head.weight.numel()
    assert str(found).endswith(f", whole weights {found.whole_weights:,}")
    assert found.routed_experts == 0


def test_projections_that_are_only_the_shared_experts(caplog: pytest.LogCaptureFixture) -> None:
    named = [*ATTENTION, *PROJECTIONS]
    with caplog.at_level(logging.WARNING, "moe_kernels"):
        served = mk.check_model(model("qwen2_moe", named), named)
    assert (served, served.adapted.routed_experts, served.adapted.shared_expert) == (2, 0, SHARED)
    assert "no routed expert, though expert projections are named (down_proj, gate_proj, up_proj)" in caplog.text
    assert "lora_target_parameters: [mlp.experts.down_proj, mlp.experts.gate_up_proj]" in caplog.text
    caplog.clear()
    served = mk.check_model(model("qwen2_moe", named, WEIGHTS), [*named, *WEIGHTS])
    assert (served.adapted.routed_experts, caplog.text) == (EXPERTS, "")
    some = [*ATTENTION, "gate_proj"]
    assert doubts(model("qwen2_moe", some, WEIGHTS), some) == [], "the others are not left out: nobody named them"


@pytest.mark.parametrize("wrong", ["mlp.experts.dwn_proj", "mlp.experts.down_proj.weight"])
def test_a_parameter_that_is_not_there(wrong: str) -> None:
    """PEFT says nothing where another name was found."""
    named = ["mlp.experts.gate_up_proj", wrong]
    for targets in (None, [*ATTENTION, *named]):
        (doubt,) = doubts(model("qwen3_moe", ATTENTION, named), targets)
        assert f"LoRA trains no parameter of the name {wrong}: " in doubt
        assert "lora_target_parameters: [mlp.experts.down_proj, mlp.experts.gate_up_proj]" in doubt
    (doubt,) = doubts(model("qwen3_moe", ATTENTION, [wrong]), [*ATTENTION, wrong])
    assert f"LoRA trains no parameter of the name {wrong}: " in doubt


@pytest.mark.parametrize("made_for", [None, WEIGHTS[1:]])
def test_an_adapter_that_was_made_for_other_weights(made_for: list[str] | None, tmp_path: Path) -> None:
    """PEFT goes by the adapter's own names, and says nothing of those in the run file."""
    model("qwen3_moe", ATTENTION, made_for).save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base("qwen3_moe"), tmp_path, is_trainable=True)
    (doubt,) = doubts(loaded, [*ATTENTION, *WEIGHTS])
    left = WEIGHTS[:1] if made_for else sorted(WEIGHTS)
    assert f"LoRA is not on {', '.join(left)}, though that is named" in doubt
    assert "without lora_model_dir" in doubt
    assert doubts(loaded, [*ATTENTION, *(made_for or ())]) == []


def test_experts_that_were_left_out() -> None:
    """PEFT's layers_to_transform and exclude_modules choose modules and no parameters."""
    mk.register(backend="torch")

    def adapted_by(weights: list[str], **choice: Any) -> torch.nn.Module:
        config = peft.LoraConfig(r=R, target_modules=ATTENTION, target_parameters=weights, **choice)
        return peft.get_peft_model(base("qwen3_moe"), config)

    upper = ["layers.1.mlp.experts.gate_up_proj", "layers.1.mlp.experts.down_proj"]
    for key, choices in (
        ("layers_to_transform", (1, [1])),
        ("exclude_modules", (["layers.0.mlp.experts"], r".*layers\.0\..*")),
    ):
        for choice in choices:
            partly = adapted_by(WEIGHTS, **{key: choice})
            (doubt,) = doubts(partly, [*ATTENTION, *WEIGHTS])
            assert f"LoRA adapts routed experts that {key} leaves out (layers: 1)" in doubt
            assert adapted(partly).routed_experts == EXPERTS, "PEFT heeds it by now: leave out the warning"
            written = re.search(r"\[(.*)\]", doubt)[1].split(", ")
            assert written == upper
            cured = adapted_by(written, **{key: choice})
            assert doubts(cured, [*ATTENTION, *written]) == []
            assert adapted(cured).routed_experts == EXPERTS // 2
    (doubt,) = doubts(adapted_by(WEIGHTS, exclude_modules=["experts"]))
    assert "(layers: 2)" in doubt
    assert "leave them out of lora_target_parameters" in doubt
    for choice in ({}, {"layers_to_transform": []}, {"layers_to_transform": [0, 1]}, {"exclude_modules": ["router"]}):
        assert doubts(adapted_by(WEIGHTS, **choice)) == []
    two = adapted_by(WEIGHTS, layers_to_transform=[0])
    two.add_adapter("other", peft.LoraConfig(r=R, target_parameters=WEIGHTS))
    assert doubts(two) == [], "the other adapter is for all layers"


def test_a_module_that_is_not_there() -> None:
    """PEFT says nothing where another name was found."""
    named = [*ATTENTION, "qproj"]
    for targets in (None, [*named, *WEIGHTS]):
        (doubt,) = doubts(model("qwen3_moe", named, WEIGHTS), targets)
        assert "LoRA trains no module of the name qproj: this model has none." in doubt
        assert "Its linear layers are k_proj, lm_head, o_proj, q_proj, v_proj (" in doubt


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_all_linear_that_reaches_no_expert(name: str) -> None:
    """Where PEFT does not make it into expert weights: as a list of what is linear in the model."""
    (doubt,) = doubts(model(name, ATTENTION), ["all-linear"])
    assert "expert projections are named (all-linear)" in doubt


def test_a_router_that_nobody_named() -> None:
    tuned = model("mixtral", "all-linear")
    trained = adapted(tuned)
    assert trained.router == 2 * R * (32 + 4)
    (doubt,) = doubts(tuned, ["all-linear"])
    assert f"LoRA trains the router (gate), {trained.router} parameters" in doubt
    assert "lora_target_modules: [k_proj, o_proj, q_proj, v_proj]" in doubt
    assert doubts(tuned) == [doubt], "what all-linear led to is all that PEFT keeps of it"
    assert doubts(tuned, [*ATTENTION, "gate"]) == []


def test_a_shared_expert_whose_names_peft_takes_for_the_routed_ones() -> None:
    """findings/peft-deepseek-shared-expert.sh; the line that the warning gives adapts both."""
    for named in (["o_proj", *PROJECTIONS], [f"shared_experts.{name}" for name in PROJECTIONS], ["all-linear"]):
        tuned = model("deepseek_v3", named if len(named) > 1 else "all-linear")
        assert adapted(tuned).shared_expert == adapted(tuned).rest == 0
        doubt = next(doubt for doubt in doubts(tuned, named) if "and not" in doubt)
        assert "mlp.down_proj, mlp.gate_proj, mlp.up_proj, shared_experts.down_proj" in doubt
    cure = doubt.rpartition("[")[2].rstrip("].").split(", ")
    whole = model("deepseek_v3", ["o_proj"], [*WEIGHTS, *cure])
    assert adapted(whole).shared_expert == adapted(whole).rest == R * 3 * (32 + 24)
    assert adapted(whole).routed_experts > 0
    assert doubts(whole, ["o_proj", *WEIGHTS, *cure]) == []
    assert doubts(model("deepseek_v3", ["o_proj"], WEIGHTS), ["o_proj", *WEIGHTS]) == []


def test_without_an_adapter() -> None:
    mk.register(backend="torch")
    plain = base("mixtral")
    assert adapted(plain) == Adapted(0, 0, 0, 0, 0)
    assert str(adapted(plain)) == "nothing"
    assert doubts(plain, PROJECTIONS) == []
    assert mk.check_model(plain) == 2


def test_frozen_factors_are_not_trained() -> None:
    tuned = model("mixtral", ATTENTION, WEIGHTS)
    for name, parameter in tuned.named_parameters():
        if "experts" in name:
            parameter.requires_grad_(False)
    assert adapted(tuned).routed_experts == 0
    assert doubts(tuned) == [], "they are adapted, and frozen on purpose"


def in_4_bits(name: str) -> torch.nn.Module:
    packed = pytest.importorskip("bitsandbytes.nn.parametrize")
    mk.register(backend="torch")
    packed_base = base(name)
    for _, experts in mk.experts_modules(packed_base):
        for weight in ("gate_up_proj", "down_proj"):
            packed.replace_parameter_4bit(experts, weight)
    return packed_base


@pytest.mark.filterwarnings("ignore:target_parameters=")
def test_weights_in_4_bits_are_found_by_their_whole_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written already is no cure: PEFT does not see through a parametrization."""

    def tuned(weights: list[str]) -> torch.nn.Module:
        config = peft.LoraConfig(r=R, target_modules=ATTENTION, target_parameters=weights)
        return peft.get_peft_model(in_4_bits("qwen2_moe"), config)

    missed = tuned(WEIGHTS)
    (doubt,) = doubts(missed, [*ATTENTION, *WEIGHTS])
    assert adapted(missed).routed_experts == 0
    assert "lora_target_parameters" not in doubt
    first = re.findall(r"'([^']*)'", doubt)
    assert first == [f"model.layers.0.{weight}" for weight in WEIGHTS]
    every = [name.replace(".0.", f".{layer}.") for name in first for layer in range(2)]
    assert (adapted(tuned(every)).routed_experts, doubts(tuned(every), every)) == (EXPERTS, [])
    # Axolotl's patch of PEFT finds the short names.
    monkeypatch.setattr("peft.tuners.tuners_utils.BaseTuner._inject_parameters", lambda *_: [])
    assert "write lora_target_parameters: [mlp.experts.down_proj, mlp.experts.gate_up_proj]" in doubts(missed)[0]
