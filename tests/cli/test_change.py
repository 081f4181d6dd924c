"""`rm`."""

from __future__ import annotations

from pathlib import Path

import pytest

import incckpt
from tests.cli.conftest import Command
from tests.stores import orphans

pytestmark = pytest.mark.slow


def steps(store: str, run: str = "default") -> list[int]:
    return [checkpoint.step for checkpoint in incckpt.list_checkpoints(store) if checkpoint.run == run]


def test_rm_deletes_what_it_is_told(command: Command, store: str) -> None:
    done = command("rm", f"{store}#@1", f"{store}#@best", "--yes")
    assert (done.code, done.err) == (0, "")
    assert done.out == "deleted step 1 of run default\ndeleted step 2 of run default\n"
    assert (steps(store), steps(store, "other")) == ([3], [10])
    assert orphans(store) == set()
    assert incckpt.load(store)["step"] == 3


def test_rm_asks_first(command: Command, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    done = command("rm", f"{store}#@1")
    assert (done.code, "--yes" in done.err) == (2, True)
    assert steps(store) == [1, 2, 3]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["#@9"], 3, "no checkpoint of step 9"),
        ([""], 2, "which checkpoint?"),
        (["#default"], 2, "--all"),
        (["#default@1", "--all"], 2, "without '@step'"),
        (["#none", "--all"], 3, "has no checkpoint"),
    ],
)
def test_rm_refuses(command: Command, store: str, arguments: list[str], code: int, says: str) -> None:
    done = command("rm", f"{store}{arguments[0]}", *arguments[1:], "--yes")
    assert done.code == code
    assert says in done.err
    assert steps(store) == [1, 2, 3]


def test_rm_in_a_store_that_is_not_there_makes_none(command: Command, tmp_path: Path) -> None:
    assert command("rm", f"{tmp_path / 'none'}#@1", "--yes").code == 3
    assert not (tmp_path / "none").exists()


def test_rm_all_of_a_run_with_a_damaged_checkpoint(command: Command, store: str) -> None:
    [ref] = Path(store, "refs", "default").glob("*-000000000002-*")
    ref.write_bytes(ref.read_bytes()[:-2])
    done = command("rm", f"{store}#default@2", "--yes")
    assert (done.code, steps(store)) == (0, [1, 3])
    done = command("rm", f"{store}#default", "--all", "--yes", "--json")
    assert done.json == {"deleted": [{"run": "default", "step": 1}, {"run": "default", "step": 3}]}
    assert steps(store) == []
    assert incckpt.load(f"{store}#other")["step"] == 3


def test_copy_what_is_missing(command: Command, store: str, tmp_path: Path) -> None:
    target = tmp_path / "target"
    done = command("copy", f"{store}#@1", target)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("copied step 1 of run default: 3 objects, ")
    done = command("copy", store, target)
    assert done.out.count("copied step") == 3
    assert "was there already: step 1 of run default" in done.out
    assert all(len(line) <= 80 for line in done.out.splitlines())
    done = command("copy", store, target, "--json")
    assert (done.json["copied"], done.json["nbytes"], len(done.json["skipped"])) == ([], 0, 4)
    assert incckpt.load(target, step=3)["step"] == 3


def test_copy_refuses_other_contents(command: Command, store: str, tmp_path: Path) -> None:
    incckpt.save({"x": 1}, tmp_path / "target", step=2)
    done = command("copy", f"{store}#@2", tmp_path / "target")
    assert (done.code, "other contents at step 2" in done.err) == (2, True)
    done = command("copy", f"{store}#default", tmp_path / "target", "--if-exists", "skip")
    assert (done.code, "default@1 cannot be added" in done.err) == (0, True)
    assert command("copy", "none", tmp_path / "target").code == 3


def test_prune_is_a_plan_unless_told_otherwise(command: Command, store: str) -> None:
    done = command("prune", store, "--keep-last", 1, "--keep-best", 1, "--metric", "loss")
    assert "would delete 1 of 3 checkpoints" in done.out
    assert "--no-dry-run" in done.out
    assert steps(store) == [1, 2, 3]
    found = command("prune", store, "--keep-every", 2, "--no-dry-run", "--json").json
    assert ([one["step"] for one in found["doomed"]], found["done"]) == ([1], True)
    assert steps(store) == [2, 3]
    for arguments in ([], ["--keep-best", 1]):
        assert command("prune", store, *arguments).code == 2
