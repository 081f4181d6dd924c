"""Files of torch.save, written and read: the same states, bit for bit."""

from __future__ import annotations

import pickle
import tempfile
import zipfile
from argparse import Namespace
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

import incckpt
from incckpt.errors import CorruptionError, OptionError, PickleRefusedError, StateError
from incckpt.interchange import export, import_files
from incckpt.testing.compare import assert_same_state
from incckpt.testing.strategies import states
from tests.effort import tries

Point = namedtuple("Point", ["x", "y"])


def torch_saves(state: Any, file: Any) -> bool:
    """Write a state with torch.save; whether torch takes it: no namedtuples, no int1, no memory of two dtypes."""
    try:
        torch.save(state, file)
        torch.load(file, weights_only=False, map_location="cpu")
    except (RuntimeError, TypeError, AttributeError, pickle.PicklingError, NotImplementedError, KeyError):
        return False
    return True


def training_state() -> dict[str, Any]:
    weight = torch.randn(300, 70)
    return {
        "model": {
            "weight": weight,
            "tied": weight,
            "row": weight[3],
            "transposed": torch.randn(5, 700).t(),
            "gaps": torch.randn(10, 10)[:, ::2],
            "half": torch.randn(7).bfloat16(),
            "eighth": torch.randn(33).to(torch.float8_e4m3fn),
            "scalar": torch.tensor(3.5),
            "empty": torch.empty(0, 3),
            "unsigned": torch.arange(5).to(torch.uint16),
            "conjugate": torch.randn(4, dtype=torch.complex64).conj(),
            "parameter": torch.nn.Parameter(torch.randn(1000, 700)),
        },
        "step": 3,
        "schedule": [0.1, {"milestones": (3, 4)}],
    }


def test_what_torch_load_gives_is_what_was_saved(tmp_path: Path) -> None:
    state = training_state()
    incckpt.save(state, tmp_path / "store")
    done = export(tmp_path / "store", tmp_path / "state.pt")
    assert done.files == (tmp_path / "state.pt",)
    assert done.nbytes == (tmp_path / "state.pt").stat().st_size
    assert not done.needs_pickle
    for mmap in (False, True):
        assert_same_state(torch.load(tmp_path / "state.pt", weights_only=True, mmap=mmap), state)


def test_the_file_is_a_sound_archive_with_aligned_storages(tmp_path: Path) -> None:
    incckpt.save(training_state(), tmp_path / "store")
    export(tmp_path / "store", tmp_path / "state.pt")
    with zipfile.ZipFile(tmp_path / "state.pt") as archive:
        assert archive.testzip() is None
    loaded = torch.load(tmp_path / "state.pt", mmap=True)
    assert loaded["model"]["weight"].data_ptr() % 64 == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:ComplexHalf")  # torch says so whenever it makes such a tensor
@settings(deadline=None, derandomize=True, max_examples=tries(20), suppress_health_check=[HealthCheck.too_slow])
@given(state=states())
def test_a_file_is_what_torch_save_makes_of_the_state(state: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        incckpt.save(state, f"{folder}/store")
        state = incckpt.load(f"{folder}/store", map_location="cpu")
        taken = torch_saves(state, f"{folder}/reference.pt")
        try:
            export(f"{folder}/store", f"{folder}/state.pt")
        except StateError:
            assert not taken
            return
        loaded = torch.load(f"{folder}/state.pt", weights_only=False)
        if taken:
            assert_same_state(loaded, torch.load(f"{folder}/reference.pt", weights_only=False))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:ComplexHalf")  # torch says so whenever it makes such a tensor
@settings(deadline=None, derandomize=True, max_examples=tries(20), suppress_health_check=[HealthCheck.too_slow])
@given(state=states())
def test_any_file_is_imported(state: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        if not torch_saves(state, f"{folder}/state.pt"):
            return
        import_files(f"{folder}/state.pt", f"{folder}/store", allow_pickle=True)
        expected = torch.load(f"{folder}/state.pt", weights_only=False, map_location="cpu")
        assert_same_state(incckpt.load(f"{folder}/store", allow_pickle=True), expected)


def test_arrays_are_imported_without_pickle(tmp_path: Path) -> None:
    state = {"rng": np.arange(624, dtype=np.uint32), "big": np.arange(3, dtype=">f8"), "scalar": np.float32(3)}
    torch.save(state, tmp_path / "state.pt")
    import_files(tmp_path / "state.pt", tmp_path / "store")
    # Not `state`: numpy itself makes arrays native as it unpickles them.
    assert_same_state(incckpt.load(tmp_path / "store"), torch.load(tmp_path / "state.pt", weights_only=False))


def test_what_needs_pickle_is_refused(tmp_path: Path) -> None:
    torch.save({"args": Namespace(lr=0.1), "w": torch.ones(2)}, tmp_path / "state.pt")
    with pytest.raises(PickleRefusedError, match=r"state\.pt .*argparse\.Namespace.*allow_pickle=True"):
        import_files(tmp_path / "state.pt", tmp_path / "store")
    assert not (tmp_path / "store").exists()
    import_files(tmp_path / "state.pt", tmp_path / "store", allow_pickle=True)
    assert incckpt.load(tmp_path / "store", allow_pickle=True)["args"] == Namespace(lr=0.1)


def test_the_format_before_zip_is_imported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = {"w": torch.randn(300, 40), "step": 4}
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    import_files(tmp_path / "old.pt", tmp_path / "store")
    assert_same_state(incckpt.load(tmp_path / "store"), state)
    assert "read into memory whole" in caplog.text


@pytest.mark.parametrize("damage", ["cut", "empty", "text"])
def test_a_damaged_file_is_named(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    torch.save({"w": torch.randn(300, 40)}, path)
    path.write_bytes({"cut": path.read_bytes()[:20000], "empty": b"", "text": b"no checkpoint at all"}[damage])
    with pytest.raises((CorruptionError, PickleRefusedError), match=r"state\.pt"):
        import_files(path, tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_what_cannot_be_pickled_is_named(tmp_path: Path) -> None:
    incckpt.save({"model": {"point": Point(1, 2)}}, tmp_path / "store")
    with pytest.raises(StateError, match=r"'model\.point', a namedtuple of 2, cannot"):
        export(tmp_path / "store", tmp_path / "state.pt")
    assert {path.name for path in tmp_path.iterdir()} == {"store"}


def test_arrays_make_a_file_that_needs_pickle(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    incckpt.save({"a": np.arange(3)}, tmp_path / "store")
    assert export(tmp_path / "store", tmp_path / "state.pt").needs_pickle
    assert "weights_only=False" in caplog.text
    assert_same_state(torch.load(tmp_path / "state.pt", weights_only=False), {"a": np.arange(3)})


def test_a_part_is_exported(tmp_path: Path) -> None:
    state = training_state()
    incckpt.save(state, tmp_path / "store")
    export(tmp_path / "store", tmp_path / "one.pt", keys="model.half")
    assert_same_state(torch.load(tmp_path / "one.pt"), {"model": {"half": state["model"]["half"]}})
    export(tmp_path / "store", tmp_path / "model.pt", root="model")
    assert_same_state(torch.load(tmp_path / "model.pt"), state["model"])
    with pytest.raises(OptionError, match=r"root='modle' names no part of the checkpoint.*'model'"):
        export(tmp_path / "store", tmp_path / "other.pt", root="modle")


def test_a_step_is_exported(tmp_path: Path) -> None:
    for step in (1, 2):
        incckpt.save({"step": step}, tmp_path / "store", step=step, run="a")
    done = export(f"{tmp_path}/store#a@1", tmp_path / "state.pt")
    assert (done.run, done.step) == ("a", 1)
    assert torch.load(tmp_path / "state.pt") == {"step": 1}


def test_a_file_that_is_there_stays(tmp_path: Path) -> None:
    incckpt.save({"step": 1}, tmp_path / "store")
    target = tmp_path / "state.pt"
    target.write_text("precious")
    with pytest.raises(OptionError, match=r"state\.pt exists.*overwrite=True"):
        export(tmp_path / "store", target)
    assert target.read_text() == "precious"
    export(tmp_path / "store", target, overwrite=True)
    assert torch.load(target) == {"step": 1}


def test_a_format_is_asked_for(tmp_path: Path) -> None:
    incckpt.save({"step": 1}, tmp_path / "store")
    with pytest.raises(OptionError, match=r"state: its name does not say.*format="):
        export(tmp_path / "store", tmp_path / "state")
    export(tmp_path / "store", tmp_path / "state", format="pt")
    assert torch.load(tmp_path / "state") == {"step": 1}
