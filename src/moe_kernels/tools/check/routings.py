"""Routings by name, from friendly to hostile. Every backend must be right on every one of them."""

from __future__ import annotations

import torch
from torch import Tensor

ROUTINGS = (
    "balanced", "random", "one_hot_expert", "all_to_last", "empty_first_middle_last", "one_token_each",
    "duplicated_ids", "sentinels", "all_sentinels", "sorted", "reversed", "zipf", "ties",
)  # fmt: skip


def _distinct(scores: Tensor, top_k: int) -> Tensor:
    """The top_k largest of each row; beyond the number of experts the choice starts over (duplicates)."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    repeats = -(-top_k // scores.shape[-1])
    return order.repeat(1, repeats)[:, :top_k].contiguous()


def _ids(name: str, tokens: int, top_k: int, experts: int, g: torch.Generator) -> Tensor:
    """(tokens, top_k), int64."""
    size, slots = (tokens, top_k), torch.arange(tokens * top_k)
    match name:
        case "balanced":
            return (slots % experts).view(size)
        case "random":
            return _distinct(torch.rand(tokens, experts, generator=g), top_k)
        case "one_hot_expert":  # one expert takes every token
            scores = torch.rand(tokens, experts, generator=g)
            scores[:, experts // 2] = 2.0
            return _distinct(scores, top_k)
        case "all_to_last":
            return torch.full(size, experts - 1)
        case "empty_first_middle_last":
            scores = torch.rand(tokens, experts, generator=g)
            empty = {0, experts // 2, experts - 1}
            used = [e for e in range(experts) if e not in empty] or [experts - 1]
            return torch.tensor(used)[_distinct(scores[:, used], top_k)]
        case "one_token_each":  # expert e gets one row while there are rows for it; expert 0 gets the rest
            return torch.where(slots < experts, slots, 0).view(size)
        case "duplicated_ids":
            ids = torch.randint(experts, size, generator=g)
            ids[::2] = ids[::2, :1]
            return ids
        case "sentinels":  # ids that mean 'not here': E (expert parallelism), -1, large ones; all that token 0 has
            ids = _ids("random", tokens, top_k, experts, g)
            drop = torch.rand(size, generator=g) < 0.4
            outside = torch.tensor([experts, -1, experts + 7, 2**31 - 1, -(2**31)])
            ids = torch.where(drop, outside[torch.randint(len(outside), size, generator=g)], ids)
            ids[:1] = experts
            return ids
        case "all_sentinels":
            return torch.full(size, experts)
        case "sorted":
            return torch.randint(experts, (tokens * top_k,), generator=g).sort().values.view(size)
        case "reversed":
            return _ids("sorted", tokens, top_k, experts, g).flip(0, 1)
        case "zipf":  # popularity falls as 1/rank; the Gumbel top-k draws without replacement
            popularity = -torch.arange(1, experts + 1).double().log()
            uniform = torch.rand(tokens, experts, generator=g, dtype=torch.float64).clamp_min(1e-12)
            return _distinct(popularity - (-uniform.log()).log(), top_k)
        case "ties":  # a router whose scores are all equal: every token picks the same first experts
            return _distinct(torch.zeros(tokens, experts), top_k)
    raise KeyError(name)


def make_routing(name: str, tokens: int, top_k: int, experts: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The named routing.

    Returns:
        ``topk_ids`` (tokens, top_k) int64 and ``topk_weights`` (tokens, top_k) float32, on the CPU. The weights
        are distinct within a row (so that a swapped slot shows), mostly positive, with some exact zeros and some
        negative ones; ``ties`` gives equal weights.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = _ids(name, tokens, top_k, experts, generator)
    if name == "ties":
        return ids, torch.full((tokens, top_k), 1.0 / max(top_k, 1))
    weights = torch.rand(tokens, top_k, generator=generator) + 0.1
    weights = weights / weights.sum(-1, keepdim=True)
    oddity = torch.rand(tokens, top_k, generator=generator)
    weights = torch.where(oddity < 0.05, torch.zeros(()), torch.where(oddity > 0.95, -weights, weights))
    return ids, weights
