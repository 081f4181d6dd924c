"""The S3 backend against rclone, an S3 server that takes conditions and ignores them."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from typing import Any

import aiobotocore.session
import pytest

from incckpt.backends import Backend, open_backend
from incckpt.backends.s3 import S3Backend
from incckpt.errors import KeyExistsError
from incckpt.testing.conformance import BackendConformance
from tests.remote_suite import patient
from tests.servers.installed import NotInstalled, rclone
from tests.servers.processes import free_port, program_server


@pytest.fixture(scope="module")
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


class TestRclone(BackendConformance):
    """Without exclusive creation, once that is found out."""

    many_keys = 300

    @pytest.fixture
    def backend(self, rclone_server: dict[str, Any]) -> Iterator[Backend]:
        with S3Backend("bucket", f"run/{uuid.uuid4()}", rclone_server) as backend:
            assert not backend.probe_exclusive()
            yield patient(backend)  # now and then it answers 500 to puts into a folder that is being made

    def test_put_is_atomic_under_readers(self, backend: Backend) -> None:
        pytest.skip("rclone overwrites in place: a reader may get a part, which is an error, or a mixture")

    def test_delete(self, backend: Backend) -> None:
        pytest.skip("rclone answers 500 to the delete of what is a folder to it")


def test_rclone_takes_a_condition_and_ignores_it(rclone_server: dict[str, Any]) -> None:
    with open_backend("s3://bucket/probing", rclone_server) as backend:
        backend.create("k", b"1")
        backend.create("k", b"2")
        assert backend.get("k") == b"2"
        assert not backend.probe_exclusive()
        with pytest.raises(KeyExistsError):
            backend.create("k", b"3")
        assert backend.get("k") == b"2"
