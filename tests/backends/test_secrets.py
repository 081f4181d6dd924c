"""Passwords, signatures and tokens appear in no message, traceback, repr or log, whatever fails."""

from __future__ import annotations

import errno
import logging
import traceback
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import incckpt
from incckpt.backends.base import Backend, Entry, redact
from incckpt.backends.memory import MemoryBackend
from incckpt.backends.registry import open_backend
from incckpt.backends.retry import RetryBackend
from incckpt.backends.secrets import HidingBackend, Secrets
from incckpt.backends.wrapper import WrapperBackend
from incckpt.errors import BackendError, IncckptError, KeyNotFoundError
from incckpt.store.location import locate
from tests.effort import tries

MARK = "hunter2"  # is in every part of every secret


def secret_texts(specials: str = "") -> st.SearchStrategy[str]:
    """Draw secrets: parts that hold the mark, with special characters between them."""
    parts = st.text("abcXYZ019", max_size=3).map(lambda text: text + MARK)
    if not specials:
        return parts
    return st.lists(st.tuples(parts, st.sampled_from(specials)), min_size=1, max_size=3).map(
        lambda found: "".join(part + special for part, special in found)[:-1]
    )


@st.composite
def urls(draw: st.DrawFn) -> str:
    """Draw URLs with secrets in them, well-formed or not."""
    scheme = draw(st.sampled_from(["s3", "gs", "https", "http", "sftp", "ftp", "webdav", "S3"]))
    user = draw(st.sampled_from(["", "user", "user:", MARK, "user:80"]))
    password = draw(secret_texts("/@#?:%"))
    if draw(st.booleans()):
        password = quote(password, safe=draw(st.sampled_from(["", "/", "@"])))
    authority = f"{user}:{password}@" if draw(st.integers(0, 5)) else ""
    host = draw(st.sampled_from(["host", "127.0.0.1:1", "[::1]:1", "h.example"]))
    path = draw(st.sampled_from(["", "/", "/x/y"]))
    query = draw(st.sampled_from(["", f"?sig={MARK}", f"?a=b&token={MARK}%2F{MARK}", f"?{MARK}"]))
    fragment = draw(st.sampled_from(["", "#run@5", "#@latest", "#", "#r@bad", "#bad run", "#@", "#run@1@2", "#a/b"]))
    return f"{scheme}://{authority}{host}{path}{query}{fragment}"


def everything_of(error: BaseException) -> str:
    """Return all that can be seen of an error."""
    text = "".join(traceback.format_exception(error))
    pending: list[BaseException] = [error]
    while pending:
        one = pending.pop()
        text += f"{one} {one!r} {one.args!r} {getattr(one, '__notes__', '')} {getattr(one, 'filename', '')}"
        pending += [other for other in (one.__cause__, one.__context__) if other is not None]
    return text


def attempted(action: Callable[[], Any]) -> Any:
    """Return what an action gives, or the error of incckpt's that it raises."""
    try:
        return action()
    except IncckptError as error:
        return error


@pytest.mark.slow
@settings(deadline=None, max_examples=tries(300))
@given(urls())
def test_a_url_in_a_message_has_no_secret(url: str) -> None:
    assert MARK not in redact(url)
    outcome = attempted(lambda: locate(url))
    if isinstance(outcome, IncckptError):
        assert MARK not in everything_of(outcome)
    else:
        assert MARK not in redact(outcome.store)


@pytest.mark.slow
@settings(deadline=None, max_examples=tries(50), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(url=urls(), option=st.sampled_from(["run", "step", "threads", "nonsense"]))
def test_calls_that_fail_before_a_request(url: str, option: str, caplog: pytest.LogCaptureFixture) -> None:
    bad: dict[str, Any] = {"run": "no run", "step": "no step", "threads": 0, "nonsense": None}
    calls: list[Callable[[], Any]] = [
        lambda: incckpt.CheckpointManager(url + "#no run"),
        lambda: incckpt.load(url, **({option: bad[option]} if option in ("run", "step") else {"step": "no step"})),
        lambda: incckpt.collect(url + "#run"),
        lambda: incckpt.save({}, url, step=-1),
        lambda: incckpt.load(url, storage_options={"client_kwargs": MARK, "x": MARK}, step="no step"),
    ]
    for call in calls:
        outcome = attempted(call)
        assert isinstance(outcome, IncckptError)
        assert MARK not in everything_of(outcome)
    assert MARK not in caplog.text


class Leaking(WrapperBackend):
    """Fails in every call as a library does that shows what it was given."""

    def __init__(self, error: Callable[[], Exception]) -> None:
        super().__init__(MemoryBackend("leaking"))
        self.remote = True
        self._make = error

    def _fail(self, *arguments: Any, **named: Any) -> Any:
        try:
            try:
                raise ValueError(f"inner {self._make()}")
            except ValueError as inner:
                raise self._make() from inner
        except Exception as error:
            raise BackendError(errno.EIO, f"cannot: {error}", transient=True) from error

    get = put = create = delete = head = probe_exclusive = get_into = put_many = leftovers = _fail

    def list(self, prefix: str = "") -> Iterator[Entry]:
        yield Entry("a", 1, None)
        self._fail()


class LibraryError(Exception):
    """Shows what is not in its arguments, as those of aiohttp and of Azure's client do."""

    def __init__(self, shown: str) -> None:
        super().__init__()
        self.shown = shown

    def __str__(self) -> str:
        return self.shown


@pytest.mark.slow
@settings(deadline=None, max_examples=tries(40), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    password=secret_texts("/@#?:%+ é"),
    kind=st.sampled_from([ValueError, LibraryError, OSError]),
    form=st.sampled_from([str, quote, lambda text: quote(text, safe=""), repr]),
    where=st.sampled_from(["url", "query", "option", "header"]),
)
def test_what_a_library_shows_is_hidden(
    password: str, kind: type[Exception], form: Callable[[str], str], where: str, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {}
    url = f"https://user:{quote(password, safe='')}@host/x"
    if where == "query":
        url = f"https://host/x?sig={quote(password, safe='')}"
    elif where != "url":
        url = "s3://bucket/x"
        options = {"secret": password} if where == "option" else {"client_kwargs": {"headers": {"X-Key": password}}}
    hiding = HidingBackend(Leaking(lambda: kind(f"https://host: {form(password)}")), Secrets(url, options))
    backend = RetryBackend(hiding, limit=0.0, first_limit=0.0)
    calls: list[Callable[[Backend], Any]] = [
        lambda backend: backend.get("a"),
        lambda backend: backend.get_into("a", []),
        lambda backend: backend.put("a", b""),
        lambda backend: backend.create("a", b""),
        lambda backend: backend.delete(["a"]),
        lambda backend: backend.head("a"),
        lambda backend: list(backend.list()),
        lambda backend: list(backend.leftovers()),
        lambda backend: backend.probe_exclusive(),
    ]
    with caplog.at_level(logging.DEBUG):
        for call in calls:
            with pytest.raises(BackendError, match="cannot") as raised:
                call(backend)
            assert MARK not in everything_of(raised.value)
            assert raised.value.transient
            assert "https://host" in str(raised.value), "only the secret is hidden"
    assert MARK not in caplog.text


def test_what_shows_nothing_is_left_as_it_is() -> None:
    inner = MemoryBackend("nothing")
    backend = HidingBackend(inner, Secrets("s3://bucket/x", {"key": "AKIA1234", "region_name": "eu-west-1"}))
    with pytest.raises(KeyNotFoundError, match="no key 'a'") as raised:
        backend.get("a")
    assert raised.value.__traceback__ is not None
    assert Secrets("", {"key": "AKIA1234", "region_name": "eu-west-1"}).hide("AKIA1234 eu-west-1") == "… eu-west-1"
    assert not Secrets("abfss://box@account.dfs.core.windows.net/run", {"endpoint_url": "http://localhost:9000"})


@pytest.mark.parametrize("url", ["gs://bucket/x", "az://box/x", "s3://bucket/x", "sftp://user:hunter2@127.0.0.1:1/x"])
def test_options_that_a_library_refuses(url: str) -> None:
    pytest.importorskip("gcsfs")
    options = {"token": MARK, "secret": {"deep": [MARK]}, "account_key": MARK, "nonsense": MARK}
    with pytest.raises((IncckptError, ImportError, TypeError)) as raised, open_backend(url, options) as backend:
        backend.inner.get("a")  # type: ignore[attr-defined]  # without repeating
    assert MARK not in everything_of(raised.value)


# ---- redirects ---------------------------------------------------------------------------------------------------


@pytest.fixture
def two_servers() -> Iterator[tuple[str, str, list[dict[str, str]]]]:
    """Give the URLs of a server that redirects to another one, and the headers that the other was sent."""
    pytest.importorskip("aiohttp")
    seen: list[dict[str, str]] = []

    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(dict(self.headers))
            self.send_response(200)
            self.send_header("Content-Length", "5")
            self.end_headers()
            self.wfile.write(b"value")

        def log_message(self, *arguments: object) -> None:
            """Say nothing."""

    other = ThreadingHTTPServer(("127.0.0.1", 0), Other)

    class First(Other):
        def do_GET(self) -> None:
            if self.path.startswith("/same/") and "moved" not in self.path:
                self.send_response(302)
                self.send_header("Location", self.path.replace("/same/", "/same/moved/"))
            elif self.path.startswith("/round"):
                self.send_response(302)
                self.send_header("Location", self.path)
            elif "moved" in self.path:
                return super().do_GET()
            else:
                self.send_response(307)
                self.send_header("Location", f"http://127.0.0.1:{other.server_port}{self.path}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None

    first = ThreadingHTTPServer(("127.0.0.1", 0), First)
    for server in (first, other):
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"127.0.0.1:{first.server_port}", f"127.0.0.1:{other.server_port}", seen
    for server in (first, other):
        server.shutdown()
        server.server_close()


@pytest.mark.server
@pytest.mark.parametrize(
    ("user", "query", "options"),
    [
        ("", "", {"client_kwargs": {"headers": {"X-Api-Key": MARK}}}),
        (f"user:{MARK}@", "", {}),
        ("", f"?sig={MARK}", {}),
    ],
)
def test_a_redirect_to_another_server_takes_no_credentials_along(
    two_servers: tuple[str, str, list[dict[str, str]]], user: str, query: str, options: dict[str, Any]
) -> None:
    first, _, seen = two_servers
    with open_backend(f"http://{user}{first}/x{query}", options) as backend:
        with pytest.raises(BackendError, match=r"redirects to http://127.0.0.1, which is not sent the cred") as raised:
            backend.get("a")
        assert MARK not in everything_of(raised.value)
    assert seen == []
    with open_backend(f"http://{user}{first}/same{query}", options) as backend:
        assert backend.get("a") == b"value"
    assert MARK in str(seen) or query or user


@pytest.mark.server
def test_a_redirect_without_credentials_is_followed(two_servers: tuple[str, str, list[dict[str, str]]]) -> None:
    first, _, seen = two_servers
    with open_backend(f"http://{first}/x") as backend:
        assert backend.get("a") == b"value"
        assert backend.get("a", 1, 3) == b"al"
    assert len(seen) == 2
    with (
        open_backend(f"http://{first}/round") as backend,
        pytest.raises(BackendError, match="more than 5 redirects"),
    ):
        backend.get("a")
