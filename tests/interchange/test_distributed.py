"""Folders of torch.distributed.checkpoint, written and read."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

import incckpt
from incckpt.errors import CorruptionError, OptionError, PickleRefusedError, StateError
from incckpt.interchange import distributed, export, import_files
from incckpt.testing.compare import difference
from tests.interchange.test_torch_files import training_state

pytestmark = [
    pytest.mark.slow,  # DCP takes its time to be imported
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
]


def rows(state: Any) -> Any:
    """Return a state with its tensors as DCP keeps them: in row-major order, without flags."""
    if isinstance(state, dict):
        return {key: rows(value) for key, value in state.items()}
    return state.detach().resolve_conj().contiguous() if isinstance(state, torch.Tensor) else state


def test_dcp_loads_what_was_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "_PART", 1 << 16)  # so that there are tensors in parts
    state = {**training_state(), "array": np.arange(4)}
    incckpt.save(state, tmp_path / "store")
    done = export(tmp_path / "store", tmp_path / "dcp", format="dcp")
    assert done.nbytes == sum(path.stat().st_size for path in (tmp_path / "dcp").iterdir())
    target = copy.deepcopy(state)
    for tensor in target["model"].values():
        if tensor.is_contiguous():
            tensor.detach().view(torch.uint8).zero_() if tensor.ndim else tensor.zero_()
    target["step"] = target["array"] = None
    load(target, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert difference(rows(target), rows(state)) == ""


def test_what_dcp_saved_is_imported(tmp_path: Path) -> None:
    state = {"model": rows(training_state()["model"]), "optimizer": {"lr": 0.1, "steps": [torch.ones(3), 5]}}
    save(state, checkpoint_id=tmp_path / "checkpoint-7", no_dist=True)
    made = import_files(tmp_path / "checkpoint-7", tmp_path / "store")
    assert made[0].checkpoint.step == 7
    loaded = incckpt.load(tmp_path / "store")
    assert difference(loaded["optimizer"], state["optimizer"]) == ""
    assert difference({name: loaded["model"][name] for name in state["model"]}, state["model"]) == ""


def test_shards_of_several_processes_are_put_together(tmp_path: Path) -> None:
    whole = torch.arange(24.0).reshape(6, 4)

    class Planner(DefaultSavePlanner):
        def create_local_plan(self) -> SavePlan:
            plan = super().create_local_plan()
            data = plan.items[0].tensor_data
            assert data is not None
            items = []
            for row in range(0, 6, 2):
                for column in (0, 1):
                    offsets, sizes = torch.Size([row, column * 3]), torch.Size([2, 3 - 2 * column])
                    chunk = TensorWriteData(ChunkStorageMetadata(offsets, sizes), data.properties, data.size)
                    items.append(WriteItem(MetadataIndex("w", offsets), WriteItemType.SHARD, tensor_data=chunk))
            plan.items[:] = items
            return plan

        def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
            assert write_item.tensor_data is not None
            (row, column), (height, width) = write_item.tensor_data.chunk.offsets, write_item.tensor_data.chunk.sizes
            return whole[row : row + height, column : column + width].clone()

    save({"w": whole}, checkpoint_id=tmp_path / "dcp", planner=Planner(), no_dist=True)
    import_files(tmp_path / "dcp", tmp_path / "store")
    assert difference(incckpt.load(tmp_path / "store"), {"w": whole}) == ""


def test_values_that_need_pickle_are_refused(tmp_path: Path) -> None:
    save({"w": torch.ones(2), "path": Path("a")}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    with pytest.raises(PickleRefusedError, match=r"'path' holds pathlib.*allow_pickle=True"):
        import_files(tmp_path / "dcp", tmp_path / "store")
    import_files(tmp_path / "dcp", tmp_path / "store", allow_pickle=True)
    assert incckpt.load(tmp_path / "store", allow_pickle=True)["path"] == Path("a")


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("code was run",))


def test_metadata_run_no_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save({"w": torch.ones(2)}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    (tmp_path / "dcp" / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CorruptionError, match=r"\.metadata does not describe a checkpoint: it names builtins\.print"):
        import_files(tmp_path / "dcp", tmp_path / "store")
    assert "code" not in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["metadata", "missing", "cut", "outside"])
def test_a_damaged_folder_is_named(damage: str, tmp_path: Path) -> None:
    folder = tmp_path / "dcp"
    save({"w": torch.ones(2000)}, checkpoint_id=folder, no_dist=True)
    (data,) = folder.glob("*.distcp")
    if damage == "metadata":
        (folder / ".metadata").write_bytes(b"no pickle")
    elif damage == "missing":
        data.unlink()
    elif damage == "cut":
        data.write_bytes(data.read_bytes()[:1000])
    else:
        metadata = FileSystemReader(folder).read_metadata()
        for stored in metadata.storage_data.values():
            stored.relative_path = "../elsewhere"
        (tmp_path / "elsewhere").write_bytes(data.read_bytes())
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CorruptionError, match="dcp"):
        import_files(folder, tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_a_folder_that_holds_something_stays(tmp_path: Path) -> None:
    incckpt.save({"w": torch.ones(2)}, tmp_path / "store")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    with pytest.raises(OptionError, match=r"out exists"):
        export(tmp_path / "store", tmp_path / "out", format="dcp", overwrite=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]


def test_a_list_is_refused(tmp_path: Path) -> None:
    incckpt.save([torch.ones(2)], tmp_path / "store")
    with pytest.raises(StateError, match="holds dicts with strings"):
        export(tmp_path / "store", tmp_path / "out", format="dcp")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("out*"))
