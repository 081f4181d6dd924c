"""`verify`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Command

pytestmark = pytest.mark.slow


def damage(store: str) -> Path:
    """Flip a byte of the largest object."""
    path = max(Path(store).glob("objects/??/*"), key=lambda path: path.stat().st_size)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    return path


def test_a_sound_store(command: Command, store: str) -> None:
    done = command("verify", store)
    assert (done.code, done.err) == (0, "")
    assert "3 of 3 checkpoints sound" in done.out
    assert "1 of 1 checkpoint sound" in done.out
    found = command("verify", f"{store}#@best", "--json", "--level", "list").json
    assert (found["ok"], [one["step"] for one in found["runs"][0]["checkpoints"]]) == (True, [2])


def test_a_damaged_one(command: Command, store: str) -> None:
    path = damage(store)
    done = command("verify", store)
    assert done.code == 4
    assert path.name in done.out
    assert "model.changing" in done.out
    lines = done.out.splitlines()
    assert len(set(lines)) == len(lines), "the same problem is told twice"
    assert command("verify", store, "--level", "sizes").code == 0
    path.unlink()
    found = command("verify", store, "--level", "list", "--json")
    assert (found.code, found.json["ok"], [run["ok"] for run in found.json["runs"]]) == (4, False, [False, False])


def test_a_run_whose_every_ref_is_damaged(command: Command, store: str) -> None:
    for path in Path(store, "refs", "other").iterdir():
        path.write_bytes(path.read_bytes()[:-2])
    done = command("verify", store)
    assert done.code == 4
    assert "run 'other'" in done.out


@pytest.mark.parametrize(("fragment", "code"), [("#none", 3), ("#@7", 3), ("#@best", 0)])
def test_what_the_fragment_names(command: Command, store: str, fragment: str, code: int) -> None:
    assert command("verify", f"{store}{fragment}").code == code


def test_doctor(command: Command, store: str, tmp_path: Path) -> None:
    done = command("doctor", store)
    assert (done.code, done.err) == (0, "")
    assert "exclusive creation  ok" in done.out
    assert "requests: 1 create" in done.out
    assert command("doctor", tmp_path / "none", "--json").json["ok"] is True
    Path(store, "incckpt.json").write_text("{}")
    done = command("doctor", store, "--json")
    assert (done.code, done.json["ok"]) == (4, False)
