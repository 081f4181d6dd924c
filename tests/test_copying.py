"""Copies: complete, the same bit for bit, of missing objects only, whatever stops them."""

from __future__ import annotations

import logging
import random
import shutil
import uuid
from pathlib import Path
from typing import Any

import pytest
import s3fs
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import incckpt
from incckpt.backends import open_backend
from incckpt.backends.local import LocalBackend
from incckpt.backends.memory import MemoryBackend
from incckpt.errors import (
    BackendError,
    CheckpointNotFoundError,
    CorruptionError,
    OptionError,
    StoreNotFoundError,
    SupersededError,
)
from incckpt.testing.compare import assert_same_state
from incckpt.testing.disk import StopAt
from incckpt.testing.faults import Call, CountingBackend, Fail, Fault, FaultyBackend, kill_process
from tests.effort import tries
from tests.forks import exit_code, fork, forks
from tests.stores import orphans

pytestmark = pytest.mark.slow


def state_at(step: int) -> dict[str, Any]:
    """Return a state of one large tensor that changes in part, another that changes once, small ones, values."""
    large = torch.arange(600_000, dtype=torch.float32)
    large[: 2000 * step] *= step
    return {
        "large": large,
        "half": torch.full((200_000,), 1.0 if step < 3 else 2.0, dtype=torch.bfloat16),
        "small": torch.full((7,), float(step)),
        "values": list(range(3000)),
        "step": step,
    }


def fill(url: Any, steps: range, run: str | None = None) -> None:
    with incckpt.CheckpointManager(url, run=run) as manager:
        for step in steps:
            manager.save(step, state_at(step), metrics={"loss": 1.0 / (step + 1)})


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a store that tests only read: steps 1 to 5 of `default`, with deltas, and step 4 of `other`."""
    folder = tmp_path_factory.mktemp("source")
    fill(folder, range(1, 6))
    fill(folder, range(4, 5), run="other")
    assert list(folder.glob("deltas/*/*"))
    return folder


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Return every file of a store, with its size and the time of its last change."""
    found = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns) for path in found}


def assert_complete(source: Any, destination: Any, **options: Any) -> None:
    """Check that the destination has what the source has, whole, and nothing else."""
    assert incckpt.list_runs(destination, **options) == incckpt.list_runs(source)
    for checkpoint in incckpt.list_checkpoints(source):
        where: dict[str, Any] = {"run": checkpoint.run, "step": checkpoint.step}
        assert_same_state(incckpt.load(destination, **where, **options), incckpt.load(source, **where))
        copy = incckpt.describe(destination, **where, **options).checkpoint
        assert (copy.time, copy.metrics, copy.nbytes) == (checkpoint.time, checkpoint.metrics, checkpoint.nbytes)
    for run in incckpt.list_runs(destination, **options):
        assert incckpt.verify(destination, run=run, **options)


def test_a_whole_store(source: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    done = incckpt.copy(source, tmp_path, progress=lambda *count: seen.append(count))
    assert [(one.checkpoint.run, one.checkpoint.step) for one in done.copied] == [
        *(("default", step) for step in range(1, 6)),
        ("other", 4),
    ]
    assert_complete(source, tmp_path)
    assert orphans(tmp_path) == set()
    assert not list(tmp_path.glob("pins/*/*"))
    assert seen[-1][0] == seen[-1][1] == sum(checkpoint.nbytes for checkpoint in incckpt.list_checkpoints(source))
    # As many objects and bytes as in the source: nothing is stored twice, and deltas stay deltas.
    sizes = [sorted(path.stat().st_size for path in folder.glob("[od]*s/*/*")) for folder in (source, tmp_path)]
    assert len(sizes[0]) == len(sizes[1])
    assert sum(one.nbytes for one in done.copied) == done.nbytes <= sum(sizes[0])
    nonces = {name.rpartition(".")[2] for name in files(source) if "objects/" in name}
    assert nonces.isdisjoint(name.rpartition(".")[2] for name in files(tmp_path))


def test_a_second_copy_writes_nothing(source: Path, tmp_path: Path) -> None:
    incckpt.copy(source, tmp_path)
    before = files(tmp_path)
    done = incckpt.copy(source, CountingBackend(LocalBackend(tmp_path)))
    assert (done.copied, len(done.skipped), done.nbytes) == ((), 6, 0)
    assert files(tmp_path) == before


def test_later_checkpoints_only(tmp_path: Path) -> None:
    fill(tmp_path / "a", range(1, 3))
    incckpt.copy(tmp_path / "a", tmp_path / "b")
    fill(tmp_path / "a", range(3, 5))
    done = incckpt.copy(tmp_path / "a", tmp_path / "b")
    assert [one.checkpoint.step for one in done.copied] == [3, 4]
    assert_complete(tmp_path / "a", tmp_path / "b")
    assert orphans(tmp_path / "b") == set()


@pytest.mark.parametrize("fragment", ["#@best", "#default@latest", "#@5"])
def test_one_checkpoint(source: Path, tmp_path: Path, fragment: str) -> None:
    done = incckpt.copy(f"{source}{fragment}", f"{tmp_path}#kept")
    assert [(one.checkpoint.run, one.checkpoint.step) for one in done.copied] == [("kept", 5)]
    assert_same_state(incckpt.load(f"{tmp_path}#kept"), state_at(5))
    # A delta comes with its base, and nothing more.
    assert orphans(tmp_path) == set()


def test_to_another_run_of_the_same_store_puts_manifests_only(tmp_path: Path) -> None:
    fill(tmp_path, range(1, 4))
    done = incckpt.copy(f"{tmp_path}#default", f"{tmp_path}#branch")
    assert [(one.objects, one.nbytes) for one in done.copied] == [(0, 0)] * 3
    assert_same_state(incckpt.load(f"{tmp_path}#branch@2"), state_at(2))
    with incckpt.CheckpointManager(tmp_path) as manager:
        for step in (1, 2, 3):
            manager.delete(step)
    assert_same_state(incckpt.load(f"{tmp_path}#branch@2"), state_at(2))
    assert orphans(tmp_path) == set()


def test_training_goes_on_from_a_copy(source: Path, tmp_path: Path) -> None:
    incckpt.copy(f"{source}#default", tmp_path)
    with incckpt.CheckpointManager(tmp_path) as manager:
        target = state_at(0)
        assert manager.restore(target) == 5
        target["small"] += 1
        manager.save(6, target).result()
        assert manager.history[0].put_objects == 1
    assert [one.checkpoint.step for one in incckpt.copy(f"{tmp_path}#@6", f"{tmp_path}#x").copied] == [6]


@pytest.mark.parametrize("seed", range(3))
@forks
def test_killed_ten_times_it_ends_complete(source: Path, tmp_path: Path, seed: int) -> None:
    """Each copy is killed at a random one of its system calls; the next goes on."""
    calls = StopAt(0, kill_process)
    incckpt.copy(source, LocalBackend(tmp_path / "counted", calls=calls))
    assert calls.count > 100
    dice = random.Random(seed)
    target = tmp_path / "target"
    killed = 0
    while killed < 10:
        stop = dice.randrange(1, calls.count // 4)

        def copy(stop: int = stop) -> None:
            incckpt.copy(source, LocalBackend(target, calls=StopAt(stop, kill_process)), threads=2)

        code = exit_code(fork(copy))
        if code == 0:
            break  # done before that
        assert code == -9
        killed += 1
    incckpt.copy(source, target)
    assert_complete(source, target)
    assert incckpt.copy(source, target).copied == ()
    assert orphans(target) == set()


def test_what_a_killed_copy_put_is_not_put_again(source: Path, tmp_path: Path) -> None:
    backend = FaultyBackend(LocalBackend(tmp_path), [Fault("create", "refs/*", do=Fail(KeyboardInterrupt()))])
    with pytest.raises(KeyboardInterrupt):
        incckpt.copy(f"{source}#@5", backend)
    there = {name for name in files(tmp_path) if name.startswith(("objects", "deltas"))}
    assert len(there) > 3
    [copied] = incckpt.copy(f"{source}#@5", tmp_path).copied
    assert (copied.objects, copied.nbytes) == (0, 0)
    assert_same_state(incckpt.load(tmp_path), state_at(5))
    assert orphans(tmp_path) == set()


_DATA = st.lists(st.tuples(st.sampled_from(["a", "b"]), st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=6)


@settings(max_examples=tries(6), deadline=None)
@given(saves=_DATA, already=st.integers(1, 5), deltas=st.booleans())
def test_any_series(saves: list[tuple[str, int, int]], already: int, deltas: bool) -> None:
    """Runs that share contents, in part copied before."""
    source, target = (MemoryBackend(str(uuid.uuid4())) for _ in range(2))
    managers = {run: incckpt.CheckpointManager(source, run=run, delta=deltas) for run in ("a", "b")}
    for step, (run, first, second) in enumerate(saves):
        if step == already:
            for manager in managers.values():
                manager.wait()
            incckpt.copy(source, target)
        large = torch.arange(300_000, dtype=torch.float32)
        large[: 100 * first] = -1.0
        managers[run].save(step, {"large": large, "second": torch.full((50,), second)})
    for manager in managers.values():
        manager.wait()
    incckpt.copy(source, target)
    assert_complete(source, target)
    assert orphans(target) == set()
    for manager in managers.values():
        manager.close()


# -- refusals


def test_it_refuses_before_anything_is_written(source: Path, tmp_path: Path) -> None:
    def refused(start: Any, end: Any, error: type[Exception], match: str, **options: Any) -> None:
        with pytest.raises(error, match=match):
            incckpt.copy(start, end, **options)

    target = tmp_path / "target"
    refused(tmp_path / "none", target, StoreNotFoundError, "no incckpt store")
    refused(f"{source}#none", target, CheckpointNotFoundError, "has no checkpoint")
    refused(f"{source}#@9", target, CheckpointNotFoundError, "no checkpoint of step 9")
    refused(source, f"{target}#x", OptionError, "which run of the source")
    refused(f"{source}#default", f"{target}#x@3", OptionError, "keeps its steps")
    refused(f"{source}#default", source, OptionError, "the copy would be the original")
    refused(source, target, OptionError, "if_exists", if_exists="maybe")
    assert not target.exists()


def test_other_contents_of_a_step(source: Path, tmp_path: Path) -> None:
    incckpt.save({"mine": torch.zeros(3)}, tmp_path, step=2)
    before = files(tmp_path)
    with pytest.raises(OptionError, match="other contents at step 2"):
        incckpt.copy(f"{source}#@2", tmp_path)
    with pytest.raises(OptionError, match="is at step 2 already, and has no step 1"):
        incckpt.copy(f"{source}#@1", tmp_path)
    assert files(tmp_path) == before
    done = incckpt.copy(f"{source}#default", tmp_path, if_exists="skip")
    assert ([one.checkpoint.step for one in done.copied], done.skipped) == ([3, 4, 5], (("default", 2),))
    assert done.passed == (("default", 1),)
    assert set(incckpt.load(tmp_path, step=2)) == {"mine"}
    done = incckpt.copy(f"{source}#@2", tmp_path, if_exists="replace")
    assert_same_state(incckpt.load(tmp_path, step=2), state_at(2))
    assert orphans(tmp_path) == set()


def test_a_writer_of_the_destination_is_superseded(source: Path, tmp_path: Path) -> None:
    manager = incckpt.CheckpointManager(tmp_path, run="other")
    manager.save(1, {"x": 1}).result()
    incckpt.copy(f"{source}#other", tmp_path)
    with pytest.raises(SupersededError):
        manager.save(9, {"x": 1}).result()
    with pytest.raises(SupersededError):
        manager.close()


# -- damage


def damage(folder: Path, pattern: str) -> str:
    path = max(folder.glob(pattern), key=lambda path: path.stat().st_size)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    return path.name


@pytest.mark.parametrize("pattern", ["objects/*/*", "deltas/*/*"])
def test_damage_is_not_copied(source: Path, tmp_path: Path, pattern: str) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(source, folder)
    name = damage(folder, pattern)
    with pytest.raises(CorruptionError, match=name):
        incckpt.copy(folder, tmp_path / "copy")
    for checkpoint in incckpt.list_checkpoints(tmp_path / "copy") if (tmp_path / "copy").exists() else ():
        assert_same_state(incckpt.load(tmp_path / "copy", step=checkpoint.step), state_at(checkpoint.step))
    # Without a look at the bytes the damage goes along, and is found on reading.
    incckpt.copy(folder, tmp_path / "unchecked", verify=False)
    assert not incckpt.verify(tmp_path / "unchecked")


def test_what_is_pruned_meanwhile_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(tmp_path / "a", range(1, 4))

    def prune(_: object) -> None:
        with incckpt.CheckpointManager(tmp_path / "a") as manager:
            manager.delete(1)
            manager.delete(2)

    backend = FaultyBackend(LocalBackend(tmp_path / "a"), [Fault("get", "objects/*", nth=2, do=Call(prune))])
    with caplog.at_level(logging.WARNING):
        done = incckpt.copy(backend, tmp_path / "b")
    copied, pruned = {one.checkpoint.step for one in done.copied}, {step for _, step in done.pruned}
    assert copied | pruned == {1, 2, 3}
    assert (3 in copied, 2 in pruned) == (True, True)
    assert "was pruned before it was copied" in caplog.text
    assert_complete(tmp_path / "a", tmp_path / "b")
    incckpt.collect(tmp_path / "b", dry_run=False, min_age=0)
    assert orphans(tmp_path / "b") == set()


def test_a_store_that_fails_is_gone_on_with(source: Path, tmp_path: Path) -> None:
    backend = FaultyBackend(LocalBackend(tmp_path), [Fault("put", "objects/*", nth=4, do=Fail(BackendError("no")))])
    with pytest.raises(BackendError):
        incckpt.copy(source, backend)
    incckpt.copy(source, tmp_path)
    assert_complete(source, tmp_path)


# -- other stores


@pytest.fixture
def bucket(s3_server: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    s3fs.S3FileSystem(**s3_server).makedirs("copies", exist_ok=True)
    return f"s3://copies/{uuid.uuid4()}", s3_server


def test_to_s3_and_back(source: Path, tmp_path: Path, bucket: tuple[str, dict[str, Any]]) -> None:
    url, options = bucket
    incckpt.copy(source, url, destination_options=options)
    assert_complete(source, url, storage_options=options)
    done = incckpt.copy(url, tmp_path, source_options=options)
    assert len(done.copied) == 6
    assert_complete(source, tmp_path)
    assert incckpt.copy(url, tmp_path, source_options=options).copied == ()
    with open_backend(url, options) as backend:
        assert orphans(backend) == set()


def test_to_a_store_without_exclusive_creation(source: Path) -> None:
    backend = MemoryBackend(str(uuid.uuid4()))
    backend.exclusive = False
    incckpt.copy(source, backend)
    assert_complete(source, backend)
    assert incckpt.copy(source, backend).copied == ()


def test_a_store_of_format_1(tmp_path: Path) -> None:
    """Its deltas' names hold the whole identity of their bases."""
    for name in ("format1", "format2"):
        fixture = Path(__file__).parent / "fixtures" / name
        incckpt.copy(fixture, tmp_path / name)
        for checkpoint in incckpt.list_checkpoints(fixture):
            where: dict[str, Any] = {"run": checkpoint.run, "step": checkpoint.step}
            assert_same_state(incckpt.load(tmp_path / name, **where), incckpt.load(fixture, **where))
