"""Files of safetensors, written and read: what the library gives is what was saved, bit for bit."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import incckpt
from incckpt.errors import CorruptionError, OptionError, StateError
from incckpt.interchange import export, import_files
from incckpt.interchange.safetensors_files import _NUMPY_DTYPES, _TORCH_DTYPES
from incckpt.state.ranges import raw_view
from incckpt.testing.compare import assert_same_state, difference
from incckpt.testing.strategies import arrays, tensors
from tests.effort import tries

safetensors = pytest.importorskip("safetensors")
safetensors_torch = pytest.importorskip("safetensors.torch")


def is_held(value: torch.Tensor | np.ndarray[Any, Any]) -> bool:
    """Whether the format has a dtype, and torch the elements of a tensor as they are meant: it cannot negate float8."""
    if isinstance(value, np.ndarray):
        return value.dtype.str in _NUMPY_DTYPES
    try:
        value.detach().resolve_neg()
    except NotImplementedError:
        return False
    return str(value.dtype).removeprefix("torch.") in _TORCH_DTYPES


def plain(value: torch.Tensor | np.ndarray[Any, Any]) -> torch.Tensor:
    """Return a tensor or array as a safetensors file gives it: row-major, no flags."""
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(np.array(value, order="C"))
    if not value.numel():
        return torch.empty(value.shape, dtype=value.dtype)  # an empty one may have any stride
    # As integers: a copy of booleans makes ones of all that is not zero.
    raw = raw_view(value.detach().resolve_conj().resolve_neg())
    return raw.reshape(-1).contiguous().reshape(value.shape).view(value.dtype)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:ComplexHalf")  # torch says so whenever it makes such a tensor
@settings(
    deadline=None,
    derandomize=True,
    max_examples=tries(20),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
@given(
    data=st.dictionaries(
        st.text(min_size=1, max_size=5), (tensors() | arrays()).filter(is_held), min_size=1, max_size=4
    )
)
def test_tensors_come_back_from_a_file(data: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        incckpt.save(data, f"{folder}/store")
        export(f"{folder}/store", f"{folder}/all.safetensors")
        loaded = safetensors_torch.load_file(f"{folder}/all.safetensors")
        assert difference({name: loaded[name] for name in data}, {name: plain(one) for name, one in data.items()}) == ""


def every_dtype() -> dict[str, torch.Tensor]:
    found = {}
    for name in _TORCH_DTYPES:
        dtype = getattr(torch, name, None)
        if dtype is not None:
            data = torch.randint(0, 2, (3 * 5 * dtype.itemsize,), dtype=torch.uint8)
            found[name] = data.view(dtype).reshape(3, 5)
    return found


def test_every_dtype_goes_out_and_in(tmp_path: Path) -> None:
    state = {**every_dtype(), "scalar": torch.tensor(2.5), "empty": torch.empty(0, 3)}
    incckpt.save(state, tmp_path / "store")
    done = export(tmp_path / "store", tmp_path / "all.safetensors")
    assert done.tensors == len(state)
    with safetensors.safe_open(tmp_path / "all.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert difference({name: file.get_tensor(name) for name in state}, state) == ""
    import_files(tmp_path / "all.safetensors", tmp_path / "again")
    loaded = incckpt.load(tmp_path / "again")
    assert difference({name: loaded[name] for name in state}, state) == ""


def test_the_library_would_write_the_same_bytes(tmp_path: Path) -> None:
    state = {"b": torch.randn(3, 5), "a": torch.randn(7), "i": torch.arange(4)}
    incckpt.save(state, tmp_path / "store")
    export(tmp_path / "store", tmp_path / "ours.safetensors")
    safetensors_torch.save_file(state, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_files_of_the_library_are_imported(tmp_path: Path) -> None:
    state = {"w": torch.randn(300, 500).bfloat16(), "b": torch.randn(500)}
    safetensors_torch.save_file(state, tmp_path / "model.safetensors")
    import_files(tmp_path / "model.safetensors", tmp_path / "store")
    loaded = incckpt.load(tmp_path / "store")
    assert difference({name: loaded[name] for name in state}, state) == ""


def test_a_tie_is_written_once_and_made_again(tmp_path: Path) -> None:
    weight = torch.randn(30, 40)
    incckpt.save({"embed": weight, "head": weight, "row": weight[2]}, tmp_path / "store")
    done = export(tmp_path / "store", tmp_path / "model.safetensors")
    assert done.tied == {"head": "embed"}
    loaded = safetensors_torch.load_file(tmp_path / "model.safetensors")
    assert set(loaded) == {"embed", "row"}
    assert torch.equal(loaded["row"], weight[2])

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Parameter(torch.zeros(30, 40))
            self.head = self.embed
            self.row = torch.nn.Parameter(torch.zeros(40))

    model = Model()
    assert safetensors_torch.load_model(model, str(tmp_path / "model.safetensors")) == (set(), [])
    assert torch.equal(model.head, weight)
    import_files(tmp_path / "model.safetensors", tmp_path / "again")
    again = incckpt.load(tmp_path / "again")
    assert again["head"].data_ptr() == again["embed"].data_ptr()


def test_shards_have_an_index_as_hugging_face_lays_it_out(tmp_path: Path) -> None:
    state = {f"layer.{i}": torch.randn(100, 10 + i) for i in range(10)} | {"big": torch.randn(100, 100)}
    incckpt.save(state, tmp_path / "store")
    done = export(tmp_path / "store", tmp_path / "out" / "model.safetensors", shard_bytes=20_000)
    names = [path.name for path in done.files]
    count = len(names) - 1
    assert names == [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)] + [
        "model.safetensors.index.json"
    ]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in state.values())}
    assert set(index["weight_map"]) == set(state)
    for name, file in index["weight_map"].items():
        loaded = safetensors_torch.load_file(tmp_path / "out" / file)
        assert torch.equal(loaded[name], state[name])
        assert sum(tensor.nbytes for tensor in loaded.values()) <= 20_000 or len(loaded) == 1
    import_files(tmp_path / "out" / "model.safetensors.index.json", tmp_path / "again")
    loaded = incckpt.load(tmp_path / "again")
    assert difference({name: loaded[name] for name in state}, state) == ""


def test_what_is_no_tensor_is_refused_or_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    incckpt.save({"model": {"w": torch.ones(2)}, "epoch": 3, "lr": [0.1]}, tmp_path / "store")
    target = tmp_path / "out" / "model.safetensors"
    with pytest.raises(StateError, match=r"'epoch', 'lr\.0' are no tensor.*leave_out=True"):
        export(tmp_path / "store", target)
    assert not target.parent.exists()
    done = export(tmp_path / "store", target, leave_out=True)
    assert done.left_out == ("epoch", "lr.0")
    assert "epoch" in caplog.text
    export(tmp_path / "store", target, root="model", overwrite=True)
    assert_same_state(safetensors_torch.load_file(target), {"w": torch.ones(2)})


def test_a_dtype_that_the_format_does_not_have_is_named(tmp_path: Path) -> None:
    incckpt.save({"a": torch.ones(2), "z": torch.ones(2, dtype=torch.complex128)}, tmp_path / "store")
    with pytest.raises(StateError, match=r"no torch dtype complex128, which tensor 'z' has"):
        export(tmp_path / "store", tmp_path / "model.safetensors")


def test_a_negative_that_torch_cannot_resolve_is_named(tmp_path: Path) -> None:
    incckpt.save({"z": torch._neg_view(torch.ones(2).to(torch.float8_e5m2))}, tmp_path / "store")
    with pytest.raises(StateError, match="cannot resolve the negative bit of tensor 'z'"):
        export(tmp_path / "store", tmp_path / "model.safetensors")


def test_two_tensors_of_one_name_are_refused(tmp_path: Path) -> None:
    incckpt.save({"a.b": torch.ones(2), "a": {"b": torch.zeros(2)}}, tmp_path / "store")
    with pytest.raises(StateError, match=r"two tensors would have the name 'a\.b'"):
        export(tmp_path / "store", tmp_path / "model.safetensors")


@pytest.mark.parametrize("content", [b"", b"x" * 100, (10**9).to_bytes(8, "little") + b"{}"])
def test_a_damaged_file_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CorruptionError, match=r"model\.safetensors"):
        import_files(tmp_path / "model.safetensors", tmp_path / "store")
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    "index",
    ["", "{}", '{"weight_map": {"a": "../elsewhere.safetensors"}}', '{"weight_map": {"a": "missing.safetensors"}}'],
)
def test_a_damaged_index_is_named(index: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CorruptionError, match=r"index\.json"):
        import_files(tmp_path / "model.safetensors.index.json", tmp_path / "store")


def test_a_shard_size_has_to_be_positive(tmp_path: Path) -> None:
    incckpt.save({"a": torch.ones(2)}, tmp_path / "store")
    with pytest.raises(OptionError, match="shard_bytes must be at least 1"):
        export(tmp_path / "store", tmp_path / "model.safetensors", shard_bytes=0)
