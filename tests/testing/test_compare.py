"""The comparison of states says what differs, whatever it is."""

from __future__ import annotations

from incckpt.testing.compare import difference


def test_what_python_refuses_to_write_is_compared_all_the_same() -> None:
    long = 10**5000  # more digits than Python writes
    assert difference({long: {long}}, {long: {long}}) == ""
    assert difference({long: [1]}, {long: [2]}) == "state[<int>][0]: 1 and 2"
    assert difference({"a": long}, {"a": -long}) == "state['a']: <int> and <int>"
