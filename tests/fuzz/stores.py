"""Whole stores, changed as an attacker would, and used in every way: ``python -m tests.fuzz.stores --count 100000``.

Each store is a real one with changes that get past the digests: fields of documents, what is packed, headers and frames
of objects, keys and sizes. Whatever is done with it ends in an error of incckpt's or in a state whose memory is its
own; it ends soon, runs no code of the store's, takes no more memory than allowed, deletes nothing that an intact
checkpoint needs or an unreadable one may need, touches nothing outside its folder, and accepts nothing that breaks a
rule of the formats (`tests.fuzz.conformity`). Some stores are only damaged, with digests that are wrong: what is read
of them is what was saved. A number names a store: ``--first N --count 1`` repeats it; ``python -m tests.fuzz.power``
shows which checks are missed.
"""

from __future__ import annotations

import argparse
import base64
import collections
import contextlib
import copy
import ctypes
import dataclasses
import errno
import hashlib
import json
import logging
import os
import pickle
import random
import resource
import signal
import struct
import sys
import tempfile
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import cache, lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.testing._internal.two_tensor import TwoTensor

import incckpt
from incckpt.backends.base import Backend, Entry, ReadableBuffer, is_key, validate_key, validate_prefix
from incckpt.backends.local import LocalBackend
from incckpt.backends.memory import MemoryBackend
from incckpt.codec import objects as codec
from incckpt.errors import IncckptError, KeyExistsError, KeyNotFoundError
from incckpt.run.pipeline import Pipeline
from incckpt.store.manifest import Manifest
from incckpt.store.objects import DELTAS, OBJECTS, ObjectKey, manifest_keys
from incckpt.store.refs import CondemnedLists, Ref, RefName, Tombstone, list_refs
from incckpt.store.store import Store
from tests.fuzz import conformity
from tests.hostile import Contents, fields_of, rewrite, with_manifest

__all__ = ["CHANGES", "alarm_raises_in", "check_store", "main", "prepared"]

MAX_BYTES = 64 << 20  # that a store may take; checked by the address space's limit, which is a little wider
SECONDS = 60  # that one use may take, on a machine that does other things as well
ON_DISK = 40  # one store in so many lies in a folder
BY_THREADS = 16  # one in so many is read by a pipeline's threads: to start them takes longer than the rest
RAM_DISK = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None

EMPTY = np.empty
PAIR: Any = TwoTensor  # a tensor that consists of two; it has no types
torch.serialization.add_safe_globals([TwoTensor])
Chance = random.Random
Change = Callable[[Contents, Chance], Contents]
Point = collections.namedtuple("Point", "x y")


# ---- stores to begin with --------------------------------------------------------------------------------------------


def plain_state(step: int) -> dict[Any, Any]:
    """Return a state of every kind of value and tensor."""
    generator = torch.Generator().manual_seed(7)
    weights = torch.randn(600, generator=generator) * (1 + step / 1000)
    tied = torch.arange(24.0).reshape(4, 6)
    return {
        "weights": weights,
        "tied": [tied, tied[1:3, ::2], tied.T],
        "strided": torch.arange(40)[::4],
        "expanded": torch.ones(1).expand(3, 4),
        "subclass": PAIR(torch.ones(2, 3), torch.zeros(2, 3)),
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "conjugate": torch.view_as_complex(torch.ones(3, 2)).conj(),
        "half": torch.ones(5, dtype=torch.bfloat16),
        "noise": torch.randint(-(2**63), 2**63 - 1, (300, 3), generator=torch.Generator().manual_seed(step)),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(step),
        "array": np.zeros(3, [("a", "<i4"), ("b", "<f8", 2)]),
        "times": np.array(["2020-01-01"], "M8[D]"),
        "generator": generator,
        "rng": {"numpy": np.random.RandomState(1).get_state(legacy=False)},
        "point": Point(1, (2.5, "x")),
        "ordered": torch.nn.BatchNorm1d(2).state_dict(),
        "default": collections.defaultdict(list, {"a": [1]}),
        "counter": collections.Counter("abca"),
        "queue": collections.deque([1, 2], 5),
        "set": {1, "a", (2, frozenset({3}))},
        "values": [None, True, 10**30, float("nan"), 1 + 2j, b"bytes", "\ud800", np.float32(3), np.str_("s"), 1.5],
        "kinds": [torch.float32, torch.device("cpu"), torch.Size([1, 2]), np.dtype("f4"), torch.strided],
        (1, "key"): {2: 3, b"k": 4},
    }


def packed_state(step: int) -> dict[str, Any]:
    """Return a state of values that are stored packed."""
    return {
        "list": [step, *range(1100), 2**70, 1.5, None, "text", b"bytes", [1, {"a": (2, Point(3, 4))}], np.float32(1)],
        "dict": {index if index % 2 else str(index): {"x": float(index)} for index in range(600)},
        "deque": collections.deque([0.5] * 1100, 2000),
        "text": "ä" * 70_000,
    }


def module_state(step: int) -> dict[str, Any]:
    """Return a state as a training loop has it."""
    torch.manual_seed(step)
    model = torch.nn.Linear(12, 7)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 12)).sum().backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer, "rng": incckpt.RngState(), "epoch": step}


class Held(Backend):
    """Keys in a dict: as fast to fill as to drop. What it holds at first is a day old."""

    remote = False
    url = "memory://fuzzed"

    def __init__(self, contents: Contents) -> None:
        self.contents = dict(contents)
        self._new: set[str] = set()

    def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        return self._value(key)[start:end]

    def put(self, key: str, data: ReadableBuffer) -> None:
        self.contents[validate_key(key)] = bytes(data)
        self._new.add(key)

    def create(self, key: str, data: ReadableBuffer) -> None:
        if validate_key(key) in self.contents:
            raise KeyExistsError(errno.EEXIST, f"key {key!r} exists")
        self.put(key, data)

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            self.contents.pop(validate_key(key), None)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        validate_prefix(prefix)
        return iter([self._entry(key, data) for key, data in self.contents.items() if key.startswith(prefix)])

    def head(self, key: str) -> Entry:
        return self._entry(key, self._value(key))

    def _entry(self, key: str, data: bytes) -> Entry:
        return Entry(key, len(data), 86_400.0 if key in self._new else 0.0)

    def _value(self, key: str) -> bytes:
        try:
            return self.contents[validate_key(key)]
        except KeyError:
            raise KeyNotFoundError(errno.ENOENT, f"no key {key!r}") from None


STATES: list[Callable[[int], dict[Any, Any]]] = [plain_state, packed_state, module_state]


def facts(checkpoint: Any) -> tuple[Any, ...]:
    """Return what is to be known of a checkpoint."""
    metrics = tuple(sorted(checkpoint.metrics.items()))
    return checkpoint.step, checkpoint.ref, checkpoint.time, metrics, checkpoint.nbytes


known: collections.defaultdict[int, set[Any]] = collections.defaultdict(set)
"""What is to be known of the checkpoints that were ever in a store: damage to a tombstone shows one again."""


@cache
def seed(number: int) -> Contents:
    """Return a store with two runs, an abandoned checkpoint, deltas, a tombstone, a pin and a condemned list."""
    with always_alike(number):
        return made(number)


@contextlib.contextmanager
def always_alike(number: int) -> Iterator[None]:
    """Have what is saved be the same in every process, nonces and times included."""
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)
    nonces = random.Random(number)
    to_json = Manifest.to_json
    with (
        mock.patch("secrets.token_hex", lambda nbytes: nonces.randbytes(nbytes).hex()),
        mock.patch.dict(Store.__init__.__kwdefaults__, clock=lambda: 1.0e9),
        mock.patch.object(
            Manifest, "to_json", lambda self: to_json(dataclasses.replace(self, time=1.0e9, blocked=None, took=None))
        ),
    ):
        yield


def made(number: int) -> Contents:
    """Make what `seed` returns."""
    state = STATES[number]
    backend = MemoryBackend(f"seed{number}")
    for run in ("default", "other"):
        with incckpt.CheckpointManager(backend, run=run, keep_last_n=2, threads=1) as manager:
            for step in (1, 2, 3):
                manager.save(step, state(step), metrics={"loss": 1 / step}).result()
                known[number] |= set(map(facts, manager.checkpoints(abandoned=True)))
    with incckpt.CheckpointManager(backend, threads=1) as manager:
        manager.load(step=2)
        manager.save(5, state(5), metrics={"loss": 0.1}).result()
        known[number] |= set(map(facts, manager.checkpoints(abandoned=True)))
    Store(backend).run("other").pin(RefName(1, 4, "0123456789abcdef"))
    CondemnedLists(backend).put([f"{OBJECTS}ab/{'c' * 62}.{'0' * 16}"])
    return {entry.key: backend.get(entry.key) for entry in backend.list()}


@lru_cache(maxsize=64)
def document_of(data: bytes) -> bytes:
    """Return the document of a manifest object."""
    return codec.decode_document(data, 1 << 30)


def ran(*arguments: object) -> None:
    """Take note that a store has run code."""
    happened.append("code of the store has run")


happened: list[str] = []
"""What went wrong where no exception would reach us."""


class Evil:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return ran, ()


EVIL = {"pickle": base64.b64encode(pickle.dumps(Evil())).decode(), "type": "builtins.set"}

# ---- changes ---------------------------------------------------------------------------------------------------------

ODD_TEXT = [
    *[
        "",
        "\0",
        "\ud800",
        "\uff41",
        "a\u0301",
        "\u202e",
        "x" * 70_000,
        "../../etc/passwd",
        "/etc/passwd",
        "objects/../x",
    ],
    *["nan", "cpu", "meta", "hpu", "cuda:99", "privateuseone:7", "cpu:-1", "float32", "object", "|O", "<f8", "M8[Y]"],
    *["<U99999999", "0x" + "f" * 5000, "-0x0", "__class__", "_fields", "class", "0", "-1", "1e400", "AAAA"],
]
ODD_NUMBERS = [
    0, -1, 1, 2, 3, 7, 16, 64, 65, 255, 256, 4096, 65536, 2**31 - 1, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63,
    2**64, -(2**63), 10**30, 10**400, 0.5, -0.0, 1e308, 5e-324,
]  # fmt: skip


def odd_value(chance: Chance, old: Any) -> Any:
    """Return a value of another or the same type as `old`."""
    match chance.randrange(9):
        case 0:
            return chance.choice(ODD_TEXT)
        case 1:
            return chance.choice(ODD_NUMBERS)
        case 2:
            return chance.choice([None, True, False, [], {}, [[]], [None], {"a": 1}, [0, 0, 0], EVIL])
        case 3:
            deep: Any = old
            form = chance.choice(["list", "tuple", "a", None])
            for _ in range(chance.choice([1, 2, 70, 250])):
                deep = [deep] if form is None else {form: [deep]}
            return deep
        case 4 | 5 if isinstance(old, list):
            return [*old, *old[:1]] if chance.random() < 0.5 else old[1:]
        case 6 if isinstance(old, list):
            return old * chance.choice([0, 2, 3, 200]) if len(old) < 500 else old[: chance.randrange(len(old))]
        case _ if isinstance(old, bool):
            return not old
        case _ if isinstance(old, int):
            return old + chance.choice([-1, 1, -old, old, 2**32, -(2**63), 10**400, chance.randrange(100)])
        case _ if isinstance(old, float):
            return chance.choice([-old, int(old), 10**400, -(10**309)])
        case _ if isinstance(old, str) and old:
            at = chance.randrange(len(old))
            return old[:at] + chance.choice(["", "0", "f", "\ud800", "é", old[at:] * 2]) + old[at + 1 :]
        case _:
            return chance.choice(ODD_NUMBERS)


def places(value: Any) -> dict[Any, list[tuple[Any, Any]]]:
    """Return every container and key in a JSON value by what they are: the members around, or the list they are in."""
    found: collections.defaultdict[Any, list[tuple[Any, Any]]] = collections.defaultdict(list)
    pending: list[tuple[Any, Any]] = [(value, None)]
    while pending:
        current, around = pending.pop()
        if isinstance(current, dict | list):
            members = tuple(current) if isinstance(current, dict) else around
            for key in list(current) if isinstance(current, dict) else range(len(current)):
                kind = (members, key if isinstance(current, dict) else None)
                found[kind].append((current, key))
                pending.append((current[key], kind))
    return found


CHECK_BYTES = len(b',"check":"01234567"}')

WEIGHTS = {"structure": 12, "tensors": 12, "ranges": 4, "chunks": 4, "packed": 4}
"""How often a part of a manifest is changed, for once of any other."""


def copied(value: Any) -> Any:
    """Return a copy, or ``None`` for what is nested too deeply to be copied: an earlier change has made it so."""
    try:
        return copy.deepcopy(value)
    except RecursionError:
        return None


def change_fields(chance: Chance, document: dict[str, Any]) -> None:
    """Change some fields of a document, favouring none of its parts for its length, nor a field for its number."""
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        weights = [WEIGHTS.get(name, 1) for name in document]
        part = chance.choices(list(document), weights)[0] if document and chance.random() < 0.9 else None
        found = places({part: document[part]} if part is not None else document)
        if not found:
            return
        alike = found[chance.choice(list(found))]
        container, key = chance.choice(alike)
        if part is not None and key == part and container is not document:
            container = document
        match chance.randrange(9):
            case _ if part == "structure" and chance.random() < 0.05:
                container[key] = copied(EVIL)
            case 0 if isinstance(container, dict):
                del container[key]
            case 1 if container is not document:
                other, its = chance.choice(alike)
                container[key] = copied(other[its])
            case 2:
                other, its = chance.choice(found[chance.choice(list(found))])
                container[key] = copied(other[its])
            case 3 if isinstance(container, dict):
                container[chance.choice([*ODD_TEXT, "base", "digits", "flags", "device", "stride", "packed"])] = (
                    odd_value(chance, container.pop(key))
                )
            case 4 if isinstance(container, list):
                container.insert(key, copied(container[key]))
            case _:
                container[key] = odd_value(chance, container[key])


def documents(contents: Contents) -> list[str]:
    """Return the keys of documents that lie bare."""
    return sorted(key for key in contents if contents[key].startswith(b'{"format"'))


def manifests(contents: Contents) -> list[str]:
    """Return the keys of manifests that refs name."""
    refs = (key for key in contents if key.startswith("refs/") and len(contents[key]) > 7)
    return sorted({str(fields_of(contents[key])["manifest"]) for key in refs})


def a_manifest(contents: Contents, chance: Chance) -> str:
    """Return the key of a manifest, often that of the checkpoint that is read most."""
    if chance.random() < 0.5:
        latest = max((key for key in contents if key.startswith("refs/default/")), default=None)
        with contextlib.suppress(IncckptError, TypeError, LookupError):  # none, or a change before has damaged it
            return str(fields_of(contents[str(latest)])["manifest"])
    return chance.choice(manifests(contents))


def of_a_document(contents: Contents, chance: Chance) -> Contents:
    """Change a marker, ref, pin, attempt, lineage or condemned list."""
    key = chance.choice(documents(contents))
    return contents | {key: rewrite(contents[key], lambda fields: change_fields(chance, fields))}


def of_a_manifest(contents: Contents, chance: Chance) -> Contents:
    """Change a manifest, and name it anew."""
    key = a_manifest(contents, chance)
    document = document_of(contents[key])
    return with_manifest(contents, key, rewrite(document, lambda fields: change_fields(chance, fields)))


def of_a_shape(contents: Contents, chance: Chance) -> Contents:
    """Give a tensor another shape, strides and place, of numbers that are its own or at the edge of what there is."""
    key = a_manifest(contents, chance)

    def reshape(fields: dict[str, Any]) -> None:
        if not fields["tensors"]:
            return
        entry, other = chance.choice(fields["tensors"]), chance.choice(fields["tensors"])
        strided = [one for one in fields["tensors"] if "stride" in one]
        if strided and chance.random() < 0.5:
            entry = chance.choice(strided)
        if "stride" in entry and chance.random() < 0.2:  # the same elements, backwards
            at = chance.randrange(len(entry["stride"]))
            step, place = entry["stride"][at], entry["pieces"][0]
            if "packed" not in entry.get("flags", []):
                unit = conformity.DTYPES.get(entry["dtype"], 1)
                place["offset"] = place.get("offset", 0) + (entry["shape"][at] - 1) * step * unit
            entry["stride"][at] = -step
            return
        if chance.random() < 0.3:  # what another is, but for the flags
            for member in ("dtype", "kind", "shape", "stride", "pieces"):
                entry.pop(member, None)
                entry.update({member: copied(other[member])} if member in other else {})
            entry["flags"] = chance.choice([[], ["packed"]])
            return
        if chance.random() < 0.2:  # more elements than 64 bits can count, and hardly any memory
            entry["shape"] = chance.choice([[2**62, 4], [2**31, 2**31, 4], [0, 2**62, 4], [2**62, 0, 2**40]])
            entry.update(stride=[0] * len(entry["shape"]), flags=[])
            if 0 in entry["shape"]:
                entry.pop("pieces", None)
            return
        old = entry["shape"]
        if chance.random() < 0.7:
            dimensions = max(0, len(old) + chance.choice([-1, 0, 0, 1]))
            entry["shape"] = [chance.choice([*old, 0, 1, 2, 2**31, 2**62]) for _ in range(dimensions)]
        if chance.random() < 0.7:
            dimensions = max(0, len(entry["shape"]) + chance.choice([-1, *[0] * 8, 1]))
            own = entry.get("stride", [])
            strides = [*own, *(-step for step in own), 0, 0, 1, -1, 2**40]
            entry["stride"] = [chance.choice(strides) for _ in range(dimensions)]
        if "pieces" in entry and chance.random() < 0.5:
            entry["pieces"][0]["offset"] = chance.choice([0, 1, 4, 8, 40, 2**62])
        if chance.random() < 0.3:
            entry["flags"] = sorted({*entry.get("flags", [])} ^ {"packed"})

    return with_manifest(contents, key, rewrite(document_of(contents[key]), reshape))


REFERENCES = (
    *["tensor", "torch.Generator", "packed", "factory", "device", "maxlen", "kind", "inner", "subclass"],
    *["complex", "torch.Size", "numpy.scalar", "dtype", "str", "int"],
)
"""Members of nodes that name something, or whose form Python checks."""


def of_a_reference(contents: Contents, chance: Chance) -> Contents:
    """Have a node of a structure name something else, or what another node names."""
    key = a_manifest(contents, chance)

    def redirect(fields: dict[str, Any]) -> None:
        kinds: collections.defaultdict[Any, list[Any]] = collections.defaultdict(list)
        for (_, member), found in places(fields["structure"]).items():
            if member in REFERENCES:
                kinds[member] += found
        if not kinds:
            return
        alike = kinds[chance.choice(list(kinds))]
        container, member = chance.choice(alike)
        value = container[member]
        if value and isinstance(value, list) and chance.random() < 0.5:
            if isinstance(value[0], list):  # pairs, whose names matter as well
                value = chance.choice(value)
            at = chance.randrange(len(value))
            value[at] = chance.choice(ODD_NUMBERS) if chance.random() < 0.3 else odd_value(chance, value[at])
        elif value and isinstance(value, str) and chance.random() < 0.3:  # as long: it stays hexadecimal or base64
            at = chance.randrange(len(value))
            container[member] = value[:at] + chance.choice("09afAZ/+") + value[at + 1 :]
        elif chance.random() < 0.5:
            container[member] = copied(chance.choice(alike)[0][member])
        else:
            container[member] = odd_value(chance, value)

    return with_manifest(contents, key, rewrite(document_of(contents[key]), redirect))


def nodes_of(structure: Any) -> list[tuple[Any, Any]]:
    """Return every node within a structure, each as the list that it is in, and its place there."""
    found: list[tuple[Any, Any]] = []
    pending = [structure]
    while pending:
        node = pending.pop()
        if not isinstance(node, dict):
            continue
        inside = [(node[form], at) for form in conformity.LISTS if form in node for at in range(len(node[form]))]
        inside += [(pair, 1) for form in (*conformity.MAPS, "namedtuple", "inner") for pair in node.get(form, ())]
        found += inside
        pending += [holder[at] for holder, at in inside]
    return found


def of_a_node(contents: Contents, chance: Chance) -> Contents:
    """Put another node in the place of one of a structure: one from elsewhere, one that runs code, or a deep one."""
    key = a_manifest(contents, chance)

    def replace(fields: dict[str, Any]) -> None:
        found = nodes_of(fields["structure"])
        holder, at = chance.choice(found)
        other, its = chance.choice(found)
        match chance.randrange(5):
            case 0:
                holder[at] = copied(EVIL)
            case 1:
                holder[at] = copied(other[its])
            case 2 | 3:
                holder[at], other[its] = other[its], holder[at]
            case _:
                for _ in range(chance.choice([1, 2, 60, 64, 65, 70, 200])):
                    holder[at] = chance.choice([{"list": [holder[at]]}, {"dict": [["a", holder[at]]]}])

    return with_manifest(contents, key, rewrite(document_of(contents[key]), replace))


def of_repetition(contents: Contents, chance: Chance) -> Contents:
    """Have a range be many times the same bytes: a small store that stands for a large state."""
    key = a_manifest(contents, chance)

    def repeat(fields: dict[str, Any]) -> None:
        lists = [fields[name] for name in ("ranges", "packed") if fields.get(name)]
        ranges = chance.choice(lists)
        index = max(range(len(ranges)), key=lambda at: (ranges[at]["bytes"], at))
        times = chance.choice([2, 1000, 30_000])
        if times * len(ranges[index]["pieces"]) > 1 << 20:
            return  # another change has repeated them before
        ranges[index]["pieces"] *= times
        ranges[index]["bytes"] *= times
        for tensor in fields["tensors"] if ranges is fields["ranges"] else []:
            if tensor.get("pieces", [{}])[0].get("range") == index and "stride" not in tensor:
                tensor["shape"][0] *= times

    return with_manifest(contents, key, rewrite(document_of(contents[key]), repeat))


def of_padding(contents: Contents, chance: Chance) -> Contents:
    """Make a manifest long: a few bytes of an object that stand for more than may be taken."""
    key = a_manifest(contents, chance)
    head = document_of(contents[key])[:-CHECK_BYTES]
    head += chance.choice([b" ", b',"x":[' + b"[]," * 9 + b"0]"]) * chance.choice([1 << 10, 1 << 14, 1 << 20])
    return with_manifest(contents, key, checked(head))


def checked(head: bytes) -> bytes:
    """Return a document with its last field, the checksum."""
    return head + b',"check":"%08x"}' % zlib.crc32(head)


def of_text(contents: Contents, chance: Chance) -> Contents:
    """Change the text of a document, with the right checksum or digest."""
    key = chance.choice([*documents(contents), *manifests(contents) * 2])
    bare = contents[key].startswith(b'{"format"')
    text = bytearray(contents[key] if bare else document_of(contents[key]))
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(text))
        some = [
            b"[" * 3000,
            b"]",
            b",",
            b'"',
            b"\\u0000",
            b"\xff",
            b"1" * 5000,
            b"-",
            b"NaN",
            b"1e999",
            b"{}",
            b'{"a":',
            b"",
        ]
        text[at : at + chance.choice([0, 1, 5])] = chance.choice(some)
    data = checked(bytes(text[:-CHECK_BYTES]))
    return contents | {key: data} if bare else with_manifest(contents, key, data)


def of_chunks(contents: Contents, chance: Chance) -> Contents:
    """Change the raw bytes of a packed value or tensor, often a generator's, and store its chunk as the codec does."""
    key = a_manifest(contents, chance)
    document = document_of(contents[key])
    fields = json.loads(document)
    packed = fields.get("packed", [])
    tensors = [one["pieces"][0] for one in fields["tensors"] if "pieces" in one]
    nodes = [holder[at] for holder, at in nodes_of(fields["structure"])]
    generators = [node["torch.Generator"] for node in nodes if isinstance(node, dict) and "torch.Generator" in node]
    if packed and (not tensors or chance.random() < 0.9):
        span, start = chance.choice(packed), 0
    else:
        place = chance.choice(tensors)
        if generators and chance.random() < 0.5:
            place = fields["tensors"][chance.choice(generators)]["pieces"][0]
        span, start = fields["ranges"][place["range"]], place.get("offset", 0)
    pieces = [piece for piece in span["pieces"] if "base" not in fields["chunks"][piece[0]]]
    if not pieces:
        return of_a_manifest(contents, chance)
    index, offset, length = chance.choice(pieces)
    first = offset + (start if start < length else 0)
    chunk = fields["chunks"][index]
    old = ObjectKey(chunk["id"], chunk["nonce"])
    raw = np.empty(chunk["bytes"], np.uint8)
    codec.decode(contents[str(old)], raw, identity=bytes.fromhex(old.identity))
    for _ in range(chance.choice([1, 1, 2, 5])):
        at = first + chance.randrange(chance.choice([1, 40, 1 << 40])) % (offset + length - first)
        some = [0, 1, 127, 128, 255, chance.randrange(256), int(raw[at]) ^ (1 << chance.randrange(8))]
        raw[at : at + chance.choice([1, 1, 1, 2, 4, 9])] = chance.choice(some)
    digest = codec.digest(raw)
    encoded = codec.encode(raw, min(chunk["item"], 8), digest=digest)
    new = ObjectKey(digest.identity.hex(), old.nonce)

    def rename(changed: dict[str, Any]) -> None:
        for item in changed["chunks"]:
            if item["id"] == old.identity and "base" not in item:
                item.update(id=new.identity, size=len(encoded.data))

    return with_manifest(contents | {str(new): bytes(encoded.data)}, key, rewrite(document, rename))


HEADER = struct.Struct("<4sBBBBQ32s")
ENTRY = struct.Struct("<B3sI32s")


def of_an_object(contents: Contents, chance: Chance) -> Contents:
    """Change the header and the frames of an object, with the checksum right; sometimes its name, too."""
    objects = sorted(key for key in contents if key.startswith((OBJECTS, DELTAS)))
    key = chance.choice(objects)
    data = bytearray(contents[key])
    header = codec.read_header(data)
    frames = len(header.ways)
    head = list(HEADER.unpack_from(data))
    entries = [list(ENTRY.unpack_from(data, HEADER.size + ENTRY.size * index)) for index in range(frames)]
    body = bytearray(data[header.offsets[0] :])
    for _ in range(chance.choice([1, 1, 2, 3])):
        match chance.randrange(7):
            case 0:
                head[chance.choice([2, 3, 4])] = chance.choice([0, 1, 2, 3, 4, 5, 8, 16, 255])
            case 1:
                head[5] = max(0, chance.choice([head[5] - 1, head[5] + 1, head[5] // 2, 2 * head[5]]))
            case 2:
                head[6] = chance.choice([bytes(32), chance.randbytes(32)])
            case 3 if entries:
                chance.choice(entries)[0] = chance.choice([0, 1, 2, 3, 4, 255])
            case 4 if entries:
                entry = chance.choice(entries)
                entry[2] = max(0, min(2**32 - 1, chance.choice([0, 1, entry[2] - 1, entry[2] + 1, 2**31, 2**32 - 1])))
            case 5 if entries:
                chance.choice(entries)[3] = chance.randbytes(32)
            case _ if body:
                at = chance.randrange(len(body))
                body[at : at + chance.choice([0, 1, 1, 1, 4])] = chance.randbytes(chance.choice([0, 1, 1, 1, 4]))
    start = HEADER.pack(*head) + b"".join(ENTRY.pack(*entry) for entry in entries)
    changed = start + struct.pack("<I", zlib.crc32(start)) + bytes(body)
    if chance.random() < 0.3:
        return contents | {key: changed}
    # Named by what the header says, and of the size that the manifests say.
    old = ObjectKey.parse(key)
    identity = codec.Header(1, 0, None, (), (), b"".join(entry[3] for entry in entries)).identity.hex()
    new = ObjectKey(identity, old.nonce, old.base)
    result = contents | {str(new): changed}

    def rename(fields: dict[str, Any]) -> None:
        for item in fields["chunks"]:
            for node in (item, item.get("base", {})):
                if node.get("id") == old.identity and node.get("nonce") == old.nonce and node["size"] == len(data):
                    node.update(id=identity, size=len(changed))

    for manifest in manifests(contents):
        document = document_of(contents[manifest])
        if old.identity.encode() in document:
            result = with_manifest(result, manifest, rewrite(document, rename))
    return result


def of_a_name(contents: Contents, chance: Chance) -> Contents:
    """Put a value under another key, or under a second one."""
    key = chance.choice(sorted(contents))
    folder, _, name = key.rpartition("/")
    at = chance.randrange(len(name))
    other = chance.choice(
        [name[:at], name + "0", name[:at] + "9" + name[at + 1 :], "x", name.upper(), f"sub/{name}", f"{name}.from"]
    )
    new = f"{folder}/{other or 'y'}".lstrip("/")
    if chance.random() < 0.3:
        new = chance.choice(sorted(contents))
    kept = dict(contents)
    data = kept.pop(key) if chance.random() < 0.5 else kept[key]
    return kept | {new: data} if is_key(new) else kept


def of_a_size(contents: Contents, chance: Chance) -> Contents:
    """Cut a value, make it longer, or empty it; a manifest with it."""
    key = chance.choice(sorted(contents))
    data = contents[key]
    changed = chance.choice(
        [data[: chance.randrange(len(data) + 1)], data + bytes(chance.choice([1, 7, 5000])), b"", data * 2]
    )
    return contents | {key: changed}


def chunks_of(contents: Contents) -> dict[str, int]:
    """Return the raw bytes of each object that is no manifest, by key."""
    objects = {key for key in contents if key.startswith((OBJECTS, DELTAS))} - set(manifests(contents))
    return {key: codec.read_header(contents[key]).nbytes for key in objects}


def of_bytes(contents: Contents, chance: Chance) -> Contents:
    """Change bytes of a value, or put those of another in its place, and mend nothing."""
    objects = chunks_of(contents) if chance.random() < 0.7 else {}
    key = chance.choice(sorted(objects or contents))
    data = bytearray(contents[key])
    match chance.randrange(4):
        case 0:  # an object's as long: only what it is tells them apart
            alike = [other for other in objects or contents if objects.get(other) == objects.get(key) and other != key]
            data = bytearray(contents[chance.choice(sorted(alike) or [key])])
        case 1 if len(data) > 48:  # a header's, or a short document's
            at = chance.randrange(48)
            data[at] ^= 1 << chance.randrange(8)
        case _ if data:
            at = chance.randrange(len(data))
            data[at : at + 4] = chance.choice([bytes([data[at] ^ (1 << chance.randrange(8))]), b"0000", b"9", b""])
    return contents | {key: bytes(data)}


DAMAGE: list[Change] = [of_bytes, of_a_name, of_a_size]
"""Changes that the digests and names show."""

CHANGES: list[Change] = [
    *[of_a_manifest] * 3,
    *[of_chunks, of_an_object, of_a_document, of_bytes] * 2,
    *[of_text, of_a_name, of_a_size, of_a_shape, of_a_reference, of_a_node, of_repetition, of_padding],
]


# ---- use -------------------------------------------------------------------------------------------------------------


def touch(value: Any, depth: int = 0) -> None:
    """Read all memory of a state; what is not what a state may hold is an error."""
    if isinstance(value, PAIR):
        touch([value.a, value.b], depth + 1)
    elif isinstance(value, torch.Tensor):
        if value.device.type == "cpu" and value.numel() <= 1 << 20:
            value.detach().resolve_conj().clone(memory_format=torch.contiguous_format).view(-1)
        storage = value.untyped_storage()
        assert storage.nbytes() <= MAX_BYTES or value.device.type == "meta", "memory beyond what is allowed"
        if value.device.type == "cpu":
            torch.empty(0, dtype=torch.uint8).set_(storage).sum()
    elif isinstance(value, np.ndarray | np.generic):
        assert not value.dtype.hasobject
        if value.size <= 1 << 20:
            np.asarray(value).tobytes()
    elif isinstance(value, dict):
        for key, item in value.items():
            touch(key, depth + 1)
            touch(item, depth + 1)
    elif isinstance(value, list | tuple | set | frozenset | collections.deque):
        for item in value:
            touch(item, depth + 1)
    else:
        plain = (str, bytes, bytearray, int, float, complex, type(None), torch.Generator, torch.dtype, torch.device,
                 torch.layout, torch.memory_format, np.dtype)  # fmt: skip
        assert isinstance(value, plain), f"a {type(value)} in a state"
    assert depth < 200


def attempted(action: Callable[[], Any]) -> Any:
    """Return what an action gives, or the error: the project's own, or the target's; any other is a failure."""
    try:
        return action()
    except IncckptError as error:
        str(error)
        return error
    except Exception as error:
        if any("raised by load_state_dict() of" in note for note in getattr(error, "__notes__", ())):
            return error  # what the target's own objects do with what a store holds is theirs
        raise


Fingerprint = tuple[Any, ...]


def fingerprint(value: Any) -> Any:
    """Return what tells a state from others, to be compared."""
    if isinstance(value, PAIR):
        return fingerprint([value.a, value.b])
    if isinstance(value, torch.Tensor):
        raw = value.detach().resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)
        return str(value.dtype), tuple(value.shape), hashlib.sha256(raw.numpy().tobytes()).digest()
    if isinstance(value, torch.Generator):
        return fingerprint(value.get_state())
    if isinstance(value, np.ndarray | np.generic):
        return str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, torch.nn.Module | torch.optim.Optimizer):
        return fingerprint(value.state_dict())
    if isinstance(value, incckpt.RngState):  # the process's own
        return "rng"
    if isinstance(value, dict):
        return tuple((repr(key), fingerprint(item)) for key, item in value.items())
    if isinstance(value, list | tuple | collections.deque):
        return tuple(map(fingerprint, value))
    return sorted(map(repr, value)) if isinstance(value, set | frozenset) else repr(value)


@cache
def saved(kind: int, restored: bool) -> dict[int, Any]:
    """Return the fingerprint of each state that was saved, by step, as `load` or `restore` gives it."""
    found = {}
    backend = Held(seed(kind))
    for step, run in ((2, "default"), (3, "other"), (5, "default")):
        if restored:
            target = STATES[kind](0)
            with incckpt.CheckpointManager(backend, run=run, threads=1, read_only=True) as manager:
                manager.restore(target, step=step)
            found[step] = fingerprint(target)
        else:
            found[step] = fingerprint(incckpt.load(backend, run=run, step=step, progress=False, threads=1))
    return found


def check_state(kind: int, state: Any, step: Any, *, restored: bool) -> None:
    """Check that a state is one that was saved, and of the step that was asked for."""
    states = saved(kind, restored)
    found = fingerprint(state)
    wanted = [states[step]] if step in states else list(states.values())
    assert any(found == one for one in wanted), f"damage has changed what is read of step {step}"


WAYS = [*["load", "restore"] * 3, *["verify"] * 2, "list", "collect"]
"""How stores are used."""

WAYS_OF_DAMAGED = [*["load", "restore"] * 4, "verify", "list", "collect"]


def use(backend: Backend, kind: int, chance: Chance, way: str | None, *, damaged: bool) -> None:
    """Use a store in one way; of one that is only `damaged`, what is read is what was saved."""
    run = chance.choice(["default", "default", "other"])
    most = chance.choice([MAX_BYTES, MAX_BYTES, MAX_BYTES, MAX_BYTES if damaged else 200_000, 8_000])
    with allocations_watched(most):
        match way or chance.choice(WAYS_OF_DAMAGED if damaged else WAYS):
            case "load":
                use_load(backend, kind, chance, run, most, damaged=damaged)
            case "restore":
                use_restore(backend, kind, chance, run, most, damaged=damaged)
            case "verify":
                level: Any = chance.choice(["list", "sizes", "hashes", "hashes"])
                str(attempted(lambda: incckpt.verify(backend, run=run, level=level, threads=1, max_bytes=most)))
            case "list":
                use_listing(backend, kind, run, damaged=damaged)
            case _:
                use_collection(backend, chance)


def use_load(backend: Backend, kind: int, chance: Chance, run: str, most: int, *, damaged: bool) -> None:
    """Load a state."""
    location = chance.choice([None, None, None, "cpu", "meta", {"cpu": "cpu"}])
    keys = None if damaged else chance.choice([None, None, None, "*", "w*", ["list", "model.*", "optimizer*"]])
    step = chance.choice([None, None, 2, 3, 5, "best"])
    verify = damaged or chance.random() < 0.6
    found = attempted(
        lambda: incckpt.load(
            backend, run=run, step=step, keys=keys, map_location=location, verify=verify, progress=False, threads=1,
            max_bytes=most,
        )
    )  # fmt: skip
    if not isinstance(found, Exception):
        touch(found)
        if damaged and verify and keys is None and location != "meta":
            check_state(kind, found, step, restored=False)


def use_restore(backend: Backend, kind: int, chance: Chance, run: str, most: int, *, damaged: bool) -> None:
    """Restore into a state."""
    target = STATES[kind](0)
    verify, step = damaged or chance.random() < 0.6, chance.choice([None, None, 3])
    read_only = chance.random() < 0.8

    def restore() -> None:
        with incckpt.CheckpointManager(
            backend, run=run, threads=1, verify=verify, read_only=read_only, max_bytes=most
        ) as manager:
            manager.restore(target, step=step)

    found = attempted(restore)
    if not isinstance(found, Exception) and damaged and verify:
        check_state(kind, target, step, restored=True)


def use_listing(backend: Backend, kind: int, run: str, *, damaged: bool) -> None:
    """Look at a store."""

    def browse() -> None:
        with incckpt.CheckpointManager(backend, run=run, read_only=True) as manager:
            for checkpoint in manager.checkpoints(abandoned=True):
                repr(checkpoint)
                assert not damaged or facts(checkpoint) in known[kind], f"damage has changed {checkpoint}"
            repr((manager.latest, attempted(lambda: manager.best)))

    attempted(browse)
    attempted(lambda: list(incckpt.list_checkpoints(backend)))
    attempted(lambda: str(incckpt.describe(backend, run=run)))
    attempted(lambda: str(incckpt.usage(backend)))


def use_collection(backend: Backend, chance: Chance) -> None:
    """Collect."""
    before, readable = standing(backend)
    values = held(backend)
    str(attempted(lambda: incckpt.collect(backend, dry_run=chance.random() < 0.2, min_age=0)))
    there = held(backend)
    if not values.items() <= there.items():
        gone = values.keys() - there.keys()
        assert readable or not any(key.startswith((OBJECTS, DELTAS)) for key in gone), (
            "a collection has deleted objects where a ref cannot be read"
        )
        after, _ = standing(backend)
        for ref, needed in after.items():
            lost = (before.get(ref, frozenset()) & needed) - there.keys()
            assert not lost, f"{ref} stands, and lost {sorted(lost)[:3]}"
        assert before.keys() <= after.keys(), "a collection has removed a checkpoint"


def held(backend: Backend) -> Contents:
    """Return what a store holds, as far as it can be read."""
    if isinstance(backend, Held):
        return dict(backend.contents)
    return {entry.key: backend.get(entry.key) for entry in backend.list()}


def standing(backend: Backend) -> tuple[dict[str, frozenset[str]], bool]:
    """Return what intact checkpoints need, and whether there are no others.

    Returns
    -------
    needed
        By the key of each ref whose manifest is intact, which of the objects that it needs are there.
    readable
        Whether every ref can be read, and its manifest.
    """
    there = {entry.key for entry in backend.list()}
    needed: dict[str, frozenset[str]] = {}
    readable = True
    with allocations_watched(MAX_BYTES):
        store = Store(backend)
        for run, name, key, tombstone in list_refs(backend):
            if tombstone:
                readable &= backend.get(key) in [one.value for one in Tombstone]
                continue
            ref = attempted(lambda: store.run(run).read(name)) if name is not None else None  # noqa: B023 -- at once
            manifest = attempted(lambda: store.manifest(ref)) if isinstance(ref, Ref) else None  # noqa: B023
            if isinstance(ref, Ref) and isinstance(manifest, Manifest):
                needed[key] = frozenset(there & (manifest_keys(manifest) | {ref.manifest}))
            else:
                readable = False
    return needed, readable


@contextlib.contextmanager
def allocations_watched(most: int) -> Iterator[None]:
    """Allow `most` bytes, and note in `happened` if a buffer of more is taken for what a store says."""

    def watched(function: Callable[..., Any], own: int) -> Callable[..., Any]:
        def call(shape: Any, *arguments: Any, **options: Any) -> Any:
            if isinstance(shape, int) and shape - own > most:
                happened.append(f"{shape} bytes were taken where {most} are allowed")
                raise MemoryError
            return function(shape, *arguments, **options)

        return call

    with (
        mock.patch.dict(os.environ, INCCKPT_MAX_BYTES=str(most)),
        mock.patch("incckpt.staging.hostmem.np.empty", watched(EMPTY, 64)),
        mock.patch("incckpt.codec.objects.bytearray", watched(bytearray, 0), create=True),
    ):
        yield


@contextlib.contextmanager
def in_turn() -> Iterator[None]:
    """Have pipelines work in the caller's thread."""

    def each(self: Pipeline, items: Iterable[Any], weight: Callable[[Any], int], work: Callable[[Any], None]) -> None:
        for item in items:
            work(item)

    with mock.patch.object(Pipeline, "each", each):
        yield


def snapshot(folder: Path) -> list[tuple[str, int, int]]:
    """Return what lies in a folder."""
    return sorted((str(path), path.lstat().st_size, path.lstat().st_mtime_ns) for path in folder.rglob("*"))


class TooSlow(BaseException):
    """A use took too long."""


def prepared() -> None:
    """Make what all stores begin with, and what is known of it."""
    for kind in range(len(STATES)):
        saved(kind, restored=False)
        saved(kind, restored=True)


def watched() -> contextlib.AbstractContextManager[None]:
    """Have `check_store` see what is accepted against a rule of the formats."""
    return conformity.watched(happened)


def check_store(number: int, change: Change | None = None, way: str | None = None) -> str:
    """Make store `number`, use it, and return how it was changed.

    Parameters
    ----------
    change
        How to change it; by default as the number draws it.
    way
        How to use it, one of `WAYS`; likewise.

    Raises
    ------
    BaseException
        What is wrong.
    """
    chance = random.Random(number)
    kind = chance.randrange(len(STATES))
    contents = seed(kind)
    drawn = chance.choice(CHANGES)
    change = change or drawn
    changed = change(contents, chance)
    damaged = change in DAMAGE
    if chance.random() < 0.15:
        with contextlib.suppress(LookupError, ValueError, TypeError, AttributeError):  # the first has broken too much
            changed = chance.choice(CHANGES)(changed, chance)
            damaged = False
    happened.clear()
    with contextlib.nullcontext() if number % BY_THREADS == 0 else in_turn():
        if number % ON_DISK == 0:
            use_on_disk(changed, kind, chance, way, damaged=damaged)
        else:
            use(Held(changed), kind, chance, way, damaged=damaged)
    assert not happened, happened[0]
    return change.__name__


def use_on_disk(contents: Contents, kind: int, chance: Chance, way: str | None, *, damaged: bool) -> None:
    """Use a store in a folder, and look around it afterwards."""
    with tempfile.TemporaryDirectory(prefix="incckpt-fuzz-", dir=RAM_DISK) as outside:
        inside = Path(outside, "a", "store")
        for key, data in contents.items():
            path = inside / key
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.is_dir():
                attempted_write(path, data)
        Path(outside, "sentinel").write_text("as it was")
        around = [item for item in snapshot(Path(outside)) if not item[0].startswith(f"{inside}")]
        with LocalBackend(inside) as local:
            use(local, kind, chance, way, damaged=damaged)
        after = [item for item in snapshot(Path(outside)) if not item[0].startswith(f"{inside}")]
        assert around == after, "something outside the folder was changed"


def attempted_write(path: Path, data: bytes) -> None:
    """Write a file, unless a file stands where its folder would be."""
    try:
        path.write_bytes(data)
    except (NotADirectoryError, IsADirectoryError):
        return


def main(arguments: list[str] | None = None) -> int:
    """Check stores; return how many failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so many")
    given = parser.parse_args(arguments)
    logging.disable()
    torch.set_num_threads(1)
    prepared()
    if "libasan" not in os.environ.get("LD_PRELOAD", ""):  # whose shadow takes terabytes of addresses
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (2 << 30),) * 2)
    failed: list[int] = []
    # In the main thread, every call of a manager would start another thread: see `incckpt.threads`.
    worker = threading.Thread(target=lambda: failed.append(check_stores(given.first, given.count, given.seconds)))
    alarm_raises_in(worker)
    with watched():
        worker.start()
        worker.join()
    return failed[0] if failed else 1


def alarm_raises_in(worker: threading.Thread) -> None:
    """Have an alarm raise `TooSlow` in `worker`; signals reach only the main thread."""

    def too_slow(signum: int, frame: object) -> None:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(worker.ident or 0), ctypes.py_object(TooSlow))

    signal.signal(signal.SIGALRM, too_slow)


def check_stores(first: int, count: int, seconds: float) -> int:
    """Check stores, and say what is wrong; return with how many something was."""
    started, failed, done = time.monotonic(), 0, 0
    changes: collections.Counter[str] = collections.Counter()
    for number in range(first, first + count):
        if time.monotonic() - started > seconds:
            break
        signal.alarm(SECONDS)
        try:
            changes[check_store(number)] += 1
        except BaseException as error:  # noqa: BLE001 -- whatever it is, it is the finding
            failed += 1
            print(f"store {number} FAILED: {type(error).__name__}: {error!s:.300}", flush=True)
            traceback.print_exc(limit=-6)
        finally:
            signal.alarm(0)
        done += 1
        if done % 1000 == 0:
            print(f"{done} stores from {first}, {failed} failed, {time.monotonic() - started:.0f} s", flush=True)
    print(f"{done} stores from {first}, {failed} failed; changes: {dict(changes)}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(min(main(), 100))
