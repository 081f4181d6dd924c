"""The notices that clouds publish before they take a machine: where each can be asked for, and a thread that asks."""

from __future__ import annotations

import json
import logging
import queue
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from http.client import HTTPConnection, HTTPException
from typing import Any, ClassVar, TypeAlias
from urllib.parse import urlsplit

from incckpt import threads
from incckpt.errors import OptionError
from incckpt.messages import shown
from incckpt.options import checked_seconds

__all__ = ["AwsNotices", "AzureNotices", "GcpNotices", "Notice", "Source", "Watcher", "sources_of"]

log = logging.getLogger(__name__)

_METADATA = "http://169.254.169.254"  # of all three; to look up a name could take longer than a request may
_LARGEST = 1 << 20  # bytes of an answer
_TRIES = 15  # of a source that has never answered

_TOKEN = re.compile(r"[\x21-\x7e]{1,4096}")


@dataclass(frozen=True)
class Notice:
    """That this machine, or this process, is about to be stopped.

    Attributes
    ----------
    source
        Who says so: ``"aws"``, ``"gcp"``, ``"azure"``, or the name of a signal.
    deadline
        When it goes, by `time.time`; ``None`` if that is not known.
    what
        What will happen, in words.
    """

    source: str
    deadline: float | None
    what: str


class Source(ABC):
    """Where notices come from. A subclass of your own can be watched as well.

    Attributes
    ----------
    name
        Of the source.
    answers
        Whether it has ever answered. One that has not is given up after fifteen polls.
    """

    name: str
    answers: bool = True

    @abstractmethod
    def poll(self) -> Notice | None:
        """Return the notice that stands now; ``None`` if there is none, or nobody answers."""


class _UnusableError(Exception):
    """An answer that cannot be what the service means to say."""


@dataclass(frozen=True)
class _Answer:
    status: int
    flavor: str | None
    body: bytes

    @property
    def text(self) -> str:
        try:
            return self.body.decode().strip()
        except UnicodeDecodeError:
            raise _UnusableError(f"it is no text: {shown(self.body)}") from None

    def json(self) -> dict[str, Any]:
        try:
            found = json.loads(self.body)
        except (ValueError, RecursionError):
            raise _UnusableError(f"it is no JSON: {shown(self.body)}") from None
        if not isinstance(found, dict):
            raise _UnusableError(f"it is no JSON object: {shown(self.body)}")
        return found


class _MetadataService(Source):
    """The service that a cloud lets its machines ask about themselves.

    Parameters
    ----------
    url
        Where it is.
    timeout
        Seconds that an answer may take.

    Raises
    ------
    OptionError
        If the URL is not usable.
    """

    answers = False

    def __init__(self, url: str = _METADATA, *, timeout: float = 1.0) -> None:
        try:
            parts = urlsplit(url)
            usable = parts.scheme == "http" and bool(parts.hostname)
            self._host, self._port, self._path = parts.hostname or "", parts.port or 80, parts.path.rstrip("/")
        except ValueError:
            usable = False
        if not usable:
            raise OptionError(f"the URL of a metadata service is http://host or http://host:port, not {shown(url)}")
        self._timeout = checked_seconds(f"{type(self).__name__}: timeout", timeout, positive=True)
        self._complained = False

    def poll(self) -> Notice | None:
        try:
            return self._poll()
        except _UnusableError as error:
            if not self._complained:
                self._complained = True
                log.warning(
                    "the metadata service of %s gave an answer that cannot be used, so a notice may be missed (further "
                    "ones are not logged): %s",
                    self.name,
                    error,
                )
        return None

    @abstractmethod
    def _poll(self) -> Notice | None:
        """Do what `poll` does, or raise `_UnusableError`."""

    def _ask(self, path: str, headers: dict[str, str], method: str = "GET") -> _Answer | None:
        """Return the answer to a request; ``None`` if there is none in time. Proxies and redirects are not followed."""
        end = time.monotonic() + self._timeout
        connection = HTTPConnection(self._host, self._port, timeout=self._timeout)
        try:
            connection.request(method, self._path + path, headers=headers)
            with connection.getresponse() as response:
                body = b""
                while len(body) < _LARGEST and time.monotonic() < end and (part := response.read1(_LARGEST)):
                    body += part
                if time.monotonic() >= end:  # it came in drops, and there may be more
                    return None
                return _Answer(response.status, response.headers.get("Metadata-Flavor"), body)
        except (OSError, HTTPException):
            return None
        finally:
            connection.close()


class AwsNotices(_MetadataService):
    """Notices of EC2: two minutes before a spot instance is taken.

    Parameters
    ----------
    url, timeout
        Of the metadata service.
    rebalance
        Whether a rebalance recommendation counts, too: it says that the risk is high, often earlier, but not when.
    """

    name = "aws"
    _ACTIONS: ClassVar = {"terminate": "terminated", "stop": "stopped", "hibernate": "hibernated"}

    def __init__(self, url: str = _METADATA, *, rebalance: bool = False, timeout: float = 1.0) -> None:
        super().__init__(url, timeout=timeout)
        self._rebalance = rebalance
        self._token: str | None = None

    def _poll(self) -> Notice | None:
        answer = self._get("/latest/meta-data/spot/instance-action")
        if answer is not None:
            found = answer.json()
            action, when = found.get("action"), found.get("time")
            if not isinstance(action, str) or action not in self._ACTIONS:
                raise _UnusableError(f"an unknown action: {shown(action)}")
            return Notice(self.name, _moment(when), f"AWS: this instance is to be {self._ACTIONS[action]} at {when}")
        if self._rebalance and self._get("/latest/meta-data/events/recommendations/rebalance") is not None:
            return Notice(self.name, None, "AWS: this instance is at a high risk of being interrupted")
        return None

    def _get(self, path: str) -> _Answer | None:
        """Return the answer to a request with a token; ``None`` if there is nothing at the path."""
        answer = self._ask_with_token(path)
        if answer is not None and answer.status == 401:
            self._token = None  # it has expired, or is another machine's, where this one is a copy
            answer = self._ask_with_token(path)
        if answer is not None and answer.status in (200, 404):
            self.answers = True
        return answer if answer is not None and answer.status == 200 else None

    def _ask_with_token(self, path: str) -> _Answer | None:
        if self._token is None:
            self._token = self._new_token()
        return None if self._token is None else self._ask(path, {"X-aws-ec2-metadata-token": self._token})

    def _new_token(self) -> str | None:
        answer = self._ask("/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "21600"}, "PUT")
        if answer is None or answer.status != 200:
            return None
        if _TOKEN.fullmatch(answer.text) is None:
            raise _UnusableError(f"it is no token: {shown(answer.body)}")
        return answer.text


class GcpNotices(_MetadataService):
    """Notices of Compute Engine: that the instance is being preempted, or will be stopped for host maintenance.

    It does not say when. What is certain is counted from the last answer that said otherwise.

    Parameters
    ----------
    url, timeout
        Of the metadata service.
    seconds
        Between a preemption's notice and the end: 30, unless the instance was made with a longer notice.
    """

    name = "gcp"
    _MAINTENANCE = 60.0  # seconds; a machine with GPUs has an hour

    def __init__(self, url: str = _METADATA, *, seconds: float = 30.0, timeout: float = 1.0) -> None:
        super().__init__(url, timeout=timeout)
        self._notices = {
            "preempted": (
                "TRUE",
                checked_seconds("GcpNotices: seconds", seconds),
                "GCP: this instance is being preempted",
            ),
            "maintenance-event": (
                "TERMINATE_ON_HOST_MAINTENANCE",
                self._MAINTENANCE,
                "GCP: this instance is to be stopped for host maintenance",
            ),
        }
        self._calm: dict[str, float] = {}  # by path, when it last announced nothing

    def _poll(self) -> Notice | None:
        for path, (announced, seconds, what) in self._notices.items():
            now = time.time()
            answer = self._ask(f"/computeMetadata/v1/instance/{path}", {"Metadata-Flavor": "Google"})
            if answer is None or answer.flavor != "Google":  # somebody else's server
                continue
            self.answers = True
            if answer.status != 200:
                continue
            if answer.text == announced:
                calm = self._calm[path] = min(now, self._calm.get(path, now))  # the clock may have been put back
                return Notice(self.name, calm + seconds, what)
            self._calm[path] = now
        return None


class AzureNotices(_MetadataService):
    """Scheduled events of Azure that end what runs on this machine; a freeze does not.

    Parameters
    ----------
    url, timeout
        Of the metadata service.
    """

    name = "azure"
    _ENDS: ClassVar = {"Preempt": "preempted", "Terminate": "deleted", "Reboot": "rebooted", "Redeploy": "redeployed"}
    _HEADERS: ClassVar = {"Metadata": "true"}

    def __init__(self, url: str = _METADATA, *, timeout: float = 1.0) -> None:
        super().__init__(url, timeout=timeout)
        self._machine: str | None = None
        self._deadlines: dict[str, float] = {}  # by event

    def _poll(self) -> Notice | None:
        if (
            self._machine is None
        ):  # this answers at once; events are only listed minutes after they were first asked for
            path = "/metadata/instance/compute/name?api-version=2020-09-01&format=text"
            answer = self._ask(path, self._HEADERS)
            if answer is not None and answer.status == 200 and _TOKEN.fullmatch(answer.text):
                self._machine = answer.text
                self.answers = True
        answer = self._ask("/metadata/scheduledevents?api-version=2020-07-01", self._HEADERS)
        if answer is None or answer.status != 200:
            return None
        events = answer.json().get("Events")
        if not isinstance(events, list):
            raise _UnusableError(f"it lists no events: {shown(answer.body)}")
        self.answers = True
        notices = [self._notice(event) for event in events if self._ends_this(event)]
        return min(notices, key=lambda notice: notice.deadline or 0.0, default=None)

    def _ends_this(self, event: Any) -> bool:
        """Whether an event ends this machine: all machines of a set are told of each other's."""
        if not isinstance(event, dict) or not isinstance(event.get("Resources", []), list):
            raise _UnusableError(f"it is no event: {shown(event)}")
        if str(event.get("EventType")) not in self._ENDS:
            return False
        names = [str(name).casefold() for name in event.get("Resources", [])]
        return self._machine is None or self._machine.casefold() in names

    def _notice(self, event: dict[str, Any]) -> Notice:
        name, when = str(event.get("EventId")), event.get("NotBefore")
        if when:  # once the event has begun, it says nothing
            self._deadlines[name] = _moment(when)
        what = f"Azure: this machine is to be {self._ENDS[event['EventType']]} (event {name})"
        return Notice(self.name, self._deadlines.get(name), what)


def _moment(text: object) -> float:
    """Return the seconds since the epoch that a service writes as ISO 8601 or as in HTTP headers, in UTC."""
    if isinstance(text, str):
        for parse in (datetime.fromisoformat, parsedate_to_datetime):
            try:
                found = parse(text)
                return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
            except (ValueError, OverflowError):
                continue
    raise _UnusableError(f"it is no time: {shown(text)}")


_Stops: TypeAlias = "queue.SimpleQueue[None]"  # written in C: the main thread may use it, see `incckpt.threads`


class Watcher:
    """Polls sources in a thread, which does not keep the interpreter from ending.

    Parameters
    ----------
    sources
        Those that have never answered are given up after fifteen polls.
    on_notice
        Is called in that thread, once with each notice.
    every
        Seconds between polls.
    """

    def __init__(self, sources: Iterable[Source], on_notice: Callable[[Notice], object], every: float = 1.0) -> None:
        self._sources = tuple(sources)
        self._on_notice = on_notice
        self._every = every
        self._seen: set[Notice] = set()
        self._stops: _Stops = queue.SimpleQueue()

    def start(self) -> None:
        """Begin to watch."""
        self._stops = queue.SimpleQueue()  # a thread that was told to stop may still be waiting for an answer
        try:
            threads.start(partial(self._watch, self._stops), "incckpt-notices")
        except RuntimeError as error:
            log.warning("notices of %s are not watched: no thread can be started (%s)", _names(self._sources), error)

    def stop(self) -> None:
        """Watch no more. Nothing is reported from now on; a request under way ends by itself."""
        self._stops.put(None)

    def _watch(self, stops: _Stops) -> None:
        sources, failing = list(self._sources), set[str]()
        polls = 0
        while sources:
            polls += 1
            for source in tuple(sources):
                notice = self._polled(source, failing)
                if not stops.empty():
                    return
                if notice is not None and notice not in self._seen:
                    self._seen.add(notice)
                    self._report(notice)
                elif polls >= _TRIES and not source.answers:
                    sources.remove(source)
                    self._given_up(source, sources)
            try:
                stops.get(timeout=self._every)
            except queue.Empty:
                continue
            return

    def _polled(self, source: Source, failing: set[str]) -> Notice | None:
        try:
            return source.poll()
        except Exception:  # a source of the user's own: the others are still to be watched
            if source.name not in failing:
                failing.add(source.name)
                log.exception(
                    "looking for notices of %s failed; it goes on, and further failures are not logged", source.name
                )
            return None

    def _report(self, notice: Notice) -> None:
        try:
            self._on_notice(notice)
        except Exception:
            log.exception("what was to be done about a notice failed (%s)", notice.what)

    def _given_up(self, source: Source, left: Sequence[Source]) -> None:
        if left:
            log.debug("%s has no metadata service here; the others are watched", source.name)
            return
        log.warning(
            "no metadata service of %s answers, so no notice is looked for any more. On EC2, a container needs a hop "
            "limit of 2",
            _names(self._sources),
        )


def _names(sources: Iterable[Source]) -> str:
    return ", ".join(source.name for source in sources)


_CLOUDS: dict[str, Callable[[], Source]] = {"aws": AwsNotices, "gcp": GcpNotices, "azure": AzureNotices}


def sources_of(clouds: str | Source | Iterable[str | Source]) -> list[Source]:
    """Return the sources that an option names: ``"auto"`` for those of all clouds, names, or sources themselves.

    Raises
    ------
    OptionError
        If there is no such cloud.
    """
    if clouds == "auto":
        return [make() for make in _CLOUDS.values()]
    try:
        chosen = [clouds] if isinstance(clouds, (str, Source)) else list(clouds)
    except TypeError:
        chosen = [str(clouds)]
    sources: list[Source] = []
    for one in chosen:
        make = None if isinstance(one, Source) else _CLOUDS.get(str(one))
        if isinstance(one, Source):
            sources.append(one)
        elif make is not None:
            sources.append(make())
        else:
            raise OptionError(
                f"clouds must be 'auto', some of {', '.join(map(repr, _CLOUDS))}, or sources; not {shown(one)}"
            )
    return sources
