"""Saves by a deadline: the newest that can be made is made, and nothing is waited for beyond it."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import incckpt
from incckpt.backends.memory import MemoryBackend
from incckpt.errors import CorruptionError, DeadlineError, ManagerClosedError
from incckpt.run.deadline import Job, Rates, expected, expected_together, to_cut
from incckpt.run.report import SaveReport
from incckpt.store.document import dump_document
from incckpt.store.manifest import Manifest
from incckpt.store.refs import Ref
from incckpt.store.store import Store
from incckpt.testing.faults import Fault, FaultyBackend, Pause
from incckpt.threads import Future

MB = 1_000_000


def rates_of(*past: tuple[int, float, float]) -> Rates:
    rates = Rates()
    for changed, store, commit in past:
        report = SaveReport(changed_bytes=changed, nbytes=changed, seconds={"store": store, "commit": commit})
        rates.learn(Job(report, Future()))
    return rates


def jobs_of(changed: Sequence[int], nbytes: int = 1000 * MB, begun: bool = False) -> list[Job]:
    jobs = [Job(SaveReport(step=step, changed_bytes=one, nbytes=nbytes), Future()) for step, one in enumerate(changed)]
    if begun:
        jobs[0].begun = time.monotonic()
    return jobs


def steps(jobs: Sequence[Job]) -> list[int]:
    return [job.report.step for job in jobs]


def test_what_is_expected_is_the_worse_of_the_last_and_the_mean() -> None:
    assert Rates().seconds(5 * MB) is None
    assert rates_of((10 * MB, 1.0, 0.5)).seconds(20 * MB) == pytest.approx(2.5)
    assert rates_of((10 * MB, 1.0, 0.5), (10 * MB, 3.0, 0.1)).seconds(10 * MB) == pytest.approx(3.0 + 0.3)
    assert rates_of((10 * MB, 3.0, 0.5), (10 * MB, 1.0, 0.1)).seconds(10 * MB) == pytest.approx(2.0 + 0.3)
    assert rates_of((0, 0.0, 0.5)).seconds(10 * MB) is None, "nothing was stored that would tell"
    # A save under way that is slower than those before it.
    assert rates_of((10 * MB, 1.0, 0.0)).seconds(20 * MB, done=5 * MB, elapsed=5.0) == pytest.approx(15.0)
    assert rates_of((10 * MB, 1.0, 0.0)).seconds(20 * MB, done=MB // 100, elapsed=1.0) == pytest.approx(2.0, rel=0.01)
    assert Rates().seconds(20 * MB, done=MB // 100, elapsed=1.0) is None, "a small object says nothing of large ones"


def test_what_another_process_took_counts_until_this_one_has_saved() -> None:
    rates = Rates()
    rates.carry_over((10 * MB, 1.0, 0.2))
    assert rates.carried_over
    assert rates.seconds(20 * MB) == pytest.approx(2.4), "as many requests come after the manifest as before"
    assert rates.seconds(20 * MB, done=10 * MB, elapsed=0.1) == pytest.approx(0.5), "this machine is faster"
    rates.carry_over(None)
    assert (rates.carried_over, rates.seconds(MB)) == (False, None), "the checkpoint restored last says nothing"
    rates.carry_over((10 * MB, 1.0, 0.2))
    rates.learn(jobs_of([10 * MB])[0])
    assert not rates.carried_over
    assert rates.seconds(MB) == 0.0, "of its own saves alone"


def test_a_first_save_is_expected_to_take_what_the_one_before_it_took() -> None:
    server = MemoryBackend(f"deadline-{time.time_ns()}")
    state = {"w": torch.arange(300_000), "b": torch.zeros(9)}
    with incckpt.CheckpointManager(server) as manager:
        manager.save(1, state).result()
        (report,) = manager.history
        assert (report.expected_seconds, report.expected_by_another) == (None, False)
    took = report.seconds["store"], report.changed_bytes
    with incckpt.CheckpointManager(server) as manager:
        assert manager.restore(state) == 1
        state["w"] += 1
        manager.save(2, state).result()
        manager.save(3, {**state, "b": torch.ones(9)}).result()
        second, third = manager.history
    assert second.expected_by_another
    assert second.expected_seconds is not None
    assert second.expected_seconds >= took[0] / took[1] * second.changed_bytes * 0.99
    assert (third.expected_seconds is not None, third.expected_by_another) == (True, False)
    with incckpt.CheckpointManager(server) as manager:
        manager.save(4, state).result()
        assert manager.history[-1].expected_seconds is None, "nothing was restored, so nothing is known"


@pytest.mark.parametrize(
    "took", [None, {}, [1, 2.0], [1.5, 1.0, 1.0], [1, -1.0, 0.0], [1, "nan", 0.0], [1, 0.0, "inf"], [10**400, 1.0, 1.0]]
)
def test_what_a_manifest_says_that_its_save_took_is_checked(took: object) -> None:
    server = MemoryBackend(f"took-{time.time_ns()}")
    with incckpt.CheckpointManager(server) as manager:
        manager.save(1, {"w": torch.zeros(9)}).result()
    store = Store(server)
    run = store.run("default")
    ref = run.read(run.lineage().live[0])
    assert isinstance(ref, Ref)
    manifest = store.manifest(ref)
    assert manifest.took is not None
    assert Manifest.from_json(manifest.to_json(), "it").took == manifest.took
    document = {**json.loads(manifest.to_json()), "took": took}
    for field in ("format", "kind", "check"):
        del document[field]
    with pytest.raises(CorruptionError, match="took"):
        Manifest.from_json(dump_document("manifest", document), "it")
    del document["took"]
    assert Manifest.from_json(dump_document("manifest", document), "it").took is None, "as 0.1 wrote it"


@pytest.mark.parametrize(
    ("changed", "begun", "left", "cut"),
    [
        ([10, 10, 10], False, 3.1, []),  # all fit
        ([10, 10, 10], True, 3.1, []),
        ([10, 10, 10], True, 2.5, [2]),  # the last would store what the one before it does not: 1 + 2 s
        ([10, 10, 1], True, 1.9, [1]),  # but no more than the whole state
        ([10, 40, 10], True, 3.0, [1, 2]),
        ([40, 10, 10], True, 3.0, [1, 2]),  # none fits: only the one under way goes on
        ([40, 10, 10], False, 3.0, [1, 2]),
    ],
)
def test_which_are_left_out(changed: list[int], begun: bool, left: float, cut: list[int]) -> None:
    rates = rates_of((10 * MB, 1.0, 0.0))
    jobs = jobs_of([one * MB for one in changed], begun=begun)
    jobs[-1].report.nbytes = 5 * MB if changed[-1] == 1 else 1000 * MB
    assert steps(to_cut(jobs, left, rates)) == cut


def test_where_nothing_is_known_the_newest_has_a_chance() -> None:
    assert steps(to_cut(jobs_of([MB] * 3, begun=True), 1.0, Rates())) == [1]
    assert steps(to_cut(jobs_of([MB] * 3), 1.0, Rates())) == [0, 1]


@given(
    st.lists(st.integers(0, 100), min_size=1, max_size=5),
    st.booleans(),
    st.floats(0.0, 40.0),
    st.floats(0.01, 1.0),
)
def test_what_is_kept_fits_or_nothing_does(changed: list[int], begun: bool, left: float, rate: float) -> None:
    rates = rates_of((MB, rate, 0.1))
    jobs = jobs_of([one * MB for one in changed], begun=begun)
    kept = [job for job in jobs if job not in to_cut(jobs, left, rates)]
    assert not begun or jobs[0] in kept, "what is under way is never left out"
    assert kept
    first = jobs[1:] if begun else jobs
    waiting = [job for job in kept if job in first]
    if len(waiting) > 1:
        assert kept == jobs, "some are made in between only if all are"
    if waiting and waiting != first and (begun or len(first) > 1):
        newest = waiting[-1]
        skipped = sum(job.report.changed_bytes for job in first[: first.index(newest)])
        alone = expected(newest, rates, skipped)
        assert alone is not None
        assert alone <= left or newest is first[0]


def test_what_was_left_out_is_still_to_be_stored() -> None:
    rates = rates_of((10 * MB, 1.0, 0.0))
    under_way, last = jobs_of([10 * MB, 10 * MB], begun=True)
    assert expected_together([under_way, last], rates) == pytest.approx(2.0)
    last.skipped = 20 * MB
    assert expected_together([under_way, last], rates) == pytest.approx(4.0)
    last.report.nbytes = 25 * MB
    assert expected_together([under_way, last], rates) == pytest.approx(3.5), "no more than the whole state"
    assert expected_together([under_way, last], Rates()) is None


def test_the_log_tells_what_is_expected_and_what_happened(caplog: pytest.LogCaptureFixture) -> None:
    pause = Pause()
    backend = FaultyBackend(MemoryBackend("flush-log"), [Fault("create", "refs/*", nth=2, do=pause)])
    state = {"w": torch.zeros(100_000)}
    preemption = incckpt.Preemption(signals=(), margin=0)
    with caplog.at_level("INFO"), incckpt.CheckpointManager(backend, preemption=preemption) as manager:
        manager.save(1, state).result()
        manager.save(2, {"w": torch.ones(100_000)})
        pause.reached.wait(30)
        left_out = manager.save(3, {"w": torch.full((100_000,), 3.0)})
        preemption.announce(incckpt.Notice("test", time.time() + 3600, "an hour is left"))
        manager._saves._rates = rates_of((1, 30.0, 0.0))  # 30 s for a byte: only what is under way goes on
        last = manager.save(4, {"w": torch.full((100_000,), 4.0)})
        pause.resume.set()
        for cut in (left_out, last):
            with pytest.raises(DeadlineError, match="another save is to be made"):
                cut.result()
    told = [record.getMessage() for record in caplog.records if record.name == "incckpt.run.pending"]
    assert any("step 2 is expected to be saved in" in text and "step 4 is left out" in text for text in told), told
    assert any(text.startswith("step 2 was saved with 3") for text in told), told


@pytest.mark.parametrize("blocked", [False, True])
def test_flush_returns_by_the_deadline(blocked: bool) -> None:
    pause = Pause()
    script = [Fault("create", "refs/*", nth=2, do=pause)] if blocked else []
    backend = FaultyBackend(MemoryBackend(f"flush-{blocked}"), script)
    state = {"w": torch.zeros(1000)}
    manager = incckpt.CheckpointManager(backend)
    manager.save(1, state).result()
    second, third = (manager.save(step, {"w": torch.full((1000,), float(step))}) for step in (2, 3))
    before = time.monotonic()
    last = manager.flush(before + (0.2 if blocked else 60))
    assert last is not None
    if not blocked:
        assert last.step == third.result().step == 3
        manager.close()
        return
    assert last.step == 1, "the checkpoint before stands"
    assert time.monotonic() - before < 30, "it did not wait for the pause"
    for future in (second, third):
        with pytest.raises(DeadlineError):
            future.result(timeout=0)
    with pytest.raises(DeadlineError):
        manager.save(4, state)
    with pytest.raises(ManagerClosedError):
        manager.save(4, state)
    manager.close()
    pause.resume.set()
    assert incckpt.load(backend.inner, step=1)["w"].equal(state["w"])
