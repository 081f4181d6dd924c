"""What may stand for a store: paths, URLs and fragments; what is none is refused, without its secrets."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import pytest

import incckpt
from incckpt.backends.base import redact
from incckpt.backends.memory import MemoryBackend
from incckpt.backends.registry import open_backend
from incckpt.errors import CheckpointNotFoundError, OptionError, StoreNotFoundError
from incckpt.store.location import Location, locate


@pytest.fixture(autouse=True)
def _nothing_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Work in an empty folder: what is refused must leave none behind."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def every_way_in(url: Any) -> list[Any]:
    """Return calls that take a URL apart."""
    return [
        lambda: incckpt.save({}, url),
        lambda: incckpt.load(url),
        lambda: incckpt.verify(url),
        lambda: incckpt.CheckpointManager(url).close(),
        lambda: incckpt.CheckpointManager(url, read_only=True).close(),
    ]


@pytest.mark.parametrize(
    ("url", "location"),
    [
        ("runs", Location("runs")),
        ("runs#a", Location("runs", "a", named=True)),
        ("s3://bucket/x#a@5", Location("s3://bucket/x", "a", 5, named=True)),
        ("s3://bucket/x#@best", Location("s3://bucket/x", "default", "best")),
        ("runs#default", Location("runs", "default", named=True)),
        (Path("exp#3"), Location("exp#3")),
        (Path("exp#a@3"), Location("exp#a@3")),
        (Path("lr:0.1"), Location("./lr:0.1")),
        ("lr:0.1", Location("lr:0.1")),
        ("C:\\runs", Location("C:\\runs")),
        (Path("C:/runs"), Location("./C:/runs")),
        ("./s3:/bucket", Location("./s3:/bucket")),
        ("a@b", Location("a@b")),
    ],
)
def test_taken_apart(url: Any, location: Location) -> None:
    assert locate(url) == location


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (Path("s3://bucket/run"), "as a string|as 's3://"),
        (Path("file:///tmp/run"), "as 'file://"),
        (Path("dbfs:/run"), "as 'dbfs://"),
        ("dbfs:/FileStore/run", "two slashes after 'dbfs:', as dbfs://FileStore/run; .*s3://"),
        ("s3:/bucket/run", "two slashes"),
        ("s3:bucket/run", "two slashes"),
        ("S3:bucket/run", "two slashes"),
        ("memory:x", "two slashes"),
        ("", "not a store"),
        ("#run", "not a store"),
        ("a\0b", "not a store"),
        (" s3://bucket/run", "spaces or control characters"),
        ("s3://bucket/run\n", "spaces or control characters"),
        ("s3://bucket/a\nb", "spaces or control characters"),
        ("file://host/run", "absolute path"),
        ("file://run", "absolute path"),
        ("runs#", "fragment is empty.*pathlib.Path"),
        ("runs#a b", "not a run name.*pathlib.Path"),
        ("runs#a@last", "not 'last'"),
        ("runs#a@-5", "not '-5'"),
        (None, "not a path or URL: None"),
        (3, "not a path or URL: 3"),
        (b"runs", "not a path or URL: b'runs'"),
        ("simplecache::s3://bucket/run", "a cache may show an outdated store"),
    ],
)
def test_refused_everywhere_in_the_same_words(url: Any, message: str) -> None:
    for call in every_way_in(url):
        with pytest.raises(OptionError, match=message):
            call()
    assert os.listdir(".") == []


def test_url_and_arguments_agree() -> None:
    assert locate("runs#a@5", run="a", step=5) == Location("runs", "a", 5, named=True)
    with pytest.raises(OptionError, match="the run is 'a' in the URL and 'b' in run="):
        locate("runs#a", run="b")
    with pytest.raises(OptionError, match="the step is 5 in the URL and 'best' in step="):
        incckpt.load("runs#@5", step="best")
    with pytest.raises(OptionError, match="needs a number after '@'"):
        incckpt.save({}, "runs#@latest")
    with pytest.raises(OptionError, match="give step 5 to restore"):
        incckpt.CheckpointManager("runs#a@5")
    assert os.listdir(".") == []


@pytest.mark.parametrize("name", ["a b", "exp#3", "50%", "a%20b", "ä", "what?", "lr:0.1", "s3:", "x@5"])
def test_folders_of_any_name(tmp_path: Path, name: str) -> None:
    """A path object means itself, and so does its URL."""
    folder = tmp_path / name
    with incckpt.CheckpointManager(folder) as manager:
        manager.save(1, {"name": name}).result()
        shown = manager.latest
        assert manager.restore({"name": ""}) == 1
    assert os.listdir(tmp_path / "here") == []
    assert shown is not None
    assert (folder / "incckpt.json").exists()
    assert incckpt.load(folder) == incckpt.load(folder.as_uri()) == incckpt.load(f"{folder.as_uri()}#default@1")
    assert incckpt.load(folder.as_uri().replace("file:///", "file://localhost/")) == {"name": name}
    assert incckpt.load(folder.as_uri().replace("file:///", "file:/")) == {"name": name}
    assert incckpt.load(open_backend(folder).url) == {"name": name}, "a backend's own URL leads to it"
    assert incckpt.verify(folder)


def test_relative_and_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    incckpt.save({"x": 1}, "~/a#r")
    assert incckpt.load(tmp_path / "a", run="r") == {"x": 1}
    incckpt.save({"x": 2}, Path("b:c"))
    assert incckpt.load("./b:c") == incckpt.load(Path("b:c")) == {"x": 2}
    incckpt.save({"x": 3}, Path())
    assert incckpt.load(".") == {"x": 3}


def test_schemes_in_capitals(tmp_path: Path) -> None:
    incckpt.save({"x": 1}, f"FILE://{tmp_path}/a")
    assert incckpt.load(tmp_path / "a") == {"x": 1}
    incckpt.save({"x": 1}, "MEMORY://test-capitals")
    assert incckpt.load("memory://test-capitals") == {"x": 1}


def test_a_store_at_an_archives_root(tmp_path: Path) -> None:
    with incckpt.CheckpointManager(tmp_path / "store") as manager:
        for step in (1, 2):
            manager.save(step, {"step": step})
    files = [path for path in sorted((tmp_path / "store").rglob("*")) if path.is_file()]
    for name, below in (("root.zip", tmp_path / "store"), ("deep.zip", tmp_path)):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for path in files:
                archive.write(path, path.relative_to(below))
    for url in (f"zip://::{tmp_path}/root.zip", f"zip://store::{tmp_path}/deep.zip", f"zip::{tmp_path}/root.zip"):
        assert incckpt.load(url) == {"step": 2}
        assert incckpt.load(f"{url}#default@1") == {"step": 1}
        assert incckpt.verify(url, level="sizes")
    with pytest.raises(StoreNotFoundError):
        incckpt.load(f"zip://::{tmp_path}/deep.zip")


SECRETS: list[str | Path] = [
    "https://user:SECRET@127.0.0.1:9/x#run@bad",
    "https://user:SECRET@127.0.0.1:9/x#run@5",
    "https://127.0.0.1:9/x?sig=SECRET#",
    "https://127.0.0.1:9/x?sig=SECRET#r u n",
    "https://127.0.0.1:9/x?sig=SECRET#r@bad",
    "https://user:SEC/RET/SECRET@127.0.0.1:9/x#r@bad",
    "https://user:?SECRET@127.0.0.1:9/x#r@bad",
    "sftp://user:SECRET@127.0.0.1:9/x#r@bad",
    "s3://KEY:SECRET@bucket/x#r@bad",
    " s3://KEY:SECRET@bucket/x",
    "file://user:SECRET@host/x",
    "simplecache::s3://KEY:SECRET@bucket/x",
    "s3:KEY:SECRET@bucket/x",
    "dbfs:/KEY:SECRET@bucket/x",
    "gs://KEY:SECRET@bucket/x#@bad",
    Path("https://user:SECRET@127.0.0.1:9/x"),
]


@pytest.mark.slow
@pytest.mark.parametrize("url", SECRETS)
def test_messages_show_no_secrets(url: Any, impatient: None) -> None:
    for call in every_way_in(url):
        with pytest.raises(incckpt.IncckptError) as caught:
            call()
        assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://bucket/a@b", "s3://bucket/a@b"),
        ("https://host:8080/x#run@5", "https://host:8080/x"),
        ("https://[::1]:8080/x", "https://[::1]:8080/x"),
        ("https://u:p@host:8080/x?sig=1", "https://host:8080/x"),
        ("https://u:p/w@host/x", "https://host/x"),
        ("https://u:p#w", "https://…"),
        ("https://u@host/a@b", "https://host/a@b"),
        ("/tmp/a#b?c", "/tmp/a#b?c"),
    ],
)
def test_redacted(url: str, shown: str) -> None:
    assert redact(url) == shown


def test_a_backend_is_taken_whole() -> None:
    backend = MemoryBackend("a#b")
    incckpt.save({"x": 1}, "memory://a")
    assert locate(backend) == Location(backend.url)
    with pytest.raises(StoreNotFoundError):
        incckpt.load(backend)
    with pytest.raises(CheckpointNotFoundError):
        incckpt.load("memory://a#b")
