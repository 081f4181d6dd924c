"""States of random generators that no generator ever had."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from incckpt.errors import StateMismatchError
from incckpt.state.rng import RngState


@pytest.fixture(autouse=True)
def _kept() -> Iterator[None]:
    before = RngState().state_dict()
    yield
    RngState().load_state_dict(before)


BAD: list[tuple[str, Any]] = [
    ("pos", 625), ("pos", -1), ("pos", 1 << 40), ("pos", 1.5), ("pos", True), ("pos", None),
    ("key", np.zeros(4, np.uint32)), ("key", np.zeros((624, 1), np.uint32)), ("key", 3),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_position_outside_of_numpys_table_is_refused(name: str, value: Any) -> None:
    state = copy.deepcopy(RngState().state_dict())
    state["numpy"]["state"][name] = value
    expected = np.random.get_state()
    with pytest.raises(StateMismatchError, match="cannot set the random number generators"):
        RngState().load_state_dict(state)
    np.testing.assert_equal(np.random.get_state(), expected)


def test_philox_too() -> None:
    original = np.random.get_bit_generator()  # type: ignore[attr-defined]
    np.random.set_bit_generator(np.random.Philox(3))  # type: ignore[attr-defined]
    try:
        state = copy.deepcopy(RngState().state_dict())
        RngState().load_state_dict(state)
        state["numpy"]["buffer_pos"] = 1000
        with pytest.raises(StateMismatchError):
            RngState().load_state_dict(state)
    finally:
        np.random.set_bit_generator(original)  # type: ignore[attr-defined]
