"""What a training step costs on many GPUs: arithmetic over measured kernel rates and speeds that the user states.

Layout: data parallel; experts over groups of ``ep`` GPUs (expert parallelism), each group's copy sharded over the
other groups (FSDP2); everything else sharded over all GPUs. Unless told otherwise activations are checkpointed per
layer, so that a forward pass runs twice. Units are bytes and seconds, G = 1e9.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from moe_kernels.shapes import LAYERS, LayerShape

BF16 = 2


@dataclass(frozen=True)
class Model:
    """A model to plan for."""

    layer: LayerShape
    layers: int  # decoder layers
    moe_layers: int  # those of them with routed experts
    attention: int  # parameters of one layer's attention
    attention_width: int  # heads * (query-key width + value width): the cost of the scores
    shared: int  # parameters of the shared expert and the router of an expert layer
    dense_ffn: int  # parameters of the feed-forward block of a layer without experts
    vocab: int  # rows of the embedding and of the output head, which are not tied

    @property
    def experts_per_layer(self) -> int:
        """Parameters of all routed experts of a layer."""
        return 3 * self.layer.experts * self.layer.hidden * self.layer.intermediate

    @property
    def expert_parameters(self) -> int:
        return self.moe_layers * self.experts_per_layer

    @property
    def block_parameters(self) -> int:
        """All layers without their routed experts."""
        blocks = self.layers * self.attention + self.moe_layers * self.shared
        return blocks + (self.layers - self.moe_layers) * self.dense_ffn

    @property
    def other_parameters(self) -> int:
        """Everything but routed experts."""
        return self.block_parameters + 2 * self.vocab * self.layer.hidden


MODELS: dict[str, Model] = {
    "mixtral-8x7b": Model(
        LAYERS["mixtral-8x7b"], 32, 32,
        attention=4096 * (4096 + 1024 + 1024 + 4096), attention_width=32 * (128 + 128),
        shared=8 * 4096, dense_ffn=0, vocab=32000,
    ),
    "qwen3-30b-a3b": Model(
        LAYERS["qwen3-30b-a3b"], 48, 48,
        attention=2048 * (4096 + 512 + 512 + 4096), attention_width=32 * (128 + 128),
        shared=128 * 2048, dense_ffn=0, vocab=151936,
    ),
    "deepseek-v3": Model(
        LAYERS["deepseek-v3"], 61, 58,
        # MLA: q_a, q_b, kv_a, kv_b, o.
        attention=7168 * 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 * 128 * 256 + 128 * 128 * 7168,
        attention_width=128 * (192 + 128),
        shared=3 * 7168 * 2048 + 256 * 7168, dense_ffn=3 * 7168 * 18432, vocab=129280,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Rates:
    """Measured rates of an expert layer, in FLOP/s, and where they come from."""

    forward: float
    forward_backward: float
    source: str


@dataclass(frozen=True)
class Assumptions:
    """What the user states; every field is an option of ``moe-kernels plan``."""

    tokens: int = 8192  # of one GPU in one micro-batch
    sequence: int = 4096
    other_flops: float | None = None  # per second, of everything but routed experts; None: no time for it
    gpus_per_node: int = 8  # joined by the fast link
    node_link: float = 300e9  # bytes/s that one GPU sends within a node
    network_link: float = 40e9  # bytes/s that one GPU sends to other nodes
    weight_bytes: int = 4  # kept per parameter, like the next two
    grad_bytes: int = 4
    optimizer_bytes: int = 8
    checkpointing: bool = True  # of every decoder layer


@dataclass(frozen=True)
class Estimate:
    """One row of the plan: bytes per GPU and seconds per step."""

    model: str
    gpus: int
    ep: int
    weights: float
    grads: float
    optimizer: float
    gathered: float
    activations: float
    all_to_all: float
    experts_s: float
    other_s: float | None
    all_to_all_s: float
    fsdp_s: float

    @property
    def memory(self) -> float:
        """Bytes per GPU in all."""
        return self.weights + self.grads + self.optimizer + self.gathered + self.activations

    @property
    def step_s(self) -> float | None:
        """Experts and all-to-all wait for each other; FSDP's traffic overlaps both. None without ``other_s``."""
        return None if self.other_s is None else max(self.experts_s + self.other_s + self.all_to_all_s, self.fsdp_s)


def estimate(
    name: str, gpus: int, ep: int, rates: Rates, a: Assumptions, model: Model | None = None
) -> Estimate:
    """One model on ``gpus`` GPUs, its experts spread over groups of ``ep``; a ``model`` that is not in MODELS too."""
    model = model or MODELS[name]
    layer = model.layer
    rows = a.tokens * layer.top_k
    per_gpu = (model.expert_parameters + model.other_parameters) / gpus

    # Memory beside the sharded states: two layers' gathered weights (the one at work and the next) and one layer's
    # gradients; each layer's input; what one layer's recomputation holds (Z, A and their gradients, rows before and
    # after each all-to-all, 16 copies of its input for the rest) or, after the last layer, logits and their gradient.
    layer_weights = model.experts_per_layer / ep + model.block_parameters / model.layers
    one_layer = rows * (4 * layer.hidden + 6 * layer.intermediate) * BF16 + 16 * a.tokens * layer.hidden * BF16
    logits = 2 * a.tokens * model.vocab * 4
    activations: float = model.layers * a.tokens * layer.hidden * BF16 + max(one_layer, logits)
    if not a.checkpointing:
        # What every layer keeps: X and Z, three widths of a dense or shared feed-forward block, whose parameters are
        # 3 H times its width, and 16 copies of the layer's input for the rest; and the logits.
        routed = model.moe_layers * (2 * rows * layer.intermediate + a.tokens * layer.hidden)
        dense = model.moe_layers * model.shared + (model.layers - model.moe_layers) * model.dense_ffn
        rest = 16 * model.layers * a.tokens * layer.hidden
        activations = (routed + a.tokens * dense / layer.hidden + rest) * BF16 + logits

    # All-to-all: rows out and back, in the forward pass, its recomputation and the backward pass.
    forwards = 2 if a.checkpointing else 1
    exchanged = 2 * (forwards + 1) * model.moe_layers * rows * layer.hidden * BF16
    nodes_of_group = math.ceil(ep / a.gpus_per_node)
    to_network = exchanged * (nodes_of_group - 1) / nodes_of_group
    in_node = exchanged * (ep - 1) / ep - to_network

    # FSDP: weights gathered twice in bfloat16, gradients reduced once; a ring sends (n-1)/n of them. GPUs of a node
    # that need the same bytes fetch them from other nodes once, over all their network links.
    copies = gpus // ep
    traffic = 2 * BF16 + a.grad_bytes
    expert_bytes = traffic * model.expert_parameters / ep * (copies - 1) / copies
    other_bytes = traffic * model.other_parameters * (gpus - 1) / gpus
    expert_link = other_link = a.node_link
    if gpus > a.gpus_per_node:
        expert_link = min(a.node_link, a.network_link * max(1, a.gpus_per_node // ep))
        other_link = min(a.node_link, a.network_link * a.gpus_per_node)

    forward = 6 * rows * layer.hidden * layer.intermediate * model.moe_layers
    scores = a.tokens * a.sequence * model.attention_width * model.layers
    linear = 2 * a.tokens * (model.block_parameters + model.vocab * layer.hidden)
    return Estimate(
        model=name,
        gpus=gpus,
        ep=ep,
        weights=per_gpu * a.weight_bytes,
        grads=per_gpu * a.grad_bytes,
        optimizer=per_gpu * a.optimizer_bytes,
        gathered=3 * layer_weights * BF16,
        activations=activations,
        all_to_all=to_network + in_node,
        experts_s=(forwards - 1) * forward / rates.forward + 3 * forward / rates.forward_backward,
        other_s=None if a.other_flops is None else (forwards + 2) * (scores + linear) / a.other_flops,
        all_to_all_s=in_node / a.node_link + to_network / a.network_link,
        fsdp_s=expert_bytes / expert_link + other_bytes / other_link,
    )
