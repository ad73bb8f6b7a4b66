"""The models that the comparisons train: random weights from a seed, and a tokenizer trained right here."""

from __future__ import annotations

import platform
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_kernels.shapes import FAMILIES, SIZES, ModelShape
from moe_kernels.tools.common.errors import UsageError
from moe_kernels.tools.prepare.cache import (
    MANIFEST,
    NotEnoughSpace,
    Report,
    check_ours,
    check_space,
    digest,
    file_sizes,
    forget_tokens,
    made_with,
    replacing,
    silent,
    write_manifest,
)
from moe_kernels.tools.prepare.text import BOS, EOS, PAD, stdlib_sources

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

SPECIAL = (PAD, BOS, EOS)
CONTEXT = 4096


def find_shape(family: str, size: str) -> ModelShape:
    """The sizes of one model.

    Raises:
        UsageError: no such family or size.
    """
    if family not in FAMILIES:
        raise UsageError(f"There is no family {family!r}. Name one of {', '.join(FAMILIES)}.")
    if size not in SIZES:
        raise UsageError(f"There is no size {size!r}. Name one of {', '.join(SIZES)}.")
    return FAMILIES[family].sizes[size]


def model_config(family: str, size: str = "1b") -> PreTrainedConfig:
    """The transformers configuration of a model; what is not named here keeps the family's default."""
    from transformers import AutoConfig

    shape = find_shape(family, size)
    routed: dict[str, dict[str, int]] = {
        "mixtral": {"num_local_experts": shape.experts, "intermediate_size": shape.intermediate},
        "qwen2-moe": {"num_experts": shape.experts, "moe_intermediate_size": shape.intermediate},
        "deepseek-v3": {
            "n_routed_experts": shape.experts,
            "moe_intermediate_size": shape.intermediate,
            "first_k_dense_replace": shape.layers - shape.moe_layers,
        },
    }
    return AutoConfig.for_model(
        FAMILIES[family].model_type,
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        num_experts_per_tok=shape.top_k,
        max_position_embeddings=CONTEXT,
        pad_token_id=SPECIAL.index(PAD),
        bos_token_id=SPECIAL.index(BOS),
        eos_token_id=SPECIAL.index(EOS),
        **routed[family],
        **shape.extras,
    )


def build_model(family: str, size: str, seed: int, device: str) -> PreTrainedModel:
    """A model with random weights. The same seed, size and kind of device give the same weights.

    The caller's random state is left as it was.
    """
    import torch
    from transformers import AutoModelForCausalLM

    shape = find_shape(family, size)
    on_gpu = [torch.cuda.current_device()] if device == "cuda" else []
    with torch.random.fork_rng(devices=on_gpu), torch.device(device):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(model_config(family, size), dtype=getattr(torch, shape.dtype))


def count_parameters(model: PreTrainedModel) -> int:
    """Trainable numbers in a model."""
    return sum(parameter.numel() for parameter in model.parameters())


def prepare_tokenizer(
    root: Path, vocab: int, *, sources: list[str] | None = None, force: bool = False, report: Report = silent
) -> Path:
    """A byte-level BPE tokenizer of ``vocab`` entries, trained on the standard library unless it is there.

    Returns:
        ``artifacts/tokenizers/stdlib-<vocab>``.
    """
    folder = root / "artifacts" / "tokenizers" / f"stdlib-{vocab}"
    sources = stdlib_sources() if sources is None else sources
    recipe = {"vocab": vocab, "special": list(SPECIAL), "text": digest(EOS.join(sources))}
    if not force:
        check_ours(folder)
        if made_with(folder) == recipe:
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
    with replacing(folder) as partial:
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS
        ).save_pretrained(partial)
        facts = {"python": platform.python_version(), "files": file_sizes(partial)}
        write_manifest(partial / MANIFEST, recipe, facts)
    return folder


def prepare_model(
    family: str,
    size: str = "1b",
    root: Path = Path(),
    seed: int | None = None,
    *,
    force: bool = False,
    report: Report = silent,
) -> Path:
    """Make a model with random weights and its tokenizer, on the GPU if there is one, unless they are there.

    Args:
        family: key of ``FAMILIES``.
        size: ``"1b"`` or ``"tiny"``.
        root: folder that holds ``artifacts/``.
        seed: of the weights. None takes a finished model of any seed, and makes one from seed 0 otherwise.
        force: make it again.
        report: is told what happens.

    Returns:
        ``artifacts/models/<family>-<size>``, which transformers and Axolotl load by its path.

    Raises:
        UsageError: no such family or size, or the folder holds something else.
        MissingDependency: this Python came without its library's sources.
        NotEnoughSpace: the disk is too full.
    """
    shape = find_shape(family, size)
    artifacts = root / "artifacts"
    folder = artifacts / "models" / shape.name
    sources = stdlib_sources()
    recipe: dict[str, Any] = {
        "shape": asdict(shape),
        "seed": seed or 0,
        "context": CONTEXT,
        "text": digest(EOS.join(sources)),
    }
    if not force:
        check_ours(folder)
        known = made_with(folder)
        if known is not None and seed is None:
            recipe["seed"] = known["seed"]
        if known == recipe:
            report(f"{folder} is there already")
            return folder

    import torch
    import transformers
    from safetensors import SafetensorError

    with torch.device("meta"):
        parameters = count_parameters(transformers.AutoModelForCausalLM.from_config(model_config(family, size)))
    folder.parent.mkdir(parents=True, exist_ok=True)
    check_space(folder.parent, int(1.1 * parameters * getattr(torch, shape.dtype).itemsize) + 20_000_000)
    tokenizer = prepare_tokenizer(root, shape.vocab, sources=sources, report=report)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    report(f"{shape.name}: drawing {parameters:,} weights on the {device}")
    model = build_model(family, size, recipe["seed"], device)
    with replacing(folder) as partial:
        report(f"{shape.name}: writing {folder}")
        try:
            model.save_pretrained(partial)
        except SafetensorError as error:
            # Of a failed write it says no more than its text, in which the disk's own words are.
            raise NotEnoughSpace(f"{folder} cannot be written: {error}. Cure: free some space.") from error
        for file in tokenizer.glob("token*.json"):
            shutil.copy(file, partial)
        forget_tokens(artifacts)
        write_manifest(
            partial / MANIFEST,
            recipe,
            {
                "parameters": parameters,
                "device": device,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "files": file_sizes(partial),
            },
        )
    report(f"{shape.name}: {parameters:,} parameters in {folder}")
    return folder
