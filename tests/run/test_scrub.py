"""Objects that are lost under a living writer: noticed within a stated number of saves, and stored again."""

from __future__ import annotations

import logging
import math
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import incckpt
from incckpt.backends.base import Backend
from incckpt.backends.local import LocalBackend
from incckpt.backends.memory import MemoryBackend
from incckpt.errors import BackendError, KeyNotFoundError
from incckpt.run.scrub import LOOKS, Scrubber
from incckpt.store.objects import DELTAS, OBJECTS, Objects
from incckpt.testing.faults import CountingBackend, Fail, Fault, FaultyBackend
from tests.stores import object_keys

pytestmark = pytest.mark.slow

TENSORS = 20  # of 1 MiB each: as many chunks


def state(seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"w{index}": torch.randn(1 << 18, generator=generator) for index in range(TENSORS)}
    return {**tensors, "step": 0}


@pytest.fixture(params=["memory", "local"])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Backend]:
    made: Backend = MemoryBackend(uuid.uuid4().hex) if request.param == "memory" else LocalBackend(tmp_path)
    with made:
        yield made


def saves_until_whole(manager: incckpt.CheckpointManager, backend: Backend, app: dict[str, Any], most: int) -> int:
    """Save what does not change until the latest checkpoint is whole again; return how many saves that took."""
    for count in range(1, most + 1):
        app["step"] += 1
        manager.save(app["step"], app).result()
        if incckpt.verify(backend, level="sizes", step="latest", progress=False):
            return count
    return most + 1


def cut(backend: Backend, key: str) -> None:
    backend.put(key, backend.get(key)[:-1])


def chunk_objects(backend: Backend) -> list[str]:
    """Return the keys of the objects of tensors: manifests are small."""
    return sorted(entry.key for space in (OBJECTS, DELTAS) for entry in backend.list(space) if entry.size > 1 << 16)


@pytest.mark.parametrize("base", [True, False])
@pytest.mark.parametrize("harm", [lambda backend, key: backend.delete([key]), cut], ids=["gone", "cut"])
def test_what_is_lost_is_stored_again(
    backend: Backend, base: bool, harm: Callable[[Backend, str], None], caplog: pytest.LogCaptureFixture
) -> None:
    app = state()
    with incckpt.CheckpointManager(backend, base=base, keep_last_n=1, threads=2) as manager:
        manager.save(1, app).result()
        app["step"] = 2
        manager.save(2, app).result()
        keys = chunk_objects(backend)
        assert len(keys) == TENSORS
        for key in (keys[0], keys[7], keys[-1]):
            harm(backend, key)
        with caplog.at_level(logging.WARNING):
            took = saves_until_whole(manager, backend, app, 100)
        assert 1 < took <= math.ceil((TENSORS + 1) / LOOKS)
        assert "gone from" in caplog.text
        assert "tensors: w" in caplog.text
        loaded = incckpt.load(backend, progress=False)
        for name, value in app.items():
            assert torch.equal(torch.as_tensor(loaded[name]), torch.as_tensor(value)), name
        again = len(caplog.records)
        assert saves_until_whole(manager, backend, app, 5) == 1
        assert len(caplog.records) == again, "what was stored again is no news"


def test_the_base_of_a_delta_that_is_lost_is_replaced(tmp_path: Path) -> None:
    app = state()
    backend = LocalBackend(tmp_path)
    with backend, incckpt.CheckpointManager(backend, keep_last_n=1, threads=2) as manager:
        manager.save(1, app).result()
        full = chunk_objects(backend)
        for step in range(2, 12):
            for name in (f"w{index}" for index in range(TENSORS)):
                app[name].mul_(1 + 2**-20)
            manager.save(step, app).result()
            if step == 4:
                assert any(entry.key for entry in backend.list(DELTAS)), "the test needs deltas"
                backend.delete([full[3], full[11]])
        assert incckpt.verify(backend, level="hashes", step="latest", progress=False)


def test_the_drop_in_save_notices_too(tmp_path: Path) -> None:
    app = state()
    for _ in range(2):
        incckpt.save(app, tmp_path)
    with LocalBackend(tmp_path) as backend:
        backend.delete(chunk_objects(backend)[:1])
        for _ in range(math.ceil((TENSORS + 1) / LOOKS)):
            incckpt.save(app, tmp_path)
        assert incckpt.verify(tmp_path, level="hashes", step="latest", progress=False)


def test_a_save_makes_few_requests_for_it(backend: Backend) -> None:
    app = state()
    counting = CountingBackend(backend)
    with incckpt.CheckpointManager(counting, threads=2) as manager:
        looked: list[str] = []
        for step in range(1, 10):
            counting.reset()
            app["step"] = step
            manager.save(step, app).result()
            heads = counting.keys("head")
            assert len(heads) <= LOOKS
            looked += heads
            if step > 1:
                small = sum(counting.calls[name] for name in ("get", "create", "put", "list", "delete"))
                assert small <= 10, dict(counting.calls)
    unchanged = {key for key in object_keys(backend) if key in looked}
    assert len(unchanged) >= TENSORS
    round_trip = math.ceil((TENSORS + 1) / LOOKS) * LOOKS
    for start in range(len(looked) - round_trip):
        assert len(set(looked[start : start + TENSORS])) == TENSORS, "some are looked at twice before others are once"


def test_a_store_that_refuses_to_be_looked_at_holds_no_save_up(
    backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    app = state()
    refusal = Fault("head", "objects/*", times=None, do=Fail(BackendError("forbidden")))
    faulty = CountingBackend(FaultyBackend(backend, [refusal]))
    with incckpt.CheckpointManager(faulty, threads=2) as manager:
        for step in range(1, 5):
            manager.save(step, app).result()
        faulty.reset()
        with caplog.at_level(logging.WARNING):
            manager.save(5, app).result()
        assert faulty.calls["head"] == 1
        assert "could not look" in caplog.text


def test_one_answer_that_lies_loses_nothing(backend: Backend) -> None:
    app = state()
    lie = Fault("head", "objects/*", do=Fail(KeyNotFoundError("no such key")))
    counting = CountingBackend(FaultyBackend(backend, [lie]))
    with incckpt.CheckpointManager(counting, threads=2) as manager:
        for step in range(1, 5):
            manager.save(step, app).result()
        assert manager.history[-1].put_objects + manager.history[1].put_objects == 0


names = st.integers(0, 30).map(lambda number: f"objects/ab/{number:062x}.{'1' * 16}")


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.sets(names, max_size=25), min_size=1, max_size=8), st.data())
def test_the_longest_unlooked_come_first(reliances: list[set[str]], data: st.DataObject) -> None:
    """Whatever saves rely on: nothing is looked at twice while another that stayed as long was not looked at."""
    backend = MemoryBackend(uuid.uuid4().hex)
    scrubber = Scrubber(Objects(backend))
    since: dict[str, int] = {}
    ever: set[str] = set()
    clock = 0
    for relied in reliances:
        clock += 1
        since = {key: since.get(key, clock) for key in relied}
        for key in relied:
            backend.put(key, b"12345")
        gone = data.draw(st.sets(st.sampled_from(sorted(relied)))) if relied else set()
        backend.delete(gone)
        scrubber.rely_on(dict.fromkeys(sorted(relied), 5))
        due = scrubber.due()
        assert len(due) == min(LOOKS, len(relied))
        rest = relied - set(due)
        if rest and due:
            assert max(since[key] for key in due) <= min(since[key] for key in rest)
        clock += 1
        for key in due:
            scrubber.look(key)
            since[key] = clock
        assert gone & set(due) <= scrubber.lost <= relied
        ever |= gone
        assert scrubber.lost <= ever
