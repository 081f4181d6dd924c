"""Restores in place: into the memory of live objects, exactly, or not at all."""

from __future__ import annotations

import copy
import logging
import random
import warnings
from collections import OrderedDict, deque, namedtuple
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from incckpt.errors import PickleRefusedError, StateMismatchError
from incckpt.state.ranges import raw_array, raw_view
from incckpt.state.rng import RngState
from incckpt.testing import strategies as states
from incckpt.testing.compare import assert_same_state, difference
from tests.effort import tries
from tests.states import Stored

Point = namedtuple("Point", ["x", "y"])


class Float32Moments(torch.optim.Optimizer):
    """SGD with momentum that is kept in float32 whatever the parameters are, as mixed-precision trainers do."""

    def __init__(self, params: Iterable[torch.Tensor], lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p, dtype=torch.float32)
                    state["history"] = {"norms": [torch.zeros((), dtype=torch.float64)]}
                state["momentum"].mul_(0.9).add_(p.grad.float() * 1.000123)
                state["history"]["norms"][0] += 1 / 3
                p.sub_((group["lr"] * state["momentum"]).to(p.dtype))


class Job:
    """A training job: everything that a checkpoint has to bring back."""

    def __init__(self, seed: int, make: Callable[..., torch.optim.Optimizer], dtype: torch.dtype) -> None:
        torch.manual_seed(seed)
        random.seed(seed)
        self.dtype = dtype
        self.model = torch.nn.Sequential(
            torch.nn.Linear(6, 16), torch.nn.BatchNorm1d(16), torch.nn.Dropout(0.3), torch.nn.Linear(16, 1)
        ).to(dtype)
        self.optimizer = make(self.model.parameters(), lr=0.01)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.scheduler = torch.optim.lr_scheduler.OneCycleLR(
                self.optimizer, 0.1, total_steps=50, cycle_momentum=False
            )
        self.state = {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "rng": RngState(),
            "progress": {"step": 0, "losses": []},
        }

    def train(self, steps: int) -> list[float]:
        progress: Any = self.state["progress"]
        for _ in range(steps):
            x = torch.randn(8, 6).to(self.dtype) * random.random()
            loss = self.model(x).float().pow(2).mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            progress["step"] += 1
            progress["losses"].append(loss.item())
        return list(progress["losses"])


OPTIMIZERS = [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad, Float32Moments]


@pytest.mark.slow
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", OPTIMIZERS)
def test_training_goes_on_as_if_it_had_not_stopped(make: Any, dtype: torch.dtype, in_place: bool) -> None:
    job = Job(0, make, dtype)
    job.train(3)
    stored = Stored(job.state)
    expected = job.train(3)
    for trained in (0, 2):  # into new objects, and into some that have a state of their own
        other = Job(1, make, dtype)
        other.train(trained)
        parameters = [(p, p.data_ptr()) for p in other.model.parameters()]
        restored, _ = stored.restore(other.state, in_place=in_place)
        assert restored is other.state
        assert [(p, p.data_ptr()) for p in other.model.parameters()] == parameters
        assert other.train(3) == expected
        assert difference(Stored(job.state).load(), Stored(other.state).load()) == ""


@pytest.mark.slow
def test_moments_keep_the_dtype_that_load_state_dict_would_cast() -> None:
    job = Job(0, Float32Moments, torch.bfloat16)
    job.train(2)
    stored = Stored(job.state)
    naive = Job(1, Float32Moments, torch.bfloat16)
    naive.optimizer.load_state_dict(copy.deepcopy(job.optimizer.state_dict()))
    assert naive.optimizer.state_dict()["state"][0]["momentum"].dtype is torch.bfloat16
    other = Job(1, Float32Moments, torch.bfloat16)
    stored.restore(other.state)
    assert difference(job.optimizer.state_dict(), other.optimizer.state_dict()) == ""
    assert other.optimizer.state_dict()["state"][0]["history"]["norms"][0].dtype is torch.float64


# --- memory -----------------------------------------------------------------------------------------------------------


def test_a_model_and_optimizer_that_run_are_restored_without_new_memory() -> None:
    job = Job(0, torch.optim.AdamW, torch.float32)
    job.train(2)
    stored = Stored(job.state)
    job.train(1)
    moments = [state["exp_avg"].data_ptr() for state in job.optimizer.state.values()]
    _, assignment = stored.restore(job.state)
    entries = stored.entries()
    elsewhere = {entry.name.split(".")[0] for entry in entries if assignment.destination(entry.range) is None}
    assert elsewhere == {"rng"}
    assert [state["exp_avg"].data_ptr() for state in job.optimizer.state.values()] == moments


@pytest.mark.slow
@settings(max_examples=tries(150), deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(states.states(), st.booleans())
def test_any_state_is_restored_into_one_like_it(state: Any, in_place: bool) -> None:
    stored = Stored([state])
    target = stored.load()
    held = list(tensors_in(target))
    for leaf in held:
        raw = raw_view(leaf).numpy() if isinstance(leaf, torch.Tensor) else raw_array(leaf) if leaf.nbytes else leaf
        raw[...] = np.frombuffer(b"\x5a" * raw.itemsize, raw.dtype)[0] if raw.itemsize else raw
    restored, _ = stored.restore(target, in_place=in_place)
    assert_same_state([state], restored)
    assert all(before is after for before, after in zip(held, tensors_in(restored), strict=True))


def test_a_key_too_long_for_python_to_write() -> None:
    stored = Stored([{10**5000: torch.ones(2)}])
    target = [{10**5000: torch.zeros(2)}]
    stored.restore(target)
    assert torch.equal(target[0][10**5000], torch.ones(2))
    with pytest.raises(StateMismatchError, match=r"state\[0\]\[<int>\]"):
        stored.restore([{10**5000: torch.zeros(3)}])


def tensors_in(value: Any) -> Iterator[Any]:
    if isinstance(value, (torch.Tensor, np.ndarray)):
        yield value
    elif isinstance(value, (dict, list, tuple, deque)) and not isinstance(value, torch.Size):
        for child in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(child)


def test_other_layouts_are_copied_into() -> None:
    values = torch.arange(24.0).view(4, 6)
    stored = Stored({"a": values, "b": values[:, ::2], "c": values.numpy().astype(">f4"), "d": values.numpy()[::-1]})
    target: dict[str, Any] = {
        "a": torch.zeros(6, 4).t(),
        "b": torch.zeros(4, 9)[:, ::3],
        "c": np.zeros((4, 12), ">f4")[:, ::-2],
        "d": np.zeros((4, 6), np.float32),
    }
    _, assignment = stored.restore(target)
    assert all(assignment.destination(index) is None for index in range(len(stored.sizes)))
    assert torch.equal(target["a"], values)
    assert torch.equal(target["b"], values[:, ::2])
    np.testing.assert_array_equal(target["c"], values.numpy())
    np.testing.assert_array_equal(target["d"], values.numpy()[::-1])


def test_memory_between_the_elements_is_not_the_checkpoints() -> None:
    saved = torch.arange(10)
    stored = Stored([saved[0::2], saved[1:3]])  # one range, with bytes in it that belong to no tensor
    base = torch.arange(100, 120)
    stored.restore([base[0:10:2], base[10:12]])
    assert base[0:10:2].tolist() == [0, 2, 4, 6, 8]
    assert base[10:12].tolist() == [1, 2]
    assert base[1:10:2].tolist() == [101, 103, 105, 107, 109]
    assert base[12:].tolist() == list(range(112, 120))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device must not be there")
def test_what_was_saved_on_a_device_is_restored_where_the_target_is(caplog: pytest.LogCaptureFixture) -> None:
    job = Job(0, torch.optim.AdamW, torch.float32)
    job.train(2)
    stored = Stored({**job.state, "w": torch.ones(3), "new": torch.ones(2)})
    for node in stored.document["tensors"]:
        if "kind" not in node:
            node["device"] = "cuda:3"
    other = Job(1, torch.optim.AdamW, torch.float32)
    target: dict[str, Any] = {**other.state, "w": torch.zeros(3), "new": None}
    with caplog.at_level(logging.WARNING, "incckpt"):
        stored.restore(target)
    assert "tensors saved on cuda:3 go to the CPU" in caplog.text
    assert difference(job.optimizer.state_dict(), other.optimizer.state_dict()) == ""
    assert target["w"].tolist() == [1, 1, 1]
    assert target["new"].tolist() == [1, 1]


def test_ties_of_the_target_and_of_the_checkpoint_need_not_be_the_same() -> None:
    tied = torch.ones(8)
    apart = {"a": torch.full((8,), 2.0), "b": torch.full((8,), 3.0)}
    _, assignment = Stored({"a": tied, "b": tied}).restore(apart)
    assert apart["a"].tolist() == apart["b"].tolist() == [1] * 8
    target = {"a": tied, "b": tied}
    _, assignment = Stored({"a": torch.full((8,), 2.0), "b": torch.full((8,), 3.0)}).restore(target)
    assert [assignment.destination(index) for index in (0, 1)] == [None, None]  # two ranges, one memory: never at once
    assert tied[0].item() in (2, 3)
    assert len(set(tied.tolist())) == 1


def test_conjugate_and_negative_bits_may_differ() -> None:
    values = torch.randn(5, dtype=torch.complex64)
    target = [torch.zeros(5, dtype=torch.complex64), torch.zeros(5, dtype=torch.complex64).conj()]
    Stored([values.conj(), values]).restore(target)
    assert torch.equal(target[0], values.conj().resolve_conj())
    assert torch.equal(target[1].resolve_conj(), values)


def test_autograd_sees_the_change() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    stored = Stored({"w": weight})
    loss = (weight**2).sum()
    stored.restore({"w": weight})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # type: ignore[no-untyped-call]


def test_inference_tensors_are_restored() -> None:
    stored = Stored([torch.ones(3)])
    with torch.inference_mode():
        target = [torch.zeros(3)]
    stored.restore(target)
    assert target[0].tolist() == [1, 1, 1]


def test_a_memory_map_is_restored_on_disk(tmp_path: Path) -> None:
    target = np.memmap(tmp_path / "data", np.int32, "w+", shape=(4,))
    Stored([np.arange(4, dtype=np.int32)]).restore([target])
    target.flush()
    assert np.fromfile(tmp_path / "data", np.int32).tolist() == [0, 1, 2, 3]


# --- values and containers --------------------------------------------------------------------------------------------


def test_plain_data_takes_the_stored_value_whatever_it_was() -> None:
    stored = Stored({
        "w": torch.ones(2), "n": 5, "none": 1.5, "log": {"a": [1, 2, 3], "new": torch.ones(1)}, "list": [1, {"x": 2}],
        "set": {1, 2}, "deque": deque([1], 4), "text": "was", "ordered": OrderedDict(b=1, a=2), "grown": [],
    })  # fmt: skip
    target: dict[str, Any] = {
        "w": torch.zeros(2), "n": "text", "none": None, "log": {"a": [], "old": 1}, "list": [9],
        "set": {9}, "deque": deque([7, 8], 4), "text": ["is"], "ordered": OrderedDict(a=1), "grown": [1, 2, 3],
    }  # fmt: skip
    held = dict(target)
    restored, _ = stored.restore(target)
    assert_same_state(stored.load(), restored)
    assert all(target[key] is held[key] for key in ("w", "log", "list", "set", "deque", "ordered", "grown"))


def test_tuples_keep_the_type_of_the_target() -> None:
    stored = Stored({"p": Point(torch.ones(2), 3), "t": (torch.ones(1), 4)})
    weight = torch.zeros(2)
    target: dict[str, Any] = {"p": Point(weight, 0), "t": (torch.zeros(1), 0)}
    stored.restore(target)
    assert type(target["p"]) is Point
    assert target["p"].x is weight
    assert target["p"].y == 3
    assert target["t"] == (torch.ones(1), 4)
    model = torch.nn.Linear(2, 2)
    restored, _ = Stored([(torch.nn.Linear(2, 2), 7)]).restore([(model, 0)])
    assert restored == [(model, 7)]


def test_what_the_target_lacks_is_left_out_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    stored = Stored({"w": torch.ones(2), "old": torch.ones(3), "inner": {"x": torch.ones(1), "y": 2}})
    target = {"w": torch.zeros(2), "inner": {"x": torch.zeros(1)}}
    with caplog.at_level(logging.WARNING, "incckpt"):
        _, assignment = stored.restore(target)
    assert "state['old']" in caplog.text
    assert "state['inner']['y']" in caplog.text
    assert list(target) == ["w", "inner"]
    assert [stored.entries()[0].range, stored.entries()[2].range] == assignment.ranges


def test_generators_are_set_in_place() -> None:
    generator = torch.Generator()
    generator.manual_seed(5)
    stored = Stored({"g": generator})
    expected = torch.randn(4, generator=generator)
    other = torch.Generator()
    stored.restore({"g": other})
    assert torch.equal(torch.randn(4, generator=other), expected)


# --- what does not fit ------------------------------------------------------------------------------------------------


def linear(out: int = 3, **options: Any) -> torch.nn.Module:
    return torch.nn.Linear(2, out, **options)


def adam(*sizes: int) -> torch.optim.Optimizer:
    return torch.optim.Adam([{"params": [torch.zeros(2, requires_grad=True) for _ in range(size)]} for size in sizes])


MISFITS: list[tuple[Callable[[], Any], Callable[[], Any], str]] = [
    (lambda: torch.ones(3), lambda: torch.ones(4), r"state\['x'\] is torch float32 \(4,\) here and torch float32 \(3,"),
    (lambda: torch.ones(3), lambda: torch.ones(3).double(), r"float64 \(3,\) here and torch float32 \(3,\)"),
    (lambda: torch.ones(3), lambda: np.ones(3, np.float32), r"numpy float32 \(3,\) here and torch"),
    (lambda: np.ones(3), lambda: np.ones(3, ">f8"), r"numpy >f8 \(3,\) here and numpy <f8"),
    (lambda: 3, lambda: torch.ones(3), r"is a tensor here and a value of type int in"),
    (lambda: {"a": 1}, lambda: torch.ones(3), r"is a tensor here and a dict of 1 in"),
    (lambda: torch.ones(3), lambda: {"a": torch.ones(3)}, r"is a dict here and a tensor in"),
    (lambda: {"b": torch.ones(3)}, lambda: {"a": torch.ones(3)}, r"state\['x'\]\['a'\] is not in the checkpoint"),
    (lambda: [torch.ones(3)] * 2, lambda: [torch.ones(3)], r"is a list of 1 here and a list of 2"),
    (lambda: torch.ones(3), torch.Generator, r"is a torch.Generator here and a tensor"),
    (torch.Generator, lambda: torch.ones(3), r"is a tensor here and a torch.Generator"),
    (lambda: torch.ones(3), lambda: torch.ones(3, device="meta"), r"on meta: cannot be restored in place"),
    (lambda: torch.eye(3), lambda: torch.eye(3).to_sparse(), r"layout torch.sparse_coo"),
    (lambda: torch.ones(2, 3), lambda: torch.ones(2, 1).expand(2, 3), r"elements share memory"),
    (lambda: np.ones(3), lambda: np.broadcast_to(np.ones(()), 3), r"read-only"),
    (lambda: torch.ones(3), linear, r"is a torch.nn.modules.linear.Linear here and a tensor"),
    (lambda: linear(), lambda: linear(4), r"state\['x'\]: weight is torch float32 \(4, 2\) here.*\n.*bias is torch"),
    (lambda: linear(), lambda: linear().half(), r"weight is torch float16 \(3, 2\) here and torch float32"),
    (lambda: linear(), lambda: linear(bias=False), r"state\['x'\]: in the checkpoint, but not in the module: bias"),
    (lambda: linear(bias=False), linear, r"state\['x'\]: not in the checkpoint: bias"),
    (lambda: {"weight": torch.ones(3, 2), "bias": 1}, linear, r"bias is a tensor here and a value of type int"),
    (lambda: adam(2), lambda: adam(3), r"has groups of \[3\] parameters here, and of \[2\] in the checkpoint"),
    (lambda: adam(1, 2), lambda: adam(3), r"has groups of \[3\] parameters here, and of \[1, 2\]"),
    (lambda: {"state": {}}, lambda: adam(1), r"is an optimizer here"),
    (lambda: 4, lambda: adam(1), r"is an optimizer here"),
    (lambda: {"param_groups": [3], "state": {}}, lambda: adam(1), r"is an optimizer here"),
]  # fmt: skip


@pytest.mark.parametrize(("saved", "target", "message"), MISFITS)
def test_what_does_not_fit_is_named_and_nothing_is_touched(
    saved: Callable[[], Any], target: Callable[[], Any], message: str
) -> None:
    here = {"first": torch.zeros(2), "module": torch.nn.Linear(2, 2), "n": 1, "x": target()}
    before = Stored({key: here[key] for key in ("first", "module", "n")}).load()
    stored = Stored({"first": torch.ones(2), "module": torch.nn.Linear(2, 2), "n": 2, "x": saved()})
    with pytest.raises(StateMismatchError, match=message):
        stored.restore(here)
    after = Stored({key: here[key] for key in ("first", "module", "n")}).load()
    assert_same_state(before, after)


def test_all_that_does_not_fit_is_named_at_once() -> None:
    stored = Stored({str(i): torch.ones(3) for i in range(30)})
    with pytest.raises(StateMismatchError, match=r"(?s)state\['0'\].*state\['19'\].*and 10 more"):
        stored.restore({str(i): torch.ones(4) for i in range(30)})


def test_pickles_are_refused_before_anything_is_touched() -> None:
    stored = Stored({"w": torch.ones(2), "p": Path("x")}, allow_pickle=True)
    target: dict[str, Any] = {"w": torch.zeros(2), "p": None}
    with pytest.raises(PickleRefusedError, match=r"state\['p'\] holds a pickled pathlib"):
        stored.restore(target)
    assert target["w"].tolist() == [0, 0]
    stored.restore(target, allow_pickle=True)
    assert target["p"] == Path("x")
    stored.restore({"w": torch.zeros(2)})  # what is not wanted need not be allowed


def test_finish_wants_every_range() -> None:
    from incckpt.state.assign import Assignment

    stored = Stored([torch.ones(2), torch.ones(3)])
    assignment = Assignment(stored.tree(), stored.entries(), stored.sizes, [torch.zeros(2), torch.zeros(3)])
    assignment.deliver(0, np.zeros(8, np.uint8))
    with pytest.raises(RuntimeError, match=r"\[1\]"):
        assignment.finish()


# --- objects ----------------------------------------------------------------------------------------------------------


class Average:
    """An object with a state of its own, which it converts as it loads."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.shadow = torch.zeros(3, dtype=dtype)

    def state_dict(self) -> dict[str, Any]:
        return {"shadow": self.shadow, "steps": 3}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        torch.randn(5)
        self.shadow = state["shadow"].to(self.shadow.dtype)


def test_an_object_that_converts_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    stored = Stored({"ema": Average(torch.float32)})
    with caplog.at_level(logging.WARNING, "incckpt"):
        stored.restore({"ema": Average(torch.float32)})
    assert caplog.text == ""
    with caplog.at_level(logging.WARNING, "incckpt"):
        stored.restore({"ema": Average(torch.bfloat16)})
    assert "state['ema'] converted what it loaded" in caplog.text
    assert "['shadow'] (torch.float32 to torch.bfloat16)" in caplog.text


def test_random_numbers_are_restored_after_everything_that_draws_some() -> None:
    stored = Stored({"rng": RngState(), "ema": Average(torch.float32)})
    expected = torch.randn(3)
    stored.restore({"rng": RngState(), "ema": Average(torch.float32)})
    assert torch.equal(torch.randn(3), expected)


def test_an_error_of_an_object_says_where_it_was() -> None:
    class Picky(Average):
        def load_state_dict(self, state: dict[str, Any]) -> None:
            raise KeyError("speed")

    with pytest.raises(KeyError, match="speed") as caught:
        Stored([Average(torch.float32)]).restore([Picky(torch.float32)])
    assert any("state[0]" in note for note in caught.value.__notes__)


def test_a_module_with_hooks_decides_for_itself() -> None:
    class Renamed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.new = torch.nn.Linear(2, 2)
            self._register_load_state_dict_pre_hook(self.rename)  # type: ignore[no-untyped-call]

        @staticmethod
        def rename(state: dict[str, Any], prefix: str, *_: Any) -> None:
            for key in [key for key in state if key.startswith(f"{prefix}old.")]:
                state[key.replace("old.", "new.")] = state.pop(key)

    inner = torch.nn.Linear(2, 2)
    old = torch.nn.ModuleDict({"old": inner})
    module = Renamed()
    Stored([old]).restore([module])
    assert torch.equal(module.new.weight, inner.weight)
    with pytest.raises(RuntimeError, match="Missing key") as caught:
        Stored([torch.nn.ModuleDict({"other": torch.nn.Linear(2, 2)})]).restore([module])
    assert any("state[0]" in note and "undefined" in note for note in caught.value.__notes__)


def test_extra_state_goes_through_the_module() -> None:
    class Counting(torch.nn.Linear):
        seen: Any = 0

        def get_extra_state(self) -> Any:
            return {"seen": self.seen, "buffer": torch.ones(2)}

        def set_extra_state(self, state: Any) -> None:
            self.seen = state["seen"]

    saved, target = Counting(2, 2), Counting(2, 2)
    saved.seen = 12
    Stored(saved).restore(target)
    assert target.seen == 12
    assert torch.equal(saved.weight, target.weight)


def test_an_optimizer_whose_parameters_are_numbered_otherwise() -> None:
    job = Job(0, Float32Moments, torch.bfloat16)
    job.train(1)
    stored = Stored(job.state)
    structure = stored.document["structure"]
    optimizer = dict(structure["dict"])["optimizer"]
    state, groups = dict(optimizer["dict"])["state"], dict(optimizer["dict"])["param_groups"]
    params = dict(groups["list"][0]["dict"])["params"]
    params["list"] = [number + 100 for number in params["list"]]
    state["dict"] = [[number + 100, value] for number, value in state["dict"]]
    other = Job(1, Float32Moments, torch.bfloat16)
    other.train(1)
    stored.restore(other.state)
    assert difference(job.optimizer.state_dict(), other.optimizer.state_dict()) == ""


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_job_moves_between_devices() -> None:
    on_host = Job(0, torch.optim.AdamW, torch.float32)
    on_host.train(2)
    stored = Stored({key: on_host.state[key] for key in ("model", "optimizer")})
    on_device = Job(1, torch.optim.AdamW, torch.float32)
    on_device.model.cuda()
    target = {"model": on_device.model, "optimizer": on_device.optimizer}
    stored.restore(target)
    back = Stored(target).load(map_location="cpu")
    assert difference(back["model"], on_host.model.state_dict()) == ""
    assert on_device.optimizer.state_dict()["state"][0]["exp_avg"].is_cuda
