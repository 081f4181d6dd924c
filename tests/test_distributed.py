"""A torch.distributed job: one run for each rank, and the default run for rank 0 alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import incckpt
from tests.programs import run

pytestmark = pytest.mark.slow


def test_ranks_with_runs_of_their_own(tmp_path: Path) -> None:
    store, rendezvous = tmp_path / "store", tmp_path / "rendezvous"
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda rank: run("-m", "tests.children.rank", rank, store, rendezvous), (0, 1)))
    assert [one.returncode for one in done] == [0, 0], [one.stderr for one in done]
    for rank in (0, 1):
        assert incckpt.load(store, run=f"rank{rank}") == {"rank": rank}
        assert incckpt.load(f"{store}#saved-by-{rank}") == {"rank": rank}
