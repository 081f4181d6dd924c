"""Tensor subclasses that consist of other tensors: stored by parts, restored in place, made again if known."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import return_and_correct_aliasing

import incckpt
from incckpt.errors import CorruptionError, FormatError, StateMismatchError
from incckpt.interchange import export
from incckpt.state.flatten import flatten
from incckpt.state.tree import FORMS, parse

aten = torch.ops.aten


class Scheme(enum.Enum):
    LINEAR = "linear"
    LOG = "log"


class Range(NamedTuple):
    low: int
    high: int


@dataclass(frozen=True)
class Options:
    scheme: Scheme
    block: tuple[int, ...]
    span: Range
    requires_grad: bool = False


class Coded(torch.Tensor):
    """Codes and scales by row; `codes` may be coded again."""

    codes: torch.Tensor
    scale: torch.Tensor
    options: Options

    @staticmethod
    def __new__(cls, codes: torch.Tensor, scale: torch.Tensor, options: Options) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32, device=codes.device)

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor, options: Options) -> None:
        self.codes, self.scale, self.options = codes, scale, options

    def __tensor_flatten__(self) -> Any:
        return ["codes", "scale"], {"options": self.options, "dtype": torch.float32, "eps": 1e-6}

    @classmethod
    def __tensor_unflatten__(cls, inner: Any, context: Any, size: Any, stride: Any) -> Any:
        return cls(inner["codes"], inner["scale"], context["options"])

    def dequantize(self) -> torch.Tensor:
        codes = self.codes.dequantize() if isinstance(self.codes, Coded) else self.codes
        return codes.float() * self.scale[:, None]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func in (aten.detach.default, aten.alias.default, aten.clone.default):
            one = args[0]
            made = cls(func(one.codes), func(one.scale), one.options)
            return return_and_correct_aliasing(func, args, kwargs or {}, made)  # type: ignore[no-untyped-call]
        raise NotImplementedError(func)


OPTIONS = Options(Scheme.LOG, (1, 8), Range(-128, 127))


def coded(seed: int, options: Options = OPTIONS, *, nested: bool = False, rows: int = 4) -> Coded:
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(-128, 128, (rows, 8), generator=random, dtype=torch.int8)
    scale = torch.rand(rows, generator=random) + 0.1
    return Coded(coded(seed + 1, options) if nested else codes, scale, options)


@pytest.fixture
def known() -> Iterator[None]:
    """Tell torch that the classes are safe."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals([Coded, Options, Scheme, Range])
    yield
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(before)


def save(store: Path, *states: Any, **options: Any) -> None:
    with incckpt.CheckpointManager(store, **options) as manager:
        for step, state in enumerate(states, 1):
            manager.save(step, state).result()


@pytest.mark.parametrize("nested", [False, True])
def test_a_tensor_comes_back_into_one_of_its_class_and_as_one_if_the_class_is_known(
    tmp_path: Path, known: None, nested: bool
) -> None:
    tensor = coded(0, nested=nested)
    save(tmp_path, {"w": tensor, "view": tensor.scale[1:]})
    target: dict[str, Any] = {"w": coded(5, nested=nested), "view": torch.zeros(3)}
    kept = target["w"], target["w"].scale.data_ptr()
    with incckpt.CheckpointManager(tmp_path) as manager:
        manager.restore(target)
    assert target["w"] is kept[0]
    assert target["w"].scale.data_ptr() == kept[1]
    assert torch.equal(target["w"].dequantize(), tensor.dequantize())
    loaded = incckpt.load(tmp_path, map_location="cpu")
    assert type(loaded["w"]) is Coded
    assert loaded["w"].options == OPTIONS
    assert torch.equal(loaded["w"].dequantize(), tensor.dequantize())
    loaded["w"].scale[1] = 7
    assert loaded["view"][0] == 7, "a view of an inner tensor is a view no more"


def test_a_class_that_nobody_registered_is_not_made(tmp_path: Path) -> None:
    save(tmp_path, {"w": coded(0), "epoch": 3})
    with pytest.raises(FormatError, match=r"Coded is needed and not known.*add_safe_globals\(\[Coded\]\)"):
        incckpt.load(tmp_path)
    assert incckpt.load(tmp_path, keys="epoch") == {"epoch": 3}


def test_each_checkpoint_has_the_context_of_its_time(tmp_path: Path, known: None) -> None:
    other = Options(Scheme.LINEAR, (2, 4), Range(0, 1))
    save(tmp_path, {"w": coded(0)}, {"w": coded(0, other)})
    assert [incckpt.load(tmp_path, step=step)["w"].options for step in (1, 2)] == [OPTIONS, other]
    target = coded(3)
    before = target.dequantize()
    with (
        incckpt.CheckpointManager(tmp_path) as manager,
        pytest.raises(StateMismatchError, match=r"options.scheme is .*LOG.* here and .*LINEAR"),
    ):
        manager.restore({"w": target})
    assert torch.equal(target.dequantize(), before)


def test_what_only_places_a_tensor_is_the_targets(tmp_path: Path) -> None:
    save(tmp_path, {"w": coded(0)})
    target = coded(1, Options(Scheme.LOG, (1, 8), Range(-128, 127), requires_grad=True))
    with incckpt.CheckpointManager(tmp_path) as manager:
        manager.restore({"w": target})
    assert torch.equal(target.dequantize(), coded(0).dequantize())


def test_a_class_or_shape_that_differs_is_refused(tmp_path: Path) -> None:
    save(tmp_path, {"w": coded(0)})
    for target in (torch.zeros(4, 8), coded(0, rows=3), coded(0, nested=True)):
        with incckpt.CheckpointManager(tmp_path) as manager, pytest.raises(StateMismatchError, match=r"state\['w'\]"):
            manager.restore({"w": target})


def test_a_module_is_restored_in_place_and_what_has_not_changed_is_not_stored_again(
    tmp_path: Path, known: None
) -> None:
    def model(seed: int) -> torch.nn.Module:
        module = torch.nn.Module()
        module.weight = torch.nn.Parameter(coded(seed), requires_grad=False)
        module.register_buffer("steps", torch.zeros(3) + seed)
        return module

    saved = model(0)
    with incckpt.CheckpointManager(tmp_path) as manager:
        manager.save(1, {"model": saved}).result()
        saved.get_buffer("steps").add_(1)
        manager.save(2, {"model": saved}).result()
    target = model(4)
    weight = target.weight
    with incckpt.CheckpointManager(tmp_path) as manager:
        manager.restore({"model": target}, keys="model.weight")
    assert target.weight is weight
    assert torch.equal(weight.dequantize(), saved.weight.dequantize())  # type: ignore[operator]
    assert target.get_buffer("steps")[0] == 4, "a restore of some keys wrote to others"
    loaded = incckpt.load(tmp_path)["model"]["weight"]
    assert type(loaded) is Coded


def test_thresholds_do_not_part_codes_from_their_scales(tmp_path: Path, known: None) -> None:
    tensor, plain = coded(0), torch.ones(1 << 19)
    with incckpt.CheckpointManager(tmp_path, threshold=0.5) as manager:
        manager.save(1, {"w": tensor, "plain": plain}).result()
        tensor.codes += 1
        tensor.scale *= 1.001
        plain *= 1.001
        manager.save(2, {"w": tensor, "plain": plain}).result()
    loaded = incckpt.load(tmp_path)
    assert torch.equal(loaded["w"].dequantize(), tensor.dequantize())
    assert torch.equal(loaded["plain"], torch.ones(1 << 19)), "the threshold had no effect: this test shows nothing"


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch is built without torch.distributed")
def test_a_dtensor_on_one_process_is_its_local_tensor(tmp_path: Path) -> None:
    api = pytest.importorskip("torch.distributed.tensor")
    distributed: Any = torch.distributed
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = api.init_device_mesh("cpu", (1,))

        def training(seed: int) -> dict[str, Any]:
            torch.manual_seed(seed)
            model = torch.nn.Linear(4, 4, bias=False)
            weight = api.distribute_tensor(model.weight.detach(), mesh, [api.Shard(0)])
            model.weight = torch.nn.Parameter(weight)
            return {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=0.1)}

        def step(app: dict[str, Any]) -> torch.Tensor:
            app["model"].weight.square().sum().backward()
            app["optimizer"].step()
            app["optimizer"].zero_grad()
            full: torch.Tensor = app["model"].weight.full_tensor()
            return full

        app = training(0)
        step(app)
        save(tmp_path, app)
        expected = step(app)
        fresh = training(1)
        with incckpt.CheckpointManager(tmp_path) as manager:
            manager.restore(fresh)
        assert torch.equal(step(fresh), expected)
        assert type(incckpt.load(tmp_path, map_location="cpu")["model"]["weight"]) is torch.Tensor
    finally:
        distributed.destroy_process_group()


def test_a_reader_that_does_not_know_the_node_refuses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    flat = flatten({"w": coded(0)})
    parse(flat.structure, len(flat.tensors))
    for members in [members for members in FORMS if "subclass" in members]:
        monkeypatch.delitem(FORMS, members)
    with pytest.raises(FormatError, match=r"unknown kind of node.*update incckpt"):
        parse(flat.structure, len(flat.tensors))


BROKEN: list[tuple[str, Any]] = [
    ("inner", [["codes", {"tensor": 9}]]),
    ("inner", [["codes", {"list": []}]]),
    ("inner", [["codes"]]),
    ("shape", [-1, 8]),
    ("stride", [1]),
    ("subclass", 3),
    ("context", {"tensor": 0}),
    ("context", {"enum": "a", "member": 1}),
    ("context", {"instance": "a", "fields": [1]}),
    ("context", {"dict": [[{"list": []}, 1]]}),
    ("context", {"list": 1}),
    ("flags", ["new"]),
]


@pytest.mark.parametrize(("member", "value"), BROKEN)
def test_malformed_nodes_are_refused(member: str, value: Any) -> None:
    flat = flatten({"w": coded(0)})
    flat.structure["dict"][0][1][member] = value
    with pytest.raises((CorruptionError, FormatError), match=r"state\['w'\]"):
        parse(flat.structure, len(flat.tensors))


def test_diff_shows_a_changed_context_and_verify_and_export_read_it_all(tmp_path: Path, known: None) -> None:
    other, store = Options(Scheme.LINEAR, (2, 4), Range(0, 1)), tmp_path / "store"
    save(store, {"w": coded(0)}, {"w": coded(0, other)})
    found = incckpt.diff(f"{store}#@1", f"{store}#@2")
    assert [value.name for value in found.values] == ["w"]
    assert not found.tensors
    assert incckpt.verify(store).ok
    export(store, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=False)["w"]
    assert loaded.options == other
    assert torch.equal(loaded.dequantize(), coded(0).dequantize())
