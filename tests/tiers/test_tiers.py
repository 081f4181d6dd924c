"""Two tiers: saves that a disk has at once and the bucket soon; restores from what is left of both."""

from __future__ import annotations

import errno
import logging
import shutil
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import incckpt
from incckpt import CheckpointManager, LocalTier
from incckpt.backends import open_backend
from incckpt.backends.memory import MemoryBackend
from incckpt.errors import BackendError, OptionError, SaveError, SupersededError
from incckpt.store.store import Store
from incckpt.testing.faults import Call, CountingBackend, Fail, Fault, FaultyBackend
from incckpt.tiers.follows import Follows
from tests.stores import orphans

pytestmark = pytest.mark.slow


def state_at(step: int) -> dict[str, Any]:
    """Return a state of a large tensor that stays, one that changes a little, and a small one that is new each time."""
    moving = torch.arange(300_000, dtype=torch.float32)
    moving[: 10 * step] *= step
    return {"fixed": torch.arange(500_000), "moving": moving, "small": torch.full((9,), float(step)), "step": step}


def restored(manager: CheckpointManager, step: int | None = None) -> int | None:
    """Restore, and check every bit."""
    state = state_at(10_000)
    found = manager.restore(state, step)
    if found is not None:
        expected = state_at(found)
        for name in ("fixed", "moving", "small"):
            assert torch.equal(state[name], expected[name]), f"{name} of step {found} is wrong"
    return found


def steps(url: Any) -> list[int]:
    return [checkpoint.step for checkpoint in incckpt.list_checkpoints(url)]


def save(manager: CheckpointManager, *numbers: int) -> None:
    for step in numbers:
        manager.save(step, state_at(step)).result()


def memory() -> MemoryBackend:
    """Return a new bucket."""
    return MemoryBackend(uuid.uuid4().hex)


class Gate:
    """Holds requests back until it is opened."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self.open = self._open.set

    def __call__(self, operation: object) -> None:
        self._open.wait()


def held(pattern: str = "objects/*") -> tuple[Gate, FaultyBackend]:
    """Return a bucket that hangs when it is written to, until the gate is opened."""
    gate = Gate()
    return gate, FaultyBackend(memory(), [Fault("put", pattern, times=None, do=Call(gate))])


@pytest.fixture
def local(tmp_path: Path) -> Path:
    return tmp_path / "local"


@pytest.fixture
def bucket(tmp_path: Path) -> Path:
    return tmp_path / "bucket"


def test_both_tiers_have_what_was_saved(bucket: Path, local: Path) -> None:
    with CheckpointManager(bucket, local=LocalTier(local, keep_last_n=1), keep_last_n=3) as manager:
        assert restored(manager) is None
        for step in range(1, 6):
            save(manager, step)
            manager.wait("bucket")
        states = [{name: tier.state for name, tier in report.tiers.items()} for report in manager.history]
    assert states == [{"local": "durable", "bucket": "durable"}] * 5
    assert (steps(bucket), steps(local)) == ([3, 4, 5], [4, 5][-len(steps(local)) :])
    for url in (bucket, local):
        assert incckpt.load(url)["step"] == 5
        assert not orphans(url)


def test_a_save_does_not_wait_for_a_bucket_that_hangs(local: Path) -> None:
    gate, bucket = held()
    manager = CheckpointManager(bucket, local=local)
    restored(manager)
    save(manager, 1, 2, 3, 4, 5, 6)  # would never return
    assert steps(local)[-1] == 6
    gate.open()
    manager.wait("bucket")
    by_step = {report.step: report.tiers["bucket"].state for report in manager.history}
    assert by_step == {1: "durable", 2: "skipped", 3: "skipped", 4: "skipped", 5: "durable", 6: "durable"}
    assert [checkpoint.step for checkpoint in incckpt.list_checkpoints(bucket)] == [1, 5, 6]
    manager.close()


def test_what_waits_to_be_copied_is_not_pruned(local: Path) -> None:
    gate, bucket = held()
    manager = CheckpointManager(bucket, local=LocalTier(local, keep_last_n=1, max_pending=3))
    save(manager, 1, 2, 3, 4)
    assert steps(local) == [1, 2, 3, 4]
    gate.open()
    manager.close()
    assert not orphans(bucket)


def test_a_copy_puts_what_is_missing(local: Path) -> None:
    bucket = CountingBackend(memory())
    with CheckpointManager(bucket, local=local) as manager:
        save(manager, 1)
        manager.wait("bucket")
        save(manager, 2)
        manager.wait("bucket")
        first, second = (report.tiers["bucket"].put_bytes for report in manager.history)
    assert second < first / 3


def test_the_bucket_alone_restores_when_the_machine_is_lost(bucket: Path, local: Path) -> None:
    with CheckpointManager(bucket, local=local) as manager:
        save(manager, 1, 2)
    shutil.rmtree(local)
    with CheckpointManager(bucket, local=local) as manager:
        assert restored(manager) == 2
        save(manager, 3)
    assert (steps(bucket), steps(local)) == ([1, 2, 3], [3])
    with CheckpointManager(bucket, local=local) as manager:
        assert restored(manager) == 3
        assert restored(manager, 1) == 1


def die_before_copying(bucket: MemoryBackend, local: Path, *numbers: int, restore: int | None = None) -> None:
    """Save, and be gone before the last of them is in the bucket."""
    faults = [Fault("put", "objects/*", times=None, do=Fail(BackendError("gone")))]
    manager = CheckpointManager(FaultyBackend(bucket, faults), local=local)
    restored(manager, restore)
    save(manager, *numbers)
    with pytest.raises(SaveError, match=rf"step {numbers[-1]} is in the local tier alone: copying it to .* failed"):
        manager.close()


def test_the_local_tier_is_restored_where_it_is_ahead(local: Path) -> None:
    bucket = memory()
    with CheckpointManager(bucket, local=local) as manager:
        save(manager, 1)
    die_before_copying(bucket, local, 2, 3)
    with CheckpointManager(bucket, local=local) as manager:
        assert [checkpoint.step for checkpoint in manager.checkpoints()] == [1, 2, 3]
        assert manager.latest is not None
        assert manager.latest.step == 3
        assert restored(manager) == 3
        assert steps(bucket) == [1]  # a restore writes nothing
        save(manager, 4)
    assert steps(bucket) == [1, 3, 4]


def test_a_run_that_went_on_elsewhere_is_not_overtaken(tmp_path: Path, caplog: Any) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    server = memory()
    with CheckpointManager(server, local=here) as manager:
        save(manager, 1)
    die_before_copying(server, here, 2, 3)
    with CheckpointManager(server, local=there) as manager:
        assert restored(manager) == 1
        save(manager, 2)
    with CheckpointManager(server, local=here) as manager:
        assert manager.latest is not None
        assert (manager.latest.step, restored(manager)) == (2, 2)
        assert "step 3 of" in caplog.text
        save(manager, 4)
    with CheckpointManager(server, local=here) as manager:
        assert [checkpoint.step for checkpoint in manager.checkpoints()] == [1, 2, 4]


def test_whom_the_bucket_refuses_is_told_at_the_next_save(tmp_path: Path) -> None:
    server = memory()
    with CheckpointManager(server, local=tmp_path / "one") as manager:
        save(manager, 1)
    one = CheckpointManager(server, local=tmp_path / "one")
    other = CheckpointManager(server, local=tmp_path / "other")
    assert (restored(one), restored(other)) == (1, 1)
    save(other, 2)
    other.close()
    save(one, 2)
    one.wait("bucket")
    with pytest.raises(SupersededError):
        one.save(3, state_at(3))
    with pytest.raises(SupersededError):
        one.close()
    assert incckpt.load(server)["step"] == 2


def test_a_bucket_out_of_reach_leaves_the_local_tier(local: Path, caplog: Any) -> None:
    server = memory()
    with CheckpointManager(server, local=local) as manager:
        save(manager, 1)
    out = threading.Event()
    out.set()

    def unreachable(_: object) -> None:
        if out.is_set():
            raise BackendError("no route to host", transient=True)

    gone = FaultyBackend(server, [Fault(times=None, do=Call(unreachable))])
    manager = CheckpointManager(gone, local=local)
    assert restored(manager) == 1
    save(manager, 2)
    manager.wait("bucket")
    assert manager.history[-1].tiers["bucket"].state == "failed"
    assert manager.history[-1].tiers["bucket"].error is not None
    out.clear()
    save(manager, 3)
    manager.close()
    assert steps(server) == [1, 3]
    out.set()
    with CheckpointManager(gone, local=local / "new") as manager, pytest.raises(BackendError):
        restored(manager)  # an unreachable bucket is not an empty one


def test_a_checkpoint_that_the_bucket_does_not_give_is_not_passed_over(tmp_path: Path) -> None:
    server = memory()
    with CheckpointManager(server, local=tmp_path / "here", keep_last_n=9) as manager:
        save(manager, 1, 2)
    broken = Fault("get", "refs/*-000000000002-*", times=None, do=Fail(BackendError("connection reset")))
    with (
        CheckpointManager(FaultyBackend(server, [broken]), local=tmp_path / "new") as manager,
        pytest.raises(BackendError, match="connection reset"),
    ):
        restored(manager)  # of step 1, and the next save would abandon step 2


def test_who_goes_back_and_dies_before_copying_stays_there(local: Path) -> None:
    server = memory()
    with CheckpointManager(server, local=LocalTier(local, keep_last_n=9)) as manager:
        save(manager, 10, 20)
    die_before_copying(server, local, 15, restore=10)
    with CheckpointManager(server, local=local) as manager:
        assert restored(manager) == 15, "what was gone back behind counts again"
        save(manager, 16)
    assert steps(server) == [10, 15, 16]


@pytest.mark.parametrize("loss", ["full", "removed"])
def test_a_lost_disk_leaves_the_bucket(bucket: Path, local: Path, loss: str, monkeypatch: Any, caplog: Any) -> None:
    manager = CheckpointManager(bucket, local=local, keep_last_n=9)
    save(manager, 1)
    manager.wait("bucket")
    if loss == "removed":
        shutil.rmtree(local)
    else:
        backend = manager._position._local_store.backend  # type: ignore[union-attr]

        def full(*_: object) -> None:
            raise BackendError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(backend, "put_many", full)
    with caplog.at_level(logging.ERROR):
        save(manager, 2, 3)
    assert caplog.text.count("full or lost") == 1
    assert steps(bucket) == [1, 2, 3]
    assert manager.history[-1].tiers["bucket"].state == "durable"
    manager.close()
    monkeypatch.undo()
    with CheckpointManager(bucket, local=local) as manager:
        assert restored(manager) == 3
        save(manager, 4)
    assert steps(local)[-1] == 4


def remove(path: Path) -> None:
    path.unlink()


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-40] ^= 255
    path.write_bytes(data)


@pytest.mark.parametrize("spoil", [remove, damage])
@pytest.mark.parametrize("tier", ["local", "bucket"])
def test_what_one_tier_lacks_is_read_from_the_other(
    bucket: Path, local: Path, tier: str, spoil: Callable[[Path], None]
) -> None:
    with CheckpointManager(bucket, local=local) as manager:
        save(manager, 1)
    manifests = {ref.manifest for ref in refs(local)} | {ref.manifest for ref in refs(bucket)}
    root = local if tier == "local" else bucket
    files = [path for path in (root / "objects").rglob("*") if path.is_file()]
    chunks = [path for path in files if path.relative_to(root).as_posix() not in manifests]
    for path in chunks:
        spoil(path)
    if tier == "bucket":
        for path in (local / "refs").rglob("*"):
            if path.is_file():
                path.unlink()  # so that it is the bucket's checkpoint that is read
    with CheckpointManager(bucket, local=local, read_only=True) as manager:
        assert restored(manager) == 1


def refs(url: Path) -> list[Any]:
    run = Store(open_backend(str(url))).run("default")
    return [run.read(name) for name in run.lineage().live]


def test_a_damaged_manifest_of_one_tier_costs_nothing(bucket: Path, local: Path) -> None:
    with CheckpointManager(bucket, local=local) as manager:
        save(manager, 1)
        manager.wait("bucket")
        save(manager, 2)
    damage(local / refs(local)[-1].manifest)
    with CheckpointManager(bucket, local=local) as manager:
        assert restored(manager) == 2


def test_a_deletion_reaches_both_tiers(bucket: Path, local: Path) -> None:
    with CheckpointManager(bucket, local=local) as manager:
        for step in (1, 2):
            save(manager, step)
            manager.wait("bucket")
        assert manager.delete(1)
    assert (steps(bucket), steps(local)) == ([2], [2])


def test_the_best_is_that_of_either_tier(bucket: Path, local: Path) -> None:
    with CheckpointManager(bucket, local=LocalTier(local, keep_last_n=1)) as manager:
        for step, loss in ((1, 0.1), (2, 0.5), (3, 0.4)):
            manager.save(step, state_at(step), metrics={"loss": loss})
            manager.wait("bucket")
        assert manager.best is not None
        assert manager.best.step == 1
        state = state_at(7)
        assert manager.restore(state, "best") == 1


def test_another_buckets_local_tier_is_refused(bucket: Path, local: Path, tmp_path: Path) -> None:
    with CheckpointManager(bucket, local=local) as manager:
        save(manager, 1)
    other = tmp_path / "other"
    incckpt.save(state_at(1), other, step=1)
    with CheckpointManager(other, local=local) as manager, pytest.raises(OptionError, match="local tier of another"):
        restored(manager)


def test_tiers_that_are_one_store_are_refused(bucket: Path, tmp_path: Path) -> None:
    for url in (bucket, f"file://{bucket}/"):
        with pytest.raises(OptionError, match="itself"):
            CheckpointManager(url, local=bucket)
    with CheckpointManager(bucket) as manager:
        save(manager, 1)
    (tmp_path / "link").symlink_to(bucket)
    shutil.copytree(bucket, tmp_path / "copy")
    for name in ("link", "copy"):
        with CheckpointManager(bucket, local=tmp_path / name) as manager, pytest.raises(OptionError, match="itself"):
            restored(manager)


def test_what_it_says_is_checked() -> None:
    with pytest.raises(OptionError, match="leave out the fragment"):
        LocalTier("/tmp/x#run")
    with pytest.raises(OptionError, match="keep_last_n"):
        LocalTier("/tmp/x", keep_last_n=0)
    assert Follows.key("r") == "tiers/r"
