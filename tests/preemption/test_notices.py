"""The notices of clouds, asked for over servers that answer as theirs do, or as badly as any server can."""

from __future__ import annotations

import json
import logging
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from incckpt.errors import OptionError
from incckpt.preemption.notices import (
    AwsNotices,
    AzureNotices,
    GcpNotices,
    Notice,
    Source,
    Watcher,
    sources_of,
)
from tests.effort import tries
from tests.preemption.clouds import Aws, Azure, Cloud, Gcp, cloud, serving

SOURCES: dict[str, Callable[..., Source]] = {"aws": AwsNotices, "gcp": GcpNotices, "azure": AzureNotices}
EACH = pytest.mark.parametrize("name", SOURCES)
PATIENT = 30  # seconds after which a test is broken; an answer is waited for no longer than that


def polled(source: Source) -> Notice:
    notice = source.poll()
    assert notice is not None, "the notice was not seen"
    return notice


@pytest.fixture
def aws() -> Iterator[Aws]:
    with serving(service := Aws()):
        yield service


@pytest.fixture
def gcp() -> Iterator[Gcp]:
    with serving(service := Gcp()):
        yield service


@pytest.fixture
def azure() -> Iterator[Azure]:
    with serving(service := Azure()):
        yield service


# -- what each cloud says


@EACH
def test_nothing_is_seen_until_it_is_announced(name: str) -> None:
    with cloud(name) as service:
        source = SOURCES[name](service.url, timeout=PATIENT)
        assert not source.answers
        assert source.poll() is None
        assert source.answers
        before = time.time()
        service.announce(30)
        notice = polled(source)
        assert notice.source == name
        assert notice.deadline is not None
        # AWS and Azure say when, to the second; of GCP it is known that nothing was announced when asked before.
        assert before - PATIENT <= notice.deadline - 30 <= time.time()
        assert polled(source) == notice, "the same notice looks like another one when polled again"


def test_aws_says_when(aws: Aws) -> None:
    source = AwsNotices(aws.url, timeout=PATIENT)
    for action in ("terminate", "stop", "hibernate"):
        aws.action = json.dumps({"action": action, "time": "2017-09-18T08:22:00Z"}).encode()
        assert polled(source).deadline == 1505722920.0
    assert [path for method, path in aws.requests if method == "PUT"] == ["/latest/api/token"], "a token per request"


def test_aws_tokens_are_renewed(aws: Aws) -> None:
    source = AwsNotices(aws.url, timeout=PATIENT)
    assert source.poll() is None
    aws.expire()
    aws.announce(120)
    polled(source)
    assert [method for method, _ in aws.requests].count("PUT") == 2


def test_aws_without_version_2(aws: Aws) -> None:
    aws.fault = lambda: (403, b"", {})
    source = AwsNotices(aws.url, timeout=PATIENT)
    assert source.poll() is None
    assert not source.answers


def test_a_rebalance_recommendation_counts_if_asked_for(aws: Aws) -> None:
    aws.rebalance = True
    assert AwsNotices(aws.url, timeout=PATIENT).poll() is None
    source = AwsNotices(aws.url, rebalance=True, timeout=PATIENT)
    notice = polled(source)
    assert notice.deadline is None
    aws.announce(120)
    assert polled(source).deadline is not None, "the recommendation hides the notice that follows it"


def test_gcp_host_maintenance(gcp: Gcp) -> None:
    source = GcpNotices(gcp.url, timeout=PATIENT)
    gcp.values["maintenance-event"] = "MIGRATE_ON_HOST_MAINTENANCE"
    assert source.poll() is None, "a migration ends nothing"
    gcp.values["maintenance-event"] = "TERMINATE_ON_HOST_MAINTENANCE"
    notice = polled(source)
    assert "maintenance" in notice.what
    gcp.announce(30)
    assert "preempted" in polled(source).what


def test_gcp_longer_notice(gcp: Gcp) -> None:
    gcp.announce(120)
    before = time.time()
    notice = polled(GcpNotices(gcp.url, seconds=120, timeout=PATIENT))
    assert notice.deadline is not None
    assert before + 120 <= notice.deadline <= time.time() + 120


def test_gcp_while_this_machines_clock_is_put_back(gcp: Gcp, monkeypatch: pytest.MonkeyPatch) -> None:
    source = GcpNotices(gcp.url, timeout=PATIENT)
    assert source.poll() is None
    now = time.time() - 3600
    monkeypatch.setattr("incckpt.preemption.notices.time.time", lambda: now)
    gcp.announce(30)
    notice = polled(source)
    assert notice.deadline is not None
    assert notice.deadline <= now + 30, "there is no hour left"
    monkeypatch.setattr("incckpt.preemption.notices.time.time", lambda: now + 10)
    assert polled(source) == notice


def test_another_server_at_the_address_is_not_gcp(gcp: Gcp) -> None:
    gcp.flavor = "Other"
    gcp.announce(30)
    source = GcpNotices(gcp.url, timeout=PATIENT)
    assert source.poll() is None
    assert not source.answers


@pytest.mark.parametrize("kind", ["Preempt", "Terminate", "Reboot", "Redeploy"])
def test_azure_events_that_end_the_machine(azure: Azure, kind: str) -> None:
    source = AzureNotices(azure.url, timeout=PATIENT)
    azure.announce(1, "Freeze")
    azure.announce(2, kind, machine="worker_8")
    assert source.poll() is None, "a freeze, or another machine's event"
    azure.announce(300, kind, event="E2")
    azure.announce(100, kind, event="E3", machine="WORKER_7")
    notice = polled(source)
    assert "E3" in notice.what, "not the first event to come"
    azure.begin()
    assert polled(source).deadline == notice.deadline, "the time was forgotten when the event began"


def test_azure_machine_whose_name_is_not_known(azure: Azure) -> None:
    azure.named = False
    azure.announce(300, machine="worker_8")
    assert polled(AzureNotices(azure.url, timeout=PATIENT)).deadline is not None, "it may be this machine"


def test_azure_event_that_began_before_it_was_seen(azure: Azure) -> None:
    azure.announce(300)
    azure.begin()
    assert polled(AzureNotices(azure.url, timeout=PATIENT)).deadline is None


# -- bad answers


@EACH
@pytest.mark.parametrize("status", [301, 401, 404, 429, 500, 503])
def test_errors_of_a_server(name: str, status: int) -> None:
    with cloud(name) as service:
        service.announce(30)
        source = SOURCES[name](service.url, timeout=PATIENT)
        service.fault = lambda: (status, b"", {"Location": "http://127.0.0.1:9/"})
        assert source.poll() is None
        service.fault = None
        polled(source)


@EACH
def test_nobody_answers(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # which nobody listens at
        source = SOURCES[name](f"http://127.0.0.1:{unused.getsockname()[1]}", timeout=PATIENT)
        assert source.poll() is None
    assert not source.answers
    assert not caplog.records


@EACH
def test_slow_answers(name: str) -> None:
    ended = threading.Event()
    with cloud(name) as service:
        service.announce(30)
        source = SOURCES[name](service.url, timeout=0.05)

        def hang() -> bytes:
            ended.wait(PATIENT)
            return b""

        service.fault = hang
        assert source.poll() is None
        ended.set()


def test_an_answer_in_drops() -> None:
    """Each arrives in time, the whole does not: the request ends all the same."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def drip() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)
                try:
                    connection.sendall(b"HTTP/1.1 200 OK\r\nMetadata-Flavor: Google\r\n\r\n")
                    while True:
                        connection.sendall(b"T")
                except OSError:
                    return

        thread = threading.Thread(target=drip)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        assert GcpNotices(url, timeout=0.2).poll() is None
        thread.join(PATIENT)
        assert not thread.is_alive(), "the answer is still being read"


@pytest.mark.parametrize("name", SOURCES)
@given(
    body=st.one_of(
        st.binary(max_size=80),
        st.text(max_size=40).map(str.encode),
        st.recursive(
            st.none() | st.booleans() | st.floats() | st.text(max_size=10),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from(["action", "time", "Events", "EventType", "Resources"]), inner, max_size=4
                )
            ),
        ).map(lambda value: json.dumps(value).encode()),
        st.fixed_dictionaries(
            {},
            optional={
                "EventId": st.integers(),
                "EventType": st.sampled_from(["Preempt", "Freeze", 7]),
                "Resources": st.sampled_from([["worker_7"], [None], "worker_7", 5]),
                "NotBefore": st.sampled_from(["", None, 5, "Mon, 99 Sep 2016", "Mon, 19 Sep 99999 18:29:47 GMT"]),
            },
        ).map(lambda event: json.dumps({"Events": [event, []]}).encode()),
        st.just(b"[" * 100_000),
        st.sampled_from(["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-12:00", 5, None, "soon"]).map(
            lambda when: json.dumps({"action": "stop", "time": when}).encode()
        ),
    ),
    status=st.sampled_from([200, 200, 200, 204, 999]),
    raw=st.booleans(),
)
@settings(max_examples=tries(40), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_garbage_raises_nothing(
    name: str, services: dict[str, Cloud], body: bytes, status: int, raw: bool, caplog: pytest.LogCaptureFixture
) -> None:
    service = services[name]
    source = SOURCES[name](service.url, timeout=PATIENT)
    service.fault = None
    source.poll()  # a token is there
    caplog.clear()
    service.fault = lambda: body if raw else (status, body, {"Metadata-Flavor": "Google"})
    for _ in range(2):
        assert isinstance(source.poll(), Notice | None)
    assert len(caplog.records) <= 1, "logged more than once"
    service.fault = None
    assert source.poll() is None, "it does not recover"


@pytest.fixture(scope="module")
def services() -> Iterator[dict[str, Cloud]]:
    with cloud("aws") as aws, cloud("gcp") as gcp, cloud("azure") as azure:
        yield {"aws": aws, "gcp": gcp, "azure": azure}


# -- watching


class Scripted(Source):
    """Says what it is given, then nothing; notes its polls."""

    def __init__(self, name: str, says: list[Notice | Exception | None], *, answers: bool = True) -> None:
        self.name = name
        self.answers = answers
        self.says = says
        self.polls: queue.SimpleQueue[int] = queue.SimpleQueue()

    def poll(self) -> Notice | None:
        self.polls.put(1)
        said = self.says.pop(0) if self.says else None
        if isinstance(said, Exception):
            raise said
        return said

    def wait(self, polls: int) -> None:
        for _ in range(polls):
            self.polls.get(timeout=PATIENT)


def notice(number: int) -> Notice:
    return Notice("test", float(number), f"notice {number}")


def test_each_notice_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    seen: queue.SimpleQueue[Notice] = queue.SimpleQueue()
    one, two = notice(1), notice(2)
    script: list[Notice | Exception | None] = [None, one, one, ValueError("broken"), ValueError("again"), two, one, two]
    source = Scripted("own", script)

    def on_notice(notice: Notice) -> None:
        seen.put(notice)
        raise KeyError("the callback fails")

    watcher = Watcher([source], on_notice, every=0.001)
    watcher.start()
    source.wait(len(script) + 3)
    watcher.stop()
    assert [seen.get(timeout=PATIENT) for _ in range(2)] == [one, two]
    assert seen.empty()
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [KeyError, ValueError, KeyError]


def test_a_cloud_that_does_not_answer_is_given_up(aws: Aws, caplog: pytest.LogCaptureFixture) -> None:
    with cloud("gcp") as other:
        other.fault = lambda: (404, b"", {})
        seen: queue.SimpleQueue[Notice] = queue.SimpleQueue()
        counter = Scripted("own", [])
        sources = [GcpNotices(other.url, timeout=PATIENT), AwsNotices(aws.url, timeout=PATIENT), counter]
        watcher = Watcher(sources, seen.put, every=0.001)
        watcher.start()
        counter.wait(20)
        assert len(other.requests) == 15 * 2, "asked more, or less, than fifteen times"
        aws.fault = lambda: (500, b"", {})  # one that has answered is never given up
        counter.wait(10)
        aws.fault = None
        aws.announce(120)
        assert seen.get(timeout=PATIENT).source == "aws"
        watcher.stop()
    assert not caplog.records


def test_watching_ends_where_nobody_answers(request: pytest.FixtureRequest) -> None:
    said: queue.SimpleQueue[str] = queue.SimpleQueue()

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.put(record.getMessage())

    logger, handler = logging.getLogger("incckpt.preemption.notices"), Handler()
    logger.addHandler(handler)
    request.addfinalizer(lambda: logger.removeHandler(handler))
    sources = [Scripted("one", [], answers=False), Scripted("two", [], answers=False)]
    Watcher(sources, print, every=0.001).start()
    assert "one, two" in said.get(timeout=PATIENT)
    assert [source.polls.qsize() for source in sources] == [15, 15]


def test_stopping_does_not_wait(aws: Aws) -> None:
    """Neither for the next poll, nor for an answer; and what it says then is not reported."""
    asked, go_on = threading.Event(), threading.Event()
    ended: queue.SimpleQueue[str] = queue.SimpleQueue()

    class Hanging(Source):
        name = "hanging"

        def poll(self) -> Notice | None:
            asked.set()
            go_on.wait(PATIENT)
            ended.put("polled")
            return notice(1)

    watcher = Watcher([Hanging()], lambda notice: ended.put("reported"), every=10_000)
    watcher.start()
    assert asked.wait(PATIENT)
    watcher.stop()
    watcher.stop()
    go_on.set()
    assert ended.get(timeout=PATIENT) == "polled"
    again = Scripted("own", [notice(2)])
    second = Watcher([again], lambda notice: ended.put(notice.what), every=10_000)
    for what in ("notice 2", None):
        second.start()
        again.wait(1)
        if what:
            assert ended.get(timeout=PATIENT) == what
        second.stop()
    assert ended.empty()


# -- options


def test_sources_by_name() -> None:
    assert [source.name for source in sources_of("auto")] == ["aws", "gcp", "azure"]
    assert [source.name for source in sources_of("azure")] == ["azure"]
    assert [source.name for source in sources_of(["gcp", "aws"])] == ["gcp", "aws"]
    assert sources_of(()) == []
    own = Scripted("own", [])
    assert sources_of(own) == [own]
    assert sources_of([own, "aws"])[0] is own


@pytest.mark.parametrize("clouds", ["ec2", "", ["aws", "ec2"], ["auto"], [5], 5, None])
def test_unknown_clouds(clouds: object) -> None:
    with pytest.raises(OptionError, match="clouds must be"):
        sources_of(clouds)  # type: ignore[arg-type]


@pytest.mark.parametrize("url", ["", "169.254.169.254", "https://host", "http://", "http://host:port", "http://[::1"])
def test_unusable_urls(url: str) -> None:
    with pytest.raises(OptionError, match="metadata service"):
        AwsNotices(url)
