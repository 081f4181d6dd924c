"""`assert_exact_resume`: train, kill, resume, and compare bit for bit with a training that was not interrupted."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from incckpt.errors import OptionError
from incckpt.inspection.difference import diff
from incckpt.manager import CheckpointManager
from incckpt.options import checked_count

__all__ = ["MakeTraining", "Training", "assert_exact_resume"]

Training: TypeAlias = tuple[Any, Callable[[int], Iterable[Any]]]
MakeTraining: TypeAlias = Callable[[], Training]

_SHOWN = 8


def assert_exact_resume(
    make_training: MakeTraining,
    steps: int,
    *,
    kill_at: Sequence[int] | None = None,
    ignore: Sequence[str] = (),
    timeout: float = 600.0,
) -> None:
    """Check that a training that is killed and resumed ends bit for bit as one that is not.

    One process trains all steps. Others are killed by SIGKILL, a step after each of `kill_at`, and the next goes on
    from the checkpoint. All begin anew, as on another machine, so `make_training` is pickled: a function of a module.

    Parameters
    ----------
    make_training
        Returns ``(state, train)``: what a `CheckpointManager` saves and restores, and a function of the steps done so
        far (0, or those of the checkpoint restored) whose result, a generator, yields after each further step.
    steps
        Of the whole training, 2 or more.
    kill_at
        Steps whose checkpoints are gone on from; by default the first, one in the middle and the last but one.
    ignore
        Globs of dotted names in `state` that may differ, such as ``"timings.*"``.
    timeout
        Most seconds for each process.

    Raises
    ------
    AssertionError
        If the states differ: names what differs, at which step first, and after which kill. Also if a training raises,
        or ends early.
    OptionError
        If an argument is not usable.

    Examples
    --------
    >>> def make_training():  # in a module that can be imported
    ...     model = torch.nn.Linear(4, 1)
    ...     optimizer = torch.optim.AdamW(model.parameters())
    ...
    ...     def train(done):
    ...         while True:
    ...             model(torch.randn(8, 4)).square().mean().backward()
    ...             optimizer.step()
    ...             optimizer.zero_grad()
    ...             yield
    ...
    ...     return {"model": model, "optimizer": optimizer, "rng": incckpt.RngState()}, train
    >>> assert_exact_resume(make_training, steps=10)  # doctest: +SKIP
    """
    steps = checked_count("steps", steps, 2)
    stops = sorted({1, (steps + 1) // 2, steps - 1} if kill_at is None else set(kill_at))
    if not stops or stops[0] < 1 or stops[-1] >= steps:
        raise OptionError(f"kill_at must be steps from 1 to {steps - 1}, not {kill_at}")
    try:
        pickle.dumps(make_training)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise OptionError(
            f"every process makes its own training, so make_training must be a function of a module: {error}"
        ) from error
    with tempfile.TemporaryDirectory(prefix="incckpt-resume-") as folder:
        store = os.path.join(folder, "store")
        _in_process(folder, timeout, make_training, f"{store}#whole", steps, None)
        for stop in (*stops, None):
            _in_process(folder, timeout, make_training, f"{store}#resumed", steps, stop)
        last = _differing(store, steps, ignore)
        if last:
            first = next(step for step in range(1, steps + 1) if _differing(store, step, ignore))
            after = max((stop for stop in stops if stop < first), default=None)
            when = f"after the resume at step {after}" if after else "before any resume: two trainings from the start"
            more = f" and {len(last) - _SHOWN} more" if len(last) > _SHOWN else ""
            raise AssertionError(
                f"resuming is not exact. The states differ from step {first} on ({when}), in "
                f"{_names(_differing(store, first, ignore))}; at the end, in {_names(last)}{more}"
            )


def _names(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN])


def _differing(store: str, step: int, ignore: Sequence[str]) -> list[str]:
    """Return the names of what differs between the two trainings after `step`."""
    found = diff(f"{store}#whole@{step}", f"{store}#resumed@{step}")
    names = [*(one.name for one in found.tensors), *(one.name for one in found.values)]
    return [name for name in names if not any(fnmatchcase(name, pattern) for pattern in ignore)]


def _in_process(
    folder: str, timeout: float, make_training: MakeTraining, url: str, steps: int, stop: int | None
) -> None:
    """Train in a process of its own; it must be killed if it is to be stopped, and end well if not."""
    report = os.path.join(folder, "report")
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_run, args=(make_training, url, steps, stop, report))
    process.start()
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise AssertionError(f"a training of {steps} steps took more than {timeout} seconds")
    if process.exitcode != (0 if stop is None else -signal.SIGKILL):
        text = f"exit code {process.exitcode}"
        if os.path.exists(report):
            with open(report, encoding="utf-8") as file:
                text = file.read()
        raise AssertionError(f"the training failed:\n{text}")


def _run(make_training: MakeTraining, url: str, steps: int, stop: int | None, report: str) -> None:
    """Train on from the latest checkpoint, saving every step; be killed a step after `stop`."""
    try:
        _train(make_training, url, steps, stop)
    except BaseException:
        with open(report, "w", encoding="utf-8") as file:
            file.write(traceback.format_exc())
        raise


def _train(make_training: MakeTraining, url: str, steps: int, stop: int | None) -> None:
    state, train = make_training()
    with CheckpointManager(url) as manager:
        done = manager.restore(state) or 0
        training: Iterator[Any] = iter(train(done))
        for step in range(done + 1, steps + 1):
            try:
                next(training)
            except StopIteration:
                raise AssertionError(f"the training ended after step {step - 1}, of {steps}") from None
            if stop is not None and step == stop + 1:
                os.kill(os.getpid(), signal.SIGKILL)
            saved = manager.save(step, state)
            if step == stop:
                saved.result()
