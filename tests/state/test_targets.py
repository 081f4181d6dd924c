"""Targets that cannot be written to, restores of a part, and where a load puts tensors."""

from __future__ import annotations

import copy
import io
import types
from collections import OrderedDict, deque, namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from incckpt.errors import OptionError, StateMismatchError
from incckpt.testing.compare import assert_same_state, difference
from tests.states import Stored

Pair = namedtuple("Pair", ["first", "second"])


def linear(value: float) -> torch.nn.Linear:
    module = torch.nn.Linear(2, 2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)
    return module


# --- what cannot be written to ----------------------------------------------------------------------------------------

UNWRITABLE: list[tuple[Any, Any, str]] = [
    ((linear(1), {"epoch": 3}, 7), (linear(0), {"epoch": 0}, 0), r"state\[2\] is a int, which cannot be written to"),
    ({"a": 1}, None, r"state is a NoneType, which cannot be written to here: restore into a dict"),
    (5, 4, r"state is a int, which cannot be written to"),
    ({"a": 1}, {}, r"state is an empty dict, so nothing says what to restore into"),
    ([1, 2], [], r"state is a list of 0 here and a list of 2"),
    ({"a": 1}, [], r"state is a list of 0 here and a dict of 1"),
    ((1, 2), (), r"state is a tuple of 0 here and a tuple of 2"),
    ({1, 2}, frozenset({1}), r"state is a frozenset, which cannot be written to"),
    ([1, 2], {1}, r"state is a set, which cannot be written to"),
    ((linear(1), [1]), (linear(0), {}), r"state\[1\] is a dict, which cannot be written to"),
    (((linear(1), 1),), ((linear(0), 0),), r"state\[0\]\[1\] is a int"),
    (Pair(linear(1), 1), Pair(linear(0), 0), r"state\[1\] is a int"),
    ({"x": {"m": 1}}, {"x": types.MappingProxyType({"m": linear(0)})}, r"state\['x'\] is a mappingproxy.*state_dict"),
    ({"x": 1}, {"x": object()}, r"state\['x'\] is a object.*put None there to be given a value of type int"),
    ({"x": {"y": [1]}}, {"x": {"y": [object()]}}, r"state\['x'\]\['y'\]\[0\] is a object"),
    ([torch.ones(3)], [torch.ones(3).to_sparse()], "layout torch.sparse_coo"),
]  # fmt: skip


@pytest.mark.parametrize(("saved", "target", "message"), UNWRITABLE)
def test_what_cannot_be_written_to_is_refused(saved: Any, target: Any, message: str) -> None:
    before = copy.deepcopy(target) if not isinstance(target, dict) else None
    with pytest.raises(StateMismatchError, match=message):
        Stored(saved).restore(target)
    if isinstance(target, tuple) and before:
        assert difference(Stored(before).load(), Stored(target).load()) == ""


def test_tensors_whose_memory_was_freed_are_refused() -> None:
    tensor = torch.zeros(100)
    tensor.untyped_storage().resize_(0)
    with pytest.raises(StateMismatchError, match="memory has been freed"):
        Stored([torch.ones(100)]).restore([tensor])


def test_containers_at_the_top_are_matched_item_by_item() -> None:
    stored = Stored({"epoch": 3, "model": linear(1), "log": [1, 2]})
    target: dict[str, Any] = {"epoch": 0, "log": []}
    stored.restore(target)
    assert target == {"epoch": 3, "log": [1, 2]}


@pytest.mark.parametrize(
    ("saved", "target"),
    [
        ((linear(1), {"epoch": 3}, [7]), (linear(0), {"epoch": 0}, [0])),
        ([linear(1), 3], [linear(0), 0]),
        (deque([1, 2]), deque([0, 0])),
        ({"t": (linear(1), 3)}, {"t": (linear(0), 0)}),
        ({}, {}),
        ({1, 2}, {3}),
        ({"a": {1: [2, (3, 4)]}}, {"a": {}}),
        ({"a": None}, {"a": None}),
        ({"a": torch.ones(2)}, {"a": None}),
    ],
)
def test_what_can_be_written_to_is(saved: Any, target: Any) -> None:
    restored, _ = Stored(saved).restore(target)
    assert_same_state(Stored(saved).load(), Stored(target).load())
    assert restored is target or isinstance(target, tuple)


def test_pickled_objects_take_the_place_of_any() -> None:
    target: dict[str, Any] = {"p": {"path": Path("here"), "none": None}}
    Stored({"p": {"path": Path("there"), "none": 1}}, allow_pickle=True).restore(target, allow_pickle=True)
    assert target == {"p": {"path": Path("there"), "none": 1}}


# --- parts ------------------------------------------------------------------------------------------------------------


def job(value: float) -> dict[str, Any]:
    model = torch.nn.Sequential(OrderedDict(encoder=linear(value), head=linear(value)))
    optimizer = torch.optim.SGD(model.parameters(), lr=value, momentum=0.9)
    for parameter in model.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.full_like(parameter, value)
    return {
        "model": model, "optimizer": optimizer, "progress": {"epoch": value, "log": [value]},
        "pair": (torch.full((2,), value), value), "array": np.full(2, value),
    }  # fmt: skip


NAMES: dict[str, Callable[[Any], Any]] = {
    "model.encoder": lambda state: state["model"].encoder.weight[0, 0].item(),
    "model.head": lambda state: state["model"].head.bias[0].item(),
    "optimizer": lambda state: state["optimizer"].param_groups[0]["lr"],
    "moments": lambda state: next(iter(state["optimizer"].state.values()))["momentum_buffer"].max().item(),
    "progress.epoch": lambda state: state["progress"]["epoch"],
    "progress.log": lambda state: state["progress"]["log"][0],
    "pair.0": lambda state: state["pair"][0][0].item(),
    "pair.1": lambda state: state["pair"][1],
    "array": lambda state: state["array"][0].item(),
}


@pytest.mark.parametrize(("options", "restored"), [
    ({}, set(NAMES)),
    ({"keys": "*"}, set(NAMES)),
    ({"keys": "model"}, {"model.encoder", "model.head"}),
    ({"keys": "model.*"}, {"model.encoder", "model.head"}),
    ({"keys": "model.encoder.*"}, {"model.encoder"}),
    ({"keys": ["*.head.*", "progress.epoch"]}, {"model.head", "progress.epoch"}),
    ({"keys": "pair.0"}, {"pair.0"}),
    ({"keys": "pair.1"}, {"pair.1"}),
    ({"keys": ("optimizer", "array")}, {"optimizer", "moments", "array"}),
    ({"ignore": "optimizer"}, set(NAMES) - {"optimizer", "moments"}),
    ({"ignore": ["model.head.*", "progress.log"]}, set(NAMES) - {"model.head", "progress.log"}),
    ({"keys": "model", "ignore": "*.head*"}, {"model.encoder"}),
    ({"ignore": "nothing"}, set(NAMES)),
])  # fmt: skip
def test_a_part_is_restored_and_the_rest_left(options: dict[str, Any], restored: set[str]) -> None:
    target = job(2)
    Stored(job(1)).restore(target, **options)
    assert {name for name, value in NAMES.items() if value(target) == 1} == restored
    assert {name for name, value in NAMES.items() if value(target) == 2} == set(NAMES) - restored


def test_what_is_ignored_need_not_fit_or_exist() -> None:
    saved = {"model": torch.nn.ModuleDict({"body": linear(1), "old": linear(1)}), "x": torch.ones(3)}
    target: dict[str, Any] = {
        "model": torch.nn.ModuleDict({"body": linear(0), "new": torch.nn.Linear(7, 7)}),
        "x": torch.ones(4),
        "y": linear(0),
    }
    Stored(saved).restore(target, ignore=["model.new.*", "model.old.*", "x", "y"])
    assert target["model"]["body"].weight[0, 0] == 1
    with pytest.raises(StateMismatchError, match=r"not in the checkpoint: new.weight, new.bias"):
        Stored(saved).restore(target, ignore=["model.old.*", "x", "y"])


@pytest.mark.parametrize(("options", "message"), [
    ({"keys": "modle"}, r"nothing in the checkpoint matches 'modle'; some names: model"),
    ({"keys": ["model", "nope.*"]}, r"matches 'nope.\*'"),
    ({"keys": []}, r"matches no pattern"),
    ({"ignore": "*"}, r"nothing in the checkpoint is left to restore"),
    ({"keys": "optimizer.state.*"}, r"state\['optimizer'\] loads itself, so it is restored whole or not at all"),
    ({"ignore": "optimizer.param_groups*"}, r"state\['optimizer'\] loads itself"),
])  # fmt: skip
def test_selections_that_mean_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    target = job(2)
    with pytest.raises(StateMismatchError, match=message):
        Stored(job(1)).restore(target, **options)
    assert {name for name, value in NAMES.items() if value(target) == 2} == set(NAMES)


def test_only_the_ranges_of_the_part_are_read() -> None:
    stored = Stored({"a": torch.ones(3), "b": torch.ones(4)})
    _, assignment = stored.restore({"a": torch.zeros(3), "b": torch.zeros(4)}, keys="b")
    assert [stored.sizes[index] for index in assignment.ranges] == [16]


# --- map_location -----------------------------------------------------------------------------------------------------

STATE = {
    "a": torch.arange(6.0).view(2, 3).t(),
    "p": torch.nn.Parameter(torch.ones(2)),
    "none": torch.zeros(0, 3),
    "c": torch.ones(2, dtype=torch.complex64).conj(),
}


@pytest.mark.parametrize(
    "map_location",
    [
        lambda storage, location: storage,
        lambda storage, location: storage.clone(),
        lambda storage, location: None,
        lambda storage, location: storage.cpu(),
        lambda storage, location: torch.empty(storage.nbytes(), dtype=torch.uint8, device="meta").untyped_storage(),
        lambda storage, location: {"cpu": storage}[location],
        {"cpu": "cpu"},
        {"cpu": "meta"},
        {"cuda:0": "meta"},
        {},
        "cpu",
        "meta",
        torch.device("cpu"),
        torch.device("meta"),
        None,
    ],
)
def test_map_location_does_what_it_does_for_torch_load(map_location: Any) -> None:
    file = io.BytesIO()
    torch.save(STATE, file)
    file.seek(0)
    expected = torch.load(file, map_location=map_location)
    loaded = Stored(STATE).load(map_location=map_location)
    for name, value in expected.items():
        assert loaded[name].device == value.device, name
        assert loaded[name].stride() == value.stride(), name
        assert type(loaded[name]) is type(value), name
        if not value.is_meta:
            assert torch.equal(loaded[name], value), name


def test_a_function_gets_each_storage_once_with_its_device() -> None:
    tensor = torch.arange(6.0)
    stored = Stored({"whole": tensor, "view": tensor[2:], "other": torch.ones(2), "array": np.ones(2)})
    for node in stored.document["tensors"]:
        if node["name"] == "other":
            node["device"] = "cuda:1"
    seen: list[Any] = []

    def place(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage:
        seen.append((type(storage), str(storage.device), storage.nbytes(), location))
        return storage

    loaded = stored.load(map_location=place)
    kind = torch.UntypedStorage
    assert sorted(seen, key=str) == sorted([(kind, "cpu", 24, "cpu"), (kind, "cpu", 8, "cuda:1")], key=str)
    loaded["view"][0] = 9
    assert loaded["whole"][2] == 9
    assert loaded["other"].tolist() == [1, 1]


def test_map_location_of_what_is_not_there_says_so() -> None:
    def fail(storage: Any, location: str) -> Any:
        raise ValueError("mine")

    stored = Stored({"a": torch.ones(2), "g": torch.Generator()})
    with pytest.raises(ValueError, match="mine"):
        stored.load(map_location=fail)
    with pytest.raises(OptionError, match=r"a storage and its device \('cpu'\).*returned 'cuda'"):
        stored.load(map_location=lambda storage, location: "cuda")  # type: ignore[arg-type, return-value]
    with pytest.raises(OptionError, match=r"storage of 0 bytes for one of 8, which tensor 'a' needs"):
        stored.load(map_location=lambda storage, location: torch.empty(0).untyped_storage())
    with pytest.raises(OptionError, match="map_location must be"):
        stored.load(map_location=3)  # type: ignore[arg-type]
    for location in ("nonsense", {"cpu": "nonsense:0"}, {"cpu": "xpu:77"}):
        with pytest.raises(OptionError, match=r"tensors saved on cpu would go to xpu:77|no device for 'cpu'"):
            stored.load(map_location=location)


def test_generators_go_along() -> None:
    generator = torch.Generator().manual_seed(3)
    stored = Stored({"g": generator})
    expected = torch.rand(3, generator=generator)
    for map_location in (None, "cpu", "meta", lambda storage, location: storage, lambda storage, location: None):
        loaded = stored.load(map_location=map_location)["g"]
        assert torch.equal(torch.rand(3, generator=loaded), expected)
