"""A save that was cut off goes on in a new process: what is there and whole is not put again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import incckpt
from incckpt.backends import open_backend
from incckpt.errors import BackendError, SaveError
from incckpt.run import chunk_index
from incckpt.testing.faults import Fail, Fault, FaultyBackend
from tests.stores import orphans

pytestmark = pytest.mark.slow

CHUNK = 1 << 20
CHUNKS = 16


def state(moved: bool) -> dict[str, torch.Tensor]:
    """Return some chunks; where they have moved, by so little that each is stored as a delta."""
    values = torch.randn(CHUNKS * CHUNK // 4, generator=torch.Generator().manual_seed(1))
    return {"w": values * (1 + 2**-20) if moved else values}


def puts(store: Path, moved: bool) -> tuple[list[str], int]:
    """Save in what might be a new process, which knows only what the store says; return how, and the objects put."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("incckpt.run.upload.process_index", chunk_index.ChunkIndex)
        with incckpt.CheckpointManager(store, chunk_bytes=CHUNK) as manager:
            if moved:
                assert manager.restore(state(False)) == 1
            manager.save(2, state(moved)).result()
            (report,) = manager.history
    return sorted(report.by_way), report.put_objects


@pytest.mark.parametrize("moved", [False, True], ids=["full objects", "deltas"])
def test_what_a_cut_off_save_has_put_is_not_put_again(tmp_path: Path, moved: bool) -> None:
    if moved:
        with incckpt.CheckpointManager(tmp_path, chunk_bytes=CHUNK) as manager:
            manager.save(1, state(False))
    cut = Fault("put", "deltas/*" if moved else "objects/*", nth=13, times=None, do=Fail(BackendError("cut off")))
    dying = incckpt.CheckpointManager(FaultyBackend(open_backend(tmp_path), [cut]), threads=1, chunk_bytes=CHUNK)
    if moved:
        dying.restore(state(False))
    with pytest.raises(BackendError, match="cut off"):
        dying.save(2, state(moved)).result()
    with pytest.raises(SaveError):
        dying.close()
    ways, again = puts(tmp_path, moved)
    assert again == CHUNKS - 12, "what is there was put again"
    assert ("delta" in " ".join(ways)) == moved, ways
    assert torch.equal(incckpt.load(tmp_path, step=2)["w"], state(moved)["w"])
    assert not orphans(tmp_path)
