"""`stats`, `du`, `blobs` and `gc`."""

from __future__ import annotations

from pathlib import Path

import pytest

import incckpt
from tests.cli.conftest import Command

pytestmark = pytest.mark.slow


def test_stats_says_what_storing_incrementally_saves(command: Command, store: str) -> None:
    found = command("stats", store, "--json").json
    assert (found["runs"], found["checkpoints"], found["state_bytes"]) == (2, 4, 4 * 2_800_036)
    assert found["kinds"]["delta"]["objects"] == 2
    assert found["stored_bytes"] == sum(path.stat().st_size for path in Path(store).glob("*s/??/*"))
    done = command("stats", store)
    assert "4 in 2 runs" in done.out
    assert "times less" in done.out
    assert all(len(line) <= 80 for line in done.out.splitlines())
    assert command("stats", f"{store}#other", "--json").json["checkpoints"] == 1


def test_du_tells_shared_bytes_from_own(command: Command, store: str) -> None:
    done = command("du", store)
    assert (done.code, done.err) == (0, "")
    lines = [line.split() for line in done.out.splitlines()]
    assert [line[0] for line in lines[1:]] == ["@1", "@2", "@3", "#default", "@10", "#other", "store"]
    found = command("du", f"{store}#@2", "--json").json
    assert [one["step"] for one in found["checkpoints"]] == [2]


def test_blobs_are_those_of_the_fragment(command: Command, store: str) -> None:
    everything = command("blobs", store, "--json", "--limit", "0").json
    assert {one["key"] for one in everything["objects"]} == {
        str(path.relative_to(store)) for path in Path(store).glob("*s/??/*")
    }
    of_one = command("blobs", f"{store}#@1", "--json", "--limit", "0").json
    assert {one["key"] for one in of_one["objects"]} < {one["key"] for one in everything["objects"]}
    done = command("blobs", store, "--limit", "2")
    assert done.out.splitlines()[0].split() == ["stored", "kind", "raw", "needed", "by", "object"]
    assert "more, of" in done.out
    assert all(len(line) <= 80 for line in done.out.splitlines())


def test_gc_is_a_plan_unless_told_otherwise(command: Command, store: str) -> None:
    garbage = Path(store, "objects", "00", f"{'0' * 62}.{'1' * 16}")
    garbage.parent.mkdir(exist_ok=True)
    garbage.write_bytes(b"left by a killed save")
    assert "finds nothing to delete" in command("gc", store).out
    done = command("gc", store, "--min-age", "0")
    assert "would delete 1 objects, 21 bytes" in done.out
    assert "--no-dry-run" in done.out
    assert garbage.exists()
    assert [one["objects"] for one in command("stats", store, "--json").json["kinds"].values()][-1] == 1
    found = command("gc", store, "--min-age", "0", "--no-dry-run", "--json").json
    assert (found["objects"], found["nbytes"], found["removals"][0]["reason"]) == (1, 21, "unreferenced")
    assert not garbage.exists()
    assert incckpt.verify(store).ok


def test_gc_concerns_whole_stores(command: Command, store: str) -> None:
    done = command("gc", f"{store}#default")
    assert (done.code, "whole store" in done.err) == (2, True)
