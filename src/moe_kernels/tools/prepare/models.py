"""The models that the comparisons train: random weights from a seed, and a tokenizer trained on this machine."""

from __future__ import annotations

import platform
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import moe_kernels.tools.prepare.cache as cache
from moe_kernels.shapes import ALL_FAMILIES
from moe_kernels.tools.common.errors import MissingDependency
from moe_kernels.tools.prepare.cache import MANIFEST, Report, digest
from moe_kernels.tools.prepare.text import BOS, EOS, PAD, stdlib_sources

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

SPECIAL = (PAD, BOS, EOS)
CONTEXT = 4096
# Entries of the largest tokenizer: the text has no use for more. The embedding may have more rows.
TOKENIZER = 32000
# What the published checkpoints in these formats say of them, by which transformers loads them. All of Qwen3's linear
# layers but router and head are in fp8, of gpt-oss the experts alone in mxfp4.
QUANTIZATION: dict[str, dict[str, Any]] = {
    "fp8": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head", "mlp.gate"],
    },
    "mxfp4": {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"
        ],
    },
}  # fmt: skip


def model_config(family: str, size: str = "1b") -> PreTrainedConfig:
    """The transformers configuration of a model; what is not named here keeps the family's default."""
    from transformers import AutoConfig

    shape = ALL_FAMILIES[family].sizes[size]
    routed: dict[str, dict[str, Any]] = {
        "mixtral": {"num_local_experts": shape.experts, "intermediate_size": shape.intermediate},
        "qwen2-moe": {"num_experts": shape.experts, "moe_intermediate_size": shape.intermediate},
        "deepseek-v3": {
            "n_routed_experts": shape.experts,
            "moe_intermediate_size": shape.intermediate,
            "first_k_dense_replace": shape.layers - shape.moe_layers,
        },
        "qwen3-moe": {
            "num_experts": shape.experts,
            "moe_intermediate_size": shape.intermediate,
            "norm_topk_prob": True,
            "rope_theta": 1e6,
        },
        "gpt-oss": {"num_local_experts": shape.experts, "intermediate_size": shape.intermediate},
    }
    settings: dict[str, Any] = {
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "num_experts_per_tok": shape.top_k,
        "max_position_embeddings": CONTEXT,
        "pad_token_id": SPECIAL.index(PAD),
        "bos_token_id": SPECIAL.index(BOS),
        "eos_token_id": SPECIAL.index(EOS),
    }
    return AutoConfig.for_model(ALL_FAMILIES[family].model_type, **settings | routed[family] | {**shape.extras})


def build_model(family: str, size: str, seed: int, device: str) -> PreTrainedModel:
    """A model with random weights, the same for the same seed, size and kind of device.

    The caller's random state is left as it was.
    """
    import torch

    dtype = getattr(torch, ALL_FAMILIES[family].sizes[size].dtype)
    return seeded_model(model_config(family, size), dtype, seed, device)


def seeded_model(config: PreTrainedConfig, dtype: torch.dtype | None, seed: int, device: str) -> PreTrainedModel:
    """The same for any configuration; a dtype of None is the configuration's own."""
    import torch
    from transformers import AutoModelForCausalLM

    on_gpu = [torch.cuda.current_device()] if device == "cuda" else []
    with torch.random.fork_rng(devices=on_gpu), torch.device(device):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def prepare_tokenizer(root: Path, vocab: int, sources: list[str], report: Report) -> Path:
    """A byte-level BPE tokenizer of ``vocab`` entries, trained on ``sources`` unless it is there.

    Returns:
        ``artifacts/tokenizers/stdlib-<vocab>``.
    """
    folder = root / "artifacts" / "tokenizers" / f"stdlib-{vocab}"
    recipe = {"vocab": vocab, "special": list(SPECIAL), "text": digest(EOS.join(sources))}
    cache.check_ours(folder)
    if cache.made_with(folder) == recipe:
        return folder

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    report(f"training a tokenizer of {vocab} entries")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sources, trainer)
    with cache.replacing(folder) as partial:
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS
        ).save_pretrained(partial)
        facts = {"python": platform.python_version(), "files": cache.file_sizes(partial)}
        cache.write_manifest(partial / MANIFEST, recipe, facts)
    return folder


def prepare_model(
    family: str,
    size: str = "1b",
    root: Path = Path(),
    seed: int | None = None,
    *,
    packed: bool = False,
    force: bool = False,
    report: Report = lambda message: None,
) -> Path:
    """Make a model with random weights and its tokenizer, on the GPU if there is one, unless they are there.

    Of a family at real size only the configuration and the tokenizer are written:
    :mod:`moe_kernels.tools.compare.weights` draws its weights, from this seed, where a training starts: ``packed``,
    those of a checkpoint in the family's other format.

    ``seed`` is of the weights; None takes a finished model of any seed, and makes one from seed 0 otherwise.

    Returns:
        ``root/artifacts/models/<name of the model>``, which transformers and Axolotl load by its path.

    Raises:
        UsageError: the folder holds something else.
        MissingDependency: this Python came without its library's sources, or the disk is too full.
    """
    kind = ALL_FAMILIES[family]
    folder = root / "artifacts" / "models" / kind.model(size, packed)
    sources = stdlib_sources()
    recipe: dict[str, Any] = {
        "shape": asdict(kind.sizes[size]),
        "seed": seed or 0,
        "context": CONTEXT,
        "text": digest(EOS.join(sources)),
        **({"quantization": QUANTIZATION[kind.packed]} if packed else {}),
    }
    if not force:
        cache.check_ours(folder)
        known = cache.made_with(folder)
        if known is not None and seed is None:
            recipe["seed"] = known["seed"]
        if known == recipe:
            report(f"{folder} is there already")
            return folder

    _make(family, size, folder, recipe, sources, report)
    return folder


def _make(family: str, size: str, folder: Path, recipe: dict[str, Any], sources: list[str], report: Report) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    shape, drawn, name = ALL_FAMILIES[family].sizes[size], ALL_FAMILIES[family].drawn, folder.name
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config(family, size), dtype=getattr(torch, shape.dtype))
    if "quantization" in recipe:
        model.config.quantization_config = recipe["quantization"]
    parameters = model.num_parameters()
    facts: dict[str, Any] = {"parameters": parameters}
    written = 0 if drawn else int(1.1 * parameters * getattr(torch, shape.dtype).itemsize)
    folder.parent.mkdir(parents=True, exist_ok=True)
    cache.check_space(folder.parent, written + 20_000_000)
    tokenizer = prepare_tokenizer(folder.parents[2], min(shape.vocab, TOKENIZER), sources, report)
    if not drawn:
        facts["device"] = "cuda" if torch.cuda.is_available() else "cpu"
        report(f"{name}: drawing {parameters:,} weights on the {facts['device']}")
        model = build_model(family, size, recipe["seed"], facts["device"])
    report(f"{name}: writing {folder}")
    _save(model, tokenizer, folder, recipe, facts)
    ending = ", which `moe-kernels compare` draws when a training starts" if drawn else ""
    report(f"{name}: {parameters:,} parameters in {folder}{ending}")


def _save(
    model: PreTrainedModel, tokenizer: Path, folder: Path, recipe: dict[str, Any], facts: dict[str, Any]
) -> None:
    """Write ``folder``: the model, the files of the tokenizer's folder and the manifest.

    Of a model without data (on the meta device) its configuration alone, and the seed of its weights in the manifest.
    """
    import torch
    import transformers

    with cache.replacing(folder) as partial:
        if model.device.type == "meta":
            model.config.architectures = [type(model).__name__]
            model.config.save_pretrained(partial)
        else:
            _save_weights(model, partial, folder)
        for file in tokenizer.glob("token*.json"):
            shutil.copy(file, partial)
        cache.forget_tokens(folder.parents[1])
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        versions["transformers"] = transformers.__version__
        cache.write_manifest(partial / MANIFEST, recipe, {**facts, **versions, "files": cache.file_sizes(partial)})


def _save_weights(model: PreTrainedModel, partial: Path, folder: Path) -> None:
    from safetensors import SafetensorError

    try:
        model.save_pretrained(partial)
    except SafetensorError as error:
        # safetensors says why a write failed in its text alone.
        raise MissingDependency(f"{folder} cannot be written: {error}. Cure: free some space.") from error
