"""A base that is damaged where its delta does not use it: the checkpoint is whole, and nothing is built on the base."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import incckpt
from incckpt.codec.objects import WAYS, read_header
from incckpt.store.objects import chunk_keys
from incckpt.store.refs import Ref
from incckpt.store.store import Store
from tests.stores import orphans

pytestmark = pytest.mark.slow

MIB = 1 << 20


def save_with_a_damaged_base(folder: Path) -> torch.Tensor:
    """Save a tensor of four frames twice, the first frame new, the others as deltas; damage the base's first frame."""
    weights = torch.randn(MIB)
    with incckpt.CheckpointManager(folder) as manager:
        manager.save(1, {"w": weights}).result()
        weights[: MIB // 4] = torch.randn(MIB // 4)
        weights[MIB // 4 :] *= 1 + 2**-20
        manager.save(2, {"w": weights}).result()
    store = Store.open(str(folder))
    run = store.run("default")
    latest = run.lineage().latest
    assert latest is not None
    ref = run.read(latest)
    assert isinstance(ref, Ref)
    (chunk,) = store.manifest(ref).chunks
    own, base = chunk_keys(chunk)
    delta, full = read_header(store.objects.get(own)), read_header(store.objects.get(base))
    assert [WAYS[way] == "delta" for way in delta.ways] == [False, True, True, True]
    path = folder / str(base)
    data = np.fromfile(path, np.uint8)
    data[(full.offsets[0] + full.offsets[1]) // 2] ^= 1  # of a plane that is stored as it is: it decodes, wrongly
    data.tofile(path)
    return weights


@pytest.mark.parametrize("verify", [True, False])
def test_a_damaged_base_is_not_built_on(tmp_path: Path, verify: bool, caplog: pytest.LogCaptureFixture) -> None:
    weights = save_with_a_damaged_base(tmp_path)
    assert torch.equal(incckpt.load(tmp_path)["w"], weights)
    target = {"w": torch.zeros(MIB)}
    with incckpt.CheckpointManager(tmp_path, verify=verify) as manager:
        assert manager.restore(target) == 2
        assert torch.equal(target["w"], weights)
        assert "the next save stores these chunks in full" in caplog.text
        target["w"][:100] += 1e-3
        manager.save(3, target).result()
        target["w"][:100] += 1e-3
        manager.save(4, target).result()
    assert torch.equal(incckpt.load(tmp_path)["w"], target["w"])
    assert not incckpt.verify(tmp_path, step=2).ok
    for step in (3, 4):
        assert incckpt.verify(tmp_path, step=step).ok
    assert not orphans(tmp_path)
