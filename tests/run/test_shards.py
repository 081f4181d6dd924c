"""Processes that store their parts of one checkpoint at the same time."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from incckpt.backends.base import ReadableBuffer
from incckpt.run.shards import Brief, Shard, ShardWriter
from incckpt.store.objects import ObjectKey, Objects
from incckpt.store.store import Store


def test_what_equals_another_ranks_shard_is_put_by_one_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {f"w{index}": torch.full((1 << 18,), float(index)) for index in range(12)}
    first_put, own_put = threading.Barrier(2), Objects.put_many
    begun: set[Objects] = set()

    def put_many(self: Objects, objects: Sequence[tuple[ObjectKey, ReadableBuffer]]) -> None:
        own_put(self, objects)
        if self not in begun:  # go on once every rank has put what it began with
            begun.add(self)
            first_put.wait(60)

    monkeypatch.setattr(Objects, "put_many", put_many)
    with Store.open(str(tmp_path / "store")) as store:
        store.create()
        identifier = store.id

    def save(rank: int) -> Shard:
        writer = ShardWriter(Store.open(str(tmp_path / "store")), threads=1, chunk_bytes=1 << 20)
        try:
            return writer.put(writer.stage(state), Brief(1, identifier, "default", turn=(rank, 2)), 1)
        finally:
            writer.close()

    with ThreadPoolExecutor(2) as pool:
        shards = list(pool.map(save, range(2)))
    found = [path.name for path in (tmp_path / "store" / "objects").rglob("*.*")]
    assert len({name.partition(".")[0] for name in found}) == len(state)
    assert len(found) == len(state), "both ranks have put what is the same"
    assert sum(shard.put_objects for shard in shards) == len(found)
    for shard in shards:
        assert len({chunk.identity for chunk in shard.chunks}) == len(state)
        assert all((tmp_path / "store" / key).stat().st_size == size for key, size in shard.chunks.sizes.items())
