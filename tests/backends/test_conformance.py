"""The conformance suite over the backends that need no server, the registry, and the backend contract's own helpers."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from incckpt.backends import Backend, open_backend, validate_key, validate_prefix
from incckpt.backends.base import redact
from incckpt.backends.generic import GenericBackend
from incckpt.backends.local import LocalBackend
from incckpt.backends.memory import MemoryBackend
from incckpt.backends.retry import RetryBackend
from incckpt.backends.wrapper import WrapperBackend
from incckpt.errors import KeyExistsError, KeyNotFoundError, MissingExtraError, OptionError, UnsupportedOperationError
from incckpt.testing.conformance import BackendConformance
from incckpt.testing.faults import CountingBackend
from tests.forks import exit_code, fork, forks


class TestLocalConformance(BackendConformance):
    @pytest.fixture
    def backend(self, tmp_path: Path) -> Iterator[Backend]:
        with LocalBackend(tmp_path / "store") as backend:
            yield backend

    @pytest.fixture
    def plain_get(self, backend: Backend, tmp_path: Path) -> Callable[[str], bytes]:
        return lambda key: (tmp_path / "store" / key).read_bytes()


class TestMemoryConformance(BackendConformance):
    @pytest.fixture
    def backend(self) -> Iterator[Backend]:
        with open_backend(f"memory://{uuid.uuid4()}/deep") as backend:
            yield backend
            backend.delete([entry.key for entry in backend.list()])


@pytest.mark.slow
class TestWrapperConformance(BackendConformance):
    @pytest.fixture
    def backend(self) -> Backend:
        return WrapperBackend(CountingBackend(MemoryBackend(str(uuid.uuid4()))))


@pytest.mark.slow
class TestGenericConformance(BackendConformance):
    """Over fsspec's local file system, which stands for any protocol without a backend of its own."""

    large_value = 4 << 20

    @pytest.fixture
    def backend(self, tmp_path: Path) -> Iterator[Backend]:
        root = tmp_path / "store"
        root.mkdir()
        with GenericBackend(f"local://{root}", {}) as backend:
            yield backend

    def test_put_is_atomic_under_readers(self, backend: Backend) -> None:
        pytest.skip("a generic file system does not promise this, and the backend says so")


# -- keys -------------------------------------------------------------------------------------------------------------


@given(st.text())
def test_a_valid_key_stays_below_any_root(key: str) -> None:
    try:
        validate_key(key)
    except OptionError:
        return
    root = "/some/root"
    path = os.path.normpath(os.path.join(root, key))
    assert path == f"{root}/{key}"
    assert key.isascii()


def test_every_beginning_of_a_key_that_names_something_is_a_prefix() -> None:
    key = "deltas/ab/cdef.0123-4567.n"
    for end in range(len(key) + 1):
        assert validate_prefix(key[:end]) == key[:end]


# -- urls -------------------------------------------------------------------------------------------------------------


def test_paths_and_file_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    cases: list[tuple[str | Path, Path]] = [
        (tmp_path / "a", tmp_path / "a"),
        (str(tmp_path / "a"), tmp_path / "a"),
        ("b/c", tmp_path / "b/c"),
        ("~/d", tmp_path / "home/d"),
        (f"file://{tmp_path}/e/", tmp_path / "e"),
    ]
    for url, path in cases:
        backend = open_backend(url)
        backend.put("k", b"v")
        assert (path / "k").read_bytes() == b"v"
        assert backend.url == f"file://{path}"


@pytest.mark.parametrize("url", ["", "file://relative", "nosuchprotocol://x", "a\0b"])
def test_urls_that_cannot_be_opened(url: str) -> None:
    with pytest.raises(OptionError):
        open_backend(url)


def test_options_where_there_are_none_to_take(tmp_path: Path) -> None:
    for url in (str(tmp_path), "memory://x"):
        with pytest.raises(OptionError, match="endpoint_url"):
            open_backend(url, {"endpoint_url": "http://localhost"})


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://bucket/run", "s3://bucket/run"),
        ("https://user:secret@host:8080/a/b?sig=secret#secret", "https://host:8080/a/b"),
        ("sftp://user@host/a@b", "sftp://host/a@b"),
        ("sftp://user:p@ss@host/a@b", "sftp://…"),  # where the password ends is not certain
        ("http://host?sig=secret", "http://host"),
        ("/plain/path@x", "/plain/path@x"),
    ],
)
def test_credentials_are_not_shown(url: str, shown: str) -> None:
    assert redact(url) == shown


@pytest.mark.slow
def test_no_cloud_library_is_loaded_until_it_is_used() -> None:
    code = (
        "import sys\n"
        "from incckpt.backends import open_backend\n"
        "open_backend('memory://x'); open_backend('x')\n"
        "print([m for m in ('s3fs', 'gcsfs', 'adlfs', 'aiohttp', 'botocore', 'google', 'azure') "
        "if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert shown.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("url", "extra", "missing"),
    [
        ("s3://bucket/x", "s3", "aiobotocore"),
        ("s3://bucket/x", "s3", "aiohttp"),
        ("s3://bucket/x", "s3", "s3fs"),
        ("gs://bucket/x", "gcs", "aiohttp"),
        ("gs://bucket/x", "gcs", "gcsfs"),
        ("az://container/x", "azure", "azure"),
        ("https://host/x", "http", "aiohttp"),
    ],
)
def test_a_missing_extra_is_named(url: str, extra: str, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith(f"incckpt.backends.{extra}")]:
        monkeypatch.delitem(sys.modules, name)
    for name in [name for name in sys.modules if name.partition(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(MissingExtraError, match=rf'need the package {missing}: pip install "incckpt\[{extra}\]"'):
        open_backend(url)


def test_a_third_party_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package says in its metadata which scheme it opens; here one is installed for the time of the test."""
    metadata = tmp_path / "third_party-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: third-party\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[incckpt.backends]\nmine = third_party:open_memory\nwrong = third_party:open_nothing\ns3 = third_party:none\n"
    )
    (tmp_path / "third_party.py").write_text(
        "from incckpt.backends.memory import MemoryBackend\n"
        "def open_memory(url, options):\n"
        "    return MemoryBackend(url.partition('://')[2] + options['suffix'])\n"
        "def open_nothing(url, options):\n"
        "    return url\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    name = str(uuid.uuid4())
    open_backend(f"mine://{name}", {"suffix": "-x"}).put("k", b"v")
    assert MemoryBackend(f"{name}-x").get("k") == b"v"
    with pytest.raises(OptionError, match="third_party:open_nothing"):
        open_backend("wrong://x")
    assert open_backend("s3://bucket/x").url == "s3://bucket/x"  # ours cannot be taken over


# -- memory -----------------------------------------------------------------------------------------------------------


def test_memory_is_shared_by_name() -> None:
    name = str(uuid.uuid4())
    open_backend(f"memory://{name}").put("k", b"v")
    assert open_backend(f"memory://{name}/").get("k") == b"v"
    assert list(open_backend(f"memory://{name}x").list()) == []
    with pytest.raises(KeyNotFoundError):
        open_backend(f"memory://{name}/k").get("k")


@forks
def test_memory_survives_a_fork_while_it_is_locked() -> None:
    """A child forked while another thread is in the middle of a put must not wait for that thread for ever."""
    from incckpt.backends import memory

    backend = MemoryBackend(str(uuid.uuid4()))
    backend.put("k", b"v")
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with memory._lock:
            held.set()
            release.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(60)
    child = fork(lambda: backend.put("k", backend.get("k")))
    release.set()
    thread.join()
    assert exit_code(child) == 0


# -- exclusive creation -----------------------------------------------------------------------------------------------


class _Overwriting(WrapperBackend):
    """A look-alike that takes the condition and ignores it."""

    def create(self, key: str, data: Any) -> None:
        self.inner.put(key, data)


class _Refusing(WrapperBackend):
    """A server that answers 501 to a condition."""

    def create(self, key: str, data: Any) -> None:
        raise UnsupportedOperationError(f"no conditions: {key}")


@pytest.mark.parametrize("kind", [_Overwriting, _Refusing])
def test_a_store_that_ignores_conditions_is_found_out(kind: type[WrapperBackend]) -> None:
    backend = kind(MemoryBackend(str(uuid.uuid4())))
    backend.remote = True
    assert backend.exclusive
    assert not backend.probe_exclusive()
    assert not backend.exclusive
    assert not backend.probe_exclusive()
    assert list(backend.list()) == []


def test_probing_what_does_not_claim_to_be_exclusive_asks_nothing() -> None:
    backend = CountingBackend(MemoryBackend(str(uuid.uuid4())))
    backend.exclusive = False
    assert not backend.probe_exclusive()
    assert backend.operations == []


def test_generic_says_what_it_cannot_promise(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    backend = open_backend(f"local://{tmp_path}")
    assert isinstance(backend, RetryBackend)
    assert isinstance(backend.inner, GenericBackend)
    assert not backend.exclusive
    assert "one process may write" in caplog.text
    backend.create("k", b"1")
    with pytest.raises(KeyExistsError):
        backend.create("k", b"2")
