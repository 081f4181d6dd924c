"""The public interface: what arguments may be, what comes back, and what errors say."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import incckpt
from incckpt.errors import (
    BackendPermissionError,
    CheckpointNotFoundError,
    IncckptError,
    OptionError,
    StoreNotFoundError,
)


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """Return a store whose default run has steps 1, 2 and 3, the second one with the lowest loss."""
    with incckpt.CheckpointManager(tmp_path) as manager:
        for step, loss in ((1, 0.5), (2, 0.1), (3, 0.3)):
            manager.save(step, {"w": torch.full((4,), float(step)), "step": step}, {"loss": loss}).result()
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(
    "step", [np.int64(2), np.uint8(2), np.array(2), torch.tensor(2), torch.tensor(2, dtype=torch.uint8)]
)
def test_any_integer_is_a_step(three: Path, tmp_path: Path, step: Any) -> None:
    assert incckpt.load(three, step=step)["step"] == 2
    assert incckpt.save({}, tmp_path / "other", step=step).step == 2
    with incckpt.CheckpointManager(three) as manager:
        target = {"w": torch.zeros(4), "step": 0}
        assert manager.restore(target, step=step) == 2
        saved = manager.save(step + 5, target).result()
        assert saved.step == 7
        assert type(saved.step) is int
        assert manager.delete(step + 5)


@pytest.mark.slow
@pytest.mark.parametrize("step", [True, np.bool_(True), torch.tensor(True), 2.0, np.float64(2), -1, 10**12, b"2", [2]])
def test_nothing_else_is_a_step(three: Path, step: Any) -> None:
    with pytest.raises(OptionError, match="step must be an integer from 0"):
        incckpt.load(three, step=step)
    with pytest.raises(OptionError, match="step must be an integer from 0"):
        incckpt.save({}, three, step=step)
    with incckpt.CheckpointManager(three) as manager:
        for call in (
            lambda: manager.restore({}, step=step),
            lambda: manager.load(step),
            lambda: manager.save(step, {}),
        ):
            with pytest.raises(OptionError, match="step must be an integer from 0"):
                call()
        manager.save(4, {})
        with pytest.raises(OptionError, match="step must be an integer from 0"):
            manager.delete(step)


def test_a_step_as_a_string(three: Path) -> None:
    with incckpt.CheckpointManager(three, read_only=True) as reader:
        with pytest.raises(OptionError, match="not the string '5': give step=5"):
            reader.restore({}, step="5")
        with pytest.raises(OptionError, match="'best' or the name of a ref, not the string 'last'"):
            reader.load("last")


def test_looking_around(three: Path) -> None:
    with incckpt.CheckpointManager(three, read_only=True) as reader:
        assert [checkpoint.step for checkpoint in reader.checkpoints()] == [1, 2, 3]
        assert reader.latest == reader.checkpoints()[2]
        assert reader.best == reader.checkpoints()[1]
        assert not hasattr(reader, "list")
        assert len({*reader.checkpoints(), reader.latest, reader.best}) == 3  # they can be hashed
    with incckpt.CheckpointManager(three, read_only=True, metric="loss", mode="max") as reader:
        assert reader.best == reader.checkpoints()[0]
    with incckpt.CheckpointManager(three, read_only=True, metric="accuracy") as reader:
        assert reader.best is None
    with incckpt.CheckpointManager(three / "none", read_only=True) as reader:
        assert (reader.latest, reader.best, reader.checkpoints()) == (None, None, [])
    with incckpt.CheckpointManager(three, run="other", read_only=True) as reader:
        assert (reader.latest, reader.best, reader.checkpoints()) == (None, None, [])


def test_a_new_state_to_go_on_from(three: Path) -> None:
    with incckpt.CheckpointManager(three) as manager:
        state = manager.load(2)
        assert state["step"] == 2
        assert manager.load("best", keys="w").keys() == {"w"}
        manager.save(5, state).result()
        assert [checkpoint.step for checkpoint in manager.checkpoints()] == [1, 2, 5]
        assert torch.equal(incckpt.load(three)["w"], state["w"])
    with incckpt.CheckpointManager(three, read_only=True) as reader:
        assert reader.load(1, keys="step", map_location="cpu") == {"step": 1}
    with incckpt.CheckpointManager(three / "none", read_only=True) as reader, pytest.raises(StoreNotFoundError):
        reader.load()


def test_restoring_a_part(three: Path) -> None:
    with incckpt.CheckpointManager(three) as manager:
        target: dict[str, Any] = {"w": torch.zeros(4), "step": 0}
        assert manager.restore(target, keys="w") == 3
        assert (target["w"] == 3).all()
        assert target["step"] == 0
        assert manager.restore(target, 1, ignore=["w", "nothing"]) == 1
        assert (target["w"] == 3).all()
        assert target["step"] == 1
        manager.save(4, target).result()
    assert (incckpt.load(three)["w"] == 3).all()


def test_keys_that_are_names_with_brackets(tmp_path: Path) -> None:
    incckpt.save({"a[0]": 1, "a0": 2, "a*": 3, "ab": 4}, tmp_path)
    assert incckpt.load(tmp_path, keys="a[0]") == {"a[0]": 1, "a0": 2}
    assert incckpt.load(tmp_path, keys="a[[]0]") == {"a[0]": 1}
    with incckpt.CheckpointManager(tmp_path) as manager:
        assert manager.load(keys=["a[0]", "a[*]"]).keys() == {"a[0]", "a0", "a*"}


def test_errors_list_what_there_is(three: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="no checkpoint of step 9; it has steps 1, 2, 3"):
        incckpt.load(three, step=9)
    incckpt.save({}, three, run="second")
    with pytest.raises(
        CheckpointNotFoundError, match=r"run 'other' .*has no checkpoint; the store has runs default, second"
    ):
        incckpt.load(three, run="other")
    with (
        incckpt.CheckpointManager(three, run="other", read_only=True) as reader,
        pytest.raises(CheckpointNotFoundError, match="the store has runs default, second"),
    ):
        reader.load()


def test_a_metric_too_large(three: Path) -> None:
    with pytest.raises(OptionError, match="metric 'loss' is not a number"):
        incckpt.save({}, three, metrics={"loss": 10**400})


@pytest.fixture
def read_only_mount(three: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Mount the store of three checkpoints read-only."""
    mount = tmp_path_factory.mktemp("mount")
    if subprocess.run(["mount", "--bind", three, mount], capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", mount], check=True)
        yield mount
    finally:
        subprocess.run(["umount", mount], check=True)


def test_a_read_only_mount(read_only_mount: Path, caplog: pytest.LogCaptureFixture) -> None:
    with (
        pytest.raises(IncckptError, match=r"mounted read-only: .*read_only=True"),
        incckpt.CheckpointManager(read_only_mount) as manager,
    ):
        manager.save(9, {}).result()
    with pytest.raises(BackendPermissionError, match="mounted read-only"):
        incckpt.save({}, read_only_mount)
    assert "temporary file" not in caplog.text
    with incckpt.CheckpointManager(read_only_mount, read_only=True) as reader:
        assert reader.restore({"w": torch.zeros(4), "step": 0}) == 3
        assert reader.load(2)["step"] == 2
    assert incckpt.verify(read_only_mount)
