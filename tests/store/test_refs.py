"""Refs, pins and condemned lists: their names, what is read back of them, and creating one exactly once."""

from __future__ import annotations

import uuid
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from incckpt.backends.memory import MemoryBackend
from incckpt.errors import BackendError, CorruptionError, KeyExistsError, OptionError
from incckpt.store.document import dump_document
from incckpt.store.refs import (
    CondemnedLists,
    Ref,
    RefName,
    Tombstone,
    create_once,
    list_pins,
    list_refs,
    new_nonce,
    validate_run,
)
from incckpt.testing.faults import Call, CountingBackend, Fail, Fault, FaultyBackend

nonces = st.integers(0, (1 << 64) - 1).map(lambda number: f"{number:016x}")
names = st.builds(RefName, st.integers(0, 999_999), st.integers(0, 10**12 - 1), nonces)
REF = Ref(RefName(3, 500, "0123456789abcdef"), 1.5, {"loss": 0.25}, "objects/ab/c", 10, 20, 30)
BROKEN = BackendError("reset", transient=True)


@pytest.fixture
def backend() -> MemoryBackend:
    return MemoryBackend(uuid.uuid4().hex)


# -- names


@given(names, names)
def test_names_are_read_back_and_sorted_as_they_are_meant(one: RefName, other: RefName) -> None:
    assert RefName.parse(str(one)) == one
    assert (str(one) < str(other)) == (one < other)


@pytest.mark.parametrize(
    "name", ["", "000001-000000000001", "1-1-0123456789abcdef", "000001-000000000001-0123456789ABCDEF", "desktop.ini"]
)
def test_what_is_no_name(name: str) -> None:
    assert RefName.parse(name) is None


@pytest.mark.parametrize("run", ["", "-a", "a/b", "ä", "a" * 129, ".", "a\n"])
def test_what_is_no_run(run: str) -> None:
    with pytest.raises(OptionError, match="not a run name"):
        validate_run(run)


# -- documents


@pytest.mark.parametrize("metrics", [{}, {"loss": 0.25}, {"a": float("inf"), "b": -0.0}])
def test_a_ref_is_read_back(metrics: dict[str, float]) -> None:
    ref = replace(REF, metrics=metrics)
    assert Ref.from_json(ref.to_json(), f"refs/default/{ref.name}") == ref


def test_a_ref_under_another_name_is_refused() -> None:
    with pytest.raises(CorruptionError, match="says that it is"):
        Ref.from_json(REF.to_json(), f"refs/default/{replace(REF.name, step=501)}")


def test_tombstones_are_told_from_refs_by_their_size(backend: MemoryBackend) -> None:
    here = [replace(REF.name, step=step) for step in (1, 2, 3)]
    for name, data in zip(here, (Tombstone.ABORTED.value, Tombstone.EXPIRED.value, REF.to_json()), strict=True):
        backend.put(f"refs/default/{name}", data)
    found = {name: tombstone for _, name, _, tombstone in list_refs(backend)}
    assert found == dict(zip(here, (True, True, False), strict=True))


def test_pins_are_listed_by_run(backend: MemoryBackend) -> None:
    for run in ("a", "b"):
        backend.put(f"pins/{run}/{REF.name}", b"pin")
    assert {pin.run for pin in list_pins(backend)} == {"a", "b"}
    (pin,) = list_pins(backend, "a")
    assert (pin.name, pin.key, pin.ref_key) == (REF.name, f"pins/a/{REF.name}", f"refs/a/{REF.name}")
    assert pin.modified is not None


# -- creating exactly once


def test_the_first_to_create_wins_and_the_other_is_told_what_is_there(backend: MemoryBackend) -> None:
    assert create_once(backend, "k", b"one") is None
    assert create_once(backend, "k", b"two") == b"one"
    assert create_once(backend, "k", b"one") is None  # ours: an earlier request, say, whose reply was lost
    assert backend.get("k") == b"one"


@pytest.mark.parametrize("do", [Fail(BROKEN), Fail(BROKEN, after_work=True), Fail(KeyExistsError("taken"))])
def test_trouble_on_the_way_is_settled(backend: MemoryBackend, do: Fail) -> None:
    faulty = FaultyBackend(backend, [Fault("create", do=do)])
    assert create_once(faulty, "k", b"one") is None
    assert faulty.struck == 1
    assert backend.get("k") == b"one"


def test_what_does_not_pass_is_raised(backend: MemoryBackend) -> None:
    refused = BackendError("no right to do that")
    counting = CountingBackend(FaultyBackend(backend, [Fault("create", times=None, do=Fail(refused))]))
    with pytest.raises(BackendError, match="no right"):
        create_once(counting, "k", b"one")
    assert counting.calls["create"] == 1
    counting = CountingBackend(FaultyBackend(backend, [Fault("create", times=None, do=Fail(BROKEN))]))
    with pytest.raises(BackendError, match="reset"):
        create_once(counting, "k", b"one")
    assert counting.calls["create"] == 4


def test_another_that_comes_first_in_a_conflict_is_seen(backend: MemoryBackend) -> None:
    first = Fault("create", do=Call(lambda operation: backend.put("k", b"the other's")))
    assert create_once(FaultyBackend(backend, [first]), "k", b"ours") == b"the other's"


# -- condemned lists


def test_lists_are_read_back_once_and_lie_in_one_folder(backend: MemoryBackend) -> None:
    counting = CountingBackend(backend)
    ours, theirs = CondemnedLists(backend), CondemnedLists(counting)
    name = ours.put({"objects/a", "objects/b"})
    assert CondemnedLists.key(name).count("/") == 1, "on a disk, a folder for each would stay behind"
    for _ in range(3):
        assert theirs.read() == {name: {"objects/a", "objects/b"}}
    assert counting.calls["get"] == 1
    other = ours.put(["objects/c"])
    assert theirs.keys() == {"objects/a", "objects/b", "objects/c"}
    assert theirs.read().keys() == {name, other}
    backend.delete([ours.key(name)])
    assert theirs.keys() == {"objects/c"}


def test_lists_of_0_1_are_read_and_removed_where_they_stand(backend: MemoryBackend) -> None:
    nonce = new_nonce()
    backend.put(f"gc/{nonce}/condemned", dump_document("condemned", {"keys": ["objects/a"]}))
    ((name, keys),) = CondemnedLists(backend).read().items()
    assert keys == {"objects/a"}
    assert CondemnedLists.key(name) == f"gc/{nonce}/condemned"


@pytest.mark.parametrize("data", [b"", b"{}", dump_document("condemned", {"keys": [1]}), dump_document("pin", {})])
def test_an_unreadable_list_is_an_error(backend: MemoryBackend, data: bytes) -> None:
    key = CondemnedLists.key(f"{new_nonce()}.condemned")
    backend.put(key, data)
    with pytest.raises(CorruptionError, match=key):
        CondemnedLists(backend).keys()


def test_a_list_that_goes_while_it_is_read_condemns_nothing(backend: MemoryBackend) -> None:
    name = CondemnedLists(backend).put(["objects/a"])
    gone = Fault("get", do=Call(lambda operation: backend.delete([CondemnedLists.key(name)])))
    assert CondemnedLists(FaultyBackend(backend, [gone])).read() == {}
