"""States taken apart and built again: bit for bit, or refused."""

from __future__ import annotations

import dataclasses
import enum
import gc
import logging
import pathlib
import random
import warnings
from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from incckpt.errors import CorruptionError, OptionError, PickleRefusedError, StateError, StateMismatchError
from incckpt.state.entries import TORCH_DTYPES
from incckpt.state.flatten import flatten
from incckpt.state.ranges import CARRIERS, raw_array, raw_view
from incckpt.state.rng import RngState
from incckpt.testing import strategies as states
from incckpt.testing.compare import aliases, assert_same_state, difference
from tests.effort import tries
from tests.states import Stored, live_bytes


def examples(count: int) -> settings:
    """Return settings for that many examples, the same at every run."""
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=tries(count), deadline=None, derandomize=True, suppress_health_check=checks)


@pytest.mark.slow
@examples(150)
@given(states.states())
def test_a_state_comes_back_bit_for_bit(state: Any) -> None:
    assert_same_state(state, Stored(state).load())


@pytest.mark.slow
@examples(400)
@given(states.shared_memory(), st.data())
def test_what_is_written_through_one_alias_is_seen_through_the_others(views: Any, data: st.DataObject) -> None:
    restored = Stored(views).load()
    assert_same_state(views, restored)
    written = data.draw(st.sampled_from(range(len(views))))
    for view in (views[written], restored[written]):
        raw = raw_view(view).numpy() if isinstance(view, torch.Tensor) else raw_array(view)
        raw[...] = np.frombuffer(bytes(range(1, 41))[: raw.itemsize], raw.dtype)[0]
    assert_same_state(views, restored)


@examples(150)
@given(states.shared_memory())
def test_the_layout_depends_on_nothing_but_the_state(views: Any) -> None:
    memory = Stored(views).load()  # the same state at other addresses
    first, second = flatten({"a": views}), flatten({"a": memory})
    assert first.layout == second.layout
    assert [live_bytes(item).tobytes() for item in first.ranges] == [
        live_bytes(item).tobytes() for item in second.ranges
    ]


# --- every type -------------------------------------------------------------------------------------------------------


def test_no_dtype_of_torch_is_forgotten() -> None:
    known = {getattr(torch, name) for name in TORCH_DTYPES if hasattr(torch, name)}
    quantised = {torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4}
    assert known | quantised == {value for value in vars(torch).values() if isinstance(value, torch.dtype)}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TORCH_DTYPES if hasattr(torch, name)])
@pytest.mark.parametrize("layout", ["dense", "gaps", "transposed", "scalar", "empty", "expanded"])
def test_every_dtype_in_every_layout(name: str, layout: str) -> None:
    dtype = getattr(torch, name)
    itemsize, component = TORCH_DTYPES[name]
    assert dtype.itemsize == itemsize
    bits = torch.arange(4 * 6 * itemsize, dtype=torch.uint8).mul(37).view(CARRIERS[itemsize]).view(4, 6)
    pick: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "dense": lambda x: x,
        "gaps": lambda x: x[:, ::2],
        "transposed": lambda x: x.t(),
        "scalar": lambda x: x[1, 2],
        "empty": lambda x: x[:0],
        "expanded": lambda x: x[:, :1].expand(4, 3),
    }
    tensor = pick[layout](bits).view(dtype)
    flat = flatten(tensor)
    restored = Stored(tensor).load()
    assert restored.dtype is dtype
    assert restored.stride() == tensor.stride()
    assert_same_state(tensor, restored)
    assert [item.itemsize for item in flat.ranges] == ([] if layout == "empty" else [component])


@pytest.mark.parametrize("dtype", states.NUMPY_DTYPES, ids=str)
def test_every_numpy_dtype(dtype: np.dtype[Any]) -> None:
    base = np.arange(24 * dtype.itemsize, dtype=np.uint8)
    if dtype.kind == "U":
        base = np.frombuffer(np.arange(24 * dtype.itemsize // 4).astype(dtype.str[0] + "u4"), np.uint8)
    array = base.copy().view(dtype).reshape(4, 6)
    for view in (array, array[::-1, ::2], array.T, array[1, 2:3].reshape(()), array[:, :0], array[0]):
        restored = Stored(view).load()
        assert_same_state(view, restored)
        assert restored.flags.writeable
    assert_same_state([array[0, 0]], Stored([array[0, 0]]).load())


def test_numbers_that_other_formats_lose() -> None:
    bf16_nans = torch.tensor([0x7FC0, 0x7F81, -1, 0x7FFF], dtype=torch.int16).view(torch.bfloat16)
    state = {
        "int64": torch.tensor([2**53 + 1, -(2**63), 16777217]),
        "int": 2**53 + 1,
        "huge": 3**20_000,
        "bf16": bf16_nans,
        "zero": -0.0,
        "complex": complex(-0.0, float("nan")),
        1: "an int key",
        "1": "a str key",
        (True,): "in a tuple, as True itself is the same key as 1",
    }
    restored = Stored(state).load()
    assert_same_state(
        {key: value for key, value in state.items() if key != "huge"},
        {key: value for key, value in restored.items() if key != "huge"},
    )
    assert restored["huge"] == 3**20_000
    assert [type(key) for key in restored] == [type(key) for key in state]


def test_a_namedtuple_is_made_from_its_fields_and_nothing_is_imported() -> None:
    system = namedtuple("system", ["os", "x"])
    restored = Stored(system("echo", torch.ones(2))).load()
    assert restored.os == "echo"
    assert type(restored) is not system
    assert type(restored)._fields == system._fields
    assert type(restored) is type(Stored(system(1, 2)).load())


@pytest.mark.parametrize(
    "system",
    [
        namedtuple("_S", "a b"),
        namedtuple("Renamed", ["class", "b"], rename=True),
        namedtuple("match", ["type", "ﬁx"]),
        namedtuple("Größe", ["count", "index"]),
    ],
)
def test_every_name_that_a_namedtuple_may_have_comes_back(system: Any) -> None:
    state = {"s": [system(1, torch.ones(2))]}
    assert_same_state(state, Stored(state).load())


def tuple_with(name: str, fields: Any, *values: Any) -> Any:
    return type(name, (tuple,), {"_fields": fields})(values)


@pytest.mark.parametrize(
    "value",
    [
        tuple_with("A", ("a", "ａ"), 1, 2),
        tuple_with("A", ("a", "a"), 1, 2),
        tuple_with("A", ("class",), 1),
        tuple_with("A", ("_x",), 1),
        tuple_with("A", ("__debug__",), 1),
        tuple_with("A", ("a\ud800",), 1),
        tuple_with("class", ("a",), 1),
        tuple_with("A.b", ("a",), 1),
        tuple_with("A", ("a",), 1, 2),
        tuple_with("A", ["a"], 1),
        tuple_with("A", "a", 1),
        tuple_with("A", (1,), 1),
    ],
    ids=lambda value: f"{type(value).__name__} {value._fields!a}",
)
def test_what_no_namedtuple_can_be_made_of_is_refused_at_save(value: Any) -> None:
    with pytest.raises(StateError, match=r"cannot save state\['s'\]\[0\]: .*save tuple\(value\)"):
        flatten({"s": [value]})


def test_integers_too_long_for_python_to_write_are_kept_as_keys_too() -> None:
    huge = 10**5000
    state = {huge: 1, (huge, "a"): [huge, {huge}]}
    assert Stored(state).load() == state
    with pytest.raises(StateError, match=r"cannot save state\[<int>\]: .* cannot be saved"):
        flatten({huge: object()}, allow_pickle=False)


def test_depth_and_dimensions_beyond_what_is_read_are_refused_at_save() -> None:
    dtype: Any = np.dtype("<f4")
    for _ in range(9):
        dtype = np.dtype([("a", dtype)])
    for value in (dtype, np.zeros(1, dtype), np.zeros(1, dtype)[0], torch.zeros([1] * 65)):
        with pytest.raises(StateError, match=r"cannot save state\['x'\]: .*(deep|dimensions)"):
            flatten({"x": value})
    deepest = [np.zeros(1, dtype["a"]), torch.zeros([1] * 64)]
    assert_same_state(deepest, Stored(deepest).load())


def test_subclasses_of_parameter_types_and_flags() -> None:
    leaf = torch.nn.Parameter(torch.randn(3), requires_grad=False)
    state = {
        "parameter": leaf,
        "grad": torch.randn(2, requires_grad=True),
        "computed": torch.randn(2, requires_grad=True) * 2,
    }
    restored = Stored(state).load()
    assert_same_state(state, restored)
    assert type(restored["parameter"]) is torch.nn.Parameter
    assert restored["computed"].is_leaf
    restored["grad"].sum().backward()
    assert restored["grad"].grad is not None


def test_the_metadata_of_a_state_dict_is_kept() -> None:
    state = torch.nn.Sequential(torch.nn.BatchNorm1d(3)).state_dict()
    restored = Stored(state).load()
    assert restored._metadata == state._metadata  # type: ignore[attr-defined]
    assert type(restored) is OrderedDict


def test_a_memory_map_comes_back_as_an_array(tmp_path: pathlib.Path) -> None:
    mapped = np.memmap(tmp_path / "data", np.float32, "w+", shape=(3, 4))
    mapped[:] = np.arange(12).reshape(3, 4)
    restored = Stored(mapped).load()
    assert type(restored) is np.ndarray
    np.testing.assert_array_equal(restored, mapped)


# --- memory -----------------------------------------------------------------------------------------------------------


def test_tied_weights_are_stored_once_and_stay_tied() -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(10, 4)
            self.head = torch.nn.Linear(4, 10, bias=False)
            self.head.weight = self.embedding.weight

    flat = flatten({"model": Tied()})
    assert [entry.name for entry in flat.tensors] == ["model.embedding.weight", "model.head.weight"]
    assert [item.nbytes for item in flat.ranges] == [160]
    restored = Stored({"model": Tied()}).load()["model"]
    restored["embedding.weight"].fill_(7)
    assert (restored["head.weight"] == 7).all()


def test_numpy_and_torch_share_memory_after_as_before() -> None:
    array = np.arange(12, dtype=np.float32)
    restored = Stored({"a": array, "t": torch.from_numpy(array)[3:]}).load()
    restored["t"].zero_()
    assert restored["a"].tolist() == [0, 1, 2] + [0] * 9


def test_neighbours_are_not_merged_and_overlaps_are() -> None:
    base = torch.arange(10, dtype=torch.float32)
    assert [item.nbytes for item in flatten([base[:5], base[5:]]).ranges] == [20, 20]
    assert [item.nbytes for item in flatten([base[:5], base[4:]]).ranges] == [40]
    assert [item.nbytes for item in flatten([base[0:2], base[6:8], base[1:7]]).ranges] == [32]
    assert flatten([base[8:], base[:3]]).ranges[0].nbytes == 8  # by first mention, not by address


def test_a_column_of_a_large_table_is_stored_alone() -> None:
    table = torch.arange(1000 * 64, dtype=torch.int32).view(1000, 64)
    column = table[:, 3]
    flat = flatten([column, column])
    assert [item.nbytes for item in flat.ranges] == [4000]
    assert all(entry.packed and entry.stride == (64,) for entry in flat.tensors)
    restored = Stored([column, column]).load()
    assert_same_state([column, column], restored)
    restored[0][5] = -1
    assert restored[1][5] == -1


def test_gaps_beside_an_overlap_are_kept() -> None:
    base = torch.arange(20, dtype=torch.int16)
    views = [base[0::2], base[1::2]]
    flat = flatten(views)
    assert [item.nbytes for item in flat.ranges] == [40]
    assert not any(entry.packed for entry in flat.tensors)
    assert_same_state(views, Stored(views).load())


def test_windows_that_overlap_themselves_are_kept() -> None:
    windows = torch.arange(9).unfold(0, 4, 1)
    strided = torch.arange(40)[::4].unfold(0, 3, 1)  # with gaps as well: packing would take the windows apart
    assert [item.nbytes for item in flatten([windows, strided]).ranges] == [72, 37 * 8]
    restored = Stored([windows, strided]).load()
    assert_same_state([windows, strided], restored)
    restored[0][0, 1] = -5
    assert restored[0][1, 0] == -5


def test_a_range_may_start_earlier_so_that_wider_elements_stay_aligned() -> None:
    memory = torch.arange(64, dtype=torch.uint8)
    views = [memory[1:9], memory[4:12].view(torch.float32), memory[8:24].view(torch.complex64)]
    restored = Stored(views).load()
    assert_same_state(views, restored)
    storages = {tensor.untyped_storage().data_ptr() for tensor in restored}
    assert len(storages) == 1


def test_alignment_that_no_storage_has_is_kept_in_memory() -> None:
    array = np.arange(32, dtype=np.uint8)
    views = [torch.from_numpy(array[1:9]), torch.from_numpy(array[3:11].view(np.float32)), array]
    restored = Stored(views).load()
    assert_same_state(views, restored)
    restored[2][:] = 0
    assert restored[0].sum() == 0
    assert (restored[1] == 0).all()


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ([torch.zeros(4, dtype=torch.complex64)], 4),
        ([torch.zeros(4, dtype=torch.complex128)], 8),
        ([np.zeros(3, "M8[s]")], 8),
        ([np.zeros(3, "U5")], 4),
        ([np.zeros(3, "S5")], 1),
        ([np.zeros(3, [("a", "f8")])], 1),
    ],
)
def test_the_element_size_is_that_of_the_components(tensors: list[Any], expected: int) -> None:
    assert [item.itemsize for item in flatten(tensors).ranges] == [expected]


def test_the_element_size_of_a_range_is_the_commonest_that_divides_it() -> None:
    base = torch.zeros(64, dtype=torch.uint8)
    assert flatten([base[:64].view(torch.float32), base[:8].view(torch.int16)]).ranges[0].itemsize == 4
    assert flatten([base[:64].view(torch.float32), base[0:2]]).ranges[0].itemsize == 4
    assert flatten([base[:12].view(torch.float32), base[8:14]]).ranges[0].itemsize == 2


@pytest.mark.slow
def test_temporaries_of_a_state_dict_are_not_taken_for_aliases() -> None:
    class Fleeting:
        def state_dict(self) -> Any:
            return {i: torch.full((1000,), i) for i in range(20)}

        def load_state_dict(self, state: Any) -> None: ...

    flat = flatten([Fleeting() for _ in range(5)])
    assert len(flat.ranges) == 100
    gc.collect()
    assert [int(live_bytes(item).view(np.int64)[0]) for item in flat.ranges] == list(range(20)) * 5


def test_ranges_follow_the_live_memory() -> None:
    tensor = torch.zeros(3)
    flat = flatten(tensor)
    tensor.fill_(2)
    assert live_bytes(flat.ranges[0]).view(np.float32).tolist() == [2, 2, 2]
    assert flat.ranges[0].names == [""]


# --- objects ----------------------------------------------------------------------------------------------------------


def schedulers(optimizer: torch.optim.Optimizer) -> list[torch.optim.lr_scheduler.LRScheduler]:
    lr = torch.optim.lr_scheduler
    return [
        lr.LambdaLR(optimizer, lambda epoch: 0.9**epoch),
        lr.StepLR(optimizer, 3),
        lr.MultiStepLR(optimizer, [2, 2, 4]),
        lr.CosineAnnealingWarmRestarts(optimizer, 5),
        lr.CyclicLR(optimizer, 0.001, 0.1, cycle_momentum=False),
        lr.OneCycleLR(optimizer, 0.1, total_steps=20),
        lr.ReduceLROnPlateau(optimizer),
        lr.SequentialLR(optimizer, [lr.ConstantLR(optimizer), lr.ExponentialLR(optimizer, 0.9)], [2]),
        lr.ChainedScheduler([lr.PolynomialLR(optimizer), lr.LinearLR(optimizer)]),
    ]


def test_a_training_state_is_what_its_parts_say() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, amsgrad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that schedulers are made, not stepped
        steps = schedulers(optimizer)
        scaler = torch.amp.GradScaler("cpu")
    model(torch.randn(5, 4)).sum().backward()
    optimizer.step()
    app = {"model": model, "optimizer": optimizer, "schedulers": steps, "scaler": scaler, "epoch": 3}
    expected = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedulers": [scheduler.state_dict() for scheduler in steps],
        "scaler": scaler.state_dict(),
        "epoch": 3,
    }
    stored = Stored(app)
    assert_same_state(expected, stored.load())
    names = [entry.name for entry in stored.entries()]
    assert "model.0.weight" in names
    assert "optimizer.state.0.exp_avg" in names


def test_generators_go_on_where_they_were() -> None:
    generator = torch.Generator()
    generator.manual_seed(7)
    torch.randn(5, generator=generator)
    restored = Stored({"g": generator}).load()["g"]
    assert torch.equal(torch.randn(9, generator=restored), torch.randn(9, generator=generator))


def test_the_rng_state_covers_python_numpy_and_torch() -> None:
    def draw() -> list[Any]:
        return [random.random(), random.gauss(0, 1), *np.random.normal(size=3), *torch.randn(3).tolist()]

    random.seed(1)
    random.gauss(0, 1)  # leaves a second number behind, and so does numpy's
    np.random.seed(2)
    np.random.normal()
    torch.manual_seed(3)
    stored = Stored({"rng": RngState()})
    expected = draw()
    draw()
    RngState().load_state_dict(stored.load()["rng"])
    assert draw() == expected
    assert sum(len(value) for value in map(str, stored.document["structure"]["dict"])) < 2000  # arrays are no JSON


@pytest.mark.parametrize(
    ("saved", "there", "said"), [(3, 2, "first 2 were set"), (2, 3, "first 2"), (2, 0, "none was set")]
)
def test_another_number_of_devices_is_made_the_best_of_and_logged(
    saved: int, there: int, said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    states_there: dict[int, int] = {}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "get_rng_state_all", lambda: [torch.tensor([i], dtype=torch.uint8) for i in range(saved)]
    )
    stored = Stored({"rng": RngState()}).load()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, index: states_there.update({index: state.item()}))
    with caplog.at_level(logging.WARNING, "incckpt"):
        RngState().load_state_dict(stored["rng"])
    assert states_there == {index: index for index in range(min(saved, there))}
    assert f"of {saved} CUDA devices were saved, there are {there} here" in caplog.text
    assert said in caplog.text


@pytest.mark.parametrize(
    "change", [{"python": None}, {"torch": torch.zeros(3, dtype=torch.uint8)}, {"numpy": {}}, {"cuda": 3}]
)
def test_a_random_state_of_another_kind_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(StateMismatchError, match="random number generators"):
        RngState().load_state_dict({**RngState().state_dict(), **change})


def test_a_generator_state_that_is_none_is_corrupt() -> None:
    for state in (torch.zeros(5, dtype=torch.uint8), torch.zeros(5), np.zeros(5, np.uint8)):
        stored = Stored([state])
        stored.document["structure"] = {"torch.Generator": 0, "device": "cpu"}
        with pytest.raises(CorruptionError, match="the state of generator '0'"):
            stored.load()


# --- refusals ---------------------------------------------------------------------------------------------------------


class Colour(enum.IntEnum):
    RED = 1


@dataclasses.dataclass
class Config:
    lr: float = 0.1


class Half:
    def state_dict(self) -> dict[str, Any]:
        return {}


class Opaque(torch.Tensor):
    """A tensor that keeps its data in others, and does not say in which."""

    codes: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def __new__(cls, codes: torch.Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape)

    def __init__(self, codes: torch.Tensor) -> None:
        self.codes, self.scale = codes, torch.ones(())

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise NotImplementedError(func)


class Quantized(Opaque):
    """One that says so, as torchao's do."""

    def __tensor_flatten__(self) -> Any:
        return ["codes", "scale"], {"scheme": len}  # of no kind that a document has

    @classmethod
    def __tensor_unflatten__(cls, inner: Any, *_: Any) -> Any:
        return cls(inner["codes"])

    def dequantize(self) -> torch.Tensor:
        return self.codes * self.scale


class Sub(torch.Tensor):
    pass


class Wrapper:
    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def state_dict(self) -> Any:
        return {"inner": self.inner}

    def load_state_dict(self, state: Any) -> None: ...


def itself(kind: str) -> Any:
    inner: list[Any] = [1]
    inner.append({"list": inner, "tuple": (inner,), "object": Wrapper(inner)}[kind])
    return inner


def nested(depth: int) -> Any:
    state: Any = 1
    for _ in range(depth):
        state = {"a": state}
    return state


def freed() -> torch.Tensor:
    tensor = torch.zeros(4)
    tensor.untyped_storage().resize_(0)
    return tensor


def freed_but_for_the_beginning() -> torch.Tensor:
    tensor = torch.zeros(1000)[500:]
    tensor.untyped_storage().resize_(16)
    return tensor


def fake() -> torch.Tensor:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.zeros(3)


def quantised() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8)


def csr() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.eye(3).to_sparse_csr()


def nested_tensor(layout: torch.layout) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=layout)


REFUSED: list[tuple[str, Callable[[], Any], str, str]] = [
    ("meta", lambda: torch.zeros(3, device="meta"), "", "materialise"),
    ("coo", lambda: torch.eye(3).to_sparse(), "", "to_dense"),
    ("csr", csr, "", "layout sparse_csr"),
    ("quantised", quantised, "", "int_repr"),
    ("nested", lambda: nested_tensor(torch.strided), "", "unbind"),
    ("jagged", lambda: nested_tensor(torch.jagged), "", "unbind"),
    ("fake", fake, "", "FakeTensorMode"),
    ("subclass", lambda: torch.zeros(3).as_subclass(Sub), "", r"Sub cannot be saved.*as_subclass\(torch.Tensor\)"),
    (
        "wrapper",
        lambda: Quantized(torch.ones(3)),
        "",
        r"save tensor.dequantize\(\), or .*: tensor.codes, tensor.scale.*function",
    ),
    ("opaque", lambda: Opaque(torch.ones(3)), "", "Opaque cannot be saved; save the tensors that it consists of"),
    ("lazy", lambda: torch.nn.LazyLinear(3), ".state_dict()['weight']", "run the module once"),
    ("freed", freed, "", "freed"),
    ("freed-half", freed_but_for_the_beginning, "", "freed"),
    ("zero", lambda: torch._efficientzerotensor(3), "", "freed|no memory"),
    ("cycle", lambda: itself("list"), "[1]", "contains itself"),
    ("cycle-tuple", lambda: itself("tuple"), "[1][0]", "contains itself"),
    ("cycle-object", lambda: itself("object"), "[1].state_dict()['inner']", "contains itself"),
    ("deep", lambda: nested(1000), "", "levels deep"),
    ("object-array", lambda: np.array([1, "a"], object), "", "references to Python objects"),
    ("object-field", lambda: np.zeros(2, [("a", "i4"), ("b", object)]), "", "references"),
    ("matrix", lambda: np.zeros((2, 2)).view(np.matrix), "", r"numpy\.asarray"),
    ("record", lambda: np.zeros(2, np.dtype((np.record, [("a", "i4")]))), "", "structured dtype"),
    ("masked", lambda: np.ma.zeros(3), "", r"numpy\.asarray"),
    ("enum", lambda: Colour.RED, "", "name or value"),
    ("enum-key", lambda: {Colour.RED: 1}, "", "key <Colour"),
    ("dataclass", lambda: Config(), "", "asdict"),
    ("path", lambda: pathlib.Path("x"), "", r"str\(value\)"),
    ("function", lambda: len, "", "cannot be saved"),
    ("class", lambda: torch.nn.Linear, "", "cannot be saved"),
    ("no-load", lambda: Half(), "", "load_state_dict"),
    ("factory", lambda: defaultdict(lambda: 0), "", "factory"),
    ("tensor-key", lambda: {torch.zeros(1): 1}, "", "key tensor"),
    ("object-in-set", lambda: {Half}, "", "set element"),
    ("dict-subclass", lambda: type("D", (dict,), {})(), "", r"dict\(value\)"),
    ("str-subclass", lambda: type("S", (str,), {})("a"), "", r"str\(value\)"),
    ("list-subclass", lambda: type("L", (list,), {})(), "", r"list\(value\)"),
    ("float-subclass", lambda: type("F", (np.float64,), {})(1), "", r"float\(value\)"),
    ("named-fields", lambda: torch.zeros(3).max(0), "", "cannot be saved"),
]


@pytest.mark.parametrize(("make", "path", "advice"), [pytest.param(*case[1:], id=case[0]) for case in REFUSED])
def test_what_cannot_be_saved_is_refused_by_its_path(make: Callable[[], Any], path: str, advice: str) -> None:
    state = {"epoch": 1, "parts": [torch.zeros(2), (0, Wrapper({"x": make()}))]}
    with pytest.raises(StateError, match=advice) as caught:
        flatten(state)
    assert f"state['parts'][1][1].state_dict()['inner']['x']{path}" in str(caught.value)


def test_inside_a_transform_there_is_no_memory() -> None:
    def save(x: torch.Tensor) -> torch.Tensor:
        with pytest.raises(StateError, match=r"state\['x'\].*torch.func transform"):
            flatten({"x": x})
        return x

    torch.vmap(save)(torch.zeros(2, 3))


def test_sharded_tensors_are_sent_to_distributed_checkpoint() -> None:
    sharded: torch.Tensor = torch.zeros(3).as_subclass(type("DTensor", (torch.Tensor,), {}))
    with pytest.raises(StateError, match=r"state\['w'\].*incckpt\.integrations\.dcp"):
        flatten({"w": sharded}, allow_pickle=True)


def test_errors_of_a_state_dict_are_its_own() -> None:
    class Broken(Wrapper):
        def state_dict(self) -> Any:
            raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        flatten([Broken(0)])


def test_the_deepest_state_that_can_be_saved_can_be_loaded() -> None:
    deepest: Any = {("a", frozenset({1})): {2, 3}}
    while True:
        deeper = [deepest]
        try:
            flatten(deeper)
        except StateError:
            break
        deepest = deeper
    assert_same_state(deepest, Stored(deepest).load())


def test_pickles_need_to_be_allowed_twice() -> None:
    state = {"a": torch.zeros(2), "config": Config(0.5)}
    with pytest.raises(PickleRefusedError, match=r"state\['config'\].*asdict.*allow_pickle=True"):
        flatten(state)
    stored = Stored(state, allow_pickle=True)
    with pytest.raises(PickleRefusedError, match=r"pickled tests\.state\.test_flatten\.Config.*allow_pickle=True"):
        stored.load()
    assert stored.load(allow_pickle=True)["config"] == Config(0.5)
    assert_same_state({"a": torch.zeros(2)}, stored.load(keys="a"))
    with pytest.raises(StateError, match=r"state\[0\].*cannot be pickled"):
        flatten([lambda: 0], allow_pickle=True)


# --- devices ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device must not be there")
def test_a_device_that_is_not_there_is_named() -> None:
    stored = Stored({"w": torch.ones(3), "g": torch.Generator()})
    stored.document["tensors"][0]["device"] = "cuda:0"
    stored.document["structure"]["dict"][1][1]["device"] = "cuda:0"
    with pytest.raises(OptionError, match=r"cuda:0.*map_location='cpu'"):
        stored.load()
    restored = stored.load(map_location="cpu")
    assert restored["w"].tolist() == [1, 1, 1]
    assert restored["g"].device.type == "cpu"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tensors_on_a_device_keep_their_aliases() -> None:
    base = torch.arange(100, device="cuda", dtype=torch.float32)
    state = {
        "whole": base[10:50],
        "part": base[20:30],
        "column": base.view(10, 10)[:, 3].clone().view(10, 1).expand(10, 4),
        "gaps": torch.arange(64, device="cuda").view(8, 8)[:, ::2],
        "host": torch.arange(5),
        "generator": torch.Generator("cuda"),
    }
    stored = Stored(state)
    assert difference(state, stored.load()) == ""
    assert aliases(state)[:2] == aliases(stored.load())[:2]
    assert stored.load(map_location="cpu")["part"].tolist() == base[20:30].tolist()
    on_host = Stored({"w": torch.arange(6.0)})
    assert on_host.load(map_location="cuda")["w"].is_cuda


def test_kinds_are_the_ends_of_names_and_dtypes() -> None:
    parameter = torch.nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.Adam([parameter])
    parameter.grad = torch.ones(4)
    optimizer.step()
    shared = torch.zeros(8)
    flat = flatten({"a.weight": parameter, "b": {"weight": torch.zeros(3).half()}, "all": shared, "part": shared[2:]})
    assert flat.kinds == ["weight float32", "weight float16", "all float32"]
    assert flatten(optimizer.state_dict()).kinds == ["step float32", "exp_avg float32", "exp_avg_sq float32"]
    assert flatten(torch.zeros(1)).kinds == [" float32"]
