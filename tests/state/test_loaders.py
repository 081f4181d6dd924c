"""Objects that load themselves: their own loader decides, whatever it does, and gets memory of its own."""

from __future__ import annotations

import copy
import io
import itertools
import logging
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.ao.quantization import MinMaxObserver, PerChannelMinMaxObserver, get_default_qat_qconfig, prepare_qat

from incckpt.errors import StateMismatchError
from incckpt.testing.compare import difference
from tests.states import Stored


def by_hand(state: Any) -> Any:
    """Return a state dict as ``torch.save`` and ``torch.load`` give it back."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def fill(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Give every tensor of a module its own random values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
            else:
                tensor.fill_(seed)
    return module


# --- modules, by every way to take part in loading --------------------------------------------------------------------


class Swapped(torch.nn.Module):
    """Loads each of its parameters from the other's name."""

    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Parameter(torch.zeros(2))
        self.b = torch.nn.Parameter(torch.zeros(2))

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        return super().load_state_dict({"a": state_dict["b"], "b": state_dict["a"]}, strict, assign)


def test_a_module_that_swaps_its_names() -> None:
    saved, target = Swapped(), Swapped()
    saved.a.data.fill_(1)
    saved.b.data.fill_(2)
    Stored({"m": saved}).restore({"m": target})
    assert target.a.tolist() == [2, 2]
    assert target.b.tolist() == [1, 1]


def double_in_load(base: type[torch.nn.Module]) -> type[torch.nn.Module]:
    class Doubling(base):  # type: ignore[valid-type, misc]
        def _load_from_state_dict(self, state: Any, prefix: str, *args: Any) -> None:
            state[f"{prefix}weight"] = state[f"{prefix}weight"] * 2
            super()._load_from_state_dict(state, prefix, *args)

    return Doubling


def scaled_in_place(base: type[torch.nn.Module]) -> type[torch.nn.Module]:
    class Scaling(base):  # type: ignore[valid-type, misc]
        def load_state_dict(self, state: Any, *args: Any, **options: Any) -> Any:
            state["weight"].mul_(3)
            return super().load_state_dict(state, *args, **options)

    return Scaling


def averaged_with_what_was(base: type[torch.nn.Module]) -> type[torch.nn.Module]:
    class Averaging(base):  # type: ignore[valid-type, misc]
        def load_state_dict(self, state: Any, *args: Any, **options: Any) -> Any:
            state = {name: (value + dict(self.named_parameters())[name].detach()) / 2 for name, value in state.items()}
            return super().load_state_dict(state, *args, **options)

    return Averaging


def renamed_in_state_dict(base: type[torch.nn.Module]) -> type[torch.nn.Module]:
    class Renaming(base):  # type: ignore[valid-type, misc]
        def state_dict(self, *args: Any, **options: Any) -> Any:
            state = super().state_dict(*args, **options)
            prefix = options.get("prefix", "")
            state[f"{prefix}gain"] = state.pop(f"{prefix}weight")
            return state

        def _load_from_state_dict(self, state: Any, prefix: str, *args: Any) -> None:
            state[f"{prefix}weight"] = state.pop(f"{prefix}gain")
            super()._load_from_state_dict(state, prefix, *args)

        def load_state_dict(self, state: Any, *args: Any, **options: Any) -> Any:
            return super().load_state_dict({**state, "weight": state["gain"]}, strict=False)

    return Renaming


def packed_in_save(base: type[torch.nn.Module]) -> type[torch.nn.Module]:
    class Packing(base):  # type: ignore[valid-type, misc]
        def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
            destination[f"{prefix}packed"] = torch.cat([self.weight.detach().reshape(-1), self.bias.detach()])

        def _load_from_state_dict(self, state: Any, prefix: str, *_: Any) -> None:
            packed = state[f"{prefix}packed"]
            with torch.no_grad():
                self.weight.copy_(packed[: self.weight.numel()].view_as(self.weight))
                self.bias.copy_(packed[self.weight.numel() :])

        def load_state_dict(self, state: Any, *args: Any, **options: Any) -> Any:
            self._load_from_state_dict(state, "")

    return Packing


def tensor_extra_state(base: type[torch.nn.Module]) -> type[torch.nn.Module]:
    class Extra(base):  # type: ignore[valid-type, misc]
        extra = torch.zeros(3)

        def get_extra_state(self) -> Any:
            return self.weight.detach().sum() + torch.arange(3.0)

        def set_extra_state(self, state: Any) -> None:
            self.extra = state

    return Extra


def kept_tensors(base: type[torch.nn.Module]) -> type[torch.nn.Module]:
    class Keeping(base):  # type: ignore[valid-type, misc]
        def load_state_dict(self, state: Any, *args: Any, **options: Any) -> Any:
            return super().load_state_dict(state, *args, assign=True, **options)

    return Keeping


OVERRIDES = [
    double_in_load, scaled_in_place, averaged_with_what_was, renamed_in_state_dict, packed_in_save, tensor_extra_state,
    kept_tensors,
]  # fmt: skip


def negate(module: torch.nn.Module, state: Any, prefix: str, *_: Any) -> None:
    for name in [name for name in state if name.startswith(prefix)]:
        if isinstance(state[name], torch.Tensor):
            state[name] = -state[name]


def pre_hook(module: torch.nn.Module) -> None:
    module.register_load_state_dict_pre_hook(negate)  # type: ignore[no-untyped-call]


def private_pre_hook(module: torch.nn.Module) -> None:
    module._register_load_state_dict_pre_hook(negate, with_module=True)  # type: ignore[no-untyped-call]


def post_hook(module: torch.nn.Module) -> None:
    def halve(module: torch.nn.Module, _: Any) -> None:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.div_(2)

    module.register_load_state_dict_post_hook(halve)  # type: ignore[no-untyped-call]


def state_hook(module: torch.nn.Module) -> None:
    def invert(module: torch.nn.Module, state: Any, prefix: str, metadata: Any) -> None:
        for name in list(state):
            if name.startswith(prefix) and isinstance(state[name], torch.Tensor):
                state[name] = 1 - state[name]

    module.register_state_dict_post_hook(invert)  # type: ignore[no-untyped-call]


def shadowing_attribute(module: torch.nn.Module) -> None:
    load = module._load_from_state_dict

    def doubled(state: Any, prefix: str, *args: Any) -> None:
        for name in [name for name in state if name.startswith(prefix)]:
            if isinstance(state[name], torch.Tensor):
                state[name] = state[name] * 2
        load(state, prefix, *args)

    module._load_from_state_dict = doubled  # type: ignore[method-assign, assignment]


HOOKS: list[Callable[[torch.nn.Module], None]] = [
    pre_hook, private_pre_hook, post_hook, state_hook, shadowing_attribute,
]  # fmt: skip


def plain(base: type[torch.nn.Module]) -> type[torch.nn.Module]:
    return base


def no_hook(module: torch.nn.Module) -> None:
    pass


CASES = [
    (override, hook, where)
    for override, hook in itertools.product([plain, *OVERRIDES], [no_hook, *HOOKS])
    for where in ("alone", "inside", "beside")
]


@pytest.mark.slow
@pytest.mark.parametrize(("override", "hook", "where"), CASES)
def test_generated_modules_load_as_by_hand(override: Any, hook: Any, where: str) -> None:
    """Every override with every hook: restore gives what ``load_state_dict`` gives for a state from ``torch.load``."""
    kind = override(torch.nn.Linear)

    def make(seed: int) -> Any:
        inner = fill(kind(3, 2), seed)
        hook(inner)
        if where == "alone":
            return inner
        return torch.nn.ModuleDict({"a": fill(torch.nn.BatchNorm1d(2), seed + 10), "inner": inner})

    saved, expected, target = make(1), make(2), make(2)
    with torch.no_grad():
        assert difference(expected.state_dict(), target.state_dict()) == ""
    state: Any = {"m": saved, "w": torch.ones(2)}
    into: Any = {"m": target, "w": torch.zeros(2)}
    if where == "beside":  # the same parameters once more, by themselves: restored in place before or after
        part = saved["a"].weight.detach()
        state, into = {"part": part, **state}, {"part": target["a"].weight.detach(), **into}
    stored = Stored(state)
    expected.load_state_dict(by_hand({"m": saved.state_dict()})["m"])
    stored.restore(into)
    for (name, mine), (_, by) in zip(tensors_of(target), tensors_of(expected), strict=True):
        assert torch.equal(mine, by), name
    # Nothing is shared with what was delivered for others: the object may keep what it was given.
    before = copy.deepcopy(dict(tensors_of(target)))
    into["w"].fill_(7)
    for name, mine in tensors_of(target):
        assert torch.equal(mine, before[name])


def tensors_of(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()
    for name, part in module.named_modules():
        if isinstance(getattr(part, "extra", None), torch.Tensor):
            yield f"{name}.extra", part.extra


def test_a_post_hook_may_forgive_missing_keys() -> None:
    def forgive(module: torch.nn.Module, keys: Any) -> None:
        keys.missing_keys.clear()

    target = torch.nn.ModuleDict({"old": torch.nn.Linear(2, 2), "new": torch.nn.Linear(2, 2)})
    target.register_load_state_dict_post_hook(forgive)  # type: ignore[no-untyped-call]
    saved = torch.nn.ModuleDict({"old": torch.nn.Linear(2, 2)})
    Stored({"m": saved}).restore({"m": target})
    assert torch.equal(target["old"].weight, saved["old"].weight)  # type: ignore[arg-type]


def test_a_forgiving_loader_is_heard(caplog: pytest.LogCaptureFixture) -> None:
    class Forgiving(torch.nn.Linear):
        def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
            return super().load_state_dict(state_dict, strict=False)

    saved, target = torch.nn.Linear(2, 2, bias=False), Forgiving(2, 2)
    with caplog.at_level(logging.WARNING, "incckpt"):
        Stored({"m": saved}).restore({"m": target})
    assert "state['m'] was restored, but its load_state_dict() reports missing_keys: bias" in caplog.text
    assert torch.equal(target.weight, saved.weight)


@pytest.mark.parametrize("kind", [PerChannelMinMaxObserver, MinMaxObserver])
def test_observers_resize_their_buffers(kind: Any) -> None:
    saved, target, expected = kind(), kind(), kind()
    saved(torch.randn(8, 4))
    expected.load_state_dict(by_hand(saved.state_dict()))
    Stored({"o": saved}).restore({"o": target})
    assert difference(expected.state_dict(), target.state_dict()) == ""


@pytest.mark.filterwarnings("ignore")
def test_models_prepared_for_quantization_aware_training() -> None:
    def make(seed: int) -> torch.nn.Module:
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
        model.qconfig = get_default_qat_qconfig("fbgemm")  # type: ignore[no-untyped-call]
        return prepare_qat(model.train())  # type: ignore[no-any-return, no-untyped-call]

    saved, target, expected = make(0), make(1), make(1)
    saved(torch.randn(2, 1, 8, 8))
    expected.load_state_dict(by_hand(saved.state_dict()))
    Stored({"m": saved}).restore({"m": target})
    assert difference(expected.state_dict(), target.state_dict()) == ""
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(target.eval()(x), expected.eval()(x))


def test_lazy_modules_take_their_shapes_from_the_checkpoint() -> None:
    saved, target = torch.nn.Linear(5, 3), torch.nn.LazyLinear(3)
    Stored({"m": saved}).restore({"m": target})
    assert torch.equal(target.weight, saved.weight)


@pytest.mark.parametrize("wrap", ["parametrized", "spectral", "scripted"])
@pytest.mark.filterwarnings("ignore")
def test_what_torch_itself_does_to_modules(wrap: str) -> None:
    def make(seed: int) -> torch.nn.Module:
        module = fill(torch.nn.Linear(3, 3), seed)
        if wrap == "parametrized":
            torch.nn.utils.parametrizations.weight_norm(module)
        elif wrap == "spectral":
            torch.nn.utils.spectral_norm(module)
        else:
            module = torch.jit.script(module)
        return module

    saved, target = make(1), make(2)
    Stored({"m": saved}).restore({"m": target})
    assert difference(saved.state_dict(), target.state_dict()) == ""
    x = torch.randn(2, 3)
    assert torch.equal(saved.eval()(x), target.eval()(x))


# --- optimizers -------------------------------------------------------------------------------------------------------


class Wrapped(torch.optim.SGD):
    def state_dict(self) -> Any:
        return {"base": super().state_dict()}

    def load_state_dict(self, state: Any) -> None:
        super().load_state_dict(state["base"])


class Headless(torch.optim.Optimizer):
    """An optimizer around another, which is none itself but in name."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner, self.scale = inner, 1.0

    def state_dict(self) -> Any:
        return {"inner": self.inner.state_dict(), "scale": self.scale}

    def load_state_dict(self, state: Any) -> None:
        self.inner.load_state_dict(state["inner"])
        self.scale = state["scale"]


class Keeper(torch.optim.SGD):
    """Keeps the very tensors that it is given."""

    def load_state_dict(self, state: Any) -> None:
        super().load_state_dict(state)
        self.kept = state["state"]


def trained(make: Callable[[Any], torch.optim.Optimizer], seed: int = 0, steps: int = 2) -> Any:
    torch.manual_seed(seed)
    model = torch.nn.Linear(3, 2)
    optimizer = make(model.parameters())
    for _ in range(steps):
        inner = getattr(optimizer, "inner", optimizer)
        inner.zero_grad()
        model(torch.randn(4, 3)).square().sum().backward()
        inner.step()
    return {"model": model, "optimizer": optimizer}


@pytest.mark.parametrize(
    "make",
    [
        lambda params: Wrapped(params, lr=0.1, momentum=0.9),
        lambda params: Headless(torch.optim.Adam(params)),
        lambda params: Keeper(params, lr=0.1, momentum=0.9),
    ],
)
@pytest.mark.parametrize("steps", [0, 1])
def test_wrapped_optimizers_load_themselves(make: Any, steps: int) -> None:
    saved, target = trained(make), trained(make, seed=1, steps=steps)
    Stored(saved).restore(target)
    assert difference(saved["optimizer"].state_dict(), target["optimizer"].state_dict()) == ""
    assert difference(saved["model"].state_dict(), target["model"].state_dict()) == ""


@pytest.mark.parametrize("order", [("model", "optimizer", "ema"), ("ema", "optimizer", "model")])
def test_what_an_object_keeps_is_its_own(order: tuple[str, ...]) -> None:
    """An average that was made of the model's very tensors, and an optimizer that keeps what it is given."""

    class Ema:
        def __init__(self, shadow: dict[str, torch.Tensor]) -> None:
            self.shadow = shadow

        def state_dict(self) -> Any:
            return self.shadow

        def load_state_dict(self, state: Any) -> None:
            self.shadow = state

    def make(seed: int) -> Any:
        job = trained(lambda params: Keeper(params, lr=0.1, momentum=0.9), seed)
        job["ema"] = Ema(dict(job["model"].state_dict()))
        return {name: job[name] for name in order}

    saved, target = make(0), make(1)
    expected = copy.deepcopy(saved["model"].state_dict())
    stored = Stored(saved)
    stored.restore(target)
    with torch.no_grad():
        for parameter in target["model"].parameters():
            parameter.fill_(9)
    assert difference(dict(expected), target["ema"].shadow) == ""
    kept = target["optimizer"].kept
    momentum = copy.deepcopy(kept)
    for state in target["optimizer"].state.values():
        state["momentum_buffer"] = state["momentum_buffer"] + 1
    assert difference(momentum, kept) == ""


@pytest.mark.parametrize("order", [("model", "ema"), ("ema", "model")])
def test_objects_load_in_the_order_of_the_target(order: tuple[str, ...]) -> None:
    """A loader that writes to another object, past autograd, has the last word only if it comes last."""

    class Ema:
        def __init__(self, model: torch.nn.Module) -> None:
            self.model, self.shadow = model, {name: value * 0 + 5 for name, value in model.state_dict().items()}

        def state_dict(self) -> Any:
            return self.shadow

        def load_state_dict(self, state: Any) -> None:
            for name, parameter in self.model.named_parameters():
                parameter.data.copy_(state[name])

    def make(seed: int) -> Any:
        model = fill(torch.nn.Linear(2, 2), seed)
        job = {"model": model, "ema": Ema(model)}
        return {name: job[name] for name in order}

    saved, target = make(0), make(1)
    Stored(saved).restore(target)
    expected = saved["ema"].shadow if order[-1] == "ema" else saved["model"].state_dict()
    assert difference(dict(expected), dict(target["model"].state_dict())) == ""


def test_of_tied_targets_the_last_wins() -> None:
    tied = torch.nn.Linear(2, 2)
    target = {"b": tied, "a": tied}
    saved = {"a": fill(torch.nn.Linear(2, 2), 1), "b": fill(torch.nn.Linear(2, 2), 2)}
    Stored(saved).restore(target)
    assert torch.equal(tied.weight, saved["a"].weight)  # type: ignore[arg-type]


@pytest.mark.parametrize("setup", ["alone", "hooked"])
def test_a_foreign_optimizer_keeps_the_bits_that_torchs_loader_casts(setup: str) -> None:
    class Custom(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {})
            for group in self.param_groups:
                for p in group["params"]:
                    third = torch.full_like(p, 1 / 3, dtype=torch.float32)
                    self.state[p] = {
                        "m": third,
                        "nested": {"list": [third + 1], "tuple": (third + 2, 3)},
                        "count": torch.tensor(2**20 + 1),
                    }

    def make() -> Custom:
        optimizer = Custom(torch.nn.Linear(2, 2).bfloat16().parameters())
        if setup == "hooked":  # the hook may have meant it
            optimizer.register_load_state_dict_post_hook(lambda optimizer: None)
        return optimizer

    saved, target, expected = make(), make(), make()
    Stored([saved]).restore([target])
    if setup == "hooked":
        expected.load_state_dict(by_hand(saved.state_dict()))
        saved = expected
    assert difference(saved.state_dict(), target.state_dict()) == ""


def test_moments_that_do_not_fit_a_grown_parameter_are_refused() -> None:
    def make(rows: int) -> Any:
        embedding = torch.nn.Embedding(rows, 2)
        optimizer = torch.optim.Adam(embedding.named_parameters())
        embedding(torch.tensor([0])).sum().backward()
        optimizer.step()
        return {"optimizer": optimizer}

    target = make(5)
    before = copy.deepcopy(target["optimizer"].state_dict())
    with pytest.raises(
        StateMismatchError, match=r"\['optimizer'\]\['state'\]\[0\]\['exp_avg'\].*\(4, 2\).*weight.*\(5, 2\)"
    ):
        Stored(make(4)).restore(target)
    assert difference(before, target["optimizer"].state_dict()) == ""


@pytest.mark.parametrize(
    "kind", [torch.optim.Adafactor, torch.optim.ASGD, torch.optim.NAdam, torch.optim.Rprop, torch.optim.LBFGS]
)
def test_moments_of_other_shapes_that_torch_makes(kind: Any) -> None:
    def make(seed: int) -> Any:
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Conv1d(2, 3, 2), torch.nn.Linear(4, 2))
        optimizer = kind(model.parameters())

        def closure() -> Any:
            optimizer.zero_grad()
            loss = model(torch.ones(2, 2, 5)).square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        return {"optimizer": optimizer}

    saved, target = make(0), make(1)
    Stored(saved).restore(target)
    assert difference(saved["optimizer"].state_dict(), target["optimizer"].state_dict()) == ""


def test_options_that_are_tensors_go_to_where_those_before_were() -> None:
    """A meta tensor stands for one on a GPU: torch leaves options on the device where they were saved."""

    def make(lr: torch.Tensor) -> Any:
        optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(2))])
        optimizer.param_groups[0]["lr"] = lr
        return {"o": optimizer}

    target = make(torch.tensor(0.5, device="meta"))
    Stored(make(torch.tensor(0.25))).restore(target)
    assert target["o"].param_groups[0]["lr"].is_meta
    target = make(torch.tensor(0.5))
    Stored(make(torch.tensor(0.25))).restore(target)
    assert target["o"].param_groups[0]["lr"].item() == 0.25


def test_reordered_parameters_are_told(caplog: pytest.LogCaptureFixture) -> None:
    def make(names: str) -> Any:
        return {"o": torch.optim.SGD([(name, torch.nn.Parameter(torch.zeros(2))) for name in names], momentum=0.9)}

    stored = Stored(make("abc"))
    with caplog.at_level(logging.WARNING, "incckpt"):
        stored.restore(make("abc"))
        stored.restore(make("xyz"))  # renamed is not reordered
    assert caplog.text == ""
    with caplog.at_level(logging.WARNING, "incckpt"):
        stored.restore(make("acb"))
    assert "state['o'] has its parameters in another order" in caplog.text
    assert "b to c, c to b" in caplog.text


def _compiled(how: str) -> torch.nn.Module:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    match how:
        case "whole":
            return torch.compile(model, backend="eager")  # type: ignore[return-value]
        case "part":
            model[0] = torch.compile(model[0], backend="eager")  # type: ignore[assignment]
        case "both":
            model[0] = torch.compile(model[0], backend="eager")  # type: ignore[assignment]
            return torch.compile(model, backend="eager")  # type: ignore[return-value]
    return model


@pytest.mark.slow
@pytest.mark.parametrize(("saved", "here"), [*itertools.permutations(["plain", "whole", "part", "both"], 2)])
def test_a_compiled_module_and_a_plain_one_share_checkpoints(saved: str, here: str) -> None:
    source, target = _compiled(saved), _compiled(here)
    with torch.no_grad():
        for tensor in source.state_dict().values():
            tensor += 1
    Stored({"model": source}).restore({"model": target})
    assert all(map(torch.equal, source.state_dict().values(), target.state_dict().values()))
    hooked = _compiled(here)
    hooked.register_load_state_dict_post_hook(lambda module, keys: None)  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError) as caught:  # a loader that could see the names is given them as they are
        Stored({"model": source}).restore({"model": hooked})
    assert any("'_orig_mod.', from torch.compile" in note for note in caught.value.__notes__)


@pytest.mark.parametrize(("saved", "here", "message"), [
    ("bare", "parallel", r"names of the target have 'module.'"),
    ("held", "bare", r"names of the checkpoint begin with 'held.'"),
    ("bare", "held", r"names of the target begin with 'held.'"),
])  # fmt: skip
def test_prefixes_get_a_hint(saved: str, here: str, message: str) -> None:
    def make(how: str) -> torch.nn.Module:
        model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
        match how:
            case "parallel":
                return torch.nn.DataParallel(model)
            case "held":
                return torch.nn.ModuleDict({"held": model})
        return model

    with pytest.raises(StateMismatchError, match=message):
        Stored({"model": make(saved)}).restore({"model": make(here)})
    hooked = make(here)
    hooked.register_load_state_dict_post_hook(lambda module, keys: None)  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError) as caught:  # torch's own refusal; the hint comes along
        Stored({"model": make(saved)}).restore({"model": hooked})
    assert any(re.search(message, note) for note in caught.value.__notes__)
    Stored({"model": make(saved)}).restore({"model": make(saved)})
