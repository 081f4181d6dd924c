"""Fixtures that several test files share: a server of each kind, one per test session."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.servers.processes import python_server


@pytest.fixture(scope="session")
def gcs_server() -> Iterator[int]:
    """Return the port of a GCS server with exact conditions."""
    with python_server("gcs_server") as port:
        yield port


@pytest.fixture(scope="session")
def s3_server() -> Iterator[dict[str, Any]]:
    """Return s3fs options for an S3 server with exact conditions."""
    with python_server("s3_server") as port:
        yield {"key": "test", "secret": "testtest", "endpoint_url": f"http://127.0.0.1:{port}"}
