"""The S3 backend against rclone, an S3 server that takes conditions and ignores them."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from incckpt.backends import Backend, open_backend
from incckpt.backends.s3 import S3Backend
from incckpt.errors import KeyExistsError
from incckpt.testing.conformance import BackendConformance
from tests.backends.remote_suite import patient


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
