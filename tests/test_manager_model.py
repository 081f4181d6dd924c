"""A manager against a plain dict, in any order of what a trainer does while earlier saves are being written."""

from __future__ import annotations

import threading
import uuid
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import incckpt
from incckpt.backends.base import Backend, ReadableBuffer
from incckpt.backends.memory import MemoryBackend
from incckpt.backends.wrapper import WrapperBackend
from incckpt.errors import BackendError, SaveError
from tests.effort import tries

pytestmark = pytest.mark.slow

MIB = 1 << 20
NAMES = st.sampled_from(["a", "b", "c", "d"])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int32])


class Gate(WrapperBackend):
    """Lets objects pass only while it is open; fails them when told to."""

    def __init__(self, inner: Backend) -> None:
        super().__init__(inner)
        self.open = threading.Event()
        self.open.set()
        self.failing = 0

    def put(self, key: str, data: ReadableBuffer) -> None:
        """Wait for the gate, then put or fail."""
        if key.startswith("objects"):
            self.open.wait()
            if self.failing:
                self.failing -= 1
                raise BackendError("injected")
        super().put(key, data)


def copy_of(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a copy that the trainer does not write to."""
    return {name: value.clone() for name, value in state.items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Say whether two states are the same, bit for bit."""
    return left.keys() == right.keys() and all(
        value.dtype == right[name].dtype and torch.equal(value.view(torch.uint8), right[name].view(torch.uint8))
        for name, value in left.items()
    )


class ManagerModel(RuleBasedStateMachine):
    """Saves, changes, failures, restores and restarts; every checkpoint announced has to come back bit for bit."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = Gate(MemoryBackend(uuid.uuid4().hex))
        self.saved: dict[int, dict[str, torch.Tensor]] = {}
        self.pending: list[tuple[int, Future[Any]]] = []
        self.committed: set[int] = set()
        self.state: dict[str, torch.Tensor] = {}
        self.step = 0
        self.restored: int | None = None  # until the next save, which goes on from it
        self.generator = torch.Generator()

    @initialize(seed=st.integers(0, 1 << 30), chunks=st.sampled_from([MIB, 2 * MIB]), keep=st.sampled_from([None, 2]))
    def start(self, seed: int, chunks: int, keep: int | None) -> None:
        """Begin a run."""
        self.generator.manual_seed(seed)
        self.options: dict[str, Any] = {"chunk_bytes": chunks, "keep_last_n": keep, "threads": 2}
        self.keep = keep
        self.manager = incckpt.CheckpointManager(self.gate, **self.options)
        self.state["a"] = self._noise(300_000, torch.float32)

    def _noise(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        values = torch.randn(count, generator=self.generator) * 0.02
        return (values * 1e6).to(dtype) if dtype == torch.int32 else values.to(dtype)

    @rule(name=NAMES, count=st.integers(1, 700_000), dtype=DTYPES)
    def put_tensor(self, name: str, count: int, dtype: torch.dtype) -> None:
        """Add a tensor, or give one another size or type."""
        self.state[name] = self._noise(count, dtype)

    @rule(name=NAMES)
    def drop_tensor(self, name: str) -> None:
        """Take a tensor out."""
        self.state.pop(name, None)

    @rule()
    def train(self) -> None:
        """Change everything a little, so that deltas pay."""
        for value in self.state.values():
            value.add_(torch.ones_like(value) if value.dtype == torch.int32 else value * 1e-3)

    @rule(name=NAMES, at=st.floats(0, 1, exclude_max=True))
    def touch(self, name: str, at: float) -> None:
        """Change one element."""
        if name in self.state:
            self.state[name][int(at * len(self.state[name]))] += 1

    @rule(at=st.floats(0, 1, exclude_max=True))
    def go_back(self, at: float) -> None:
        """Have the values of an earlier checkpoint again, by other means than a restore."""
        if self.committed:  # which these are depends on threads, so nothing may be drawn from them
            step = sorted(self.committed)[int(at * len(self.committed))]
            self.state.update(copy_of(self.saved[step]))

    @rule()
    def save(self) -> None:
        """Save, and go on without waiting if that is possible."""
        if len(self.pending) >= 2:
            self.finish()
        self.step += 1
        if self.restored is not None:
            self.committed = {other for other in self.committed if other <= self.restored}
            self.restored = None
        try:
            future = self.manager.save(self.step, self.state)
        except SaveError:  # of an earlier one
            future = self.manager.save(self.step, self.state)
        self.saved[self.step] = copy_of(self.state)
        self.pending.append((self.step, future))

    @rule()
    def shut(self) -> None:
        """Let nothing through for now."""
        self.gate.open.clear()

    @rule(failures=st.integers(0, 2))
    def finish(self, failures: int = 0) -> None:
        """Let everything through, some of it failing, and wait."""
        self.gate.failing = failures
        self.gate.open.set()
        for step, future in self.pending:
            error = future.exception()
            if error is None:
                self.committed.add(step)
            else:
                assert isinstance(error, BackendError), error
        self.pending.clear()
        self.gate.failing = 0
        if self.keep is not None:
            self.committed = set(sorted(self.committed)[-self.keep :])

    @rule(restart=st.booleans(), earlier=st.booleans(), in_place=st.booleans())
    def restore(self, restart: bool, earlier: bool, in_place: bool) -> None:
        """Restore the latest or an earlier checkpoint, in this manager or a new one, and go on from there."""
        self.finish()
        if restart:
            self._close()
            self.manager = incckpt.CheckpointManager(self.gate, **self.options)
        if not self.committed:
            return
        step = min(self.committed) if earlier else max(self.committed)
        wanted = self.saved[step]
        if not in_place or not same_shapes(self.state, wanted):
            self.state = {name: torch.zeros_like(value) for name, value in wanted.items()}
        assert self.manager.restore(self.state, step=step if earlier else None) == step
        assert same(self.state, wanted)
        self.step = self.restored = step

    @precondition(lambda self: not self.pending)
    @invariant()
    def every_checkpoint_is_there(self) -> None:
        """What was announced can be listed and loaded."""
        assert {checkpoint.step for checkpoint in self.manager.checkpoints()} == self.committed
        for step in self.committed:
            assert same(incckpt.load(self.gate, step=step), self.saved[step]), step

    def _close(self) -> None:
        try:
            self.manager.close()
        except SaveError:
            pass  # seen by its future

    def teardown(self) -> None:
        """Finish what is pending."""
        if hasattr(self, "manager"):
            self.finish()
            self.every_checkpoint_is_there()
            self._close()


def same_shapes(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Say whether one state can be restored into the memory of another."""
    return {name: (value.shape, value.dtype) for name, value in left.items()} == {
        name: (value.shape, value.dtype) for name, value in right.items()
    }


TestManagerModel = ManagerModel.TestCase
TestManagerModel.settings = settings(max_examples=tries(25), stateful_step_count=25, deadline=None)
