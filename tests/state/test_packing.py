"""What is packed comes back as it was, of the very types it was; any other bytes are refused."""

from __future__ import annotations

import itertools
import random
import struct
from array import array
from collections import OrderedDict, deque
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from incckpt.errors import CorruptionError, FormatError, PickleRefusedError, StateError
from incckpt.state.flatten import flatten
from incckpt.state.packing import BLOCK_BYTES, HEAVY, HEAVY_BYTES, opened, pack, unpack, weighs_much
from incckpt.state.plain import MAX_DEPTH
from incckpt.state.tree import PACKED_KINDS, PackedRef, parse
from incckpt.testing import strategies as states
from incckpt.testing.compare import assert_same_state
from tests.effort import tries
from tests.states import Stored

pytestmark = pytest.mark.slow


def examples(count: int) -> settings:
    """Return settings for that many examples, the same at every run."""
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
    return settings(max_examples=tries(count), deadline=None, derandomize=True, suppress_health_check=checks)


# --- there and back ---------------------------------------------------------------------------------------------------


@examples(50)
@given(states.packed_values())
def test_large_values_of_every_type_come_back(value: Any) -> None:
    state = {"tensor": torch.ones(2), "value": value}
    assert_same_state(Stored(state).load(), state)


@examples(100)
@given(st.lists(states.plain_values() | states.named_tuples(states.plain_values())))
def test_any_plain_values_pack(values: list[Any]) -> None:
    if weighs_much([values, [0] * HEAVY], 0):  # as far as they can be packed at all
        assert_same_state(unpack(b"".join(pack(values, 0)), pairs=False), values)
        mapping = {(index, "x"): value for index, value in enumerate(values)}
        assert_same_state(unpack(b"".join(pack(mapping, 0)), pairs=True), mapping)


@pytest.mark.parametrize("kind", [list, tuple, set, frozenset, deque])
def test_what_weighs_little_stays_in_the_structure(kind: Any) -> None:
    assert not flatten({"a": kind(range(HEAVY - 2)), "w": torch.ones(2)}).packed
    assert [value.name for value in flatten({"a": kind(range(HEAVY))}).packed] == ["a"]


def test_the_parts_of_a_small_container_are_packed_not_itself() -> None:
    state = {"meta": {"log": [{"step": i} for i in range(HEAVY)], "epoch": 3, "note": "x" * HEAVY_BYTES}, "lr": 0.1}
    assert [value.name for value in flatten(state).packed] == ["meta.log", "meta.note"]
    many = {"rows": [[1.5] * 100] * 100}
    assert [value.name for value in flatten(many).packed] == ["rows"]
    assert_same_state(Stored(state).load(), state)


W = torch.ones(2)


def test_text_and_bytes_weigh_what_they_hold() -> None:
    state = {"pages": ["some words" * 50] * 400, "line": "l" * (HEAVY_BYTES - 1), "bytes": b"b" * HEAVY_BYTES, "w": W}
    assert [value.name for value in flatten(state).packed] == ["pages", "bytes"]
    assert_same_state(Stored(state).load(), state)


def test_what_cannot_be_packed_is_told_by_its_place_as_ever() -> None:
    log: list[Any] = [{"step": i} for i in range(HEAVY)]
    log[700]["odd"] = object()
    with pytest.raises(StateError, match=r"cannot save state\['log'\]\[700\]\['odd'\]"):
        flatten({"log": log})
    log[700]["odd"] = deque([1], 3)
    assert not flatten({"log": log}).packed
    assert_same_state(Stored({"log": log}).load(), {"log": log})


def test_the_deepest_that_is_packed_is_read() -> None:
    def nested(depth: int) -> Any:
        value: Any = [1.5] * HEAVY
        for _ in range(depth - 1):
            value = [value]
        return value

    assert_same_state(Stored(nested(MAX_DEPTH)).load(), nested(MAX_DEPTH))
    inside = [0] * HEAVY + [nested(MAX_DEPTH - 1)]
    assert_same_state(Stored(inside).load(), inside)
    with pytest.raises(StateError, match="deep"):
        flatten(nested(MAX_DEPTH + 1))
    loop: list[Any] = [0] * HEAVY
    loop.append(loop)
    with pytest.raises(StateError, match="contains itself"):
        flatten({"loop": loop})


def test_metadata_of_a_large_model_is_packed_and_comes_back() -> None:
    state = OrderedDict(weight=torch.ones(2))
    state._metadata = {f"layer{i}": {"version": 1} for i in range(HEAVY)}  # type: ignore[attr-defined]
    stored = Stored(state)
    assert stored.document["structure"]["metadata"]["packed"] == 0
    assert_same_state(stored.load(), state)
    assert_same_state(stored.load(keys="weight"), state)


def test_a_selection_reaches_into_what_is_packed() -> None:
    log = [{"step": i, "loss": i / 7} for i in range(HEAVY)]
    stored = Stored({"log": log, "w": torch.ones(2), "ids": dict.fromkeys(range(HEAVY), "x")})
    assert_same_state(stored.load(keys="log"), {"log": log})
    part = {"log": [{"loss": 0.0}] + [None] * (HEAVY - 1), "ids": {7: "x"}}
    assert_same_state(stored.load(keys=["log.0.loss", "ids.7"]), part)


def test_pickles_go_the_same_way() -> None:
    large, small = array("d", range(20_000)), array("d", range(3))
    stored = Stored({"large": large, "small": small}, allow_pickle=True)
    kinds = [node.keys() for _, node in stored.document["structure"]["dict"]]
    assert kinds == [{"packed", "kind", "type"}, {"pickle", "type"}]
    assert stored.load(allow_pickle=True) == {"large": large, "small": small}
    with pytest.raises(PickleRefusedError, match=r"array\.array"):
        stored.load()


def test_keys_that_equal_nothing_come_back_all_the_same() -> None:
    nan = float("nan")
    small = {nan: 1, float("nan"): 2, np.float32("nan"): 3, (nan, 1): 4, complex(nan, 0): 5}
    for state in (small, small | dict.fromkeys(range(HEAVY))):
        assert_same_state(Stored(state).load(), state)


# --- blocks -----------------------------------------------------------------------------------------------------------


def test_what_is_appended_changes_the_last_block_alone() -> None:
    log = [{"step": i, "loss": random.Random(i).random(), "phase": f"p{i % 5}"} for i in range(120_000)]
    before, after = pack(log[:110_000], 0), pack(log, 0)
    assert len(before) >= 3
    assert after[: len(before) - 1] == before[:-1]
    assert all(len(block) >= BLOCK_BYTES for block in after[:-1])


# --- what is refused --------------------------------------------------------------------------------------------------


def varint(value: int) -> bytes:
    parts = []
    while value >= 128:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


MALFORMED: list[tuple[bytes, bool, str]] = [
    (b"?", False, "unknown tag"),
    (b"f1234567", False, "cut short"),
    (b"s" + varint(2) + b"x", False, "cut short"),
    (b"s" + varint(1) + b"\xff", False, "decode"),
    (b"l" + varint(1 << 62) + b"N", False, "cut short"),
    (b"i" + b"\xff" * 9 + b"\x02", False, "64 bits"),
    (b"i\x80", False, "cut short"),
    (b"d\x02s\x01aNs\x01aN", False, "twice"),
    (b"s\x01aNs\x01aN", True, "twice"),
    (b"e\x02NN", False, "twice"),
    (b"e\x01l\x00", False, "unhashable"),
    (b"d\x01l\x00N", False, "unhashable"),
    (b"r\x00N", True, "no name 0"),
    (b"s\x01a", True, "cut short"),
    (b"l\x01" * (MAX_DEPTH + 1) + b"N", False, "deep"),
    (b"n" + b"s\x05class" + b"\x00", False, "no namedtuple type"),
    (b"ns\x01A\x02s\x01as\x03\xef\xbd\x81NN", False, "no namedtuple type"),
    (b"nN\x00", False, "namedtuple"),
    (b"y\x03<f9" + bytes(8), False, "dtype"),
    (b"y\x02|O" + bytes(8), False, "dtype"),
    (b"y\x03<U1" + bytes(4), False, "no number"),
    (b"j\x01?", False, "Expecting"),
    (b'j\x0b{"list":[]}', False, "no plain value"),
    (b'j\x0d{"float":"x"}', False, "not a float"),
    (b"j" + varint(40_000) + b"[" * 40_000, False, "recursion"),
]


@pytest.mark.parametrize(("data", "pairs", "reason"), MALFORMED, ids=lambda value: repr(value)[:30])
def test_bytes_that_were_not_packed_are_refused(data: bytes, pairs: bool, reason: str) -> None:
    with pytest.raises((CorruptionError, FormatError), match=reason):
        unpack(data, pairs=pairs)


SAMPLE = [
    None, True, 5, -(2**70), 1.5, 2j, "é", "\ud800", b"b", bytearray(b"c"), [1, (2, {"k": 3, (1, "k"): 4})], {1, "a"},
    frozenset({2.5}), np.float32(1), np.complex128(2), np.str_("s"), torch.float16, torch.Size([3]),
    states.Point(1, "x"), states.Point(2, [3]),
]  # fmt: skip


@examples(600)
@given(st.data())
def test_changed_bytes_are_read_or_refused(data: st.DataObject) -> None:
    packed = bytearray(b"".join(pack(SAMPLE, 0)))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(packed) - 1))
        match data.draw(st.sampled_from(["change", "cut", "insert"])):
            case "change":
                packed[at] = data.draw(st.integers(0, 255) | st.sampled_from(b"NTFiIfcsbaltdezynjr"))
            case "cut":
                del packed[at : at + data.draw(st.integers(1, 5))]
                packed = packed or bytearray(b"N")
            case _:
                packed[at:at] = data.draw(st.binary(min_size=1, max_size=4))
    for pairs in (False, True):
        with suppress(CorruptionError, FormatError):
            unpack(bytes(packed), pairs=pairs)


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        ({"packed": 1, "kind": "list"}, "no packed range 1"),
        ({"packed": True, "kind": "list"}, "no packed range"),
        ({"packed": 0, "kind": "heap"}, "unknown kind of packed value.*update incckpt"),
        ({"packed": 0, "kind": []}, "not a string"),
        ({"packed": 0, "kind": "deque"}, "deque with the members"),
        ({"packed": 0, "kind": "deque", "maxlen": 2**63}, "maxlen"),
        ({"packed": 0, "kind": "list", "maxlen": 3}, "list with the members maxlen"),
        ({"packed": 0, "kind": "defaultdict", "factory": "eval"}, "factory"),
        ({"list": [{"packed": 0, "kind": "list"}, {"packed": 0, "kind": "list"}]}, "packed range 0 occurs twice"),
    ],
)
def test_a_reference_that_is_none_is_refused(document: Any, reason: str) -> None:
    with pytest.raises((CorruptionError, FormatError), match=reason):
        parse(document, 0, 1)


@pytest.mark.parametrize("kind", PACKED_KINDS)
def test_bytes_of_another_kind_are_refused_by_their_place(kind: str) -> None:
    extra = {"deque": 1, "defaultdict": "list", "pickle": "x"}.get(kind)
    tree = parse({"dict": [["a", {"list": [1]}], ["b", {"list": [{"packed": 0, "kind": "list"}]}]]}, 0, 1)
    tree.items[1][1].items[0] = PackedRef(0, kind, extra)  # type: ignore[union-attr, index]
    if kind in ("bytes", "bytearray", "pickle"):
        opened(tree, {0: b"\xff\xff"})
        return
    with pytest.raises(CorruptionError, match=r"state\['b'\]\[0\], packed: "):
        opened(tree, {0: b"\xff\xff"})


# --- the documentation ------------------------------------------------------------------------------------------------


def test_every_tag_and_kind_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "structure.md").read_text()
    section = page.split("## Packed values\n")[1].split("\n## ")[0]
    for tag in "NTFiIfcsbaltdezynjr":
        assert f"| `{tag}` |" in section, tag
    for kind in PACKED_KINDS:
        assert f"`{kind}`" in section, kind
    assert f"{HEAVY:,}" in section


def test_the_bytes_are_as_documented() -> None:
    value = {"ab": [None, True, -3, 1.5, "é", b"z"], "ab2": {"ab": (), 2: {"ab": frozenset()}}}
    expected = (
        b"s\x02ab" b"l\x06" b"NTi\x05f" + struct.pack("<d", 1.5) + b"s\x02\xc3\xa9" b"b\x01z"
        b"s\x03ab2" b"d\x02" b"r\x00t\x00" b"i\x04" b"d\x01r\x00z\x00"
    )  # fmt: skip
    assert b"".join(pack(value, 0)) == expected
    assert_same_state(unpack(expected, pairs=True), value)
    assert list(itertools.chain(unpack(b"I\x09" + (2**70).to_bytes(9, "little"), pairs=False))) == [2**70]
    assert weighs_much([1] * HEAVY, 0)
