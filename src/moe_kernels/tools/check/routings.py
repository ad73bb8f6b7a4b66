"""Routings by name, from friendly to hostile. Every backend must be right on every one of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# (tokens, top_k, experts, generator) -> ids (tokens, top_k), int64
_Ids = Callable[[int, int, int, torch.Generator], Tensor]


def _distinct(scores: Tensor, top_k: int) -> Tensor:
    """The top_k largest of each row; beyond the number of experts the choice starts over (duplicates)."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    repeats = -(-top_k // scores.shape[-1])
    return order.repeat(1, repeats)[:, :top_k].contiguous()


def _random(tokens: int, top_k: int, experts: int, g: torch.Generator) -> Tensor:
    return _distinct(torch.rand(tokens, experts, generator=g), top_k)


def _balanced(tokens: int, top_k: int, experts: int, g: torch.Generator) -> Tensor:
    return (torch.arange(tokens * top_k) % experts).view(tokens, top_k)


def _one_hot_expert(tokens: int, top_k: int, experts: int, g: torch.Generator) -> Tensor:
    scores = torch.rand(tokens, experts, generator=g)
    scores[:, experts // 2] = 2.0
    return _distinct(scores, top_k)


def _all_to_last(tokens: int, top_k: int, experts: int, g: torch.Generator) -> Tensor:
    return torch.full((tokens, top_k), experts - 1)


def _empty_first_middle_last(tokens: int, top_k: int, experts: int, g: torch.Generator) -> Tensor:
    scores = torch.rand(tokens, experts, generator=g)
    empty = {0, experts // 2, experts - 1}
    used = [e for e in range(experts) if e not in empty] or [experts - 1]
    return torch.tensor(used)[_distinct(scores[:, used], top_k)]


def _one_token_each(tokens: int, top_k: int, experts: int, g: torch.Generator) -> Tensor:
    """Expert e gets one row while there are rows for it; what is left goes to expert 0."""
    flat = torch.arange(tokens * top_k)
    return torch.where(flat < experts, flat, 0).view(tokens, top_k)


def _duplicated_ids(tokens: int, top_k: int, experts: int, g: torch.Generator) -> Tensor:
    ids = torch.randint(experts, (tokens, top_k), generator=g)
    ids[::2] = ids[::2, :1]
    return ids


def _sentinels(tokens: int, top_k: int, experts: int, g: torch.Generator) -> Tensor:
    """Ids that mean 'not here': E (expert parallelism), -1, and large ones; token 0 has nothing else."""
    ids = _random(tokens, top_k, experts, g)
    drop = torch.rand(tokens, top_k, generator=g) < 0.4
    outside = torch.tensor([experts, -1, experts + 7, 2**31 - 1, -(2**31)])
    ids = torch.where(drop, outside[torch.randint(len(outside), (tokens, top_k), generator=g)], ids)
    ids[:1] = experts
    return ids


def _all_sentinels(tokens: int, top_k: int, experts: int, g: torch.Generator) -> Tensor:
    return torch.full((tokens, top_k), experts)


def _sorted(tokens: int, top_k: int, experts: int, g: torch.Generator) -> Tensor:
    return torch.randint(experts, (tokens * top_k,), generator=g).sort().values.view(tokens, top_k)


def _reversed(tokens: int, top_k: int, experts: int, g: torch.Generator) -> Tensor:
    return _sorted(tokens, top_k, experts, g).flip(0, 1)


def _zipf(tokens: int, top_k: int, experts: int, g: torch.Generator) -> Tensor:
    """Expert popularity falls as 1/rank (Gumbel top-k draws without replacement)."""
    popularity = -torch.arange(1, experts + 1).double().log()
    gumbel = -(-torch.rand(tokens, experts, generator=g, dtype=torch.float64).clamp_min(1e-12).log()).log()
    return _distinct(popularity + gumbel, top_k)


def _ties(tokens: int, top_k: int, experts: int, g: torch.Generator) -> Tensor:
    """A router whose scores are all equal: every token picks the same first experts."""
    return _distinct(torch.zeros(tokens, experts), top_k)


ROUTINGS: dict[str, _Ids] = {
    "balanced": _balanced,
    "random": _random,
    "one_hot_expert": _one_hot_expert,
    "all_to_last": _all_to_last,
    "empty_first_middle_last": _empty_first_middle_last,
    "one_token_each": _one_token_each,
    "duplicated_ids": _duplicated_ids,
    "sentinels": _sentinels,
    "all_sentinels": _all_sentinels,
    "sorted": _sorted,
    "reversed": _reversed,
    "zipf": _zipf,
    "ties": _ties,
}


def make_routing(
    name: str, tokens: int, top_k: int, experts: int, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """The named routing.

    Returns:
        ``topk_ids`` (tokens, top_k) int64 and ``topk_weights`` (tokens, top_k) of ``dtype``, on the CPU. The weights
        are distinct within a row (so that a swapped slot shows), mostly positive, with some exact zeros and some
        negative ones; ``ties`` gives equal weights.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = ROUTINGS[name](tokens, top_k, experts, generator).to(torch.int64)
    if name == "ties":
        return ids, torch.full((tokens, top_k), 1.0 / max(top_k, 1), dtype=dtype)
    weights = torch.rand(tokens, top_k, generator=generator) + 0.1
    weights = weights / weights.sum(-1, keepdim=True)
    oddity = torch.rand(tokens, top_k, generator=generator)
    weights = torch.where(oddity < 0.05, torch.zeros(()), torch.where(oddity > 0.95, -weights, weights))
    return ids, weights.to(dtype)
