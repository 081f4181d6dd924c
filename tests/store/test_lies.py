"""Answers that lie once, and damage to a run's own documents: never a lost checkpoint, never an empty run."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import incckpt
from incckpt.backends.base import Backend, Entry
from incckpt.backends.local import LocalBackend
from incckpt.backends.memory import MemoryBackend
from incckpt.backends.wrapper import WrapperBackend
from incckpt.errors import (
    BackendError,
    CollectionError,
    CorruptionError,
    KeyNotFoundError,
    LineageError,
    SaveError,
    SupersededError,
)
from incckpt.store.document import dump_document
from incckpt.store.gc import Collector
from incckpt.store.refs import CondemnedLists, RefName
from incckpt.store.store import Store
from incckpt.testing.faults import Action, CountingBackend, Fail, Fault, FaultyBackend, Lie
from tests.stores import object_keys, orphans

pytestmark = pytest.mark.slow

PAGE = b"<!DOCTYPE html><html xmlns='http://www.w3.org/1999/xhtml'><body>Please sign in</body></html>"

LIES: dict[str, Callable[[], Action]] = {
    "a page": lambda: Lie(lambda data: PAGE),
    "half of it": lambda: Lie(lambda data: data[: len(data) // 2]),
    "nothing": lambda: Lie(lambda data: b""),
    "a flipped bit": lambda: Lie(flipped),
    "no such key": lambda: Fail(KeyNotFoundError("injected"), after_work=True),
}


def flipped(data: bytes) -> bytes:
    changed = bytearray(data)
    changed[len(changed) // 2] ^= 4
    return bytes(changed)


def state(step: int) -> dict[str, torch.Tensor]:
    """Return a state of which a part changes, so that later checkpoints have deltas."""
    changing = torch.linspace(1, 2, 70_000)
    changing[:100] = step
    return {"frozen": torch.ones(1000), "changing": changing}


def make(backend: Backend, *steps: int, run: str = "default", keep_last_n: int | None = None) -> None:
    with incckpt.CheckpointManager(backend, run=run, threads=1, keep_last_n=keep_last_n) as manager:
        manager.restore(state(0))
        for step in steps:
            manager.save(step, state(step)).result()


@pytest.fixture
def store(request: pytest.FixtureRequest) -> MemoryBackend:
    backend = MemoryBackend(f"lies/{request.node.name}")
    backend.delete([entry.key for entry in backend.list()])
    make(backend, 1, 2)
    make(backend, 3)
    return backend


def restored(backend: Backend) -> tuple[int | None, dict[str, torch.Tensor]]:
    target = state(0)
    with incckpt.CheckpointManager(backend, threads=1, read_only=True) as manager:
        return manager.restore(target), target


# -- one wrong answer to a GET


@pytest.mark.parametrize("lie", LIES)
def test_no_wrong_answer_to_one_get_costs_a_checkpoint(store: MemoryBackend, lie: str) -> None:
    counting = CountingBackend(store)
    assert restored(counting)[0] == 3
    gets = len(counting.keys("get"))
    assert gets > 4
    for nth in range(1, gets + 1):
        lying = FaultyBackend(store, [Fault("get", nth=nth, do=LIES[lie]())])
        step, target = restored(lying)
        assert lying.struck == 1
        assert step == 3, f"a wrong answer to GET {nth} cost the latest checkpoint"
        assert torch.equal(target["changing"], state(3)["changing"])


@pytest.mark.parametrize("lie", LIES)
def test_verify_reads_again(store: MemoryBackend, lie: str) -> None:
    counting = CountingBackend(store)
    assert incckpt.verify(counting)
    for nth in range(1, len(counting.keys("get")) + 1):
        lying = FaultyBackend(store, [Fault("get", nth=nth, do=LIES[lie]())])
        result = incckpt.verify(lying)
        assert lying.struck == 1
        assert result, f"GET {nth}: {result}"
        assert len(result.checkpoints) == 3


@pytest.mark.parametrize("lie", LIES)
def test_a_wrong_answer_during_a_restart_loses_nothing(store: MemoryBackend, lie: str) -> None:
    """Restore, save, prune: the lineage that is written down, and what is collected, rest on what was read."""
    before = {entry.key: store.get(entry.key) for entry in store.list()}

    def put_back() -> None:
        store.delete([entry.key for entry in store.list()])
        for key, data in before.items():
            store.put(key, data)

    def restart(backend: Backend) -> None:
        with incckpt.CheckpointManager(backend, threads=1, keep_last_n=2) as manager:
            assert manager.restore(state(0)) == 3
            manager.save(4, state(4)).result()

    counting = CountingBackend(store)
    restart(counting)
    for nth in range(1, len(counting.keys("get")) + 1):
        put_back()
        lying = FaultyBackend(store, [Fault("get", nth=nth, do=LIES[lie]())])
        restart(lying)
        assert lying.struck == 1
        with incckpt.CheckpointManager(store, read_only=True) as manager:
            assert [checkpoint.step for checkpoint in manager.checkpoints()] == [3, 4], f"GET {nth}"
        assert incckpt.verify(store)


def test_damage_is_read_three_times_and_said(store: MemoryBackend, caplog: pytest.LogCaptureFixture) -> None:
    latest = max(entry.key for entry in store.list("refs/default/"))
    store.put(latest, flipped(store.get(latest)))
    counting = CountingBackend(store)
    with caplog.at_level(logging.WARNING):
        assert restored(counting)[0] == 2
    assert counting.keys("get").count(latest) in (3, 6)  # and once more by who asks whether it stands
    assert "reading again, in case only this answer was wrong" in caplog.text
    assert "falling back" in caplog.text


# -- damage that looks like emptiness


def remove_seal(backend: MemoryBackend) -> None:
    backend.delete(["runs/default/attempts/000002.from"])


def remove_attempts(backend: MemoryBackend) -> None:
    backend.delete([entry.key for entry in backend.list("runs/default/attempts/")])


def remove_last_attempt(backend: MemoryBackend) -> None:
    backend.delete([f"runs/default/attempts/000002{end}" for end in ("", ".from")])


def garble_seal(backend: MemoryBackend) -> None:
    backend.put("runs/default/attempts/000002.from", PAGE)


USES: dict[str, Callable[[Backend], object]] = {
    "restore": restored,
    "load": lambda backend: incckpt.load(backend, progress=False),
    "verify": incckpt.verify,
    "save": lambda backend: incckpt.CheckpointManager(backend).save(9, state(9)).result(),
}


@pytest.mark.parametrize("damage", [remove_seal, remove_attempts, remove_last_attempt, garble_seal])
@pytest.mark.parametrize("use", USES)
def test_a_lost_lineage_is_no_empty_run(
    store: MemoryBackend, damage: Callable[[MemoryBackend], None], use: str
) -> None:
    damage(store)
    before = {entry.key for entry in store.list()}
    with pytest.raises(LineageError, match=r"run 'default' at memory.*incckpt\.recover\('memory.*', run='default'"):
        USES[use](store)
    assert {entry.key for entry in store.list()} == before, "nothing was written"


@pytest.mark.parametrize("use", USES)
def test_a_lost_marker_is_no_empty_store(store: MemoryBackend, use: str) -> None:
    store.delete(["incckpt.json"])
    with pytest.raises(CorruptionError, match=r"incckpt\.json is gone.*incckpt\.recover"):
        USES[use](store)
    assert "incckpt.json" not in {entry.key for entry in store.list()}


def test_a_folder_of_a_run_that_is_removed(tmp_path: Path) -> None:
    with LocalBackend(tmp_path) as backend:
        make(backend, 1, 2, 3)
        shutil.rmtree(tmp_path / "runs" / "default")
        with pytest.raises(LineageError, match=r"attempts/000001.from is gone"):
            restored(backend)
        with pytest.raises(LineageError), incckpt.CheckpointManager(backend) as manager:
            manager.save(4, state(4))


def test_a_writer_whose_lineage_is_removed_stops(store: MemoryBackend) -> None:
    manager = incckpt.CheckpointManager(store)
    assert manager.restore(state(0)) == 3
    manager.save(4, state(4)).result()
    store.delete(["runs/default/attempts/000003.from"])
    with pytest.raises(LineageError, match=r"000003\.from is gone"):
        manager.save(5, state(5)).result()
    with pytest.raises(LineageError):
        manager.close()
    assert not [name for name in refs(store) if name.step == 5]


def refs(backend: Backend) -> list[RefName]:
    found = [RefName.parse(entry.key.rpartition("/")[2]) for entry in backend.list("refs/")]
    return [name for name in found if name is not None]


def test_no_key_that_is_removed_makes_a_run_empty_or_a_tensor_wrong(store: MemoryBackend) -> None:
    before = {entry.key: store.get(entry.key) for entry in store.list()}
    outcomes: set[int] = set()
    said: list[str] = []
    for key in before:
        for value in (None, PAGE):
            store.put(key, PAGE) if value else store.delete([key])
            try:
                step, target = restored(store)
            except CorruptionError as error:
                said.append(str(error))
            else:
                assert step is not None, f"without {key} the run is empty"
                assert torch.equal(target["changing"], state(step)["changing"]), key
                outcomes.add(step)
            store.put(key, before[key])
    assert outcomes == {2, 3}
    assert all(re.search(r"incckpt\.recover|incckpt\.json|object objects", message) for message in said), said
    assert len(said) > 3


# -- states that are no damage


def test_what_is_no_damage(store: MemoryBackend) -> None:
    assert restored(store)[0] == 3
    store.put("runs/default/attempts/000003", dump_document("attempt", {}))  # it has not chosen yet
    assert restored(store)[0] == 3
    with incckpt.CheckpointManager(store) as manager:
        for step in (1, 2, 3):
            assert manager.delete(step)
    assert restored(store)[0] is None
    store.delete([entry.key for entry in store.list("refs/")])  # its tombstones went
    assert restored(store)[0] is None
    make(store, 1)
    assert restored(store)[0] == 1


# -- listings


class Remote(WrapperBackend):
    """A backend whose answers come over a network."""

    def __init__(self, inner: Backend) -> None:
        super().__init__(inner)
        self.remote = True

    def probe_exclusive(self) -> bool:
        """Return that it is."""
        return True


def short(entries: Sequence[Entry]) -> list[Entry]:
    return list(entries)[:-1]


LISTINGS: dict[str, Callable[[Sequence[Entry]], list[Entry]]] = {"empty": lambda entries: [], "short": short}


@pytest.mark.parametrize("lie", LISTINGS)
def test_no_wrong_listing_loses_a_checkpoint(store: MemoryBackend, lie: str) -> None:
    """Restore, save, prune, collect, with each listing in turn wrong once."""
    make(store, 10, run="other")
    before = {entry.key: store.get(entry.key) for entry in store.list()}

    def restart(backend: Backend) -> None:
        manager = incckpt.CheckpointManager(backend, threads=1, keep_last_n=2)
        step = manager.restore(state(0))
        assert step is not None, "the run passed for empty"
        manager.save(4, state(4)).result()
        manager.close()
        Collector(Store(backend)).sweep()

    counting = CountingBackend(Remote(store))
    restart(counting)
    refused: list[str] = []
    for nth in range(1, len(counting.keys("list")) + 1):
        store.delete([entry.key for entry in store.list()])
        for key, data in before.items():
            store.put(key, data)
        lying = FaultyBackend(Remote(store), [Fault("list", nth=nth, do=Lie(LISTINGS[lie]))])
        try:
            restart(lying)
        except (SupersededError, CollectionError) as error:
            refused.append(str(error))
        with incckpt.CheckpointManager(store, read_only=True) as manager:
            steps = [checkpoint.step for checkpoint in manager.checkpoints()]
        assert steps in ([3, 4], [1, 2, 3], [2, 3, 4], [1, 2, 3, 4]), f"listing {nth}: {steps}"
        assert incckpt.verify(store)
        assert incckpt.verify(store, run="other")
    assert all(re.search(r"restore\(\) again|a listing left it out", message) for message in refused), refused
    assert len(refused) < 4, "most lies are made up for by another look"


def test_an_object_that_has_another_size_is_not_reused(store: MemoryBackend) -> None:
    lying = FaultyBackend(
        Remote(store), [Fault("head", "objects/*", times=None, do=Lie(lambda entry: Entry(entry.key, len(PAGE), None)))]
    )
    before = set(object_keys(store))
    with incckpt.CheckpointManager(lying, run="another", threads=1) as manager:
        manager.save(1, state(3)).result()
    assert incckpt.verify(store, run="another")
    assert not {key for key in before if key.startswith("objects")} & needed(store, "another")


def needed(backend: Backend, run: str) -> set[str]:
    with Store(backend) as store:
        collector = Collector(store)
        return {key for name in refs(backend) for key in collector.needs(f"refs/{run}/{name}")} if run else set()


def test_a_pin_that_was_taken_and_is_gone_stops_the_save(store: MemoryBackend) -> None:
    gone = FaultyBackend(Remote(store), [Fault("put", "pins/*", do=Lie(lambda done: False))])
    manager = incckpt.CheckpointManager(gone, threads=1)
    manager.restore(state(0))
    with pytest.raises(BackendError, match=r"has taken pins/.*, and does not have it"):
        manager.save(4, state(4)).result()
    with pytest.raises(SaveError):
        manager.save(4, state(4))
    assert manager.save(4, state(4)).result().step == 4
    manager.close()


def test_a_condemned_list_that_was_taken_and_is_gone_is_put_again(store: MemoryBackend) -> None:
    gone = FaultyBackend(Remote(store), [Fault("put", "gc/*", do=Lie(lambda done: False))])
    with Store(gone) as opened:
        garbage = f"objects/ab/{'c' * 62}.{'1' * 16}"
        store.put(garbage, b"12345")
        collector = Collector(opened)
        collected = collector.sweep()
        assert not collected.deleted
        assert collected.waiting == 1
        assert CondemnedLists(store).keys() == {garbage}
        assert collector.finish().deleted == {garbage}
    assert orphans(store) == set()


# -- costs


@pytest.fixture
def counted(store: MemoryBackend) -> CountingBackend:
    return CountingBackend(Remote(store))


def test_requests_of_a_save_and_of_a_prune(counted: CountingBackend) -> None:
    """Over a network: the bounds of docs/safety.md."""

    def small(operations: Sequence[Any]) -> list[str]:
        objects = ("objects/", "deltas/")
        return [one.name for one in operations if one.name == "delete" or not one.keys[0].startswith(objects)]

    with incckpt.CheckpointManager(counted, threads=1) as manager:
        manager.restore(state(0))
        manager.save(4, state(4)).result()
        counted.reset()
        manager.save(5, state(5)).result()
        assert len(small(counted.operations)) <= 8, counted.operations
    with incckpt.CheckpointManager(counted, threads=1, keep_last_n=1) as manager:
        manager.restore(state(0))
        manager.save(6, state(6)).result()
        counted.reset()
        manager.save(7, state(7)).result()
        assert len(small(counted.operations)) <= 8 + 9, counted.operations
