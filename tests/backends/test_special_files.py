"""What is no file in the place of one: never waited for, never read, never followed in circles."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import incckpt
from incckpt.backends.local import LocalBackend
from incckpt.errors import BackendError, IncckptError, KeyNotFoundError


def fifo(path: Path) -> None:
    """Make a FIFO that is never written to."""
    os.mkfifo(path)


def bound_socket(path: Path) -> None:
    """Make a socket."""
    here = os.open(".", os.O_RDONLY)
    os.chdir(path.parent)  # its path may be longer than a socket's can be
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.fchdir(here)
        os.close(here)


def endless_device(path: Path) -> None:
    """Make a link to a device that can be read without end."""
    path.symlink_to("/dev/zero")


def link_to_itself(path: Path) -> None:
    """Make a link that leads nowhere."""
    path.symlink_to(path.name)


def folder(path: Path) -> None:
    """Make a folder."""
    path.mkdir()


SPECIAL = [fifo, bound_socket, endless_device, link_to_itself, folder]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("make", SPECIAL, ids=lambda make: make.__name__)
def test_no_file_is_no_key(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "a")
    with LocalBackend(tmp_path) as backend:
        for call in (
            lambda: backend.get("a"),
            lambda: backend.get("a", 0, 5),
            lambda: backend.get_into("a", [memoryview(bytearray(3))]),
            lambda: backend.head("a"),
        ):
            with pytest.raises(
                KeyNotFoundError if make is not link_to_itself and make is not bound_socket else BackendError
            ):
                call()
        if make is not link_to_itself:
            assert list(backend.list()) == []


@pytest.mark.timeout(120)
@pytest.mark.parametrize("make", SPECIAL, ids=lambda make: make.__name__)
@pytest.mark.parametrize("kind", ["objects", "refs", "runs", "incckpt.json"])
def test_a_store_of_such(make: Callable[[Path], None], kind: str, tmp_path: Path) -> None:
    incckpt.save({"w": torch.arange(10_000.0)}, tmp_path)
    for path in [path for path in (tmp_path / kind, *(tmp_path / kind).rglob("*")) if path.is_file()]:
        path.unlink()
        make(path)
    if kind != "runs" and kind != "refs":
        with pytest.raises(IncckptError):
            incckpt.load(tmp_path)
    for use in (incckpt.load, incckpt.collect, incckpt.verify):
        with contextlib.suppress(IncckptError):
            use(tmp_path)


@pytest.mark.timeout(60)
def test_links_in_circles_are_listed_once(tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "a").write_bytes(b"1")
    for name in ("x", "y", "z"):
        (tmp_path / "f" / name).symlink_to(".")
        (tmp_path / name).symlink_to(tmp_path)
    with LocalBackend(tmp_path) as backend:
        keys = [entry.key for entry in backend.list()]
    assert "f/a" in keys
    assert len(keys) < 20


def test_nothing_is_tidied_up_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "mine" / "empty").mkdir(parents=True)
    (tmp_path / "mine" / ".incckpt-tmp-00").write_bytes(b"")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "objects").symlink_to(tmp_path / "mine")
    with LocalBackend(tmp_path / "store") as backend:
        assert list(backend.leftovers()) == []


def test_a_store_may_be_a_link(tmp_path: Path) -> None:
    incckpt.save({"w": torch.ones(3)}, tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "real" / "objects").rename(tmp_path / "other disk")
    (tmp_path / "real" / "objects").symlink_to(tmp_path / "other disk")
    assert incckpt.load(tmp_path / "link")["w"].tolist() == [1, 1, 1]
    assert incckpt.verify(tmp_path / "link")
    assert not incckpt.collect(tmp_path / "link", dry_run=False, min_age=0).removals
