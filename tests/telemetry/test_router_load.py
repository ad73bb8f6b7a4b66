"""The file of a training's router: what was written is read again, however the training ended."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from moe_kernels.telemetry import load as router_load
from moe_kernels.telemetry.load import LayerLoad, read_history

NAMES, EXPERTS = ["a", "b"], [2, 3]


def loads(step: int) -> list[LayerLoad]:
    return [LayerLoad((step, 1), 9 + step), LayerLoad((0, step, 2), 10 + step)]


def text(*steps: int, from_step: int = 0) -> str:
    lines = [router_load.record(step, loads(step)) for step in steps]
    return "".join([router_load.head(NAMES, EXPERTS, from_step), *lines])


def read(path: Path, content: str | bytes) -> router_load.RouterHistory:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_history(path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / router_load.FILE_NAME


def test_what_is_written_is_read(path: Path) -> None:
    history = read(path, text(1, 2, 4))
    assert (history.layers, history.experts, history.steps) == (NAMES, EXPERTS, [1, 2, 4])
    assert [history.load(record, layer) for record in range(3) for layer in range(2)] == [
        load for step in (1, 2, 4) for load in loads(step)
    ]


def test_every_cut_keeps_what_was_whole(path: Path) -> None:
    """A kill leaves any part of the last write: the records before it are read, never half a one."""
    whole = text(1, 2, 3)
    begin = whole.index("\n", 1) + 1
    for end in range(begin, len(whole) + 1):
        history = read(path, whole[:end])
        # The newline itself may be missing: the record before it is whole.
        complete = whole[begin : end + (end < len(whole) and whole[end] == "\n")].count("\n")
        assert history.steps == [1, 2, 3][:complete], whole[:end][-30:]


def test_a_resumed_training_goes_on_after_a_cut_line(path: Path) -> None:
    history = read(path, text(1, 2, 3)[:-9] + text(3, 4, from_step=2))
    assert history.steps == [1, 2, 3, 4]


def test_what_is_trained_again_replaces_what_was(path: Path) -> None:
    history = read(path, text(1, 2, 3, 4) + text(3, 4, 5, from_step=2))
    assert history.steps == [1, 2, 3, 4, 5]
    assert len(history.tokens) == len(history.rows) == 5


def test_another_model_in_the_same_folder_starts_anew(path: Path) -> None:
    other = router_load.head(["c"], [1], 2) + router_load.record(3, [LayerLoad((1,), 1)])
    assert read(path, text(1, 2) + other).steps == [3]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is not a router history"),
        ("\n\n", "is not a router history"),
        ("hello", "is not a router history"),
        ("[1, 2]\n", "line 1: no line of a router history"),
        (router_load.record(1, loads(1)), "line 1: no line"),
        (text(1) + '{"loss": 1}\n', "line 4: no line"),
        (text(1) + "garbage\n" + router_load.record(2, loads(2)), "line 4: no line"),
        (text(2, 1), "step 1 comes after 2"),
        (text(1, 1), "step 1 comes after 1"),
        (router_load.head(NAMES, EXPERTS, 0) + router_load.record(1, loads(1)[:1]), "line 3: no line"),
        (text(1).replace("[0,1,2]", "[0,-1,2]"), "line 3: no line"),
        (text(1).replace("[0,1,2]", "[0,NaN,2]"), "line 3: no line"),
        (text(1).replace("[0,1,2]", "[0,true,2]"), "line 3: no line"),
        (text(1).replace("[0,1,2]", "[0,100,2]"), "line 3: no line"),
        (text(1).replace(router_load.SCHEMA, "moe-kernels router 2"), "line 2: no line"),
        (text(1).replace("[2,3]", "[2,0]"), "line 2: no line"),
        (text(1) + router_load.record(2, [LayerLoad((0, 0), 2**63 - 10), LayerLoad((0, 0, 0), 0)]), "more rows than"),
        ("9" * 5000 + "\n" + text(1)[:20], "is not a router history"),
        ("[" * 200_000, "is not a router history"),
        (b"\xff\xfe\x00", "is not a router history"),
    ],
    ids=range(20),
)
def test_anything_else_is_refused(path: Path, content: str | bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read(path, content)


def test_thinning_goes_by_steps_and_loses_no_row(path: Path) -> None:
    steps = [*range(1, 21), 25, 40, 55, 80, 100]
    history = read(path, text(*steps))
    assert router_load.thinned(history, len(steps)) is history
    few = router_load.thinned(history, 10)
    assert few.steps == [10, 20, 25, 40, 55, 80, 100], "ends of tenths of the steps, where there are records"
    assert [few.sum(layer) for layer in range(2)] == [history.sum(layer) for layer in range(2)]
    assert few.load(2, 0) == loads(25)[0]
    few.check()


MANY = router_load.MOST_ROWS // 4 - 20


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, MANY)), min_size=1, max_size=4))
@example([(0, 24), (9, 555566993652515168)])
@example([(9, MANY)] * 4)
def test_numbers_stay_within_their_bounds(counts: list[tuple[int, int]]) -> None:
    tokens = tuple(count for pair in counts for count in pair)
    load = LayerLoad(tokens, sum(tokens) + 5)
    [imbalance], [entropy], _, [dropped] = router_load.Loads.of([load]).numbers()
    assert 1.0 <= imbalance <= len(tokens)
    assert -1e-9 <= entropy <= 1 + 1e-9
    assert 0 <= dropped <= 1
    assert json.loads(router_load.record(1, [load]))["tokens"] == [[*tokens]]
