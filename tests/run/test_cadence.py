"""How often to save, over simulated trainings: what saves cost, and what a crash would."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import incckpt
from incckpt.errors import OptionError, SaveError
from incckpt.run.cadence import Cadence
from incckpt.run.checkpoint import Checkpoint
from incckpt.run.report import SaveReport
from incckpt.threads import Future


@dataclass
class Training:
    """A training whose clock only moves by what it does.

    Attributes
    ----------
    step_seconds
        Of a step while no save is pending.
    blocked, durable_after, slower
        What a save does: seconds that its call blocks, seconds from then until it is durable, and by which factor steps
        take longer meanwhile.
    """

    step_seconds: float
    blocked: float
    durable_after: float
    slower: float = 1.0
    fails: bool = False
    now: float = 1000.0
    step: int = 0
    saves: list[float] = field(default_factory=list)  # when each was called
    costs: list[float] = field(default_factory=list)
    worst: float = 0.0  # seconds of work that a crash would have cost, once there was a save
    _pending: tuple[float, Future[Checkpoint]] | None = None
    _safe: float = math.nan

    def run(self, cadence: Cadence, steps: int) -> None:
        for _ in range(steps):
            self.step += 1
            seconds = self.step_seconds
            if self._pending is not None:
                seconds *= self.slower
                self.costs[-1] += seconds - self.step_seconds
            self.now += seconds
            ends = self._pending[0] if self._pending is not None and not self.fails else math.inf
            self.worst = max(self.worst, min(self.now, ends) - self._safe)  # noticed at the end of a step, safe before
            if self._pending is not None and self.now >= self._pending[0]:
                if self.fails:
                    self._pending[1].set_exception(SaveError("the disk is gone"))
                else:
                    self._safe = self.saves[-1]
                    self._pending[1].set_result(None)  # type: ignore[arg-type]
                self._pending = None
            if cadence.due(self.step):
                assert self._pending is None, "due while a save is pending"
                self.save(cadence)

    def save(self, cadence: Cadence) -> None:
        self.saves.append(self.now)
        self.costs.append(self.blocked)
        self.now += self.blocked
        report = SaveReport(step=self.step)
        report.spent("stage", self.blocked)
        future = Future[Checkpoint]()
        self._pending = (self.now + self.durable_after, future)
        cadence.saved(report, future)


TRAININGS = st.builds(
    Training,
    step_seconds=st.floats(0.05, 10),
    blocked=st.floats(0, 5),
    durable_after=st.floats(0, 60),
    slower=st.floats(1, 3),
)
SHARES = st.floats(0.002, 0.2)


@pytest.mark.slow
@given(TRAININGS, SHARES)
def test_saves_keep_to_their_share(training: Training, share: float) -> None:
    cadence = Cadence(share=share, most_lost=math.inf, shortest=1e-9, clock=lambda: training.now)
    training.run(cadence, 2000)
    assert training.saves, "nothing was ever saved"
    paid, elapsed = sum(training.costs[:-1]), training.saves[-1] - training.saves[0]
    assert paid <= share * elapsed * (1 + 1e-6) + 1e-6, f"saves cost {paid} s of {elapsed} s"
    # As often as that allows: a step late at most, or as soon as the last one is durable.
    for before, after, cost in zip(training.saves, training.saves[1:], training.costs, strict=False):
        pending = training.blocked + training.durable_after + training.step_seconds * training.slower
        assert after - before <= max(cost / share, pending) + 2 * training.step_seconds + 1e-6


@pytest.mark.slow
@given(TRAININGS, SHARES, st.floats(1, 300))
@example(Training(step_seconds=0.05, blocked=0, durable_after=1, slower=2), 0.125, 1)  # at the end of a step, or not
def test_a_crash_costs_no_more_than_stated(training: Training, share: float, extra: float) -> None:
    slow_step = training.step_seconds * training.slower
    durable = training.blocked + training.durable_after + slow_step
    most_lost = 2 * durable + 3 * slow_step + extra  # two saves in a row: until the second is durable, the first counts
    cadence = Cadence(share=share, most_lost=most_lost, clock=lambda: training.now)
    training.run(cadence, 1000)
    assert len(training.saves) > 1 or training.now - 1000 < most_lost
    assert training.worst <= most_lost + training.step_seconds + 1e-6


def test_what_cannot_be_kept_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    training = Training(step_seconds=1, blocked=5, durable_after=10)
    training.run(Cadence(share=0.01, most_lost=100, clock=lambda: training.now), 2000)
    assert len(caplog.records) == 1
    assert "a save costs 5 s of training and is durable after 15 s" in caplog.text
    assert "500 s would keep their cost below 1 %" in caplog.text
    assert training.worst <= 101
    caplog.clear()
    training = Training(step_seconds=1, blocked=5, durable_after=500)
    training.run(Cadence(share=0.01, most_lost=100, clock=lambda: training.now), 2000)
    assert len(training.saves) == 4, "a bound that no save can keep: each follows the one before"
    assert len(caplog.records) == 1


def test_saves_that_cost_nothing_are_not_made_all_the_time() -> None:
    training = Training(step_seconds=0.5, blocked=0, durable_after=0)
    training.run(Cadence(clock=lambda: training.now), 2000)
    gaps = [after - before for before, after in pairwise(training.saves)]
    assert gaps
    assert set(gaps) == {60.0}


def test_an_evaluation_between_steps_is_no_cost_of_a_save() -> None:
    training = Training(step_seconds=1, blocked=0.7, durable_after=9)
    cadence = Cadence(clock=lambda: training.now)
    training.run(cadence, 12)
    training.now += 600
    training.run(cadence, 40)
    assert cadence.cost == pytest.approx(0.7)
    assert cadence.interval == pytest.approx(70)


def test_a_failed_save_is_tried_again_but_not_at_every_step() -> None:
    training = Training(step_seconds=1, blocked=0.1, durable_after=2, fails=True)
    cadence = Cadence(most_lost=200, clock=lambda: training.now)
    training.run(cadence, 300)
    assert 4 <= len(training.saves) <= 6
    assert cadence.cost is None
    training.fails = False
    training.run(cadence, 100)
    assert cadence.cost == pytest.approx(0.1)


@given(st.integers(1, 50), st.integers(0, 500))
def test_steps(every: int, step: int) -> None:
    assert Cadence(every).due(step) == (step % every == 0)


def test_a_plain_interval() -> None:
    training = Training(step_seconds=7, blocked=1, durable_after=0)
    training.run(Cadence(timedelta(minutes=1), clock=lambda: training.now), 1000)
    gaps = {round(after - before) for before, after in pairwise(training.saves)}
    assert gaps == {64}  # nine steps, and the save


@pytest.mark.parametrize("every", [0, -1, 1.5, "often", "", True, timedelta(0), b"auto", [5]])
def test_unusable_intervals(every: object) -> None:
    with pytest.raises(OptionError, match="save_every"):
        Cadence(every)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "option", [{"share": 0}, {"share": 1}, {"most_lost": -1}, {"shortest": "soon"}, {"share": None}]
)
def test_unusable_options(option: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(option))):
        Cadence("auto", **option)


def test_a_manager_says_when(tmp_path: Path) -> None:
    with incckpt.CheckpointManager(tmp_path, save_every=3) as manager:
        for step in range(1, 10):
            if manager.due(step):
                manager.save(step, {"w": step})
        manager.wait()
        assert [checkpoint.step for checkpoint in manager.checkpoints()] == [3, 6, 9]


def test_a_manager_measures_its_saves(tmp_path: Path) -> None:
    now = [0.0]
    cadence = incckpt.Cadence(clock=lambda: now[0])
    with incckpt.CheckpointManager(tmp_path, save_every=cadence) as manager:
        for step in range(1, 200):
            now[0] += 1
            if manager.due(step):
                manager.save(step, {"w": step}).result()
        steps = [report.step for report in manager.history]
        blocked = [report.blocked_seconds for report in manager.history]
    assert steps[0] == 9
    assert all(gap >= 60 for gap in (after - before for before, after in pairwise(steps)))
    assert cadence.cost == pytest.approx(blocked[-1])


def test_a_manager_that_was_not_told_how_often(tmp_path: Path) -> None:
    with incckpt.CheckpointManager(tmp_path) as manager, pytest.raises(OptionError, match="save_every"):
        manager.due(1)
