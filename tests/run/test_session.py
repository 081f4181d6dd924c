"""`incckpt.save` keeps little from one call to the next, and nothing that a caller could notice but for the time."""

from __future__ import annotations

import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import s3fs
import torch

import incckpt
from incckpt.backends.local import LocalBackend
from incckpt.errors import SaveError
from incckpt.run import session as sessions
from incckpt.run.session import Sessions
from incckpt.state.flatten import flatten
from tests.forks import exit_code, fork, forks
from tests.servers.processes import python_server

pytestmark = pytest.mark.slow


def steps_at(url: str | Path, run: str = "default") -> list[int]:
    with incckpt.CheckpointManager(url, run=run, read_only=True) as manager:
        return [checkpoint.step for checkpoint in manager.checkpoints()]


def test_a_relative_path_is_of_the_directory_of_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for job in range(3):
        (tmp_path / str(job)).mkdir()
        monkeypatch.chdir(tmp_path / str(job))
        assert incckpt.save({"job": job}, "ck").step == 0
        assert incckpt.load("ck") == {"job": job}


def test_other_spellings_are_one_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "ck")
    spellings: list[str | Path] = [
        "ck",
        "ck/",
        "./ck",
        tmp_path / "ck",
        (tmp_path / "ck").as_uri(),
        "link",
        "ck#default",
    ]
    for step, url in enumerate([*spellings, *spellings]):
        assert incckpt.save({"step": step}, url).step == step
    assert len(list((tmp_path / "ck" / "runs" / "default" / "attempts").glob("*.from"))) == 1


def test_a_link_that_leads_elsewhere_by_now(tmp_path: Path) -> None:
    link = tmp_path / "link"
    for target in ("a", "b", "a"):
        (tmp_path / target).mkdir(exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(tmp_path / target)
        incckpt.save({"in": target}, link)
    assert steps_at(tmp_path / "a") == [0, 1]
    assert steps_at(tmp_path / "b") == [0]


def test_a_store_that_was_removed_renamed_or_replaced_begins_anew(tmp_path: Path) -> None:
    state = {"w": torch.arange(1000)}
    store = tmp_path / "ck"
    incckpt.save(state, store)
    shutil.rmtree(store)
    assert incckpt.save(state, store).step == 0
    assert torch.equal(incckpt.load(store)["w"], state["w"])
    store.rename(tmp_path / "old")
    assert incckpt.save(state, store).step == 0
    assert torch.equal(incckpt.load(store)["w"], state["w"])
    shutil.rmtree(store)
    (tmp_path / "old").rename(store)
    assert incckpt.save(state, store).step == 1, "the store that stands there now has a step 0"
    assert torch.equal(incckpt.load(store)["w"], state["w"])


def test_what_is_skipped_is_there(tmp_path: Path) -> None:
    store = tmp_path / "ck"
    incckpt.save({"n": 1}, store, step=5)
    assert incckpt.save({"n": 2}, store, step=5, if_exists="skip").step == 5
    assert incckpt.load(store) == {"n": 1}
    shutil.rmtree(store)
    assert incckpt.save({"n": 3}, store, step=5, if_exists="skip").step == 5
    assert incckpt.load(store) == {"n": 3}


def test_the_options_given_count(s3_server: dict[str, Any], tmp_path: Path) -> None:
    """One URL, two servers in turn."""
    url = f"s3://{tmp_path.name.replace('_', '-')}/ck"
    with python_server("s3_server") as port:
        other = {**s3_server, "endpoint_url": f"http://127.0.0.1:{port}"}
        for options in (s3_server, other):
            s3fs.S3FileSystem(**options, skip_instance_cache=True).mkdir(url.split("/")[2])
        for turn in range(2):
            for number, options in enumerate((s3_server, other)):
                assert incckpt.save({"at": number}, url, storage_options=options).step == turn
        for number, options in enumerate((s3_server, other)):
            assert incckpt.load(url, storage_options=options) == {"at": number}


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


def test_many_stores_take_no_threads_descriptors_or_sessions(tmp_path: Path) -> None:
    state = {"w": torch.zeros(1 << 16)}
    incckpt.save(state, tmp_path / "first")
    threads, files = threading.active_count(), descriptors()  # connections of other tests may still be closed
    for number in range(12):
        incckpt.save(state, tmp_path / str(number))
        assert threading.active_count() <= threads
        assert descriptors() <= files
    assert len(sessions._sessions._idle) == 4


def test_a_session_that_was_closed_for_others_goes_on(tmp_path: Path) -> None:
    for turn in range(2):
        for number in range(6):
            assert incckpt.save({"turn": turn}, tmp_path / str(number)).step == turn


def test_threads_save_to_one_run_and_to_many(tmp_path: Path) -> None:
    state = {"w": torch.zeros(1 << 10)}
    with ThreadPoolExecutor(8) as pool:
        urls = [tmp_path / f"{number % 3}" for number in range(24)]
        found = list(pool.map(lambda url: (url, incckpt.save(state, url).step), urls))
    for url in set(urls):
        assert sorted(step for at, step in found if at == url) == list(range(8))


def test_other_stores_need_not_wait_for_a_slow_one(tmp_path: Path) -> None:
    """A save that cannot go on until the other one is done."""
    done = threading.Event()

    class Waits(LocalBackend):
        def create(self, key: str, data: Any) -> None:
            if key.startswith("refs/"):
                assert done.wait(60)
            super().create(key, data)

    kept = Sessions()
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(1) as pool:
        patch.setattr(
            sessions, "open_backend", lambda url, options: (Waits if url.endswith("slow") else LocalBackend)(url)
        )
        slow = pool.submit(kept.save, f"{tmp_path}/slow", "default", None, flatten({"a": 1}), None, {})
        kept.save(f"{tmp_path}/fast", "default", None, flatten({"a": 1}), None, {})
        done.set()
        assert slow.result(60).step == 0


class Nested:
    """Saves while it is being saved: `state_dict` is called before anything is locked."""

    def __init__(self, url: Path) -> None:
        self.url = url

    def state_dict(self) -> dict[str, Any]:
        incckpt.save({"inner": 1}, self.url)
        return {"outer": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def test_a_save_within_a_save(tmp_path: Path) -> None:
    assert incckpt.save({"nested": Nested(tmp_path)}, tmp_path).step == 1
    assert steps_at(tmp_path) == [0, 1]


def test_a_save_in_the_same_thread_during_a_save_is_an_error(tmp_path: Path) -> None:
    """As by a signal handler, where no other thread can be had."""
    kept = Sessions()
    with (
        kept._alone((f"file://{tmp_path}", "default"), str(tmp_path)),
        pytest.raises(SaveError, match="from within a save"),
    ):
        kept._save([], str(tmp_path), "default", None, flatten({"a": 1}), None, {}, "error")


@forks
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_child_forked_during_a_save_can_save(tmp_path: Path) -> None:
    """The parent is in the middle of a save, its locks held, whenever the child is made."""
    stop, saving = threading.Event(), threading.Event()

    def save_all_the_time() -> None:
        step = 0
        while not stop.is_set():
            incckpt.save({"w": torch.full((1 << 18,), float(step))}, tmp_path / "parent")
            saving.set()
            step += 1

    thread = threading.Thread(target=save_all_the_time)
    thread.start()
    try:
        assert saving.wait(60)

        def child(number: int) -> None:
            assert incckpt.save({"child": number}, tmp_path / f"child{number}").step == 0
            assert incckpt.load(tmp_path / f"child{number}") == {"child": number}

        children = [fork(lambda number=number: child(number)) for number in range(6)]  # type: ignore[misc]
        assert [exit_code(pid) for pid in children] == [0] * 6
    finally:
        stop.set()
        thread.join()


@forks
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_child_takes_the_run_over_from_its_parent(tmp_path: Path) -> None:
    incckpt.save({"by": "parent"}, tmp_path)

    def child() -> None:
        assert incckpt.save({"by": "child"}, tmp_path).step == 1

    assert exit_code(fork(child)) == 0
    with pytest.raises(incckpt.errors.SupersededError):
        incckpt.save({"by": "parent"}, tmp_path)
    assert incckpt.save({"by": "parent"}, tmp_path).step == 2
