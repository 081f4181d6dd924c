"""States saved and loaded through ``torch.distributed.checkpoint``, in this process and in several."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import tempfile
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

import incckpt
from incckpt.errors import OptionError, SaveError, StateError, StoreNotFoundError
from incckpt.integrations.dcp import DistributedCheckpointManager, IncrementalReader, IncrementalWriter
from incckpt.integrations.dcp.staging import Copy
from incckpt.run.shards import ShardWriter
from incckpt.store.objects import manifest_keys
from incckpt.store.refs import Ref
from incckpt.store.store import Store
from tests import programs
from tests.effort import tries
from tests.integrations.sharded import same

pytestmark = pytest.mark.slow


def _state(seed: int = 0) -> dict[str, Any]:
    torch.manual_seed(seed)
    return {
        "model": OrderedDict(
            weight=torch.randn(5, 7),
            column=torch.randn(6, 4).t(),
            half=torch.randn(9).bfloat16(),
            scalar=torch.tensor(seed + 0.5),
            nothing=torch.empty(0, 3),
            complex=torch.randn(3, dtype=torch.complex64),
        ),
        "optimizer": {"state": {0: {"step": torch.tensor(3.0 + seed)}}, "groups": [{"lr": 0.1 * seed, "params": [0]}]},
        "array": np.arange(4) + seed,
        "log": [f"line {seed} {index}" for index in range(3000)],
        "name": "run",
        "none": None,
    }


def _empty(value: Any) -> Any:
    """Return a state of the same shape without its values."""
    if isinstance(value, torch.Tensor):
        return torch.zeros_like(value)
    if isinstance(value, dict):
        return {key: _empty(item) for key, item in value.items()}
    if isinstance(value, list) and any(isinstance(item, (dict, torch.Tensor)) for item in value):
        return [_empty(item) for item in value]
    return None


def _cause(caught: pytest.ExceptionInfo[CheckpointException]) -> BaseException:
    [(error, _)] = caught.value.failures.values()
    return error


def _equal(one: Any, other: Any) -> bool:
    arrays = one.pop("array"), other.pop("array")
    return np.array_equal(*arrays) and not same(one, other)


def test_a_state_comes_back_through_dcp_and_without_it(tmp_path: Path) -> None:
    """Tensors of every kind, arrays, values, a log; read by DCP, by `load`, and restored in place."""
    store = str(tmp_path / "store")
    with IncrementalWriter(store, step=5) as writer:
        dcp_save(_state(1), storage_writer=writer, no_dist=True)
    target = _empty(_state(1))
    dcp_load(target, storage_reader=IncrementalReader(store), no_dist=True)
    expected = _state(1)
    expected["optimizer"]["state"] = {"0": expected["optimizer"]["state"][0]}  # DCP's names are strings
    target["optimizer"]["state"] = {str(key): value for key, value in target["optimizer"]["state"].items()}
    loaded = incckpt.load(store)
    assert _equal(target, dict(expected))
    expected["array"] = _state(1)["array"]
    assert _equal(loaded, expected)


def test_what_a_manager_saved_loads_under_dcp_and_the_reverse(tmp_path: Path) -> None:
    """Views, transposed tensors and packed values included."""
    store = str(tmp_path / "store")
    base = torch.arange(24.0)
    state = {**_state(2), "tied": base[:12], "view": base[6:18].reshape(3, 4), "gaps": torch.randn(8, 8)[::2, ::2]}
    with incckpt.CheckpointManager(store) as manager:
        manager.save(1, state).result()
    target = _empty(state)
    dcp_load(target, storage_reader=IncrementalReader(store, step=1), no_dist=True)
    assert _equal(dict(target), dict(state))
    state["tied"] = base[:12] + 1
    with IncrementalWriter(store) as writer:
        dcp_save(state, storage_writer=writer, no_dist=True)
    names = {**_empty(state), "optimizer": {"state": {"0": {"step": torch.zeros(())}}, "groups": [{}]}}
    names["optimizer"]["groups"] = [{"lr": None, "params": None}]
    with incckpt.CheckpointManager(store) as manager:
        assert manager.restore(names) == 2
    assert torch.equal(names["tied"], state["tied"])
    assert torch.equal(names["model"]["column"], state["model"]["column"])


def test_only_what_changed_is_written(tmp_path: Path) -> None:
    """The second save puts the changed tensor and the manifest."""
    store = str(tmp_path / "store")
    state = {"frozen": torch.randn(1 << 19), "learns": torch.randn(1 << 18)}
    with IncrementalWriter(store, delta=False) as writer:
        dcp_save(state, storage_writer=writer, no_dist=True)
        state["learns"] += 1
        dcp_save(state, storage_writer=writer, no_dist=True)
        metadata = dcp_save(state, storage_writer=writer, no_dist=True)
    assert metadata.storage_data.step == 2
    written = [checkpoint.written for checkpoint in incckpt.list_checkpoints(store)]
    assert written[0] > 2 << 20
    assert (1 << 19) < written[1] < (1 << 20) + 8192
    assert written[2] < 8192


def test_cached_plans_are_told_from_new_ones(tmp_path: Path) -> None:
    """A cached plan brings what the coordinator said in the first save; later saves do not rely on it."""
    store = str(tmp_path / "store")
    state: dict[str, Any] = {"w": torch.zeros(1000), "lr": 0.5}
    try:
        with IncrementalWriter(store, keep_last_n=1) as writer:
            for step in range(5):
                state["w"][step] += 1
                planner = DefaultSavePlanner(enable_plan_caching=True)
                dcp_save(state, storage_writer=writer, planner=planner, no_dist=True)
        incckpt.collect(store, dry_run=False)
        assert torch.equal(incckpt.load(store)["w"], state["w"])
    finally:
        for cache in ("save_plan", "final_save_plan", "all_plans", "global_plan", "metadata"):
            getattr(SavePlanner, f"_cached_{cache}").clear()


def test_a_save_in_the_background_is_of_the_moment_of_its_call(tmp_path: Path) -> None:
    """What training writes afterwards is not in it."""
    store = str(tmp_path / "store")
    state: dict[str, Any] = {"w": torch.ones(1 << 16), "step": 1}
    with IncrementalWriter(store) as writer:
        future = async_save(state, storage_writer=writer, no_dist=True)
        assert isinstance(future, Future)
        state["w"].zero_()
        future.result()
        loaded = incckpt.load(store)
    assert loaded["step"] == 1
    assert torch.equal(loaded["w"], torch.ones(1 << 16))


def test_a_part_of_a_state_loads(tmp_path: Path) -> None:
    """With a planner that allows keys that the checkpoint lacks, and without."""
    store = str(tmp_path / "store")
    with IncrementalWriter(store) as writer:
        dcp_save({"w": torch.ones(3)}, storage_writer=writer, no_dist=True)
    target = {"w": torch.zeros(3), "new": torch.full((2,), 7.0)}
    planner = DefaultLoadPlanner(allow_partial_load=True)
    dcp_load(target, storage_reader=IncrementalReader(store), planner=planner, no_dist=True)
    assert target["w"].tolist() == [1, 1, 1]
    assert target["new"].tolist() == [7, 7]
    with pytest.raises(CheckpointException, match="Missing key"):
        dcp_load(target, storage_reader=IncrementalReader(store), no_dist=True)


def test_a_load_opens_the_store_once_and_closes_it_however_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = str(tmp_path / "store")
    incckpt.save({"w": torch.ones(5)}, store)
    opened: list[Store] = []
    closed: list[Store] = []
    own_open, own_close = Store.open, Store.close

    def open_store(*arguments: Any, **options: Any) -> Store:
        opened.append(own_open(*arguments, **options))
        return opened[-1]

    def close_store(self: Store) -> None:
        closed.append(self)
        own_close(self)

    monkeypatch.setattr(Store, "open", open_store)
    monkeypatch.setattr(Store, "close", close_store)
    reader = IncrementalReader(store)
    dcp_load({"w": torch.zeros(5)}, storage_reader=reader, no_dist=True)
    assert len(opened) == 1
    assert opened == closed
    with pytest.raises(CheckpointException):  # in planning
        dcp_load({"other": torch.zeros(5)}, storage_reader=reader, no_dist=True)
    dcp_load({"w": torch.zeros(5)}, storage_reader=reader, no_dist=True)
    with pytest.raises(CheckpointException):
        dcp_load({"w": torch.zeros(5)}, storage_reader=IncrementalReader(store, step=9), no_dist=True)
    assert len(opened) == 4
    assert opened == closed, "a load that failed has left its store open"


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    """With an error of incckpt that says what to do, and nothing left in the store but what a failed save leaves."""
    store = str(tmp_path / "store")
    writer = IncrementalWriter(store)
    with pytest.raises(OptionError, match="use_collectives"):
        writer.set_up_storage_writer(True, rank=0, use_collectives=False)
    with pytest.raises(OptionError, match="names no step"):
        dcp_save({"w": torch.ones(1)}, checkpoint_id="final", storage_writer=writer, no_dist=True)
    with pytest.raises(CheckpointException) as caught:
        dcp_save({"w": torch.ones(1 << 16), "code": print}, storage_writer=writer, no_dist=True)
    assert isinstance(_cause(caught), StateError)
    assert not list(Path(store, "pins").rglob("*-*"))
    assert incckpt.list_checkpoints(store) == []
    dcp_save({"w": torch.ones(1 << 16)}, checkpoint_id="step-7", storage_writer=writer, no_dist=True)
    with pytest.raises(CheckpointException) as caught:
        dcp_save({"w": torch.ones(1)}, checkpoint_id="step-7", storage_writer=writer, no_dist=True)
    assert isinstance(_cause(caught), OptionError)
    writer.close()
    with pytest.raises(CheckpointException) as caught:
        dcp_load({"w": torch.ones(1)}, storage_reader=IncrementalReader(str(tmp_path / "none")), no_dist=True)
    assert isinstance(_cause(caught), StoreNotFoundError)
    assert [checkpoint.step for checkpoint in incckpt.list_checkpoints(store)] == [7]


_tensors = st.dictionaries(
    st.sampled_from(["a", "b", "c"]),
    st.tuples(st.sampled_from([(), (0, 2), (3, 5), (300, 1000)]), st.sampled_from([torch.float32, torch.int16])),
    min_size=1,  # DCP leaves empty dicts out
)


@settings(max_examples=tries(8), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    saves=st.lists(
        st.tuples(_tensors, st.sampled_from([None, 1, [1, {"x": 2}]]), st.booleans()), min_size=2, max_size=5
    )
)
def test_what_is_saved_is_the_state_when_save_returned(saves: list[tuple[dict[str, Any], Any, bool]]) -> None:
    """Tensors come, go, change shape, dtype and content between saves, and right after each, while it is written."""
    state: dict[str, Any] = {"model": {}, "tied": torch.zeros(5)}
    with tempfile.TemporaryDirectory() as store, DistributedCheckpointManager(store, threads=1) as manager:
        for step, (tensors, value, changes) in enumerate(saves):
            before = state["model"]
            state["value"] = value
            state["model"] = {
                name: before[name]
                if name in before and (before[name].shape, before[name].dtype) == kind
                else torch.full(kind[0], step).to(kind[1])
                for name, kind in tensors.items()
            }
            if changes:
                for tensor in state["model"].values():
                    tensor += 1
            expected = copy.deepcopy(state)
            saved = manager.save(step, state)
            for tensor in state["model"].values():
                tensor -= 7
            saved.result()
            assert not same(expected, incckpt.load(store, step=step)), f"step {step}"
            for tensor in state["model"].values():
                tensor += 7


def test_a_save_in_the_background_copies_what_changed(tmp_path: Path) -> None:
    """From the second on; what was staged is not taken for another state, nor given to another kind of planner."""
    state: dict[str, Any] = {"frozen": torch.randn(1 << 19), "learns": torch.randn(1 << 19), "lr": 0.1}
    with IncrementalWriter(str(tmp_path / "store"), delta=False) as writer:
        assert not any(one.is_meta for one in writer.stage(state).values() if isinstance(one, torch.Tensor))
        dcp_save(state, storage_writer=writer, no_dist=True)
        state["learns"] += 1
        staged = writer.stage(state)
        assert staged["frozen"].is_meta
        assert staged["learns"].is_meta
        expected = copy.deepcopy(state)
        state["frozen"] += 1
        dcp_save(staged, storage_writer=writer, no_dist=True)
        assert not same(expected, incckpt.load(str(tmp_path / "store")))
        # A staged state that was never saved is not taken for another one.
        writer.stage(state)
        state["learns"] += 1
        dcp_save(state, storage_writer=writer, no_dist=True)
        assert not same(state, incckpt.load(str(tmp_path / "store")))

        class Halved(DefaultSavePlanner):
            def transform_object(self, write_item: Any, object: Any) -> Any:  # noqa: A002 -- DCP's name
                found = super().transform_object(write_item, object)
                return found * 0.5 if isinstance(found, torch.Tensor) else found

        with pytest.raises(CheckpointException, match="meta"):
            dcp_save(writer.stage(state), storage_writer=writer, planner=Halved(), no_dist=True)
        dcp_save(writer.stage(state), storage_writer=writer, planner=Halved(), no_dist=True)
        assert torch.equal(incckpt.load(str(tmp_path / "store"))["learns"], state["learns"] * 0.5)


def test_the_first_save_in_the_background_copies_once(tmp_path: Path) -> None:
    """What DCP is given to plan with is kept to compare with; what is not its own is copied all the same."""
    large = torch.randn(1 << 19)
    state: dict[str, Any] = {"large": large, "view": torch.randn(1 << 20)[: 1 << 19], "kept": OrderedDict(w=large[:9])}
    store = str(tmp_path / "store")
    expected = []
    with IncrementalWriter(store) as writer:
        for step in range(3):
            expected.append(copy.deepcopy(state))
            saved = async_save(state, storage_writer=writer, no_dist=True)
            large += 1
            saved.result()  # type: ignore[union-attr]
            used = writer.shards.base.pool.used_bytes
            assert used < 1 << 20 if not step else used >= 1 << 21, "the copy that was staged is what is kept"
    for step, one in enumerate(expected):
        assert not same(one, incckpt.load(store, step=step)), f"step {step}"
    with IncrementalWriter(store) as writer:
        dcp_save(state, storage_writer=writer, no_dist=True)
        assert writer.shards.base.pool.used_bytes >= 1 << 22, "without staging it is the caller's memory that is saved"
    with IncrementalWriter(store) as writer:
        staged = writer.stage(state)
        assert len(pickle.dumps(writer)) < 10_000, "the process executor sends the state already"
        mixed = Copy.of(state, {"large": large, "view": staged["view"]})
        assert mixed.storages == {staged["view"].untyped_storage().data_ptr()}
        staged["large"] = large  # not a copy: another planner, or a hook, may put in what it likes
        dcp_save(staged, storage_writer=writer, no_dist=True)
        large += 1
        dcp_save(state, storage_writer=writer, no_dist=True)
        assert not same(state, incckpt.load(store))


def launch(processes: int, *arguments: object, module: str = "sharded") -> str:
    """Run a module of these tests in so many processes, as ``torchrun`` would; return what they print."""

    def rank(variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
        environment = os.environ | variables | {"OMP_NUM_THREADS": "1"}
        return programs.run("-m", f"tests.integrations.{module}", *arguments, environment=environment)

    with ThreadPoolExecutor(processes) as pool:
        done = list(pool.map(rank, programs.rank_variables(processes)))
    assert [one.returncode for one in done] == [0] * processes, "".join(one.stdout + one.stderr for one in done)
    return "".join(one.stdout for one in done)


@pytest.mark.timeout(600)
def test_shards_of_two_processes(tmp_path: Path) -> None:
    """FSDP2 with AdamW, loaded by the two, and by one; `python -m tests.sharding` tries other kinds and numbers."""
    printed = launch(2, tmp_path, "save", 2, "--kinds", "fsdp2")
    assert "fsdp2: saved by 2, loaded by 2: identical" in printed
    store, expected = str(tmp_path / "fsdp2-2"), torch.load(tmp_path / "fsdp2-2.pt")
    assert not same(expected, incckpt.load(store))
    target = _empty(expected)
    dcp_load(target, storage_reader=IncrementalReader(store), no_dist=True)
    assert not same(expected, target)
    with incckpt.CheckpointManager(store, read_only=True) as manager:
        assert manager.restore(restored := _empty(expected)) == 2
    assert not same(expected, restored)
    assert incckpt.verify(store).ok


@pytest.mark.timeout(600)
def test_what_torch_tests_storages_for(tmp_path: Path) -> None:
    """Its cases for sharded tensors, replicas, groups of ranks, and failures in each method, over four processes."""
    printed = launch(4, tmp_path, module="dcp_cases")
    assert printed.count("as expected") == 4


def test_a_manager_of_one_process_goes_on_from_what_it_restored(tmp_path: Path) -> None:
    """Rewinding abandons what came later, pruning keeps what it is told, and a damaged checkpoint is passed over."""
    store = str(tmp_path / "store")
    state: dict[str, Any] = {"w": torch.zeros(1000), "epoch": 0}
    with DistributedCheckpointManager(store, keep_last_n=3) as manager:
        assert manager.restore(state) is None
        for step in range(1, 6):
            state["w"] += 1
            saved = manager.save(step, state | {"epoch": step}, {"loss": 1 / step})
            state["w"] += 0.5
            assert saved.result().step == step
        assert [checkpoint.step for checkpoint in manager.checkpoints()] == [3, 4, 5]
        assert manager.delete(3)
        assert manager.agree(True)
        assert not manager.agree(False)
    with DistributedCheckpointManager(store) as manager:
        assert manager.restore(state, step=4) == 4
        assert state["epoch"] == 4
        assert state["w"][0] == 5.5
        manager.save(6, state).result()
        assert [checkpoint.step for checkpoint in manager.checkpoints()] == [4, 6]
        refused = manager.save(6, state)
        with pytest.raises(OptionError, match="step 6 already"):
            manager.wait()
        assert isinstance(refused.exception(), OptionError)
        state["w"] += 1
        manager.save(7, state).result()
    [latest] = Path(store, "refs").rglob("*-000000000007-*")
    latest.write_bytes(latest.read_bytes().replace(b'"bytes"', b'"bites"'))
    with DistributedCheckpointManager(store) as manager:
        assert manager.restore(state) == 6


def test_what_was_restored_is_what_the_next_save_is_against(tmp_path: Path) -> None:
    """The first save after a restore stores a changed tensor as a delta, and the others not at all."""
    store = str(tmp_path / "store")
    state: dict[str, Any] = {"frozen": torch.randn(1 << 19), "learns": torch.randn(1 << 19), "small": torch.randn(3)}
    with DistributedCheckpointManager(store) as manager:
        manager.save(1, state).result()
    target = _empty(state)
    with DistributedCheckpointManager(store) as manager:
        assert manager.restore(target) == 1
        target["learns"].mul_(1 + 1e-6)
        manager.save(2, target).result()
    assert not same(target, incckpt.load(store))
    deltas = [path for path in Path(store, "deltas").rglob("*") if path.is_file()]
    assert len(deltas) == 1, "the changed tensor was stored in full"
    first, second = (checkpoint.written for checkpoint in incckpt.list_checkpoints(store))
    assert second < first / 2


def test_a_failed_save_leaves_no_pin_and_the_next_one_sweeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a rank's part fails with, the cause comes out, nothing is committed, and what was put is collected."""
    store = str(tmp_path / "store")
    state = {"w": torch.randn(1 << 16)}
    with DistributedCheckpointManager(store) as manager:
        manager.save(1, state).result()
        state["w"] += 1
        original = ShardWriter.put

        def put(self: ShardWriter, *arguments: Any) -> Any:
            original(self, *arguments)
            raise ValueError("a bug")

        with monkeypatch.context() as patch:
            patch.setattr(ShardWriter, "put", put)
            manager.save(2, state)
            with pytest.raises(SaveError, match="a bug"):
                manager.wait()
        assert not list(Path(store, "pins").rglob("*-*"))
        state["w"] += 1
        manager.save(2, state).result()
        assert torch.equal(incckpt.load(store, step=2)["w"], state["w"])
        objects = {path.name for path in Path(store).rglob("*.*") if "objects" in path.parts or "deltas" in path.parts}
        listed = {name for found in incckpt.list_checkpoints(store) for name in _objects(store, found.step)}
        assert objects == listed


def _objects(store: str, step: int) -> set[str]:
    """Return the names of the objects that a checkpoint needs, its manifest among them."""
    with Store.open(store) as opened:
        lineage = opened.run("default").lineage()
        [name] = [name for name in lineage.live if name.step == step]
        ref = opened.run("default").read(name)
        assert isinstance(ref, Ref)
        keys = manifest_keys(opened.manifest(ref)) | {ref.manifest}
        return {key.rpartition("/")[2] for key in keys}
