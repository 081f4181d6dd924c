"""Stores as an attacker would write them: documents changed at will, with digests and checksums that are right."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import incckpt
from incckpt.backends.memory import MemoryBackend
from incckpt.codec import objects as codec
from incckpt.store.document import dump_document, parse_document
from incckpt.store.objects import ObjectKey

__all__ = ["Contents", "fields_of", "filled", "manifest_of", "rewrite", "rewrite_manifest", "saved", "with_manifest"]

Contents = dict[str, bytes]
"""What a store holds, by key."""

_FRAME = ("format", "kind", "check")  # fields that `dump_document` writes


def saved(state: Any, **options: Any) -> Contents:
    """Return what a store with one checkpoint holds."""
    backend = MemoryBackend(uuid.uuid4().hex)
    with incckpt.CheckpointManager(backend, threads=1, **options) as manager:
        manager.save(1, state, metrics={"loss": 1.0}).result()
    return {entry.key: backend.get(entry.key) for entry in backend.list()}


def filled(contents: Contents) -> MemoryBackend:
    """Return a new store of these contents."""
    backend = MemoryBackend(uuid.uuid4().hex)
    for key, data in contents.items():
        backend.put(key, data)
    return backend


def rewrite(data: bytes, change: Callable[[dict[str, Any]], Any]) -> bytes:
    """Return a document with changed fields."""
    document = fields_of(data)
    kind, version = document["kind"], document["format"]
    fields = {name: value for name, value in document.items() if name not in _FRAME}
    change(fields)
    return dump_document(kind, fields, version=version)


def fields_of(data: bytes) -> dict[str, Any]:
    """Return all fields of a document of any kind."""
    kind = data[:80].partition(b'"kind":"')[2].partition(b'"')[0].decode()
    return parse_document(data, kind, "a document")


def manifest_of(contents: Contents) -> tuple[str, bytes]:
    """Return the key of the latest manifest, and its document."""
    ref = max(key for key in contents if key.startswith("refs/") and len(contents[key]) > 7)
    key = fields_of(contents[ref])["manifest"]
    return key, codec.decode_document(contents[key], 1 << 30)


def rewrite_manifest(contents: Contents, change: Callable[[dict[str, Any]], Any]) -> Contents:
    """Return a store whose latest manifest is changed."""
    key, document = manifest_of(contents)
    return with_manifest(contents, key, rewrite(document, change))


def with_manifest(contents: Contents, key: str, document: bytes) -> Contents:
    """Return a store with another document in the place of a manifest; the refs that name it name the new one."""
    digest = codec.digest(document)
    data = codec.encode_document(document, digest=digest)
    new = str(ObjectKey(digest.identity.hex(), ObjectKey.parse(key).nonce))

    def rename(fields: dict[str, Any]) -> None:
        if fields["manifest"] == key:
            fields.update(manifest=new, manifest_size=len(data))

    changed = {
        name: rewrite(value, rename) if name.startswith("refs/") and len(value) > 7 else value
        for name, value in contents.items()
    }
    return changed | {new: data}
