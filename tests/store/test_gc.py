"""Collection: what a plan finds and why, what carrying it out deletes, and what stops it."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import incckpt
from incckpt.backends.base import Backend, Entry
from incckpt.backends.local import LocalBackend
from incckpt.backends.memory import MemoryBackend
from incckpt.backends.wrapper import WrapperBackend
from incckpt.errors import BackendError, CollectionError
from incckpt.store.document import dump_document
from incckpt.store.gc import Collector
from incckpt.store.objects import OBJECTS
from incckpt.store.plan import CollectionPlan, Reason
from incckpt.store.store import Store
from incckpt.testing.faults import CountingBackend, Fail, Fault, FaultyBackend
from tests.stores import needed_keys, object_keys, orphans

GARBAGE = f"{OBJECTS}ab/{'c' * 62}.{'1' * 16}"
CONDEMNED = f"{OBJECTS}ab/{'d' * 62}.{'2' * 16}"
IN_FLIGHT = f"{OBJECTS}ab/{'e' * 62}.{'3' * 16}"


def save(backend: Backend, step: int, *, run: str = "default", keep_last_n: int | None = None) -> None:
    with incckpt.CheckpointManager(backend, run=run, keep_last_n=keep_last_n, threads=1) as manager:
        manager.save(step, {"frozen": torch.ones(1000), "changing": torch.full((1000,), float(step))}).result()


def pin(run: str, attempt: int, step: int, nonce: str) -> str:
    return f"pins/{run}/{attempt:06d}-{step:012d}-{nonce}"


def put_list(backend: Backend, *keys: str) -> str:
    key = f"gc/{uuid.uuid4().hex[:16]}.condemned"
    backend.put(key, dump_document("condemned", {"keys": sorted(keys)}))
    return key


def grow_old(root: Path, *names: str) -> None:
    """Make files or folders of a local store two hours older."""
    for name in names:
        then = time.time() - 7200
        os.utime(root / name, (then, then))


def names_of(plan: CollectionPlan, reason: Reason) -> list[str]:
    return sorted(removal.name for removal in plan.of(reason))


@pytest.fixture
def backend() -> MemoryBackend:
    return MemoryBackend(uuid.uuid4().hex)


@pytest.fixture
def littered(tmp_path: Path) -> LocalBackend:
    """Return a store of two runs, and something to be collected for every reason that there is."""
    backend = LocalBackend(tmp_path)
    save(backend, 1)
    save(backend, 1, run="other")
    backend.put(GARBAGE, b"12345")
    backend.put(CONDEMNED, b"123")
    put_list(backend, CONDEMNED)
    put_list(backend, f"{OBJECTS}ab/{'f' * 62}.{'9' * 16}")  # carried out already
    (ref,) = backend.list("refs/default/")
    backend.put(ref.key.replace("refs/", "pins/"), b"pin")
    stale = pin("other", 1, 2, "4" * 16)
    backend.put(stale, b"pin")
    backend.put("probe/" + "0" * 32, b"first")
    (tmp_path / "objects/.incckpt-tmp-0123456789abcdef").write_bytes(b"half of an object")
    (tmp_path / "pins/gone").mkdir()
    grow_old(tmp_path, stale, "probe/" + "0" * 32, "objects/.incckpt-tmp-0123456789abcdef", "pins/gone")
    return backend


def test_a_plan_says_what_and_why_and_writes_nothing(littered: LocalBackend) -> None:
    counting = CountingBackend(littered)
    plan = Collector(Store(counting)).plan(clock=time.time)
    assert counting.calls.keys() <= {"get", "list", "head"}
    assert plan.done is None
    assert plan.objects == {GARBAGE, CONDEMNED} == orphans(littered)
    assert names_of(plan, Reason.UNREFERENCED) == [GARBAGE]
    assert names_of(plan, Reason.CONDEMNED) == [CONDEMNED]
    assert names_of(plan, Reason.STALE_PIN) == [pin("other", 1, 2, "4" * 16)]
    assert len(names_of(plan, Reason.FINISHED_PIN)) == 1
    assert len(names_of(plan, Reason.LIST)) == 2
    leftovers = ["objects/.incckpt-tmp-0123456789abcdef", "pins/gone/", "probe/" + "0" * 32]
    assert names_of(plan, Reason.LEFTOVER) == leftovers
    assert plan.nbytes == 5 + 3 + len(b"first")
    assert not plan.in_flight


def test_carrying_a_plan_out_deletes_what_it_says(littered: LocalBackend) -> None:
    collector = Collector(Store(littered))
    needed = needed_keys(littered)
    plan = collector.plan()
    done = collector.carry_out(plan).done
    assert done is not None
    assert done.deleted == plan.objects
    assert done.leftovers == 3
    assert object_keys(littered) == needed
    for prefix in ("pins/", "gc/", "probe/"):
        assert list(littered.list(prefix)) == []
    stale_ref = pin("other", 1, 2, "4" * 16).replace("pins/", "refs/")
    assert littered.get(stale_ref) == b"ABORTED", "the stale save cannot be committed any more"
    assert Collector(Store(littered)).plan().removals == ()
    for run in ("default", "other"):
        assert incckpt.load(littered, run=run, progress=False)["changing"][0] == 1


def test_a_plan_is_printed_with_totals_by_reason_and_examples(littered: LocalBackend) -> None:
    for number in range(7):
        littered.put(f"{OBJECTS}0{number}/{'a' * 62}.{'1' * 16}", b"x" * 1000 * number)
    collector = Collector(Store(littered))
    plan = collector.plan()
    text = str(plan)
    assert f"A collection of {littered.url} would delete 9 objects, 21.0 KB in all:" in text
    assert "8 objects that no checkpoint needs: 21.0 KB" in text
    assert f"{OBJECTS}06/{'a' * 62}.{'1' * 16} (6.0 KB, 0 seconds)" in text
    assert text.count(OBJECTS) == 5  # the three largest, the condemned one, a temporary file
    assert "1 pins of saves that are given up" in text
    assert "has deleted 9 objects" in str(collector.carry_out(plan))
    assert "nothing to delete" in str(Collector(Store(littered)).plan())


def test_what_is_young_is_left(tmp_path: Path) -> None:
    backend = LocalBackend(tmp_path)
    save(backend, 1)
    backend.put(GARBAGE, b"12345")
    backend.put(CONDEMNED, b"123")
    grow_old(tmp_path, CONDEMNED)
    for clock in (None, time.time):
        plan = Collector(Store(backend)).plan(min_age=3600, clock=clock)
        assert plan.objects == {CONDEMNED}
        assert (plan.young, plan.young_bytes) == (1, 5)
        assert "1 objects that no checkpoint needs stay, being younger than 60 minutes: 5 bytes" in str(plan)
    assert Collector(Store(backend)).sweep(min_age=3600).deleted == {CONDEMNED}
    assert orphans(backend) == {GARBAGE}


def test_nothing_is_deleted_while_a_save_is_in_flight(backend: MemoryBackend) -> None:
    save(backend, 1)
    backend.put(GARBAGE, b"12345")
    backend.put(IN_FLIGHT, b"put by the save in flight")
    backend.put(pin("other", 1, 7, "3" * 16), b"pin")
    collector = Collector(Store(backend))
    plan = collector.plan()
    assert plan.objects == {GARBAGE}
    assert plan.in_flight == {pin("other", 1, 7, "3" * 16).replace("pins/", "refs/")}
    carried_out = collector.carry_out(plan)
    assert carried_out.done is not None
    assert carried_out.done.deleted == set()
    assert carried_out.done.waiting == 1
    assert "1 saves in flight" in str(carried_out)
    assert "has condemned" in str(carried_out)
    backend.delete([pin("other", 1, 7, "3" * 16)])
    assert collector.finish().deleted == {GARBAGE}
    assert Collector(Store(backend)).sweep().deleted == {IN_FLIGHT}
    assert orphans(backend) == set()


def test_a_plan_that_is_carried_out_late_spares_what_is_needed_by_then(backend: MemoryBackend) -> None:
    with pytest.raises(BackendError):
        save(FaultyBackend(backend, [Fault("create", "refs/*", times=None)]), 1)
    backend.delete([entry.key for entry in backend.list("pins/")])  # no pin or list tells of what it has put
    collector = Collector(Store(backend))
    plan = collector.plan()
    save(backend, 1, run="other")  # finds the same content, and uses it
    assert plan.objects & needed_keys(backend)
    carried_out = collector.carry_out(plan)
    assert carried_out.done is not None
    assert carried_out.done.deleted == plan.objects - needed_keys(backend)
    assert orphans(backend) == set()


def test_the_time_is_asked_for_without_a_list(backend: MemoryBackend) -> None:
    counting = CountingBackend(backend)
    save(backend, 1)
    backend.put(GARBAGE, b"12345")
    counting.reset()
    assert Collector(Store(counting)).sweep(min_age=1e9).deleted == set()
    assert [key.split("/")[0] for key in counting.keys("put")] == ["probe"]
    assert list(backend.list("probe/")) == []


def test_a_plan_that_cannot_look_for_leftovers_says_so(
    backend: MemoryBackend, caplog: pytest.LogCaptureFixture
) -> None:
    save(backend, 1)
    backend.put(GARBAGE, b"12345")
    faulty = FaultyBackend(backend, [Fault("list", "probe/*", do=Fail(BackendError("no")))])
    assert Collector(Store(faulty)).sweep().deleted == {GARBAGE}
    assert "could not look for temporary files" in caplog.text


# -- what stops it


def test_an_unreadable_ref_stops_it_and_is_named_with_the_way_out(backend: MemoryBackend) -> None:
    save(backend, 1, run="mine")
    save(backend, 2, run="mine")
    backend.put(GARBAGE, b"12345")
    (ref,) = [entry.key for entry in backend.list("refs/mine/") if "-000000000002-" in entry.key]
    backend.put(ref, b"not a checkpoint")
    with pytest.raises(CollectionError, match=rf"{ref}.*run='mine'\)\.delete\(2\)"):
        Collector(Store(backend)).plan()
    assert GARBAGE in object_keys(backend)
    with incckpt.CheckpointManager(backend, run="mine") as manager:
        assert manager.delete(2)
    Collector(Store(backend)).sweep()
    assert orphans(backend) == set()
    assert incckpt.load(backend, run="mine", progress=False)["changing"][0] == 1


def test_an_unreadable_list_stops_it(backend: MemoryBackend) -> None:
    save(backend, 1)
    backend.put(GARBAGE, b"12345")
    key = put_list(backend, CONDEMNED)
    backend.put(key, backend.get(key)[:-9])
    with pytest.raises(CollectionError, match=key):
        Collector(Store(backend)).plan()
    assert GARBAGE in object_keys(backend)


class CaptiveBackend(WrapperBackend):
    """Answers listings of refs with nothing while it is captive, as a portal's page that is taken for a listing."""

    captive = False

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """List."""
        return iter(()) if self.captive and prefix.startswith("refs/") else super().list(prefix)


def test_a_listing_that_leaves_out_a_ref_that_stands_stops_it(
    backend: MemoryBackend, caplog: pytest.LogCaptureFixture
) -> None:
    save(backend, 1, run="other")
    captive = CaptiveBackend(backend)
    with incckpt.CheckpointManager(captive, keep_last_n=1, threads=1) as manager:
        state = {"frozen": torch.ones(1000), "changing": torch.ones(1000)}  # as the other run's
        manager.save(1, state).result()
        manager.save(2, {"changing": torch.zeros(1000)}).result()
        manager.save(3, state).result()
        captive.captive = True
        manager.save(4, {"changing": torch.zeros(1000)}).result()
        captive.captive = False
        assert "a listing left it out" in caplog.text
        assert incckpt.load(backend, run="other", progress=False)["changing"][0] == 1
        manager.save(5, {"changing": torch.zeros(1000)}).result()
    assert orphans(backend) == set()


def test_a_ref_that_another_process_deleted_does_not_stop_it(backend: MemoryBackend) -> None:
    save(backend, 1)
    save(backend, 2)
    collector = Collector(Store(backend))
    collector.sweep()
    first = min(entry.key for entry in backend.list("refs/default/"))
    backend.delete([first])
    assert collector.sweep().deleted
    assert orphans(backend) == set()


# -- what it keeps in memory


def test_each_key_is_kept_once(backend: MemoryBackend) -> None:
    collector = Collector(Store(backend))
    for number in range(3):
        collector.note(f"refs/default/{number}", frozenset(f"objects/{index}" for index in range(100)))
    keys = [id(key) for number in range(3) for key in collector.needs(f"refs/default/{number}")]
    assert len(keys) == 300
    assert len(set(keys)) == 100
    collector.expired([f"refs/default/{number}" for number in range(3)])
    assert collector._shared == {}
