"""What a store makes its reader allocate: checked before, bounded by an option, and never a bare `MemoryError`."""

from __future__ import annotations

import sys
import tracemalloc
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import incckpt
from incckpt.backends.memory import MemoryBackend
from incckpt.errors import CollectionError, CorruptionError, IncckptError, MemoryLimitError, OptionError
from incckpt.store import refs, untrusted
from incckpt.store.document import dump_document
from tests import programs
from tests.hostile import Contents, filled, manifest_of, rewrite_manifest, saved, with_manifest

pytestmark = pytest.mark.slow

TIB = 1 << 40
MIB = 1 << 20


def state() -> dict[str, Any]:
    """Return a state with large and small tensors, and packed values."""
    return {"w": torch.zeros(3 * MIB, dtype=torch.uint8), "small": torch.arange(8.0), "packed": list(range(3000))}


@cache
def sound() -> Contents:
    """Return a store of that state."""
    return saved(state())


def chunk_of(nbytes: int) -> Callable[[dict[str, Any]], None]:
    """Return a change that makes the first chunk larger."""

    def change(fields: dict[str, Any]) -> None:
        fields["chunks"][0]["bytes"] = nbytes

    return change


def object_of(nbytes: int) -> Callable[[dict[str, Any]], None]:
    """Return a change that makes the first object larger."""

    def change(fields: dict[str, Any]) -> None:
        fields["chunks"][0]["size"] = nbytes

    return change


def many_pieces(fields: dict[str, Any]) -> None:
    """Make one tensor of one chunk, over and over: 1 TiB from a few bytes."""
    large = next(index for index, item in enumerate(fields["ranges"]) if item["bytes"] == 3 * MIB)
    chunk = fields["ranges"][large]["pieces"][0][0]
    count = 20_000
    fields["ranges"][large] = {"bytes": 3 * MIB * count, "item": 1, "pieces": [[chunk, 0, 3 * MIB]] * count}
    for tensor in fields["tensors"]:
        if tensor["shape"] == [3 * MIB]:
            tensor["shape"] = [3 * MIB * count]


def wide_gaps(fields: dict[str, Any]) -> None:
    """Make a tensor's elements lie 1 TiB apart."""
    for tensor in fields["tensors"]:
        if tensor["shape"] == [8]:
            tensor["stride"] = [TIB]
            tensor["flags"] = ["packed"]
            tensor["pieces"] = [{"range": tensor["pieces"][0]["range"]}]


CHANGES = [chunk_of(TIB), object_of(TIB), chunk_of((1 << 63) - 1), object_of((1 << 63) - 1), many_pieces, wide_gaps]


def uses(backend: MemoryBackend) -> dict[str, Callable[[], Any]]:
    """Return what may be done with a store."""

    def restored() -> None:
        with incckpt.CheckpointManager(backend, read_only=True) as manager:
            manager.restore(state())

    def loaded() -> Any:
        with incckpt.CheckpointManager(backend, read_only=True, max_bytes=100 * MIB) as manager:
            return manager.load()

    return {
        "load": lambda: incckpt.load(backend),
        "load a part": lambda: incckpt.load(backend, keys=["w", "small"], max_bytes=100 * MIB),
        "restore": restored,
        "manager.load": loaded,
    }


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__qualname__)
def test_what_would_take_a_tebibyte_takes_nothing(change: Callable[[dict[str, Any]], None]) -> None:
    backend = filled(rewrite_manifest(sound(), change))
    for name, use in uses(backend).items():
        with pytest.raises((MemoryLimitError, CorruptionError, incckpt.errors.StateMismatchError)):
            pytest.fail(f"{name} gave {use()!r:.80}")
    assert not incckpt.verify(backend).ok or change is wide_gaps or change is many_pieces


def test_a_limit_of_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = filled(sound())
    with pytest.raises(MemoryLimitError, match=r"step 1 takes 3,\d+,\d+ bytes.*max_bytes=3\d{6}") as raised:
        incckpt.load(backend, max_bytes=3 * MIB - 1)
    needed = int(str(raised.value).partition("max_bytes=")[2].split()[0])
    assert incckpt.load(backend, max_bytes=needed)["w"].shape == (3 * MIB,)
    assert incckpt.load(backend, keys="small", max_bytes=MIB)["small"][3] == 3.0
    monkeypatch.setenv("INCCKPT_MAX_BYTES", "1000")
    with pytest.raises(MemoryLimitError, match="1,000 are allowed"):
        incckpt.load(backend)
    incckpt.load(backend, max_bytes=needed)
    monkeypatch.setenv("INCCKPT_MAX_BYTES", "a lot")
    with pytest.raises(OptionError, match="INCCKPT_MAX_BYTES"):
        incckpt.load(backend)


def test_a_target_of_its_own_memory_needs_none() -> None:
    target = state()
    with incckpt.CheckpointManager(filled(sound()), max_bytes=2 * MIB) as manager:
        assert manager.restore(target) == 1
        manager.save(2, target).result()


def test_a_limit_is_no_damage() -> None:
    contents = rewrite_manifest(sound(), many_pieces)
    with incckpt.CheckpointManager(filled(contents), max_bytes=100 * MIB) as manager, pytest.raises(MemoryLimitError):
        manager.load()  # and is not passed over for an earlier checkpoint


def test_a_document_that_is_mostly_brackets() -> None:
    contents = sound()
    key, _ = manifest_of(contents)
    bomb = b'{"format":1,"kind":"manifest","x":[' + b"[]," * (20 * MIB) + b"[]]}"
    small = with_manifest({**contents}, key, bomb)
    assert sum(map(len, small.values())) < 200_000
    with pytest.raises(MemoryLimitError, match="the manifest of step 1 takes"):
        incckpt.load(filled(small), max_bytes=1 << 30)


def test_a_small_object_that_holds_a_long_manifest() -> None:
    contents = sound()
    key, document = manifest_of(contents)
    bomb = with_manifest({**contents}, key, document[:-1] + b" " * (24 * MIB) + b"}")
    assert sum(map(len, bomb.values())) < 200_000
    backend = filled(bomb)
    tracemalloc.start()
    try:
        with pytest.raises(MemoryLimitError, match="the manifest of step 1 takes"):
            incckpt.load(backend, max_bytes=8 * MIB)
        assert tracemalloc.get_traced_memory()[1] < 8 * MIB, "more was taken than allowed"
    finally:
        tracemalloc.stop()


def test_lists_are_limited_too() -> None:
    contents = sound()
    names = [{"ref": f"000001-{step:012}-{'0' * 16}"} for step in range(40_000)]
    lineage = dump_document("lineage", {"attempt": 1, "refs": [], "abandoned": names})
    condemned = dump_document("condemned", {"keys": [f"objects/00/{'0' * 62}.{index:016x}" for index in range(20_000)]})
    for key, data in (("runs/default/attempts/000001.from", lineage), ("gc/0123456789abcdef.condemned", condemned)):
        backend = filled(contents | {key: data})
        with pytest.raises(IncckptError) as raised, incckpt.CheckpointManager(backend, max_bytes=MIB) as manager:
            manager.save(2, state()).result()
        assert isinstance(raised.value.__cause__ or raised.value, MemoryLimitError), key
        with incckpt.CheckpointManager(backend, max_bytes=100 * MIB) as manager:
            manager.save(2, state()).result()


def test_a_long_ref_is_not_read(tmp_path: Path) -> None:
    for key, data in sound().items():
        path = tmp_path / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        if key.startswith("refs/") or key == "incckpt.json":
            with path.open("r+b") as file:
                file.truncate(8 << 30)
            with pytest.raises(CorruptionError, match="longer than 16,777,216 bytes"):
                incckpt.load(tmp_path)
            path.write_bytes(data)


def test_metrics_that_no_ref_could_hold_are_refused_at_save() -> None:
    with pytest.raises(OptionError, match="metrics"):
        incckpt.save({}, filled(sound()).url, metrics={f"{'x' * 1000}{index}": 1.0 for index in range(20_000)})


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit of the address space")
def test_an_address_space_that_is_limited(tmp_path: Path) -> None:
    program = f"""
import resource, torch, incckpt
from tests.run import test_memory_limit as test
from tests.hostile import filled, rewrite_manifest
used = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), used + (1 << 30)))
for change in (test.many_pieces, test.chunk_of(3 << 30), test.object_of(3 << 30)):
    try:
        incckpt.load(filled(rewrite_manifest(test.sound(), change)), max_bytes={TIB})
    except (incckpt.errors.MemoryLimitError, incckpt.errors.CorruptionError) as error:
        print("refused", type(error).__name__)
"""
    done = programs.run("-c", program)
    assert done.stdout.count("refused") == 3, done.stderr


def test_what_is_available_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = untrusted.available_memory()
    assert found is not None
    assert MIB < found < 1 << 50
    monkeypatch.setattr(untrusted, "available_memory", lambda: 1000)
    assert incckpt.load(filled(sound()))["small"][1] == 1.0  # what takes little is not worth a look
    limit = untrusted.MemoryLimit()
    with pytest.raises(MemoryLimitError, match="1,000 are available here"):
        limit.check(1 << 30, "it")


@pytest.mark.parametrize("kind", [SyntaxError, OverflowError, KeyError, RecursionError, UnicodeError, MemoryError])
def test_what_python_raises_while_reading_becomes_ours(kind: type[Exception]) -> None:
    error = kind("x")
    with pytest.raises(IncckptError, match="the manifest") as raised, untrusted.reading("the manifest"):
        raise error
    assert raised.value.__cause__ is error
    with pytest.raises(KeyboardInterrupt), untrusted.reading("the manifest"):
        raise KeyboardInterrupt


def test_lists_that_no_reader_would_take_are_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = filled(sound())
    monkeypatch.setattr(refs, "LIST_BYTES", 500)
    with pytest.raises(CollectionError, match="10 objects are too many to collect at once"):
        refs.CondemnedLists(backend).put(f"objects/{index:02}/{'0' * 62}.{'0' * 16}" for index in range(10))
    monkeypatch.setattr(refs, "LIST_BYTES", 200)
    with incckpt.CheckpointManager(backend) as manager:
        manager.restore(state())
        manager.save(2, state()).result()
    assert list(backend.list("gc/")) == []
    attempt = next(entry.key for entry in backend.list("runs/") if entry.key.endswith("2.from"))
    assert b"metrics" not in backend.get(attempt), "there are only names"
    monkeypatch.undo()
    with incckpt.CheckpointManager(backend, read_only=True) as manager:
        assert [checkpoint.step for checkpoint in manager.checkpoints()] == [1, 2]
