"""How a router spreads tokens over experts: the numbers of one layer, and the file of one training.

The file holds JSON lines: a head for each start of the training, then records, each of what was counted since the
record before. A record is made when the trainer logs (in a long training not each time) or saves, and at the end.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

FILE_NAME = "moe_router.jsonl"
SCHEMA = "moe-kernels router 1"
MOST_ROWS = 2**63  # of one layer over a whole training: sums over records fit into int64


class LayerLoad(NamedTuple):
    """The rows that one expert layer was given over some steps."""

    tokens: tuple[int, ...]  # routed rows of each expert; a token counts once for each expert it was sent to
    rows: int  # tokens x K, those without an expert too (ids outside [0, E)); less than MOST_ROWS


class LoadNumbers(NamedTuple):
    """How even the load of each of several layers is."""

    imbalance: list[float]  # rows of the busiest expert over the mean: 1 is even, the number of experts one for all
    entropy: list[float]  # of the distribution over that of an even one: 1 is even, 0 is one expert for all
    dead: list[int]  # experts that were given nothing
    dropped_share: list[float]  # of the rows, those that went to no expert


@dataclass(frozen=True, eq=False)
class Loads:
    """The loads of several expert layers in one array, for speed: the training waits meanwhile."""

    tokens: NDArray[np.int64]  # (sum of the layers' experts,), routed rows of each expert, layer after layer
    experts: tuple[int, ...]  # of each layer
    rows: tuple[int, ...]  # of each layer, see LayerLoad

    @classmethod
    def of(cls, layers: Sequence[LayerLoad]) -> Loads:
        """The same of layers one by one."""
        tokens = np.fromiter(chain.from_iterable(layer.tokens for layer in layers), np.int64)
        return cls(tokens, tuple(len(layer.tokens) for layer in layers), tuple(layer.rows for layer in layers))

    def __add__(self, other: Loads) -> Loads:
        """Of the same layers over the steps of both."""
        rows = tuple(a + b for a, b in zip(self.rows, other.rows, strict=True))
        return Loads(self.tokens + other.tokens, self.experts, rows)

    def layers(self) -> list[LayerLoad]:
        """One by one, as Python's own numbers."""
        parts = np.split(self.tokens, _first(self.experts)[1:])
        return [LayerLoad(tuple(part.tolist()), rows) for part, rows in zip(parts, self.rows, strict=True)]

    def numbers(self) -> LoadNumbers:
        """How even each layer is."""
        tokens, experts = self.tokens, self.experts
        first = _first(experts)
        total = np.add.reduceat(tokens, first).tolist()
        busiest = np.maximum.reduceat(tokens, first).tolist()
        logs = np.add.reduceat(tokens * np.log2(np.maximum(tokens, 1)), first).tolist()
        return LoadNumbers(
            imbalance=[most * e / n if n else 1.0 for most, e, n in zip(busiest, experts, total, strict=True)],
            # The entropy of shares t / n is log n less the mean, over the n, of log t.
            entropy=[
                max(math.log2(n) - log / n, 0.0) / math.log2(e) if n and e > 1 else 1.0
                for log, e, n in zip(logs, experts, total, strict=True)
            ],
            dead=np.add.reduceat(tokens == 0, first, dtype=np.int64).tolist(),
            dropped_share=[(row - n) / row if row else 0.0 for row, n in zip(self.rows, total, strict=True)],
        )


@functools.lru_cache
def _first(experts: tuple[int, ...]) -> NDArray[np.int64]:
    """The place of each layer's first expert."""
    return np.cumsum((0, *experts[:-1]))


@dataclass
class RouterHistory:
    """The router of one training over time."""

    layers: list[str] = field(default_factory=list)  # names of the expert layers, in the order of the model
    experts: list[int] = field(default_factory=list)  # of each layer
    steps: list[int] = field(default_factory=list)  # the trainer's step at each record, rising
    tokens: list[list[list[int]]] = field(
        default_factory=list
    )  # [record][layer][expert]: rows since the record before
    rows: list[list[int]] = field(default_factory=list)  # [record][layer]: rows in all

    def load(self, record: int, layer: int) -> LayerLoad:
        """The numbers of one layer at one record."""
        return LayerLoad(tuple(self.tokens[record][layer]), self.rows[record][layer])

    def of_layer(self, layer: int) -> list[LayerLoad]:
        """The numbers of one layer at every record."""
        return [self.load(record, layer) for record in range(len(self.steps))]

    def sum(self, layer: int, first: int = 0, last: int | None = None) -> LayerLoad:
        """The numbers of one layer over the records from ``first`` to before ``last``."""
        counts = zip(*(self.tokens[index][layer] for index in range(len(self.steps))[first:last]), strict=True)
        return LayerLoad(tuple(sum(column) for column in counts), sum(rows[layer] for rows in self.rows[first:last]))

    def numbers(self, first: int = 0, last: int | None = None) -> LoadNumbers:
        """How even each layer is over these records."""
        return Loads.of([self.sum(layer, first, last) for layer in range(len(self.layers))]).numbers()

    def check(self) -> None:
        """Raise ValueError where the parts do not fit each other."""
        lines = [head(self.layers, self.experts, 0)] if self.layers else []
        entries = zip(self.steps, self.tokens, self.rows, strict=False)
        lines += [_line({"step": step, "tokens": tokens, "rows": rows}) for step, tokens, rows in entries]
        whole = len(self.steps) == len(self.tokens) == len(self.rows) and (self.layers or not self.steps)
        if not whole or (lines and _parsed("".join(lines).encode(), "the router's history") != self):
            raise ValueError("the router's history does not fit its layers")


def head(layers: Sequence[str], experts: Sequence[int], from_step: int) -> str:
    """The line that a training starts with; one that resumes writes it again, with the step it resumes from.

    It begins with a newline: a kill may have cut the line before it.
    """
    return "\n" + _line({"schema": SCHEMA, "from_step": from_step, "layers": [*layers], "experts": [*experts]})


def record(step: int, loads: Iterable[LayerLoad]) -> str:
    """The line of one record."""
    kept = list(loads)
    return _line({"step": step, "tokens": [load.tokens for load in kept], "rows": [load.rows for load in kept]})


def read_history(path: Path) -> RouterHistory:
    """What a training wrote so far. The last line before a start or the end may be cut off.

    Raises:
        ValueError: the file is no router history, is damaged, or holds records that do not fit its layers.
    """
    return _parsed(path.read_bytes(), str(path))


def thinned(history: RouterHistory, most: int) -> RouterHistory:
    """At most ``most`` records: the steps are cut into so many parts, and records that end in one part are added."""
    if len(history.steps) <= most:
        return history
    part = [most * (step - 1) // history.steps[-1] for step in history.steps]
    starts = [index for index in range(len(part)) if index == 0 or part[index] != part[index - 1]]
    ends = [*starts[1:], len(part)]
    sums = [
        [history.sum(layer, start, end) for layer in range(len(history.layers))]
        for start, end in zip(starts, ends, strict=True)
    ]
    return RouterHistory(
        history.layers,
        history.experts,
        [history.steps[end - 1] for end in ends],
        [[[*load.tokens] for load in loads] for loads in sums],
        [[load.rows for load in loads] for loads in sums],
    )


def _parsed(data: bytes, where: str) -> RouterHistory:
    history = RouterHistory()
    begun, cut = False, 0
    for number, text in enumerate(data.split(b"\n"), start=1):
        if not text.strip():
            continue
        try:
            entry: Any = json.loads(text)
        except (ValueError, RecursionError):  # no JSON, no UTF-8, a number of thousands of digits
            cut = cut or number
            continue
        if _is_head(entry):
            _start(history, entry)
            begun, cut = True, 0
        elif cut or not begun or not _is_record(entry, history.experts):
            raise ValueError(f"{where}, line {cut or number}: no line of a router history ({SCHEMA}).")
        elif history.steps and entry["step"] <= history.steps[-1]:
            raise ValueError(f"{where}, line {number}: step {entry['step']} comes after {history.steps[-1]}.")
        else:
            history.steps.append(entry["step"])
            history.tokens.append(entry["tokens"])
            history.rows.append(entry["rows"])
    if not begun:
        raise ValueError(f"{where} is not a router history ({SCHEMA}).")
    if any(sum(rows) >= MOST_ROWS for rows in zip(*history.rows, strict=True)):
        raise ValueError(f"{where}: more rows than a training can have.")
    return history


def _start(history: RouterHistory, entry: dict[str, Any]) -> None:
    """Take in a head: drop the records after the step that the training resumes from."""
    same = (history.layers, history.experts) == (entry["layers"], entry["experts"])
    kept = sum(step <= entry["from_step"] for step in history.steps) if same else 0
    history.layers, history.experts = entry["layers"], entry["experts"]
    del history.steps[kept:], history.tokens[kept:], history.rows[kept:]


def _is_head(entry: Any) -> bool:
    match entry:
        case {"schema": str(schema), "from_step": step, "layers": [*layers], "experts": [*experts]}:
            named = len(layers) == len(experts) and all(isinstance(name, str) for name in layers)
            return schema == SCHEMA and named and _are_counts([step, *experts]) and all(experts)
    return False


def _is_record(entry: Any, experts: Sequence[int]) -> bool:
    match entry:
        case {"step": step, "tokens": [*tokens], "rows": [*rows]} if len(tokens) == len(rows) == len(experts):
            return _are_counts([step, *rows]) and all(
                isinstance(of_layer, list)
                and len(of_layer) == number
                and _are_counts(of_layer)
                and sum(of_layer) <= row
                for of_layer, number, row in zip(tokens, experts, rows, strict=True)
            )
    return False


def _are_counts(values: Sequence[Any]) -> bool:
    return all(type(value) is int and 0 <= value < MOST_ROWS for value in values)


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry, separators=(",", ":")) + "\n"
