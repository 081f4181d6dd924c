"""What went wrong in the project's seed, and must not again.

Lesson 1 is in ``test_threshold.py``, 2 and 8 in ``test_manager.py``, 3 in the simulation, 4 in ``test_corruption.py``.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import incckpt
from incckpt.backends.memory import MemoryBackend
from incckpt.codec import objects as codec
from incckpt.testing.faults import CountingBackend
from tests.stores import object_keys
from tests.test_manager import assert_same, train, training_state


def test_lesson_5_every_dtype_keeps_its_bits(tmp_path: Path) -> None:
    state = {
        "int64": torch.tensor([16777217, 2**53 + 1, -(2**63)]),
        "nan payloads": torch.tensor([0x7FC1, 0x7F81, -0x3F, 0], dtype=torch.int16).view(torch.bfloat16),
        "minus zero": torch.tensor([-0.0, 0.0], dtype=torch.bfloat16),
        "float64": torch.tensor([1e-320, float("-inf")], dtype=torch.float64),
        "bool": torch.tensor([True, False]),
        "python": 2**53 + 1,
    }
    incckpt.save(state, tmp_path)
    restored = incckpt.load(tmp_path)
    assert_same(restored, state)
    assert restored["nan payloads"].view(torch.int16).tolist() == [0x7FC1, 0x7F81, -0x3F, 0]
    assert torch.signbit(restored["minus zero"]).tolist() == [True, False]
    stored = sum(path.stat().st_size for path in (tmp_path / "objects").rglob("*") if path.is_file())
    assert stored < 4000


def test_lesson_6_what_is_added_later_is_saved_and_so_is_everything_else(tmp_path: Path) -> None:
    app = training_state()
    with incckpt.CheckpointManager(tmp_path) as manager:
        manager.save(1, app).result()
        app["head"] = torch.nn.Linear(8, 2)
        app["optimizer"].add_param_group({"params": app["head"].parameters()})
        app["head"](torch.randn(4, 8)).sum().backward()
        train(app, 2)
        manager.save(2, app).result()
    expected = train(app, 3)
    other = training_state(seed=3)
    other["head"] = torch.nn.Linear(8, 2)
    other["optimizer"].add_param_group({"params": other["head"].parameters()})
    with incckpt.CheckpointManager(tmp_path) as manager:
        assert manager.restore(other) == 2
    assert_same(other["optimizer"].state_dict()["param_groups"][1]["params"], [6, 7])
    assert train(other, 3) == expected
    assert_same(other["head"], app["head"])


def test_lesson_7_deduplication_does_not_depend_on_the_coding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {"w": torch.randn(1 << 20)}
    backend = CountingBackend(MemoryBackend(str(tmp_path)))
    with incckpt.CheckpointManager(backend) as manager:
        manager.save(1, weights).result()
    first = object_keys(backend)
    plain = codec.encode

    def another_codec(raw: object, itemsize: int, **options: object) -> codec.Encoded:
        return plain(raw, 1, digest=options["digest"])  # type: ignore[arg-type]

    monkeypatch.setattr(codec, "encode", another_codec)
    backend.reset()
    with incckpt.CheckpointManager(backend, run="other") as manager:
        manager.save(1, weights).result()
    assert object_keys(backend) - first == {key for key in backend.keys("put") if key.startswith("objects/")}
    assert len(object_keys(backend) - first) == 1, "only the manifest is new"
