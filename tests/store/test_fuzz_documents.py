"""Documents and their names, damaged in every way: a clean error each time, and nothing good is deleted.

A store with two runs, deltas, a tombstone, a pin and a condemned list is damaged in one place, and then used in every
way: listed, restored, verified, saved to, pruned and swept. INCCKPT_FUZZ says how many times.
"""

from __future__ import annotations

import copy
import json
import os
import random
import uuid
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch

import incckpt
from incckpt.backends.base import Backend, ReadableBuffer
from incckpt.backends.memory import MemoryBackend
from incckpt.backends.wrapper import WrapperBackend
from incckpt.codec import objects as codec
from incckpt.errors import IncckptError
from incckpt.run.verify import verify
from incckpt.store.document import dump_document, parse_document
from incckpt.store.gc import Collector
from incckpt.store.manifest import Manifest
from incckpt.store.objects import DELTAS, OBJECTS, ObjectKey, manifest_keys
from incckpt.store.refs import CondemnedLists, Ref, RefName, list_refs
from incckpt.store.store import Store

pytestmark = pytest.mark.slow

ROUNDS = int(os.environ.get("INCCKPT_FUZZ", "10000")) // 250
RUNS = ("default", "other")


def state_at(step: int) -> dict[str, torch.Tensor]:
    """Return what is saved as `step`."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(3000, generator=generator)
    return {"w": weights * (1 + step / 1000), "frozen": torch.arange(50), "step": torch.tensor(step)}


@cache
def sound_store() -> dict[str, bytes]:
    """Return a store's contents by key."""
    backend = MemoryBackend(uuid.uuid4().hex)
    for run in RUNS:
        with incckpt.CheckpointManager(backend, run=run, threads=1) as manager:
            for step in (1, 2, 3):
                manager.save(step, state_at(step), metrics={"loss": 1 / step}).result()
    with incckpt.CheckpointManager(backend, threads=1) as manager:
        manager.restore({"w": torch.zeros(3000), "frozen": torch.zeros(50, dtype=torch.int64), "step": torch.tensor(0)})
        manager.restore(state_at(0), step=2)
        manager.save(5, state_at(5), metrics={"loss": 0.1}).result()
    store = Store(backend)
    store.run("other").pin(RefName(1, 4, "0123456789abcdef"))
    CondemnedLists(backend).put([f"{OBJECTS}ab/{'c' * 62}.{'0' * 16}"])
    found = {entry.key: backend.get(entry.key) for entry in backend.list()}
    assert any(key.startswith(DELTAS) for key in found)
    return found


@cache
def needs() -> dict[str, frozenset[str]]:
    """Return what every ref of the sound store needs, by the ref's key."""
    store = Store(filled(sound_store()))
    found: dict[str, frozenset[str]] = {}
    for run, name, key, _ in list_refs(store.backend):
        assert name is not None
        ref = store.run(run).read(name)
        if not isinstance(ref, Ref):
            continue
        found[key] = manifest_keys(store.manifest(ref)) | {ref.manifest}
    return found


def filled(contents: dict[str, bytes]) -> MemoryBackend:
    """Return a new store of these contents."""
    backend = MemoryBackend(uuid.uuid4().hex)
    for key, data in contents.items():
        backend.put(key, data)
    return backend


class Watched(WrapperBackend):
    """Notes what is deleted. What is no key at all, the inner backend refuses with a bare `ValueError`."""

    def __init__(self, inner: Backend) -> None:
        super().__init__(inner)
        self.lost: set[str] = set()

    def delete(self, keys: Any) -> None:
        """Delete, and note."""
        listed = list(keys)
        self.lost.update(listed)
        super().delete(listed)

    def put(self, key: str, data: ReadableBuffer) -> None:
        """Put, and note what is written over."""
        if key.startswith((OBJECTS, DELTAS)):
            assert not any(entry.key == key for entry in self.inner.list(key)), f"{key} was put twice"
        super().put(key, data)


# ---- damage ----------------------------------------------------------------------------------------------------------

Damage = Callable[[dict[str, bytes], str, random.Random], None]


def of_bytes(contents: dict[str, bytes], key: str, chance: random.Random) -> None:
    """Damage a value as storage may."""
    data = bytearray(contents[key])
    for _ in range(chance.randint(1, 3)):
        at, length = chance.randrange(len(data) + 1), chance.randint(1, 40)
        match chance.randrange(6):
            case 0 if at < len(data):
                data[at] ^= 1 << chance.randrange(8)
            case 1:
                del data[at:]
            case 2:
                data[at:at] = chance.randbytes(length)
            case 3:
                del data[at : at + length]
            case 4:
                other = contents[chance.choice(sorted(contents))]
                data[at : at + length] = other[at : at + length]
            case _:
                data[:] = chance.choice([b"", b"{}", b"ABORTED", b"EXPIRED", b"DAMAGED", b"null", b"[" * 100_000])
    contents[key] = bytes(data)


def of_a_value(contents: dict[str, bytes], key: str, chance: random.Random) -> None:
    """Change a document as faulty software might, with its checksum, and a manifest's digests, right."""
    if key.startswith((OBJECTS, DELTAS)):
        manifest = manifest_of(contents[key])
        if manifest is None:
            of_bytes(contents, key, chance)
            return
        changed = changed_document(manifest, chance)
        digest = codec.digest(changed)
        data = codec.encode_document(changed, digest=digest)
        new = str(ObjectKey(digest.identity.hex(), ObjectKey.parse(key).nonce))
        for ref_key in [other for other in contents if other.startswith("refs/") and len(contents[other]) > 7]:
            ref = parse_document(contents[ref_key], "ref", ref_key)
            if ref["manifest"] == key:
                fields = {name: value for name, value in ref.items() if name not in ("format", "kind", "check")}
                contents[ref_key] = dump_document("ref", fields | {"manifest": new, "manifest_size": len(data)})
        contents[new] = data
    elif contents[key].startswith(b"{"):
        contents[key] = changed_document(contents[key], chance)
    else:
        of_bytes(contents, key, chance)


def manifest_of(data: bytes) -> bytes | None:
    """Return the document in an object, if it is a manifest."""
    header = codec.read_header(data)
    if header.base is not None:
        return None
    document = codec.decode_document(data, 1 << 30)
    return document if document.startswith(b'{"format":1,"kind":"manifest"') else None


ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    2**70,
    1e308,
    "",
    "x",
    "../../etc/passwd",
    "objects/../x",
    "/",
    [],
    {},
    "nan",
    [[]],
]


def changed_document(data: bytes, chance: random.Random) -> bytes:
    """Return a document of other contents."""
    document = json.loads(data)
    kind = document.pop("kind")
    for name in ("format", "check"):
        document.pop(name)
    for _ in range(chance.randint(1, 3)):
        place = chance.choice(list(places(document)))
        if chance.random() < 0.2 and isinstance(place[0], dict):
            del place[0][place[1]]
        elif chance.random() < 0.2:
            place[0][place[1]] = copy.deepcopy(chance.choice([value[0][value[1]] for value in places(document)]))
        else:
            place[0][place[1]] = copy.deepcopy(chance.choice(ODD))
        if not list(places(document)):
            break
    return dump_document(kind, document)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every container and key in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from places(inner)


def of_the_name(contents: dict[str, bytes], key: str, chance: random.Random) -> None:
    """Put a document under a name that a later version, another tool or no program would give it."""
    folder, _, name = key.rpartition("/")
    data = contents.pop(key) if chance.random() < 0.5 else contents[key]
    at = chance.randrange(len(name))
    other = chance.choice(
        [name[:at], name + "0", name[:at] + "x" + name[at + 1 :], "x", name.upper(), f"sub/{name}", f"{name}.from"]
    )
    contents[f"{folder}/{other or 'y'}".lstrip("/")] = data


DAMAGES: list[Damage] = [of_bytes, of_a_value, of_the_name]


# ---- use -------------------------------------------------------------------------------------------------------------


def attempted(action: Callable[[], Any]) -> Any:
    """Return what an action gives, or the project's own error; anything else is a failure."""
    try:
        return action()
    except IncckptError as error:
        return error


def read_everything(backend: Backend) -> None:
    """List, load and verify."""
    for run in RUNS:
        with incckpt.CheckpointManager(backend, run=run, read_only=True) as reader:
            attempted(lambda: reader.checkpoints(abandoned=True))
        for step in (1, 2, 3, 5):
            attempted(lambda: incckpt.load(backend, run=run, step=step, progress=False))  # noqa: B023
    attempted(lambda: verify(backend))


def save_and_prune(backend: Backend, run: str) -> None:
    """Go on with a run, and prune what was there."""

    def go_on() -> None:
        with incckpt.CheckpointManager(backend, run=run, keep_last_n=2, threads=1) as manager:
            manager.restore(state_at(0))
            for step in (6, 7):
                manager.save(step, state_at(step)).result()

    attempted(go_on)


def check(contents: dict[str, bytes], damaged: str, backend: Watched) -> None:
    """Check that all is there that the checkpoints which are neither damaged nor pruned need."""
    for ref_key, needed in needs().items():
        touched = damaged in needed or damaged == ref_key
        standing = any(entry.key == ref_key and entry.size > 7 for entry in backend.inner.list(ref_key))
        if standing and not touched:
            assert not backend.lost & needed, f"{ref_key} stands, and lost {sorted(backend.lost & needed)[:3]}"
    # A ref that is unreadable is never taken for one that needs nothing.
    if damaged.startswith("refs/") and attempted(lambda: read_ref(backend, damaged)) is not None:
        assert not backend.lost & needs().get(damaged, frozenset()) or pruned(backend, damaged)


def read_ref(backend: Backend, key: str) -> IncckptError | None:
    """Return why a ref cannot be read."""
    _, run, text = key.split("/")
    name = RefName.parse(text)
    assert name is not None
    outcome = attempted(lambda: Store(backend).run(run).read(name))
    return outcome if isinstance(outcome, IncckptError) else None


def pruned(backend: Backend, key: str) -> bool:
    """Say whether a ref is a tombstone now, or gone."""
    found = [entry for entry in backend.list(key) if entry.key == key]
    return not found or found[0].size == 7


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_a_clean_error_and_deletes_nothing_good(damage: Damage) -> None:
    chance = random.Random(ROUNDS)
    sound = sound_store()
    for _ in range(ROUNDS):
        contents = dict(sound)
        documents = [key for key in contents if not key.startswith((OBJECTS, DELTAS)) or manifest_of(contents[key])]
        key = chance.choice(documents)
        damage(contents, key, chance)
        backend = Watched(filled(contents))
        uses: list[Callable[[], Any]] = [
            lambda: read_everything(backend),  # noqa: B023 -- called at once
            lambda: save_and_prune(backend, chance.choice(RUNS)),  # noqa: B023
            lambda: attempted(lambda: Collector(Store(backend)).sweep()),  # noqa: B023
        ]
        for use in chance.sample(uses, 2):
            try:
                use()
                check(contents, key, backend)
            except Exception as error:
                raise AssertionError(f"{damage.__name__} of {key}: {contents.get(key)!r:.400}") from error
        backend.inner.delete([entry.key for entry in backend.list()])  # it would stay in memory


@pytest.mark.parametrize("kind", ["manifest", "ref", "lineage", "condemned", "store"])
def test_documents_alone(kind: str) -> None:
    chance = random.Random(kind)
    sound = [
        (key, manifest_of(data) if key.startswith(OBJECTS) else data)
        for key, data in sound_store().items()
        if not key.startswith(DELTAS)
    ]
    texts = [(key, text) for key, text in sound if text and f'"kind":"{kind}"'.encode() in text[:60]]
    assert texts
    reading: dict[str, Callable[[bytes, str], Any]] = {
        "manifest": Manifest.from_json,
        "ref": Ref.from_json,
        "lineage": lambda data, key: parse_document(data, "lineage", key),
        "condemned": CondemnedLists.parse,
        "store": lambda data, key: parse_document(data, "store", key),
    }
    errors = 0
    for _ in range(ROUNDS * 10):
        key, text = chance.choice(texts)
        contents = {key: text}
        if chance.random() < 0.5:
            of_bytes(contents, key, chance)
        else:
            contents[key] = changed_document(text, chance)
        if contents[key] == text:
            continue
        errors += isinstance(attempted(lambda: reading[kind](contents[key], key)), IncckptError)  # noqa: B023
    assert errors > ROUNDS
