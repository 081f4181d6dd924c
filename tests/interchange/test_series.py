"""Series of files become runs: which steps, in which order, at what price."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import incckpt
from incckpt.errors import OptionError, StateError
from incckpt.interchange import Progress, import_files
from incckpt.interchange.series import find_sources
from incckpt.testing.compare import difference


@pytest.mark.parametrize(
    ("names", "steps"),
    [
        (["checkpoint-500.pt", "checkpoint-1000.pt"], [500, 1000]),
        (["epoch=3-step=1200.ckpt", "epoch=1-step=400.ckpt"], [400, 1200]),
        (["model_10.pt", "model_9.pt"], [9, 10]),
        (["run2-step0005.pt", "run2-step0100.pt"], [5, 100]),
        (["epoch_2.pth", "epoch_10.pth"], [2, 10]),
        (["b.pt", "a.pt"], [None, None]),
    ],
)
def test_steps_come_from_names(names: list[str], steps: list[int | None], tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "notes.txt").touch()
    found = find_sources(tmp_path)
    assert [source.step for source in found] == steps
    if steps == [None, None]:
        assert [source.path.name for source in found] == ["a.pt", "b.pt"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["step-1.pt", "last.pt"], r"last\.pt has no step in its name"),
        (["a-1.pt", "b-1.pt"], r"are both of step 1; choose one"),
        (["notes.txt"], r"is no checkpoint that can be imported"),
    ],
)
def test_steps_that_are_not_clear_are_refused(names: list[str], message: str, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(OptionError, match=message):
        find_sources(tmp_path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"there is no file or folder .*gone\.pt"):
        import_files(tmp_path / "gone.pt", tmp_path / "store")


def fine_tune(folder: Path, count: int) -> list[dict[str, torch.Tensor]]:
    """Write a series in which one tensor stands still, one moves a little, and one is a bias."""
    frozen, weight, bias = torch.randn(700, 600), torch.randn(700, 600), torch.zeros(600)
    states = []
    for step in range(count):
        weight = weight + 1e-4 * torch.randn(700, 600)
        states.append({"frozen": frozen, "weight": weight, "bias": bias + step})
        torch.save(states[-1], folder / f"checkpoint-{10 * step}.pt")
    return states


@pytest.mark.slow
def test_a_series_costs_what_changes(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    states = fine_tune(tmp_path / "old", 5)
    seen: list[Progress] = []
    made = import_files(tmp_path / "old", tmp_path / "store", threads=1, progress=seen.append)
    assert [one.checkpoint.step for one in made] == [0, 10, 20, 30, 40]
    for one in made[1:]:
        assert one.checkpoint.written < 0.75 * 4 * 700 * 600  # of one of the two tensors, as a delta
    for step, state in zip(range(0, 50, 10), states, strict=True):
        assert difference(incckpt.load(f"{tmp_path}/store#@{step}"), state) == ""
    assert bool(incckpt.verify(tmp_path / "store"))
    assert [(one.index, one.count, one.name) for one in seen if one.done == one.total] == [
        (index, 5, f"checkpoint-{10 * index}.pt") for index in range(5)
    ]


@pytest.mark.slow
def test_a_series_costs_what_a_manager_writes(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    states = fine_tune(tmp_path / "old", 4)
    made = import_files(tmp_path / "old", tmp_path / "store")
    with incckpt.CheckpointManager(tmp_path / "managed") as manager:
        futures = [manager.save(10 * step, state) for step, state in enumerate(states)]
    written = [future.result().written for future in futures]
    assert [one.checkpoint.written for one in made] == pytest.approx(written, rel=0.02)


def test_an_import_that_was_broken_off_goes_on(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    states = fine_tune(tmp_path / "old", 4)
    broken = tmp_path / "old" / "checkpoint-20.pt"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:1000])
    with pytest.raises(ValueError, match="checkpoint-20"):
        import_files(tmp_path / "old", tmp_path / "store")
    broken.write_bytes(whole)
    with pytest.raises(OptionError, match="has a checkpoint of step 0 already"):
        import_files(tmp_path / "old", tmp_path / "store")
    made = import_files(tmp_path / "old", tmp_path / "store", if_exists="skip")
    assert [one.checkpoint.step for one in made] == [0, 10, 20, 30]
    assert [one.checkpoint.attempt for one in made] == [1, 1, 2, 2]
    assert difference(incckpt.load(tmp_path / "store"), states[-1]) == ""


def test_files_without_steps_follow_the_run(tmp_path: Path) -> None:
    incckpt.save({"w": 1}, tmp_path / "store", step=7)
    for name in ("b", "a"):
        torch.save({"name": name}, tmp_path / f"{name}.pt")
    made = import_files([tmp_path / "b.pt", tmp_path / "a.pt"], tmp_path / "store")
    assert [one.checkpoint.step for one in made] == [8, 9]
    assert incckpt.load(f"{tmp_path}/store#@8") == {"name": "b"}


def test_a_step_and_metrics_are_for_one_file(tmp_path: Path) -> None:
    for step in (1, 2):
        torch.save({"w": step}, tmp_path / f"{step}.pt")
    with pytest.raises(OptionError, match="are for a single file, and 2 are"):
        import_files([tmp_path / "1.pt", tmp_path / "2.pt"], tmp_path / "store", metrics={"loss": 1.0})
    made = import_files(tmp_path / "1.pt", f"{tmp_path}/store#a@5", metrics={"loss": 1.0})
    assert (made[0].checkpoint.run, made[0].checkpoint.step) == ("a", 5)
    assert made[0].checkpoint.metrics == {"loss": 1.0}


def test_what_cannot_be_saved_names_file_and_place(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.ones(2).to_sparse()}}, tmp_path / "state.pt")
    with pytest.raises(StateError, match=r"state\.pt: cannot save state\['model'\]\['w'\]"):
        import_files(tmp_path / "state.pt", tmp_path / "store")
