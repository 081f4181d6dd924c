"""The S3 backend against a Ceph RADOS gateway, straight and through a proxy that breaks things.

Skipped unless INCCKPT_CEPH_URL is a gateway's endpoint; `make test-ceph` starts one with tests/servers/ceph-up.sh.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import aiobotocore.session
import pytest
import s3fs

from incckpt.backends import Backend
from incckpt.backends.s3 import S3Backend
from incckpt.testing.conformance import BackendConformance
from tests.backends.remote_suite import ConformanceUnderFaults, MakeBackend, RemoteFaults
from tests.servers.fault_proxy import FaultProxy

ENDPOINT = os.environ.get("INCCKPT_CEPH_URL", "")
BUCKET = "incckpt-test"

if not ENDPOINT:
    pytest.skip("set INCCKPT_CEPH_URL to a gateway's endpoint (make test-ceph starts one)", allow_module_level=True)

pytestmark = pytest.mark.ceph


@pytest.fixture(scope="module")
def options() -> dict[str, Any]:
    options = {
        "key": os.environ.get("INCCKPT_CEPH_KEY", "test"),
        "secret": os.environ.get("INCCKPT_CEPH_SECRET", "testtest"),
        "endpoint_url": ENDPOINT,
    }
    fs = s3fs.S3FileSystem(**options)
    if not fs.exists(BUCKET):
        fs.mkdir(BUCKET)
    return {**options, "session": aiobotocore.session.AioSession()}


@pytest.fixture(scope="module")
def shared_proxy() -> Iterator[FaultProxy]:
    port = urlsplit(ENDPOINT).port
    assert port is not None, "the proxy needs the gateway on a port of this machine"
    with FaultProxy(port) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def make(shared_proxy: FaultProxy, options: dict[str, Any]) -> MakeBackend:
    def make(root: str, **limits: float) -> Backend:
        return S3Backend(BUCKET, root, {**options, "endpoint_url": f"http://127.0.0.1:{shared_proxy.port}"}, **limits)

    return make


class TestConformance(BackendConformance):
    @pytest.fixture
    def backend(self, options: dict[str, Any]) -> Iterator[Backend]:
        with S3Backend(BUCKET, f"run/{uuid.uuid4()}", options) as backend:
            yield backend


class TestFaults(RemoteFaults):
    has_body = frozenset({"get", "get_into", "list", "delete"})


class TestConformanceUnderFaults(ConformanceUnderFaults):
    pass
