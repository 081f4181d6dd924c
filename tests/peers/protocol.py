"""One object's trial: train, save, restore into a fresh object, train on, compare with an uninterrupted run."""

from __future__ import annotations

import copy
import io
import logging
import pickle
import random
import tempfile
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

import incckpt
from incckpt.errors import PickleRefusedError
from tests.peers.compare import first_difference

__all__ = ["App", "Case", "Outcome", "Row", "brief", "judge", "logged", "plain_steps", "try_case"]

App: TypeAlias = dict[str, Any]
"""Objects by name. Names that begin with an underscore are needed for training, but not saved."""

ORIGINAL, FRESH = 1, 2  # seeds: a fresh object differs from the original in all that initialization draws
REPEATS = 4


@dataclass(frozen=True)
class Case:
    """An object to try.

    Attributes
    ----------
    group, name
        Where it belongs, and what it is called.
    build
        Returns a fresh app; whatever is random in it comes from the global generators.
    step
        Trains one step, and returns what can be seen of it. It gets the app and the step's number.
    before, after
        Steps before the save, and after the restore.
    limit
        The documented limit for which incckpt refuses this object, if it does.
    strict
        Whether the result by hand is right even where it differs, since the object's own loader makes it so.
    around
        What has to be entered while it is tried, such as a process group.
    """

    group: str
    name: str
    build: Callable[[], App]
    step: Callable[[App, int], Any]
    before: int = 3
    after: int = 3
    limit: str = ""
    strict: bool = False
    around: Callable[[], AbstractContextManager[object]] = nullcontext


@dataclass(frozen=True)
class Outcome:
    """How one way of restoring ended.

    Attributes
    ----------
    how
        ``"identical"``, ``"differs"`` or ``"raises"``.
    detail
        Where it differs first, or what was raised.
    pickled
        Whether it had to be allowed to unpickle what the state contains.
    result
        All that could be seen, if nothing was raised.
    """

    how: str
    detail: str = ""
    pickled: bool = False
    result: Any = None

    def __str__(self) -> str:
        how = f"{self.how}, unpickled" if self.pickled else self.how
        return f"{how}: {self.detail}" if self.detail else how


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes
    ----------
    verdict
        ``"same"``, ``"better"``, ``"WORSE"``; ``"limit"``, if it is refused, as documented; ``"void"``, if the object
        cannot be trained here, or does not repeat itself.
    warned
        What incckpt logged.
    """

    group: str
    name: str
    by_hand: str
    through_incckpt: str
    verdict: str
    warned: tuple[str, ...] = ()


def try_case(case: Case) -> Row:
    """Train, save, restore and train on, by hand and through incckpt."""
    with warnings.catch_warnings(), case.around():
        warnings.simplefilter("ignore")
        try:
            expected = _uninterrupted(case)
            if where := first_difference(expected, _uninterrupted(case)):
                return Row(case.group, case.name, f"does not repeat itself: {where}", "", "void")
        except Exception as error:  # noqa: BLE001 -- an object that cannot be trained is shown as such
            return Row(case.group, case.name, f"cannot be trained: {brief(error)}", "", "void")
        hand = _attempt(case, expected, _by_hand)
        with logged() as messages:
            ours = _attempt(case, expected, _through_incckpt)
        verdict = judge(hand, ours, case)
        if verdict == "WORSE":  # before that counts, another look at whether the object repeats itself
            for _ in range(REPEATS):
                if where := first_difference(expected, _uninterrupted(case)):
                    return Row(case.group, case.name, f"does not repeat itself: {where}", "", "void")
    return Row(case.group, case.name, str(hand), str(ours), verdict, tuple(messages))


def judge(hand: Outcome, ours: Outcome, case: Case) -> str:
    """Return the verdict on what incckpt did where the hand did that."""
    if ours.how == "identical":
        if hand.how == "identical":
            return "same" if hand.pickled or not ours.pickled else "WORSE"
        return "WORSE" if case.strict else "better"
    if case.limit and ours.how == "raises":
        return "limit"
    if hand.how == "raises":
        return "same" if ours.how == "raises" else "better"
    if ours.how == "differs" and hand.how == "differs" and not first_difference(hand.result, ours.result):
        return "same"
    return "WORSE"


def plain_steps(app: App, number: int, dtype: torch.dtype = torch.float32) -> Any:
    """Train one step of ``app["optimizer"]`` on the output of ``app["model"]`` for ten samples of six numbers."""
    output = app["model"](torch.randn(10, 6, dtype=dtype))
    loss = output.square().mean()
    app["optimizer"].zero_grad()
    loss.backward()
    app["optimizer"].step()
    return output.detach()


Ways: TypeAlias = tuple[Callable[[App, Path, bool], None], Callable[[App, Path, bool], None]]


def _uninterrupted(case: Case) -> Any:
    app = _build(case, ORIGINAL)
    _train(case, app, 0, case.before)
    at_save = _state_of(app)
    return [at_save, _train(case, app, case.before, case.after), _state_of(app)]


def _attempt(case: Case, expected: Any, ways: Ways, pickled: bool = False) -> Outcome:
    save, restore = ways
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        try:
            app = _build(case, ORIGINAL)
            _train(case, app, 0, case.before)
            save(_saved(app), Path(folder), pickled)
            went_on = [expected[0], _train(case, app, case.before, case.after), _state_of(app)]
            if where := first_difference(expected, went_on):
                return Outcome("differs", f"going on after the save: {where}", pickled, went_on)
            app = _build(case, FRESH)
            restore(_saved(app), Path(folder), pickled)
            result = [_state_of(app), _train(case, app, case.before, case.after), _state_of(app)]
        except (PickleRefusedError, pickle.UnpicklingError) as error:
            return Outcome("raises", brief(error), pickled) if pickled else _attempt(case, expected, ways, pickled=True)
        except Exception as error:  # noqa: BLE001 -- this is what the table shows
            return Outcome("raises", brief(error), pickled)
    parts = zip(("what was restored", "an output after it", "the state after it"), expected, result, strict=True)
    where = next((f"{part}: {found}" for part, a, b in parts if (found := first_difference(a, b))), "")
    return Outcome("differs", where, pickled, result) if where else Outcome("identical", "", pickled, result)


def _save_by_hand(app: App, folder: Path, pickled: bool) -> None:
    torch.save({name: value.state_dict() for name, value in app.items()}, folder / "by-hand.pt")


def _restore_by_hand(app: App, folder: Path, pickled: bool) -> None:
    states = torch.load(folder / "by-hand.pt", weights_only=not pickled)
    for name, value in app.items():
        value.load_state_dict(states[name])


def _save(app: App, folder: Path, pickled: bool) -> None:
    with incckpt.CheckpointManager(folder / "store", allow_pickle=pickled) as manager:
        manager.save(1, app).result()


def _restore(app: App, folder: Path, pickled: bool) -> None:
    with incckpt.CheckpointManager(folder / "store", allow_pickle=pickled) as manager:
        assert manager.restore(app) == 1


_by_hand: Ways = (_save_by_hand, _restore_by_hand)
_through_incckpt: Ways = (_save, _restore)


def _build(case: Case, seed: int) -> App:
    _seed(seed)
    return case.build()


def _train(case: Case, app: App, first: int, count: int) -> list[Any]:
    seen = []
    for number in range(first, first + count):
        _seed(1000 + number)
        seen.append(_copy(case.step(app, number)))
    return seen


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def _saved(app: App) -> App:
    return {name: value for name, value in app.items() if not name.startswith("_")}


def _state_of(app: App) -> Any:
    """Return a copy of all state that `app` has to show."""
    return {name: _copy(value.state_dict()) for name, value in _saved(app).items()}


def _copy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        value = value.detach()
    try:
        return copy.deepcopy(value)
    except (NotImplementedError, RuntimeError):  # some tensor classes can be pickled, but not cloned
        file = io.BytesIO()
        torch.save(value, file)
        file.seek(0)
        return torch.load(file, weights_only=False)


def brief(error: BaseException) -> str:
    """Return an error as one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


class logged(logging.Handler):  # noqa: N801 -- a context manager
    """Collects what incckpt logs, warnings and worse."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())

    def __enter__(self) -> list[str]:
        logging.getLogger("incckpt").addHandler(self)
        return self.messages

    def __exit__(self, *_: object) -> None:
        logging.getLogger("incckpt").removeHandler(self)
