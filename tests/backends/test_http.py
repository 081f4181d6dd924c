"""The HTTP backend over folders that local stores wrote, with and without byte ranges, and pages of real servers."""

from __future__ import annotations

import traceback
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from incckpt.backends import Backend, open_backend
from incckpt.backends.http import HTTPBackend, links_below
from incckpt.backends.local import LocalBackend
from incckpt.errors import (
    BackendError,
    BackendPermissionError,
    BackendTimeoutError,
    OptionError,
    UnsupportedOperationError,
)
from incckpt.testing.conformance import ReadConformance
from tests.backends.remote_suite import patient
from tests.servers.fault_proxy import FaultProxy, Rule
from tests.servers.processes import python_server

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def with_ranges(folder: Path) -> Iterator[int]:
    with python_server("http_server", str(folder), "ranges") as port:
        yield port


@pytest.fixture(scope="module")
def without_ranges(folder: Path) -> Iterator[int]:
    with python_server("http_server", str(folder)) as port:
        yield port


@pytest.fixture
def root(folder: Path) -> str:
    """Return the name of an empty folder that is served."""
    name = str(uuid.uuid4())
    (folder / name).mkdir()
    return name


@pytest.fixture
def writer(folder: Path, root: str) -> LocalBackend:
    return LocalBackend(folder / root)


@pytest.fixture
def proxy(with_ranges: int) -> Iterator[FaultProxy]:
    with FaultProxy(with_ranges) as proxy:
        yield proxy


@pytest.fixture
def store(proxy: FaultProxy, root: str) -> Iterator[HTTPBackend]:
    with HTTPBackend(f"http://127.0.0.1:{proxy.port}/{root}", timeout=0.5) as backend:
        yield backend


class _Reading(ReadConformance):
    many_keys = 300

    @pytest.fixture
    def writer(self, folder: Path, root: str) -> Backend:
        return LocalBackend(folder / root)

    def test_bad_keys_are_refused(self, backend: Backend) -> None:
        super().test_bad_keys_are_refused(backend)
        writes: list[Callable[[], None]] = [
            lambda: backend.put("k", b""),
            lambda: backend.create("k", b""),
            lambda: backend.delete(["k"]),
        ]
        for write in writes:
            with pytest.raises(UnsupportedOperationError, match="only be read"):
                write()
        assert not backend.writable
        assert not backend.probe_exclusive()


class TestWithRanges(_Reading):
    @pytest.fixture
    def backend(self, with_ranges: int, root: str) -> Iterator[Backend]:
        with open_backend(f"http://127.0.0.1:{with_ranges}/{root}") as backend:
            yield backend


class TestWithoutRanges(_Reading):
    large_value = 1 << 20

    @pytest.fixture
    def backend(self, without_ranges: int, root: str) -> Iterator[Backend]:
        with open_backend(f"http://user:pass@127.0.0.1:{without_ranges}/{root}/?sig=1") as backend:
            yield backend

    def test_it_is_said_once(self, backend: Backend, writer: Backend, caplog: pytest.LogCaptureFixture) -> None:
        writer.put("k", b"0123456789")
        assert backend.get("k", 2, 4) == backend.get("k", 2, 4) == b"23"
        assert caplog.text.count("does not support byte ranges") == 1


@pytest.mark.parametrize("do", ["status", "reset", "truncate", "hang", "hang_reply", "hang_download"])
def test_reading_through_faults(proxy: FaultProxy, store: HTTPBackend, writer: LocalBackend, do: str) -> None:
    values = {f"refs/{number}": bytes([number]) * (1_000 + number) for number in range(8)}
    for key, value in values.items():
        writer.put(key, value)
    reader = patient(store)
    rule = Rule(do, times=10, chance=0.3, status=502)
    proxy.rules = [rule]
    assert {entry.key: entry.size for entry in reader.list()} == {key: len(value) for key, value in values.items()}
    assert {key: reader.get(key) for key in values} == values
    assert {key: reader.head(key).size for key in values} == {key: len(value) for key, value in values.items()}
    assert rule.struck > 2
    proxy.rules = [Rule(do, times=None, status=502)]
    with pytest.raises(BackendError, match="refs/1") as caught:
        store.get("refs/1")
    assert caught.value.transient
    assert isinstance(caught.value, BackendTimeoutError) == do.startswith("hang")


@pytest.mark.parametrize(
    ("rule", "error", "says"),
    [
        (Rule("status", status=401), BackendPermissionError, "user:password@host"),
        (Rule("status", status=403), BackendPermissionError, "directory indexes"),
        (
            Rule("status", status=200, body="<html><title>My shop</title></html>"),
            UnsupportedOperationError,
            "autoindex",
        ),
        (Rule("status", status=200, body="{}"), UnsupportedOperationError, "autoindex"),
        (Rule("status", status=400), BackendError, "400"),
    ],
)
def test_a_folder_that_is_not_shown_is_not_an_empty_store(
    proxy: FaultProxy, store: HTTPBackend, rule: Rule, error: type[BackendError], says: str
) -> None:
    proxy.rules = [rule]
    with pytest.raises(error, match=says) as caught:
        list(store.list())
    assert type(caught.value) is error
    assert not caught.value.transient


def test_secrets_go_with_each_request_and_are_not_shown(proxy: FaultProxy, root: str, writer: LocalBackend) -> None:
    writer.put("refs/1", b"x")
    options = {"client_kwargs": {"headers": {"X-Token": "hush-header"}}}
    url = f"http://user:hush-password@127.0.0.1:{proxy.port}/{root}?sig=hush-query"
    with open_backend(url, options) as backend:
        assert [entry.key for entry in backend.list()] == ["refs/1"]
        assert backend.get("refs/1") == b"x"
        for seen in proxy.seen:
            assert "sig=hush-query" in seen.target
            assert "Basic dXNlcjpodXNoLXBhc3N3b3Jk" in seen.head
            assert "X-Token: hush-header" in seen.head
            assert "Accept-Encoding: identity" in seen.head
        shown = [repr(backend), backend.url]
        for rule in (Rule("status", status=403), Rule("status", status=400)):
            proxy.rules = [rule]
            with pytest.raises(BackendError) as caught:
                backend.get("refs/1")
            shown.append("".join(traceback.format_exception(caught.value)))
    assert not [text for text in shown if "hush" in text]


@pytest.mark.parametrize("url", ["http://", "https:///x", "http://host/x#run"])
def test_urls_without_a_host(url: str) -> None:
    with pytest.raises(OptionError, match="https://host/path"):
        open_backend(url)


@pytest.mark.parametrize("options", [{"nonsense": 1}, {"client_kwargs": {"nonsense": 1}}])
def test_options_that_are_not_known(with_ranges: int, options: dict[str, object]) -> None:
    with pytest.raises(OptionError), open_backend(f"http://127.0.0.1:{with_ranges}/", options) as backend:
        backend.get("k")


# -- indexes ----------------------------------------------------------------------------------------------------------

_PAGES = {
    "python": """<!DOCTYPE HTML><html lang="en"><head><title>Directory listing for /run/</title></head><body>
        <h1>Directory listing for /run/</h1><hr><ul><li><a href="000001-0000-ab">000001-0000-ab</a></li>
        <li><a href="objects/">objects/</a></li></ul><hr></body></html>""",
    "nginx": """<html><head><title>Index of /run/</title></head><body><h1>Index of /run/</h1><hr><pre>
        <a href="../">../</a>\n<a href="objects/">objects/</a>  01-Jan-2026 10:00  -\n
        <a href="000001-0000-ab">000001-00..&gt;</a>  01-Jan-2026 10:00  77</pre><hr></body></html>""",
    "apache": """<html><head><title>Index of /run</title></head><body><h1>Index of /run</h1><table>
        <tr><th><a href="?C=N;O=D">Name</a></th><th><a href="?C=M;O=A">Last modified</a></th></tr>
        <tr><td><a href="/">Parent Directory</a></td></tr><tr><td><a href="000001-0000-ab">000001-0..&gt;</a></td></tr>
        <tr><td><a href="objects/">objects/</a></td></tr></table></body></html>""",
    "caddy": """<!DOCTYPE html><html><head><title>run/</title></head><body><a href="../">up</a>
        <a href="./000001-0000-ab"><span class="name">000001-0000-ab</span></a>
        <a href="./objects/"><span class="name">objects</span></a></body></html>""",
    "absolute": """<html><title>files</title><a href=/run/objects/>o</a><A HREF='http://host/run/000001-0000-ab?raw=1'>x</A>
        <a href="http://elsewhere/run/other">no</a><a href="https://host/run/other">no</a><a href="/run2/no">no</a>
        <a href="/run/a/deep">no</a><a href="mailto:x@y">no</a><a>no</a><a name="top">no</a></html>""",
}


@pytest.mark.parametrize("server", _PAGES)
def test_indexes_of_real_servers(server: str) -> None:
    assert links_below("http://host/run/", _PAGES[server]) == {"000001-0000-ab": False, "objects": True}


def test_an_empty_index_and_no_index() -> None:
    empty = "<html><head><title>Index of /run/</title></head><body><a href='../'>../</a></body></html>"
    assert links_below("http://host/run/", empty) == {}
    assert links_below("http://host/run/", "<html><title>Welcome</title><a href='/login'>log in</a></html>") is None
    assert links_below("http://host/run/", "") is None


@given(
    st.text(max_size=300)
    | st.lists(st.sampled_from(["<a ", "href=", "'", '"', "x/", ">", "<title>", "&#", "%2f"])).map("".join)
)
def test_any_page_is_read_without_failing(page: str) -> None:
    found = links_below("http://host/run/", page)
    assert found is None or all(name and "/" not in name for name in found)
