"""Hypothesis strategies for states: everything that can be saved, in every shape, sharing memory in every way."""

from __future__ import annotations

import struct
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable
from keyword import iskeyword
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from hypothesis import strategies as st

from incckpt.state.entries import TORCH_DTYPES, byte_extent
from incckpt.state.packing import HEAVY
from incckpt.state.plain import PLAIN_TYPES
from incckpt.state.ranges import CARRIERS
from incckpt.state.tree import MAPPINGS

__all__ = [
    "NUMPY_DTYPES",
    "arrays",
    "keys",
    "named_tuples",
    "packed_values",
    "plain_values",
    "shared_memory",
    "states",
    "tensors",
    "torch_dtypes",
]

NUMPY_DTYPES = [
    *map(np.dtype, ("|b1", "|i1", "<i2", ">i4", "<i8", "|u1", ">u2", "<u4", "<u8", "<f2", ">f4", "<f8", "<c8", ">c16")),
    *map(np.dtype, ("<M8[ns]", ">M8[D]", "<m8[25s]", "<m8", "|S3", "<U2", ">U3", "|V5")),
    # On platforms where a long double is a double, it would come back as one.
    *map(np.dtype, (np.longdouble, np.clongdouble) if np.dtype(np.longdouble).itemsize > 8 else ()),
    np.dtype([("a", "<f4"), ("b", "|u1"), ("c", ">i2", (2,))]),
    np.dtype([("x", "|u1"), ("y", "<f8")], align=True),
    np.dtype({"names": ["p", "q"], "formats": ["<f4", [("r", "<i8")]], "offsets": [4, 9], "itemsize": 20}),
    np.dtype([(("title", "name"), "<i4")]),
]
"""One of each kind of dtype that can be saved."""

Point = namedtuple("Point", ["x", "label"])


def torch_dtypes() -> st.SearchStrategy[torch.dtype]:
    """Return every dtype of the installed torch that can be saved."""
    return st.sampled_from([getattr(torch, name) for name in TORCH_DTYPES if hasattr(torch, name)])


def _floats() -> st.SearchStrategy[float]:
    bits = st.integers(0, 2**64 - 1).map(lambda value: float(struct.unpack("<d", struct.pack("<Q", value))[0]))
    return st.floats() | bits | st.sampled_from([-0.0, float("inf"), float("-inf"), float("nan"), 5e-324])


def _texts() -> st.SearchStrategy[str]:
    return st.text(max_size=6) | st.text(st.characters(categories=["Cs", "Lu"]), max_size=3)


def _constants(cls: type) -> st.SearchStrategy[Any]:
    return st.sampled_from([value for value in vars(torch).values() if type(value) is cls])


@st.composite
def _integers(draw: st.DrawFn) -> int:
    edges = st.sampled_from(
        [2**53 - 1, 2**53, 2**63 - 1, 2**63, 2**200, 10**5000]
    )  # Python writes 4,300 digits at most
    return draw(st.integers() | st.integers(-(2**80), 2**80) | edges) * draw(st.sampled_from([1, -1]))


_BY_TYPE: dict[type, Callable[[], st.SearchStrategy[Any]]] = {
    type(None): st.none,
    bool: st.booleans,
    int: _integers,
    float: _floats,
    complex: lambda: st.builds(complex, _floats(), _floats()),
    str: _texts,
    bytes: lambda: st.binary(max_size=5),
    bytearray: lambda: st.binary(max_size=5).map(bytearray),
    set: lambda: st.sets(keys(), max_size=3),
    frozenset: lambda: st.frozensets(keys(), max_size=3),
    torch.Size: lambda: st.lists(st.integers(0, 2**63 - 1), max_size=3).map(torch.Size),
    torch.dtype: lambda: _constants(torch.dtype),
    torch.device: lambda: st.sampled_from(["cpu", "cuda:3", "meta", "mps:0", "hpu", "xpu:1"]).map(torch.device),
    torch.layout: lambda: _constants(torch.layout),
    torch.memory_format: lambda: _constants(torch.memory_format),
    type(torch.__version__): lambda: st.just(torch.__version__),
}
_UNHASHABLE = (bytearray, set)


def keys() -> st.SearchStrategy[Any]:
    """Return dict keys of every possible type, except NaN, which does not even equal itself."""
    common = _texts() | st.integers()
    rare = st.sampled_from(sorted(PLAIN_TYPES - {*_UNHASHABLE, frozenset}, key=str)).flatmap(
        lambda kind: _BY_TYPE[kind]()
    )
    # Without dtypes that cannot be hashed, and long doubles, which have bit patterns that are no numbers.
    dtypes = [dtype for dtype in NUMPY_DTYPES if dtype.kind != "V" and dtype != "<m8" and dtype.char not in "gG"]
    numpy = st.sampled_from(dtypes).flatmap(_numpy_scalars)
    rare = (rare | numpy).filter(lambda value: value == value)
    nested = st.tuples(common, st.tuples(rare))
    return st.one_of(common, common, rare, nested, st.frozensets(common | nested, max_size=2))


def plain_values() -> st.SearchStrategy[Any]:
    """Return values of every type except containers and tensors, from the tables that saving uses."""
    return st.one_of(
        st.sampled_from(sorted(PLAIN_TYPES, key=str)).flatmap(lambda kind: _BY_TYPE[kind]()),
        st.sampled_from(NUMPY_DTYPES).flatmap(_numpy_scalars),
        st.sampled_from([np.str_("a\0\ud800"), np.bytes_(b"b\0"), *NUMPY_DTYPES]),
    )


def named_tuples(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Return namedtuples with names and fields of all kinds that Python allows."""
    words = [
        "a",
        "_S",
        "x1",
        "count",
        "index",
        "match",
        "é",
        "ﬁx",
        "Ａ",
        "self",
        "cls",
        "_cls",
        "class",
        "_0",
        "x y",
        "",
    ]
    names = st.sampled_from(words) | st.text(st.characters(categories=["Lu", "Ll", "Nd", "Pc"]), max_size=3)

    def make(name: str, fields: list[str], values: list[Any]) -> Any:
        name = name if name.isidentifier() and not iskeyword(name) else "Named"
        try:
            made = namedtuple(name, fields, rename=True)  # type: ignore[misc]
        except SyntaxError:  # two fields that normalise to one identifier
            return tuple(values)
        return made(*values[: len(fields)])

    values = st.lists(children, min_size=3, max_size=3)
    return st.builds(make, names, st.lists(names, max_size=3), values)


def packed_values() -> st.SearchStrategy[Any]:
    """Return containers that are too large for the structure and so are packed, with values of every type."""
    inner = st.recursive(
        plain_values(),
        lambda children: st.one_of(
            st.lists(children, max_size=2),
            st.lists(children, max_size=2).map(tuple),
            st.dictionaries(keys(), children, max_size=2),
            named_tuples(children),
        ),
        max_leaves=4,
    )
    count = st.sampled_from([HEAVY - 1, HEAVY, HEAVY + 1, 2000])

    def fill(kind: str, some: list[Any], some_keys: list[Any], count: int) -> Any:
        if kind in ("list", "tuple", "deque"):
            values = [some[index % len(some)] for index in range(count)]
            return deque(values, 2 * count) if kind == "deque" else tuple(values) if kind == "tuple" else values
        if kind in ("set", "frozenset"):
            return {"set": set, "frozenset": frozenset}[kind](range(count)) | {key for key in some_keys if key == key}
        items = {**dict(zip(some_keys, some, strict=False)), **{f"k{i}": some[i % len(some)] for i in range(count)}}
        return {"dict": dict, "ordereddict": OrderedDict, "counter": Counter}.get(
            kind, lambda pairs: defaultdict(int, pairs)
        )(items)

    kinds = st.sampled_from(["list", "tuple", "deque", "set", "frozenset", *MAPPINGS])
    large = st.builds(fill, kinds, st.lists(inner, min_size=1, max_size=4), st.lists(keys(), max_size=4), count)
    runs = st.builds(
        lambda unit, kind: kind(unit * 70_000), st.binary(min_size=1, max_size=3), st.sampled_from([bytes, bytearray])
    )
    return large | runs | st.text(st.characters(), min_size=1, max_size=3).map(lambda unit: unit * 70_000)


def _numpy_scalars(dtype: np.dtype[Any]) -> st.SearchStrategy[Any]:
    # Text needs valid code points; everything else may be any bits.
    fill = (
        st.just(bytes(dtype.itemsize))
        if dtype.kind == "U"
        else st.binary(min_size=dtype.itemsize, max_size=dtype.itemsize)
    )
    return fill.map(lambda data: np.frombuffer(bytearray(data), dtype)[0])


@st.composite
def _geometry(
    draw: st.DrawFn, nbytes: int, itemsize: int, *, negative: bool
) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Draw shape, strides and offset (bytes) of a tensor inside `nbytes` of memory: any order, gaps, overlaps."""
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    strides = []
    for _ in shape:
        step = draw(st.integers(0, 6)) * itemsize
        strides.append(-step if negative and draw(st.booleans()) else step)
    if draw(st.booleans()) and itemsize:  # the usual case: dense, in some order of dimensions
        step = itemsize
        for dimension in draw(st.permutations(range(len(shape)))):
            strides[dimension] = step
            step *= max(shape[dimension], 1)
    if 0 in shape or itemsize == 0:
        return shape, tuple(strides), 0
    low, high = byte_extent(shape, strides, itemsize)
    if high - low > nbytes:
        return (), (), 0
    offset = -low + draw(st.integers(0, (nbytes - (high - low)) // itemsize)) * itemsize
    return shape, tuple(strides), offset


@st.composite
def _array_over(draw: st.DrawFn, memory: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
    dtype = draw(st.sampled_from(NUMPY_DTYPES))
    if dtype.kind == "U":
        dtype = np.dtype("<u4")  # random bytes are not always valid code points
    shape, strides, offset = draw(_geometry(memory.nbytes, dtype.itemsize, negative=True))
    return np.ndarray(shape, dtype, memory, offset, strides)


@st.composite
def _tensor_over(draw: st.DrawFn, memory: npt.NDArray[np.uint8]) -> torch.Tensor:
    dtype = draw(torch_dtypes())
    itemsize = dtype.itemsize
    shape, strides, offset = draw(_geometry(memory.nbytes, itemsize, negative=False))
    tensor = torch.empty(0, dtype=CARRIERS[itemsize]).view(dtype)
    steps = [step // itemsize for step in strides]
    tensor.set_(torch.from_numpy(memory).untyped_storage(), offset // itemsize, shape, steps)
    if dtype.is_complex and draw(st.booleans()):
        tensor = tensor.conj()
    differentiable = dtype.is_complex or dtype.is_floating_point
    if differentiable and draw(st.booleans()):
        tensor = torch._neg_view(tensor)
    requires_grad = differentiable and draw(st.booleans())
    if draw(st.booleans()):
        return torch.nn.Parameter(tensor, requires_grad=requires_grad)
    return tensor.requires_grad_(requires_grad)


def _memory(nbytes: int) -> st.SearchStrategy[npt.NDArray[np.uint8]]:
    def fill(seed: int) -> npt.NDArray[np.uint8]:
        memory = torch.empty(nbytes, dtype=torch.uint8).numpy()  # torch's memory is aligned, numpy's need not be
        memory[:] = np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)
        return memory

    return st.integers(0, 2**32 - 1).map(fill)


def tensors() -> st.SearchStrategy[torch.Tensor]:
    """Return torch tensors of every dtype and layout, each with memory of its own."""
    return _memory(512).flatmap(_tensor_over)


def arrays() -> st.SearchStrategy[npt.NDArray[Any]]:
    """Return numpy arrays of every kind of dtype and layout, each with memory of its own."""
    return _memory(512).flatmap(_array_over)


def shared_memory() -> st.SearchStrategy[list[torch.Tensor | npt.NDArray[Any]]]:
    """Return lists of tensors and arrays over one block of memory, overlapping in every way."""

    def views(memory: npt.NDArray[np.uint8]) -> st.SearchStrategy[list[torch.Tensor | npt.NDArray[Any]]]:
        return st.lists(st.one_of(_tensor_over(memory), _array_over(memory)), min_size=1, max_size=4)

    return _memory(512).flatmap(views)


def states(max_leaves: int = 12) -> st.SearchStrategy[Any]:
    """Return nestings of all kinds of containers, with plain values, tensors and arrays."""
    leaves = plain_values() | tensors() | arrays() | shared_memory()

    def nest(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        mapping = st.dictionaries(keys(), children, max_size=3)
        sequence = st.lists(children, max_size=3)
        return st.one_of(
            mapping,
            sequence,
            sequence.map(tuple),
            named_tuples(children),
            mapping.map(OrderedDict),
            st.builds(_with_metadata, mapping, children),
            mapping.map(lambda items: defaultdict(list, items)),
            mapping.map(Counter),
            st.builds(deque, sequence, st.none() | st.integers(3, 5)),
        )

    return st.recursive(leaves, nest, max_leaves=max_leaves)


def _with_metadata(items: dict[Any, Any], metadata: Any) -> OrderedDict[Any, Any]:
    ordered = OrderedDict(items)
    ordered._metadata = metadata  # type: ignore[attr-defined]
    return ordered
