"""Manifests as an attacker would write them, one oddity each: every use raises an error of incckpt, nothing worse."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

import incckpt
from incckpt.errors import IncckptError, LineageError
from tests.hostile import Contents, filled, manifest_of, rewrite_manifest, saved

Pair = namedtuple("Pair", "a b")
Change = Callable[[dict[str, Any]], None]


def state() -> dict[str, Any]:
    """Return what is saved, and restored into."""
    return {
        "w": torch.arange(6.0).reshape(2, 3),
        "generator": torch.Generator().manual_seed(1),
        "pair": Pair(1, 2),
        "array": np.arange(4),
    }


@cache
def sound() -> Contents:
    """Return a store of that state."""
    return saved(state())


def child(value: Any) -> Change:
    """Return a change of the first item of the structure's dict."""

    def change(fields: dict[str, Any]) -> None:
        fields["structure"]["dict"].append(["odd", value])

    return change


def tensor(**changed: Any) -> Change:
    """Return a change of a tensor's entry."""

    def change(fields: dict[str, Any]) -> None:
        fields["tensors"][0].update(changed)

    return change


def of_generator(device: str) -> Change:
    """Return a change of the generator's device."""

    def change(fields: dict[str, Any]) -> None:
        node = next(item for _, item in fields["structure"]["dict"] if isinstance(item, dict) and "device" in item)
        node["device"] = device

    return change


def nested(depth: int) -> Any:
    """Return lists inside one another."""
    node: Any = 1
    for _ in range(depth):
        node = {"list": [node]}
    return node


DEVICES = ["hpu", "xla", "privateuseone:3", "cuda:99", "cpu:99", "mtia", "vulkan", "\0", "cpu\0", "nonsense", ""]
CASES: dict[str, Change] = {
    "fields that are one identifier": child({"namedtuple": [["a", 1], ["\uff41", 2]], "name": "T"}),
    "a field that is no identifier": child({"namedtuple": [["__import__('os')", 1]], "name": "T"}),
    "a type that is no identifier": child({"namedtuple": [["a", 1]], "name": "T(object): pass"}),
    "a maxlen beyond any": child({"deque": [1], "maxlen": 2**70}),
    "a maxlen below none": child({"deque": [], "maxlen": -1}),
    "an integer of many digits": child({"int": "0x" + "f" * 100_000}),
    "a float of many digits": child({"float": "1" * 5000}),
    "a key that cannot be one": lambda fields: fields["structure"]["dict"].append([{"list": []}, 1]),
    "nested too deeply": child(nested(300)),
    "a structured scalar": child({"numpy.scalar": "AAAA", "dtype": {"fields": [["a", "|O", 0]], "itemsize": 8}}),
    "a scalar of a huge dtype": child({"numpy.scalar": "", "dtype": "|V2147483647"}),
    "a subarray of a huge dtype": child({"numpy.dtype": {"base": "<f8", "shape": [2**31, 2**31]}}),
    "a size beyond any": child({"torch.Size": [2**63]}),
    "a size of thousands of dimensions": tensor(shape=[1] * 5000),
    "a stride beyond any": tensor(stride=[2**62, 2**62]),
    "a negative offset": tensor(pieces=[{"range": 0, "offset": -8}]),
    "an unknown class": child({"torch.dtype": "__class__"}),
    "a device of a generator that is an index": of_generator("cuda:99999999999999999999"),
    **{f"a tensor on {device!r}": tensor(device=device) for device in DEVICES},
    **{f"a generator on {device!r}": of_generator(device) for device in DEVICES},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_an_oddity_is_an_error_of_ours(case: str) -> None:
    contents = rewrite_manifest(sound(), CASES[case])
    backend = filled(contents)

    def restored() -> None:
        with incckpt.CheckpointManager(backend, threads=1) as manager:
            manager.restore(state(), step=1)

    uses: list[Callable[[], Any]] = [
        lambda: incckpt.load(backend, threads=1),
        lambda: incckpt.load(backend, keys="w", map_location="meta", threads=1),
        restored,
        lambda: incckpt.verify(backend, threads=1),
        lambda: incckpt.describe(backend),
        lambda: incckpt.collect(backend, dry_run=False, min_age=0),
    ]
    refused = 0
    for use in uses:
        try:
            use()
        except IncckptError:
            refused += 1
    assert refused or any(word in case for word in ("tensor on", "generator on", "digits", "a size"))
    gone = contents.keys() - {entry.key for entry in backend.list()}
    assert gone <= {manifest_of(sound())[0]}, "a collection took more than the manifest that was replaced"


@pytest.mark.parametrize("device", ["hpu", "mtia", "privateuseone", "vulkan", "xla", "nonsense", "cuda:77"])
def test_a_device_that_is_not_here(device: str) -> None:
    with pytest.raises(IncckptError, match=r"device|available"):
        incckpt.load(filled(sound()), map_location=device)


def test_a_lineage_under_another_attempts_name_does_not_hide_the_checkpoints() -> None:
    contents = dict(sound())
    contents["runs/default/attempts/009001.from"] = contents.pop("runs/default/attempts/000001.from")
    store = filled(contents)
    with pytest.raises(LineageError, match="says that it is of attempt 1"):
        incckpt.load(store, progress=False, threads=1)
    with (
        incckpt.CheckpointManager(store, threads=1, read_only=True) as manager,
        pytest.raises(LineageError, match="says that it is of attempt 1"),
    ):
        manager.restore(state())
