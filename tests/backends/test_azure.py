"""The Azure backend against azurite, straight and through a proxy that breaks things."""

from __future__ import annotations

import asyncio
import gc
import os
import traceback
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("adlfs", reason="needs the extra azure")

from azure.storage.blob import BlobServiceClient

from incckpt.backends import Backend, open_backend
from incckpt.backends.azure import AzureBackend
from incckpt.backends.wrapper import WrapperBackend
from incckpt.errors import BackendError, BackendPermissionError, OptionError
from incckpt.testing.conformance import BackendConformance
from tests.backends.remote_suite import ONE_OF_EACH, ConformanceUnderFaults, MakeBackend, RemoteFaults, patient
from tests.servers.fault_proxy import FaultProxy, Rule

# Azure's client lets go of a response that broke off without closing it; the garbage collector does.
pytestmark = pytest.mark.filterwarnings("ignore:Unclosed connection:ResourceWarning")

CONTAINER = "checkpoints"
# azurite's well-known account, the same in every installation
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


def options_for(port: int, key: str = KEY) -> dict[str, Any]:
    parts = [
        "DefaultEndpointsProtocol=http",
        "AccountName=devstoreaccount1",
        f"AccountKey={key}",
        f"BlobEndpoint=http://127.0.0.1:{port}/devstoreaccount1",
    ]
    return {"connection_string": ";".join(parts)}


@pytest.fixture(scope="session")
def container(azure_server: int) -> str:
    with BlobServiceClient.from_connection_string(options_for(azure_server)["connection_string"]) as service:
        service.create_container(CONTAINER)
    return CONTAINER


@pytest.fixture(scope="module", autouse=True)
def _collect() -> Iterator[None]:
    yield
    gc.collect()  # while the mark above still counts


@pytest.fixture(scope="module")
def shared_proxy(azure_server: int) -> Iterator[FaultProxy]:
    with FaultProxy(azure_server) as proxy:
        yield proxy


@pytest.fixture
def proxy(shared_proxy: FaultProxy) -> Iterator[FaultProxy]:
    shared_proxy.rules = []
    shared_proxy.seen.clear()
    yield shared_proxy
    shared_proxy.rules = []


@pytest.fixture(scope="module")
def make(shared_proxy: FaultProxy, container: str) -> MakeBackend:
    def make(root: str, **limits: float) -> Backend:
        return AzureBackend(container, root, options_for(shared_proxy.port), **limits)

    return make


@pytest.fixture
def broken(proxy: FaultProxy, make: MakeBackend) -> Iterator[Backend]:
    with make(str(uuid.uuid4())) as backend:
        yield backend


class TestConformance(BackendConformance):
    many_keys = 300  # more than a batch has; a page has 5,000

    @pytest.fixture
    def backend(self, azure_server: int, container: str) -> Iterator[Backend]:
        with AzureBackend(container, f"run/{uuid.uuid4()}", options_for(azure_server)) as backend:
            yield backend

    @pytest.fixture
    def plain_get(self, backend: Backend, azure_server: int, container: str) -> Iterator[Callable[[str], bytes]]:
        root = backend.url.removeprefix(f"az://{container}/")
        with BlobServiceClient.from_connection_string(options_for(azure_server)["connection_string"]) as service:
            yield lambda key: service.get_blob_client(container, f"{root}/{key}").download_blob().readall()


class TestFaults(RemoteFaults):
    rounds = 15  # Azure's client waits for a second before it asks again for a download that broke off


class TestConformanceUnderFaults(ConformanceUnderFaults):
    pass


@pytest.mark.parametrize(
    ("status", "code", "error", "says"),
    [
        (403, "AuthorizationPermissionMismatch", BackendPermissionError, "no role"),
        (403, "AuthorizationFailure", BackendPermissionError, "network rule"),
        (401, "NoAuthenticationInformation", BackendPermissionError, "account_key"),
        (404, "ContainerNotFound", BackendError, "create it"),
        (409, "ImmutableBlobStorageOverwrite", BackendError, "immutability"),
    ],
)
def test_permanent_errors_name_the_cause(
    proxy: FaultProxy, broken: Backend, status: int, code: str, error: type[BackendError], says: str
) -> None:
    for operation in (
        lambda: broken.get("some/key"),
        lambda: broken.put("some/key", b"x"),
        lambda: list(broken.list("some/key")),
    ):
        proxy.rules = [Rule("status", times=None, status=status, code=code)]
        with pytest.raises(error, match=says) as caught:
            operation()
        assert type(caught.value) is error
        assert f"az://{CONTAINER}/" in str(caught.value)
        assert "some/key" in str(caught.value)


def test_a_container_that_is_not_there(azure_server: int) -> None:
    with AzureBackend("no-such-container", "x", options_for(azure_server)) as backend:
        for operation in (
            lambda: backend.get("k"),
            lambda: backend.head("k"),
            lambda: backend.put("k", b""),
            lambda: list(backend.list()),
            lambda: backend.delete(["k"]),
        ):
            with pytest.raises(BackendError, match="create it, or correct the URL") as caught:
                operation()
            assert type(caught.value) is BackendError


@pytest.mark.parametrize(("status", "code"), [(503, "ServerBusy"), (500, "OperationTimedOut"), (429, "")])
def test_errors_that_may_pass_are_repeated(proxy: FaultProxy, broken: Backend, status: int, code: str) -> None:
    broken.put("there", b"value")
    for operation in ONE_OF_EACH.values():
        proxy.rules = [Rule("status", times=2, status=status, code=code)]
        assert operation(patient(broken))


def test_a_create_is_one_conditional_put(proxy: FaultProxy, broken: Backend) -> None:
    for write in (broken.create, broken.put):
        proxy.seen.clear()
        write(f"{write.__name__}d", bytes(70 << 20))
        assert [seen.method for seen in proxy.seen] == ["PUT"]
        assert ("if-none-match: *" in proxy.seen[0].head.lower()) == (write == broken.create)


def test_folders_of_accounts_that_have_them_are_passed_over(azure_server: int, container: str) -> None:
    root = f"run/{uuid.uuid4()}"
    with BlobServiceClient.from_connection_string(options_for(azure_server)["connection_string"]) as service:
        blob = service.get_blob_client(container, f"{root}/folder")
        blob.upload_blob(b"", metadata={"hdi_isfolder": "true"})
    with AzureBackend(container, root, options_for(azure_server)) as backend:
        backend.put("folder/key", b"x")
        assert [entry.key for entry in backend.list()] == ["folder/key"]
        for read in (backend.get, backend.head):
            with pytest.raises(FileNotFoundError):
                read("folder")


def test_expired_credentials_are_renewed_once(
    proxy: FaultProxy, container: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", options_for(proxy.port, "b2xk")["connection_string"])
    with AzureBackend(container, "x", {}) as backend:
        with pytest.raises(BackendPermissionError, match="wrong or has expired"):
            patient(backend).put("k", b"1")
        assert len(proxy.seen) == 2
        monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", options_for(proxy.port)["connection_string"])
        backend.put("k", b"2")
        assert backend.get("k") == b"2"


def test_secrets_are_not_shown(proxy: FaultProxy, container: str) -> None:
    key = "aHVzaC1odXNo"
    with open_backend(f"az://{container}/x", options_for(proxy.port, key)) as backend:
        with pytest.raises(BackendError) as caught:
            backend.put("k", b"x")
        shown = "".join(traceback.format_exception(caught.value)) + repr(backend) + backend.url
    assert key not in shown


@pytest.mark.parametrize(
    "url", ["az://", "az:///x", "az://container?sv=secret", "abfss://c@host/x#run", "az://a:secret@c/x"]
)
def test_urls_that_are_not_of_a_container(url: str) -> None:
    with pytest.raises(OptionError, match="az://container/path") as caught:
        open_backend(url, {"account_name": "a"})
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "options", "host"),
    [
        ("az://box/run", {"account_name": "acc"}, "acc.blob.core.windows.net"),
        ("abfs://box/run", {"account_name": "acc", "account_host": "acc.blob.example"}, "acc.blob.example"),
        ("abfss://box@acc.dfs.core.windows.net/run", {}, "acc.blob.core.windows.net"),
        ("abfss://box@acc.blob.core.chinacloudapi.cn/run", {}, "acc.blob.core.chinacloudapi.cn"),
    ],
)
@pytest.mark.parametrize("credential", [{"account_key": KEY}, {"sas_token": "?sv=2024&sig=hush"}, {"anon": True}, {}])
def test_where_a_url_leads(url: str, options: dict[str, str], host: str, credential: dict[str, Any]) -> None:
    """The account is the URL's or the option's, and each kind of credentials is understood."""
    backend = open_backend(url, {**options, **credential})
    while isinstance(backend, WrapperBackend):
        backend = backend.inner
    assert isinstance(backend, AzureBackend)
    session = backend._connect()
    assert session.container.url.partition("?")[0] == f"https://{host}/box"
    assert backend.url == "az://box/run"
    asyncio.run(session.close())


def test_options_that_are_not_known() -> None:
    with pytest.raises(OptionError, match="nonsense"):
        open_backend("az://box/x", {"nonsense": 1})


@pytest.mark.slow
def test_no_account(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AZURE_")]:
        monkeypatch.delenv(name)
    with open_backend("az://box/x") as backend, pytest.raises(OptionError, match="AZURE_STORAGE_ACCOUNT_NAME"):
        backend.get("k")
