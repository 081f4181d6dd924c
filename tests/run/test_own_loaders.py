"""Restores through a store of what loads itself, and what the next save makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.ao.quantization import PerChannelMinMaxObserver

import incckpt
from incckpt.errors import StateMismatchError
from incckpt.testing.compare import assert_same_state
from tests.state.test_loaders import Swapped


class Wrapped(torch.optim.SGD):
    def state_dict(self) -> Any:
        return {"base": super().state_dict()}

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict["base"])


def test_a_module_with_a_loader_of_its_own(tmp_path: Path) -> None:
    saved, target = Swapped(), Swapped()
    saved.a.data.fill_(1)
    saved.b.data.fill_(2)
    incckpt.save({"m": saved}, tmp_path)
    with incckpt.CheckpointManager(tmp_path) as manager:
        manager.restore({"m": target})
        assert target.a.tolist() == [2, 2]
        assert target.b.tolist() == [1, 1]
        manager.save(1, {"m": target}).result()  # compared with what was read, not with what the loader made of it
    assert incckpt.load(tmp_path)["m"]["a"].tolist() == [2, 2]


def test_an_observer(tmp_path: Path) -> None:
    saved, target = PerChannelMinMaxObserver(), PerChannelMinMaxObserver()
    saved(torch.randn(8, 4))
    incckpt.save({"o": saved}, tmp_path)
    with incckpt.CheckpointManager(tmp_path) as manager:
        manager.restore({"o": target})
    assert_same_state(dict(target.state_dict()), dict(saved.state_dict()))


def test_an_optimizer_whose_state_has_a_shape_of_its_own(tmp_path: Path) -> None:
    def make(lr: float) -> Any:
        return Wrapped(torch.nn.Linear(2, 2).parameters(), lr=lr)

    target = make(0.1)
    incckpt.save({"o": make(0.2)}, tmp_path)
    with incckpt.CheckpointManager(tmp_path) as manager:
        manager.restore({"o": target})
    assert target.param_groups[0]["lr"] == 0.2


class Average:
    """Keeps what it is given, and goes on writing to it."""

    def __init__(self) -> None:
        self.shadow = {"w": torch.zeros(100_000)}

    def state_dict(self) -> Any:
        return self.shadow

    def load_state_dict(self, state: Any) -> None:
        self.shadow = state


def test_what_an_object_keeps_is_not_the_base_that_saves_compare_with(tmp_path: Path) -> None:
    model, average = torch.nn.Linear(300, 300), Average()
    with incckpt.CheckpointManager(tmp_path) as manager:
        manager.save(1, {"model": model, "average": average}).result()
    with incckpt.CheckpointManager(tmp_path) as manager:
        model, average = torch.nn.Linear(300, 300), Average()
        manager.restore({"model": model, "average": average})
        for step in (2, 3):
            average.shadow["w"] += step
            with torch.no_grad():
                model.weight += step
            manager.save(step, {"model": model, "average": average}).result()
            loaded = incckpt.load(tmp_path, step=step)
            assert torch.equal(loaded["average"]["w"], average.shadow["w"])
            assert torch.equal(loaded["model"]["weight"], model.weight)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ((torch.nn.Linear(2, 2), {"epoch": 0}, 0), r"state\[2\] is a int, which cannot be written to"),
        (None, "state is a NoneType"),
        ([], "state is a list of 0"),
    ],
)
def test_targets_that_cannot_be_written_to(tmp_path: Path, target: Any, message: str) -> None:
    incckpt.save((torch.nn.Linear(2, 2), {"epoch": 3}, 7), tmp_path)
    with incckpt.CheckpointManager(tmp_path) as manager, pytest.raises(StateMismatchError, match=message):
        manager.restore(target)


def test_a_part_is_restored_and_saved_on(tmp_path: Path) -> None:
    def job(value: float) -> dict[str, Any]:
        return {"body": torch.full((300_000,), value), "head": torch.full((10,), value), "epoch": value}

    incckpt.save(job(1), tmp_path)
    with incckpt.CheckpointManager(tmp_path) as manager:
        target = job(2)
        assert manager.restore(target, ignore="head") == 0
        assert [target["body"][0], target["head"][0], target["epoch"]] == [1, 2, 1]
        manager.save(1, target).result()
        assert_same_state(incckpt.load(tmp_path), target)
        target = job(3)
        assert manager.restore(target, keys=["head"]) == 1
        assert [target["body"][0], target["head"][0], target["epoch"]] == [3, 2, 3]
        manager.save(2, target).result()
    assert_same_state(incckpt.load(tmp_path), target)


def test_a_loader_that_raises_says_where_and_may_be_tried_again(tmp_path: Path) -> None:
    class Picky(Average):
        ready = False

        def load_state_dict(self, state: Any) -> None:
            if not self.ready:
                raise KeyError("not yet")
            super().load_state_dict(state)

    incckpt.save({"x": Average()}, tmp_path)
    target = Picky()
    with incckpt.CheckpointManager(tmp_path) as manager:
        with pytest.raises(KeyError, match="not yet") as caught:
            manager.restore({"x": target})
        assert any("state['x']" in note and "undefined" in note for note in caught.value.__notes__)
        target.ready = True
        assert manager.restore({"x": target}) == 0
        manager.save(1, {"x": target}).result()


def test_map_location_is_called_as_torch_load_calls_it(tmp_path: Path) -> None:
    incckpt.save({"w": torch.ones(3)}, tmp_path)
    assert incckpt.load(tmp_path, map_location=lambda storage, location: storage)["w"].tolist() == [1, 1, 1]
