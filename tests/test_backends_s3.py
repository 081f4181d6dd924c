"""The S3 backend against moto with exact conditions, straight and through a proxy that breaks things."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import pytest
import s3fs

from incckpt.backends import Backend
from incckpt.backends.retry import RetryBackend
from incckpt.backends.s3 import S3Backend
from incckpt.testing.conformance import BackendConformance

BUCKET = "checkpoints"


@pytest.fixture(scope="session")
def bucket(s3_server: dict[str, Any]) -> str:
    s3fs.S3FileSystem(**s3_server).mkdir(BUCKET)
    return BUCKET


class TestConformance(BackendConformance):
    @pytest.fixture
    def backend(self, s3_server: dict[str, Any], bucket: str) -> Iterator[Backend]:
        with S3Backend(bucket, f"run/{uuid.uuid4()}", s3_server) as backend:
            yield backend


class TestRetryConformance(BackendConformance):
    large_value = 1 << 20

    @pytest.fixture
    def backend(self, s3_server: dict[str, Any], bucket: str) -> Iterator[Backend]:
        with RetryBackend(S3Backend(bucket, f"run/{uuid.uuid4()}", s3_server)) as backend:
            yield backend
