"""Thin checkpoint folders, pointers, and what of a trainer's checkpoints is kept; no framework is needed."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import incckpt
from incckpt.errors import CorruptionError, FormatError
from incckpt.integrations._files import read_files, write_files
from incckpt.integrations._pointer import Place, Pointer, read_state
from incckpt.integrations._resuming import place_in, point_at
from incckpt.integrations._trainer_parts import BEST_STEP, KeepAsTrainer
from incckpt.retention import Record

NAMES = st.text(st.sampled_from("ab./\\:~"), min_size=1, max_size=8).map(lambda name: name + ".json")


@settings(deadline=None)
@given(names=st.lists(NAMES, max_size=3))
def test_files_stay_in_their_folder(names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as top:
        folder = Path(top) / "in" / "side"
        folder.mkdir(parents=True)
        try:
            write_files(folder, dict.fromkeys(names, b"{}"))
        except CorruptionError:
            assert list(folder.iterdir()) == []  # all or nothing
        except OSError:
            pass  # one is a folder of another: a.json and a.json/b.json
        assert [path for path in Path(top).rglob("*") if path.is_file() and folder not in path.parents] == []


def test_only_what_is_parsed_is_kept(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "training_args.bin", "code.py", "model.safetensors.index.json"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_bytes(b"y")
    files = read_files(tmp_path)
    assert files == {"config.json": b"x", "adapter/adapter_config.json": b"y"}
    write_files(tmp_path / "copy", files)
    assert read_files(tmp_path / "copy") == files


def test_pointers_hold_no_passwords(tmp_path: Path) -> None:
    url = "s3://key:secret@bucket/exp"
    point_at(tmp_path, Pointer(url, "run", 5))
    assert "secret" not in "".join(path.read_text() for path in tmp_path.iterdir())
    assert place_in(tmp_path, url) == Place(url, "run", 5, announced=True)
    assert place_in(tmp_path, "s3://other/exp") == Place("s3://bucket/exp", "run", 5, announced=True)
    assert place_in(tmp_path / "none") is None
    next(tmp_path.iterdir()).write_text("{}")
    with pytest.raises(FormatError, match=re.escape("does not say where the checkpoint is")):
        place_in(tmp_path)


def test_pointers_name_folders_with_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = "a b#c@d%e?f"
    with incckpt.CheckpointManager(Path(name)) as manager:
        manager.save(1, {"x": 2})
    point_at(tmp_path / "thin", Pointer(name, "default", 1))
    monkeypatch.chdir("/")
    place = place_in(tmp_path / "thin")
    assert place is not None
    assert read_state(place)[0] == {"x": 2}


@settings(deadline=None)
@given(st.sets(st.integers(1, 20), max_size=8), st.integers(1, 6), st.integers(1, 20))
def test_the_store_keeps_what_the_folders_keep(saved: set[int], limit: int, best: int) -> None:
    trainer_utils = pytest.importorskip("transformers.trainer_utils")
    if not hasattr(trainer_utils, "rotate_checkpoints"):
        pytest.skip("transformers 4 has no such function")
    kept = KeepAsTrainer(limit)([Record(step, 0.0, {BEST_STEP: float(best)}) for step in sorted(saved)])
    with tempfile.TemporaryDirectory() as top:
        for step in saved:
            (Path(top) / f"checkpoint-{step}").mkdir()
        protected = str(Path(top) / f"checkpoint-{best}") if best in saved else None
        trainer_utils.rotate_checkpoints(top, limit, protected)
        assert {f"checkpoint-{step}" for step in kept} == {path.name for path in Path(top).iterdir()}
