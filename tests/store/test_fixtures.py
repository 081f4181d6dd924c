"""Every version reads what earlier ones wrote."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import incckpt
from incckpt.backends import open_backend
from incckpt.run.verify import verify
from incckpt.state.tree import MAPPINGS, PACKED_KINDS
from incckpt.testing.compare import assert_same_state
from tests.fixtures.states import packed_state, state_at
from tests.stores import object_keys, orphans

ECRYPTFS = 143  # bytes of a name, the least of what file systems in use allow
STORES = sorted(path for path in (Path(__file__).parents[1] / "fixtures").iterdir() if (path / "incckpt.json").exists())


@pytest.mark.parametrize("store", STORES, ids=lambda path: path.name)
def test_every_checkpoint_restores(store: Path) -> None:
    for step in (1, 2, 3):
        assert_same_state(incckpt.load(store, step=step), state_at(step))
    assert torch.equal(incckpt.load(f"{store}#second@10")["other"], torch.arange(3))
    best = incckpt.load(f"{store}#default@best", metric="loss", keys="scalar")
    assert best["scalar"] == 2**53 + 3, "of equally good ones, the later"
    assert verify(store)


@pytest.mark.slow
def test_large_plain_values_restore() -> None:
    store = Path(__file__).parents[1] / "fixtures" / "format2"
    state = packed_state()
    kinds = {"bytes", "bytearray", "str", "list", "tuple", "set", "frozenset", "deque", *MAPPINGS}
    assert set(state) == kinds == {*PACKED_KINDS} - {"pickle"}
    assert_same_state(incckpt.load(f"{store}#packed"), state)
    part = incckpt.load(f"{store}#packed", keys="list.3")
    assert part == {"list": [None] * 3 + [-5] + [None] * (len(state["list"]) - 4)}


@pytest.mark.parametrize("store", STORES, ids=lambda path: path.name)
def test_a_run_goes_on_and_is_collected(store: Path, tmp_path: Path) -> None:
    copy = tmp_path / "store"
    shutil.copytree(store, copy)
    with incckpt.CheckpointManager(copy, keep_last_n=1) as manager:
        assert [(c.step, c.attempt, c.metrics.get("loss")) for c in manager.checkpoints()] == [
            (1, 1, 1.0),
            (2, 1, 0.5),
            (3, 2, 0.5),
        ]
        manager.save(4, state_at(3)).result()
        manager.wait()
        assert [c.step for c in manager.checkpoints()] == [4]
    assert orphans(copy) == set()
    assert len(object_keys(open_backend(copy))) < len(object_keys(open_backend(store)))
    assert_same_state(incckpt.load(copy), state_at(3))


def test_names_of_format_2_fit_every_file_system(tmp_path: Path) -> None:
    """A run of format 1 goes on with shorter names of deltas, and keeps the long ones that it needs still."""
    copy = tmp_path / "store"
    shutil.copytree(STORES[0], copy)
    before = {path.name for path in copy.rglob("*")}
    with incckpt.CheckpointManager(copy) as manager:
        state = state_at(3)
        assert manager.restore(state) == 3
        for step in range(4, 7):
            state["model"]["weight"][step] *= 1 + 1e-7
            manager.save(step, state).result()
    assert_same_state(incckpt.load(copy), state)
    assert any(len(path.name) > ECRYPTFS for path in (copy / "deltas").rglob("*"))
    names = {path.name for path in copy.rglob("*")} - before
    assert any(path.name in names for path in (copy / "deltas").rglob("*"))
    assert max(map(len, names)) <= ECRYPTFS
    assert verify(copy)


def test_there_are_deltas_among_them() -> None:
    for store in STORES:
        assert any((store / "deltas").rglob("*.*"))
    assert STORES
