"""Fixtures that several test files share: a server of each kind, one per test session."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import aiobotocore.session
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import settings

from incckpt.backends.base import Backend
from incckpt.backends.retry import RetryBackend
from tests import programs
from tests.effort import tries
from tests.servers.installed import NotInstalled, azurite, rclone
from tests.servers.processes import free_port, program_server, python_server

# What the tests' saves put is decoded again before; incckpt, not imported yet, reads this once.
os.environ.setdefault("INCCKPT_VERIFY_WRITES", "1")

settings.register_profile("effort", settings(), max_examples=tries(100))
settings.load_profile("effort")

SERVERS = frozenset({"azure_server", "gcs_server", "s3_server", "rclone_server", "rclone_mount", "s3_mount"})


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what uses a server; let the slow go first, so that at the end no process waits for another's long test."""
    for item in items:
        if SERVERS.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.server)
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def _no_memory_left() -> Iterator[None]:
    """Empty fsspec's memory, of which every listing looks at all that any test has put."""
    yield
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.fixture(scope="session")
def azure_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Return the port of azurite, Microsoft's own emulator; installed from npm once for this Python environment."""
    try:
        program = azurite()
    except NotInstalled as exc:
        pytest.skip(str(exc))
    port, folder = free_port(), tmp_path_factory.mktemp("azurite")
    options = ["--inMemoryPersistence", "--silent", "--skipApiVersionCheck", "--disableTelemetry"]
    command = [*program, "--blobHost", "127.0.0.1", "--blobPort", str(port), *options]
    with program_server(command, port, folder / "log"):
        yield port


@pytest.fixture(scope="session")
def gcs_server() -> Iterator[int]:
    """Return the port of a GCS server with exact conditions."""
    with python_server("gcs_server") as port:
        yield port


@pytest.fixture(scope="session")
def s3_server() -> Iterator[dict[str, Any]]:
    """Return s3fs options for an S3 server with exact conditions."""
    with python_server("s3_server") as port:
        # One session for all, because each would parse botocore's descriptions of S3 anew, for a quarter of a second.
        session = aiobotocore.session.AioSession()
        yield {"key": "test", "secret": "testtest", "endpoint_url": f"http://127.0.0.1:{port}", "session": session}


@pytest.fixture(scope="session")
def rclone_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Return s3fs options for rclone over an empty folder."""
    try:
        program = rclone()
    except NotInstalled as exc:
        pytest.skip(str(exc))
    folder = tmp_path_factory.mktemp("rclone")
    (folder / "served" / "bucket").mkdir(parents=True)
    port = free_port()
    command = [program, "serve", "s3", "--config", os.devnull, "--auth-key", "test,testtest", "--no-cleanup"]
    with program_server([*command, "--addr", f"127.0.0.1:{port}", str(folder / "served")], port, folder / "log"):
        session = aiobotocore.session.AioSession()
        yield {"key": "test", "secret": "testtest", "endpoint_url": f"http://127.0.0.1:{port}", "session": session}


@pytest.fixture
def forked_trainings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the processes of `assert_exact_resume` be forked from one that has imported torch, seconds cheaper each."""
    monkeypatch.setattr("incckpt.testing.exact_resume.multiprocessing.get_context", lambda _: programs)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let an address that nothing answers at be given up after half a second."""

    class Impatient(RetryBackend):
        def __init__(self, inner: Backend) -> None:
            super().__init__(inner, first_limit=0.5)

    monkeypatch.setattr("incckpt.backends.registry.RetryBackend", Impatient)
