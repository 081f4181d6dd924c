"""The dotted names of a state's members."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from incckpt.state.names import join_name
from tests.states import Stored


class Point(NamedTuple):
    x: Any
    y: Any = 0


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("w", "w"),
        ("", ""),
        (3, "3"),
        (True, "True"),
        (1.5, "1.5"),
        (b"a", "b'a'"),
        ((), "()"),
        ((1,), "(1,)"),
        ((1, "a"), "(1, 'a')"),
        (frozenset(), "frozenset()"),
        (frozenset({"b"}), "frozenset({'b'})"),
        ((1, frozenset({"b"})), "(1, frozenset({'b'}))"),
        (torch.float32, "torch.float32"),
        pytest.param(1 << 20_000, hex(1 << 20_000), id="a long integer"),
        pytest.param((1 << 20_000,), f"({hex(1 << 20_000)},)", id="a long integer in a tuple"),
        ("\ud800", "\\ud800"),
    ],
)
def test_the_name_of_a_key(key: Any, name: str) -> None:
    assert join_name("", key) == name
    assert join_name("a.b", key) == f"a.b.{name}"


def test_a_frozenset_has_one_name_in_whatever_order_it_was_made() -> None:
    one, other = frozenset([0, 8, 16]), frozenset([16, 8, 0])
    assert list(one) != list(other), "Python shows them alike; this test needs others"
    for within in (lambda key: key, lambda key: (1, key), lambda key: frozenset([key, "a"])):
        assert join_name("", within(one)) == join_name("", within(other))
    for key in (one, (1, one), frozenset([one, "a"])):
        assert [entry.name for entry in Stored({key: torch.zeros(1)}).entries()] == [join_name("", key)]


def test_what_python_writes_is_kept_where_nothing_is_unordered() -> None:
    for key in [(1, (2.5, None)), ("a'b", 'c"d'), frozenset({(1, "a")}), (frozenset(), ()), b"\x00"]:
        assert join_name("", key) == repr(key)
    assert join_name("", Point(1, (2,))) == repr(Point(1, (2,)))
