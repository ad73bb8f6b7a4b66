"""Stored values as dataclasses: what does not fit is refused in one sentence that names the place."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import builders
import pytest

from moe_kernels.shapes import LAYERS, LayerShape
from moe_kernels.tools.bench.timing import Spread
from moe_kernels.tools.compare.comparison import Comparison
from moe_kernels.tools.compare.decode import Misfit, Number, decode


def stored(**changes: Any) -> dict[str, Any]:
    return {**asdict(builders.comparison()), **changes}


def test_what_was_written_is_read() -> None:
    assert decode(Comparison, stored()) == builders.comparison()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cpu": 3}, "^cpu should be a valid string and is 3$"),
        ({"warmup_steps": "10"}, "^warmup_steps should be a valid integer and is '10'$"),
        ({"warmup_steps": True}, "^warmup_steps should be a valid integer and is True$"),
        ({"news": 1}, "^news is an unknown key$"),
        ({"runs": [{}]}, r"^runs\[0\].run_id is missing$"),
        ({"runs": {}}, "^runs should be a valid array and is {}$"),
        ({"experts": {"x" * 1000: 1}, "gpu": []}, "^gpu should be"),
        ({"versions": {"a\nb" * 1000: 1}}, "^versions.ab.* should be a valid string and is 1$"),
    ],
)
def test_a_misfit_names_the_place(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(Misfit, match=words) as error:
        decode(Comparison, stored(**changes))
    assert len(str(error.value)) < 300


def test_a_key_that_is_missing_is_named() -> None:
    with pytest.raises(Misfit, match=r"^cpu is missing$"):
        decode(Comparison, {key: value for key, value in stored().items() if key != "cpu"})


@pytest.mark.parametrize(("value", "number"), [(3, 3.0), (0.1 + 0.2, 0.1 + 0.2), ("inf", math.inf), (-1e300, -1e300)])
def test_numbers(value: Any, number: float) -> None:
    found = decode(Number, value)
    assert (type(found), found) == (float, number)
    assert math.isnan(decode(Number, "nan"))


@pytest.mark.parametrize("value", [True, "1.5", None, 1e301, 10**400, math.nan, math.inf, [1.0]])
def test_what_is_no_number(value: Any) -> None:
    with pytest.raises(Misfit, match=r"^a\.b should be a number"):
        decode(Number, value, "a.b")


def test_a_lone_surrogate_of_a_command_line_is_read() -> None:
    assert decode(Comparison, stored(command="compare \udcff.yml")).command == "compare ?.yml"


SPREAD = {"median": 1.0, "p20": 1.0, "p80": 1.0}


@pytest.mark.parametrize(
    ("kind", "known"),
    [(Spread, SPREAD), (Spread | None, SPREAD), (LayerShape | None, asdict(LAYERS["mixtral-1b"]))],
    ids=str,
)
def test_a_key_that_nobody_wrote_is_refused_at_every_depth(kind: Any, known: dict[str, Any]) -> None:
    assert asdict(decode(kind, known)) == known
    with pytest.raises(Misfit, match=r"^other is an unknown key$"):
        decode(kind, {**known, "other": 1})
    with pytest.raises(Misfit, match=r"^\[0\]\.other is an unknown key$"):
        decode(list[kind], [{**known, "other": 1}])
