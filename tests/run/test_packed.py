"""Large plain values through a store: they cost what their bytes cost, and leave the tensors' chunks alone."""

from __future__ import annotations

import random
from collections import OrderedDict, deque
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import incckpt
from incckpt.backends.local import LocalBackend
from incckpt.backends.memory import MemoryBackend
from incckpt.errors import CorruptionError, PickleRefusedError
from incckpt.run.verify import verify
from incckpt.store.refs import Ref
from incckpt.store.store import Store
from incckpt.testing import strategies as states
from incckpt.testing.compare import assert_same_state
from tests.effort import tries
from tests.stores import orphans

pytestmark = pytest.mark.slow


def log_of(count: int) -> list[dict[str, Any]]:
    return [{"step": i, "loss": random.Random(i).random(), "phase": "train"} for i in range(count)]


@settings(
    max_examples=tries(15),
    deadline=None,
    derandomize=True,
    suppress_health_check=[*HealthCheck],
)
@given(st.data())
def test_any_state_is_saved_and_loaded_for_real(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("store")
    state = {"state": data.draw(states.states()), "large": data.draw(states.packed_values())}
    incckpt.save(state, folder)
    assert_same_state(incckpt.load(folder), state)
    again = [data.draw(states.packed_values()), state["large"]]
    incckpt.save(again, folder)
    assert_same_state(incckpt.load(folder), again)
    assert verify(str(folder)).ok


def test_a_growing_log_writes_its_end_and_no_tensor(tmp_path: Path) -> None:
    weight, log = torch.randn(600_000), log_of(40_000)
    app = {"w": weight, "log": log, "blob": random.Random(0).randbytes(5_000_000)}
    with incckpt.CheckpointManager(tmp_path, threads=1) as manager:
        manager.save(1, app).result()
        log += log_of(10)
        manager.save(2, app).result()
        manager.save(3, app).result()
        first, second, third = manager.history
    assert first.changed_chunks == first.chunks >= 3
    assert (second.changed_chunks, second.put_objects) == (1, 1)
    assert (third.changed_chunks, third.put_objects) == (0, 0)
    assert first.manifest_bytes < 4000
    assert incckpt.load(tmp_path, keys="[lb]*") == {"log": log, "blob": app["blob"]}
    assert incckpt.load(tmp_path, step=1)["log"] == log[:-10]


def test_a_restore_and_the_save_after_it_are_incremental(tmp_path: Path) -> None:
    app: dict[str, Any] = {"w": torch.randn(600_000), "log": log_of(5000), "last": deque([0.5] * 3000, 4000)}
    incckpt.save(app, tmp_path, step=1)
    target: dict[str, Any] = {"w": torch.zeros(600_000), "log": [], "last": deque()}
    log = target["log"]
    with incckpt.CheckpointManager(tmp_path) as manager:
        assert manager.restore(target) == 1
        assert target["log"] is log
        assert target["log"] == app["log"]
        assert list(target["last"]) == list(app["last"])
        target["w"][:5] += 1
        manager.save(2, target).result()
        (report,) = manager.history
    assert report.put_objects == 1
    assert torch.equal(incckpt.load(tmp_path)["w"], target["w"])


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    state = {"model": OrderedDict(w=torch.ones(3)), "log": log_of(5000), "logs": {"a": "x" * 100_000}}
    incckpt.save(state, tmp_path)
    with Store(LocalBackend(str(tmp_path))) as store:
        run = store.run("default")
        (name,) = run.lineage().live
        ref = run.read(name)
        assert isinstance(ref, Ref)
        manifest = store.manifest(ref)
        assert len(manifest.packed) == 2
        keys = [manifest.chunks[chunk] for item in manifest.packed for chunk, _, _ in item.pieces]
    assert_same_state(incckpt.load(tmp_path, keys="logs.a"), {"logs": state["logs"]})
    for chunk in keys:
        (tmp_path / f"objects/{chunk.identity[:2]}/{chunk.identity[2:]}.{chunk.nonce}").unlink(missing_ok=True)
    assert_same_state(incckpt.load(tmp_path, keys="model.*"), {"model": state["model"]})
    with pytest.raises(CorruptionError, match=r"needed by tensor log"):
        incckpt.load(tmp_path, keys="log.3.loss")


def test_many_parameters_in_a_group_and_many_parts_of_a_module(tmp_path: Path) -> None:
    def make() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        model = torch.nn.ModuleList([torch.nn.Linear(1, 1) for _ in range(1100)])
        return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    model, optimizer = make()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    incckpt.save({"model": model, "optimizer": optimizer}, tmp_path)
    other, second = make()
    with incckpt.CheckpointManager(tmp_path) as manager:
        manager.restore({"model": other, "optimizer": second})
    assert_same_state(other.state_dict(), model.state_dict())
    assert_same_state(second.state_dict(), optimizer.state_dict())


def test_large_pickles_are_allowed_twice(tmp_path: Path) -> None:
    state = {"random": random.Random(1), "big": _Opaque("x" * 200_000)}
    incckpt.save(state, tmp_path, allow_pickle=True)
    with pytest.raises(PickleRefusedError, match="Opaque"):
        incckpt.load(tmp_path, keys="big")
    assert incckpt.load(tmp_path, allow_pickle=True)["big"].text == "x" * 200_000


class _Opaque:
    def __init__(self, text: str) -> None:
        self.text = text


def test_chunks_of_values_are_collected_with_their_checkpoints(tmp_path: Path) -> None:
    backend = MemoryBackend(str(tmp_path))
    with incckpt.CheckpointManager(backend, keep_last_n=1) as manager:
        for step in range(1, 4):
            manager.save(step, {"log": log_of(2000 * step), "text": str(step) * 100_000}).result()
        manager.wait()
        assert orphans(backend) == set()
        assert_same_state(incckpt.load(backend)["log"], log_of(6000))
