"""What can go wrong between processes that share a store, case by case; ``docs/safety.md`` lists the others."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, NamedTuple

import pytest
import s3fs
import torch

import incckpt
from incckpt.backends.base import Backend
from incckpt.backends.local import LocalBackend
from incckpt.backends.memory import MemoryBackend
from incckpt.backends.s3 import S3Backend
from incckpt.backends.s3_session import Session
from incckpt.backends.wrapper import WrapperBackend
from incckpt.errors import BackendError, CollectionError, CorruptionError, FormatError, SaveError, SupersededError
from incckpt.store import refs
from incckpt.store.document import dump_document
from incckpt.store.gc import Collector
from incckpt.store.objects import OBJECTS
from incckpt.store.refs import RefName
from incckpt.store.store import Store
from incckpt.testing.faults import Fail, Fault, FaultyBackend, Pause
from tests import programs
from tests.children.stopper import state_at
from tests.stores import object_keys, orphans

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
LOST = Fail(BackendError("the reply was lost", transient=True), after_work=True)


def save(backend: Backend, step: int, run: str = "default", keep: int | None = 1) -> None:
    """Save one checkpoint as a process of its own would."""
    with incckpt.CheckpointManager(backend, run=run, keep_last_n=keep, threads=1) as manager:
        manager.restore(state_at(0))
        manager.save(step, state_at(step)).result()


def check_read(backend: Backend, step: int, run: str = "default") -> None:
    """Check that the latest checkpoint is that of `step`, bit for bit."""
    state = incckpt.load(backend, run=run, progress=False)
    expected = state_at(step)
    assert state["step"] == step
    assert all(torch.equal(state[name], torch.as_tensor(expected[name])) for name in ("frozen", "changing"))


def check_clean(backend: Backend) -> None:
    """Check that a sweep leaves nothing unneeded, and that nothing is missing."""
    Collector(Store(backend)).sweep()
    assert orphans(backend) == set()


@pytest.fixture
def backend() -> MemoryBackend:
    return MemoryBackend(uuid.uuid4().hex)


# ---- replies lost ----------------------------------------------------------------------------------------------------


def test_reply_lost_on_an_object_put(backend: MemoryBackend) -> None:
    faulty = FaultyBackend(backend, [Fault("put", "objects/*", do=LOST)])
    with incckpt.CheckpointManager(faulty, threads=1) as manager:
        assert isinstance(manager.save(1, state_at(1)).exception(), BackendError)
        with pytest.raises(SaveError):
            manager.save(1, state_at(1))
        manager.save(1, state_at(1)).result()
    assert faulty.struck == 1
    check_read(backend, 1)
    check_clean(backend)


def test_reply_lost_on_commit(backend: MemoryBackend) -> None:
    faulty = FaultyBackend(backend, [Fault("create", "refs/*", do=LOST)])
    save(faulty, 1)
    assert faulty.struck == 1
    check_read(backend, 1)
    assert len(list(backend.list("refs/"))) == 1
    check_clean(backend)


def test_reply_lost_on_abort(backend: MemoryBackend) -> None:
    save(backend, 1)
    with pytest.raises(BackendError):
        save(FaultyBackend(backend, [Fault("create", "refs/*", times=None)]), 2)  # its pin stays
    assert len(list(backend.list("pins/"))) == 1
    faulty = FaultyBackend(backend, [Fault("create", "refs/*", do=LOST)])
    save(faulty, 2)
    assert faulty.struck == 1
    check_read(backend, 2)
    check_clean(backend)


# ---- processes that stand still --------------------------------------------------------------------------------------


class Stopped(NamedTuple):
    """A process that has stopped itself, and what it prints."""

    process: programs.Program
    output: IO[str]


@contextmanager
def stopped(*arguments: object, fresh: bool = False) -> Iterator[Stopped]:
    """Start a process, and wait until it has stopped itself."""
    words = "-m", "tests.children.stopper", *arguments
    with TemporaryFile("w+") as output, programs.Program(*words, output=output, fresh=fresh) as process:
        process.stopped()
        yield Stopped(process, output)


def ended(writer: Stopped) -> list[str]:
    """Let a process go on to its end; return what it says of it."""
    writer.process.send_signal(signal.SIGCONT)
    assert writer.process.wait() == 0
    writer.output.seek(0)
    return writer.output.read().split()


@pytest.mark.parametrize("pattern", ["pins/*", "objects/*", "refs/*"])
def test_a_writer_stopped_across_a_whole_collection(tmp_path: Path, pattern: str) -> None:
    backend = LocalBackend(tmp_path)
    save(backend, 1, run="other")  # of the same frozen content
    with stopped("save", tmp_path, "default", 5, "create" if pattern == "refs/*" else "put", pattern) as writer:
        save(backend, 2, run="other")
        Collector(Store(backend)).sweep()
        Collector(Store(backend)).sweep()
        assert ended(writer) == ["saved", "5"]
    check_read(backend, 5)
    check_read(backend, 2, run="other")
    check_clean(backend)


@pytest.mark.parametrize("pattern", ["objects/*", "refs/*"])
def test_a_writer_taken_for_dead_saves_again(tmp_path: Path, pattern: str) -> None:
    backend = LocalBackend(tmp_path)
    with stopped("save", tmp_path, "default", 5, "create" if pattern == "refs/*" else "put", pattern) as writer:
        Collector(Store(backend), stale_seconds=0.0).sweep()
        assert orphans(backend) == set(), "what it has put so far is gone"
        assert ended(writer) == ["saved", "5"]
    check_read(backend, 5)
    check_clean(backend)


def test_a_collector_stopped_in_mid_sweep_across_a_later_collection_and_a_save(tmp_path: Path) -> None:
    backend = LocalBackend(tmp_path)
    with pytest.raises(BackendError):
        save(FaultyBackend(backend, [Fault("create", "refs/*", times=None)]), 1)
    backend.delete([entry.key for entry in backend.list("pins/")])  # no pin or list tells of what it has put
    garbage = object_keys(backend)
    assert garbage
    with stopped("sweep", tmp_path, "-", 0, "delete", "objects/*") as collector:
        save(backend, 2)  # of the same frozen content, condemned by now
        Collector(Store(backend)).sweep()
        save(backend, 3, run="other")
        assert ended(collector)[0] == "swept"
    assert not garbage & object_keys(backend)
    check_read(backend, 2)
    check_read(backend, 3, run="other")
    check_clean(backend)


def test_reuse_of_an_object_that_is_being_deleted_and_its_rebirth_under_a_new_key(backend: MemoryBackend) -> None:
    with pytest.raises(BackendError):
        save(FaultyBackend(backend, [Fault("create", "refs/*", times=None)]), 1)
    backend.delete([entry.key for entry in backend.list("pins/")])
    before = object_keys(backend)
    pause = Pause()
    slow = FaultyBackend(backend, [Fault("delete", "objects/*", do=pause)])
    with ThreadPoolExecutor(1) as pool:
        sweep = pool.submit(Collector(Store(slow)).sweep)
        pause.reached.wait()
        save(backend, 1)  # the very content that is being deleted
        assert object_keys(backend) - before
        pause.resume.set()
        assert sweep.result().deleted == before
    check_read(backend, 1)
    check_clean(backend)


def test_the_previous_checkpoint_expires_in_the_middle_of_a_save(backend: MemoryBackend) -> None:
    save(backend, 1)
    pause = Pause()
    slow = FaultyBackend(backend, [Fault("put", "objects/*", do=pause)])
    with ThreadPoolExecutor(1) as pool:
        zombie = pool.submit(save, slow, 2)
        pause.reached.wait()
        save(backend, 3)  # takes the run over, and prunes step 1, on which the other save builds
        check_clean(backend)
        pause.resume.set()
        assert isinstance(zombie.exception(), SupersededError)
    check_read(backend, 3)
    check_clean(backend)


def test_zombie_and_replacement_commit_the_same_step(backend: MemoryBackend) -> None:
    save(backend, 1)
    pause = Pause()
    slow = FaultyBackend(backend, [Fault("create", "refs/*", do=pause)])
    with ThreadPoolExecutor(1) as pool:
        zombie = pool.submit(save, slow, 2)
        pause.reached.wait()
        save(backend, 2)
        pause.resume.set()
        assert isinstance(zombie.exception(), SupersededError)
    with incckpt.CheckpointManager(backend, read_only=True) as reader:
        assert [(c.step, c.attempt) for c in reader.checkpoints()] == [(2, 3)]
    check_read(backend, 2)
    check_clean(backend)


def test_two_processes_write_one_run(tmp_path: Path) -> None:
    backend = LocalBackend(tmp_path)
    save(backend, 1)
    for pattern, operation, step in (("objects/*", "put", 2), ("refs/*", "create", 3)):
        with stopped("save", tmp_path, "default", step, operation, pattern) as other:
            save(backend, step)
            assert ended(other) == ["SupersededError"], "it is told within that very save"
        check_read(backend, step)
    with incckpt.CheckpointManager(backend, read_only=True) as reader:
        assert [c.step for c in reader.checkpoints()] == [3]
    check_clean(backend)


def test_two_collectors_at_once(tmp_path: Path) -> None:
    backend = LocalBackend(tmp_path)
    save(backend, 100)
    for number in range(20):
        with pytest.raises(BackendError):
            save(FaultyBackend(backend, [Fault("create", "refs/*", times=None)]), 101 + number, keep=None)
        backend.delete([entry.key for entry in backend.list("pins/")])
        barrier = threading.Barrier(3)

        def at_once(action: Any) -> None:
            barrier.wait()  # noqa: B023 -- all of them end in this turn
            action()

        with ThreadPoolExecutor(3) as pool:
            collectors = [Collector(Store(LocalBackend(tmp_path))).sweep for _ in range(2)]
            actions = [*collectors, lambda: save(backend, 1 + number, run="other")]  # noqa: B023
            list(pool.map(at_once, actions))
        check_read(backend, 1 + number, run="other")
    check_read(backend, 100)
    check_clean(backend)


@pytest.mark.parametrize("offset", [-86_400, 86_400])
def test_a_host_whose_clock_is_a_day_off(tmp_path: Path, offset: int) -> None:
    backend = LocalBackend(tmp_path)
    save(backend, 1)
    with stopped("save", tmp_path, "default", 2, "put", "objects/*", offset, fresh=True) as writer:
        Collector(Store(backend, clock=lambda: 0.0)).sweep()
        Collector(Store(backend, clock=lambda: time.time() + offset)).sweep()
        assert ended(writer) == ["saved", "2"]
    with incckpt.CheckpointManager(backend, read_only=True) as reader:
        assert [c.step for c in reader.checkpoints()] == [2]
    check_read(backend, 2)
    save(backend, 3)
    check_read(backend, 3)
    check_clean(backend)


# ---- servers ---------------------------------------------------------------------------------------------------------


def test_more_keys_than_a_page_has_in_every_listing(s3_server: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    call, pages = Session.call, []

    async def in_small_pages(session: Session, operation: str, **parameters: Any) -> Any:
        if operation == "list_objects_v2":
            pages.append(parameters)
            parameters["MaxKeys"] = 50
        return await call(session, operation, **parameters)

    monkeypatch.setattr(Session, "call", in_small_pages)
    bucket = f"many-{uuid.uuid4().hex[:12]}"
    with S3Backend(bucket, "store", s3_server) as backend:
        s3fs.S3FileSystem(**s3_server).mkdir(bucket)
        save(backend, 1, run="mine", keep=None)
        values: dict[str, bytes] = {}
        for number in range(110):
            name = f"000001-{number:012d}-{number:016x}"
            values[f"refs/run{number}/{name}"] = b"EXPIRED"
            values[f"pins/run{number}/{name}"] = dump_document("pin", {})
            values[f"gc/{number:016x}/condemned"] = dump_document("condemned", {"keys": []})
            values[f"{OBJECTS}{number % 256:02x}/{number:062x}.{number:016x}"] = b"garbage"
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(backend.put, values, values.values()))
        collected = Collector(Store(backend)).sweep()
        assert len(collected.deleted) == 110
        assert orphans(backend) == set()
        assert len([page for page in pages if "ContinuationToken" in page]) >= 8, "every listing has several pages"
        assert [entry.key for entry in backend.list("gc/")] == []
        assert [entry.key for entry in backend.list("pins/")] == []
        save(backend, 2, run="mine")
        check_read(backend, 2, run="mine")


class PartlyDeleting(WrapperBackend):
    """Deletes half of what it is asked to, once, and says that it failed."""

    failures = 1

    def delete(self, keys: Iterable[str]) -> None:
        """Delete."""
        listed = sorted(keys)
        if self.failures and any(key.startswith(OBJECTS) for key in listed):
            self.failures -= 1
            super().delete(listed[: len(listed) // 2])
            raise BackendError(f"could not delete {listed[-1]}", transient=True)
        super().delete(listed)


def test_a_bulk_delete_that_partly_fails(backend: MemoryBackend) -> None:
    state = {f"w{index}": torch.randn(300_000) for index in range(4)}
    with incckpt.CheckpointManager(PartlyDeleting(backend), keep_last_n=1, threads=1) as manager:
        for step in (1, 2, 3):
            manager.save(step, {name: value + step for name, value in state.items()}).result()
    assert torch.equal(incckpt.load(backend)["w0"], state["w0"] + 3)
    assert orphans(backend) == set(), "the next save's collection has finished it"


@pytest.mark.parametrize("age", [60.0, 7200.0])
def test_a_sweep_removes_temporary_files_of_the_dead(tmp_path: Path, age: float) -> None:
    backend = LocalBackend(tmp_path)
    save(backend, 1)
    left = tmp_path / "objects" / ".incckpt-tmp-0123456789abcdef"
    left.write_bytes(b"half of an object")
    then = left.stat().st_mtime - age
    os.utime(left, (then, then))
    assert Collector(Store(backend)).sweep().leftovers == (age > 3600)
    assert left.exists() == (age < 3600)
    check_read(backend, 1)


def test_a_sweep_aborts_uploads_of_the_dead(s3_server: dict[str, Any]) -> None:
    bucket = f"uploads-{uuid.uuid4().hex[:12]}"
    fs = s3fs.S3FileSystem(**s3_server)
    fs.mkdir(bucket)
    with S3Backend(bucket, "store", s3_server) as backend:
        save(backend, 1)
        fs.call_s3("create_multipart_upload", Bucket=bucket, Key="store/objects/ab/large")
        fs.call_s3("create_multipart_upload", Bucket=bucket, Key="elsewhere/large")
        assert Collector(Store(backend)).sweep().leftovers == 1  # this server says that all uploads began in 2010
        uploads = fs.call_s3("list_multipart_uploads", Bucket=bucket).get("Uploads", [])
        assert [upload["Key"] for upload in uploads] == ["elsewhere/large"]
        check_read(backend, 1)


# ---- what a later version has written --------------------------------------------------------------------------------


def test_an_unknown_name_among_the_refs_stops_the_collector(backend: MemoryBackend) -> None:
    save(backend, 1)
    garbage = f"{OBJECTS}ab/{'c' * 62}.{'0' * 16}"
    backend.put(garbage, b"garbage")
    backend.put("refs/default/v2-000001-000000000009-0123456789abcdef", dump_document("ref", {"of": "tomorrow"}))
    with pytest.raises(CollectionError, match="update incckpt"):
        Collector(Store(backend)).sweep()
    assert garbage in object_keys(backend)
    check_read(backend, 1)


@pytest.mark.parametrize("content", [b"", b"[.ShellClassInfo]\r\nIconResource=x.ico,0\r\n", bytes(range(256))])
@pytest.mark.parametrize(
    "folder",
    [
        "refs/default",
        "refs",
        "pins/default",
        "pins",
        "gc",
        "gc/0123456789abcdef",
        "runs/default/attempts",
        "objects/ab",
    ],
)
def test_a_stray_file_changes_nothing(
    backend: MemoryBackend, folder: str, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    refs._warn_of_stray.cache_clear()
    save(backend, 1)
    stray = f"{folder}/desktop.ini"
    garbage = f"{OBJECTS}ab/{'c' * 62}.{'0' * 16}"
    backend.put(stray, content)
    backend.put(garbage, b"garbage")
    save(backend, 2)
    check_read(backend, 2)
    assert garbage in Collector(Store(backend)).sweep().deleted
    assert backend.get(stray) == content
    said = [record.message for record in caplog.records if "desktop.ini" in record.message]
    if folder not in ("objects/ab", "deltas"):  # where only a sweep looks at all names
        assert said == [f"{backend.url}/{stray} is not a file of incckpt; it is ignored"]


@pytest.mark.parametrize("folder", ["pins/default", "gc/0123456789abcdef", "runs/default/attempts"])
def test_what_a_later_version_has_written_stops_a_writer(backend: MemoryBackend, folder: str) -> None:
    save(backend, 1)
    backend.put(f"{folder}/v2", dump_document("news", {"of": "tomorrow"}))
    with pytest.raises(CorruptionError, match=f"{folder}/v2 .written by a later version"):
        save(backend, 2)
    check_read(backend, 1) if "attempts" not in folder else None


def test_a_ref_of_a_later_format_stops_the_collector(backend: MemoryBackend) -> None:
    save(backend, 1, keep=None)
    save(backend, 2, keep=None)
    garbage = f"{OBJECTS}ab/{'c' * 62}.{'0' * 16}"
    backend.put(garbage, b"garbage")
    first = min(entry.key for entry in backend.list("refs/default/"))
    document = json.loads(backend.get(first))
    backend.put(first, json.dumps(document | {"format": 2}).encode())
    with pytest.raises(CollectionError, match="update incckpt"):
        Collector(Store(backend)).sweep()
    assert garbage in object_keys(backend)
    name = RefName.parse(first.rpartition("/")[2])
    assert name is not None
    with pytest.raises(FormatError, match="update incckpt"):
        Store(backend).run("default").read(name)
    check_read(backend, 2)
