"""The judges themselves: what counts as the same, as worse, and as not to be judged."""

from __future__ import annotations

import secrets
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch

from tests.peers.compare import first_difference
from tests.peers.protocol import App, Case, Outcome, judge, plain_steps, try_case

NAN = float("nan")


@pytest.mark.parametrize(
    "value",
    [
        {"a": [1, (2.0, NAN)], 3: None},
        torch.tensor([NAN, -0.0]),
        torch.zeros(2, 3).t(),
        torch.empty(0, 3),
        torch.zeros(3, dtype=torch.complex64).conj(),
        torch.eye(3).to_sparse(),
        np.array([NAN]),
        OrderedDict(a=torch.ones(2)),
    ],
)
def test_a_value_is_the_same_as_itself(value: Any) -> None:
    assert first_difference(value, value) == ""


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.tensor([0.0]), torch.tensor([-0.0])),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64)),
        (torch.zeros(2), torch.zeros(1, 2)),
        (torch.zeros(2), torch.nn.Parameter(torch.zeros(2))),
        (torch.eye(3).to_sparse(), (2 * torch.eye(3)).to_sparse()),
        (0.0, -0.0),
        (1, True),
        ([1], (1,)),
        ([1], [1, 2]),
        ({"a": 1}, {"b": 1}),
        ({"a": 1}, OrderedDict(a=1)),
        (np.zeros(2), np.zeros(2, np.float32)),
        (slice(1), slice(2)),
    ],
)
def test_what_differs_is_told(a: Any, b: Any) -> None:
    assert first_difference(a, b)
    assert "['x'][1]" in first_difference({"x": [0, a]}, {"x": [0, b]})


IDENTICAL, UNPICKLED = Outcome("identical"), Outcome("identical", pickled=True)
DIFFERS, OTHERWISE, RAISES = Outcome("differs", result=1), Outcome("differs", result=2), Outcome("raises", "at save")


@pytest.mark.parametrize(
    ("hand", "ours", "verdict"),
    [
        (IDENTICAL, IDENTICAL, "same"),
        (IDENTICAL, UNPICKLED, "WORSE"),
        (UNPICKLED, UNPICKLED, "same"),
        (IDENTICAL, DIFFERS, "WORSE"),
        (IDENTICAL, RAISES, "WORSE"),
        (DIFFERS, IDENTICAL, "better"),
        (DIFFERS, DIFFERS, "same"),
        (DIFFERS, OTHERWISE, "WORSE"),
        (DIFFERS, RAISES, "WORSE"),
        (RAISES, RAISES, "same"),
        (RAISES, DIFFERS, "better"),
    ],
)
def test_verdicts(hand: Outcome, ours: Outcome, verdict: str) -> None:
    assert judge(hand, ours, Case("", "", dict, plain_steps)) == verdict


def test_where_an_objects_own_loader_makes_a_difference_that_is_right() -> None:
    assert judge(DIFFERS, IDENTICAL, Case("", "", dict, plain_steps, strict=True)) == "WORSE"


def test_a_limit_covers_only_a_refusal() -> None:
    limited = Case("", "", dict, plain_steps, limit="documented")
    assert judge(IDENTICAL, RAISES, limited) == "limit"
    assert judge(IDENTICAL, DIFFERS, limited) == "WORSE"


class Counter:
    """Counts, and forgets on request what it counted when it is loaded."""

    def __init__(self, forgetful: bool = False) -> None:
        self.forgetful, self.count = forgetful, 0

    def step(self) -> int:
        self.count += 1
        return self.count

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = 0 if self.forgetful else state["count"]


def counting(**options: Any) -> Case:
    return Case("", "", lambda: {"counter": Counter(**options)}, lambda app, _: app["counter"].step())


def test_an_object_that_restores() -> None:
    row = try_case(counting())
    assert (row.verdict, row.by_hand, row.through_incckpt) == ("same", "identical", "identical")


def test_an_object_that_does_not() -> None:
    row = try_case(counting(forgetful=True))
    assert row.verdict == "same"
    assert row.by_hand == row.through_incckpt == "differs: what was restored: ['counter']['count'] is 3, not 0"


def test_an_object_that_does_not_repeat_itself_is_not_judged() -> None:
    def step(app: App, number: int) -> str:
        return secrets.token_hex(8)

    assert try_case(Case("", "", lambda: {"counter": Counter()}, step)).verdict == "void"
