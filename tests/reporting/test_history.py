"""What a report says of real runs: against what was done."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import incckpt
from incckpt.backends.memory import MemoryBackend
from incckpt.errors import CheckpointNotFoundError, StoreNotFoundError
from incckpt.reporting import heatmap
from incckpt.reporting.history import History, read_history
from incckpt.store.refs import Ref
from incckpt.store.store import Store
from tests.reporting.runs import train

pytestmark = pytest.mark.slow


def history_of(store: Path, run: str = "default") -> History:
    with Store.open(str(store)) as opened:
        return read_history(opened, run)


def row(history: History, name: str) -> list[int]:
    cells = history.heat_map.cells[list(history.heat_map.rows).index(name)]
    return [int(cell) for cell in cells]


def ref_of(store: Path, index: int) -> Ref:
    with Store.open(str(store)) as opened:
        run = opened.run("default")
        found = run.read(run.lineage().live[index])
    assert isinstance(found, Ref)
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three attempts, two of which rewound."""
    store = tmp_path_factory.mktemp("report") / "store"
    train(store, range(1, 13))
    train(store, range(5, 8), restore=4)
    train(store, range(7, 10), restore=6)
    return store


def test_columns_are_the_lineage(trained: Path) -> None:
    history = history_of(trained)
    assert [column.checkpoint.step for column in history.columns] == list(range(1, 10))
    assert [column.checkpoint.attempt for column in history.columns] == [1, 1, 1, 1, 2, 2, 3, 3, 3]
    assert history.problems == []
    for column in history.columns:
        assert column.blocked is not None
        assert column.blocked.keys() == {"wait", "flatten", "stage"}


def test_branches_are_what_was_abandoned(trained: Path) -> None:
    branches = {branch.attempt: branch for branch in history_of(trained).branches}
    steps = {attempt: [one.step for one in branch.checkpoints] for attempt, branch in branches.items()}
    assert steps == {1: [10, 11, 12]}, "abandoned checkpoints go once the run has passed their steps"
    assert branches[1].parent == 4


def test_cells_tell_frozen_from_learning(trained: Path) -> None:
    history = history_of(trained)
    frozen, learning = row(history, "model.2.weight"), row(history, "model.0.weight")
    after_restart = heatmap.UNSURE  # it lies in a chunk with others, and the first save of a process measures nothing
    unchanged = heatmap.UNCHANGED
    assert frozen == [heatmap.FIRST, *[unchanged] * 3, after_restart, unchanged, after_restart, *[unchanged] * 2]
    for column, cell in enumerate(learning[1:], 1):
        if column in (4, 6):
            assert cell == heatmap.UNSURE
        else:
            assert heatmap.SCALE < cell < heatmap.FROM_ZERO
    assert set(history.heat_map.frozen) == {"model.2.weight", "model.2.bias"}
    assert "model.2.weight" not in {mover.name for mover in history.heat_map.learning}
    assert "optimizer.state.0.step" not in history.heat_map.rows, "single numbers are left out"


def test_cells_hold_the_relative_change(tmp_path: Path) -> None:
    state = {"w": torch.ones(100), "v": torch.zeros(100)}
    with incckpt.CheckpointManager(tmp_path) as manager:
        for step, factor in enumerate([1.0, 1.001, 1.1, 1.0], 1):
            state["w"] *= factor
            if step == 2:
                state["v"] += 1
            if step == 3:
                state["v"][5] = torch.nan
            manager.save(step, state).result()
    history = history_of(tmp_path)
    cells = np.array([row(history, "w")], np.uint8)
    assert heatmap.decode(cells)[0, 1:] == pytest.approx([0.001, 0.1, 0.0], rel=0.05)
    assert row(history, "v")[1:] == [heatmap.FROM_ZERO, heatmap.NOT_FINITE, heatmap.UNCHANGED]


def test_bytes_are_those_of_the_store(tmp_path: Path) -> None:
    train(tmp_path, range(1, 7))
    history = history_of(tmp_path)
    objects = sum(path.stat().st_size for kind in ("objects", "deltas") for path in (tmp_path / kind).glob("*/*"))
    assert sum(column.new_bytes or 0 for column in history.columns) == objects
    assert all((column.new_bytes or 0) <= column.checkpoint.written for column in history.columns)


def test_components_are_the_state(trained: Path) -> None:
    history = history_of(trained)
    assert sum(component.nbytes for component in history.components) == history.columns[-1].checkpoint.nbytes
    by_name = {component.name: component for component in history.components}
    assert by_name["model"].tensors == 6
    assert by_name["model"].nbytes == 4 * (8 * 16 + 16 + 16 * 16 + 16 + 16 + 1)
    assert by_name[None].nbytes > 0, "the long list is packed"
    assert {part.name for part in by_name["model"].parts} == {"0", "2", "4"}
    assert sum(part.nbytes for part in by_name["model"].parts) == by_name["model"].nbytes
    assert {part.name for part in by_name["optimizer"].parts} == {f"state.{index}" for index in range(4)}


class _Counting(MemoryBackend):
    """Counts the reads of each key."""

    def __init__(self) -> None:
        super().__init__("counting")
        self.reads: Counter[str] = Counter()

    def get(self, key: str, *args: Any) -> bytes:
        self.reads[key] += 1
        return super().get(key, *args)

    def get_into(self, key: str, *args: Any) -> int:
        self.reads[key] += 1
        return super().get_into(key, *args)


def test_each_manifest_is_read_once_and_nothing_is_written() -> None:
    with _Counting() as backend, incckpt.CheckpointManager(backend) as manager:
        for step in range(1, 8):
            manager.save(step, {"w": torch.ones(2000) * step}).result()
        backend.reads.clear()
        before = {entry.key for entry in backend.list("")}
        history = read_history(Store(backend), "default")
        after = {entry.key for entry in backend.list("")}
    assert len(history.columns) == 7
    assert after == before
    read = {key: count for key, count in backend.reads.items() if key.startswith(("objects/", "deltas/"))}
    assert len(read) == 7
    assert set(read.values()) == {1}


def test_a_damaged_manifest_is_told_and_the_rest_is_shown(tmp_path: Path) -> None:
    train(tmp_path, range(1, 5))
    (tmp_path / ref_of(tmp_path, 1).manifest).write_bytes(b"rot")
    history = history_of(tmp_path)
    assert [column.new_bytes is None for column in history.columns] == [False, True, False, False]
    assert len(history.problems) == 1
    assert "step 2" in history.problems[0]
    assert row(history, "model.0.weight")[1] == heatmap.ABSENT


def test_what_is_pruned_while_it_is_read_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path, range(1, 5))
    ref, read = ref_of(tmp_path, 0), Store.manifest

    def prune_then_read(store: Store, wanted: Ref) -> Any:
        if wanted.name == ref.name:
            store.run("default").expire([ref.name])
            (tmp_path / ref.manifest).unlink()
        return read(store, wanted)

    monkeypatch.setattr(Store, "manifest", prune_then_read)
    history = history_of(tmp_path)
    assert [column.checkpoint.step for column in history.columns] == [2, 3, 4]
    assert history.problems == []
    assert history.heat_map.cells.shape[1] == 3


def test_an_empty_run_and_what_is_missing(tmp_path: Path) -> None:
    train(tmp_path / "store", range(1, 2))
    with incckpt.CheckpointManager(tmp_path / "store", run="empty") as manager:
        manager.save(1, {"w": torch.ones(3)})
        manager.delete(1)
    assert history_of(tmp_path / "store", "empty").columns == []
    with pytest.raises(CheckpointNotFoundError, match="runs default, empty"):
        history_of(tmp_path / "store", "typo")
    with pytest.raises(StoreNotFoundError):
        history_of(tmp_path / "nothing")


def test_tensors_that_come_and_go(tmp_path: Path) -> None:
    with incckpt.CheckpointManager(tmp_path) as manager:
        manager.save(1, {"a": torch.ones(5)}).result()
        manager.save(2, {"a": torch.ones(5), "b": torch.ones(5, dtype=torch.int64)}).result()
        manager.save(3, {"b": torch.ones(5, dtype=torch.int64)}).result()
        manager.save(4, {"b": torch.zeros(5, dtype=torch.int64)}).result()
    history = history_of(tmp_path)
    assert row(history, "a") == [heatmap.FIRST, heatmap.UNCHANGED, heatmap.ABSENT, heatmap.ABSENT]
    assert row(history, "b") == [heatmap.ABSENT, heatmap.FIRST, heatmap.UNCHANGED, heatmap.CHANGED], (
        "alone in its chunk"
    )
