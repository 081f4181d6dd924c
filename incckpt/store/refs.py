"""The small documents of a store: refs and their tombstones, pins, condemned lists.

:mod:`incckpt.store.lineage` and ``docs/safety.md`` say what they are for, and in which order to write and read them.
"""

from __future__ import annotations

import enum
import functools
import logging
import operator
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from incckpt.backends.base import Backend, Entry, ReadableBuffer
from incckpt.errors import BackendError, CollectionError, CorruptionError, KeyExistsError, KeyNotFoundError, OptionError
from incckpt.messages import shown
from incckpt.store.document import (
    DOCUMENT_HEAD,
    Fields,
    Json,
    as_mapping,
    decode_metrics,
    dump_document,
    encode_metrics,
    parse_document,
)
from incckpt.store.rereading import reread
from incckpt.store.untrusted import LIST_BYTES, MemoryLimit, fetch

__all__ = [
    "CondemnedLists",
    "Pin",
    "Ref",
    "RefName",
    "Tombstone",
    "checked_step",
    "create_once",
    "exists",
    "inherited_from_json",
    "inherited_to_json",
    "is_stray",
    "lineage_document",
    "list_pins",
    "list_refs",
    "list_twice",
    "new_nonce",
    "run_names",
    "validate_run",
]

log = logging.getLogger(__name__)

_RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+-]{0,127}")
_REF = re.compile(r"([0-9]{6})-([0-9]{12})-([0-9a-f]{16})")
# The second form is that of 0.1, which left a folder behind on a local disk for every list.
_CONDEMNED = re.compile(r"gc/([0-9a-f]{16}(?:\.|/)condemned)")
_MAX_STEP = 10**12 - 1
_COMMIT_TRIES = 4


def new_nonce() -> str:
    """Return 16 random hexadecimal digits that no other save uses."""
    return secrets.token_hex(8)


def validate_run(run: object) -> str:
    """Return `run` if it is a valid name of a run.

    Raises
    ------
    OptionError
        If it is not; names it.
    """
    if not isinstance(run, str) or _RUN.fullmatch(run) is None:
        raise OptionError(
            f"not a run name: {shown(run)} (1 to 128 letters, digits and ._=+-, the first one a letter or a digit)"
        )
    return run


def checked_step(step: object) -> int:
    """Return `step` as an ``int``; it may be of any integer type, also a NumPy scalar or a 0-dim integer tensor.

    Raises
    ------
    OptionError
        If it is not an integer, or out of range.
    """
    boolean = isinstance(step, bool) or str(getattr(step, "dtype", "")).endswith("bool")
    try:
        number = operator.index(step)  # type: ignore[arg-type]  # raises TypeError where it is none
    except (TypeError, ValueError, RuntimeError):
        number = -1
    if boolean or not 0 <= number <= _MAX_STEP:
        raise OptionError(f"step must be an integer from 0 to {_MAX_STEP}, not {shown(step)}")
    return number


class Tombstone(enum.Enum):
    """What can replace a ref at its key. Each has seven bytes, so that the sizes in a listing reveal it."""

    ABORTED = b"ABORTED"  # the commit may not happen any more
    EXPIRED = b"EXPIRED"  # it was committed, and pruned since


_TOMBSTONE_SIZE = 7
_HEAD = max(_TOMBSTONE_SIZE + 1, len(DOCUMENT_HEAD))  # bytes that tell a stray file


@dataclass(frozen=True, slots=True, order=True)
class RefName:
    """The name of a ref: attempt, step and the nonce of the save."""

    attempt: int
    step: int
    nonce: str

    def __str__(self) -> str:
        return f"{self.attempt:06d}-{self.step:012d}-{self.nonce}"

    @staticmethod
    @functools.lru_cache(1 << 14)  # every save meets those of the saves before
    def parse(name: str) -> RefName | None:
        """Return the parts of `name`, or ``None`` if it is not the name of a ref."""
        match = _REF.fullmatch(name)
        return None if match is None else RefName(int(match[1]), int(match[2]), match[3])

    @classmethod
    def new(cls, attempt: int, step: object) -> RefName:
        """Return an unused name."""
        return cls(attempt, checked_step(step), new_nonce())


@dataclass(frozen=True, slots=True)
class Ref:
    """A committed checkpoint.

    Attributes
    ----------
    time
        Seconds since the epoch by the writer's clock.
    manifest, manifest_size
        Key of the manifest object, and its size in bytes.
    nbytes
        Bytes of the state.
    written
        Bytes that the save put into the store: new objects and the manifest.
    """

    name: RefName
    time: float
    metrics: Mapping[str, float]
    manifest: str
    manifest_size: int
    nbytes: int
    written: int

    @property
    def step(self) -> int:
        """The training step."""
        return self.name.step

    def to_json(self) -> bytes:
        """Return the document."""
        return dump_document("ref", self.to_item())

    def to_item(self) -> dict[str, Json]:
        """Return the fields, in the form of a lineage document."""
        return {
            "ref": str(self.name),
            "time": self.time,
            "metrics": encode_metrics(self.metrics),
            "manifest": self.manifest,
            "manifest_size": self.manifest_size,
            "bytes": self.nbytes,
            "written": self.written,
        }

    @classmethod
    def from_json(cls, data: bytes, key: str) -> Ref:
        """Read a ref; `key`, where it was stored, must agree with it.

        Raises
        ------
        CorruptionError, FormatError
        """
        ref = cls.from_item(parse_document(data, "ref", key), key)
        if key.rpartition("/")[2] != str(ref.name):
            raise CorruptionError(f"{key} says that it is {ref.name}")
        return ref

    @classmethod
    def from_item(cls, item: Json, where: str) -> Ref:
        """Reverse `to_item`."""
        fields = Fields(as_mapping(item, where), where)
        name = RefName.parse(fields.string("ref"))
        if name is None:
            raise CorruptionError(f"{where}: not the name of a ref: {shown(item['ref'])}")
        return cls(
            name=name,
            time=fields.number("time"),
            metrics=decode_metrics(item.get("metrics"), where),
            manifest=fields.string("manifest"),
            manifest_size=fields.count("manifest_size"),
            nbytes=fields.count("bytes"),
            written=fields.count("written"),
        )


def lineage_document(attempt: int, inherited: Sequence[Ref | RefName], abandoned: Sequence[Ref | RefName]) -> bytes:
    """Return what an attempt continues, as a document; of names alone if it would be longer than what is read."""
    parts = {"refs": inherited, "abandoned": abandoned}
    fields = {part: [inherited_to_json(ref) for ref in refs] for part, refs in parts.items()}
    document = dump_document("lineage", {"attempt": attempt, **fields})
    if len(document) <= LIST_BYTES:
        return document
    names = {part: [inherited_to_json(getattr(ref, "name", ref)) for ref in refs] for part, refs in parts.items()}
    return dump_document("lineage", {"attempt": attempt, **names})


def inherited_to_json(ref: Ref | RefName) -> Json:
    """Return a ref as a lineage lists it: of one that cannot be read there is only the name."""
    return ref.to_item() if isinstance(ref, Ref) else {"ref": str(ref)}


def inherited_from_json(item: Json, where: str) -> tuple[RefName, Ref | None]:
    """Reverse `inherited_to_json`."""
    fields = as_mapping(item, where)
    if fields.keys() == {"ref"}:
        name = RefName.parse(Fields(fields, where).string("ref"))
        if name is None:
            raise CorruptionError(f"{where}: not the name of a ref: {shown(fields['ref'])}")
        return name, None
    ref = Ref.from_item(fields, where)
    return ref.name, ref


@dataclass(frozen=True, slots=True)
class Pin:
    """A save in flight."""

    run: str
    name: RefName
    modified: float | None

    @property
    def key(self) -> str:
        """The pin's own key."""
        return f"pins/{self.run}/{self.name}"

    @property
    def ref_key(self) -> str:
        """The key of the ref that the pin announces."""
        return f"refs/{self.run}/{self.name}"


def create_once(backend: Backend, key: str, data: ReadableBuffer) -> bytes | None:
    """Create `key` exclusively; after a conflict or a lost reply, read back to learn the outcome.

    Returns
    -------
    bytes or None
        ``None`` if the key now holds `data` (from this request, or from one whose reply was lost), else what it holds.

    Raises
    ------
    BackendError
        If the key was not created and reading back did not explain why; a copy of the request may still arrive.
    """
    for left in reversed(range(_COMMIT_TRIES)):
        try:
            backend.create(key, data)
        except BackendError as error:
            try:
                found = fetch(backend, key)
                if found != bytes(data):
                    found = fetch(backend, key)  # whose value it is decides between success and failure: look twice
            except KeyNotFoundError:
                # Not there: the conflicting value has gone, or the request never arrived. Try again.
                if left == 0 or not (isinstance(error, KeyExistsError) or error.transient):
                    raise error from None
                continue
            return None if found == bytes(data) else found
        return None
    raise AssertionError("unreachable")


def exists(backend: Backend, key: str) -> bool:
    """Return whether a key is there now (one request; another if it seems not to be)."""
    try:
        reread(partial(backend.head, key))
    except KeyNotFoundError:
        return False
    return True


def is_stray(backend: Backend, key: str) -> bool:
    """Whether the file at a key of unknown form is not ours: a ``desktop.ini``, an editor's copy.

    Documents of all versions begin alike, and a tombstone is one of two words. Any other file is ignored, with one
    warning per key.
    """
    try:
        for _ in range(2):  # once it is taken for a stray, it stops no collection any more
            head = reread(lambda: backend.get(key, 0, _HEAD))
            if head.startswith(DOCUMENT_HEAD) or any(head == tombstone.value for tombstone in Tombstone):
                return False
    except KeyNotFoundError:
        return True
    _warn_of_stray(backend.url, key)
    return True


@functools.lru_cache(maxsize=1024)
def _warn_of_stray(url: str, key: str) -> None:
    log.warning("%s/%s is not a file of incckpt; it is ignored", url, key)


def list_twice(backend: Backend, prefix: str) -> Iterator[Entry]:
    """Yield what either of two listings shows, as the later shows it.

    To be used where something is deleted, or left out of a lineage for ever, because it does not show: over a network
    a single answer may be short of entries. Of a local disk it is one listing, by the kernel, which does not guess.
    """
    if not backend.remote:
        return backend.list(prefix)
    seen = {entry.key: entry for entry in backend.list(prefix)}
    seen |= {entry.key: entry for entry in backend.list(prefix)}
    return iter(seen.values())


def list_refs(
    backend: Backend, run: str | None = None, *, twice: bool = False
) -> Iterator[tuple[str, RefName | None, str, bool]]:
    """Yield ``(run, name, key, tombstone)`` of the refs of `run`, or of every run.

    The name is ``None`` where a later version has given it; strays are passed over. For `twice` see `list_twice`.
    """
    prefix = "refs/" if run is None else f"refs/{run}/"
    for entry in list_twice(backend, prefix) if twice else backend.list(prefix):
        _, owner, *rest = entry.key.split("/")
        name = RefName.parse(rest[0]) if len(rest) == 1 else None
        if name is None and is_stray(backend, entry.key):
            continue
        yield owner, name, entry.key, entry.size == _TOMBSTONE_SIZE


def run_names(backend: Backend) -> list[str]:
    """Return the names of a store's runs that have checkpoints, readable or not, in alphabetical order."""
    return sorted({run for run, _, _, tombstone in list_refs(backend) if not tombstone})


def list_pins(backend: Backend, run: str | None = None, *, twice: bool = False) -> list[Pin]:
    """Return the pins of `run`, or of every run. For `twice` see `list_twice`."""
    pins: list[Pin] = []
    prefix = "pins/" if run is None else f"pins/{run}/"
    for entry in list_twice(backend, prefix) if twice else backend.list(prefix):
        _, owner, *rest = entry.key.split("/")
        name = RefName.parse(rest[0]) if len(rest) == 1 else None
        if name is None:
            if is_stray(backend, entry.key):
                continue
            raise CorruptionError(f"not a pin: {entry.key} (written by a later version of incckpt?)")
        pins.append(Pin(owner, name, entry.modified))
    return pins


class CondemnedLists:
    """The lists of keys that collectors are about to delete; no save may use these keys any more.

    A list is put once, under its own nonce, and never changed. So a late copy of the put changes nothing, and each list
    need be read only once.
    """

    def __init__(self, backend: Backend, memory: MemoryLimit | None = None) -> None:
        self._backend = backend
        self._memory = MemoryLimit() if memory is None else memory
        self._known: dict[str, frozenset[str]] = {}

    @staticmethod
    def key(name: str) -> str:
        """Return the key of list `name`."""
        return f"gc/{name}"

    def put(self, keys: Iterable[str]) -> str:
        """Put a list; from then on no writer reuses its keys. Returns its name.

        Raises
        ------
        CollectionError
            If it would be longer than what is read.
        """
        name = f"{new_nonce()}.condemned"
        condemned = frozenset(keys)
        document = dump_document("condemned", {"keys": sorted(condemned)})
        if len(document) > LIST_BYTES:
            raise CollectionError(
                f"{len(condemned):,} objects are too many to collect at once; collect older ones first, with min_age="
            )
        self._backend.put(self.key(name), document)
        self._known[name] = condemned
        return name

    def stands(self, name: str) -> bool:
        """Return whether list `name` is there now (one request)."""
        return exists(self._backend, self.key(name))

    def keys(self, *, twice: bool = False) -> frozenset[str]:
        """Return what is on any list. For `twice` see `list_twice`."""
        return frozenset().union(*self.read(twice=twice).values())

    def read(self, *, twice: bool = False) -> dict[str, frozenset[str]]:
        """Return the lists that there are, by name: one listing, and a request for each that is new.

        Raises
        ------
        CorruptionError, FormatError
            If a list is unreadable, so that it is unknown what it condemns.
        """
        lists: dict[str, frozenset[str]] = {}
        for entry in list_twice(self._backend, "gc/") if twice else self._backend.list("gc/"):
            match = _CONDEMNED.fullmatch(entry.key)
            if match is None:
                if is_stray(self._backend, entry.key):
                    continue
                raise CorruptionError(
                    f"not a condemned list: {entry.key} (written by a later version of incckpt?); nothing can be saved "
                    f"to {self._backend.url} or collected there as long as it stands"
                )
            known = self._known.get(match[1])
            if known is None:
                try:
                    known = reread(partial(self._get, entry.key))
                except KeyNotFoundError:
                    continue  # its collector has finished since the listing
            lists[match[1]] = known
        self._known = lists
        return dict(lists)

    def _get(self, key: str) -> frozenset[str]:
        return self.parse(self._memory.fetch_list(self._backend, key), key)

    @staticmethod
    def parse(data: bytes, key: str) -> frozenset[str]:
        """Return what is on a list.

        Raises
        ------
        CorruptionError, FormatError
        """
        keys = Fields(parse_document(data, "condemned", key), key).list("keys")
        if not all(isinstance(item, str) for item in keys):
            raise CorruptionError(f"{key}: a key is not a string")
        return frozenset(keys)
