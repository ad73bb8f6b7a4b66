"""The sizes this project speaks of: expert layers that are measured, and the models that are trained.

Nothing heavy is imported here, so that ``--help``, a report or a YAML test can read the tables at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class LayerShape:
    """One expert layer and the number of tokens it is measured with.

    Attributes:
        name: key of :data:`LAYERS`.
        tokens: T, tokens in one call.
        hidden: H, width of a token.
        intermediate: I, width of one expert.
        experts: E, number of experts.
        top_k: K, experts a token visits.
    """

    name: str
    tokens: int
    hidden: int
    intermediate: int
    experts: int
    top_k: int

    @property
    def rows(self) -> int:
        """R, the rows that the grouped GEMMs see: T * K."""
        return self.tokens * self.top_k

    @property
    def forward_flops(self) -> int:
        """Floating-point operations of the three GEMMs of a forward pass: 6 * R * H * I."""
        return 6 * self.rows * self.hidden * self.intermediate

    @property
    def forward_backward_flops(self) -> int:
        """Floating-point operations of forward and backward together: 18 * R * H * I."""
        return 3 * self.forward_flops


@dataclass(frozen=True)
class ModelShape:
    """One model that ``moe-kernels prepare`` makes.

    Attributes:
        name: folder under ``artifacts/models/``.
        hidden: H.
        intermediate: I, width of one routed expert.
        experts: E.
        top_k: K.
        layers: decoder layers.
        moe_layers: decoder layers that have routed experts.
        heads: attention heads.
        kv_heads: key and value heads.
        vocab: entries of the tokenizer and rows of the embedding.
        dtype: name of the torch dtype that the weights are stored in.
        extras: the rest of the family's transformers configuration, by its own names.
    """

    name: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    layers: int
    moe_layers: int
    heads: int
    kv_heads: int
    vocab: int
    dtype: str
    extras: Mapping[str, int] = field(default_factory=dict)

    def layer(self, tokens: int) -> LayerShape:
        """The expert layer of this model for a batch of ``tokens`` tokens."""
        return LayerShape(self.name, tokens, self.hidden, self.intermediate, self.experts, self.top_k)


@dataclass(frozen=True)
class Family:
    """A model family, its sizes and its three run files.

    Attributes:
        name: key of :data:`FAMILIES`.
        model_type: ``model_type`` of the transformers configuration.
        sizes: ``"1b"`` for a GPU, ``"tiny"`` for a CPU.
        baseline: file name under ``configs/moe/`` of the run with stock kernels.
        optimized: the same run with our kernels.
        test: a quick run with our kernels.
    """

    name: str
    model_type: str
    sizes: Mapping[str, ModelShape]
    baseline: str
    optimized: str
    test: str


SIZES: tuple[str, ...] = ("1b", "tiny")

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            name="mixtral",
            model_type="mixtral",
            sizes={
                "1b": ModelShape("mixtral-1b", 1024, 3584, 8, 2, 10, 10, 16, 4, 32000, "bfloat16"),
                "tiny": ModelShape("mixtral-tiny", 72, 104, 8, 2, 2, 2, 4, 2, 2048, "float32"),
            },
            baseline="mixtral-1b-baseline.yml",
            optimized="mixtral-8x7b-moe-optimized.yml",
            test="mixtral-8x7b-moe-test.yml",
        ),
        Family(
            name="qwen2-moe",
            model_type="qwen2_moe",
            sizes={
                # 704 is not a multiple of 128, on purpose: real layers are not always round.
                "1b": ModelShape(
                    "qwen2-moe-1b", 1024, 704, 64, 8, 6, 6, 16, 16, 32000, "bfloat16",
                    {"shared_expert_intermediate_size": 5632},
                ),
                "tiny": ModelShape(
                    "qwen2-moe-tiny", 64, 40, 16, 4, 2, 2, 4, 4, 2048, "float32",
                    {"shared_expert_intermediate_size": 96},
                ),
            },
            baseline="qwen2-moe-1b-baseline.yml",
            optimized="qwen2-moe-a14b-optimized.yml",
            test="qwen2-moe-7b-test.yml",
        ),
        Family(
            name="deepseek-v3",
            model_type="deepseek_v3",
            sizes={
                "1b": ModelShape(
                    "deepseek-v3-1b", 1024, 256, 128, 8, 10, 9, 16, 16, 32000, "bfloat16",
                    {
                        "intermediate_size": 2816,
                        "n_group": 8,
                        "topk_group": 4,
                        "q_lora_rank": 512,
                        "kv_lora_rank": 256,
                        "qk_nope_head_dim": 64,
                        "qk_rope_head_dim": 32,
                        "v_head_dim": 64,
                    },
                ),
                "tiny": ModelShape(
                    "deepseek-v3-tiny", 80, 24, 16, 4, 3, 2, 4, 4, 2048, "float32",
                    {
                        "intermediate_size": 160,
                        "n_group": 4,
                        "topk_group": 2,
                        "q_lora_rank": 48,
                        "kv_lora_rank": 32,
                        "qk_nope_head_dim": 16,
                        "qk_rope_head_dim": 8,
                        "v_head_dim": 16,
                    },
                ),
            },
            baseline="deepseek-v3-1b-baseline.yml",
            optimized="deepseek-v3-1b-moe-optimized.yml",
            test="deepseek-v3-1b-test.yml",
        ),
    )
}  # fmt: skip

TOKENS_PER_STEP = 16384
"""Tokens of one training step of the 1B runs: sequences of 4096, four at a time."""

LAYERS: dict[str, LayerShape] = {
    layer.name: layer
    for layer in (
        *(family.sizes["1b"].layer(TOKENS_PER_STEP) for family in FAMILIES.values()),
        LayerShape("mixtral-8x7b", 8192, 4096, 14336, 8, 2),
        LayerShape("qwen2-57b-a14b", 8192, 3584, 2560, 64, 8),
        LayerShape("qwen3-30b-a3b", 16384, 2048, 768, 128, 8),
        LayerShape("olmoe-7b", 16384, 2048, 1024, 64, 8),
        LayerShape("deepseek-v3", 8192, 7168, 2048, 256, 8),
        LayerShape("7b-fine", 24576, 1536, 256, 128, 8),
        LayerShape("30b-fine", 32768, 4096, 256, 256, 16),
        LayerShape("gpt-oss-like", 8192, 2880, 2880, 128, 4),
    )
}
"""Expert layers that are measured: the three 1B models' and those of models people train."""
