"""`list` and `info`."""

from __future__ import annotations

from pathlib import Path

import pytest

import incckpt
from tests.cli.conftest import Command, state_at


def test_list_shows_every_checkpoint_of_every_run(command: Command, store: str) -> None:
    done = command("list", store)
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0].split() == ["run", "step", "time", "state", "written", "metrics"]
    assert [line.split()[:2] for line in lines[1:-1]] == [
        ["default", "1"],
        ["default", "2"],
        ["default", "3"],
        ["other", "10"],
    ]
    assert lines[-1].startswith("4 checkpoints in 2 runs, ")
    assert all(len(line) <= 80 and line == line.rstrip() for line in lines)
    found = command("list", f"{store}#other", "--json").json["checkpoints"]
    assert [(item["run"], item["step"]) for item in found] == [("other", 10)]


def test_list_of_an_empty_store(command: Command, tmp_path: Path) -> None:
    incckpt.save({"x": 1}, tmp_path / "store", step=1)
    with incckpt.CheckpointManager(tmp_path / "store") as manager:
        manager.delete(1)
    assert command("list", tmp_path / "store").out == "There is no checkpoint to list.\n"
    assert command("list", tmp_path / "store", "--json").json == {"checkpoints": []}
    done = command("list", f"{tmp_path / 'store'}#default")
    assert (done.code, "has no checkpoint" in done.err) == (3, True)


def test_list_shows_what_was_abandoned(command: Command, store: str) -> None:
    with incckpt.CheckpointManager(store) as manager:
        manager.restore(state_at(0), step=1)
        manager.save(2, state_at(2), metrics={"loss": float("nan")}).result()
    steps = [
        (item["step"], item["attempt"], item["metrics"], item["abandoned"])
        for item in command("list", f"{store}#default", "--abandoned", "--json").json["checkpoints"]
    ]
    assert steps == [
        (1, 1, {"loss": 3.0}, False),
        (2, 2, {"loss": "nan"}, False),
        (3, 1, {"loss": 2.0}, True),
    ]
    assert "(abandoned)" in command("list", store, "--abandoned").out
    assert "(abandoned)" not in command("list", store).out


@pytest.mark.slow
def test_info_takes_every_fragment(command: Command, store: str) -> None:
    for fragment, step in (("", 3), ("#default", 3), ("#@latest", 3), ("#default@1", 1), ("#@best", 2), ("#other", 10)):
        done = command("info", f"{store}{fragment}", "--json")
        assert done.json["checkpoint"]["step"] == step, fragment
    assert command("info", f"{store}#@best", "--mode", "max", "--json").json["checkpoint"]["step"] == 1


def test_info_says_what_there_is(command: Command, store: str) -> None:
    done = command("info", f"{store}#@2", "--tensors")
    assert (done.code, done.err) == (0, "")
    assert "2.8 MB: 3 tensors, 1 other value" in done.out
    assert "loss 1" in done.out
    assert "model.changing  float32  400000  1.6 MB" in done.out
    assert all(len(line) <= 80 for line in done.out.splitlines())
    found = command("info", f"{store}#@2", "--json").json
    assert found["components"] == [{"name": "model", "tensors": 3, "nbytes": 2_800_036}]
    assert (found["objects"], found["deltas"]) == (3, 1)


@pytest.mark.slow
def test_diff_by_tensor(command: Command, store: str) -> None:
    done = command("diff", f"{store}#@1", "@3")
    assert (done.code, done.err) == (0, "")
    lines = [line.split() for line in done.out.splitlines()]
    assert ["model.bias", "changed", "2", "9", "2", "36", "B"] in lines
    assert ["step", "1", "3"] in lines
    assert "2 tensors differ, 1 tensor of 1.2 MB do not" in done.out
    assert all(len(line) <= 80 for line in done.out.splitlines())
    found = command("diff", f"{store}#@3", "#other", "--json").json
    assert (found["tensors"], found["values"], found["new_bytes"]) == ([], [], 0)
    assert "nothing differs" in command("diff", f"{store}#@3", f"{store}#other@10").out
    assert command("diff", f"{store}#@1", "@9").code == 3
