"""Every option of every public call, given every kind of wrong value: ours is the error, and it names the option."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import incckpt
from incckpt import CheckpointManager, KeepBest, KeepEvery, KeepLast
from incckpt.backends.remote import take_options
from incckpt.errors import IncckptError, OptionError
from incckpt.options import MAX_THREADS, checked_count, checked_flag, checked_seconds, checked_strings
from incckpt.preemption.notices import AwsNotices, GcpNotices

pytestmark = pytest.mark.slow

ODD: list[Any] = [
    -1,
    0,
    True,
    1.5,
    "3",
    "False",
    "x\0y",
    "\ud800",
    b"x",
    (),
    [],
    [None],
    {},
    {1: 2},
    object(),
    10**400,
    10**5000,
    float("nan"),
    float("inf"),
    100_000,
    np.int64(3),
    np.bool_(True),
    np.array(3),
    torch.tensor(2),
]
# These are no options.
NAMED = {"url", "before", "after", "source", "destination", "state", "app", "self", "report", "retention", "policies"}


def state() -> dict[str, Any]:
    """Return something to save, or to restore into."""
    return {"w": torch.zeros(3)}


def manager(url: Path, **options: Any) -> None:
    """Make a manager with options, and use it."""
    given: dict[str, Any] = {"read_only": True, "keep_best_n": 1, "metric": "loss"}
    with CheckpointManager(url, **(given | options)) as made:
        made.restore(state())
        made.checkpoints()


def method(name: str, *, read_only: bool = True, **always: Any) -> Callable[..., Any]:
    """Return a call of a manager's method."""

    def call(url: Path, **options: Any) -> None:
        with CheckpointManager(url, read_only=read_only) as made:
            outcome = getattr(made, name)(**(always | options))
            if name == "save":
                outcome.result()

    return call


def saved(url: Path, **options: Any) -> None:
    """Save to a store of its own."""
    given: dict[str, Any] = {"step": 7, "if_exists": "replace"}
    incckpt.save(state(), url / "others" / "new", **(given | options))


CALLS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "load": (incckpt.load, incckpt.load),
    "load best": (incckpt.load, lambda url, **options: incckpt.load(url, **({"step": "best"} | options))),
    "verify": (incckpt.verify, incckpt.verify),
    "collect": (incckpt.collect, incckpt.collect),
    "recover": (incckpt.recover, incckpt.recover),
    "inventory": (incckpt.inventory, incckpt.inventory),
    "prune": (incckpt.prune, incckpt.prune),
    "usage": (incckpt.usage, incckpt.usage),
    "describe": (incckpt.describe, incckpt.describe),
    "list_checkpoints": (incckpt.list_checkpoints, incckpt.list_checkpoints),
    "diff": (incckpt.diff, lambda url, **options: incckpt.diff(url, url, **options)),
    "copy": (incckpt.copy, lambda url, **options: incckpt.copy(url, url / "others" / "copy", **options)),
    "save": (incckpt.save, saved),
    "manager": (CheckpointManager.__init__, manager),
    "restore": (CheckpointManager.restore, method("restore", app=state())),
    "manager.load": (CheckpointManager.load, method("load")),
    "manager.save": (
        CheckpointManager.save,
        method("save", read_only=False, step=7, app=state(), if_exists="replace"),
    ),
    "manager.checkpoints": (CheckpointManager.checkpoints, method("checkpoints")),
}
OPTIONS = [
    pytest.param(call, option, id=f"{name}-{option}")
    for name, (signature, call) in CALLS.items()
    for option in inspect.signature(signature).parameters
    if option not in NAMED
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a store with a checkpoint."""
    folder = tmp_path_factory.mktemp("store")
    incckpt.save(state(), folder, step=0, metrics={"loss": 1.0})
    return folder


@pytest.mark.parametrize(("call", "option"), OPTIONS)
def test_a_wrong_value_is_an_error_of_ours(store: Path, call: Callable[..., Any], option: str) -> None:
    for value in ODD:
        try:
            call(store, **{option: value})
        except IncckptError:
            continue


@pytest.mark.parametrize("value", [*ODD, None], ids=lambda value: type(value).__name__)
def test_a_url_that_is_none(value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # "3" is a folder
    for call in (incckpt.load, incckpt.verify, incckpt.collect):
        with pytest.raises(IncckptError):
            call(value)


@pytest.mark.parametrize("policy", [KeepLast, KeepEvery, lambda n: KeepBest(n, "loss"), lambda m: KeepBest(1, "l", m)])
def test_policies_take_numbers(policy: Callable[[Any], Any]) -> None:
    for value in ODD:
        try:
            policy(value)
        except OptionError:
            continue


SECONDS: dict[str, Callable[[Any], Any]] = {
    "grace": lambda value: incckpt.Preemption(signals=(), grace=value),
    "margin": lambda value: incckpt.Preemption(signals=(), margin=value),
    "most_lost": lambda value: incckpt.Cadence(most_lost=value),
    "shortest": lambda value: incckpt.Cadence(shortest=value),
    "KeepEvery: seconds": lambda value: KeepEvery(seconds=value),
    "request_timeout": lambda value: take_options({"request_timeout": value}, "s3://bucket"),
    "AwsNotices: timeout": lambda value: AwsNotices(timeout=value),
    "GcpNotices: seconds": lambda value: GcpNotices(seconds=value),
}


TIMES: list[Any] = [2, 0.5, np.float32(3), torch.tensor(2.5), timedelta(minutes=1)]
NO_TIMES: list[Any] = [-1, -0.5, math.nan, "3", b"3", True, np.bool_(True), 10**400, [3], torch.ones(2), timedelta(-1)]


@pytest.mark.parametrize("option", SECONDS)
def test_times_are_seconds(option: str) -> None:
    use = SECONDS[option]
    for value in TIMES:
        use(value)
    for value in NO_TIMES:
        with pytest.raises(OptionError, match=f"{option} must be a number of seconds"):
            use(value)


def test_seconds_at_their_bounds() -> None:
    assert checked_seconds("t", 0) == 0
    assert checked_seconds("t", math.inf, endless=True) == math.inf
    for bounds, value in (({"positive": True}, 0), ({}, math.inf), ({"endless": True}, math.nan)):
        with pytest.raises(OptionError, match="t must be"):
            checked_seconds("t", value, **bounds)


def test_more_threads_than_a_system_starts_are_refused(store: Path) -> None:
    for call in (incckpt.load, incckpt.verify, lambda url, threads: CheckpointManager(url, threads=threads)):
        with pytest.raises(OptionError, match=f"threads must be an integer from 1 to {MAX_THREADS}, not 100000"):
            call(store, threads=100_000)


def test_text_is_no_flag(store: Path) -> None:
    with pytest.raises(OptionError, match="allow_pickle must be True or False, not 'False'"):
        incckpt.load(store, allow_pickle="False")  # type: ignore[arg-type]
    assert checked_flag("x", np.bool_(True)) is True


def test_options_that_are_secret_are_not_shown(store: Path) -> None:
    with pytest.raises(OptionError, match="storage_options") as raised:
        incckpt.load(store, storage_options="secret=hunter2")  # type: ignore[arg-type]
    assert "hunter2" not in str(raised.value)


def test_numbers_of_any_integer_type() -> None:
    assert checked_count("n", np.uint8(3), 1) == 3
    assert checked_strings("keys", ["a", "b"]) == ("a", "b")
    with pytest.raises(OptionError, match="n must be an integer of at least 1, not -0x"):
        checked_count("n", -(10**5000), 1)
