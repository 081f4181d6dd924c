"""Pruning a run that has no writer: what a manager with the same policy would have kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import incckpt
from incckpt.backends import open_backend
from incckpt.errors import CheckpointNotFoundError, CorruptionError, OptionError, SupersededError
from tests.stores import object_keys, orphans

pytestmark = pytest.mark.slow


@pytest.fixture
def store(tmp_path: Path) -> Path:
    with incckpt.CheckpointManager(tmp_path) as manager:
        w = torch.randn(300_000)
        for step in range(1, 9):
            w[: 100 * step] += 1
            manager.save(step, {"w": w, "small": torch.full((9,), step)}, metrics={"loss": abs(step - 3)})
    incckpt.save({"w": w}, tmp_path, run="other", step=1)
    return tmp_path


def steps(folder: Path, run: str = "default") -> list[int]:
    return [one.step for one in incckpt.list_checkpoints(folder, run=run)]


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        ({"keep_last_n": 2}, [7, 8]),
        ({"keep_best_n": 2, "metric": "loss"}, [3, 4, 8]),
        ({"retention": incckpt.KeepEvery(steps=4)}, [4, 8]),
        ({"keep_last_n": 99}, [1, 2, 3, 4, 5, 6, 7, 8]),
    ],
)
def test_the_plan_comes_true(store: Path, policy: dict[str, Any], kept: list[int]) -> None:
    def stored() -> int:
        with open_backend(store) as backend:
            keys = object_keys(backend)
            return sum(entry.size for entry in backend.list() if entry.key in keys)

    before = stored()
    plan = incckpt.prune(store, **policy)
    assert ([one.step for one in plan.kept], plan.done) == (kept, False)
    assert steps(store) == list(range(1, 9))
    done = incckpt.prune(store, dry_run=False, **policy)
    assert ([one.step for one in done.kept], done.done) == (kept, len(kept) < 8)
    assert steps(store) == kept
    assert before - stored() == plan.freed_bytes == done.freed_bytes
    assert orphans(store) == set()
    assert incckpt.verify(store)
    assert steps(store, "other") == [1]


def test_what_was_abandoned_goes_when_the_run_has_passed_it(store: Path) -> None:
    with incckpt.CheckpointManager(store) as manager:
        manager.load(step=2)
        manager.save(5, {"w": torch.zeros(3)}, metrics={"loss": 0.0}).result()
    plan = incckpt.prune(store, keep_last_n=9, dry_run=False)
    assert all(one.abandoned for one in plan.doomed)
    left = incckpt.list_checkpoints(store, run="default", abandoned=True)
    assert [(one.step, one.abandoned) for one in left] == [
        (1, False),
        (2, False),
        (5, False),
        (6, True),
        (7, True),
        (8, True),
    ]


def test_refusals(store: Path) -> None:
    with pytest.raises(OptionError, match="what is to be kept"):
        incckpt.prune(store)
    with pytest.raises(OptionError, match="leave out '@3'"):
        incckpt.prune(f"{store}#@3", keep_last_n=1)
    with pytest.raises(CheckpointNotFoundError):
        incckpt.prune(store, run="none", keep_last_n=1)
    [ref] = store.glob("refs/other/*")
    ref.write_bytes(ref.read_bytes()[:-2])
    with pytest.raises(CorruptionError, match="nothing was pruned"):
        incckpt.prune(store, keep_last_n=1, dry_run=False)
    assert steps(store) == list(range(1, 9))


def test_a_writer_is_superseded(store: Path) -> None:
    manager = incckpt.CheckpointManager(store)
    manager.save(9, {"w": torch.zeros(3)}).result()
    incckpt.prune(store, keep_last_n=1, dry_run=False)
    with pytest.raises(SupersededError):
        manager.save(10, {"w": torch.zeros(3)}).result()
    with pytest.raises(SupersededError):
        manager.close()
