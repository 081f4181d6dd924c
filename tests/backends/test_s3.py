"""The S3 backend against moto with exact conditions, straight and through a proxy that breaks things."""

from __future__ import annotations

import datetime
import ipaddress
import os
import ssl
import threading
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import pytest
import s3fs
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from incckpt.backends import Backend, Leftover, open_backend
from incckpt.backends.retry import RetryBackend
from incckpt.backends.s3 import S3Backend
from incckpt.errors import (
    BackendError,
    BackendPermissionError,
    BackendTimeoutError,
    KeyExistsError,
    KeyNotFoundError,
    OptionError,
    UnsupportedOperationError,
)
from incckpt.testing.conformance import BackendConformance
from tests.backends.remote_suite import (
    ONE_OF_EACH,
    ConformanceUnderFaults,
    MakeBackend,
    RemoteFaults,
    get_into,
    patient,
)
from tests.servers.fault_proxy import FaultProxy, Rule

BUCKET = "checkpoints"


@pytest.fixture(scope="session")
def bucket(s3_server: dict[str, Any]) -> str:
    s3fs.S3FileSystem(**s3_server).mkdir(BUCKET)
    return BUCKET


@pytest.fixture(scope="module")
def shared_proxy(s3_server: dict[str, Any]) -> Iterator[FaultProxy]:
    with FaultProxy(int(s3_server["endpoint_url"].rpartition(":")[2])) as proxy:
        yield proxy


@pytest.fixture
def proxy(shared_proxy: FaultProxy) -> Iterator[FaultProxy]:
    shared_proxy.rules = []
    shared_proxy.seen.clear()
    yield shared_proxy
    shared_proxy.rules = []


def options_for(proxy: FaultProxy, **more: Any) -> dict[str, Any]:
    return {"key": "test", "secret": "testtest", "endpoint_url": f"http://127.0.0.1:{proxy.port}", **more}


@pytest.fixture(scope="module")
def make(shared_proxy: FaultProxy, bucket: str, s3_server: dict[str, Any]) -> MakeBackend:
    def make(root: str, **limits: float) -> Backend:
        return S3Backend(bucket, root, options_for(shared_proxy, session=s3_server["session"]), **limits)

    return make


@pytest.fixture(scope="module")
def through_proxy(shared_proxy: FaultProxy, bucket: str) -> Iterator[S3Backend]:
    with S3Backend(bucket, f"run/{uuid.uuid4()}", options_for(shared_proxy)) as backend:
        yield backend


@pytest.fixture
def broken(proxy: FaultProxy, through_proxy: S3Backend) -> Iterator[S3Backend]:
    """Return a backend whose requests go through the proxy; one attempt each; empty."""
    yield through_proxy
    proxy.rules = []
    through_proxy.delete([entry.key for entry in through_proxy.list()])


class TestConformance(BackendConformance):
    @pytest.fixture
    def backend(self, s3_server: dict[str, Any], bucket: str) -> Iterator[Backend]:
        with S3Backend(bucket, f"run/{uuid.uuid4()}", s3_server) as backend:
            yield backend

    @pytest.fixture
    def plain_get(self, backend: Backend, s3_server: dict[str, Any], bucket: str) -> Callable[[str], bytes]:
        names = {"endpoint_url": s3_server["endpoint_url"], "region_name": "us-east-1"}
        client = boto3.client("s3", aws_access_key_id="test", aws_secret_access_key="testtest", **names)
        root = backend.url.removeprefix(f"s3://{bucket}/")
        return lambda key: client.get_object(Bucket=bucket, Key=f"{root}/{key}")["Body"].read()


class TestFaults(RemoteFaults):
    has_body = frozenset({"get", "get_into", "list", "delete"})


class TestConformanceUnderFaults(ConformanceUnderFaults):
    pass


@pytest.mark.parametrize(
    ("status", "code", "error", "says"),
    [
        (403, "AccessDenied", BackendPermissionError, "policy"),
        (403, "InvalidAccessKeyId", BackendPermissionError, "endpoint_url"),
        (403, "SignatureDoesNotMatch", BackendPermissionError, "secret key is wrong"),
        (403, "RequestTimeTooSkewed", BackendPermissionError, "clock"),
        (404, "NoSuchBucket", BackendError, "create it"),
        (400, "AuthorizationHeaderMalformed", BackendError, "another region"),
        (501, "NotImplemented", UnsupportedOperationError, "501"),
        (400, "EntityTooLarge", BackendError, "EntityTooLarge"),
    ],
)
def test_permanent_errors_fail_at_once_and_name_the_cause(
    proxy: FaultProxy, broken: S3Backend, status: int, code: str, error: type[BackendError], says: str
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
        assert not caught.value.transient
        assert f"s3://{BUCKET}/" in str(caught.value)
        assert "some/key" in str(caught.value)
        # Where the bucket may be in another region, the client is asked to find it.
        assert len(proxy.seen) == 1 + (code == "AuthorizationHeaderMalformed" and proxy.seen[0].method == "PUT")


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (500, "InternalError"),
        (502, "BadGateway"),
        (503, "SlowDown"),
        (503, "ServiceUnavailable"),
        (504, "GatewayTimeout"),
        (429, "TooManyRequests"),
        (409, "ConditionalRequestConflict"),
        (409, "OperationAborted"),
        (400, "RequestTimeout"),
        (400, "IncompleteBody"),
        (400, "BadDigest"),
    ],
)
def test_errors_that_may_pass_are_repeated(proxy: FaultProxy, broken: S3Backend, status: int, code: str) -> None:
    broken.put("there", b"value")
    for operation in ONE_OF_EACH.values():
        proxy.rules = [Rule("status", times=2, status=status, code=code, method="PUT|GET|POST|DELETE")]
        assert operation(patient(broken))


def test_an_address_that_never_answered_is_given_up_soon(bucket: str) -> None:
    now = [0.0]
    options = {"key": "k", "secret": "s", "endpoint_url": "http://127.0.0.1:1"}
    with S3Backend(bucket, "x", options) as backend:
        waits: list[float] = []

        def sleep(seconds: float) -> None:
            waits.append(seconds)
            now[0] += seconds

        patient = RetryBackend(backend, sleep=sleep, clock=lambda: now[0])
        with pytest.raises(BackendTimeoutError, match=r"127\.0\.0\.1:1.*is the address right"):
            patient.get("k")
        assert 0 < sum(waits) < 10


def test_a_server_that_has_answered_is_waited_for(
    bucket: str, s3_server: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    with (
        S3Backend(bucket, "x", s3_server) as backend,
        S3Backend(bucket, "x", {**s3_server, "endpoint_url": "http://127.0.0.1:1"}) as down,
    ):
        patient = RetryBackend(
            backend, sleep=lambda seconds: now.__setitem__(0, now[0] + seconds), clock=lambda: now[0]
        )
        patient.put("k", b"v")
        monkeypatch.setattr(patient, "inner", down)  # as when the server is restarted
        with pytest.raises(BackendTimeoutError, match="gave up"):
            patient.get("k")
        assert 120 < now[0] < 180


def test_an_endpoint_that_refuses_connections(bucket: str) -> None:
    with S3Backend(bucket, "x", {"key": "k", "secret": "s", "endpoint_url": "http://127.0.0.1:1"}) as backend:
        with pytest.raises(BackendTimeoutError, match=r"127\.0\.0\.1:1"):
            RetryBackend(backend, limit=0.01).get("k")
        with pytest.raises(BackendError) as caught:
            backend.put("k", b"")
        assert caught.value.transient


# -- exclusive creation -----------------------------------------------------------------------------------------------


def test_a_create_is_one_conditional_put(proxy: FaultProxy, broken: S3Backend) -> None:
    """Never multipart, however large: that is where some servers ignore the condition."""
    for write in (broken.create, broken.put):
        proxy.seen.clear()
        write(f"{write.__name__}d", bytes(40 << 20))
        assert [(seen.method, "uploads" in seen.target) for seen in proxy.seen] == [("PUT", False)]
        assert ("if-none-match: *" in proxy.seen[0].head.lower()) == (write == broken.create)


def test_a_bare_412_is_a_conflict(proxy: FaultProxy, broken: S3Backend) -> None:
    """Some servers do not say which condition failed."""
    proxy.rules = [Rule("status", method="PUT", status=412, code="PreconditionFailed")]
    with pytest.raises(KeyExistsError, match="'k' exists"):
        broken.create("k", b"x")


def test_a_lost_reply(proxy: FaultProxy, broken: S3Backend) -> None:
    """One attempt does not look like a success; that it may look like a conflict is aiohttp's doing."""
    rule = Rule("lose_reply", method="PUT", target="/once")
    proxy.rules = [rule]
    with pytest.raises(BackendError):
        broken.create("once", b"mine")
    assert rule.struck == 1
    with pytest.raises(KeyExistsError):
        broken.create("once", b"mine")
    for times in (1, 2, 3, 4):
        rule = Rule("lose_reply", method="PUT", times=times)
        proxy.rules = [rule]
        patient(broken).create(f"again/{times}", b"mine")
        assert broken.get(f"again/{times}") == b"mine"
        assert rule.struck >= min(times, 2)
    with pytest.raises(KeyExistsError):
        patient(broken).create("once", b"other")


def test_a_server_without_conditions_is_found_out(s3_server: dict[str, Any], bucket: str, proxy: FaultProxy) -> None:
    proxy.rules = [Rule("status", times=None, header="(?i)if-none-match", status=501, code="NotImplemented")]
    with S3Backend(bucket, str(uuid.uuid4()), options_for(proxy)) as backend:
        with pytest.raises(UnsupportedOperationError):
            backend.create("k", b"1")
        assert not backend.probe_exclusive()
        backend.create("k", b"1")
        backend.create("k.longer", b"1")
        with pytest.raises(KeyExistsError):
            backend.create("k", b"2")
        assert backend.get("k") == b"1"
        assert not list(backend.list("probe"))


# -- details ----------------------------------------------------------------------------------------------------------


class _OneValue(BaseHTTPRequestHandler):
    """Answers every GET with the server's one value, whole."""

    def do_GET(self) -> None:
        assert isinstance(self.server, _OneValueServer)
        self.server.targets.append(self.path)
        self.send_response(200)
        self.send_header("ETag", '"1"')
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(len(self.server.value)))
        self.end_headers()
        self.wfile.write(self.server.value)

    def log_message(self, *_: object) -> None:
        """Log nothing."""


class _OneValueServer(ThreadingHTTPServer):
    def __init__(self, value: bytes) -> None:
        super().__init__(("127.0.0.1", 0), _OneValue)
        self.value = value
        self.targets: list[str] = []


@contextmanager
def serving(value: bytes) -> Iterator[_OneValueServer]:
    with _OneValueServer(value) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def test_a_server_that_ignores_ranges() -> None:
    with serving(b"0123456789") as server:
        options = {"key": "k", "secret": "s", "endpoint_url": f"http://127.0.0.1:{server.server_port}"}
        with S3Backend(BUCKET, "x", options) as backend:
            assert backend.get("k", 2, 5) == b"234"
            assert backend.get("k", 7) == b"789"
            assert backend.get("k", 20, 30) == b""


# As Ceph answers: the keys are URL-encoded, as it says, and the prefix is repeated as it is.
_LISTING = """<?xml version="1.0" encoding="UTF-8"?><ListBucketResult><Name>%s</Name><Prefix>x/b+=</Prefix>\
<EncodingType>url</EncodingType><IsTruncated>false</IsTruncated><KeyCount>1</KeyCount><Contents><Key>x/b%%2B%%3Dc</Key>\
<LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>&quot;1&quot;</ETag><Size>3</Size></Contents></ListBucketResult>"""


def test_a_prefix_that_the_server_repeats_without_encoding_it() -> None:
    with serving((_LISTING % BUCKET).encode()) as server:
        options = {"key": "k", "secret": "s", "endpoint_url": f"http://127.0.0.1:{server.server_port}"}
        with S3Backend(BUCKET, "x", options) as backend:
            assert [(entry.key, entry.size) for entry in backend.list("b+=")] == [("b+=c", 3)]


def test_bulk_delete_that_is_refused(
    s3_server: dict[str, Any], bucket: str, proxy: FaultProxy, caplog: pytest.LogCaptureFixture
) -> None:
    with S3Backend(bucket, str(uuid.uuid4()), options_for(proxy)) as backend:
        for number in range(12):
            backend.put(f"k/{number}", b"")
        proxy.rules = [Rule("status", times=None, method="POST", status=400, code="MissingContentMD5")]
        backend.delete([f"k/{number}" for number in range(6)])
        backend.delete([f"k/{number}" for number in range(6, 12)])
        assert list(backend.list()) == []
        assert [seen.method for seen in proxy.seen].count("POST") == 1
        assert caplog.text.count("each key costs a request") == 1


def test_bulk_delete_that_fails_for_one_key(proxy: FaultProxy, broken: S3Backend) -> None:
    template = "<?xml version='1.0'?><DeleteResult><Error><Key>{}/b</Key><Code>{}</Code></Error></DeleteResult>"
    root = broken.url.partition(f"{BUCKET}/")[2]
    errors = {"AccessDenied": False, "InternalError": True, "SlowDown": True}
    for code, transient in errors.items():
        proxy.rules = [Rule("status", method="POST", status=200, body=template.format(root, code))]
        with pytest.raises(BackendError, match=f"delete 'b'.*{code}") as caught:
            broken.delete(["a", "b"])
        assert caught.value.transient == transient
    proxy.rules = [Rule("status", method="POST", status=200, body=template.format(root, "NoSuchKey"))]
    broken.delete(["a", "b"])


def test_unfinished_uploads_of_other_tools(s3_server: dict[str, Any], bucket: str) -> None:
    root = f"run/{uuid.uuid4()}"
    fs = s3fs.S3FileSystem(**s3_server)
    for name in ("a/b", "c"):
        fs.call_s3("create_multipart_upload", Bucket=bucket, Key=f"{root}/{name}")
    fs.call_s3("create_multipart_upload", Bucket=bucket, Key=f"{root}-other/c")
    with S3Backend(bucket, root, s3_server) as backend:
        assert list(backend.list()) == []
        found = list(backend.leftovers())
        assert sorted(leftover.name.partition("?")[0] for leftover in found) == ["a/b", "c"]
        assert all(leftover.modified is not None and leftover.modified > 1_000_000_000 for leftover in found)
        for leftover in found:
            backend.remove_leftover(leftover)
            backend.remove_leftover(leftover)
        assert list(backend.leftovers()) == []
        with pytest.raises(OptionError):
            backend.remove_leftover(Leftover("c", None))


def test_foreign_names_in_the_bucket_are_passed_over(s3_server: dict[str, Any], bucket: str) -> None:
    root = f"run/{uuid.uuid4()}"
    fs = s3fs.S3FileSystem(**s3_server)
    for name in ("folder/", ".hidden", "with space", "good"):
        fs.call_s3("put_object", Bucket=bucket, Key=f"{root}/{name}", Body=b"")
    with S3Backend(bucket, root, s3_server) as backend:
        assert [entry.key for entry in backend.list()] == ["good"]


def test_expired_credentials_are_renewed_once(bucket: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new ones come from where the old ones came from."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "first")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with S3Backend(bucket, "x", {"endpoint_url": f"http://127.0.0.1:{proxy.port}"}) as backend:
        backend.put("k", b"1")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "second")
        proxy.rules = [Rule("status", status=400, code="ExpiredToken")]
        backend.put("k", b"2")
        used = ["Credential=first/" in seen.head for seen in proxy.seen]
        assert used == [True, True, False]
        assert "Credential=second/" in proxy.seen[-1].head
        proxy.rules = [Rule("status", times=None, status=400, code="ExpiredToken")]
        proxy.seen.clear()
        with pytest.raises(BackendPermissionError, match="has expired"):
            patient(backend).put("k", b"3")
        assert len(proxy.seen) == 2


def test_missing_credentials(bucket: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with S3Backend(bucket, "x", {"endpoint_url": f"http://127.0.0.1:{proxy.port}"}) as backend:
        with pytest.raises(BackendPermissionError, match="AWS_ACCESS_KEY_ID"):
            backend.get("k")
        assert proxy.seen == []


def test_secrets_are_not_shown(proxy: FaultProxy, bucket: str) -> None:
    options = options_for(proxy, secret="hush-hush", token="hush-token")
    backend = open_backend(f"s3://{bucket}/x", options)
    shown = [repr(backend), backend.url]
    for rule in (Rule("status", status=403, code="SignatureDoesNotMatch"), Rule("status", status=400, code="Bad")):
        proxy.rules = [rule]
        with pytest.raises(BackendError) as caught:
            backend.put("k", b"x")
        shown.append("".join(traceback.format_exception(caught.value)))
    backend.close()
    assert all("hush" not in text for text in shown)


@pytest.mark.parametrize(
    "url", ["s3://", "s3:///x", "s3://bucket?versionId=1", "s3://bucket/x#run", "s3://key:secret@bucket/x"]
)
def test_urls_that_are_not_of_a_bucket(url: str) -> None:
    with pytest.raises(OptionError, match="s3://bucket/path") as caught:
        open_backend(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("options", [{"config_kwargs": {"nonsense": 1}}, {"nonsense": 1}, {"request_timeout": 0}])
def test_options_that_s3fs_does_not_take(bucket: str, options: dict[str, Any]) -> None:
    with pytest.raises(OptionError), open_backend(f"s3://{bucket}/x", options) as backend:
        backend.get("k")


# -- bodies straight into memory --------------------------------------------------------------------------------------


def test_a_body_that_is_read_straight_into_memory_costs_one_request(proxy: FaultProxy, broken: S3Backend) -> None:
    broken.put("k", b"value")
    proxy.seen.clear()
    for _ in range(3):
        assert get_into(broken, "k", (2, 3)) == (5, b"value")
    assert [seen.method for seen in proxy.seen] == ["GET"] * 3


def test_what_an_error_means_is_found_out_by_asking_again(proxy: FaultProxy, broken: S3Backend) -> None:
    with pytest.raises(KeyNotFoundError, match="'missing'"):
        get_into(broken, "missing", (5,))
    assert [seen.method for seen in proxy.seen] == ["GET", "GET"]
    proxy.rules = [Rule("status", times=None, status=403, code="AccessDenied")]
    with pytest.raises(BackendPermissionError, match="policy"):
        get_into(broken, "missing", (5,))


def test_an_idle_connection_that_the_server_closed_is_no_error(bucket: str, s3_server: dict[str, Any]) -> None:
    root = str(uuid.uuid4())
    with FaultProxy(int(s3_server["endpoint_url"].rpartition(":")[2])) as first:
        port = first.port
        backend = S3Backend(bucket, root, options_for(first))
        backend.put("k", b"value")
        assert get_into(backend, "k", (5,)) == (5, b"value")
    with backend, FaultProxy(int(s3_server["endpoint_url"].rpartition(":")[2]), port=port):
        assert get_into(backend, "k", (5,)) == (5, b"value")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file with a key and a certificate for 127.0.0.1, signed by itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "a test")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "certificate.pem"
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + made.public_bytes(serialization.Encoding.PEM)
    )
    return path


def test_over_tls(bucket: str, s3_server: dict[str, Any], certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bodies are read over connections of our own; these are as strict about certificates as the client is."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    value = os.urandom(3_000_000)
    with FaultProxy(int(s3_server["endpoint_url"].rpartition(":")[2]), tls=context) as proxy:
        options = options_for(proxy, endpoint_url=f"https://127.0.0.1:{proxy.port}")
        root = str(uuid.uuid4())
        trusting = {**options, "client_kwargs": {"verify": str(certificate)}}
        with S3Backend(bucket, root, trusting) as backend:
            backend.put("k", value)
            assert get_into(backend, "k", (1_000, 2_999_000)) == (len(value), value)
        with S3Backend(bucket, root, {**options, "client_kwargs": {"verify": False}}) as backend:
            assert get_into(backend, "k", (len(value),)) == (len(value), value)
        monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
        with S3Backend(bucket, root, options) as backend:
            assert get_into(backend, "k", (len(value),)) == (len(value), value)
        monkeypatch.delenv("AWS_CA_BUNDLE")
        with (
            S3Backend(bucket, root, options) as backend,
            pytest.raises(BackendError, match=r"(?i)certificate") as caught,
        ):
            get_into(backend, "k", (len(value),))
        assert not caught.value.transient


def test_a_proxy_is_left_to_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes by the environment's proxy asks for whole URLs."""
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with serving(b"value") as server:
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{server.server_port}")
        with S3Backend(BUCKET, "x", {"key": "k", "secret": "s", "endpoint_url": "http://s3.invalid"}) as backend:
            assert get_into(backend, "k", (5,)) == (5, b"value")
        assert [target.startswith("http://s3.invalid/") for target in server.targets] == [True]
