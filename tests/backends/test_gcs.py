"""The GCS backend against our own server with exact conditions, straight and through a proxy that breaks things."""

from __future__ import annotations

import json
import threading
import traceback
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytest.importorskip("gcsfs", reason="needs the extra gcs")

from google.oauth2.credentials import Credentials

from incckpt.backends import Backend, open_backend
from incckpt.backends.gcs import GCSBackend
from incckpt.errors import BackendError, BackendPermissionError, OptionError
from incckpt.testing.conformance import BackendConformance
from tests.backends.remote_suite import ONE_OF_EACH, ConformanceUnderFaults, MakeBackend, RemoteFaults, patient
from tests.servers.fault_proxy import FaultProxy, Rule

BUCKET = "checkpoints"
ERROR = '{{"error": {{"code": {status}, "message": "injected", "errors": [{{"reason": "{code}"}}]}}}}'


@pytest.fixture(scope="session")
def bucket(gcs_server: int) -> str:
    url = f"http://127.0.0.1:{gcs_server}/storage/v1/b?project=test"
    request = urllib.request.Request(url, json.dumps({"name": BUCKET}).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30):
        return BUCKET


@pytest.fixture(scope="module")
def shared_proxy(gcs_server: int) -> Iterator[FaultProxy]:
    with FaultProxy(gcs_server, error_body=ERROR) as proxy:
        yield proxy


@pytest.fixture
def proxy(shared_proxy: FaultProxy) -> Iterator[FaultProxy]:
    shared_proxy.rules = []
    shared_proxy.seen.clear()
    yield shared_proxy
    shared_proxy.rules = []


def options_for(port: int, **more: Any) -> dict[str, Any]:
    return {"token": "anon", "endpoint_url": f"http://127.0.0.1:{port}", **more}


@pytest.fixture(scope="module")
def make(shared_proxy: FaultProxy, bucket: str) -> MakeBackend:
    def make(root: str, **limits: float) -> Backend:
        return GCSBackend(bucket, root, options_for(shared_proxy.port), **limits)

    return make


@pytest.fixture
def broken(proxy: FaultProxy, bucket: str) -> Iterator[GCSBackend]:
    with GCSBackend(bucket, str(uuid.uuid4()), options_for(proxy.port)) as backend:
        yield backend


class TestConformance(BackendConformance):
    @pytest.fixture
    def backend(self, gcs_server: int, bucket: str) -> Iterator[Backend]:
        with GCSBackend(bucket, f"run/{uuid.uuid4()}", options_for(gcs_server)) as backend:
            yield backend

    @pytest.fixture
    def plain_get(self, backend: Backend, gcs_server: int, bucket: str) -> Callable[[str], bytes]:
        root = backend.url.removeprefix(f"gs://{bucket}/")

        def get(key: str) -> bytes:
            name = urllib.parse.quote(f"{root}/{key}", safe="")
            url = f"http://127.0.0.1:{gcs_server}/storage/v1/b/{bucket}/o/{name}?alt=media"
            with urllib.request.urlopen(url, timeout=30) as answer:
                data: bytes = answer.read()
                return data

        return get


class TestFaults(RemoteFaults):
    pass


class TestConformanceUnderFaults(ConformanceUnderFaults):
    pass


@pytest.mark.parametrize(
    ("status", "code", "error", "says"),
    [
        (403, "forbidden", BackendPermissionError, "roles"),
        (403, "accountDisabled", BackendPermissionError, "billing"),
        (400, "userProjectMissing", BackendError, "requester_pays"),
        (400, "invalid", BackendError, "400 invalid"),
    ],
)
def test_permanent_errors_fail_at_once_and_name_the_cause(
    proxy: FaultProxy, broken: Backend, status: int, code: str, error: type[BackendError], says: str
) -> None:
    store = patient(broken)
    for operation in (
        lambda: store.get("some/key"),
        lambda: store.put("some/key", b"x"),
        lambda: list(store.list("some/key")),
    ):
        proxy.rules = [Rule("status", times=None, status=status, code=code)]
        proxy.seen.clear()
        with pytest.raises(error, match=says) as caught:
            operation()
        assert type(caught.value) is error
        assert f"gs://{BUCKET}/" in str(caught.value)
        assert "some/key" in str(caught.value)
        assert len(proxy.seen) == 1


def test_a_bucket_that_is_not_there(gcs_server: int) -> None:
    with GCSBackend("no-such-bucket", "x", options_for(gcs_server)) as backend:
        for operation in (
            lambda: backend.get("k"),
            lambda: backend.put("k", b""),
            lambda: list(backend.list()),
            lambda: backend.delete(["k"]),
        ):
            with pytest.raises(BackendError, match="create it, or correct the URL") as caught:
                operation()
            assert type(caught.value) is BackendError


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (429, "rateLimitExceeded"),
        (403, "userRateLimitExceeded"),
        (500, "backendError"),
        (503, "backendError"),
        (408, ""),
    ],
)
def test_errors_that_may_pass_are_repeated(proxy: FaultProxy, broken: Backend, status: int, code: str) -> None:
    broken.put("there", b"value")
    for operation in ONE_OF_EACH.values():
        proxy.rules = [Rule("status", times=2, status=status, code=code)]
        assert operation(patient(broken))


def test_a_create_is_one_conditional_post(proxy: FaultProxy, broken: Backend) -> None:
    for write in (broken.create, broken.put):
        proxy.seen.clear()
        write(f"{write.__name__}d", bytes(20 << 20))
        assert [seen.method for seen in proxy.seen] == ["POST"]
        assert ("ifGenerationMatch=0" in proxy.seen[0].target) == (write == broken.create)


def test_a_create_without_conditions(proxy: FaultProxy, broken: Backend) -> None:
    proxy.rules = [Rule("status", times=None, target="ifGenerationMatch", status=501, code="notImplemented")]
    assert not broken.probe_exclusive()
    broken.create("k", b"1")
    with pytest.raises(BackendError, match="'k' exists"):
        broken.create("k", b"2")


def test_expired_credentials_are_renewed_once(proxy: FaultProxy, bucket: str) -> None:
    with GCSBackend(bucket, "x", options_for(proxy.port, token=Credentials("some-token"))) as backend:  # type: ignore[no-untyped-call]
        proxy.rules = [Rule("status", status=401, code="authError")]
        backend.put("k", b"1")
        assert ["Bearer some-token" in seen.head for seen in proxy.seen] == [True, True]
        proxy.rules = [Rule("status", times=None, status=401, code="authError")]
        proxy.seen.clear()
        with pytest.raises(BackendPermissionError, match="roles"):
            patient(backend).put("k", b"2")
        assert len(proxy.seen) == 2


def test_a_request_that_meets_a_retired_connection_takes_another(gcs_server: int, bucket: str) -> None:
    """As when another thread renews the credentials just after this one took the connection."""
    with GCSBackend(bucket, f"run/{uuid.uuid4()}", options_for(gcs_server)) as backend:
        backend.put("k", b"1")
        retired = backend._connected()
        backend._retire(retired)
        backend._connection = retired
        assert backend.get("k") == b"1"
        assert backend._connected() is not retired


def test_a_retired_connection_closes_when_its_last_request_is_done(proxy: FaultProxy, broken: GCSBackend) -> None:
    broken.put("k", b"1")
    connection = broken._connected()
    http = connection.client._http
    assert http is not None
    proxy.rules = [Rule("hang_reply")]
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(patient(broken).get, "k")
        while len(proxy.seen) < 2:
            threading.Event().wait(0.01)
        broken._retire(connection)
        assert not http.closed
        proxy.release()
        assert waiting.result() == b"1"
    assert http.closed


def test_the_requester_pays(proxy: FaultProxy, bucket: str) -> None:
    for given, named in ((True, "mine"), ("other", "other")):
        options = options_for(proxy.port, requester_pays=given, project="mine")
        with GCSBackend(bucket, "x", options) as backend:
            proxy.seen.clear()
            backend.put("k", b"1")
            assert f"userProject={named}" in proxy.seen[0].target


def test_secrets_are_not_shown(proxy: FaultProxy, bucket: str) -> None:
    options = options_for(proxy.port, token=Credentials("hush-hush"))  # type: ignore[no-untyped-call]
    with open_backend(f"gs://{bucket}/x", options) as backend:
        proxy.rules = [Rule("status", status=403, code="forbidden")]
        with pytest.raises(BackendError) as caught:
            backend.put("k", b"x")
    shown = "".join(traceback.format_exception(caught.value)) + repr(backend) + backend.url
    assert "hush" not in shown


@pytest.mark.parametrize("url", ["gs://", "gs:///x", "gs://bucket?x=1", "gcs://b/x#run", "gs://user:secret@bucket/x"])
def test_urls_that_are_not_of_a_bucket(url: str) -> None:
    with pytest.raises(OptionError, match="gs://bucket/path") as caught:
        open_backend(url)
    assert "secret" not in str(caught.value)


def test_options_that_gcsfs_does_not_take(bucket: str) -> None:
    with (
        pytest.raises(OptionError, match="gcsfs"),
        open_backend(f"gs://{bucket}/x", {"token": 17, "endpoint_url": "http://127.0.0.1:1"}) as backend,
    ):
        backend.get("k")
