"""The sizes this project speaks of: expert layers that are measured, and the models that are trained.

Nothing heavy is imported here, so that ``--help``, a report or a YAML test can read the tables at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class LayerShape:
    """One expert layer and the number of tokens it is measured with."""

    name: str
    tokens: int  # T, in one call
    hidden: int  # H, width of a token
    intermediate: int  # I, width of one expert
    experts: int  # E
    top_k: int  # K, experts a token visits

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
    """One model that ``moe-kernels prepare`` makes, in a folder of its name."""

    name: str
    hidden: int
    intermediate: int  # of one routed expert
    experts: int
    top_k: int
    layers: int  # decoder layers
    moe_layers: int  # those of them that have routed experts
    heads: int
    kv_heads: int
    vocab: int  # entries of the tokenizer and rows of the embedding
    dtype: str  # name of the torch dtype that the weights are stored in
    extras: Mapping[str, int | float] = field(default_factory=dict)  # more of the transformers configuration

    def layer(self, tokens: int) -> LayerShape:
        """The expert layer of this model for a batch of ``tokens`` tokens."""
        return LayerShape(self.name, tokens, self.hidden, self.intermediate, self.experts, self.top_k)


@dataclass(frozen=True)
class Family:
    """A model family, its sizes and its run files in ``configs/moe``."""

    name: str
    model_type: str  # of the transformers configuration
    sizes: Mapping[str, ModelShape]  # the first, such as "1b", for a GPU; "tiny" for a CPU
    baseline: str  # with stock kernels
    optimized: str  # the same run with our kernels
    test: str = ""  # a quick run with our kernels; empty: there is none
    drawn: bool = False  # its weights are drawn when a training starts, and never on the disk
    packed: str = ""  # "fp8" or "mxfp4": a drawn family that is published in it too, and trains LoRA over it

    @property
    def large(self) -> str:
        """The name of the size for a GPU."""
        return next(iter(self.sizes))

    def model(self, size: str, packed: bool = False) -> str:
        """The name of a model: its folder in ``artifacts/models``."""
        return self.sizes[size].name + (f"-{self.packed}" if packed else "")


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            "mixtral", "mixtral",
            {
                "1b": ModelShape("mixtral-1b", 1024, 3584, 8, 2, 10, 10, 16, 4, 32000, "bfloat16"),
                "tiny": ModelShape("mixtral-tiny", 72, 104, 8, 2, 2, 2, 4, 2, 2048, "float32"),
            },
            "mixtral-1b-baseline.yml", "mixtral-8x7b-moe-optimized.yml", "mixtral-8x7b-moe-test.yml",
        ),
        Family(
            "qwen2-moe", "qwen2_moe",
            {
                # 704 is not a multiple of 128, on purpose: real layers are not always round.
                "1b": ModelShape("qwen2-moe-1b", 1024, 704, 64, 8, 6, 6, 16, 16, 32000, "bfloat16",
                                 {"shared_expert_intermediate_size": 5632}),
                "tiny": ModelShape("qwen2-moe-tiny", 64, 40, 16, 4, 2, 2, 4, 4, 2048, "float32",
                                   {"shared_expert_intermediate_size": 96}),
            },
            "qwen2-moe-1b-baseline.yml", "qwen2-moe-a14b-optimized.yml", "qwen2-moe-7b-test.yml",
        ),
        Family(
            "deepseek-v3", "deepseek_v3",
            {
                "1b": ModelShape(
                    "deepseek-v3-1b", 1024, 256, 128, 8, 10, 9, 16, 16, 32000, "bfloat16",
                    {"intermediate_size": 2816, "n_group": 8, "topk_group": 4, "q_lora_rank": 512,
                     "kv_lora_rank": 256, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64},
                ),
                "tiny": ModelShape(
                    "deepseek-v3-tiny", 80, 24, 16, 4, 3, 2, 4, 4, 2048, "float32",
                    {"intermediate_size": 160, "n_group": 4, "topk_group": 2, "q_lora_rank": 48,
                     "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16},
                ),
            },
            "deepseek-v3-1b-baseline.yml", "deepseek-v3-1b-moe-optimized.yml", "deepseek-v3-1b-test.yml",
        ),
    )
}  # fmt: skip

REAL_FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            "qwen3-moe", "qwen3_moe",
            {
                "30b": ModelShape("qwen3-30b-a3b", 2048, 768, 128, 8, 48, 48, 32, 4, 151936, "bfloat16",
                                  {"head_dim": 128, "intermediate_size": 6144}),
                "tiny": ModelShape("qwen3-moe-tiny", 64, 40, 16, 4, 2, 2, 4, 2, 2048, "float32",
                                   {"head_dim": 24, "intermediate_size": 96, "initializer_range": 0.1}),
            },
            "qwen3-30b-a3b-lora-baseline.yml", "qwen3-30b-a3b-lora.yml", drawn=True, packed="fp8",
        ),
        Family(
            "gpt-oss", "gpt_oss",
            {
                "20b": ModelShape("gpt-oss-20b", 2880, 2880, 32, 4, 24, 24, 64, 8, 201088, "bfloat16",
                                  {"head_dim": 64, "max_position_embeddings": 131072}),
                # Blocks of mxfp4 are 32 values of a row.
                "tiny": ModelShape("gpt-oss-tiny", 96, 32, 8, 4, 2, 2, 4, 2, 2048, "float32",
                                   {"head_dim": 24, "max_position_embeddings": 131072, "initializer_range": 0.1}),
            },
            "gpt-oss-20b-lora-baseline.yml", "gpt-oss-20b-lora.yml", drawn=True, packed="mxfp4",
        ),
    )
}  # fmt: skip
"""Families at the size people train: their run files train an adapter, and name the checkpoint on the Hub."""

ALL_FAMILIES: dict[str, Family] = FAMILIES | REAL_FAMILIES

#: The layers of the three 1B models, as the commands take them.
DEFAULT_SHAPES = ",".join(family.sizes["1b"].name for family in FAMILIES.values())

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
        LayerShape("glm-4.5-air", 8192, 4096, 1408, 128, 8),
        LayerShape("qwen3-next", 8192, 2048, 512, 512, 10),
        LayerShape("qwen3-235b-a22b", 8192, 4096, 1536, 128, 8),
        LayerShape("few-rows", 4096, 4096, 1536, 512, 8),  # 64 an expert
    )
}
"""Expert layers that are measured: the three 1B models' and those of models people train."""
