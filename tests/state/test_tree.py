"""Documents of states, read: whatever they say, they are refused or give tensors inside their bytes."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from incckpt.errors import CorruptionError, FormatError, StateMismatchError
from incckpt.state.build import Builder, build
from incckpt.state.entries import TORCH_DTYPES, check_entries, entry_from_json, entry_to_json
from incckpt.state.flatten import flatten
from incckpt.state.plain import DECODERS, MAX_DEPTH
from incckpt.state.tree import DEFAULT_FACTORIES, FORMS, parse, references
from incckpt.testing import strategies as states
from incckpt.testing.compare import assert_same_state
from tests.effort import tries
from tests.states import Stored, new_buffer

REFUSED = (CorruptionError, FormatError)

TAGS = [
    "int", "float", "complex", "str", "bytes", "bytearray", "list", "tuple", "deque", "maxlen", "namedtuple", "name",
    "dict", "counter", "ordereddict", "metadata", "defaultdict", "factory", "set", "frozenset", "numpy.scalar", "dtype",
    "numpy.str", "numpy.bytes", "numpy.dtype", "torch.Size", "torch.dtype", "torch.layout", "torch.memory_format",
    "torch.device", "torch.TorchVersion", "torch.Generator", "device", "pickle", "type", "tensor",
    "fields", "base", "shape", "itemsize", "align",
]  # fmt: skip

WORDS = ["nan", "nan:7ff8000000000001", "1e5", "0x10", "list", "os.system", "<f4", "|O", "O", "<U9", "float32", "cpu",
         "cuda:99", "Zm9v", "__class__", "a", "", "strided", "1", "-inf"]  # fmt: skip


def any_json() -> st.SearchStrategy[Any]:
    scalars = st.none() | st.booleans() | st.integers(-3, 5) | st.integers() | st.floats(allow_nan=False)
    words = st.sampled_from(WORDS) | st.text(max_size=3)
    return st.recursive(
        scalars | words,
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.lists(st.tuples(inner, inner).map(list), max_size=3)
            | st.dictionaries(st.sampled_from(TAGS) | st.text(max_size=2), inner, max_size=2)
        ),
        max_leaves=10,
    )


def examples(count: int) -> settings:
    """Return settings for that many examples, the same at every run."""
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=tries(count), deadline=None, derandomize=True, suppress_health_check=checks)


def places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every container of a document, and the key of every member of it."""
    for key in range(len(node)) if isinstance(node, list) else list(node) if isinstance(node, dict) else ():
        yield node, key
        yield from places(node[key])


def sample() -> Any:
    """Return a state with a tensor of each kind of layout."""
    base = torch.arange(40, dtype=torch.float32)
    return {
        "model": {"weight": base.view(5, 8), "column": base.view(5, 8)[:, 2], "gaps": torch.arange(30)[::3]},
        "array": np.arange(12.0).reshape(3, 4)[::-1],
        "fields": np.zeros(2, [("a", "<f4"), ("b", "|u1", (3,))]),
        "c": torch.zeros(4, dtype=torch.complex64).conj(),
        "list": [1, 2.5, (3, b"x"), {4, "five"}, np.float32(6), states.Point(1, torch.ones(2, requires_grad=True))],
        "empty": torch.zeros(0, 3),
    }


SAMPLE = Stored(sample())

# --- anything at all --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@examples(300)
@given(any_json())
def test_any_structure_is_read_or_refused(document: Any) -> None:
    before = set(sys.modules)
    entries = flatten([torch.zeros(2), np.zeros(3), torch.Generator()]).tensors
    with suppress(*REFUSED):
        build(parse(document, 3), entries, [new_buffer(nbytes) for nbytes in (8, 24, torch.get_rng_state().numel())])
    assert set(sys.modules) == before


@pytest.mark.slow
@examples(200)
@given(st.data())
def test_a_changed_document_is_refused_or_stays_inside_its_bytes(data: st.DataObject) -> None:
    stored = SAMPLE
    document = copy.deepcopy(stored.document)
    for _ in range(data.draw(st.integers(1, 3))):
        container, key = data.draw(st.sampled_from([*places(document["structure"]), *places(document["tensors"])]))
        action = data.draw(st.sampled_from(["replace", "drop", "near", "add"]))
        if action == "drop":
            del container[key]
        elif action == "near" and type(container[key]) is int:
            container[key] += data.draw(st.sampled_from([-1, 1, -4, 4, 1 << 20, 1 << 40, -(1 << 62), 1 << 62, 1 << 64]))
        elif action == "add" and isinstance(container, dict):
            container[data.draw(st.sampled_from(["flags", "offset", "pieces", "range", *TAGS]))] = data.draw(any_json())
        else:
            container[key] = data.draw(any_json())
    try:
        entries = [entry_from_json(node) for node in document["tensors"]]
        check_entries(entries, stored.sizes)
        tree = parse(document["structure"], len(entries))
    except REFUSED:
        return
    buffers = [new_buffer(size) for size in stored.sizes]
    builder = Builder(entries, dict(enumerate(buffers)), map_location="cpu")
    for index, entry in enumerate(entries):
        if entry.packed and any(abs(step) > 1 << 30 for step in entry.stride):
            continue  # valid, given enough memory
        try:
            low, high = span(builder.tensor(index))
        except FormatError:
            continue
        if low < high and not entry.packed:
            start = buffers[entry.range].ctypes.data
            assert start <= low < high <= start + stored.sizes[entry.range]
    with suppress(*REFUSED, MemoryError):
        build(tree, entries, buffers, map_location="cpu")


def span(value: Any) -> tuple[int, int]:
    """Return the addresses of the first byte of a tensor and of the one after its last."""
    if isinstance(value, np.ndarray):
        first, itemsize, strides = value.__array_interface__["data"][0], value.itemsize, value.strides
    else:
        itemsize = value.element_size()
        first, strides = value.data_ptr(), tuple(step * itemsize for step in value.stride())
    if 0 in value.shape or itemsize == 0:
        return 0, 0
    reaches = [(size - 1) * step for size, step in zip(value.shape, strides, strict=True)]
    return first + sum(min(reach, 0) for reach in reaches), first + itemsize + sum(max(reach, 0) for reach in reaches)


# --- what is refused --------------------------------------------------------------------------------------------------

MALFORMED: list[tuple[Any, str]] = [
    (1.5, r"at state: not a node: 1\.5"),
    ([], "not a node"),
    ({}, "unknown kind of node"),
    ({"object": 1}, "unknown kind of node.*update"),
    (
        {"dict": [["a", {"list": [1, {"dict": [["b", {"float": "1_0"}]]}]}]]},
        r"at state\['a'\]\[1\]\['b'\]: not a float",
    ),
    ({"dict": [["a", 1], ["a", 2]]}, "key 'a' occurs twice"),
    ({"dict": [[1, 1], [True, 2]]}, "key True occurs twice"),
    ({"dict": [["a"]]}, "pair"),
    ({"dict": {"a": 1}}, "not a list"),
    ({"dict": [[{"list": []}, 1]]}, "not a key"),
    ({"dict": [[{"bytearray": ""}, 1]]}, "not a key.*unhashable"),
    ({"dict": [[{"tensor": 0}, 1]]}, "not a key"),
    ({"dict": [[{"numpy.scalar": "AAAAAAAAAAA=", "dtype": "<m8"}, 1]]}, "not a key.*hash"),
    ({"tensor": 3}, "there is no tensor 3"),
    ({"tensor": -1}, "there is no tensor"),
    ({"tensor": True}, "there is no tensor"),
    ({"tensor": 0, "x": 1}, "unknown kind"),
    ({"list": [{"tensor": 0}, {"tensor": 0}]}, "tensor 0 occurs twice"),
    ({"int": "12"}, "hexadecimal"),
    ({"float": "1e999"}, "not a float"),
    ({"float": "nan:0000000000000001"}, "not a float"),
    ({"float": " 1"}, "not a float"),
    ({"complex": ["1"]}, "not a complex"),
    ({"bytes": "?"}, "base64"),
    ({"bytes": "é"}, "base64"),
    ({"str": "/w=="}, "not a str"),
    ({"set": [1, 1]}, "twice"),
    ({"set": [{"list": []}]}, "not a key"),
    ({"deque": [1, 2], "maxlen": 1}, "maxlen"),
    ({"deque": [], "maxlen": 2**63}, "maxlen"),
    ({"namedtuple": [["class", 1]], "name": "A"}, "no namedtuple type"),
    ({"namedtuple": [["a", 1], ["a", 2]], "name": "A"}, "no namedtuple type"),
    ({"namedtuple": [["a", 1], ["ａ", 2]], "name": "A"}, "no namedtuple type.*duplicate"),
    ({"namedtuple": [["a", 1]], "name": "__import__('os')"}, "no namedtuple type"),
    ({"namedtuple": [["_a", 1]], "name": "A"}, "no namedtuple type"),
    ({"namedtuple": [[1, 1]], "name": "A"}, "not a string"),
    ({"defaultdict": [], "factory": "eval"}, "factory"),
    ({"defaultdict": [], "factory": []}, "factory"),
    ({"torch.dtype": "save"}, "has no dtype 'save'"),
    ({"torch.device": "nonsense"}, "has no device"),
    ({"torch.layout": "float32"}, "has no layout"),
    ({"torch.Size": ["a"]}, "not an integer"),
    ({"torch.Generator": 0, "device": "nonsense"}, "has no device"),
    ({"numpy.scalar": "AA==", "dtype": "<f4"}, "1 bytes are no scalar"),
    ({"numpy.scalar": "AAAAAA==", "dtype": "|O"}, "not a numpy dtype"),
    ({"numpy.scalar": "/////w==", "dtype": "<U1"}, "no scalar"),
    ({"numpy.dtype": "O"}, "not a numpy dtype"),
    ({"numpy.dtype": "i4,O"}, "not a numpy dtype"),
    ({"numpy.dtype": {"fields": [["a", "<f4", 9]], "itemsize": 4}}, "not a numpy dtype"),
    ({"numpy.dtype": {"fields": [["a", "<f4"]], "itemsize": 4}}, "field"),
    ({"numpy.dtype": {"fields": [["a", "<f4", -1]], "itemsize": 4}}, "negative"),
    ({"numpy.dtype": {"base": "<f4", "shape": [-1]}}, "numpy dtype"),
    ({"pickle": 1, "type": "x"}, "not a string"),
    ({"pickle": "", "type": 1}, "not a string"),
]


@pytest.mark.parametrize(("document", "reason"), MALFORMED, ids=str)
def test_a_malformed_node_is_named(document: Any, reason: str) -> None:
    with pytest.raises(REFUSED, match=reason):
        parse(document, 1)


def deep(member: str, depth: int = 20_000) -> Any:
    node: Any = 1
    for _ in range(depth):
        node = {member: [["a", node]] if member in ("dict", "namedtuple") else [node]}
        if member == "namedtuple":
            node["name"] = "A"
    return node


@pytest.mark.slow
@pytest.mark.parametrize("member", ["list", "dict", "namedtuple", "set", "frozenset"])
def test_depth_is_an_error_of_the_document_not_of_the_reader(member: str) -> None:
    with pytest.raises(CorruptionError, match="deep"):
        parse(deep(member), 0)
    with pytest.raises(CorruptionError, match="deep"):
        parse({"dict": [[deep("tuple"), 1]]}, 0)


def base_dtype(depth: int) -> Any:
    return {"base": base_dtype(depth - 1), "shape": [1]} if depth else "<f4"


FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"pieces": [{"range": 1}]}, "there is no range 1"),
    ({"pieces": [{"range": 0, "offset": 4}]}, r"bytes \[4, 44\) of a range of 40"),
    ({"pieces": [{"range": 0, "offset": -4}]}, "non-negative"),
    ({"shape": [11]}, r"bytes \[0, 44\) of a range of 40"),
    ({"shape": [5], "stride": [3]}, "of a range of 40"),
    ({"shape": [5], "stride": [-1], "pieces": [{"range": 0, "offset": 16}]}, "negative stride"),
    ({"shape": [2**62, 2**62], "stride": [0, 0]}, "too large"),
    ({"shape": [2**63]}, "64-bit"),
    ({"shape": [2], "stride": [2**64]}, "out of bounds"),
    ({"shape": [2, 5], "stride": [1]}, "with stride"),
    ({"shape": [1] * 65}, "shape"),
    ({"shape": 3}, "list of integers"),
    ({"shape": [True]}, "list of integers"),
    ({"shape": [0]}, "an empty tensor with a range"),
    ({"dtype": "float64"}, "of a range of 40"),
    ({"dtype": "qint8"}, "unknown dtype 'qint8'"),
    ({"dtype": "save"}, "unknown dtype"),
    ({"dtype": 3}, "not a string"),
    ({"kind": "jax"}, "unknown kind"),
    ({"kind": "numpy"}, "not a numpy dtype"),
    ({"kind": "numpy", "dtype": "<f4", "stride": [-4]}, r"bytes \[-36, 4\)"),
    ({"kind": "numpy", "dtype": "<f4", "flags": ["requires_grad"]}, "flag"),
    ({"kind": "numpy", "dtype": "<f4", "device": "cuda"}, "device"),
    ({"flags": ["conj"]}, "conjugate"),
    ({"flags": ["loud"]}, "unknown flags"),
    ({"flags": "conj"}, "unknown flags"),
    ({"flags": [[]]}, "unknown flags"),
    ({"dtype": "int32", "flags": ["requires_grad"]}, "requires_grad on int32"),
    ({"flags": ["packed"], "shape": [9]}, "does not fill its range"),
    ({"flags": ["packed"], "pieces": [{"range": 0, "offset": 4}]}, "does not fill its range"),
    ({"name": None}, "not a string"),
    ({"colour": 1}, "unknown fields"),
    ({"pieces": [{"range": "0"}]}, "non-negative"),
    ({"pieces": [{}]}, "non-negative"),
    ({"pieces": {"range": 0}}, "list of objects"),
    ({"pieces": [0]}, "list of objects"),
    ({"pieces": [{"range": 0, "colour": 1}]}, "unknown fields of a piece"),
    (
        {"pieces": [{"range": 0, "at": [0], "shape": [5]}, {"range": 1, "at": [5], "shape": [5]}]},
        "needs a later incckpt",
    ),
]


@pytest.mark.parametrize(("change", "reason"), FAULTS, ids=str)
def test_a_tensor_that_does_not_fit_its_range_is_refused(change: dict[str, Any], reason: str) -> None:
    good = {"name": "w", "dtype": "float32", "shape": [10], "pieces": [{"range": 0}]}
    check_entries([entry_from_json(good)], [40])
    with pytest.raises(REFUSED, match=reason) as caught:
        check_entries([entry_from_json({**good, **change})], [40])
    assert "name" in change or "'w'" in str(caught.value)


def test_one_range_is_packed_in_one_way() -> None:
    packed = {
        "name": "w",
        "dtype": "float32",
        "shape": [5],
        "stride": [2],
        "pieces": [{"range": 0}],
        "flags": ["packed"],
    }
    check_entries([entry_from_json(packed), entry_from_json({**packed, "dtype": "int32"})], [20])
    for other in ({"stride": [3]}, {"flags": [], "stride": [1]}):
        with pytest.raises(CorruptionError, match="packed"):
            check_entries([entry_from_json(packed), entry_from_json({**packed, **other})], [20])


def test_dtypes_nested_too_deeply_are_refused() -> None:
    assert entry_from_json({"name": "", "kind": "numpy", "dtype": base_dtype(3), "shape": [0]}).itemsize == 4
    with pytest.raises(CorruptionError, match="deep"):
        entry_from_json({"name": "", "kind": "numpy", "dtype": base_dtype(500), "shape": [0]})


def test_an_entry_of_a_dtype_this_torch_has_not_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch, "float8_e8m0fnu", raising=False)
    entries = [entry_from_json({"name": "w", "dtype": "float8_e8m0fnu", "shape": [4], "pieces": [{"range": 0}]})]
    with pytest.raises(FormatError, match=r"'w'.*has no dtype float8_e8m0fnu"):
        build(parse({"tensor": 0}, 1), entries, [new_buffer(4)])


@examples(200)
@given(states.shared_memory())
def test_an_entry_is_what_its_json_says(views: Any) -> None:
    for entry in flatten(views).tensors:
        text = json.dumps(entry_to_json(entry), allow_nan=False)
        assert entry_from_json(json.loads(text)) == entry


def test_plain_entries_are_short() -> None:
    node = entry_to_json(flatten({"w": torch.zeros(3, 4)}).tensors[0])
    assert node == {"name": "w", "dtype": "float32", "shape": [3, 4], "pieces": [{"range": 0}]}


# --- selection --------------------------------------------------------------------------------------------------------


def selectable() -> Any:
    return {
        "model": {"layers.0.weight": torch.zeros(2), "layers.1.weight": torch.ones(3), "head": torch.ones(1)},
        "optimizer": {"state": {0: {"step": 3, "exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}, {"lr": 0.2}]},
        "pair": states.Point(4, (5, torch.zeros(5))),
        "epoch": 7,
        "none": {},
        "odd[0]": 1,
    }


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ("epoch", {"epoch": 7}),
        ("*", selectable()),
        ("model", {"model": selectable()["model"]}),
        ("model.*", {"model": selectable()["model"]}),
        ("model.layers.0.*", {"model": {"layers.0.weight": torch.zeros(2)}}),
        ("*.lr", {"optimizer": {"param_groups": [{"lr": 0.1}, {"lr": 0.2}]}}),
        ("optimizer.param_groups.1", {"optimizer": {"param_groups": [None, {"lr": 0.2}]}}),
        ("optimizer.state.0.step", {"optimizer": {"state": {0: {"step": 3}}}}),
        ("pair.label.1", {"pair": states.Point(None, (None, torch.zeros(5)))}),
        (["epoch", "none"], {"epoch": 7, "none": {}}),
        ("odd[0]", {"odd[0]": 1}),
        (["model", "model.head"], {"model": selectable()["model"]}),
    ],
)
def test_a_selection_keeps_what_matches(keys: Any, expected: Any) -> None:
    stored = Stored(selectable())
    assert_same_state(expected, stored.load(keys=keys))


def test_a_selection_needs_only_its_own_ranges() -> None:
    stored = Stored(selectable())
    entries = stored.entries()
    assert [entries[index].name for index in references(stored.tree("optimizer"))] == ["optimizer.state.0.exp_avg"]


def test_a_pattern_that_matches_nothing_is_named_with_names_that_exist() -> None:
    with pytest.raises(StateMismatchError, match=r"'model\.layer\.0\.weight'.*model\.layers\.0\.weight"):
        Stored(selectable()).load(keys=["model", "model.layer.0.weight"])
    with pytest.raises(StateMismatchError, match="no pattern"):
        Stored(selectable()).load(keys=[])


@pytest.mark.slow
@examples(150)
@given(states.states(), st.data())
def test_every_name_selects_its_value(state: Any, data: st.DataObject) -> None:
    stored = Stored({"root": state, "other": torch.zeros(3)})
    names = [entry.name for entry in stored.entries() if not set("*?[") & set(entry.name)]
    names = [name for name in names if "_metadata" not in name]  # comes along with its dict, not by itself
    name = data.draw(st.sampled_from(names))
    entries = stored.entries()
    assert name in {entries[index].name for index in references(stored.tree(name))}


# --- the documentation ------------------------------------------------------------------------------------------------

PAGE = (Path(__file__).parents[2] / "docs" / "structure.md").read_text()


def test_the_example_of_the_documentation_is_true() -> None:
    code, document = (PAGE.split(f"```{language}\n")[1].split("```")[0] for language in ("python", "json"))
    state = eval(code, {"torch": torch})
    assert Stored(state).document == json.loads(document)


def test_every_kind_of_node_and_dtype_is_documented() -> None:
    for members in [*([tag] for tag in DECODERS), *FORMS]:
        for member in members:
            assert f'"{member}":' in PAGE or f"member `{member}`" in PAGE, member
    for name in TORCH_DTYPES:
        assert f"`{name}`" in PAGE or name[:-1] in ("int", "uint")
    for factory in DEFAULT_FACTORIES:
        assert f"`{factory}`" in PAGE
    assert f"at most {MAX_DEPTH} deep" in PAGE
