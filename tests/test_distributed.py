"""A torch.distributed job: one run for each rank, and the default run for rank 0 alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import incckpt

pytestmark = pytest.mark.slow


def test_ranks_with_runs_of_their_own(tmp_path: Path) -> None:
    store, rendezvous = tmp_path / "store", tmp_path / "rendezvous"
    command = [sys.executable, "-m", "tests.children.rank"]
    processes = [
        subprocess.Popen([*command, str(rank), store, rendezvous], stderr=subprocess.PIPE, text=True) for rank in (0, 1)
    ]
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    for rank in (0, 1):
        assert incckpt.load(store, run=f"rank{rank}") == {"rank": rank}
        assert incckpt.load(f"{store}#saved-by-{rank}") == {"rank": rank}
