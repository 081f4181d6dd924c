"""`inventory`, `recover` and exact names: what can be had back of a run, whatever became of its lineage."""

from __future__ import annotations

import logging
import random
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import incckpt
from incckpt.backends.base import Backend
from incckpt.backends.memory import MemoryBackend
from incckpt.errors import (
    BackendError,
    CheckpointNotFoundError,
    CorruptionError,
    FormatError,
    OptionError,
    StoreNotFoundError,
    SupersededError,
)
from incckpt.store.document import dump_document
from incckpt.store.lineage import Lineage
from incckpt.store.refs import Ref, RefName
from incckpt.store.remains import Remains
from incckpt.store.store import MARKER, Store
from incckpt.testing.faults import Call, CountingBackend, Fail, Fault, FaultyBackend
from tests.effort import tries

pytestmark = pytest.mark.slow

ATTEMPTS = "runs/default/attempts/"
EMPTY = dump_document("lineage", {"attempt": 3, "refs": [], "abandoned": []})


def value(step: int, attempt: int) -> dict[str, Any]:
    """Return the state of a checkpoint, like that of no other."""
    return {"w": torch.full((3,), step + 1000 * attempt), "step": step}


def manager(backend: Backend, **options: Any) -> incckpt.CheckpointManager:
    return incckpt.CheckpointManager(MemoryBackend(backend.url.removeprefix("memory://")), threads=1, **options)


def train(backend: Backend, attempt: int, *steps: int, back_to: int | str | None = None, **options: Any) -> None:
    """Restore, and save the steps."""
    with manager(backend, **options) as one:
        if attempt > 1:
            one.restore({"w": torch.zeros(3, dtype=torch.int64), "step": 0}, step=back_to)
        for step in steps:
            one.save(step, value(step, attempt), metrics={"loss": 1 / (1 + step)}).result()


def new_backend() -> MemoryBackend:
    return MemoryBackend(uuid.uuid4().hex)


@pytest.fixture
def backend() -> MemoryBackend:
    """Return a store in which attempt 1 has saved 1 to 4 and 8, and attempt 2, gone back to 2, 3 and 4."""
    made = new_backend()
    train(made, 1, 1, 2, 3, 4, 8)
    train(made, 2, 3, 4, back_to=2)
    return made


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.CRITICAL):
        yield


def look(backend: Backend) -> Lineage:
    return Store(backend).run("default").lineage()


def contents(backend: Backend) -> dict[str, bytes]:
    return {entry.key: backend.get(entry.key) for entry in backend.list()}


def exact(backend: Backend) -> dict[tuple[int, int], str]:
    """Return the exact names of all checkpoints by attempt and step."""
    return {(item.attempt, item.step): item.ref for item in incckpt.inventory(backend).items}


def assert_sound(backend: Backend, lineage: list[tuple[int, int]], abandoned: list[tuple[int, int]]) -> None:
    """Check that a run has these checkpoints, given as attempt and step, all whole, and that it can be gone on with."""
    found = incckpt.inventory(backend, level="hashes")
    assert found.damage == {}
    for standing, expected in (("lineage", lineage), ("abandoned", abandoned), ("orphaned", [])):
        names = [(item.attempt, item.step) for item in found.items if item.standing == standing]
        assert names == sorted(expected, key=lambda name: name[::-1]), standing
    for item in found.items:
        assert item.ok
        state = incckpt.load(backend, step=item.ref, progress=False)
        assert state["w"].tolist() == value(item.step, item.attempt)["w"].tolist()
    before = contents(backend)
    again = incckpt.recover(backend, dry_run=False)
    assert not again.needed
    assert contents(backend) == before, "a second recovery writes"
    with manager(backend) as trainer:
        state = trainer.load(progress=False)
        assert (state["step"], int(state["w"][0])) == (lineage[-1][1], lineage[-1][1] + 1000 * lineage[-1][0])
        trainer.save(1000, value(1000, 0)).result()
    assert [item.step for item in incckpt.inventory(backend).items if item.standing == "lineage"][-1] == 1000


# -- what is damaged, and what comes back


def without(key: str) -> Callable[[Backend], None]:
    return lambda backend: backend.delete([entry.key for entry in backend.list(key)])


def garbled(key: str) -> Callable[[Backend], None]:
    return lambda backend: backend.put(key, b'{"format":1,"kind":"lin')


def both_garbled(backend: Backend) -> None:
    for attempt in (1, 2):
        garbled(f"{ATTEMPTS}{attempt:06d}.from")(backend)


DAMAGES: dict[str, Callable[[Backend], None]] = {
    "the last .from deleted": without(f"{ATTEMPTS}000002.from"),
    "the first .from deleted": without(f"{ATTEMPTS}000001.from"),
    "the attempts removed": without(ATTEMPTS),
    "the run's folder removed": without("runs/default/"),
    "the store's runs removed": without("runs/"),
    "the last .from garbled": garbled(f"{ATTEMPTS}000002.from"),
    "both .from garbled": both_garbled,
    "an attempt garbled": garbled(f"{ATTEMPTS}000002"),
    "the last attempt removed": without(f"{ATTEMPTS}000002"),
    "the marker removed": without(MARKER),
    "the marker garbled": garbled(MARKER),
    "the marker removed too": lambda backend: backend.delete([MARKER, *(e.key for e in backend.list("runs/"))]),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_the_lineage_is_had_back(backend: MemoryBackend, name: str) -> None:
    DAMAGES[name](backend)
    before = contents(backend)
    plan = incckpt.recover(backend)
    assert contents(backend) == before
    done = incckpt.recover(backend, dry_run=False)
    assert (done.lineage, done.abandoned, done.needed) == (plan.lineage, plan.abandoned, plan.needed)
    if name == "the marker garbled":
        del before[MARKER]
    assert before.items() <= contents(backend).items()
    assert_sound(backend, [(1, 1), (1, 2), (2, 3), (2, 4)], [(1, 8)])


def test_refs_above_the_sealed_attempt_are_taken_in(backend: MemoryBackend) -> None:
    """An old copy of the run's folder was put back."""
    old = {key: data for key, data in contents(backend).items() if key.startswith("runs/")}
    train(backend, 3, 5, 6)
    without("runs/")(backend)
    for key, data in old.items():
        backend.put(key, data)
    assert incckpt.recover(backend, dry_run=False).attempt == 4
    assert_sound(backend, [(1, 1), (1, 2), (2, 3), (2, 4), (3, 5), (3, 6)], [(1, 8)])


def test_what_an_empty_lineage_has_orphaned_is_taken_in(backend: MemoryBackend) -> None:
    """A version that took the damage for an empty run has gone on."""
    backend.put(f"{ATTEMPTS}000003", dump_document("attempt", {}))
    backend.put(f"{ATTEMPTS}000003.from", EMPTY)
    assert {item.standing for item in incckpt.inventory(backend).items} == {"orphaned"}
    incckpt.recover(backend, dry_run=False)
    assert_sound(backend, [(1, 1), (1, 2), (2, 3), (2, 4)], [(1, 8)])


def test_a_sound_run_is_left_alone(backend: MemoryBackend) -> None:
    before = contents(backend)
    with manager(backend) as trainer:
        trainer.restore(value(0, 0))
        trainer.save(6, value(6, 3)).result()
        plan = incckpt.recover(backend, dry_run=False)
        assert (plan.needed, plan.attempt, plan.damage) == (False, None, None)
        assert "nothing to do" in str(plan)
        trainer.save(7, value(7, 3)).result()
    assert before.items() <= contents(backend).items()


# -- any history, any damage

attempts = st.lists(st.tuples(st.integers(1, 4), st.integers(0, 10), st.booleans()), min_size=1, max_size=5)


def history(backend: Backend, tenures: list[tuple[int, int, bool]], keep: int | None) -> None:
    """Let one attempt after the other go back to a checkpoint and save from there, or replace what it restored."""
    for attempt, (saves, back, replaces) in enumerate(tenures, 1):
        lineage = look(backend)
        with manager(backend, keep_last_n=keep) as one:
            at = 0
            if lineage.live:
                at = lineage.live[back % len(lineage.live)].step
                one.restore(value(0, 0), step=at)
                if replaces:
                    one.save(at, value(at, attempt), if_exists="replace").result()
            for step in range(at + 1, at + 1 + saves):
                one.save(step, value(step, attempt)).result()


@settings(max_examples=tries(25), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(attempts, st.sampled_from([None, 2]), st.randoms(use_true_random=False))
def test_any_history_after_any_damage_of_its_documents(
    tenures: list[tuple[int, int, bool]], keep: int | None, chance: random.Random
) -> None:
    backend = new_backend()
    history(backend, tenures, keep)
    before = look(backend)
    kept = {key: data for key, data in contents(backend).items() if not key.startswith("runs/")}
    for entry in list(backend.list(ATTEMPTS)):
        drawn = chance.random()
        if drawn < 0.4:
            backend.delete([entry.key])
        elif drawn < 0.6:
            backend.put(entry.key, chance.randbytes(chance.randrange(40)))
    incckpt.recover(backend, dry_run=False)
    after = look(backend)
    assert [*map(str, after.live)] == [*map(str, before.live)]
    assert set(after.abandoned) == set(before.abandoned)
    left = contents(backend)
    assert kept.items() <= left.items()
    names = [(name.attempt, name.step) for name in after.live]
    assert_sound_values(backend, names)


def assert_sound_values(backend: Backend, lineage: list[tuple[int, int]]) -> None:
    for attempt, step in lineage:
        state = incckpt.load(backend, step=step, progress=False)
        assert state["w"].tolist() == value(step, attempt)["w"].tolist()
    assert not incckpt.recover(backend).needed


@st.composite
def remains(draw: st.DrawFn) -> Remains:
    """Draw refs and lineage documents that need not fit each other."""
    numbers = st.integers(1, 4)
    steps = st.integers(0, 6)
    names = draw(st.sets(st.tuples(numbers, steps, st.sampled_from("ab")), min_size=1, max_size=12))
    refs = [RefName(attempt, step, letter * 16) for attempt, step, letter in sorted(names)]
    some = st.sets(st.sampled_from(refs))
    seals = draw(st.dictionaries(numbers, st.tuples(some, some), max_size=3))
    return Remains(max(name.attempt for name in refs), tuple(refs), (), seals, {})


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(remains(), st.data())
def test_what_is_rebuilt_is_a_lineage(found: Remains, data: st.DataObject) -> None:
    whole: dict[RefName, Ref | None] = dict.fromkeys(data.draw(st.sets(st.sampled_from(found.standing))))
    live, abandoned = found.rebuilt(whole)
    steps = [name.step for name in live]
    assert steps == sorted(set(steps))
    assert set(live) <= whole.keys()
    assert set(live) | set(abandoned) == set(found.standing), "nothing that stands is left out"
    assert set(live).isdisjoint(abandoned)
    if whole:
        assert live, "what is whole makes a lineage"
        highest = max(name.attempt for name in whole)
        if highest >= max(found.seals, default=0):  # else a later attempt may have abandoned its checkpoints
            assert any(name.attempt == highest for name in live), "the last writer's checkpoints are left out"
        later = Remains(9, found.standing, (), {**found.seals, 9: (live, abandoned)}, {})
        assert later.rebuilt(whole) == (live, abandoned), "a second recovery makes another lineage"
        assert later.as_read(whole) == (live, sorted(abandoned))


# -- beside others


def test_a_living_writer_is_told_and_loses_nothing(backend: MemoryBackend) -> None:
    with manager(backend) as trainer:
        trainer.restore(value(0, 0))
        trainer.save(5, value(5, 3)).result()
        without("runs/")(backend)
        done = incckpt.recover(backend, dry_run=False)
        assert done.attempt == 4
        with pytest.raises(SupersededError):
            trainer.save(6, value(6, 3)).result()
        with pytest.raises(SupersededError):
            trainer.close()
    assert_sound(backend, [(1, 1), (1, 2), (2, 3), (2, 4), (3, 5)], [(1, 8)])


def test_what_is_committed_between_the_plan_and_the_attempt_is_continued(backend: MemoryBackend) -> None:
    with manager(backend) as trainer:
        trainer.restore(value(0, 0))
        trainer.save(5, value(5, 3)).result()
        backend.put(f"{ATTEMPTS}000003.from", b"garbled")
        late = Fault("create", f"{ATTEMPTS}*", do=Call(lambda operation: trainer.save(6, value(6, 3)).result()))
        incckpt.recover(FaultyBackend(backend, [late]), dry_run=False)
        with pytest.raises(SupersededError):
            trainer.save(7, value(7, 3)).result()
        with pytest.raises(SupersededError):
            trainer.close()
    assert_sound(backend, [(1, 1), (1, 2), (2, 3), (2, 4), (3, 5), (3, 6)], [(1, 8)])


def test_one_of_two_recoveries_wins(backend: MemoryBackend) -> None:
    without("runs/")(backend)
    other = Fault("create", f"{ATTEMPTS}*", do=Call(lambda operation: incckpt.recover(backend, dry_run=False)))
    with pytest.raises(SupersededError, match="was not recovered"):
        incckpt.recover(FaultyBackend(backend, [other]), dry_run=False)
    assert_sound(backend, [(1, 1), (1, 2), (2, 3), (2, 4)], [(1, 8)])


@pytest.mark.parametrize("after_work", [False, True])
def test_a_recovery_that_fails_anywhere_can_be_repeated(after_work: bool) -> None:
    for nth in range(1, 100):
        backend = new_backend()
        train(backend, 1, 1, 2, 3)
        without("runs/")(backend)
        fails = Fault(nth=nth, do=Fail(BackendError("no", transient=False), after_work=after_work))
        faulty = FaultyBackend(backend, [fails])
        try:
            incckpt.recover(faulty, dry_run=False)
        except BackendError:
            incckpt.recover(backend, dry_run=False)
        if not faulty.struck:
            break
        assert [name.step for name in look(backend).live] == [1, 2, 3], nth
        assert not incckpt.recover(backend).needed, nth
    assert 5 < nth < 99


# -- what is not whole


def test_a_checkpoint_that_is_not_whole_is_left_out(backend: MemoryBackend) -> None:
    ref = Store(backend).run("default").read(look(backend).live[-1])
    assert isinstance(ref, Ref)
    backend.delete([ref.manifest])
    found = incckpt.inventory(backend)
    assert not found.ok
    (item,) = [item for item in found.items if not item.ok]
    assert item.problems[0] in str(found)
    plan = incckpt.recover(backend, dry_run=False)
    assert plan.lost.keys() == {item.ref}
    assert "not whole" in str(plan)
    assert [(name.attempt, name.step) for name in look(backend).live] == [(1, 1), (1, 2), (2, 3)]
    assert not incckpt.recover(backend).needed
    with manager(backend) as trainer:
        assert trainer.restore(value(0, 0)) == 3
        assert trainer.delete(4)


def test_an_unreadable_ref_is_left_out_and_can_be_deleted(backend: MemoryBackend) -> None:
    name = look(backend).live[-1]
    without("runs/")(backend)
    backend.put(f"refs/default/{name}", b"{}" * 20)
    plan = incckpt.recover(backend, dry_run=False)
    assert plan.lost.keys() == {str(name)}
    with manager(backend) as trainer:
        trainer.restore(value(0, 0))
        assert trainer.delete(name.step)
    assert incckpt.inventory(backend).ok


def test_one_listing_that_is_short_makes_nothing_lost(backend: MemoryBackend) -> None:
    class Short(CountingBackend):
        def list(self, prefix: str = "") -> Iterator[Any]:
            return iter(()) if prefix in ("objects/", "deltas/") else super().list(prefix)

    assert incckpt.inventory(Short(backend)).ok
    assert not incckpt.recover(Short(backend)).needed


def test_what_a_later_version_wrote_is_not_touched(backend: MemoryBackend) -> None:
    key = f"{ATTEMPTS}000002.from"
    backend.put(key, backend.get(key).replace(b'"format":1', b'"format":9'))
    before = contents(backend)
    with pytest.raises(FormatError, match="update"):
        incckpt.recover(backend, dry_run=False)
    backend.put(f"{ATTEMPTS}000002.next", b'{"format":2}')
    with pytest.raises(CorruptionError, match="later version"):
        incckpt.recover(backend, dry_run=False)
    assert before.items() <= contents(backend).items()
    assert len(contents(backend)) == len(before) + 1


def test_a_ref_of_a_later_version_keeps_its_place(backend: MemoryBackend) -> None:
    name = look(backend).live[-1]
    key = f"refs/default/{name}"
    backend.put(key, backend.get(key).replace(b'"format":1', b'"format":9'))
    without("runs/")(backend)
    assert str(name) in incckpt.recover(backend).lineage


# -- choosing


def test_the_refs_given_are_the_lineage(backend: MemoryBackend) -> None:
    names = exact(backend)
    chosen = [names[1, step] for step in (1, 8)]
    plan = incckpt.recover(backend, refs=chosen, dry_run=False)
    assert list(plan.lineage) == chosen
    assert [str(name) for name in look(backend).live] == chosen
    assert not incckpt.recover(backend, refs=chosen).needed
    assert incckpt.load(backend, progress=False)["w"][0] == 1008


def test_refs_that_make_no_lineage(backend: MemoryBackend) -> None:
    names = exact(backend)
    backend.put(f"{ATTEMPTS}000003.from", EMPTY)
    train(backend, 4, 1)
    for refs, message in (
        ([names[1, 1], exact(backend)[4, 1]], "one checkpoint of each step"),
        (["000009-000000000001-0123456789abcdef"], "has no checkpoint 000009"),
        (["5"], "not the exact name"),
        ([5], "refs must be"),
    ):
        with pytest.raises(OptionError, match=message):
            incckpt.recover(backend, refs=refs)  # type: ignore[arg-type]


def test_arguments_that_are_none(backend: MemoryBackend) -> None:
    wrong: list[tuple[str, dict[str, Any]]] = [
        (f"{backend.url}#default@3", {}),
        (backend.url, {"dry_run": 0}),
        (backend.url, {"level": "hash"}),
    ]
    for url, options in wrong:
        with pytest.raises(OptionError):
            incckpt.recover(url, **options)
    with pytest.raises(OptionError, match="leave out"):
        incckpt.inventory(f"{backend.url}#default@3")
    with pytest.raises(CheckpointNotFoundError, match="it has no checkpoint"):
        incckpt.recover(backend, run="other")
    for call in (incckpt.recover, incckpt.inventory):
        with pytest.raises(StoreNotFoundError):
            call(new_backend())


def test_a_dry_run_and_an_inventory_write_nothing(backend: MemoryBackend) -> None:
    without("runs/")(backend)
    counting = CountingBackend(backend)
    assert "would start a new attempt" in str(incckpt.recover(counting))
    incckpt.inventory(counting, level="hashes")
    assert counting.calls.keys() <= {"get", "list", "head"}


def test_an_inventory_has_all_runs(backend: MemoryBackend) -> None:
    with manager(backend, run="other") as trainer:
        trainer.save(1, value(1, 1)).result()
    without("runs/default/")(backend)
    found = incckpt.inventory(backend)
    assert {(item.run, item.standing) for item in found.items if item.run == "other"} == {("other", "lineage")}
    assert len([item for item in found.items if item.run == "default"]) == 5
    assert {item.run for item in incckpt.inventory(f"{backend.url}#other").items} == {"other"}
    (item,) = incckpt.inventory(backend, run="other").items
    assert (item.step, item.attempt, item.problems) == (1, 1, ())
    assert item.ref in str(found)


# -- exact names


def test_abandoned_and_orphaned_checkpoints_are_loaded_by_exact_name(backend: MemoryBackend) -> None:
    names = exact(backend)
    without("runs/")(backend)
    for (attempt, step), name in names.items():
        for state in (
            incckpt.load(backend, step=name, progress=False),
            incckpt.load(f"{backend.url}#default@{name}", progress=False),
        ):
            assert state["w"].tolist() == value(step, attempt)["w"].tolist()
        assert incckpt.verify(backend, step=name, level="hashes", progress=False)
    target = value(0, 0)
    with manager(backend, read_only=True) as reader:
        assert reader.restore(target, step=names[1, 8], progress=False) == 8
    assert target["w"].tolist() == value(8, 1)["w"].tolist()


def test_going_on_from_an_exact_name(backend: MemoryBackend) -> None:
    train(backend, 3, 9, back_to=exact(backend)[1, 8])
    assert [(name.attempt, name.step) for name in look(backend).live] == [(1, 1), (1, 2), (1, 8), (3, 9)]


def test_going_on_from_an_orphan(backend: MemoryBackend) -> None:
    orphan = exact(backend)[1, 8]
    backend.put(f"{ATTEMPTS}000003", dump_document("attempt", {}))
    backend.put(f"{ATTEMPTS}000003.from", EMPTY)
    train(backend, 4, 9, back_to=orphan)
    assert [(name.attempt, name.step) for name in look(backend).live] == [(1, 8), (4, 9)]
    assert incckpt.load(backend, step=8, progress=False)["w"][0] == 1008


def test_names_of_what_is_not_there(backend: MemoryBackend) -> None:
    name = exact(backend)[2, 4]
    with manager(backend) as trainer:
        trainer.restore(value(0, 0))
        trainer.delete(4)
    with pytest.raises(CheckpointNotFoundError, match=f"no checkpoint {name}: it is EXPIRED"):
        incckpt.load(backend, step=name)
    with pytest.raises(CheckpointNotFoundError, match="no checkpoint 000009"):
        incckpt.load(f"{backend.url}#@000009-000000000001-0123456789abcdef")
    with pytest.raises(OptionError, match="in the URL and"):
        incckpt.load(f"{backend.url}#@{name}", step=3)
    with pytest.raises(OptionError, match="a save needs a number"):
        incckpt.save({}, f"{backend.url}#@{name}")


def test_a_checkpoint_tells_its_exact_name(backend: MemoryBackend) -> None:
    names = exact(backend)
    with manager(backend, read_only=True) as reader:
        found = reader.checkpoints(abandoned=True)
    assert {(one.attempt, one.step): one.ref for one in found} == names
